package procconn

import (
	"sync/atomic"
)

// counters are Stats, for many threads.
type counters struct {
	received, notAsked, own, acks, unknown, malformed, forged, late atomic.Uint64

	waiting   atomic.Int64
	delivered [len(PerKind{})]atomic.Uint64
	lost      [NumCauses]atomic.Uint64

	beatsSent, beatsSeen, beatsMissed, relistens atomic.Uint64

	outcomes                         [numOutcomes]atomic.Uint64
	denied, deadCgroup, inconsistent atomic.Uint64
}

// decode decodes the first message of b and counts what is none of ours.
func (n *counters) decode(b []byte, m *Message) (rest []byte, ok bool) {
	rest, skip, want := decode(b, m)
	switch {
	case want != "":
		n.malformed.Add(1)
		return nil, false
	case skip || !m.What.Known():
		n.unknown.Add(1)
		return rest, false
	}
	return rest, true
}

func (n *counters) stats() Stats {
	s := Stats{
		Received: n.received.Load(), NotAsked: n.notAsked.Load(), Own: n.own.Load(), Acks: n.acks.Load(),
		Unknown: n.unknown.Load(), Malformed: n.malformed.Load(), Forged: n.forged.Load(), Late: n.late.Load(),
		Waiting:   uint64(max(0, n.waiting.Load())),
		BeatsSent: n.beatsSent.Load(), BeatsSeen: n.beatsSeen.Load(), BeatsMissed: n.beatsMissed.Load(),
		Relistens: n.relistens.Load(),
		Facts: FactStats{
			Complete: n.outcomes[complete].Load(), Partial: n.outcomes[partial].Load(), Gone: n.outcomes[gone].Load(),
			Superseded: n.outcomes[superseded].Load(), WrongProcess: n.outcomes[wrongProcess].Load(),
			Throttled: n.outcomes[throttled].Load(),
			Denied:    n.denied.Load(), DeadCgroup: n.deadCgroup.Load(), Inconsistent: n.inconsistent.Load(),
		},
	}
	for k := range s.Delivered {
		s.Delivered[k] = n.delivered[k].Load()
	}
	for c := range s.Lost {
		s.Lost[c] = n.lost[c].Load()
	}
	f := &s.Facts
	f.Execs = f.Complete + f.Partial + f.Gone + f.Superseded + f.WrongProcess + f.Throttled
	return s
}

// An outcome says how the reading of an exec's facts ended; see FactStats.
type outcome uint8

const (
	complete outcome = iota
	partial
	gone
	superseded
	wrongProcess
	throttled
	numOutcomes
)

// A doubt is a fact that was read and not believed, or could not be read.
type doubt uint8

const (
	doubtDenied doubt = 1 << iota // a read was refused
	doubtCgroup                   // "/" of a task that was dead
	doubtExe                      // the arguments changed while exe was read
)

// facts counts what became of an exec's facts.
func (n *counters) facts(o outcome, d doubt) {
	n.outcomes[o].Add(1)
	if d&doubtDenied != 0 {
		n.denied.Add(1)
	}
	if d&doubtCgroup != 0 {
		n.deadCgroup.Add(1)
	}
	if d&doubtExe != 0 {
		n.inconsistent.Add(1)
	}
}

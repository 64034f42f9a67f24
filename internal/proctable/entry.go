package proctable

import (
	"math"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
)

// An entry is a process and what the table needs to know about it.
type entry struct {
	event.Process

	// The start lies in [lo, hi]: one value for a start known exactly, a tick
	// for one from /proc, a longer window for one estimated from a fork.
	lo, hi uint64

	seen    uint64 // stamp of the first evidence of this process
	told    uint64 // stamp of the last rescan that reported something about it; 0 none
	due     uint64 // when ended: stamp at which it may be forgotten
	changed uint64 // stamp of the last reported id change
	image   uint64 // address of the program's stack as /proc showed it; 0 unknown

	prog, group *text // what Name .. Cwd, and Cgroup, point into

	parent, child   *entry // creator; the youngest of its children
	older, younger  *entry // siblings
	prev, next      *entry // in the list named by on
	on              *list
	scan            uint32      // number of the last scan that saw it
	changer, tracer int32       // thread that made the last reported id change; process that traces it
	depth           uint16      // number of ancestors, at most
	tellsEnd        bool        // its end is certain: no need to ask /proc before forgetting it
	orphan          bool        // its parent was asked for in vain
	toldKinds       event.Kinds // what rescans reported about it
}

// list holds ended processes in the order of their ends.
type list struct{ head, tail *entry }

func (l *list) push(e *entry) {
	e.on, e.prev, e.next = l, l.tail, nil
	if l.tail != nil {
		l.tail.next = e
	} else {
		l.head = e
	}
	l.tail = e
}

func (e *entry) unlist() {
	l := e.on
	if l == nil {
		return
	}
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		l.head = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	} else {
		l.tail = e.prev
	}
	e.on, e.prev, e.next = nil, nil, nil
}

// A window is the range a start time lies in.
type window struct{ lo, hi uint64 }

var anyStart = window{0, math.MaxUint64}

// startWindow is what a record says about its subject's start.
func startWindow(f *event.Facts) window {
	switch {
	case !f.Have.Has(event.FieldStart):
		return anyStart
	case f.StartTicks:
		return window{f.Start, f.Start + procfs.Tick - 1}
	}
	return window{f.Start, f.Start}
}

// forkBound is how much earlier than the time stamp of its fork event a
// process may have started. The kernel takes the start time in copy_process,
// before the lock of the process list, and the event's time at its end, so
// usually it is microseconds; but the creator can be preempted in between, for
// a whole period of its CPU quota or longer. The bound is generous because
// the two mistakes are unequal: too short splits a process in two, and it loses
// its lineage. Too long joins two only if a pid is reused within it and the
// second fork was not heard of.
const forkBound = 1_000_000_000

// forkSlack allows for the reading of two clocks when a stamp is converted.
const forkSlack = 2 * uint64(offNoise)

// setStart sets the window of a new entry.
func (e *entry) setStart(w window, src event.Source) {
	e.lo, e.hi = w.lo, w.hi
	if w == anyStart {
		return
	}
	e.Start, e.StartExact = w.lo, w.lo == w.hi
	e.Sources[event.FieldStart] = src
}

// narrow takes over a better knowledge of the start; w overlaps the window.
func (e *entry) narrow(w window, src event.Source) {
	if w == anyStart || w.hi-w.lo >= e.hi-e.lo {
		return
	}
	// The tick's own start stays the name of a process known by tick, though
	// a fork's window may cut the tick.
	e.Start, e.StartExact = w.lo, w.lo == w.hi
	e.Sources[event.FieldStart] = src
	e.lo, e.hi = max(e.lo, w.lo), min(e.hi, w.hi)
}

// relation of a record's subject to the entry that has its pid.
type relation int8

const (
	same    relation = iota
	earlier          // the record is about a process that had the pid before
	later            // the record is about a process that has the pid now; the entry's has ended
)

// compare tells whether a subject with start w, or, if that is not known, the
// author of an event at boot time at, is the entry's process.
func (e *entry) compare(w window, at uint64) relation {
	switch {
	case w == anyStart:
		if at < e.lo {
			return earlier
		}
	case w.hi < e.lo:
		return earlier
	case w.lo > e.hi:
		return later
	}
	return same
}

// toldBy says whether a rescan has reported an event of kind k about e that
// may be the one of stamp.
func (e *entry) toldBy(k event.Kind, stamp uint64) bool {
	return e.knownAfter(stamp) && e.toldKinds.Has(k)
}

// knownAfter says whether a rescan has shown e as it was after stamp.
func (e *entry) knownAfter(stamp uint64) bool { return e.told != 0 && e.told >= stamp }

// adopt makes e the child of p.
func (e *entry) adopt(p *entry) {
	e.disown()
	e.parent, e.Parent = p, &p.Process
	e.older, e.younger = p.child, nil
	if p.child != nil {
		p.child.younger = e
	}
	p.child = e
	e.depth = min(p.depth, math.MaxUint16-1) + 1
}

// disown takes e from its parent's children.
func (e *entry) disown() {
	p := e.parent
	if p == nil {
		return
	}
	if e.younger != nil {
		e.younger.older = e.older
	} else {
		p.child = e.older
	}
	if e.older != nil {
		e.older.younger = e.younger
	}
	e.parent, e.Parent, e.older, e.younger = nil, nil, nil, nil
}

// descends says whether e is a or has it among its ancestors.
func (e *entry) descends(a *entry) bool {
	for ; e != nil; e = e.parent {
		if e == a {
			return true
		}
	}
	return false
}

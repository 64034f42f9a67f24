package procconn

import (
	"bytes"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn/recorder"
)

// heldMax is how many records are kept that come before there is a Handler.
const heldMax = 1 << 15

// A recording sees with the recorder: one socket that queues nothing, and a
// ring.
type recording struct {
	c    *Conn
	rec  *recorder.Recorder
	sock *socket

	take  func(*event.Record) // is (*recording).record: a method value made once, since making it allocates
	held  []event.Record      // what came before Run
	extra uint64              // records that held had no room for, not told yet

	counts, old []recorder.CPU
	malformed   uint64
	since       uint64 // ns, CLOCK_MONOTONIC: when old was read
	beatAt      uint64 // stamp of the last heartbeat
}

func openRecording(c *Conn) (*recording, error) {
	rec, err := recorder.Load(recorder.Config{
		Kinds: c.cfg.Kinds, Cwd: c.cfg.Cwd, RingBytes: c.cfg.RingBytes, SelfTGID: int32(c.tgid),
	})
	if err != nil {
		return nil, fmt.Errorf("load recorder: %w", err)
	}
	r := &recording{c: c, rec: rec, since: monotonic()}
	r.take = r.record
	if r.sock, err = openSocket(c.cfg.network, 0, rec.Attach); err != nil {
		rec.Close()
		return nil, err
	}
	r.old = rec.Counters(nil)
	r.counts = make([]recorder.CPU, 0, len(r.old))
	// What was counted before old was read would never be told.
	clear(r.old)
	return r, nil
}

func (r *recording) listener() *socket { return r.sock }

// ownThread says no: the reader sleeps in Go's poller, which changes threads for
// a goroutine that is locked to one. Before others run what priority the process
// has.
func (r *recording) ownThread() bool { return false }

func (r *recording) drain(bool) (n int, more bool, err error) {
	if r.c.h != nil && r.held != nil {
		for i := range r.held {
			r.c.n.waiting.Add(-1)
			r.c.deliver(&r.held[i])
		}
		n, r.held = len(r.held), nil
	}
	got, err := r.rec.Drain(r.take)
	r.c.n.received.Add(uint64(got))
	r.count()
	return n + got, false, err
}

// record takes one record from the ring.
func (r *recording) record(rec *event.Record) {
	if ack, errno, ok := recorder.AckOf(rec); ok {
		r.c.n.acks.Add(1)
		r.c.sawAck(ack, errno)
		return
	}
	if r.c.isBeat(rec.Kind, rec.PID, rec.TGID) {
		r.c.n.own.Add(1)
		r.beatAt = max(r.beatAt, rec.Stamp)
		return
	}
	switch {
	case !r.c.cfg.Kinds.Has(rec.Kind):
		r.c.n.notAsked.Add(1)
	case r.c.h != nil:
		r.c.deliver(rec)
	case len(r.held) < heldMax:
		r.held = append(r.held, cloneRecord(rec))
		r.c.n.waiting.Add(1)
	default:
		r.extra++
	}
}

// count takes over what the filter and the decoder count.
func (r *recording) count() {
	n := &r.c.n
	if m := r.rec.Malformed(); m != r.malformed {
		n.malformed.Add(m - r.malformed)
		n.received.Add(m - r.malformed)
		r.malformed = m
	}
}

// losses tells what the filter counted as lost since the last call.
func (r *recording) losses(tell func(Loss)) error {
	now := monotonic()
	r.counts = r.rec.Counters(r.counts[:0])
	for i := range r.counts {
		was, is := &r.old[i], &r.counts[i]
		if d := is.Forged - was.Forged; d > 0 {
			r.c.n.forged.Add(d)
			r.c.n.received.Add(d)
		}
		if d := is.Lost - was.Lost; d > 0 {
			tell(Loss{Cause: LostRing, CPU: is.CPU, Count: d, Since: r.since, Until: now})
		}
		if d := is.Gap - was.Gap; d > 0 {
			tell(Loss{Cause: LostSequence, CPU: is.CPU, Count: d, Since: r.since, Until: now})
		}
	}
	if r.extra > 0 {
		tell(Loss{Cause: LostQueue, CPU: -1, Count: r.extra, Since: r.since, Until: now})
		r.extra = 0
	}
	copy(r.old, r.counts)
	r.since = now
	return nil
}

func (r *recording) full() float64 { return r.rec.Full() }

func (r *recording) idle() bool { return true }

// few is less than how many records a look must find for the next one to be due
// after DrainInterval: else it is a waste. Waking up, and Go's scheduler, which
// looks after a thread that has been in a system call, take as long as 5 to 10
// records do; a program that lives for a millisecond makes 3 in that time.
const few = 64

// lazy is the longest pause that is made longer than DrainInterval: the ring
// holds what a storm makes in five times that.
const lazy = 20 * time.Millisecond

// pause is twice DrainInterval while few records come.
func (r *recording) pause(n int) time.Duration {
	d := r.c.cfg.DrainInterval
	if n >= few {
		return d
	}
	return max(d, min(2*d, lazy))
}

func (r *recording) nap(d time.Duration) error { return r.rec.Nap(d) }

func (r *recording) wait(d time.Duration) error {
	_, err := r.rec.Wait(d)
	return err
}

// wake ends a wait or nap, or the next one. It cannot fail: the timer is there
// until close.
func (r *recording) wake() { _ = r.rec.Wake() }

func (r *recording) beatAll() error { return nameThread() }

func (r *recording) beaten(since uint64) (ok bool, where string) {
	return r.beatAt >= since, "recorder"
}

func (r *recording) describe(s *Status) {
	s.Way = ByRecorder
	s.Facts = event.FieldSet(event.FieldStart, event.FieldParent, event.FieldName, event.FieldExe, event.FieldFile,
		event.FieldArgs, event.FieldIDs, event.FieldCaps, event.FieldCgroup, event.FieldNS, event.FieldSession,
		event.FieldNNP, event.FieldExeFile)
	if r.c.cfg.Cwd {
		s.Facts |= event.FieldSet(event.FieldCwd)
	}
	f := r.rec.Features()
	if f.Audit {
		s.Facts |= event.FieldSet(event.FieldLogin)
	} else {
		s.Limits = append(s.Limits, Limit{"kernel audit", "Login id and audit session of a process are not known."})
	}
	if !f.Overlay {
		s.Limits = append(s.Limits, Limit{"type information of overlayfs",
			"It cannot be told whether a program is from the container's image or was written later."})
	}
	if !hasCap(unix.CAP_SYS_NICE) {
		s.Limits = append(s.Limits, Limit{"CAP_SYS_NICE",
			"The reader does not run before other programs: on a busy machine alerts come later, and a storm can fill the ring."})
	}
	s.Limits = append(s.Limits, fileLimits("Of processes that ran before the agent, and where a record was cut short, ")...)
}

func (r *recording) close() error {
	r.sock.close()
	return r.rec.Close()
}

// cloneRecord copies a record and its text.
func cloneRecord(r *event.Record) event.Record {
	c := *r
	for _, p := range []*[]byte{&c.Comm, &c.Exe, &c.File, &c.Cmdline, &c.Cwd, &c.Cgroup} {
		*p = bytes.Clone(*p)
	}
	return c
}

package proctable

import (
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/procfs"
)

// How long a read of /proc may take. Reading arguments is reading the memory of
// the process, and a process can make that take for ever: it moves its
// arguments to a mapping of a file on a FUSE file system of its own, which then
// does not answer. So each such read has a goroutine that can be given up.
//
// On a machine that is starved of CPU time a read may be late through no fault
// of its process. So the patience is spent in many short waits: each takes
// longer where CPU time is scarce, and gives the reader its turn.
const (
	scanWait  = 100 * time.Millisecond
	eventWait = 50 * time.Millisecond // records wait meanwhile
	// After a read that did not end, reads for an event leave the arguments
	// out for a while: a process that does this in turns costs no more than
	// eventWait in each stuckPause.
	stuckPause = time.Second
	waits      = 20
	maxStuck   = 64 // reads given up and still waiting; with that many no more arguments are read
)

// A looker reads /proc on a goroutine of its own, one read at a time.
type looker struct {
	rd    procfs.Reading
	done  chan error // has room for one, so the reader never waits
	timer *time.Timer
	state atomic.Int32
}

// States of a looker. Whoever leaves looking first decides: the reader that it
// is done, or the one who waits that nobody waits any more.
const (
	looking int32 = iota
	finished
	givenUp
)

// read reads a process, without its arguments if maxArgs is 0 or they cannot
// be had. The reading is valid until the next one.
func (t *Table) read(pid int32, maxArgs int, wait time.Duration) (*procfs.Reading, error) {
	l := t.look
	if l == nil {
		l = &looker{done: make(chan error, 1), timer: time.NewTimer(wait)}
		t.look = l
	}
	if maxArgs == 0 || t.stuck.Load() >= maxStuck || wait == eventWait && time.Now().Before(t.pause) {
		err := t.cfg.FS.Read(pid, 0, &l.rd) // nothing in it can be held up
		return &l.rd, err
	}
	l.state.Store(looking)
	go func() {
		err := t.cfg.FS.Read(pid, maxArgs, &l.rd)
		if l.state.CompareAndSwap(looking, finished) {
			l.done <- err
		} else {
			t.stuck.Add(-1)
		}
	}()
	for range waits {
		l.timer.Reset(wait / waits)
		select {
		case err := <-l.done:
			l.timer.Stop()
			return &l.rd, err
		case <-l.timer.C:
		}
	}
	t.stuck.Add(1)
	if !l.state.CompareAndSwap(looking, givenUp) {
		t.stuck.Add(-1)
		return &l.rd, <-l.done
	}
	t.count.stuck.Add(1)
	t.look = nil
	t.pause = time.Now().Add(stuckPause)
	return t.read(pid, 0, wait)
}

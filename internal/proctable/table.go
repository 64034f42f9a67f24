package proctable

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
)

// RepeatWindow is how long after an id change the same change by another
// thread counts as the rest of it: see the package's comment.
const RepeatWindow = time.Second

// maxDepth is the length from which on a lineage loses links of ended
// processes that have one child and say the least.
const maxDepth = 64

// Config says where a Table learns from and how much it may hold. The zero
// value works.
type Config struct {
	// FS is the proc file system; nil: none, as in a replay.
	FS *procfs.FS

	// MaxProcesses bounds the processes held, alive and remembered. Default
	// 131,072, which is about 64 MiB when full, plus text. At least 64.
	MaxProcesses int

	// MaxArgs is how many bytes of argv are kept of a process after its event
	// has been judged; during the event it is all that the record has, or up
	// to 256 KiB from /proc. Default 4 KiB.
	MaxArgs int

	// MaxText is how many bytes of names, paths and arguments are held before
	// text is cut: above it a program keeps at most 256 bytes of each, so the
	// bound is MaxText and about 1 KiB per process. Default 64 MiB. The usual
	// process costs 620 bytes in all (BenchmarkMemory, 100,000 of them).
	MaxText int

	// ExitGrace is how long an ended process without descendants is
	// remembered: records about it may still come. Default 5 s.
	ExitGrace time.Duration

	// Clock defaults to the system's. A replay hands in the recording's.
	Clock Clock

	// Log defaults to none.
	Log *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if c.MaxProcesses == 0 {
		c.MaxProcesses = 128 << 10
	}
	if c.MaxArgs == 0 {
		c.MaxArgs = 4 << 10
	}
	if c.MaxText == 0 {
		c.MaxText = 64 << 20
	}
	if c.ExitGrace == 0 {
		c.ExitGrace = 5 * time.Second
	}
	if c.Clock == nil {
		c.Clock = SystemClock()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.MaxProcesses < 64:
		return c, fmt.Errorf("maxProcesses: %d is below the minimum of 64", c.MaxProcesses)
	case c.MaxArgs < 0 || c.MaxArgs > procfs.DefaultMaxArgs:
		return c, fmt.Errorf("maxArgs: %d bytes is not between 1 and %d", c.MaxArgs, procfs.DefaultMaxArgs)
	case c.MaxText < 0:
		return c, fmt.Errorf("maxText: %d bytes is negative", c.MaxText)
	case c.ExitGrace < 0:
		return c, fmt.Errorf("exitGrace: %v is negative", c.ExitGrace)
	}
	return c, nil
}

// A Table knows the processes of the node.
type Table struct {
	cfg   Config
	time  timeline
	count counters

	procs     map[int32]*entry // the youngest process of each pid
	n         int              // entries held
	ended     list             // remembered, in the order of their ends
	lingering list             // remembered past their grace, for their descendants
	groups    map[string]*text // cgroup paths in use

	buf   []byte   // for building text
	long  []*entry // to be trimmed once judged
	free  []*entry // structs to use again
	texts []*text

	look     *looker      // idle reader of /proc; nil: make one
	stuck    atomic.Int32 // readers given up that still wait; they count themselves out
	pause    time.Time    // no arguments are read for an event before this
	loose    []*entry     // entries outside of the table that the present event shows
	scans    uint32
	warned   uint64 // stamp of the last warning about want of room
	warnedOf uint64 // and the count it told
}

// New makes an empty table. Nothing is read before Scan.
func New(c Config) (*Table, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("process table: %w", err)
	}
	t := &Table{
		cfg:    c,
		time:   timeline{clock: c.Clock},
		procs:  make(map[int32]*entry),
		groups: make(map[string]*text),
	}
	t.time.measure()
	return t, nil
}

// Lookup finds the process that has, or had last, this pid; nil if unknown.
func (t *Table) Lookup(pid int32) *event.Process {
	if e := t.procs[pid]; e != nil {
		return &e.Process
	}
	return nil
}

// All are the processes that have, or had last, their pids, in no order.
func (t *Table) All() iter.Seq[*event.Process] {
	return func(yield func(*event.Process) bool) {
		for _, e := range t.procs {
			if !yield(&e.Process) {
				return
			}
		}
	}
}

// room is how many entries one call may add. They are made free beforehand:
// nothing a call holds may be evicted by the call itself.
const room = 8

func (t *Table) makeRoom(n int) {
	for t.n+n > t.cfg.MaxProcesses && t.evict() {
	}
}

// newEntry makes an entry for pid and puts it into the table. If the table is
// full of live processes the entry is not kept: it is good for this event, and
// kept says so.
func (t *Table) newEntry(pid int32, stamp uint64) (e *entry, kept bool) {
	if t.n >= t.cfg.MaxProcesses {
		t.count.untracked.Add(1)
		return t.looseEntry(pid), false
	}
	if n := len(t.free); n > 0 {
		e, t.free = t.free[n-1], t.free[:n-1]
	} else {
		e = new(entry)
	}
	e.PID, e.seen = pid, stamp
	e.setStart(anyStart, 0)
	if old := t.procs[pid]; old != nil && !old.Exited {
		t.count.replaced.Add(1)
		t.end(old, stamp)
	}
	t.procs[pid] = e
	t.n++
	t.count.live.Add(1)
	return e, true
}

// looseEntry is an entry outside of the table, good for the present event.
func (t *Table) looseEntry(pid int32) *entry {
	e := new(entry)
	e.PID = pid
	e.setStart(anyStart, 0)
	t.loose = append(t.loose, e)
	return e
}

// looseCopy is a loose entry that shows what e does.
func (t *Table) looseCopy(e *entry) *entry {
	c := t.looseEntry(e.PID)
	c.Process = e.Process
	c.lo, c.hi = e.lo, e.hi
	c.prog, c.group = e.prog.share(), e.group.share()
	return c
}

// settle ends the event before: what it showed may be trimmed or dropped now.
func (t *Table) settle() {
	t.trim()
	for i, e := range t.loose {
		t.loose[i] = nil
		t.drop(e.prog)
		t.dropCgroup(e)
	}
	t.loose = t.loose[:0]
}

// end marks a process as ended at stamp.
func (t *Table) end(e *entry, stamp uint64) {
	e.Exited, e.ExitedAt = true, stamp
	e.due = stamp + uint64(t.cfg.ExitGrace)
	e.unlist()
	t.ended.push(e)
	t.count.live.Add(-1)
	t.count.remembered.Add(1)
}

// revive takes an end back.
func (t *Table) revive(e *entry) {
	e.Exited, e.ExitedAt, e.Status = false, 0, 0
	e.tellsEnd = false
	e.toldKinds &^= event.KindSet(event.Exit)
	e.unlist()
	t.count.live.Add(1)
	t.count.remembered.Add(-1)
}

// forget takes e, which has no children, out of the table, and then every
// ancestor that was only kept for it.
func (t *Table) forget(e *entry) {
	for {
		p := e.parent
		t.remove(e)
		if p == nil || p.child != nil || p.on != &t.lingering {
			return
		}
		e = p
	}
}

// remove takes e, which has no children, out of the table.
func (t *Table) remove(e *entry) {
	e.unlist()
	e.disown()
	if t.procs[e.PID] == e {
		delete(t.procs, e.PID)
	}
	t.drop(e.prog)
	t.dropCgroup(e)
	t.n--
	if e.Exited {
		t.count.remembered.Add(-1)
	} else {
		t.count.live.Add(-1)
	}
	*e = entry{}
	if len(t.free) < spares {
		t.free = append(t.free, e)
	}
}

// splice takes e out of the table and gives its children to its parent.
func (t *Table) splice(e *entry) {
	t.count.spliced.Add(1)
	p := e.parent
	for c := e.child; c != nil; c = e.child {
		if p != nil {
			c.adopt(p)
		} else {
			c.disown()
		}
	}
	t.remove(e)
}

// evict forgets the process that ended first, before its time. Those with
// descendants go last, and leave a gap in a lineage.
func (t *Table) evict() bool {
	for e := t.ended.head; e != nil; e = t.ended.head {
		if e.child == nil {
			t.count.evicted.Add(1)
			t.forget(e)
			return true
		}
		e.unlist()
		t.lingering.push(e)
	}
	if e := t.lingering.head; e != nil {
		t.count.evicted.Add(1)
		t.splice(e)
		return true
	}
	return false
}

// shorten takes one link out of the lineage of e, which is too long. A process
// that forks and ends over and over makes an endless chain of ended ancestors,
// all remembered for the last one. A link that never ran a program of its own
// says nothing its parent does not, so such a one goes first; else one from the
// middle: both ends, where the process came from and what it did last, stay.
// Links with several children stay, as there are fewer of them than of living
// processes.
func (t *Table) shorten(e *entry) {
	depth := 0
	var victim *entry
	for a := e.parent; a != nil; a = a.parent {
		depth++
		if !a.Exited || a.parent == nil || a.child.older != nil {
			continue
		}
		switch {
		case a.Execs == 0 && a.Exe == a.parent.Exe && (victim == nil || victim.Execs != 0):
			victim = a
		case (victim == nil || victim.Execs != 0) && depth <= maxDepth/2:
			victim = a
		}
	}
	e.depth = uint16(min(depth, 1<<15))
	if depth > maxDepth && victim != nil {
		t.splice(victim)
		e.depth--
	}
}

// Tick does what time demands: it forgets processes that ended more than
// Config.ExitGrace before now and have no descendants, and follows the clocks.
// Call it about once a second, with now on the clock of event stamps
// (CLOCK_MONOTONIC, ns). The work of one call is bounded; what is left over
// waits for the next.
func (t *Table) Tick(now uint64) {
	const most = 16 << 10
	t.settle()
	t.time.measure()
	for range most {
		e := t.ended.head
		if e == nil || e.due > now {
			break
		}
		switch {
		case t.procs[e.PID] == e && t.goesOn(e, now):
		case e.child != nil:
			e.unlist()
			t.lingering.push(e)
		default:
			t.forget(e)
		}
	}
	t.warn(now)
}

// goesOn asks /proc whether a process whose first thread ended is alive in
// others, unless its end is certain. If so it is kept, and looked at again
// after the next grace: its true end is told by no message.
func (t *Table) goesOn(e *entry, now uint64) bool {
	if e.tellsEnd || t.cfg.FS == nil {
		return false
	}
	var st procfs.Stat
	if t.cfg.FS.Stat(e.PID, &st) != nil || st.Dead() {
		return false
	}
	if e.compare(window{st.Start(), st.Start() + procfs.Tick - 1}, 0) != same {
		return false
	}
	if e.Exited {
		t.count.leaderExits.Add(1)
	}
	t.keepAlive(e, now)
	return true
}

// keepAlive keeps e as alive, to be looked at again after a grace.
func (t *Table) keepAlive(e *entry, now uint64) {
	if e.Exited {
		t.revive(e)
	}
	e.unlist()
	e.due = now + uint64(t.cfg.ExitGrace)
	t.ended.push(e)
}

// warn tells, at most once a minute, that the table is too small, or that a
// lineage grew past maxDepth.
func (t *Table) warn(now uint64) {
	lost := t.count.untracked.Load() + t.count.spliced.Load() + t.count.trimmed.Load()
	if lost == t.warnedOf || now < t.warned+uint64(time.Minute) {
		return
	}
	t.cfg.Log.LogAttrs(context.Background(), slog.LevelWarn, "the process table left something out: for want of room, or links of an endless lineage",
		slog.Uint64("lost", lost-t.warnedOf), slog.Int("processes", t.n),
		slog.Int64("text_bytes", t.count.textBytes.Load()))
	t.warned, t.warnedOf = now, lost
}

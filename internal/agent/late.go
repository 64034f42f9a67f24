package agent

import (
	"slices"
	"sync/atomic"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/enrich"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
)

// What waits for an identity, at most.
const (
	// maxLate is how many alerts wait: some hundred bytes each.
	maxLate = 4096
	// maxKept is how many bytes the copies of events may take that are kept for
	// rules which could not be decided. One takes some kilobytes, so it is room
	// for what dozens of pods run in their first second.
	maxKept = 8 << 20
	// latePatience is how long. The pod is known half a second before its first
	// program runs and the container's name up to 1.2 s after; the rest is for a
	// kubelet that restarts.
	latePatience = 30 * time.Second
)

// A late is what left the node, or could not be decided, before it was known
// where its process runs: each alert gets an amendment when it becomes known,
// and each event whose rules were undecided for want of it is judged again.
// What waits too long, or is too much, is given up, said so, and counted.
//
// It belongs to the pipeline's goroutine, but for the counts.
type late struct {
	complete   func(*event.Workload) *event.Workload
	generation func() uint64 // of what is known; nil: nobody will know more, and nothing waits
	send       func(*pb.Item)
	build      *alert.Builder
	reconsider func(ev *event.Event, before *event.Workload)

	list []lateItem // the oldest first
	seen uint64     // generation at the last look
	kept int        // bytes of the events in it

	waiting    atomic.Int64
	alerts     atomic.Uint64 // alerts that waited: the sum of the next three and those waiting
	completed  atomic.Uint64 // of these, completed by amendments
	expired    atomic.Uint64 // of these, given up for want of time
	evicted    atomic.Uint64 // of these, given up for want of room
	amendments atomic.Uint64 // sent
	events     atomic.Uint64 // events kept for rules
	judged     atomic.Uint64 // of these, judged again with all that can be known
	dropped    atomic.Uint64 // of these, given up
}

// A lateItem is an alert (seq), or an event (ev).
type lateItem struct {
	seq   uint64
	of    alertHead // of seq
	ev    *event.Event
	bytes int             // of ev
	w     *event.Workload // as far as it is told
	since uint64          // ns, CLOCK_MONOTONIC
}

// An alertHead is what decides who gets an alert, and so its amendments.
type alertHead struct {
	rule     string
	severity pb.Severity
	dryRun   bool
}

// alert notes an alert whose process runs in w.
func (l *late) alert(seq uint64, of alertHead, w *event.Workload, now uint64) {
	if seq == 0 || w == nil || l.generation == nil || !enrich.Late(w) {
		return
	}
	l.alerts.Add(1)
	l.push(lateItem{seq: seq, of: of, w: w, since: now})
}

// event notes an event for which rules were undecided.
func (l *late) event(ev *event.Event, now uint64) {
	w := ev.Process.Workload
	if w == nil || l.generation == nil || !enrich.Late(w) {
		return
	}
	l.events.Add(1)
	it := lateItem{ev: policy.Snapshot(ev), w: w, since: now}
	it.bytes = size(it.ev.Process) + size(it.ev.Target)
	for l.kept+it.bytes > maxKept && l.dropOldestEvent() {
	}
	l.push(it)
}

// size is about what a process and its ancestors take.
func size(p *event.Process) (n int) {
	for ; p != nil; p = p.Parent {
		n += 640 + len(p.Name) + len(p.Exe) + len(p.File) + len(p.Cmdline) + len(p.Cwd) + len(p.Cgroup)
	}
	return n
}

func (l *late) push(it lateItem) {
	if len(l.list) == maxLate {
		old := l.list[0]
		l.list = append(l.list[:0], l.list[1:]...)
		l.kept -= old.bytes
		l.giveUp(old, &l.evicted)
	}
	l.list = append(l.list, it)
	l.kept += it.bytes
	l.waiting.Store(int64(len(l.list)))
}

func (l *late) dropOldestEvent() bool {
	i := slices.IndexFunc(l.list, func(it lateItem) bool { return it.ev != nil })
	if i < 0 {
		return false
	}
	l.kept -= l.list[i].bytes
	l.list = slices.Delete(l.list, i, i+1)
	l.dropped.Add(1)
	return true
}

// look tells what has become known. Call it after each drain: it does nothing
// when nothing can have.
func (l *late) look(now uint64) {
	if len(l.list) == 0 {
		return
	}
	fresh := l.generation()
	overdue := now-min(now, l.list[0].since) > uint64(latePatience)
	if fresh == l.seen && !overdue {
		return
	}
	// What is judged again may itself be late and be appended meanwhile.
	items := l.list
	l.list, l.kept = nil, 0
	l.seen = fresh
	for _, it := range items {
		if w := l.complete(it.w); w != it.w {
			l.tell(&it, w)
		}
		switch {
		case !enrich.Late(it.w):
			l.finish(it)
		case now-min(now, it.since) > uint64(latePatience):
			l.giveUp(it, &l.expired)
		default:
			l.push(it)
		}
	}
	l.waiting.Store(int64(len(l.list)))
}

// tell says what is known by now: w.
func (l *late) tell(it *lateItem, w *event.Workload) {
	before := it.w
	it.w = w
	if w.Pod == before.Pod && w.Container == before.Container && w.Place == before.Place && w.Sandbox == before.Sandbox {
		return // another reason only
	}
	if it.seq != 0 {
		l.amend(it, false)
	}
	if it.ev != nil {
		it.ev.Process.Workload = w
		l.reconsider(it.ev, before)
	}
}

func (l *late) amend(it *lateItem, gaveUp bool) {
	l.amendments.Add(1)
	m := l.build.Amendment(it.seq, it.w, time.Now(), gaveUp)
	m.Rule, m.Severity, m.DryRun = it.of.rule, it.of.severity, it.of.dryRun
	l.send(&pb.Item{Item: &pb.Item_Amendment{Amendment: m}})
}

func (l *late) finish(it lateItem) {
	if it.seq != 0 {
		l.completed.Add(1)
	}
	if it.ev != nil {
		l.judged.Add(1)
	}
}

func (l *late) giveUp(it lateItem, count *atomic.Uint64) {
	if it.seq != 0 {
		count.Add(1)
		l.amend(&it, true)
	}
	if it.ev != nil {
		l.dropped.Add(1)
	}
}

// end gives up what waits: the agent stops.
func (l *late) end() {
	for _, it := range l.list {
		l.giveUp(it, &l.expired)
	}
	l.list, l.kept = nil, 0
	l.waiting.Store(0)
}

package policy

import (
	"encoding/binary"
	"hash/maphash"
	"maps"
	"slices"
	"time"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// Bounds of what is held back, in number and in bytes: for the policies of the
// cluster together, and for those of each namespace.
const (
	maxWindows, maxWindowBytes             = 2048, 8 << 20 // of aggregation
	maxCounts, maxCountBytes               = 4096, 4 << 20 // towards thresholds
	maxTenantWindows, maxTenantWindowBytes = 256, 1 << 20
	maxTenantCounts, maxTenantCountBytes   = 512, 512 << 10
)

// A clock is the time of the events, in ns. It never goes back: an event that
// comes late counts as one of now.
type clock struct {
	now int64
	due int64 // when something that is held back runs out; not later than that
}

// A holder is what is held back for the policies of the cluster, or for those
// of one namespace: a flood in one cannot push out what another one counts.
// It belongs to Evaluate's goroutine.
type holder struct {
	clock   *clock
	sum     maphash.Hash // keyed, so that nobody can choose names that collide
	windows timers[*window]
	counts  timers[*tally]
	limits  map[string]*spent // by policy
	scratch []byte
}

func (e *Engine) holder(namespace string) *holder {
	h := e.holds[namespace]
	if h == nil {
		h = &holder{clock: &e.clock, limits: map[string]*spent{}}
		h.windows.most, h.windows.mostBytes = maxWindows, maxWindowBytes
		h.counts.most, h.counts.mostBytes = maxCounts, maxCountBytes
		if namespace != "" {
			h.windows.most, h.windows.mostBytes = maxTenantWindows, maxTenantWindowBytes
			h.counts.most, h.counts.mostBytes = maxTenantCounts, maxTenantCountBytes
		}
		e.holds[namespace] = h
	}
	return h
}

// key begins to name what is counted together: the rule, and the values of by.
func (h *holder) key(a *celenv.Activation, r *Rule, by []*celenv.Expr) {
	h.sum.Reset()
	h.text(r.ID)
	for _, x := range by {
		h.scratch = x.AppendKey(h.scratch[:0], a)
		h.sum.Write(h.scratch)
	}
}

// identity adds what no aggregation looks over: who it was, in which
// container, by which lineage, on whom, and how bad it is.
func (h *holder) identity(r *Rule, v verdict, ev *event.Event) {
	p := ev.Process
	h.text(string(r.Spec.Severity))
	h.sum.WriteByte(byte(v.truth))
	if w := p.Workload; w != nil {
		h.sum.WriteByte(byte(w.Place))
		h.text(w.ContainerID)
	}
	if h.flag(p.Has(event.FieldIDs)) {
		h.number(p.UID)
		h.number(p.EUID)
	}
	for i := 0; p != nil && i < maxView; i++ {
		switch {
		case h.flag(p.Has(event.FieldExe)):
			h.text(p.Exe)
		case h.flag(p.Has(event.FieldName)):
			h.text(p.Name)
		}
		p = p.Parent
	}
	if h.flag(ev.Target != nil) {
		h.text(ev.Target.Exe)
	}
	if h.flag(ev.HasBefore) {
		h.number(ev.Before.UID)
		h.number(ev.Before.EUID)
	}
}

// text adds s in a way that no two texts can be taken for two others.
func (h *holder) text(s string) {
	h.number(uint32(len(s)))
	h.sum.WriteString(s)
}

func (h *holder) number(n uint32) {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], n)
	h.sum.Write(b[:])
}

func (h *holder) flag(v bool) bool {
	b := byte(0)
	if v {
		b = 1
	}
	h.sum.WriteByte(b)
	return v
}

// A tally counts matches towards a threshold.
type tally struct {
	rule    *Rule
	m       meter
	times   []int64 // of the matches that count, the oldest first
	samples samples
}

// count adds a match. It returns nil below the threshold.
func (h *holder) count(a *celenv.Activation, r *Rule, m meter, ev *event.Event) *Aggregated {
	h.key(a, r, r.threshold.by)
	k := h.sum.Sum64()
	span := int64(r.threshold.window)
	t := h.counts.get(k)
	if t == nil {
		var out *tally
		if t, out = h.counts.add(k, &tally{rule: r, m: m}); out != nil {
			out.forget()
		}
	}
	old := 0
	for old < len(t.times) && t.times[old] <= h.clock.now-span {
		old++
	}
	t.times = append(slices.Delete(t.times, 0, old), h.clock.now)
	from := ev.Time.Add(-time.Duration(h.clock.now - t.times[0]))
	t.samples.list = slices.DeleteFunc(t.samples.list, func(x Sample) bool { return x.Time.Before(from) })
	t.samples.add(ev)
	if len(t.times) < r.threshold.count {
		h.until(h.clock.now + span)
		h.counts.set(k, h.clock.now+span)
		h.counts.weigh(k, 8*cap(t.times)+t.samples.bytes())
		for out, ok := h.counts.tooMuch(); ok; out, ok = h.counts.tooMuch() {
			out.forget()
		}
		return nil
	}
	h.counts.remove(k)
	return &Aggregated{Count: uint64(len(t.times)), Why: WhyThreshold, From: from, Until: ev.Time, Samples: t.samples.list}
}

// forget counts what is dropped.
func (t *tally) forget() { t.m.forgotten.Add(uint64(len(t.times))) }

// A window holds the repeats of a match.
type window struct {
	key     uint64
	rule    *Rule
	m       meter
	first   uint64    // Seq of the first match's alert; 0: it was not raised
	from    time.Time // of the first match
	match   *Match    // of the first repeat; nil: there was none
	count   uint64    // repeats
	until   time.Time // of the last
	samples samples
}

// window finds the window that a match falls in, or opens one for it.
func (h *holder) window(e *Engine, r *Rule, m meter, v verdict, ev *event.Event, emit func(*Match)) (w *window, repeat bool) {
	h.key(e.act, r, r.aggregate.by)
	h.identity(r, v, ev)
	k := h.sum.Sum64()
	if w := h.windows.get(k); w != nil {
		return w, true
	}
	w, out := h.windows.add(k, &window{key: k, rule: r, m: m, from: ev.Time})
	end := h.clock.now + int64(r.aggregate.window)
	h.until(end)
	if h.windows.set(k, end); out != nil {
		h.close(e, out, WhyEvicted, emit)
	}
	return w, false
}

// repeat counts a repeat. The first one becomes the summary.
func (h *holder) repeat(e *Engine, w *window, v verdict, ev *event.Event, emit func(*Match)) {
	if w.count++; w.match == nil {
		w.match = e.match(w.rule, w.m, v, ev)
		w.match.Event = repeat.copy(w.match.Event)
	}
	w.until = ev.Time
	w.samples.add(ev)
	h.windows.weigh(w.key, w.match.bytes()+w.samples.bytes())
	for out, ok := h.windows.tooMuch(); ok; out, ok = h.windows.tooMuch() {
		h.close(e, out, WhyEvicted, emit)
	}
}

// close sums a window up.
func (h *holder) close(e *Engine, w *window, why Why, emit func(*Match)) {
	if w.count == 0 {
		return
	}
	if w.rule.Mode != v1alpha1.ModeDryRun && !h.allow(w.rule.policy) {
		w.m.summaryLimited.Add(w.count)
		return
	}
	w.match.Aggregated = &Aggregated{Count: w.count, First: w.first, Why: why, From: w.from, Until: w.until, Samples: w.samples.list}
	w.m.summaries.Add(1)
	w.m.summarised.Add(w.count)
	if w.rule.Mode == v1alpha1.ModeDryRun {
		if w.match.DryRun = true; e.cfg.DryRun != nil {
			e.cfg.DryRun(w.match)
		}
		return
	}
	emit(w.match)
}

// spent is what a policy used of its rate limit.
type spent struct {
	since  int64
	alerts int
}

// allow takes one alert from a policy's rate limit.
func (h *holder) allow(p *Policy) bool {
	if p.limit == nil {
		return true
	}
	s := h.limits[p.FullName()]
	if s == nil {
		s = &spent{since: h.clock.now}
		h.limits[p.FullName()] = s
	}
	if h.clock.now-s.since >= int64(p.limit.window) {
		s.since, s.alerts = h.clock.now, 0
	}
	if s.alerts >= p.limit.alerts {
		return false
	}
	s.alerts++
	return true
}

// until notes that something runs out at end.
func (h *holder) until(end int64) { h.clock.due = min(h.clock.due, end) }

// expire closes what has run out, and notes when the next one will.
func (h *holder) expire(e *Engine, emit func(*Match)) {
	for ok := true; ok; {
		_, ok = h.counts.due(h.clock.now) // its matches were counted when they came
	}
	for w, ok := h.windows.due(h.clock.now); ok; w, ok = h.windows.due(h.clock.now) {
		h.close(e, w, WhyWindow, emit)
	}
	h.until(h.counts.next())
	h.until(h.windows.next())
}

// follow turns to another set: what belongs to a rule that is gone, or that
// counts otherwise now, is closed.
func (h *holder) follow(e *Engine, l *loaded, emit func(*Match)) {
	rules := make(map[string]int, len(l.set.rules))
	for i, r := range l.set.rules {
		rules[r.ID] = i
	}
	find := func(old *Rule, same func(a, b *Rule) bool) (*Rule, meter, bool) {
		i, ok := rules[old.ID]
		if !ok || !same(old, l.set.rules[i]) || l.set.rules[i].Mode != old.Mode {
			return nil, meter{}, false
		}
		return l.set.rules[i], l.meters[i], true
	}
	h.windows.each(func(k uint64, w *window) {
		r, m, ok := find(w.rule, func(a, b *Rule) bool {
			return b.aggregate != nil && a.Spec.Aggregate.Window == b.Spec.Aggregate.Window && slices.Equal(a.Spec.Aggregate.By, b.Spec.Aggregate.By)
		})
		if !ok {
			h.windows.remove(k)
			h.close(e, w, WhyPolicy, emit)
			return
		}
		w.rule, w.m = r, m
	})
	h.counts.each(func(k uint64, t *tally) {
		r, m, ok := find(t.rule, func(a, b *Rule) bool {
			x, y := a.Spec.Threshold, b.Spec.Threshold
			return y != nil && x.Window == y.Window && x.Count == y.Count && slices.Equal(x.By, y.By)
		})
		if !ok {
			h.counts.remove(k)
			t.forget()
			return
		}
		t.rule, t.m = r, m
	})
	policies := make(map[string]bool, len(l.set.policies))
	for _, p := range l.set.policies {
		policies[p.FullName()] = true
	}
	for name := range h.limits {
		if !policies[name] {
			delete(h.limits, name)
		}
	}
}

// advance takes the clock from an event.
func (e *Engine) advance(ev *event.Event, emit func(*Match)) {
	now := int64(ev.Stamp)
	if now == 0 {
		now = ev.Time.UnixNano()
	}
	e.tick(now, emit)
}

func (e *Engine) tick(now int64, emit func(*Match)) {
	c := &e.clock
	if c.now = max(c.now, now); c.now < c.due {
		return
	}
	c.due = never
	for _, name := range e.holding() {
		e.holds[name].expire(e, emit)
	}
}

// holding lists whose policies hold something back, in an order that is the
// same each time: a replay tells the same story.
func (e *Engine) holding() []string { return slices.Sorted(maps.Keys(e.holds)) }

// Tick tells the engine how late it is, in ns of CLOCK_MONOTONIC, as event.Stamp
// is: what is held back is summed up in time also when nothing happens.
func (e *Engine) Tick(mono uint64, emit func(*Match)) {
	if l := e.loaded.Load(); l != e.current {
		e.adopt(l, emit)
	}
	e.tick(int64(mono), emit)
}

// Flush sums up everything that is held back, for the end.
func (e *Engine) Flush(emit func(*Match)) {
	for _, name := range e.holding() {
		h := e.holds[name]
		h.windows.each(func(k uint64, w *window) {
			h.windows.remove(k)
			h.close(e, w, WhyEnd, emit)
		})
	}
}

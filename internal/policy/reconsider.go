package policy

import (
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// Reconsider judges an event again, for which Evaluate reported that something
// was open: ev is a Snapshot of it whose process has the workload that is known
// by now, and before is the one it had. Rules that were undecided and are true
// now match late. Nothing else is counted or raised again; a rule that alerted
// because it was undecided does not do so a second time.
func (e *Engine) Reconsider(ev *event.Event, before *event.Workload, emit func(*Match)) {
	l := e.loaded.Load()
	if l != e.current {
		e.adopt(l, emit)
	}
	open := map[int]bool{} // rules that were undecided: whether they alerted then
	p := ev.Process
	now := p.Workload
	move(p, now, before)
	if c := e.classOf(ev); c != nil {
		for _, n := range c.unplaced {
			open[int(n)] = false
		}
		e.act.Reset(ev)
		e.again(l, c, ev, func(n int, v verdict) {
			if v.truth == celenv.Undecided && v.exception < 0 {
				open[n] = l.set.rules[n].alerting()
			}
		})
	}
	move(p, before, now)
	c := e.classOf(ev)
	if c == nil || len(open) == 0 {
		return
	}
	e.act.Reset(ev)
	e.again(l, c, ev, func(n int, v verdict) {
		alerted, was := open[n]
		if !was || alerted || v.truth != celenv.True || v.exception >= 0 {
			return
		}
		r, m := l.set.rules[n], l.meters[n]
		v.late = true
		m.late.Add(1)
		m.lastMatch.Store(ev.Time.UnixNano())
		e.settle(r, m, v, ev, emit)
	})
}

// move puts p, and its ancestors that run where it does, into another workload:
// what is known of one of them is known of all.
func move(p *event.Process, from, to *event.Workload) {
	for a := p; a != nil; a = a.Parent {
		if a.Workload == from {
			a.Workload = to
		}
	}
}

// again asks the rules of a class once more, without counting.
func (e *Engine) again(l *loaded, c *class, ev *event.Event, visit func(rule int, v verdict)) {
	for i := range c.parts {
		p := &c.parts[i]
		g := &l.groups[p.group]
		var start time.Duration
		if g.tenant != nil {
			var ok bool
			if start, ok = g.tenant.begin(e.cfg.clock); !ok {
				continue
			}
		}
		for _, hit := range g.matcher.Evaluate(e.act, p.rules) {
			v := verdict{truth: hit.Truth, exception: -1}
			if v.truth == celenv.True && p.some && p.unsure.Has(hit.Rule) {
				v.truth = celenv.Undecided
			}
			e.exceptions(g.matcher, hit.Rule, l.set.rules[g.first+hit.Rule], ev.Time, &v)
			visit(g.first+hit.Rule, v)
		}
		if g.tenant != nil {
			g.tenant.end(e.cfg.clock, start)
		}
	}
}

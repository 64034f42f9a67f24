package policy

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/match"
)

// Bounds of what is remembered about scopes. Beyond them it is forgotten as a
// whole, and made anew as events come.
const (
	maxPlaces  = 4096 // workloads
	maxClasses = 1024 // different sets of rules
)

// A place is what was resolved for a workload: the class of each kind of
// event, nil where it was not asked for yet.
type place [maxKinds]*class

// A class is the events that are judged by the same rules, in as many
// workloads as it may be.
type class struct {
	kind   event.Kind
	parts  []part // of each group that has rules for them
	events atomic.Uint64
	// unplaced are rules of namespaces that may be the event's: it is not
	// known whose pod it is. They are undecided, and not asked: what happens
	// elsewhere is not theirs to see, nor to pay for.
	unplaced []int32 // among the set's rules
	base     *loaded
}

// A part is the rules of one group that look at a class.
type part struct {
	active
	group      int            // among the set's
	overBudget *atomic.Uint64 // events for which the group had no time
}

// none is the class of events no rule looks at.
var none = new(class)

// classOf finds the rules for an event; nil when there are none.
func (e *Engine) classOf(ev *event.Event) *class {
	if ev.Kind >= maxKinds {
		return nil
	}
	w := ev.Process.Workload
	p := e.places[w]
	if p == nil {
		if len(e.places) >= maxPlaces || len(e.classes) >= maxClasses {
			e.forget()
		}
		p = new(place)
		e.places[w] = p
	}
	c := p[ev.Kind]
	if c == nil {
		c = e.resolve(w, ev.Kind)
		p[ev.Kind] = c
	}
	if c == none {
		return nil
	}
	return c
}

// resolve asks all scopes about a workload.
func (e *Engine) resolve(w *event.Workload, kind event.Kind) *class {
	c := &class{kind: kind, base: e.current}
	for i := range e.current.groups {
		g := &e.current.groups[i]
		a := g.active(w, kind, e.cfg.NodeLabels)
		switch {
		case !a.any:
		case g.tenant != nil && (placeOf(w) == event.PlaceUnknown || w.Pod == nil):
			for n := range g.rules {
				if a.rules.Has(n) {
					c.unplaced = append(c.unplaced, int32(g.first+n))
				}
			}
		default:
			c.parts = append(c.parts, part{active: a, group: i, overBudget: new(atomic.Uint64)})
		}
	}
	if len(c.parts) == 0 && len(c.unplaced) == 0 {
		return none
	}
	name := c.name()
	if same := e.classes[name]; same != nil {
		return same
	}
	e.classes[name] = c
	e.mu.Lock()
	e.counts = append(e.counts, c)
	e.mu.Unlock()
	return c
}

// name tells classes with different rules apart.
func (c *class) name() string {
	b := []byte{byte(c.kind)}
	put := func(set match.Bits) {
		for _, w := range set {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
	}
	for i := range c.parts {
		p := &c.parts[i]
		b = binary.LittleEndian.AppendUint32(b, uint32(p.group))
		put(p.rules)
		put(p.unsure)
	}
	for _, n := range c.unplaced {
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
	}
	return string(b)
}

// forget drops what was resolved and adds what was counted by class to the
// rules' own counts.
func (e *Engine) forget() {
	e.mu.Lock()
	for _, c := range e.counts {
		c.spread(func(n int, sum classSum) { e.current.meters[n].classes.add(sum) })
	}
	e.counts = nil
	e.mu.Unlock()
	e.places, e.classes = make(map[*event.Workload]*place), make(map[string]*class)
}

// classSum is what classes count for one rule.
type classSum struct {
	seen       uint64 // events of its kinds and scope, or perhaps its scope
	unplaced   uint64 // of these: of whom it is not known whose they are
	overBudget uint64 // of these: for which there was no time
}

func (s *classSum) add(o classSum) {
	s.seen += o.seen
	s.unplaced += o.unplaced
	s.overBudget += o.overBudget
}

// spread tells what the class counted for each of its rules.
func (c *class) spread(add func(rule int, sum classSum)) {
	events := c.events.Load()
	for i := range c.parts {
		p := &c.parts[i]
		g := c.base.groups[p.group]
		over := p.overBudget.Load()
		for n := range g.rules {
			if p.rules.Has(n) {
				add(g.first+n, classSum{seen: events, overBudget: over})
			}
		}
	}
	for _, n := range c.unplaced {
		add(int(n), classSum{seen: events, unplaced: events})
	}
}

// adopt turns to another set.
func (e *Engine) adopt(l *loaded, emit func(*Match)) {
	if e.current != nil {
		e.forget() // counts for the rules of the set before
	}
	e.current = l
	e.places, e.classes = make(map[*event.Workload]*place), make(map[string]*class)
	for _, namespace := range e.holding() {
		e.holds[namespace].follow(e, l, emit)
		if namespace != "" && l.set.tenants[namespace] == nil {
			delete(e.holds, namespace)
		}
	}
}

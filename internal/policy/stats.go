package policy

import (
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/api/v1alpha1"
)

// Stats are the counts of one rule since it was first in force.
//
// Every evaluation ends in exactly one way:
//
//	Evaluated = NotMatched + Matched + Suppressed + Undecided + Errors
//
// and so does every match, together with what was undecided or failed in a
// rule with onUndecided: Alert:
//
//	Matched + UndecidedAlerts = Alerts + DryRun
//
// While events are evaluated, a snapshot may be one event apart.
type Stats struct {
	Rule *Rule

	Evaluated  uint64 // events of the rule's kinds and scope
	NotMatched uint64 // the condition was false
	Matched    uint64 // the condition was true, and no exception
	Suppressed uint64 // an exception was true
	Undecided  uint64 // a fact was missing
	Errors     uint64 // the condition failed

	UndecidedAlerts uint64 // of Undecided and Errors: treated as a match
	Alerts          uint64 // matches handed on
	DryRun          uint64 // matches of a rule in dry run

	UnsureExceptions uint64 // of Matched: an exception could not be decided, and did not silence
	MessageErrors    uint64 // the message expression failed, and the title was used

	Exceptions []ExceptionStats // in the rule's order
	LastMatch  time.Time        // of Matched; zero: never
	LastError  string           // the last failure of the condition or an exception; bounded
}

// ExceptionStats are the counts of one exception.
type ExceptionStats struct {
	Name string
	Hits uint64 // matches it silenced
}

// counters of one rule. Evaluate's goroutine adds, any reads.
type counters struct {
	evaluated, matched, suppressed, undecided, errors  atomic.Uint64
	undecidedAlerts, alerts, dryRun, unsure, messageEr atomic.Uint64
	lastMatch                                          atomic.Int64 // ns since 1970; 0 never
	lastError                                          atomic.Pointer[string]
}

func (c *counters) fail(err error) {
	text := cut(err.Error(), 512)
	if old := c.lastError.Load(); old == nil || *old != text {
		c.lastError.Store(&text)
	}
}

// A meter is what one rule of a set counts in. The counters outlive the set.
type meter struct {
	*counters
	hits []*atomic.Uint64 // of the exceptions, in the rule's order
}

// metersLocked makes the meters for a set's rules. What was counted under the same
// name before goes on; what has no name any more is forgotten.
func (e *Engine) metersLocked(s *Set) []meter {
	rules, hits := make(map[string]*counters), make(map[string]*atomic.Uint64)
	out := make([]meter, len(s.rules))
	for i, r := range s.rules {
		c := keep(e.rules, rules, r.ID)
		out[i] = meter{counters: c}
		for _, x := range r.exceptions {
			out[i].hits = append(out[i].hits, keep(e.hits, hits, r.ID+"#"+x.name))
		}
	}
	e.rules, e.hits = rules, hits
	return out
}

func keep[T any](from, to map[string]*T, name string) *T {
	c := from[name]
	if c == nil {
		c = new(T)
	}
	to[name] = c
	return c
}

// Stats is a snapshot of all rules in force, in the order of Set.Rules.
func (e *Engine) Stats() []Stats {
	l := e.loaded.Load()
	out := make([]Stats, len(l.set.rules))
	for i, r := range l.set.rules {
		out[i] = l.meters[i].stats(r)
	}
	return out
}

func (m meter) stats(r *Rule) Stats {
	// What is counted last is read first: what is derived cannot be negative.
	s := Stats{
		Rule:   r,
		Alerts: m.alerts.Load(), DryRun: m.dryRun.Load(), MessageErrors: m.messageEr.Load(),
		UndecidedAlerts: m.undecidedAlerts.Load(), UnsureExceptions: m.unsure.Load(),
		Matched: m.matched.Load(), Suppressed: m.suppressed.Load(), Undecided: m.undecided.Load(), Errors: m.errors.Load(),
	}
	s.Evaluated = m.evaluated.Load()
	s.NotMatched = s.Evaluated - s.Matched - s.Suppressed - s.Undecided - s.Errors
	for i, x := range r.exceptions {
		s.Exceptions = append(s.Exceptions, ExceptionStats{x.name, m.hits[i].Load()})
	}
	if ns := m.lastMatch.Load(); ns != 0 {
		s.LastMatch = time.Unix(0, ns).UTC()
	}
	if e := m.lastError.Load(); e != nil {
		s.LastError = *e
	}
	return s
}

// alerting says whether a rule takes what it cannot decide for a match.
func (r *Rule) alerting() bool { return r.Spec.OnUndecided == v1alpha1.UndecidedAlert }

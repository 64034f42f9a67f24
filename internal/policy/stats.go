package policy

import (
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/api/v1alpha1"
)

// Stats are the counts of one rule since it was first in force.
//
// Every event of the rule's kinds and scope ends in exactly one way:
//
//	Seen      = Evaluated + OverBudget
//	Evaluated = NotMatched + Matched + Suppressed + Undecided + Errors
//
// and so does every match, together with what was undecided or failed in a
// rule with onUndecided: Alert, and with what was decided late:
//
//	Matched + UndecidedAlerts + LateMatches = Alerts + DryRun + BelowThreshold + Aggregated + RateLimited
//
// and so does every repeat that was held back:
//
//	Aggregated = Summarised + SummaryLimited + Pending
//
// While events are evaluated, a snapshot may be one event apart.
type Stats struct {
	Rule  *Rule
	State v1alpha1.RuleState

	Seen       uint64 // events of the rule's kinds and scope, or perhaps its scope
	OverBudget uint64 // not evaluated: the namespace's time was used up
	Evaluated  uint64
	NotMatched uint64 // the condition was false
	Matched    uint64 // the condition was true, and no exception
	Suppressed uint64 // an exception was true
	Undecided  uint64 // a fact was missing, or whether the process is in scope
	Errors     uint64 // the condition failed

	UndecidedAlerts uint64 // of Undecided and Errors: treated as a match
	LateMatches     uint64 // of Undecided: a match when it was known where the process runs
	Alerts          uint64 // matches handed on, each by itself
	DryRun          uint64 // the same, of a rule in dry run
	BelowThreshold  uint64 // matches that count towards a threshold
	Aggregated      uint64 // matches that repeat another one
	RateLimited     uint64 // matches beyond the policy's rate limit

	Summaries      uint64 // alerts that sum up repeats, beside Alerts and DryRun
	Summarised     uint64 // of Aggregated: told of by a summary
	SummaryLimited uint64 // of Aggregated: the summary was beyond the rate limit
	Pending        uint64 // of Aggregated: the window is open
	Forgotten      uint64 // counts towards a threshold that were dropped for lack of room

	UnsureExceptions uint64 // of Matched: an exception could not be decided, and did not silence
	MessageErrors    uint64 // the message expression failed, and the title was used

	Exceptions []ExceptionStats // in the rule's order
	LastMatch  time.Time        // of Matched; zero: never
	LastError  string           // the last failure of the condition or an exception; bounded
}

// HeldBack is what matched and was not raised by itself.
func (s *Stats) HeldBack() uint64 {
	return s.Suppressed + s.BelowThreshold + s.Aggregated + s.RateLimited
}

// ExceptionStats are the counts of one exception.
type ExceptionStats struct {
	Name string
	Hits uint64 // matches it silenced
}

// counters of one rule. Evaluate's goroutine adds, any reads.
type counters struct {
	matched, suppressed, undecided, errors             atomic.Uint64
	undecidedAlerts, late, alerts, dryRun, unsure      atomic.Uint64
	belowThreshold, aggregated, rateLimited, messageEr atomic.Uint64
	summaries, summarised, summaryLimited, forgotten   atomic.Uint64
	lastMatch                                          atomic.Int64 // ns since 1970; 0 never
	lastError                                          atomic.Pointer[string]
	classes                                            classSum // of classes that are gone; guarded by Engine.mu
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
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.loaded.Load()
	out := make([]Stats, len(l.set.rules))
	// What is counted last is read first: what is derived cannot be negative.
	for i, r := range l.set.rules {
		out[i] = l.meters[i].stats(r)
	}
	sums := make(map[*counters]classSum)
	for _, c := range e.counts {
		c.spread(func(n int, sum classSum) {
			total := sums[c.base.meters[n].counters]
			total.add(sum)
			sums[c.base.meters[n].counters] = total
		})
	}
	for i := range out {
		sum := l.meters[i].classes
		sum.add(sums[l.meters[i].counters])
		out[i].complete(sum)
	}
	for i, g := range l.set.groups {
		for n := range g.rules {
			s := &out[g.first+n]
			s.State = e.state(&l.groups[i], n, s)
		}
	}
	return out
}

// complete adds what is counted by class and derives the rest.
func (s *Stats) complete(sum classSum) {
	s.Seen, s.OverBudget = sum.seen, sum.overBudget
	s.Undecided += sum.unplaced
	s.Evaluated = s.Seen - s.OverBudget
	s.NotMatched = s.Evaluated - s.Matched - s.Suppressed - s.Undecided - s.Errors
	s.Pending = s.Aggregated - s.Summarised - s.SummaryLimited
}

func (m meter) stats(r *Rule) Stats {
	s := Stats{
		Rule: r, Summaries: m.summaries.Load(), Summarised: m.summarised.Load(), SummaryLimited: m.summaryLimited.Load(),
		Alerts: m.alerts.Load(), DryRun: m.dryRun.Load(), MessageErrors: m.messageEr.Load(), Forgotten: m.forgotten.Load(),
		BelowThreshold: m.belowThreshold.Load(), Aggregated: m.aggregated.Load(), RateLimited: m.rateLimited.Load(),
		UndecidedAlerts: m.undecidedAlerts.Load(), LateMatches: m.late.Load(), UnsureExceptions: m.unsure.Load(),
		Matched: m.matched.Load(), Suppressed: m.suppressed.Load(), Undecided: m.undecided.Load(), Errors: m.errors.Load(),
	}
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

// state says whether a rule is evaluated.
func (e *Engine) state(g *readyGroup, n int, s *Stats) v1alpha1.RuleState {
	switch {
	case n >= len(g.rules) || g.tenant != nil && g.tenant.overTime(e.cfg.clock):
		return v1alpha1.RuleOverBudget
	case s.Rule.Mode == v1alpha1.ModeDisabled:
		return v1alpha1.RuleDisabled
	case s.Rule.Mode == v1alpha1.ModeDryRun:
		return v1alpha1.RuleDryRun
	}
	return v1alpha1.RuleActive
}

// alerting says whether a rule takes what it cannot decide for a match.
func (r *Rule) alerting() bool { return r.Spec.OnUndecided == v1alpha1.UndecidedAlert }

package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
)

// An Inspection is what a look at a compiled rule tells its author.
type Inspection struct {
	Rule       *Rule
	Field      string       // of the rule in its object: spec.rules[2]
	Condition  match.Info   // cost and shape
	Exceptions []match.Info // of each exception, in the rule's order
	// Silent lists exceptions that are true whenever the condition is: with
	// one of them the rule never alerts.
	Silent []int
}

// Inspect looks at the rules of a compiled policy, in their order.
func (c *Compiler) Inspect(p *Policy) ([]Inspection, error) {
	var rules []match.Rule
	for _, r := range p.Rules {
		rules = append(rules, match.Rule{Condition: r.condition, Kinds: r.kinds})
		for i := range r.exceptions {
			rules = append(rules, match.Rule{Condition: r.exceptions[i].applies, Kinds: r.kinds})
		}
	}
	m, err := match.New(c.env, rules)
	if err != nil {
		return nil, fmt.Errorf("inspect policy %s: %w", p.FullName(), err)
	}
	var out []Inspection
	n := 0
	next := func() match.Info { n++; return m.Rule(n - 1) }
	for i, r := range p.Rules {
		x := Inspection{Rule: r, Field: fmt.Sprintf("spec.rules[%d]", i), Condition: next()}
		for j := range r.exceptions {
			x.Exceptions = append(x.Exceptions, next())
			if implies(r.condition.Formula(), r.exceptions[j].applies.Formula()) {
				x.Silent = append(x.Silent, j)
			}
		}
		out = append(out, x)
	}
	return out, nil
}

// LineOf is the line in the file of a field of the object, or of the nearest
// one around it; 0 when it is not known.
func (o *Object) LineOf(field string) int { return o.line(field) }

// implies says whether b is surely true whenever a is. It does not see every
// such pair, but what it says is so.
func implies(a, b *celenv.Node) bool {
	if a.Op == celenv.OpVariable {
		return implies(a.Kids[0], b)
	}
	any := func(list []*celenv.Node, f func(*celenv.Node) bool) bool { return slices.ContainsFunc(list, f) }
	all := func(list []*celenv.Node, f func(*celenv.Node) bool) bool {
		return !any(list, func(n *celenv.Node) bool { return !f(n) })
	}
	switch b.Op {
	case celenv.OpVariable:
		return implies(a, b.Kids[0])
	case celenv.OpConst:
		return b.Value
	case celenv.OpAnd:
		return all(b.Kids, func(k *celenv.Node) bool { return implies(a, k) })
	}
	switch a.Op {
	case celenv.OpConst:
		return !a.Value
	case celenv.OpOr:
		return all(a.Kids, func(k *celenv.Node) bool { return implies(k, b) })
	}
	if b.Op == celenv.OpOr && any(b.Kids, func(k *celenv.Node) bool { return implies(a, k) }) {
		return true
	}
	if a.Op == celenv.OpAnd {
		return any(a.Kids, func(k *celenv.Node) bool { return implies(k, b) })
	}
	if a.Op == celenv.OpText && b.Op == celenv.OpText && a.Field == b.Field && !a.Elem && !b.Elem && a.Fold == b.Fold {
		return textImplies(a, b)
	}
	return same(a, b)
}

// same says whether two formulas of one policy are written alike. Parts only
// CEL understands are the same when they are one.
func same(a, b *celenv.Node) bool {
	return a == b || a.Op == b.Op && a.Value == b.Value && a.Name == b.Name && a.Field == b.Field && a.Elem == b.Elem && a.Other == b.Other &&
		a.OtherElem == b.OtherElem && a.Fold == b.Fold && a.Test == b.Test && slices.Equal(a.Texts, b.Texts) &&
		a.Measure == b.Measure && a.Rel == b.Rel && a.Number == b.Number && (a.Regexp == nil) == (b.Regexp == nil) &&
		(a.Regexp == nil || a.Regexp.String() == b.Regexp.String()) && a.Opaque == nil && b.Opaque == nil &&
		slices.EqualFunc(a.Kids, b.Kids, same)
}

// textImplies: whatever passes a's test with one of its texts passes b's.
func textImplies(a, b *celenv.Node) bool {
	return !slices.ContainsFunc(a.Texts, func(s string) bool {
		return !slices.ContainsFunc(b.Texts, func(t string) bool {
			exact := a.Test == celenv.Equal
			switch b.Test {
			case celenv.Contains:
				return strings.Contains(s, t)
			case celenv.Prefix:
				return (exact || a.Test == celenv.Prefix) && strings.HasPrefix(s, t)
			case celenv.Suffix:
				return (exact || a.Test == celenv.Suffix) && strings.HasSuffix(s, t)
			}
			return exact && s == t
		})
	})
}

// An Outcome is what becomes of an event in a rule.
type Outcome string

// Outcomes.
const (
	OutcomeMatch     Outcome = "match"     // the condition is true, and no exception surely
	OutcomeNoMatch   Outcome = "no match"  // the condition is false
	OutcomeExcepted  Outcome = "excepted"  // the condition is true, and so is an exception
	OutcomeUndecided Outcome = "undecided" // a fact is missing
	OutcomeFailed    Outcome = "failed"    // the condition failed
	OutcomeNotAsked  Outcome = "not asked" // another kind of event, out of scope, or disabled
)

// An Explanation says what a rule makes of an event, and why.
type Explanation struct {
	Rule    *Rule
	Outcome Outcome
	Why     string // it was not asked, or not sure, or failed; may be empty
	// Alert says whether a match goes on to threshold, aggregation and rate
	// limit, which look at more than one event.
	Alert      bool
	Message    string // of the alert
	Terms      []match.Term
	Exceptions []ExceptionExplanation
}

// An ExceptionExplanation says what an exception makes of an event that the
// condition does not rule out.
type ExceptionExplanation struct {
	Name, Reason string
	Expired      bool
	Truth        celenv.Truth
	Err          error
	Terms        []match.Term
}

// Explain judges one event by every rule of a set and tells why, in the order
// of Set.Rules. Values are cut to MaxEvidence bytes. It is for people: it takes
// milliseconds.
func (c *Compiler) Explain(s *Set, ev *event.Event, cfg Config) ([]Explanation, error) {
	engine := NewEngine(c, cfg)
	var out []Explanation
	for _, g := range s.groups {
		m, err := match.New(c.env, matchRules(g))
		if err != nil {
			return nil, fmt.Errorf("explain: %w", err)
		}
		engine.act.Reset(ev)
		for i, r := range g.rules {
			x := Explanation{Rule: r}
			if x.Outcome, x.Why = notAsked(r, ev, cfg.NodeLabels); x.Outcome == "" {
				engine.explain(m, i, r, ev, &x)
			}
			out = append(out, x)
		}
	}
	return out, nil
}

func notAsked(r *Rule, ev *event.Event, node map[string]string) (Outcome, string) {
	in := r.policy.scope.covers(ev.Process.Workload, node)
	switch {
	case !r.kinds.Has(ev.Kind):
		return OutcomeNotAsked, "it looks at " + kindNames(r.kinds) + " events only"
	case r.Spec.Mode == "Disabled" || r.Mode == "Disabled":
		return OutcomeNotAsked, "it is disabled"
	case in == celenv.False && r.Namespace != "":
		return OutcomeNotAsked, "out of scope: the process is not in a pod of namespace " + r.Namespace + " that the policy selects"
	case in == celenv.False:
		return OutcomeNotAsked, "out of scope: the policy does not look at processes that run there"
	case in != celenv.True && r.Namespace != "":
		return OutcomeUndecided, "it is not known whose pod it is: the rule is asked when that is known"
	}
	return "", ""
}

func kindNames(kinds event.Kinds) string {
	var names []string
	for _, k := range event.AllKinds() {
		if kinds.Has(k) {
			names = append(names, k.String())
		}
	}
	return strings.Join(names, ", ")
}

// explain asks rule i of m about the event e.act stands at.
func (e *Engine) explain(m *match.Matcher, i int, r *Rule, ev *event.Event, x *Explanation) {
	t, err := r.condition.Truth(e.act)
	x.Terms = m.Explain(e.act, i, MaxEvidence)
	switch {
	case t == celenv.False:
		x.Outcome = OutcomeNoMatch
		return
	case t == celenv.Failed:
		x.Outcome, x.Why = OutcomeFailed, err.Error()
	case t == celenv.Undecided:
		x.Outcome, x.Why = OutcomeUndecided, "a fact is missing"
	case r.policy.scope.covers(ev.Process.Workload, e.cfg.NodeLabels) != celenv.True:
		x.Outcome, x.Why = OutcomeUndecided, "it is not known whether the process is in the policy's scope"
	default:
		x.Outcome = OutcomeMatch
	}
	x.Alert = x.Outcome == OutcomeMatch || r.alerting()
	for n := range r.exceptions {
		f := &r.exceptions[n]
		y := ExceptionExplanation{Name: f.name, Reason: r.Spec.Exceptions[n].Reason, Expired: !f.until.IsZero() && !ev.Time.Before(f.until)}
		y.Truth, y.Err = f.applies.Truth(e.act)
		y.Terms = m.ExplainException(e.act, i, n, MaxEvidence)
		x.Exceptions = append(x.Exceptions, y)
		if y.Truth == celenv.True && !y.Expired && x.Outcome != OutcomeExcepted {
			x.Outcome, x.Why, x.Alert = OutcomeExcepted, "exception "+f.name, false
		}
	}
	if x.Alert {
		x.Message = e.message(r, meter{counters: new(counters)})
	}
}

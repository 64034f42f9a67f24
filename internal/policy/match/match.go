package match

import (
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A Rule is what a Matcher decides.
type Rule struct {
	// Condition is of type bool.
	Condition *celenv.Expr
	// Exceptions are decided by Exception, when the caller asks.
	Exceptions []*celenv.Expr
	// Kinds are the kinds of event the rule looks at; 0 is none. It is only
	// evaluated for these, whatever is active.
	Kinds event.Kinds
}

// A Verdict says what an expression is for the event.
type Verdict struct {
	Truth celenv.Truth
	Err   error // why it Failed; nil otherwise
}

// A Hit is a rule that is not False.
type Hit struct {
	Rule int // index in what New got
	Verdict
}

// A Matcher decides rules. It belongs to one goroutine.
type Matcher struct {
	rules []Rule
	act   *celenv.Activation
	hits  []Hit
}

// New makes a matcher. It is work for off the event path: some microseconds
// for each text the rules look for.
func New(env *celenv.Env, rules []Rule) (*Matcher, error) {
	return &Matcher{rules: rules}, nil
}

// Evaluate decides the active rules for the event a stands at. It returns
// those that are not False, in their order; the slice is valid until the next
// call.
func (m *Matcher) Evaluate(a *celenv.Activation, active Bits) []Hit {
	m.act, m.hits = a, m.hits[:0]
	for i := range m.rules {
		if !active.Has(i) || !m.rules[i].Kinds.Has(a.Kind()) {
			continue
		}
		if v := m.decide(m.rules[i].Condition); v.Truth != celenv.False {
			m.hits = append(m.hits, Hit{i, v})
		}
	}
	return m.hits
}

// Exception decides the i-th exception of a rule for the event of the last
// Evaluate.
func (m *Matcher) Exception(rule, i int) Verdict { return m.decide(m.rules[rule].Exceptions[i]) }

func (m *Matcher) decide(x *celenv.Expr) (v Verdict) {
	v.Truth, v.Err = x.Truth(m.act)
	return v
}

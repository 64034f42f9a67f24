package match

import (
	"slices"

	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A Term is one part of an expression that is decided on its own, as it was
// for one event.
type Term struct {
	Text      string         // the term, as CEL writes it; long lists are cut
	In        string         // "variables.NAME" when it stands there; empty: in the expression itself
	Line, Col int            // where, both from 1; 0 not known
	Negated   bool           // an odd number of "not" is around it
	Truth     celenv.Truth   // of the term itself, whatever is around it
	Err       error          // why it Failed
	Found     []string       // of the texts that it looks for: the ones that were there, at most 8
	Values    []celenv.Value // of the variables it compares
}

// Decisive says whether the term speaks for the expression around it: it is
// true, or false where that is asked for.
func (t *Term) Decisive() bool {
	return t.Truth == celenv.True && !t.Negated || t.Truth == celenv.False && t.Negated
}

// maxTerms bounds an explanation: a condition may have thousands.
const maxTerms = 256

// maxFound bounds the texts of one term that are named.
const maxFound = 8

// Explain tells how a rule's condition came to its value for the event a
// stands at, term by term in the order of the text; each text in it has at most limit
// bytes. A variable of the policy is taken apart where it is named first. It
// is for matches and for people, and takes its time.
func (m *Matcher) Explain(a *celenv.Activation, rule, limit int) []Term {
	return Explain(a, m.rules[rule].Condition, limit)
}

// ExplainException does the same for an exception.
func (m *Matcher) ExplainException(a *celenv.Activation, rule, i, limit int) []Term {
	return Explain(a, m.rules[rule].Exceptions[i], limit)
}

// Explain tells how an expression of type bool came to its value for the
// event a stands at. See Matcher.Explain.
func Explain(a *celenv.Activation, x *celenv.Expr, limit int) []Term {
	n := x.Formula()
	if n == nil {
		return nil
	}
	e := explainer{x: x, a: a, limit: limit}
	e.walk(n, false, "")
	return e.terms
}

type explainer struct {
	x     *celenv.Expr
	a     *celenv.Activation
	limit int
	terms []Term
	seen  []string // variables that were taken apart
}

func (e *explainer) walk(n *celenv.Node, negated bool, in string) {
	if len(e.terms) == maxTerms {
		return
	}
	switch n.Op {
	case celenv.OpNot:
		e.walk(n.Kids[0], !negated, in)
	case celenv.OpAnd, celenv.OpOr, celenv.OpIf:
		for _, k := range n.Kids {
			e.walk(k, negated, in)
		}
	case celenv.OpVariable:
		if !slices.Contains(e.seen, n.Name) {
			e.seen = append(e.seen, n.Name)
			e.walk(n.Kids[0], negated, n.Name)
		}
	default:
		e.terms = append(e.terms, e.term(n, negated, in))
	}
}

func (e *explainer) term(n *celenv.Node, negated bool, in string) Term {
	env := e.a.Env()
	t := Term{Text: celenv.Cut(env.Term(n), e.limit), In: in, Line: n.Line, Col: n.Col, Negated: negated}
	t.Values = env.NodeValues(e.a, n, e.limit)
	t.Truth, t.Err = evaluate(env, e.a, n)
	if n.Op == celenv.OpText && t.Truth == celenv.True {
		for _, s := range n.Texts {
			one := *n
			one.Texts = []string{s}
			if v, _ := evaluate(env, e.a, &one); v == celenv.True {
				if t.Found = append(t.Found, celenv.Cut(s, e.limit)); len(t.Found) == maxFound {
					break
				}
			}
		}
	}
	return t
}

// evaluate decides a node on its own, by a matcher made for it.
func evaluate(env *celenv.Env, a *celenv.Activation, n *celenv.Node) (celenv.Truth, error) {
	m, c := newMatcher(env, nil)
	pc := c.emit(simplify(c.expr(n)))
	c.finish(nil)
	m.turn(a)
	v := m.guarded(pc)
	return v.Truth, v.Err
}

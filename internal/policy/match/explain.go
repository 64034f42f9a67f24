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
	return Terms(a, x, limit, nil)
}

// Terms is Explain for the terms that keep keeps, which sees their Truth and
// Negated alone: writing out the others is most of the work.
func Terms(a *celenv.Activation, x *celenv.Expr, limit int, keep func(*Term) bool) []Term {
	n := x.Formula()
	if n == nil {
		return nil
	}
	e := explainer{reader: reader{act: a}, limit: limit, keep: keep}
	e.walk(n, false, "")
	return e.terms
}

// Decide is the value of an expression of type bool on its own, for the event
// a stands at: what a Matcher and Expr.Truth say of it, without either.
func Decide(a *celenv.Activation, x *celenv.Expr) (v Verdict) {
	n := x.Formula()
	if n == nil {
		v.Truth, v.Err = x.Truth(a)
		return v
	}
	e := explainer{reader: reader{act: a}}
	if v.Truth = e.truth(n); v.Truth == celenv.Failed {
		v.Err = e.err
	}
	return v
}

// An explainer evaluates the nodes of a formula as they stand.
type explainer struct {
	reader
	limit  int
	keep   func(*Term) bool
	terms  []Term
	seen   []string // variables that were taken apart
	values map[int]celenv.Value
	err    error // the first failure

	variables map[*celenv.Node]Verdict
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
		e.term(n, negated, in)
	}
}

func (e *explainer) term(n *celenv.Node, negated bool, in string) {
	t := Term{In: in, Line: int(n.Line), Col: int(n.Col), Negated: negated}
	e.err = nil
	if t.Truth = e.truth(n); t.Truth == celenv.Failed {
		t.Err = e.err
	}
	if e.keep != nil && !e.keep(&t) {
		return
	}
	env := e.act.Env()
	t.Text = celenv.Cut(env.Term(n), e.limit)
	if e.values == nil {
		e.values = map[int]celenv.Value{}
	}
	t.Values = env.NodeValues(e.act, n, e.limit, e.values)
	if n.Op == celenv.OpText && t.Truth == celenv.True {
		for i := range n.Texts {
			if len(t.Found) < maxFound && e.text1(n, n.Texts[i:i+1]) == celenv.True {
				t.Found = append(t.Found, celenv.Cut(n.Texts[i], e.limit))
			}
		}
	}
	e.terms = append(e.terms, t)
}

// truth is the value of a node.
func (e *explainer) truth(n *celenv.Node) celenv.Truth {
	switch n.Op {
	case celenv.OpConst:
		return truth(n.Value)
	case celenv.OpAnd, celenv.OpOr:
		v, join := truth(n.Op == celenv.OpAnd), celenv.Truth.Or
		decides := celenv.True
		if n.Op == celenv.OpAnd {
			join, decides = celenv.Truth.And, celenv.False
		}
		for _, k := range n.Kids {
			if v = join(v, e.truth(k)); v == decides {
				break
			}
		}
		return v
	case celenv.OpNot:
		return e.truth(n.Kids[0]).Not()
	case celenv.OpIf:
		switch c := e.truth(n.Kids[0]); c {
		case celenv.True:
			return e.truth(n.Kids[1])
		case celenv.False:
			return e.truth(n.Kids[2])
		default:
			return c
		}
	case celenv.OpVariable:
		return e.variable(n.Kids[0])
	case celenv.OpText:
		return e.text1(n, n.Texts)
	case celenv.OpRegexp:
		if n.Gate != nil && e.truth(n.Gate) == celenv.False {
			return celenv.False
		}
	case celenv.OpSome:
		return e.each(n.Field, func() celenv.Truth { return e.truth(n.Kids[0]) })
	case celenv.OpOpaque:
		v, err := n.Opaque.Truth(e.act)
		if e.err == nil {
			e.err = err
		}
		return v
	}
	return e.plain(n)
}

// variable is the value of a variable of the policy, found once: one that
// names another twice, which names another twice, would take for ever.
func (e *explainer) variable(n *celenv.Node) celenv.Truth {
	v, ok := e.variables[n]
	if !ok {
		before := e.err
		e.err = nil
		v.Truth = e.truth(n)
		v.Err = e.err
		if e.variables == nil {
			e.variables = map[*celenv.Node]Verdict{}
		}
		e.variables[n], e.err = v, before
	}
	if e.err == nil {
		e.err = v.Err
	}
	return v.Truth
}

// text1 tests the texts of a field, or of the element at hand, one by one.
func (e *explainer) text1(n *celenv.Node, texts []string) celenv.Truth {
	from, to := 0, 1
	if n.Elem {
		from, to = e.element, e.element+1
	} else {
		count, known := e.act.Texts(n.Field)
		if !known {
			return celenv.Undecided
		}
		to = count
	}
	any := celenv.False
	for i := from; i < to && any != celenv.True; i++ {
		text, known := e.text(n.Field, i, n.Fold)
		any = any.Or(decided(known && passes(n.Test, text, texts), known))
	}
	return any
}

package match

import "github.com/procession-dev/procession/internal/policy/celenv"

// A Term is one part of an expression that is decided on its own, as it was
// for one event.
type Term struct {
	Text      string         // the term, as CEL writes it
	In        string         // "variables.NAME" when it stands there; empty: in the expression itself
	Line, Col int            // where, both from 1; 0 not known
	Negated   bool           // it stands below a "not"
	Truth     celenv.Truth   // of the term itself, whatever is around it
	Err       error          // why it Failed
	Found     []string       // of a list of texts: the ones that were found
	Values    []celenv.Value // of the variables it compares, at most limit bytes each
}

// Info says what a rule costs and what is odd about it.
type Info struct {
	Indexed bool     // it is looked at only when one of Needs was found
	Needs   []string // the terms of which one must be true; at most 8 of them
	Atoms   int      // texts it looks for
	Lazy    int      // numbers, yes/no facts and regular expressions it asks for
	Opaque  []string // terms only CEL decides: some hundred nanoseconds and allocations each
	Always  bool     // true for every event it looks at, if nothing is missing
	Never   bool     // true for none
	Odd     []Odd    // parts that are always or never true
	Short   []string // texts of less than three bytes that it needs: they are found everywhere
	Cost    Cost
}

// Odd is a part of an expression that does not depend on the event.
type Odd struct {
	Text      string
	Line, Col int
	Value     bool // what it always is
}

// Cost is a class of cost.
type Cost string

// The classes, from cheap to dear.
const (
	CostIndexed Cost = "indexed" // nothing, for events that hold none of its texts
	CostCheap   Cost = "cheap"   // looked at for every event; some nanoseconds
	CostRegexp  Cost = "regexp"  // a regular expression for every event
	CostOpaque  Cost = "opaque"  // a CEL program for every event
)

// Explain tells how a rule's condition came to its value for the event a
// stands at, term by term in the order of the text.
func (m *Matcher) Explain(a *celenv.Activation, rule, limit int) []Term { return nil }

// ExplainException does the same for an exception.
func (m *Matcher) ExplainException(a *celenv.Activation, rule, i, limit int) []Term { return nil }

// Rule is about the cost of a rule and its shape.
func (m *Matcher) Rule(i int) Info { return Info{} }

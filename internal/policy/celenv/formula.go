package celenv

import (
	"regexp"
)

// A Node is an expression of type bool taken apart, as far as that goes: what
// is left of CEL is in OpOpaque nodes. Nodes never change; variables of a
// policy are shared by all formulas that name them.
//
// Its value is that of the expression: a node that reads a missing fact is
// Undecided, and OpAnd, OpOr, OpNot and OpIf pass that on as CEL does.
type Node struct {
	Op    Op
	Value bool // OpConst

	// Field is what is read. Below an OpSome, Elem says that it is read off
	// the element at hand; elsewhere a field of several texts passes when one
	// of them does. Other and OtherElem are a second one, or NoField.
	Elem, OtherElem bool

	Fold    Fold    // OpText, OpRegexp, OpSame: of the text that is read
	Test    Test    // OpText
	Measure Measure // OpNumber: of Field
	Rel     Rel     // OpNumber

	Field, Other Field
	Line, Col    int32 // where it starts, both from 1; 0 not known

	Kids   []*Node
	Texts  []string       // OpText: one of them is enough
	Name   string         // OpVariable: variables.NAME; OpCaps, OpOpaque: as it was written
	Number int64          // OpNumber without Other; OpCaps: a set of one
	Regexp *regexp.Regexp // OpRegexp
	Opaque *Expr          // OpOpaque
	Label  *Label         // OpLabel

	// Gate, where it is set, is true or undecided whenever the node is, and
	// cheaper.
	Gate *Node
}

// A Label is a key of a map, and the value where it is not there.
type Label struct{ Key, Default string }

// NoField stands for no field.
const NoField Field = -1

// Op is what a Node does.
type Op uint8

// The operations.
const (
	OpConst    Op = iota // Value
	OpAnd                // all Kids
	OpOr                 // one of Kids
	OpNot                // not Kids[0]
	OpIf                 // Kids[1] if Kids[0], else Kids[2]
	OpVariable           // Kids[0], a variable of the policy
	OpText               // a text passes a Test with one of Texts
	OpSame               // the texts of Field and Other are equal
	OpRegexp             // a text matches Regexp
	OpNumber             // a Measure of Field stands in Rel to Number, or to Other's value
	OpCaps               // the capabilities in Number are in Field
	OpFlag               // Field is true
	OpLabel              // the value at Label in Field, a map, passes a Test with one of Texts
	OpSome               // Kids[0] for one of the elements of Field, which is args or ancestors
	OpOpaque             // only CEL knows
)

// A Test is how two texts are compared.
type Test uint8

// The tests.
const (
	Contains Test = iota
	Prefix
	Suffix
	Equal
)

// Fold says what is done to a text before it is compared.
type Fold uint8

// The folds.
const (
	FoldNone Fold = iota
	FoldLower
	FoldUpper
)

// Literal says whether a text that was folded can be equal to s, and gives s
// in small letters then.
func (f Fold) Literal(s string) (lower string, possible bool) {
	lower = lowerASCII(s)
	switch f {
	case FoldLower:
		return lower, lower == s
	case FoldUpper:
		return lower, upperASCII(s) == s
	}
	return s, true
}

// A Measure is a number that is taken of a field.
type Measure uint8

// The measures.
const (
	OfValue  Measure = iota // the field is a number
	OfCount                 // elements
	OfLength                // characters of a text
)

// A Rel is a relation of numbers.
type Rel uint8

// The relations.
const (
	Eq Rel = iota
	Ne
	Lt
	Le
	Gt
	Ge
)

// Holds says whether a stands in the relation to b.
func (r Rel) Holds(a, b int64) bool {
	switch r {
	case Eq:
		return a == b
	case Ne:
		return a != b
	case Lt:
		return a < b
	case Le:
		return a <= b
	case Gt:
		return a > b
	}
	return a >= b
}

// And is CEL's && of truth values: false if either is, else undecided, else
// failed.
func (t Truth) And(u Truth) Truth { return t.Not().Or(u.Not()).Not() }

// Or is CEL's ||.
func (t Truth) Or(u Truth) Truth {
	switch {
	case t == True || u == True:
		return True
	case t == Undecided || u == Undecided:
		return Undecided
	case t == Failed || u == Failed:
		return Failed
	}
	return False
}

// Not is CEL's !.
func (t Truth) Not() Truth {
	switch t {
	case True:
		return False
	case False:
		return True
	}
	return t
}

// Formula is the expression taken apart; nil if it is not of type bool.
func (x *Expr) Formula() *Node { return x.node }

func lowerASCII(s string) string { return mapASCII(s, 'A', 'Z', 'a'-'A') }
func upperASCII(s string) string { return mapASCII(s, 'a', 'z', 'A'-'a'+256) }

func mapASCII(s string, from, to byte, add int) string {
	for i := range len(s) {
		if from <= s[i] && s[i] <= to {
			b := []byte(s)
			for j := i; j < len(b); j++ {
				if from <= b[j] && b[j] <= to {
					b[j] = byte(int(b[j]) + add)
				}
			}
			return string(b)
		}
	}
	return s
}

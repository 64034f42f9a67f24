package match

import (
	"slices"

	"github.com/procession-dev/procession/internal/policy/celenv"
)

// Info says what a rule costs and what is odd about it.
type Info struct {
	Indexed bool     // it is looked at only when one of Needs is there
	Needs   []string // terms of which one must be there; at most 8
	Atoms   int      // texts, or long lists of them, that it looks for
	Lazy    int      // numbers, yes/no facts, regular expressions and loops it asks for
	Opaque  []string // terms only CEL decides: some hundred nanoseconds and some allocations each
	Always  bool     // true for every event it looks at, if nothing is missing
	Never   bool     // true for none
	Odd     []Odd    // parts that are always or never true, if nothing is missing
	Short   []string // texts of less than three bytes that it needs: they are found everywhere
	Cost    Cost
}

// Odd is a part of an expression that does not depend on what it reads.
type Odd struct {
	Text      string
	In        string // "variables.NAME" when it stands there
	Line, Col int
	Value     bool // what it always is
}

// Cost is a class of cost.
type Cost string

// The classes, from cheap to dear.
const (
	CostIndexed Cost = "indexed" // nothing, for events that hold none of what it needs
	CostCheap   Cost = "cheap"   // looked at for every event; some nanoseconds
	CostRegexp  Cost = "regexp"  // a regular expression or a loop for every event
	CostOpaque  Cost = "opaque"  // a CEL program for every event
)

// maxNeeds bounds the terms that are named.
const maxNeeds = 8

// Rule is about the cost of a rule's condition and its shape.
func (m *Matcher) Rule(i int) Info {
	n := m.rules[i].Condition.Formula()
	info := Info{Indexed: m.needs[i].ok, Cost: CostIndexed}
	if n == nil {
		info.Opaque, info.Cost = []string{m.rules[i].Condition.Source()}, CostOpaque
		return info
	}
	if !info.Indexed {
		info.Cost = CostCheap
	}
	w := inspector{m: m, info: &info}
	w.code(m.start[i], map[int32]bool{})
	for _, t := range m.needs[i].terms {
		w.need(t)
	}
	switch v, constant := w.constant(n, ""); {
	case constant && v:
		info.Always = true
	case constant:
		info.Never = true
	}
	return info
}

type inspector struct {
	m    *Matcher
	info *Info
	seen []string // variables
}

// code counts what the instructions at pc ask for.
func (w *inspector) code(pc int32, refs map[int32]bool) {
	in := w.m.code[pc]
	switch in.op {
	case opAtom:
		w.info.Atoms++
	case opAny:
		w.info.Atoms += len(w.m.any.of(in.id))
	case opRef:
		if !refs[in.id] {
			refs[in.id] = true
			w.code(w.m.refStart[in.id], refs)
		}
	case opLazy, opElement:
		w.leaf(in.id, refs)
	}
	for k := pc + 1; k < in.end; k = w.m.code[k].end {
		w.code(k, refs)
	}
}

func (w *inspector) leaf(id int32, refs map[int32]bool) {
	l := &w.m.leaves[id]
	dear := func(c Cost) {
		if !w.info.Indexed && w.info.Cost != CostOpaque {
			w.info.Cost = c
		}
	}
	switch l.node.Op {
	case celenv.OpOpaque:
		if text := w.m.env.Term(l.node); !slices.Contains(w.info.Opaque, text) {
			w.info.Opaque = append(w.info.Opaque, text)
		}
		dear(CostOpaque)
		return
	case celenv.OpRegexp:
		dear(CostRegexp)
	case celenv.OpSome:
		dear(CostRegexp)
		w.code(l.body, refs)
	}
	w.info.Lazy++
}

func (w *inspector) need(term int32) {
	var text string
	if term < 0 {
		text = w.m.env.Term(w.m.leaves[^term].node)
	} else {
		a := &w.m.atoms[term]
		text = w.m.env.Term(w.m.atomNode(a))
		if s := a.one.literal; len(s) < 3 && a.one.test != celenv.Equal && !slices.Contains(w.info.Short, s) {
			w.info.Short = append(w.info.Short, s)
		}
	}
	if len(w.info.Needs) < maxNeeds {
		w.info.Needs = append(w.info.Needs, text)
	}
}

// atomNode is an atom as a formula.
func (m *Matcher) atomNode(a *atom) *celenv.Node {
	if a.node != nil {
		return a.node
	}
	n := &celenv.Node{Op: celenv.OpText, Field: m.fields[a.field].of, Other: celenv.NoField, Test: a.one.test, Texts: []string{a.one.literal}}
	if a.one.anyCase {
		n.Fold = celenv.FoldLower
	}
	return n
}

// constant says what n is for every event about which nothing is missing,
// and notes the innermost parts of which that can be said.
func (w *inspector) constant(n *celenv.Node, in string) (value, known bool) {
	switch n.Op {
	case celenv.OpAnd, celenv.OpOr:
		decides := n.Op == celenv.OpOr
		value, known = !decides, true
		for _, k := range n.Kids {
			v, ok := w.constant(k, in)
			if ok && v == decides {
				value = decides
			}
			known = known && ok
		}
		return value, known || value == decides
	case celenv.OpNot:
		value, known = w.constant(n.Kids[0], in)
		return !value, known
	case celenv.OpIf:
		c, ok := w.constant(n.Kids[0], in)
		a, okA := w.constant(n.Kids[1], in)
		b, okB := w.constant(n.Kids[2], in)
		switch {
		case ok && c:
			return a, okA
		case ok:
			return b, okB
		}
		return a, okA && okB && a == b
	case celenv.OpVariable:
		if slices.Contains(w.seen, n.Name) {
			return false, false
		}
		w.seen = append(w.seen, n.Name)
		return w.constant(n.Kids[0], n.Name)
	case celenv.OpConst:
		w.odd(n, in, n.Value)
		return n.Value, true
	case celenv.OpText:
		if v, ok := constantText(n); ok && !w.m.env.Several(n.Field) {
			w.odd(n, in, v)
			return v, true
		}
	case celenv.OpCaps:
		if n.Number == 0 {
			w.odd(n, in, false)
			return false, true
		}
	}
	return false, false
}

// constantText says whether a test passes for every text, or for none.
func constantText(n *celenv.Node) (value, known bool) {
	possible := false
	for _, s := range n.Texts {
		_, ok := n.Fold.Literal(s)
		if possible = possible || ok; s == "" && n.Test != celenv.Equal {
			return true, true
		}
	}
	return false, !possible
}

func (w *inspector) odd(n *celenv.Node, in string, value bool) {
	if len(w.info.Odd) < maxTerms {
		w.info.Odd = append(w.info.Odd, Odd{Text: w.m.env.Term(n), In: in, Line: int(n.Line), Col: int(n.Col), Value: value})
	}
}

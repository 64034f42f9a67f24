package match

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// op is what an expr or an instruction does.
type op uint8

const (
	opConst   op = iota // id: 0 or 1
	opAnd               // kids
	opOr                // kids
	opNot               // one kid
	opIf                // three kids
	opRef               // id: of a shared formula
	opAtom              // id: of an atom
	opAny               // id: of a list of atoms of one field
	opLazy              // id: of a leaf; evaluated once for an event
	opElement           // id: of a leaf; evaluated for the element at hand
)

// An expr is a formula over atoms and leaves on its way to instructions.
type expr struct {
	op     op
	id     int32
	kids   []*expr
	weight int // what it costs, roughly
}

// An instr is a node of a formula, which stand in preorder; the kids of one at
// pc are from pc+1 to end.
type instr struct {
	op  op
	id  int32
	end int32
}

// An atom is true when a field's text passes one of some tests. Few tests are
// atoms of their own, which many rules share; many are one, so that no rule has
// to look through them.
type atom struct {
	field int32 // index in Matcher.fields
	guess float64
	node  *celenv.Node // its tests; nil: one is all
	one   use          // one of its tests, the shortest
}

// A leaf is a part of a formula that is evaluated on its own.
type leaf struct {
	node *celenv.Node
	body int32               // OpSome: pc of what is asked of each element
	ask  func() celenv.Truth // OpSome: evaluates body
	find *finder             // OpText of an element; nil: its texts are tried one by one
	dfa  *dfa                // OpRegexp; nil: the library
}

// leafKey is what makes two leaves one.
type leafKey struct {
	op           celenv.Op
	field, other celenv.Field
	measure      celenv.Measure
	rel          celenv.Rel
	fold         celenv.Fold
	number       int64
	pattern      string
	opaque       *celenv.Expr
}

// A compiler builds a Matcher.
type compiler struct {
	m       *Matcher
	atomIDs map[string]int32
	anyIDs  map[string]int32
	// anyLists become Matcher.any.
	anyLists  [][]int32
	leafIDs   map[leafKey]int32
	refs      map[*celenv.Node]int32 // shared formulas
	shared    []*expr                // by ref
	sharedIDs map[string]int32       // by what they are
	needs     map[*expr]need         // of shared formulas
	texts     [][]use                // by index in Matcher.fields
	fieldID   map[celenv.Field]int32
	key       strings.Builder
}

// New makes a matcher. It is work for off the event path: some microseconds
// for each text the rules look for.
func New(env *celenv.Env, rules []Rule) (*Matcher, error) {
	m, c := newMatcher(env, rules)
	conditions := make([]*expr, len(rules))
	for i := range rules {
		if rules[i].Condition == nil {
			return nil, fmt.Errorf("rule %d has no condition", i)
		}
		conditions[i] = c.formula(rules[i].Condition)
		m.start = append(m.start, c.emit(conditions[i]))
		var exceptions []int32
		for _, x := range rules[i].Exceptions {
			exceptions = append(exceptions, c.emit(c.formula(x)))
		}
		m.exceptions = append(m.exceptions, exceptions)
	}
	c.finish(conditions)
	return m, nil
}

func newMatcher(env *celenv.Env, rules []Rule) (*Matcher, *compiler) {
	m := &Matcher{env: env, rules: rules, dfaPool: poolBytes}
	return m, &compiler{m: m, atomIDs: map[string]int32{}, anyIDs: map[string]int32{}, leafIDs: map[leafKey]int32{}, refs: map[*celenv.Node]int32{}, sharedIDs: map[string]int32{},
		needs: map[*expr]need{}, fieldID: map[celenv.Field]int32{}}
}

// finish makes what all formulas share.
func (c *compiler) finish(conditions []*expr) {
	m := c.m
	for _, e := range c.shared {
		m.refStart = append(m.refStart, c.emit(e))
	}
	for i, uses := range c.texts {
		m.fields[i].finder = newFinder(uses)
	}
	m.any = newLists(c.anyLists)
	c.index(conditions)
	m.prepare()
}

// formula takes an expression in; one that was not taken apart is left to
// CEL as a whole.
func (c *compiler) formula(x *celenv.Expr) *expr {
	n := x.Formula()
	if n == nil {
		n = &celenv.Node{Op: celenv.OpOpaque, Opaque: x, Field: celenv.NoField, Other: celenv.NoField}
	}
	return simplify(c.expr(n))
}

func (c *compiler) expr(n *celenv.Node) *expr {
	switch n.Op {
	case celenv.OpConst:
		return constant(n.Value)
	case celenv.OpAnd, celenv.OpOr:
		e := &expr{op: opAnd}
		if n.Op == celenv.OpOr {
			e.op = opOr
			return c.or(e, n.Kids)
		}
		for _, k := range n.Kids {
			e.kids = append(e.kids, c.expr(k))
		}
		return e
	case celenv.OpNot:
		return &expr{op: opNot, kids: []*expr{c.expr(n.Kids[0])}}
	case celenv.OpIf:
		return &expr{op: opIf, kids: []*expr{c.expr(n.Kids[0]), c.expr(n.Kids[1]), c.expr(n.Kids[2])}}
	case celenv.OpVariable:
		return c.variable(n.Kids[0])
	case celenv.OpText:
		if !n.Elem {
			return c.atom(n.Field, []*celenv.Node{n})
		}
	}
	e := c.leaf(n)
	if n.Gate != nil {
		// Whenever the gate is false the leaf is; so this is the leaf.
		return &expr{op: opAnd, kids: []*expr{c.expr(n.Gate), e}}
	}
	return e
}

// or makes one atom of the tests of the same field.
func (c *compiler) or(e *expr, kids []*celenv.Node) *expr {
	var tests map[celenv.Field][]*celenv.Node
	var order []celenv.Field
	var walk func([]*celenv.Node)
	walk = func(kids []*celenv.Node) {
		for _, k := range kids {
			switch {
			case k.Op == celenv.OpOr:
				walk(k.Kids)
			case k.Op == celenv.OpText && !k.Elem:
				if tests == nil {
					tests = map[celenv.Field][]*celenv.Node{}
				}
				if tests[k.Field] == nil {
					order = append(order, k.Field)
				}
				tests[k.Field] = append(tests[k.Field], k)
			default:
				e.kids = append(e.kids, c.expr(k))
			}
		}
	}
	walk(kids)
	for _, f := range order {
		e.kids = append(e.kids, c.atom(f, tests[f]))
	}
	return e
}

func (c *compiler) variable(n *celenv.Node) *expr {
	id, ok := c.refs[n]
	if !ok {
		// Policies that were made from one another have the same variables.
		e := simplify(c.expr(n))
		key := string(e.appendKey(nil))
		if id, ok = c.sharedIDs[key]; !ok {
			id = int32(len(c.shared))
			c.sharedIDs[key] = id
			c.shared = append(c.shared, e)
		}
		c.refs[n] = id
	}
	if x := c.shared[id]; x.op == opConst || x.op == opAtom || x.op == opAny || x.op == opLazy || x.op == opRef {
		return x // as cheap as the reference
	}
	return &expr{op: opRef, id: id, weight: c.shared[id].weight/4 + 2}
}

// appendKey appends what makes two formulas the same.
func (e *expr) appendKey(b []byte) []byte {
	b = append(b, byte(e.op))
	b = binary.AppendVarint(b, int64(e.id))
	b = binary.AppendVarint(b, int64(len(e.kids)))
	for _, k := range e.kids {
		b = k.appendKey(b)
	}
	return b
}

// fewTests is how many tests are atoms of their own.
const fewTests = 16

// atom makes what is true when one of the tests of f passes.
func (c *compiler) atom(f celenv.Field, nodes []*celenv.Node) *expr {
	fi := c.field(f)
	var uses []use
	for _, n := range nodes {
		for _, s := range n.Texts {
			s, possible := n.Fold.Literal(s)
			if possible {
				uses = append(uses, use{test: n.Test, anyCase: n.Fold != celenv.FoldNone, literal: s})
			}
		}
	}
	slices.SortFunc(uses, compareUses)
	uses = slices.Compact(uses)
	if len(uses) < 2 || len(uses) > fewTests {
		return &expr{op: opAtom, id: c.intern(fi, nodes, uses), weight: 1}
	}
	ids := make([]int32, len(uses))
	for i := range uses {
		ids[i] = c.intern(fi, nodes, uses[i:i+1])
	}
	slices.Sort(ids)
	c.key.Reset()
	fmt.Fprint(&c.key, ids)
	id, ok := c.anyIDs[c.key.String()]
	if !ok {
		id = int32(len(c.anyLists))
		c.anyIDs[c.key.String()] = id
		c.anyLists = append(c.anyLists, ids)
	}
	return &expr{op: opAny, id: id, weight: 2}
}

// intern finds or makes the atom of some uses.
func (c *compiler) intern(fi int32, nodes []*celenv.Node, uses []use) int32 {
	c.key.Reset()
	fmt.Fprintf(&c.key, "%d", fi)
	for _, u := range uses {
		fmt.Fprintf(&c.key, "\x00%d%t%d:%s", u.test, u.anyCase, len(u.literal), u.literal)
	}
	key := c.key.String()
	id, ok := c.atomIDs[key]
	if ok {
		return id
	}
	id = int32(len(c.m.atoms))
	c.atomIDs[key] = id
	a := atom{field: fi}
	if len(uses) != 1 {
		a.node = &celenv.Node{Op: celenv.OpOr, Kids: nodes}
	}
	for i := range uses {
		uses[i].atom = id
		a.guess += guess(&uses[i])
		if i == 0 || len(uses[i].literal) < len(a.one.literal) {
			a.one = uses[i]
		}
	}
	c.texts[fi] = append(c.texts[fi], uses...)
	c.m.atoms = append(c.m.atoms, a)
	return id
}

func compareUses(a, b use) int {
	switch {
	case a.literal != b.literal:
		return strings.Compare(a.literal, b.literal)
	case a.test != b.test:
		return int(a.test) - int(b.test)
	case a.anyCase == b.anyCase:
		return 0
	case a.anyCase:
		return 1
	}
	return -1
}

// guess is how often a literal is found, for want of a measurement.
func guess(u *use) float64 {
	n := float64(len(u.literal))
	switch {
	case n == 0 && u.test != celenv.Equal:
		return 1
	case u.test == celenv.Contains || u.test == celenv.Prefix:
		return 1 / (1 + n*n/2)
	}
	return 0.02
}

func (c *compiler) field(f celenv.Field) int32 {
	id, ok := c.fieldID[f]
	if !ok {
		id = int32(len(c.m.fields))
		c.fieldID[f] = id
		c.m.fields = append(c.m.fields, field{of: f})
		c.texts = append(c.texts, nil)
	}
	return id
}

// weights of leaves, from the time they take beside that of an atom.
func weigh(n *celenv.Node) int {
	switch n.Op {
	case celenv.OpRegexp:
		return 500
	case celenv.OpSome:
		return 200
	case celenv.OpOpaque:
		return 1000
	case celenv.OpSame, celenv.OpLabel:
		return 10
	}
	return 4
}

// leaf finds or makes the leaf for a node.
func (c *compiler) leaf(n *celenv.Node) *expr {
	e := &expr{op: opLazy, weight: weigh(n)}
	element := n.Elem || n.Other != celenv.NoField && n.OtherElem
	key, shared := keyOf(n)
	shared = shared && !element
	if id, ok := c.leafIDs[key]; ok && shared {
		e.id = id
		return e
	}
	l := leaf{node: n}
	if n.Op == celenv.OpRegexp {
		l.dfa = newDFA(n.Regexp, &c.m.dfaPool)
	}
	e.id = int32(len(c.m.leaves))
	c.m.leaves = append(c.m.leaves, leaf{})
	switch {
	case element:
		e.op = opElement
		c.elementTest(&l)
	case n.Op == celenv.OpSome:
		m, body := c.m, c.emit(simplify(c.expr(n.Kids[0])))
		l.body, l.ask = body, func() celenv.Truth { return m.eval(body) }
	}
	c.m.leaves[e.id] = l
	if shared {
		c.leafIDs[key] = e.id
	}
	return e
}

// fewTexts is how many texts are as fast tried one by one.
const fewTexts = 4

func (c *compiler) elementTest(l *leaf) {
	n := l.node
	if n.Op != celenv.OpText {
		return
	}
	if n.Fold == celenv.FoldNone && len(n.Texts) <= fewTexts {
		return
	}
	var uses []use
	for _, s := range n.Texts {
		if s, possible := n.Fold.Literal(s); possible {
			uses = append(uses, use{test: n.Test, anyCase: n.Fold != celenv.FoldNone, literal: s})
		}
	}
	l.find = newFinder(uses)
}

func keyOf(n *celenv.Node) (key leafKey, shared bool) {
	key = leafKey{op: n.Op, field: n.Field, other: n.Other, measure: n.Measure, rel: n.Rel, fold: n.Fold, number: n.Number, opaque: n.Opaque}
	if n.Op == celenv.OpRegexp {
		key.pattern = n.Regexp.String()
	}
	return key, n.Op != celenv.OpSome && n.Op != celenv.OpText && n.Op != celenv.OpLabel
}

func constant(v bool) *expr {
	if v {
		return &expr{op: opConst, id: 1}
	}
	return &expr{op: opConst}
}

// simplify drops what does not matter, flattens and sorts: the cheapest part
// first, since order does not change what comes out.
func simplify(e *expr) *expr {
	for i, k := range e.kids {
		e.kids[i] = simplify(k)
	}
	switch e.op {
	case opNot:
		switch k := e.kids[0]; k.op {
		case opNot:
			return k.kids[0]
		case opConst:
			return constant(k.id == 0)
		}
	case opAnd, opOr:
		return simplifyJoin(e)
	}
	for _, k := range e.kids {
		e.weight += k.weight
	}
	return e
}

func simplifyJoin(e *expr) *expr {
	neutral := int32(1) // of "and": true
	if e.op == opOr {
		neutral = 0
	}
	out := &expr{op: e.op}
	for _, k := range e.kids {
		switch {
		case k.op == opConst && k.id == neutral:
		case k.op == opConst:
			return k
		case k.op == e.op:
			out.kids = append(out.kids, k.kids...)
		default:
			out.kids = append(out.kids, k)
		}
	}
	switch len(out.kids) {
	case 0:
		return constant(neutral == 1)
	case 1:
		return out.kids[0]
	}
	for _, k := range out.kids {
		out.weight += k.weight
	}
	slices.SortStableFunc(out.kids, func(a, b *expr) int { return a.weight - b.weight })
	return out
}

// emit writes the instructions of e and gives their place.
func (c *compiler) emit(e *expr) int32 {
	pc := int32(len(c.m.code))
	c.m.code = append(c.m.code, instr{op: e.op, id: e.id})
	for _, k := range e.kids {
		c.emit(k)
	}
	c.m.code[pc].end = int32(len(c.m.code))
	return pc
}

// A need is what a formula cannot be true, undecided or failed without: one
// of some terms that is not false.
type need struct {
	terms []int32 // atoms, and leaves that cost little at ^leaf
	cost  float64 // how many of them are expected to be true
	ok    bool    // there is such a set
}

// need finds the cheapest set of terms of which one is not false whenever e
// (or, with not, its negation) is not.
func (c *compiler) need(e *expr, not bool) need {
	switch e.op {
	case opConst:
		return need{ok: (e.id == 1) == not}
	case opAtom:
		if !not {
			return need{[]int32{e.id}, c.m.atoms[e.id].guess, true}
		}
	case opAny:
		if !not {
			n := need{terms: c.anyLists[e.id], ok: true}
			for _, a := range n.terms {
				n.cost += c.m.atoms[a].guess
			}
			return n
		}
	case opLazy:
		if p, cheap := chance(c.m.leaves[e.id].node); cheap && !not {
			return need{[]int32{^e.id}, p, true}
		}
	case opNot:
		return c.need(e.kids[0], !not)
	case opRef:
		if not {
			return c.need(c.shared[e.id], true)
		}
		n, ok := c.needs[c.shared[e.id]]
		if !ok {
			n = c.need(c.shared[e.id], false)
			c.needs[c.shared[e.id]] = n
		}
		return n
	case opAnd, opOr:
		if (e.op == opAnd) != not {
			var best need
			for _, k := range e.kids {
				if n := c.need(k, not); n.ok && (!best.ok || n.cost < best.cost) {
					best = n
				}
			}
			return best
		}
		all := need{ok: true}
		for _, k := range e.kids {
			n := c.need(k, not)
			if !n.ok {
				return need{}
			}
			all.terms, all.cost = append(all.terms, n.terms...), all.cost+n.cost
		}
		slices.Sort(all.terms)
		all.terms = slices.Compact(all.terms)
		return all
	}
	// opIf is undecided when its condition is, whatever follows.
	return need{}
}

// chance is how often a leaf is true, for want of a measurement, if it costs
// little enough to be asked for every event.
func chance(n *celenv.Node) (p float64, cheap bool) {
	switch n.Op {
	case celenv.OpFlag:
		return 0.05, true
	case celenv.OpCaps:
		return 0.2, true
	case celenv.OpNumber:
		if n.Rel == celenv.Eq {
			return 0.1, n.Measure == celenv.OfValue
		}
		return 0.5, n.Measure == celenv.OfValue
	}
	return 0, false
}

// index finds out which rules are to be looked at when.
func (c *compiler) index(conditions []*expr) {
	m := c.m
	byAtom, byLeaf := make([][]int32, len(m.atoms)), make([][]int32, len(m.leaves))
	m.needs = make([]need, len(m.rules))
	for i := range m.fields {
		m.fields[i].rules = NewBits(len(m.rules))
	}
	for k := range m.plans {
		m.plans[k] = plan{rules: NewBits(len(m.rules)), always: NewBits(len(m.rules))}
	}
	for r, e := range conditions {
		n := c.need(e, false)
		m.needs[r] = n
		for _, t := range n.terms {
			if t < 0 {
				byLeaf[^t] = append(byLeaf[^t], int32(r))
				continue
			}
			byAtom[t] = append(byAtom[t], int32(r))
			m.fields[m.atoms[t].field].rules.Set(r)
		}
		for k := range m.plans {
			if m.rules[r].Kinds.Has(event.Kind(k)) {
				m.plan(&m.plans[k], r, n)
			}
		}
	}
	m.byAtom, m.byLeaf = newLists(byAtom), newLists(byLeaf)
}

// plan adds a rule to the plan for a kind it looks at.
func (m *Matcher) plan(p *plan, r int, n need) {
	p.rules.Set(r)
	if !n.ok {
		p.always.Set(r)
	}
	for _, t := range n.terms {
		if t < 0 {
			if !slices.Contains(p.leaves, ^t) {
				p.leaves = append(p.leaves, ^t)
			}
		} else if f := m.atoms[t].field; !slices.Contains(p.fields, f) {
			p.fields = append(p.fields, f)
		}
	}
}

// lists are lists of numbers, one after the other.
type lists struct{ first, all []int32 }

func newLists(ls [][]int32) lists {
	out := lists{first: make([]int32, 1, len(ls)+1)}
	for _, l := range ls {
		out.all = append(out.all, l...)
		out.first = append(out.first, int32(len(out.all)))
	}
	return out
}

func (l *lists) of(i int32) []int32 { return l.all[l.first[i]:l.first[i+1]] }

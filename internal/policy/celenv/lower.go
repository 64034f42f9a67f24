package celenv

import (
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// maxUnrolled bounds the nodes that exists and all over a list of texts may
// become; what is longer is left to CEL.
const maxUnrolled = 1 << 13

// lowered is what an expression was taken apart to, by its type. The last two
// are not there when it is more than the field.
type lowered struct {
	node   *Node
	text   *textSource
	number *numberSource
}

// A textSource is a text that can be read without CEL: of a field, or one
// that was written out.
type textSource struct {
	field   Field // NoField: literal
	elem    bool
	fold    Fold
	label   *Label // of the map that field is; nil: it is a text
	literal string
}

// A numberSource is the same for numbers.
type numberSource struct {
	field   Field // NoField: literal
	elem    bool
	measure Measure
	literal int64
}

// A lowerer takes a checked expression apart.
type lowerer struct {
	scope *Scope
	env   *cel.Env
	ast   *ast.AST

	elem   string            // the variable of the loop around; "" none
	list   Field             // what that runs over
	view   view              // of ancestors, when it runs over them
	procs  bool              // it does
	bound  map[string]string // variables of loops over texts that are written out
	opaque bool              // CEL may be asked: not inside a loop
	budget int               // nodes left for loops that are written out
}

func lower(s *Scope, env *cel.Env, checked *cel.Ast) (lowered, error) {
	l := &lowerer{scope: s, env: env, ast: checked.NativeRep(), opaque: true, budget: maxUnrolled}
	e := l.ast.Expr()
	switch {
	case checked.OutputType().IsExactType(cel.StringType):
		if t, ok := l.text(e); ok && t.field != NoField {
			return lowered{text: &t}, nil
		}
		return lowered{}, nil
	case checked.OutputType().IsExactType(cel.IntType):
		if n, ok := l.number(e); ok && n.field != NoField {
			return lowered{number: &n}, nil
		}
		return lowered{}, nil
	}
	n, err := l.bool(e)
	return lowered{node: n}, err
}

// bool takes an expression of type bool apart. It gives nil where CEL would
// have to be asked and may not.
func (l *lowerer) bool(e ast.Expr) (*Node, error) {
	n, err := l.known(e)
	if n == nil && err == nil && l.opaque {
		n, err = l.leave(e)
	}
	if n != nil && n.Line == 0 {
		line, col := l.place(e)
		n.Line, n.Col = int32(line), int32(col)
		if n.Op == OpNot && n.Kids[0].Line == 0 { // of a != b
			n.Kids[0].Line, n.Kids[0].Col = n.Line, n.Col
		}
	}
	return n, err
}

// place is where an expression starts, both from 1. The place of a dotted
// name is that of its last dot.
func (l *lowerer) place(e ast.Expr) (line, col int) {
	e = startOf(e)
	at := l.ast.SourceInfo().GetStartLocation(e.ID())
	if at.Line() < 1 {
		return 0, 0
	}
	back := 0
	if e.Kind() == ast.IdentKind {
		back = max(strings.LastIndexByte(e.AsIdent(), '.'), 0)
	}
	return at.Line(), max(at.Column()-back, 0) + 1
}

// startOf is the part of an expression that stands first in the text.
func startOf(e ast.Expr) ast.Expr {
	for {
		switch e.Kind() {
		case ast.SelectKind:
			e = e.AsSelect().Operand()
		case ast.CallKind:
			c := e.AsCall()
			_, infix := operators.FindReverseBinaryOperator(c.FunctionName())
			switch {
			case c.IsMemberFunction():
				e = c.Target()
			case len(c.Args()) > 0 && (infix || c.FunctionName() == operators.Conditional || c.FunctionName() == operators.Index ||
				c.FunctionName() == operators.OptIndex || c.FunctionName() == operators.OptSelect):
				e = c.Args()[0]
			default:
				return e
			}
		case ast.ComprehensionKind:
			e = e.AsComprehension().IterRange()
		default:
			return e
		}
	}
}

// leave makes a node of what only CEL can evaluate.
func (l *lowerer) leave(e ast.Expr) (*Node, error) {
	part := ast.NewCheckedAST(ast.NewAST(e, l.ast.SourceInfo()), l.ast.TypeMap(), l.ast.ReferenceMap())
	prog, err := l.env.PlanProgram(part, cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, err
	}
	text, err := cel.ExprToString(e, l.ast.SourceInfo())
	if err != nil {
		text = "a part that cannot be written out"
	}
	x := &Expr{scope: l.scope, typ: cel.BoolType, prog: prog}
	w := walker{scope: l.scope, info: l.ast.SourceInfo()}
	w.visit(e)
	x.uses = w.uses
	return &Node{Op: OpOpaque, Opaque: x, Name: text, Field: NoField, Other: NoField}, nil
}

// known takes apart what it knows how to; nil for the rest.
func (l *lowerer) known(e ast.Expr) (*Node, error) {
	switch e.Kind() {
	case ast.LiteralKind:
		if v, ok := e.AsLiteral().(types.Bool); ok {
			return &Node{Op: OpConst, Value: bool(v)}, nil
		}
	case ast.IdentKind:
		return l.flag(e.AsIdent()), nil
	case ast.SelectKind:
		return l.elementFlag(e), nil
	case ast.CallKind:
		return l.call(e.AsCall())
	case ast.ComprehensionKind:
		return l.loop(e.AsComprehension())
	}
	return nil, nil
}

func (l *lowerer) flag(name string) *Node {
	if slot, ok := l.scope.slots[name]; ok && l.scope.env.vars[slot].shape == shapeFlag {
		return &Node{Op: OpFlag, Field: Field(slot), Other: NoField}
	}
	if x := l.variable(name); x != nil && x.node != nil {
		return &Node{Op: OpVariable, Name: name, Kids: []*Node{x.node}}
	}
	return nil
}

// variable finds a variable of the policy.
func (l *lowerer) variable(name string) *Expr {
	if sc, ok := l.scope.names[name]; ok && sc.list == nil {
		return l.scope.variables[sc.variable]
	}
	return nil
}

// element is the field of the loop's element that e selects.
func (l *lowerer) element(e ast.Expr) (Field, *procField, bool) {
	if e.Kind() != ast.SelectKind || !l.procs {
		return NoField, nil, false
	}
	s := e.AsSelect()
	if s.IsTestOnly() || s.Operand().Kind() != ast.IdentKind || s.Operand().AsIdent() != l.elem {
		return NoField, nil, false
	}
	for i := range procFields {
		if f := &procFields[i]; f.name == s.FieldName() && f.related {
			return l.scope.env.element(l.view, i), f, true
		}
	}
	return NoField, nil, false
}

func (l *lowerer) elementFlag(e ast.Expr) *Node {
	if f, p, ok := l.element(e); ok && p.shape == shapeFlag {
		return &Node{Op: OpFlag, Field: f, Elem: true, Other: NoField}
	}
	return nil
}

func (l *lowerer) call(c ast.CallExpr) (*Node, error) {
	args := c.Args()
	switch name := c.FunctionName(); name {
	case operators.LogicalAnd:
		return l.join(OpAnd, args...)
	case operators.LogicalOr:
		return l.join(OpOr, args...)
	case operators.LogicalNot:
		return l.join(OpNot, args...)
	case operators.Conditional:
		return l.join(OpIf, args...)
	case operators.Equals, operators.NotEquals:
		rel := Eq
		if name == operators.NotEquals {
			rel = Ne
		}
		if n := l.compare(rel, args[0], args[1]); n != nil {
			return n, nil
		}
		n, err := l.equal(args[0], args[1])
		if n != nil && rel == Ne {
			n = &Node{Op: OpNot, Kids: []*Node{n}}
		}
		return n, err
	case operators.Less, operators.LessEquals, operators.Greater, operators.GreaterEquals:
		rel := map[string]Rel{operators.Less: Lt, operators.LessEquals: Le, operators.Greater: Gt, operators.GreaterEquals: Ge}[name]
		return l.compare(rel, args[0], args[1]), nil
	case operators.In:
		return l.in(args[0], args[1]), nil
	case "matches":
		if !c.IsMemberFunction() {
			return l.matches(args[0], args[1]), nil
		}
		return l.matches(c.Target(), args[0]), nil
	case "startsWith", "endsWith", "contains":
		if v, ok := l.text(args[0]); ok && v.field == NoField && c.IsMemberFunction() {
			return l.test(tests[name], c.Target(), []string{v.literal}), nil
		}
	case "startsWithAny", "endsWithAny", "containsAny":
		if vs, ok := l.texts(args[0]); ok {
			return l.test(tests[name], c.Target(), vs), nil
		}
	}
	return nil, nil
}

var tests = map[string]Test{"startsWith": Prefix, "endsWith": Suffix, "contains": Contains,
	"startsWithAny": Prefix, "endsWithAny": Suffix, "containsAny": Contains}

func (l *lowerer) join(op Op, kids ...ast.Expr) (*Node, error) {
	n := &Node{Op: op}
	for _, k := range kids {
		x, err := l.bool(k)
		if x == nil || err != nil {
			return nil, err
		}
		if x.Op == op && (op == OpAnd || op == OpOr) { // a chain
			n.Kids = append(n.Kids, x.Kids...)
			continue
		}
		n.Kids = append(n.Kids, x)
	}
	n.Kids = slices.Clip(n.Kids)
	return n, nil
}

// text reads e as a textSource.
func (l *lowerer) text(e ast.Expr) (textSource, bool) {
	switch e.Kind() {
	case ast.LiteralKind:
		v, ok := e.AsLiteral().(types.String)
		return textSource{field: NoField, literal: string(v)}, ok
	case ast.IdentKind:
		name := e.AsIdent()
		if name == l.elem && name != "" {
			return textSource{field: l.list, elem: true}, !l.procs
		}
		if v, ok := l.bound[name]; ok {
			return textSource{field: NoField, literal: v}, true
		}
		if slot, ok := l.scope.slots[name]; ok {
			sh := l.scope.env.vars[slot].shape
			return textSource{field: Field(slot)}, sh == shapeText || sh == shapeJoined
		}
		if x := l.variable(name); x != nil && x.text != nil {
			return *x.text, true
		}
	case ast.SelectKind:
		f, p, ok := l.element(e)
		return textSource{field: f, elem: true}, ok && (p.shape == shapeText || p.shape == shapeJoined)
	case ast.CallKind:
		c := e.AsCall()
		if c.FunctionName() == "orValue" && c.IsMemberFunction() {
			return l.label(c.Target(), c.Args()[0])
		}
		if !c.IsMemberFunction() || len(c.Args()) > 0 {
			break
		}
		fold, change := FoldLower, lowerASCII
		switch c.FunctionName() {
		case "upperAscii":
			fold, change = FoldUpper, upperASCII
		case "lowerAscii":
		default:
			return textSource{}, false
		}
		t, ok := l.text(c.Target())
		if t.field == NoField {
			t.literal = change(t.literal)
		} else {
			t.fold = fold
		}
		return t, ok
	}
	return textSource{}, false
}

// label reads pod.labels[?'key'].orValue('default'), given what is before and
// in orValue.
func (l *lowerer) label(maybe, or ast.Expr) (textSource, bool) {
	def, ok := l.text(or)
	if !ok || def.field != NoField || maybe.Kind() != ast.CallKind {
		return textSource{}, false
	}
	c := maybe.AsCall()
	if c.FunctionName() != operators.OptIndex && c.FunctionName() != operators.OptSelect || c.Args()[0].Kind() != ast.IdentKind {
		return textSource{}, false
	}
	slot, ok := l.scope.slots[c.Args()[0].AsIdent()]
	key, okKey := l.text(c.Args()[1])
	if !ok || !okKey || key.field != NoField || l.scope.env.vars[slot].shape != shapeMap {
		return textSource{}, false
	}
	return textSource{field: Field(slot), label: &Label{key.literal, def.literal}}, true
}

// texts reads e as a list of texts that are written out.
func (l *lowerer) texts(e ast.Expr) ([]string, bool) {
	switch e.Kind() {
	case ast.IdentKind:
		if sc, ok := l.scope.names[e.AsIdent()]; ok && sc.list != nil {
			if v, ok := sc.list.(*list); ok {
				return v.values, true
			}
		}
	case ast.ListKind:
		if len(e.AsList().OptionalIndices()) > 0 {
			return nil, false
		}
		out := make([]string, 0, len(e.AsList().Elements()))
		for _, x := range e.AsList().Elements() {
			t, ok := l.text(x)
			if !ok || t.field != NoField {
				return nil, false
			}
			out = append(out, t.literal)
		}
		return out, true
	}
	return nil, false
}

// test compares a text with texts that are written out.
func (l *lowerer) test(test Test, e ast.Expr, texts []string) *Node {
	t, ok := l.text(e)
	switch {
	case !ok || t.field == NoField || t.label != nil && t.fold != FoldNone:
		return nil
	case t.label != nil:
		return &Node{Op: OpLabel, Field: t.field, Label: t.label, Test: test, Texts: texts, Other: NoField}
	}
	return &Node{Op: OpText, Field: t.field, Elem: t.elem, Fold: t.fold, Test: test, Texts: texts, Other: NoField}
}

func (l *lowerer) equal(a, b ast.Expr) (*Node, error) {
	ta, oka := l.text(a)
	tb, okb := l.text(b)
	switch {
	case !oka || !okb:
		return l.equalBool(a, b)
	case ta.field == NoField && tb.field == NoField:
		return nil, nil
	case tb.field == NoField:
		return l.test(Equal, a, []string{tb.literal}), nil
	case ta.field == NoField:
		return l.test(Equal, b, []string{ta.literal}), nil
	case ta.fold != tb.fold || ta.label != nil || tb.label != nil:
		return nil, nil
	}
	return &Node{Op: OpSame, Field: ta.field, Elem: ta.elem, Other: tb.field, OtherElem: tb.elem, Fold: ta.fold}, nil
}

// equalBool knows x == true and the like.
func (l *lowerer) equalBool(a, b ast.Expr) (*Node, error) {
	if a.Kind() == ast.LiteralKind {
		a, b = b, a
	}
	if b.Kind() != ast.LiteralKind {
		return nil, nil
	}
	v, ok := b.AsLiteral().(types.Bool)
	if !ok {
		return nil, nil
	}
	n, err := l.bool(a)
	if n != nil && !bool(v) {
		n = &Node{Op: OpNot, Kids: []*Node{n}}
	}
	return n, err
}

// number reads e as a numberSource.
func (l *lowerer) number(e ast.Expr) (numberSource, bool) {
	switch e.Kind() {
	case ast.LiteralKind:
		v, ok := e.AsLiteral().(types.Int)
		return numberSource{field: NoField, literal: int64(v)}, ok
	case ast.IdentKind:
		if slot, ok := l.scope.slots[e.AsIdent()]; ok {
			return numberSource{field: Field(slot)}, l.scope.env.vars[slot].shape == shapeNumber
		}
		if x := l.variable(e.AsIdent()); x != nil && x.number != nil {
			return *x.number, true
		}
	case ast.SelectKind:
		f, p, ok := l.element(e)
		return numberSource{field: f, elem: true}, ok && p.shape == shapeNumber
	case ast.CallKind:
		c := e.AsCall()
		if c.FunctionName() != "size" {
			break
		}
		of := c.Target()
		if !c.IsMemberFunction() {
			of = c.Args()[0]
		}
		if f, _, ok := l.listField(of); ok {
			return numberSource{field: f, measure: OfCount}, true
		}
		t, ok := l.text(of)
		return numberSource{field: t.field, elem: t.elem, measure: OfLength}, ok && t.field != NoField && t.label == nil
	}
	return numberSource{}, false
}

// listField reads e as a list of several texts or of processes.
func (l *lowerer) listField(e ast.Expr) (f Field, procs, ok bool) {
	if e.Kind() != ast.IdentKind {
		return NoField, false, false
	}
	slot, ok := l.scope.slots[e.AsIdent()]
	if !ok {
		return NoField, false, false
	}
	procs = e.AsIdent() == "ancestors"
	return Field(slot), procs, procs || l.scope.env.vars[slot].shape == shapeArgs
}

func (l *lowerer) compare(rel Rel, a, b ast.Expr) *Node {
	na, oka := l.number(a)
	nb, okb := l.number(b)
	if !oka || !okb || na.field == NoField && nb.field == NoField {
		return nil
	}
	if na.field == NoField {
		na, nb = nb, na
		rel = [...]Rel{Eq: Eq, Ne: Ne, Lt: Gt, Le: Ge, Gt: Lt, Ge: Le}[rel]
	}
	if nb.field != NoField && (na.measure != OfValue || nb.measure != OfValue) {
		return nil
	}
	return &Node{Op: OpNumber, Field: na.field, Elem: na.elem, Measure: na.measure, Rel: rel,
		Number: nb.literal, Other: nb.field, OtherElem: nb.elem}
}

// in knows: a text in a list that is written out, a number in one, a text that
// is written out in args or capabilities.
func (l *lowerer) in(x, list ast.Expr) *Node {
	t, isText := l.text(x)
	if vs, ok := l.texts(list); ok && isText && t.field != NoField && len(vs) > 0 {
		return l.test(Equal, x, vs)
	}
	if list.Kind() == ast.ListKind {
		n := &Node{Op: OpOr}
		for _, v := range list.AsList().Elements() {
			k := l.compare(Eq, x, v)
			if k == nil || k.Other != NoField || v.Kind() != ast.LiteralKind {
				return nil
			}
			n.Kids = append(n.Kids, k)
		}
		if len(n.Kids) == 0 {
			return nil
		}
		return n
	}
	if !isText || t.field != NoField || list.Kind() != ast.IdentKind {
		return nil
	}
	slot, ok := l.scope.slots[list.AsIdent()]
	if !ok {
		return nil
	}
	switch l.scope.env.vars[slot].shape {
	case shapeArgs:
		return &Node{Op: OpText, Field: Field(slot), Test: Equal, Texts: []string{t.literal}, Other: NoField}
	case shapeCaps:
		n := &Node{Op: OpCaps, Field: Field(slot), Other: NoField, Name: t.literal}
		if bit := slices.Index(capabilities[:], t.literal); bit >= 0 {
			n.Number = 1 << bit
			return n
		}
	}
	return nil
}

func (l *lowerer) matches(e, pattern ast.Expr) *Node {
	t, ok := l.text(e)
	p, okp := l.text(pattern)
	if !ok || !okp || t.field == NoField || t.label != nil || p.field != NoField {
		return nil
	}
	re, err := regexp.Compile(p.literal)
	if err != nil {
		return nil // CEL says what is wrong with it
	}
	n := &Node{Op: OpRegexp, Field: t.field, Elem: t.elem, Fold: t.fold, Regexp: re, Other: NoField}
	if tree, err := syntax.Parse(p.literal, syntax.Perl); err == nil {
		n.Gate = required(tree.Simplify(), n)
	}
	return n
}

// loop knows exists and all over args, ancestors and texts that are written
// out.
func (l *lowerer) loop(c ast.ComprehensionExpr) (*Node, error) {
	every, body, ok := quantifier(c)
	if !ok || l.elem != "" || l.bound != nil {
		return nil, nil
	}
	if vs, ok := l.texts(c.IterRange()); ok {
		return l.unroll(every, c.IterVar(), vs, body)
	}
	f, procs, ok := l.listField(c.IterRange())
	if !ok {
		return nil, nil
	}
	in := *l
	in.elem, in.list, in.procs, in.opaque = c.IterVar(), f, procs, false
	if procs && l.scope.env.vars[f].tenant {
		in.view = viewTenant
	}
	n, err := in.bool(body)
	if n == nil || err != nil {
		return nil, err
	}
	if every {
		n = &Node{Op: OpNot, Kids: []*Node{n}}
	}
	n = some(f, n)
	if every {
		n = &Node{Op: OpNot, Kids: []*Node{n}}
	}
	return n, nil
}

// quantifier recognises what exists and all are written out to.
func quantifier(c ast.ComprehensionExpr) (every bool, body ast.Expr, ok bool) {
	if c.HasIterVar2() || c.LoopStep().Kind() != ast.CallKind || c.AccuInit().Kind() != ast.LiteralKind ||
		c.Result().Kind() != ast.IdentKind || c.Result().AsIdent() != c.AccuVar() {
		return false, nil, false
	}
	step := c.LoopStep().AsCall()
	var init ref.Val = c.AccuInit().AsLiteral()
	switch {
	case init == types.False && step.FunctionName() == operators.LogicalOr:
	case init == types.True && step.FunctionName() == operators.LogicalAnd:
		every = true
	default:
		return false, nil, false
	}
	first := step.Args()[0]
	return every, step.Args()[1], first.Kind() == ast.IdentKind && first.AsIdent() == c.AccuVar()
}

func (l *lowerer) unroll(every bool, name string, values []string, body ast.Expr) (*Node, error) {
	if len(values) == 0 {
		return &Node{Op: OpConst, Value: every}, nil
	}
	n := &Node{Op: OpOr}
	if every {
		n.Op = OpAnd
	}
	in := *l
	in.opaque = false
	for _, v := range values {
		in.bound = map[string]string{name: v}
		k, err := in.bool(body)
		if k == nil || err != nil {
			return nil, err
		}
		if l.budget -= k.size(); l.budget < 0 {
			return nil, nil
		}
		n.Kids = append(n.Kids, k)
	}
	return n, nil
}

// size counts the nodes of a formula; a variable counts as one.
func (n *Node) size() int {
	if n.Op == OpVariable {
		return 1
	}
	s := 1
	for _, k := range n.Kids {
		s += k.size()
	}
	return s
}

// some is true when body is for one of the elements of f. An "or" of tests of
// a text is the same as each test for one of the elements, which needs no loop.
func some(f Field, body *Node) *Node {
	if k := eachElement(body); k != nil {
		return k
	}
	return &Node{Op: OpSome, Field: f, Other: NoField, Kids: []*Node{body}, Gate: gateOf(body)}
}

// eachElement makes tests of the element at hand tests of all elements; nil
// where that is not the same.
func eachElement(n *Node) *Node {
	switch {
	case n.Op == OpText && n.Elem:
		all := *n
		all.Elem = false
		return &all
	case n.Op == OpNot && n.Kids[0].Op == OpNot:
		return eachElement(n.Kids[0].Kids[0])
	case n.Op == OpOr, n.Op == OpNot && n.Kids[0].Op == OpAnd:
		out := &Node{Op: OpOr, Line: n.Line, Col: n.Col}
		kids, not := n.Kids, false
		if n.Op == OpNot {
			kids, not = n.Kids[0].Kids, true
		}
		for _, k := range kids {
			if not {
				k = &Node{Op: OpNot, Kids: []*Node{k}}
			}
			if k = eachElement(k); k == nil {
				return nil
			}
			out.Kids = append(out.Kids, k)
		}
		return out
	}
	return nil
}

// gateOf finds a formula over all elements that is true or undecided whenever
// the body is for one of them; nil when there is none.
func gateOf(n *Node) *Node {
	switch n.Op {
	case OpText:
		if n.Elem {
			return eachElement(n)
		}
	case OpRegexp:
		if n.Elem && n.Gate != nil {
			return gateOf(n.Gate)
		}
	case OpAnd, OpOr:
		out := &Node{Op: n.Op}
		for _, k := range n.Kids {
			g := gateOf(k)
			if g == nil && n.Op == OpOr {
				return nil
			}
			if g != nil {
				out.Kids = append(out.Kids, g)
			}
		}
		if len(out.Kids) > 0 {
			return out
		}
	}
	return nil
}

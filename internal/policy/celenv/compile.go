package celenv

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"

	"github.com/procession-dev/procession/internal/event"
)

// An Expr is a compiled expression. It is mostly what it was taken apart to;
// the program that CEL evaluates is made when somebody asks for it.
type Expr struct {
	scope *Scope
	env   *cel.Env // in which it was checked
	src   string
	typ   *cel.Type
	lowered
	once  sync.Once
	prog  cel.Program // by program
	uses  []int       // slots of the variables it names, also by way of the policy's own
	where []use       // of those that not every event fills
	warns []*Error
}

// A use is one place where an expression names something.
type use struct {
	name  string
	slots []int // of the variables behind it
	at    common.Location
}

var errNotBool = errors.New("the expression did not give a bool")

// An Error says what is wrong with an expression, and where.
type Error struct {
	Line, Col int    // in the expression, both from 1; 0 when it is about all of it
	Msg       string // what is wrong
	Hint      string // what may have been meant; may be empty
	Text      string // the line it is in
}

// Error gives place, problem and hint in one line.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Line > 0 {
		fmt.Fprintf(&b, "%d:%d: ", e.Line, e.Col)
	}
	b.WriteString(e.Msg)
	if e.Hint != "" {
		b.WriteString("; " + e.Hint)
	}
	return b.String()
}

// Errors are all the problems of one expression, in its order. A compile that
// fails returns an error of this type.
type Errors []*Error

// Error gives all of them, a line each.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, x := range e {
		lines[i] = x.Error()
	}
	return strings.Join(lines, "\n")
}

// maxProblems bounds what is reported about one expression.
const maxProblems = 8

// Uses lists the names of the variables the expression reads, in its order.
func (x *Expr) Uses() []string {
	out := make([]string, len(x.uses))
	for i, slot := range x.uses {
		out[i] = x.scope.env.vars[slot].Name
	}
	return out
}

// Warnings are about what compiles and is probably not meant.
func (x *Expr) Warnings() []*Error { return x.warns }

// FilledBy checks that events of every kind in kinds fill the variables the
// expression reads.
func (x *Expr) FilledBy(kinds []event.Kind) error {
	var errs Errors
	for _, u := range x.where {
		for _, slot := range u.slots {
			v := &x.scope.env.vars[slot]
			i := slices.IndexFunc(kinds, func(k event.Kind) bool { return !v.FilledBy(k) })
			if i < 0 {
				continue
			}
			what := v.Name
			if u.name != v.Name {
				what = u.name + " uses " + v.Name + ", which"
			}
			errs = append(errs, &Error{Line: u.at.Line(), Col: u.at.Column() + 1,
				Msg:  fmt.Sprintf("%s is not known for %s events", what, kinds[i]),
				Hint: "it is filled by " + kindList(v.Kinds) + ": make a rule of its own for that"})
			if len(errs) == maxProblems {
				return errs
			}
		}
	}
	if errs != nil {
		return errs
	}
	return nil
}

func kindList(set event.Kinds) string {
	var names []string
	for _, k := range event.AllKinds() {
		if set.Has(k) {
			names = append(names, k.String())
		}
	}
	return strings.Join(names, ", ")
}

func (s *Scope) compile(src string, want ...*cel.Type) (*Expr, error) {
	if strings.TrimSpace(src) == "" {
		return nil, Errors{{Msg: "the expression is empty"}}
	}
	if len(src) > maxBytes {
		return nil, Errors{{Msg: fmt.Sprintf("the expression has %d bytes; at most %d are allowed", len(src), maxBytes),
			Hint: "put long alternatives into a list"}}
	}
	if src != valid(src) {
		return nil, Errors{{Msg: "the expression is not valid UTF-8"}}
	}
	parsed, issues := s.cel.Parse(src)
	if issues.Err() != nil {
		return nil, celErrors(src, issues)
	}
	w := walker{scope: s, src: src, info: parsed.NativeRep().SourceInfo()}
	w.visit(parsed.NativeRep().Expr())
	if len(w.errs) > 0 {
		return nil, w.errs
	}
	checked, issues := s.cel.Check(parsed)
	if issues.Err() != nil {
		return nil, celErrors(src, issues)
	}
	typ := checked.OutputType()
	if !slices.ContainsFunc(want, typ.IsExactType) {
		return nil, Errors{{Line: 1, Col: 1, Msg: fmt.Sprintf("the expression is of type %s; it must be %s", typ, typeList(want)), Text: line(src, 1)}}
	}
	low, err := lower(s, s.cel, checked)
	if err != nil {
		return nil, Errors{{Msg: err.Error()}}
	}
	return &Expr{scope: s, env: s.cel, src: src, typ: typ, lowered: low, uses: w.uses, where: w.where, warns: w.warns}, nil
}

// program is the expression as CEL evaluates it. That thousands of programs
// are not kept is what lets thousands of rules fit into some megabytes.
func (x *Expr) program() cel.Program {
	x.once.Do(func() {
		if x.prog != nil {
			return // a part of another expression
		}
		checked, issues := x.env.Compile(x.src)
		if issues.Err() != nil { // it was checked before
			panic(issues.Err())
		}
		prog, err := x.env.Program(checked, cel.EvalOptions(cel.OptOptimize))
		if err != nil {
			panic(err)
		}
		x.prog = prog
	})
	return x.prog
}

// Source is the text of the expression; empty for a part of another one.
func (x *Expr) Source() string { return x.src }

func typeList(ts []*cel.Type) string {
	names := make([]string, len(ts))
	for i, t := range ts {
		names[i] = t.String()
	}
	return strings.Join(names, " or ")
}

// A walker looks at what the author wrote before the checker does, because it
// knows the flat names: for the checker `process.exx` is an unknown `process`.
type walker struct {
	scope *Scope
	src   string
	info  *ast.SourceInfo
	bound []string // variables of the loops around
	errs  Errors
	warns []*Error
	uses  []int
	where []use

	grown  int    // growing functions so far
	within string // the one around; see grows
}

func (w *walker) problem(e ast.Expr, hint, format string, args ...any) {
	if len(w.errs) == maxProblems {
		return
	}
	w.errs = append(w.errs, w.at(e, hint, fmt.Sprintf(format, args...)))
}

func (w *walker) at(e ast.Expr, hint, msg string) *Error {
	out := &Error{Msg: msg, Hint: hint}
	if at := w.info.GetStartLocation(w.first(e).ID()); at.Line() > 0 {
		out.Line, out.Col = at.Line(), at.Column()+1
		out.Text = line(w.src, at.Line())
	}
	return out
}

// first finds where an expression starts: the place of a.b is that of its
// dot, the place of a call that of its parenthesis.
func (w *walker) first(e ast.Expr) ast.Expr {
	for e.Kind() == ast.SelectKind {
		e = e.AsSelect().Operand()
	}
	return e
}

func (w *walker) visit(e ast.Expr) {
	if len(w.errs) == maxProblems {
		return
	}
	switch e.Kind() {
	case ast.IdentKind, ast.SelectKind:
		w.name(e)
	case ast.CallKind:
		w.call(e)
	case ast.ListKind:
		for _, x := range e.AsList().Elements() {
			w.visit(x)
		}
	case ast.ComprehensionKind:
		w.loop(e)
	case ast.MapKind, ast.StructKind:
		w.problem(e, "", "maps and objects cannot be made in an expression")
	}
}

func (w *walker) loop(e ast.Expr) {
	c := e.AsComprehension()
	w.visit(c.IterRange())
	for _, v := range []string{c.IterVar(), c.IterVar2()} {
		if v != "" && w.scope.env.isRoot(v) {
			w.problem(e, "choose another name", "%s is the name of a variable and cannot be that of a loop", v)
			return
		}
	}
	n := len(w.bound)
	w.bound = append(w.bound, c.AccuVar(), c.IterVar(), c.IterVar2())
	for _, x := range []ast.Expr{c.AccuInit(), c.LoopCondition(), c.LoopStep(), c.Result()} {
		w.visit(x)
	}
	w.bound = w.bound[:n]
}

func (w *walker) call(e ast.Expr) {
	c := e.AsCall()
	name := c.FunctionName()
	if !w.scope.env.funcs[name] {
		w.problem(e, Meant(name, w.scope.env.funcNames()), "there is no function %s", name)
		return
	}
	if name == "matches" {
		if args := c.Args(); len(args) == 0 || args[len(args)-1].Kind() != ast.LiteralKind {
			w.problem(e, "write the pattern out, or use containsAny with a list",
				"the regular expression of matches must be a text in quotes")
			return
		}
	}
	if name == operators.Index && w.path(c.Args()[0]) == "pod.labels" {
		w.warns = append(w.warns, w.at(e, "write pod.labels[?'key'].orValue('')",
			"pod.labels[...] fails for pods without that label"))
	}
	if growing[name] {
		if !w.grows(e, c) {
			return
		}
		w.within = name
		defer func() { w.within = "" }()
	}
	if c.IsMemberFunction() {
		w.foldedCase(c)
		w.visit(c.Target())
	}
	for _, x := range c.Args() {
		w.visit(x)
	}
}

// foldedCase warns of x.lowerAscii().contains('ABC'), which is never true.
func (w *walker) foldedCase(c ast.CallExpr) {
	if c.Target().Kind() != ast.CallKind || len(c.Args()) != 1 {
		return
	}
	var fold func(string) string
	switch c.Target().AsCall().FunctionName() {
	case "lowerAscii":
		fold = strings.ToLower
	case "upperAscii":
		fold = strings.ToUpper
	default:
		return
	}
	literals := []ast.Expr{c.Args()[0]}
	if literals[0].Kind() == ast.ListKind {
		literals = literals[0].AsList().Elements()
	}
	for _, l := range literals {
		if l.Kind() != ast.LiteralKind || c.FunctionName() == "matches" {
			continue
		}
		if s, ok := l.AsLiteral().(types.String); ok && fold(string(s)) != string(s) {
			w.warns = append(w.warns, w.at(l, "write "+fmt.Sprintf("%q", fold(string(s))),
				fmt.Sprintf("%q is compared with a text in another case and is never found", string(s))))
		}
	}
}

// path is the dotted name of a chain of selections; empty when it is none.
func (w *walker) path(e ast.Expr) string {
	switch e.Kind() {
	case ast.IdentKind:
		return e.AsIdent()
	case ast.SelectKind:
		if p := w.path(e.AsSelect().Operand()); p != "" {
			return p + "." + e.AsSelect().FieldName()
		}
	}
	return ""
}

func (w *walker) name(e ast.Expr) {
	full := w.path(e)
	if full == "" { // a selection from something that is computed
		if e.Kind() == ast.SelectKind {
			w.visit(e.AsSelect().Operand())
		}
		return
	}
	root, _, _ := strings.Cut(full, ".")
	if slices.Contains(w.bound, root) {
		return
	}
	has := e.Kind() == ast.SelectKind && e.AsSelect().IsTestOnly()
	for name := full; name != ""; {
		slot, sc, ok := w.scope.known(name)
		if ok {
			if has && name == full {
				break // has(process.exe)
			}
			w.use(e, name, slot, sc)
			return
		}
		i := strings.LastIndexByte(name, '.')
		name = name[:max(i, 0)]
	}
	switch {
	case has:
		w.problem(e, "a fact that is missing makes the rule undecided by itself",
			"has() asks for a key of a map, and %s is not in one", full)
	case w.scope.env.slots[full] != 0:
		w.problem(e, "it is about the node and other tenants", "%s is not known to a policy in a namespace", full)
	case root == "lists" || root == "variables":
		w.problem(e, Meant(full, w.scope.candidates()), "the policy has no %s", full)
	default:
		w.problem(e, Meant(full, w.scope.candidates()), "there is no variable %s", full)
	}
}

func (w *walker) use(e ast.Expr, name string, slot int, sc *scoped) {
	var slots []int
	switch {
	case sc == nil:
		slots = []int{slot}
	case sc.list == nil:
		slots = w.scope.variables[sc.variable].uses
	}
	for _, s := range slots {
		if !slices.Contains(w.uses, s) {
			w.uses = append(w.uses, s)
		}
	}
	if slices.ContainsFunc(slots, func(s int) bool { return w.scope.env.vars[s].Kinds != 0 }) {
		w.where = append(w.where, use{name, slots, w.info.GetStartLocation(w.first(e).ID())})
	}
}

func (e *Env) funcNames() []string {
	var out []string
	for n := range e.funcs {
		if n[0] >= 'a' && n[0] <= 'z' {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// The checker calls operators by their internal names.
var operatorName = regexp.MustCompile(`'(@in|[-!]_|_[^']{1,3}_|_\[\??_\])'`)

var undefinedField = regexp.MustCompile(`^undefined field '([^']*)'`)

func celErrors(src string, issues *cel.Issues) Errors {
	var out Errors
	for _, e := range issues.Errors() {
		msg := operatorName.ReplaceAllStringFunc(e.Message, func(s string) string {
			return strings.NewReplacer("_", "", "@", "").Replace(s)
		})
		msg = strings.TrimSuffix(strings.TrimSpace(msg), ".")
		x := &Error{Msg: cut(strings.ReplaceAll(msg, "\n", " "), 1024)}
		if strings.Contains(msg, "no matching overload") {
			x.Hint = "the types do not fit: see docs/rules.md for the type of each variable"
		}
		if m := undefinedField.FindStringSubmatch(msg); m != nil {
			x.Hint = Meant(m[1], processFieldNames())
		}
		if e.Location != nil && e.Location.Line() > 0 {
			x.Line, x.Col = e.Location.Line(), e.Location.Column()+1
			x.Text = line(src, x.Line)
		}
		if out = append(out, x); len(out) == maxProblems {
			break
		}
	}
	return out
}

// line is the n-th line of src, from 1.
func line(src string, n int) string {
	for range n - 1 {
		_, rest, ok := strings.Cut(src, "\n")
		if !ok {
			return ""
		}
		src = rest
	}
	l, _, _ := strings.Cut(src, "\n")
	return cut(strings.ReplaceAll(l, "\t", " "), 200)
}

// Meant suggests the nearest of names for one that does not exist, as a hint for
// people.
func Meant(name string, names []string) string {
	best, limit := "", len(name)/3+1
	if len(name) > 80 {
		return "see docs/rules.md"
	}
	for _, n := range names {
		if d := unlike(name, n); d < limit {
			best, limit = n, d
		}
	}
	if best == "" {
		return "see docs/rules.md for what there is"
	}
	return "did you mean " + best + "?"
}

// unlike is the distance of two dotted names, where a shortened first word
// (proc.name) is one step away.
func unlike(name, n string) int {
	root, rest, ok := strings.Cut(name, ".")
	nroot, nrest, nok := strings.Cut(n, ".")
	if ok && nok && root != nroot && strings.HasPrefix(nroot, root) {
		return distance(rest, nrest) + 1
	}
	return distance(name, n)
}

// distance counts the letters to insert, delete, replace or swap with the next
// one to get from a to b.
func distance(a, b string) int {
	before, row, next := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next[0] = i + 1
		for j := range len(b) {
			d := row[j]
			if a[i] != b[j] {
				d++
			}
			d = min(d, row[j+1]+1, next[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				d = min(d, before[j-1]+1)
			}
			next[j+1] = d
		}
		before, row, next = row, next, before
	}
	return row[len(b)]
}

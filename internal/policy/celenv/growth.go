package celenv

import (
	"regexp"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
)

// Bounds of what makes texts longer than those it is given.
const (
	maxGrowing = 8  // calls in an expression
	maxFiller  = 64 // bytes of what is put in: a separator, a replacement
)

// growing are the functions whose text may be longer than what they are given
// together. What they put in is written out and short, none is applied to what
// another one made, and there are few of them in an expression: with texts
// of at most MaxText bytes, all of them together stay below some megabytes.
var growing = map[string]bool{"replace": true, "join": true, "format": true}

var (
	formatVerb = regexp.MustCompile(`%(%|(\.[0-9]+)?[a-zA-Z])`)
	longNumber = regexp.MustCompile(`%\.[0-9]{3,}`)
)

// grows checks a call of a growing function. It says whether the call may
// stand.
func (w *walker) grows(e ast.Expr, c ast.CallExpr) bool {
	name := c.FunctionName()
	switch w.grown++; {
	case w.within != "":
		w.problem(e, "give the inner one a name in variables", "%s cannot be used inside %s: texts would grow without bound", name, w.within)
		return false
	case w.grown > maxGrowing:
		w.problem(e, "", "replace, join and format stand here more than %d times", maxGrowing)
		return false
	}
	if name == "format" {
		return w.format(e, c)
	}
	for _, x := range c.Args() {
		if x.Kind() != ast.LiteralKind {
			w.problem(x, "", "what %s puts in must be written out in quotes", name)
			return false
		}
		if s, ok := x.AsLiteral().(types.String); ok && len(s) > maxFiller {
			w.problem(x, "", "what %s puts in has %d bytes; at most %d are allowed", name, len(s), maxFiller)
			return false
		}
	}
	return true
}

// format checks 'text %s'.format([...]): the text is written out, and there
// is something for each verb in it.
func (w *walker) format(e ast.Expr, c ast.CallExpr) bool {
	text, ok := "", false
	if c.IsMemberFunction() && c.Target().Kind() == ast.LiteralKind {
		if s, is := c.Target().AsLiteral().(types.String); is {
			text, ok = string(s), true
		}
	}
	if !ok || len(c.Args()) != 1 || c.Args()[0].Kind() != ast.ListKind {
		w.problem(e, "write 'text %s'.format([value])", "format takes a text in quotes and a list that is written out")
		return false
	}
	if longNumber.MatchString(text) {
		w.problem(c.Target(), "", "a format has a precision of at most two digits")
		return false
	}
	verbs := 0
	for _, v := range formatVerb.FindAllString(text, -1) {
		if v != "%%" {
			verbs++
		}
	}
	if n := len(c.Args()[0].AsList().Elements()); n != verbs {
		w.problem(e, "", "the format has %d verbs and is given %d values", verbs, n)
		return false
	}
	return true
}

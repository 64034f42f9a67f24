package celenv

import (
	"regexp/syntax"
	"strings"
	"unicode/utf8"
)

// minLiteral is the shortest text worth looking for before a regular
// expression runs.
const minLiteral = 2

// required finds texts that every match of t holds, as a formula over the
// field that re reads; nil when there are none.
func required(t *syntax.Regexp, re *Node) *Node {
	switch t.Op {
	case syntax.OpLiteral:
		return requiredLiteral(t, re)
	case syntax.OpCapture, syntax.OpPlus:
		return required(t.Sub[0], re)
	case syntax.OpRepeat:
		if t.Min > 0 {
			return required(t.Sub[0], re)
		}
	case syntax.OpConcat:
		out := &Node{Op: OpAnd}
		for _, k := range t.Sub {
			if n := required(k, re); n != nil {
				out.Kids = append(out.Kids, n)
			}
		}
		switch len(out.Kids) {
		case 0:
			return nil
		case 1:
			return out.Kids[0]
		}
		return out
	case syntax.OpAlternate:
		out := &Node{Op: OpOr}
		for _, k := range t.Sub {
			n := required(k, re)
			if n == nil {
				return nil
			}
			out.Kids = append(out.Kids, n)
		}
		return out
	}
	return nil
}

// requiredLiteral asks for a part of the literal: of what is matched without
// regard to case, the longest part without letters that letters beyond ASCII
// fold to, as (?i)k matches U+212A and (?i)s U+017F.
func requiredLiteral(t *syntax.Regexp, re *Node) *Node {
	anyCase := t.Flags&syntax.FoldCase != 0
	best := ""
	for _, part := range strings.FieldsFunc(string(t.Rune), func(r rune) bool {
		return r == utf8.RuneError || anyCase && (r >= 0x80 || strings.ContainsRune("kKsS", r))
	}) {
		if len(part) > len(best) {
			best = part
		}
	}
	fold := re.Fold
	if anyCase {
		// Looked for without regard to case; a text that was folded is held
		// against the literal in the case it has by then.
		switch best = lowerASCII(best); re.Fold {
		case FoldNone:
			fold = FoldLower
		case FoldUpper:
			best = upperASCII(best)
		}
	}
	if len(best) < minLiteral {
		return nil
	}
	return &Node{Op: OpText, Field: re.Field, Elem: re.Elem, Fold: fold, Test: Contains, Texts: []string{best}, Other: NoField}
}

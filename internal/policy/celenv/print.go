package celenv

import (
	"fmt"
	"strconv"
	"strings"
)

// maxListed bounds the texts of a list that are written out.
const maxListed = 8

// Term writes a node as CEL does, for people: long lists are cut.
func (e *Env) Term(n *Node) string {
	var b strings.Builder
	e.write(&b, n)
	return b.String()
}

func (e *Env) write(b *strings.Builder, n *Node) {
	switch n.Op {
	case OpConst:
		b.WriteString(strconv.FormatBool(n.Value))
	case OpAnd, OpOr:
		sep := " && "
		if n.Op == OpOr {
			sep = " || "
		}
		for i, k := range n.Kids {
			if i > 0 {
				b.WriteString(sep)
			}
			e.operand(b, k)
		}
	case OpNot:
		b.WriteByte('!')
		e.enclose(b, n.Kids[0], n.Kids[0].infix())
	case OpIf:
		e.operand(b, n.Kids[0])
		b.WriteString(" ? ")
		e.operand(b, n.Kids[1])
		b.WriteString(" : ")
		e.operand(b, n.Kids[2])
	case OpVariable:
		b.WriteString(n.Name)
	case OpOpaque:
		b.WriteString(n.Name)
	case OpSome:
		fmt.Fprintf(b, "%s.exists(a, ", e.FieldName(n.Field))
		e.write(b, n.Kids[0])
		b.WriteByte(')')
	default:
		e.leaf(b, n)
	}
}

// operand puts what would not bind tightly enough in parentheses.
func (e *Env) operand(b *strings.Builder, n *Node) {
	e.enclose(b, n, n.Op == OpAnd || n.Op == OpOr || n.Op == OpIf)
}

func (e *Env) enclose(b *strings.Builder, n *Node, enclose bool) {
	if enclose {
		b.WriteByte('(')
		e.write(b, n)
		b.WriteByte(')')
		return
	}
	e.write(b, n)
}

// infix says whether a term may be written with an operator between two
// things, which binds less tightly than "not".
func (n *Node) infix() bool {
	switch n.Op {
	case OpConst, OpVariable, OpFlag, OpRegexp, OpSome, OpNot:
		return false
	case OpText, OpLabel:
		return n.Test == Equal
	}
	return true
}

func (e *Env) leaf(b *strings.Builder, n *Node) {
	if n.Op == OpText && e.Several(n.Field) && !n.Elem {
		list := "ancestors"
		if _, _, ok := e.ofElement(n.Field); !ok {
			list = e.FieldName(n.Field)
		}
		elem := *n
		elem.Elem = true
		fmt.Fprintf(b, "%s.exists(a, ", list)
		e.leaf(b, &elem)
		b.WriteByte(')')
		return
	}
	field := e.subject(n.Field, n.Elem, n.Fold)
	switch n.Op {
	case OpText:
		writeTest(b, field, n)
	case OpLabel:
		writeTest(b, fmt.Sprintf("%s[?%s].orValue(%s)", field, quote(n.Label.Key), quote(n.Label.Default)), n)
	case OpSame:
		fmt.Fprintf(b, "%s == %s", field, e.subject(n.Other, n.OtherElem, n.Fold))
	case OpRegexp:
		fmt.Fprintf(b, "%s.matches(%s)", field, quote(n.Regexp.String()))
	case OpNumber:
		if n.Measure != OfValue {
			field += ".size()"
		}
		right := strconv.FormatInt(n.Number, 10)
		if n.Other != NoField {
			right = e.subject(n.Other, n.OtherElem, FoldNone)
		}
		fmt.Fprintf(b, "%s %s %s", field, [...]string{Eq: "==", Ne: "!=", Lt: "<", Le: "<=", Gt: ">", Ge: ">="}[n.Rel], right)
	case OpCaps:
		fmt.Fprintf(b, "%s in %s", quote(n.Name), field)
	case OpFlag:
		b.WriteString(field)
	}
}

func (e *Env) subject(f Field, elem bool, fold Fold) string {
	name := e.FieldName(f)
	if _, _, ok := e.ofElement(f); elem && !ok {
		name = "a"
	}
	return name + [...]string{FoldNone: "", FoldLower: ".lowerAscii()", FoldUpper: ".upperAscii()"}[fold]
}

func writeTest(b *strings.Builder, field string, n *Node) {
	if n.Test == Equal {
		if len(n.Texts) == 1 {
			fmt.Fprintf(b, "%s == %s", field, quote(n.Texts[0]))
			return
		}
		fmt.Fprintf(b, "%s in %s", field, quoteList(n.Texts))
		return
	}
	name := [...]string{Contains: "contains", Prefix: "startsWith", Suffix: "endsWith"}[n.Test]
	if len(n.Texts) == 1 {
		fmt.Fprintf(b, "%s.%s(%s)", field, name, quote(n.Texts[0]))
		return
	}
	fmt.Fprintf(b, "%s.%sAny(%s)", field, name, quoteList(n.Texts))
}

func quoteList(texts []string) string {
	var b strings.Builder
	b.WriteByte('[')
	for i, s := range texts {
		if i > 0 {
			b.WriteString(", ")
		}
		if i == maxListed {
			fmt.Fprintf(&b, "and %d more", len(texts)-i)
			break
		}
		b.WriteString(quote(s))
	}
	b.WriteByte(']')
	return b.String()
}

// quote writes a text in single quotes, with everything escaped that does not
// print.
func quote(s string) string {
	q := strconv.Quote(cut(s, 256))
	q = strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
	return "'" + strings.ReplaceAll(q, "'", `\'`) + "'"
}

package match

import (
	"bytes"
	"unicode/utf8"

	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A reader evaluates the nodes of a formula that have no nodes in them.
type reader struct {
	act     *celenv.Activation
	element int // of the loop at hand
	folded  []byte
}

// plain is the value of a node that is a number, a yes/no fact, a set of
// capabilities, a label, a regular expression or two texts.
func (r *reader) plain(n *celenv.Node) celenv.Truth {
	at := 0
	if n.Elem {
		at = r.element
	}
	switch n.Op {
	case celenv.OpNumber:
		return r.number(n, at)
	case celenv.OpFlag:
		b, known := r.act.Flag(n.Field, at)
		return decided(b, known)
	case celenv.OpCaps:
		set, known := r.act.Number(n.Field, at)
		return decided(n.Number != 0 && set&n.Number == n.Number, known)
	case celenv.OpLabel:
		return r.label(n)
	case celenv.OpRegexp:
		text, known := r.text(n.Field, at, n.Fold)
		return decided(known && n.Regexp.Match(text), known)
	}
	return r.same(n, at)
}

func (r *reader) label(n *celenv.Node) celenv.Truth {
	m, known := r.act.Map(n.Field)
	if !known {
		return celenv.Undecided
	}
	v, ok := m[n.Label.Key]
	if !ok {
		v = n.Label.Default
	}
	r.folded = append(r.folded[:0], v...)
	return truth(passes(n.Test, r.folded, n.Texts))
}

// each asks for each element of a list until one says yes.
func (r *reader) each(list celenv.Field, ask func() celenv.Truth) celenv.Truth {
	n, known := r.act.Count(list)
	if !known {
		return celenv.Undecided
	}
	outer := r.element
	any := celenv.False
	for i := 0; i < n && any != celenv.True; i++ {
		r.element = i
		any = any.Or(ask())
	}
	r.element = outer
	return any
}

// text reads a text, folded. It is valid until the next call.
func (r *reader) text(f celenv.Field, at int, fold celenv.Fold) (text []byte, known bool) {
	if n, known := r.act.Texts(f); !known || at >= n {
		return nil, false
	}
	text, known = r.act.Text(f, at)
	if !known || fold == celenv.FoldNone {
		return text, known
	}
	r.folded = append(r.folded[:0], text...)
	for i, b := range r.folded {
		switch {
		case fold == celenv.FoldLower && 'A' <= b && b <= 'Z':
			r.folded[i] += 'a' - 'A'
		case fold == celenv.FoldUpper && 'a' <= b && b <= 'z':
			r.folded[i] -= 'a' - 'A'
		}
	}
	return r.folded, true
}

func (r *reader) number(n *celenv.Node, at int) celenv.Truth {
	var x int64
	var known bool
	switch n.Measure {
	case celenv.OfCount:
		var c int
		c, known = r.act.Count(n.Field)
		x = int64(c)
	case celenv.OfLength:
		var text []byte
		if text, known = r.text(n.Field, at, celenv.FoldNone); known {
			x = int64(utf8.RuneCount(text))
		}
	default:
		x, known = r.act.Number(n.Field, at)
	}
	y := n.Number
	if n.Other != celenv.NoField {
		at = 0
		if n.OtherElem {
			at = r.element
		}
		var also bool
		y, also = r.act.Number(n.Other, at)
		known = known && also
	}
	return decided(known && n.Rel.Holds(x, y), known)
}

func (r *reader) same(n *celenv.Node, at int) celenv.Truth {
	other := 0
	if n.OtherElem {
		other = r.element
	}
	a, knownA := r.text(n.Field, at, celenv.FoldNone)
	b, knownB := r.text(n.Other, other, celenv.FoldNone)
	if !knownA || !knownB {
		return celenv.Undecided
	}
	if n.Fold == celenv.FoldNone {
		return truth(bytes.Equal(a, b))
	}
	return truth(equalFold(a, b))
}

// equalFold is equality without regard to the case of ASCII letters.
func equalFold(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if foldByte(a[i]) != foldByte(b[i]) {
			return false
		}
	}
	return true
}

// passes says whether a text passes the test with one of texts.
func passes(test celenv.Test, text []byte, texts []string) bool {
	for _, s := range texts {
		var ok bool
		switch test {
		case celenv.Contains:
			ok = contains(text, s)
		case celenv.Prefix:
			ok = len(text) >= len(s) && string(text[:len(s)]) == s
		case celenv.Suffix:
			ok = len(text) >= len(s) && string(text[len(text)-len(s):]) == s
		default:
			ok = string(text) == s
		}
		if ok {
			return true
		}
	}
	return false
}

// contains is bytes.Contains for a string, which would be copied for it.
func contains(text []byte, s string) bool {
	if s == "" {
		return true
	}
	for {
		i := bytes.IndexByte(text, s[0])
		if i < 0 || len(text)-i < len(s) {
			return false
		}
		if string(text[i:i+len(s)]) == s {
			return true
		}
		text = text[i+1:]
	}
}

package match

import (
	"bytes"
	"unicode/utf8"

	"github.com/procession-dev/procession/internal/policy/celenv"
)

// eval is the value of the formula at pc.
func (m *Matcher) eval(pc int32) celenv.Truth {
	in := m.code[pc]
	switch in.op {
	case opAtom:
		return m.atomTruth(in.id)
	case opAnd:
		return m.evalAnd(pc+1, in.end)
	case opOr:
		return m.evalOr(pc+1, in.end)
	case opNot:
		return m.eval(pc + 1).Not()
	case opLazy:
		return m.lazy(in.id)
	case opRef:
		return m.ref(in.id)
	case opElement:
		return m.leaf(in.id)
	case opIf:
		c := m.eval(pc + 1)
		then := m.code[pc+1].end
		switch c {
		case celenv.True:
			return m.eval(then)
		case celenv.False:
			return m.eval(m.code[then].end)
		}
		return c
	}
	return truth(in.id == 1)
}

func truth(b bool) celenv.Truth {
	if b {
		return celenv.True
	}
	return celenv.False
}

func (m *Matcher) evalAnd(pc, end int32) celenv.Truth {
	all := celenv.True
	for ; pc < end; pc = m.code[pc].end {
		switch m.eval(pc) {
		case celenv.False:
			return celenv.False
		case celenv.Undecided:
			all = celenv.Undecided
		case celenv.Failed:
			if all == celenv.True {
				all = celenv.Failed
			}
		}
	}
	return all
}

func (m *Matcher) evalOr(pc, end int32) celenv.Truth {
	any := celenv.False
	for ; pc < end; pc = m.code[pc].end {
		switch m.eval(pc) {
		case celenv.True:
			return celenv.True
		case celenv.Undecided:
			any = celenv.Undecided
		case celenv.Failed:
			if any == celenv.False {
				any = celenv.Failed
			}
		}
	}
	return any
}

func (m *Matcher) atomTruth(id int32) celenv.Truth {
	if m.hit.Has(int(id)) {
		return celenv.True
	}
	fi := &m.fields[m.atoms[id].field]
	if fi.epoch != m.epoch {
		if m.read(fi); m.hit.Has(int(id)) {
			return celenv.True
		}
	}
	if fi.missing {
		return celenv.Undecided
	}
	return celenv.False
}

// ref is the value of a shared formula, found at most once for an event.
func (m *Matcher) ref(id int32) celenv.Truth {
	v := m.refMemo[id].truth
	if m.refMemo[id].epoch != m.epoch {
		before := m.err
		m.err = nil
		v = m.eval(m.refStart[id])
		if m.refMemo[id] = (memo{m.epoch, v}); v == celenv.Failed {
			m.errs[^id] = m.err
		}
		m.err = before
	}
	if v == celenv.Failed && m.err == nil {
		m.err = m.errs[^id]
	}
	return v
}

// lazy is the value of a leaf, found at most once for an event.
func (m *Matcher) lazy(id int32) celenv.Truth {
	v := m.leafMemo[id].truth
	if m.leafMemo[id].epoch != m.epoch {
		v = m.leaf(id)
		m.leafMemo[id] = memo{m.epoch, v}
	}
	if v == celenv.Failed && m.err == nil {
		m.err = m.errs[id]
	}
	return v
}

// leaf evaluates a leaf, for the element at hand where it is about one.
func (m *Matcher) leaf(id int32) celenv.Truth {
	l := &m.leaves[id]
	n := l.node
	at := 0
	if n.Elem {
		at = m.element
	}
	switch n.Op {
	case celenv.OpNumber:
		return m.number(n, at)
	case celenv.OpFlag:
		b, known := m.act.Flag(n.Field, at)
		return decided(b, known)
	case celenv.OpCaps:
		set, known := m.act.Number(n.Field, at)
		return decided(n.Number != 0 && set&n.Number == n.Number, known)
	case celenv.OpText:
		text, known := m.act.Text(n.Field, at)
		return decided(known && m.passes(l, text), known)
	case celenv.OpRegexp:
		text, known := m.text(n.Field, at, n.Fold)
		return decided(known && n.Regexp.Match(text), known)
	case celenv.OpSame:
		return m.same(n, at)
	case celenv.OpSome:
		return m.some(l)
	}
	v, err := n.Opaque.Truth(m.act)
	if err != nil {
		m.errs[id] = err
	}
	return v
}

func decided(b, known bool) celenv.Truth {
	if !known {
		return celenv.Undecided
	}
	return truth(b)
}

// passes applies a test to the text of an element.
func (m *Matcher) passes(l *leaf, text []byte) bool {
	if l.find != nil {
		return l.find.any(text)
	}
	for _, s := range l.list {
		var ok bool
		switch l.node.Test {
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

// text reads a text, folded. It is valid until the next call.
func (m *Matcher) text(f celenv.Field, at int, fold celenv.Fold) (text []byte, known bool) {
	if n, known := m.act.Texts(f); !known || at >= n {
		return nil, false
	}
	text, known = m.act.Text(f, at)
	if !known || fold == celenv.FoldNone {
		return text, known
	}
	m.folded = append(m.folded[:0], text...)
	for i, b := range m.folded {
		switch {
		case fold == celenv.FoldLower && 'A' <= b && b <= 'Z':
			m.folded[i] += 'a' - 'A'
		case fold == celenv.FoldUpper && 'a' <= b && b <= 'z':
			m.folded[i] -= 'a' - 'A'
		}
	}
	return m.folded, true
}

func (m *Matcher) number(n *celenv.Node, at int) celenv.Truth {
	var x int64
	var known bool
	switch n.Measure {
	case celenv.OfCount:
		var c int
		c, known = m.act.Count(n.Field)
		x = int64(c)
	case celenv.OfLength:
		var text []byte
		if text, known = m.text(n.Field, at, celenv.FoldNone); known {
			x = int64(utf8.RuneCount(text))
		}
	default:
		x, known = m.act.Number(n.Field, at)
	}
	y := n.Number
	if n.Other != celenv.NoField {
		at = 0
		if n.OtherElem {
			at = m.element
		}
		var also bool
		y, also = m.act.Number(n.Other, at)
		known = known && also
	}
	return decided(known && n.Rel.Holds(x, y), known)
}

func (m *Matcher) same(n *celenv.Node, at int) celenv.Truth {
	other := 0
	if n.OtherElem {
		other = m.element
	}
	a, knownA := m.text(n.Field, at, celenv.FoldNone)
	b, knownB := m.text(n.Other, other, celenv.FoldNone)
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

// some asks for each element until one says yes.
func (m *Matcher) some(l *leaf) celenv.Truth {
	n, known := m.act.Count(l.node.Field)
	if !known {
		return celenv.Undecided
	}
	outer := m.element
	any := celenv.False
	for i := 0; i < n && any != celenv.True; i++ {
		m.element = i
		any = any.Or(m.eval(l.body))
	}
	m.element = outer
	return any
}

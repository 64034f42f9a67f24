package match

import "github.com/procession-dev/procession/internal/policy/celenv"

// eval is the value of the formula at pc.
func (m *Matcher) eval(pc int32) celenv.Truth {
	in := m.code[pc]
	switch in.op {
	case opAtom:
		return m.atomTruth(in.id)
	case opAny:
		return m.anyTruth(in.id)
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

// anyTruth is the value of "one of these atoms", which are of one field.
func (m *Matcher) anyTruth(id int32) celenv.Truth {
	list := m.any.of(id)
	fi := &m.fields[m.atoms[list[0]].field]
	m.read(fi)
	for _, a := range list {
		if m.hit.Has(int(a)) {
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
	switch n := l.node; n.Op {
	case celenv.OpText:
		text, known := m.act.Text(n.Field, m.element)
		if !known {
			return celenv.Undecided
		}
		if l.find != nil {
			return truth(l.find.any(text))
		}
		return truth(passes(n.Test, text, n.Texts))
	case celenv.OpRegexp:
		if l.dfa == nil {
			return m.plain(n)
		}
		at := 0
		if n.Elem {
			at = m.element
		}
		text, known := m.text(n.Field, at, n.Fold)
		return decided(known && l.dfa.match(text), known)
	case celenv.OpSome:
		return m.each(n.Field, l.ask)
	case celenv.OpOpaque:
		v, err := n.Opaque.Truth(m.act)
		if err != nil {
			m.errs[id] = err
		}
		return v
	default:
		return m.plain(n)
	}
}

func decided(b, known bool) celenv.Truth {
	if !known {
		return celenv.Undecided
	}
	return truth(b)
}

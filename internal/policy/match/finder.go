package match

import "github.com/procession-dev/procession/internal/policy/celenv"

// A finder knows which atoms are true for a text: it looks for all their
// literals at once.
type finder struct {
	auto  *automaton
	first []int32 // uses of pattern p: uses[first[p]:first[p+1]]
	uses  []use
	empty []use // those whose literal is empty
}

// A use is one literal of an atom.
type use struct {
	atom    int32
	test    celenv.Test
	anyCase bool
	literal string // in its own case; in small letters for anyCase
}

// holds says whether the literal, which ends at end, passes its test there.
func (u *use) holds(text []byte, end int) bool {
	from := end - len(u.literal)
	switch u.test {
	case celenv.Prefix:
		if from != 0 {
			return false
		}
	case celenv.Suffix:
		if end != len(text) {
			return false
		}
	case celenv.Equal:
		if from != 0 || end != len(text) {
			return false
		}
	}
	return u.anyCase || string(text[from:end]) == u.literal
}

// newFinder makes a finder of literals.
func newFinder(uses []use) *finder {
	x := &finder{}
	byPattern := map[string]int{}
	var patterns []string
	var lists [][]use
	for _, u := range uses {
		if u.literal == "" {
			x.empty = append(x.empty, u)
			continue
		}
		low := lower(u.literal)
		p, ok := byPattern[low]
		if !ok {
			p = len(patterns)
			byPattern[low] = p
			patterns, lists = append(patterns, low), append(lists, nil)
		}
		lists[p] = append(lists[p], u)
	}
	for _, l := range lists {
		x.first = append(x.first, int32(len(x.uses)))
		x.uses = append(x.uses, l...)
	}
	x.first = append(x.first, int32(len(x.uses)))
	if len(patterns) > 0 {
		x.auto = newAutomaton(patterns, denseBytes)
	}
	return x
}

// find adds the atoms that are true for text to hit, and appends the ones
// that were not in it before to found.
func (x *finder) find(text []byte, hit Bits, found []int32) []int32 {
	for i := range x.empty {
		if u := &x.empty[i]; (u.test != celenv.Equal || len(text) == 0) && !hit.Has(int(u.atom)) {
			hit.Set(int(u.atom))
			found = append(found, u.atom)
		}
	}
	m := x.auto
	if m == nil {
		return found
	}
	rows, classes, nrows := m.rows, m.classes, m.nrows
	s := uint32(0)
	for i := 0; i < len(text); i++ {
		c := m.class[text[i]]
		if s < nrows {
			s = rows[s*classes+uint32(c)]
		} else {
			s = m.next(s, c)
		}
		if s&output == 0 {
			continue
		}
		s &^= output
		t := s
		if m.own[t] < 0 {
			t = m.more[t]
		}
		for ; t != 0; t = m.more[t] {
			p := m.own[t]
			for k := x.first[p]; k < x.first[p+1]; k++ {
				if u := &x.uses[k]; !hit.Has(int(u.atom)) && u.holds(text, i+1) {
					hit.Set(int(u.atom))
					found = append(found, u.atom)
				}
			}
		}
	}
	return found
}

func lower(s string) string {
	b := []byte(s)
	for i := range b {
		b[i] = foldByte(b[i])
	}
	return string(b)
}

// any says whether one of the literals is found in text, when all are those
// of atom 0.
func (x *finder) any(text []byte) bool {
	var hit [1]uint64
	var found [1]int32
	return len(x.find(text, hit[:], found[:0])) > 0
}

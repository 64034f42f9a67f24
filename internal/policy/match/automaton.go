package match

import "slices"

// An automaton finds every occurrence of every one of its patterns, also of
// those that lie inside others (Aho and Corasick, 1975). It takes no account
// of the case of ASCII letters.
//
// States are numbered breadth first. The first of them, where a text spends
// nearly all its time, have a complete row of successors; the rest have the
// edges of the trie and a link to the state of the longest proper suffix.
type automaton struct {
	class   [256]uint8 // of bytes that are the same to it; 0: in no pattern
	classes uint32

	rows   []uint32 // of the first states, classes each: successor, marked with output
	nrows  uint32   // states that have one
	offset []uint32 // edges of state s: offset[s] to offset[s+1]
	labels []uint8  // class of an edge
	heads  []uint32 // where it leads
	fail   []uint32 // state of the longest suffix

	own  []int32  // the pattern that ends in a state; -1 none
	more []uint32 // the next state on the way of fail in which one ends; 0 none
}

// denseBytes is what the rows of one automaton may take: enough for what
// stays in a processor's cache anyway.
const denseBytes = 256 << 10

// output marks a successor in which a pattern ends.
const output = 1 << 31

func foldByte(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b + 'a' - 'A'
	}
	return b
}

// newAutomaton takes distinct patterns in small letters, none of them empty.
func newAutomaton(patterns []string, dense int) *automaton {
	m := &automaton{}
	m.classify(patterns)
	m.build(patterns)
	m.link()
	m.fill(dense)
	return m
}

func (m *automaton) classify(patterns []string) {
	var used [256]bool
	for _, p := range patterns {
		for i := range len(p) {
			used[p[i]] = true
		}
	}
	m.classes = 1
	for b, u := range used {
		if u {
			m.class[b] = uint8(m.classes) // at most 231: patterns hold no capitals
			m.classes++
		}
	}
	for b := byte('A'); b <= 'Z'; b++ {
		m.class[b] = m.class[foldByte(b)]
	}
}

// build makes the trie, level by level, from the sorted patterns: the ones
// that share a state stand side by side.
func (m *automaton) build(patterns []string) {
	order := make([]int32, len(patterns))
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortFunc(order, func(a, b int32) int {
		switch {
		case patterns[a] < patterns[b]:
			return -1
		case patterns[a] > patterns[b]:
			return 1
		}
		return 0
	})
	type group struct{ from, to, depth int32 } // of order; they share depth bytes
	queue := []group{{0, int32(len(order)), 0}}
	m.own = append(m.own, -1)
	m.offset = append(m.offset, 0)
	for s := 0; s < len(queue); s++ {
		g := queue[s]
		for i := g.from; i < g.to; {
			p := patterns[order[i]]
			if int32(len(p)) == g.depth { // sorted: before the ones that go on
				m.own[s] = order[i]
				i++
				continue
			}
			j := i + 1
			for j < g.to && patterns[order[j]][g.depth] == p[g.depth] {
				j++
			}
			m.labels = append(m.labels, m.class[p[g.depth]])
			m.heads = append(m.heads, uint32(len(queue)))
			m.own = append(m.own, -1)
			queue = append(queue, group{i, j, g.depth + 1})
			i = j
		}
		m.offset = append(m.offset, uint32(len(m.heads)))
	}
}

// link finds the fail and more links: those of a state come from states
// before it.
func (m *automaton) link() {
	n := len(m.own)
	m.fail, m.more = make([]uint32, n), make([]uint32, n)
	for s := range uint32(n) {
		for k := m.offset[s]; k < m.offset[s+1]; k++ {
			t := m.heads[k]
			if s != 0 {
				f := m.fail[s]
				for {
					if g := m.edge(f, m.labels[k]); g != 0 {
						m.fail[t] = g
						break
					}
					if f == 0 {
						break
					}
					f = m.fail[f]
				}
			}
			if f := m.fail[t]; m.own[f] >= 0 {
				m.more[t] = f
			} else {
				m.more[t] = m.more[f]
			}
		}
	}
}

// fill writes the rows.
func (m *automaton) fill(dense int) {
	m.nrows = uint32(min(len(m.own), max(1, dense/4/int(m.classes))))
	m.rows = make([]uint32, m.nrows*m.classes)
	for s := range m.nrows {
		row := m.rows[s*m.classes : (s+1)*m.classes]
		if s != 0 {
			f := m.fail[s] // shallower, so it has a row
			copy(row, m.rows[f*m.classes:(f+1)*m.classes])
		}
		for k := m.offset[s]; k < m.offset[s+1]; k++ {
			row[m.labels[k]] = m.marked(m.heads[k])
		}
	}
}

// marked is a state with its output mark.
func (m *automaton) marked(s uint32) uint32 {
	if m.own[s] >= 0 || m.more[s] != 0 {
		return s | output
	}
	return s
}

// edge is where the trie leads from s; 0 for nowhere.
func (m *automaton) edge(s uint32, class uint8) uint32 {
	for k := m.offset[s]; k < m.offset[s+1]; k++ {
		if m.labels[k] == class {
			return m.heads[k]
		}
	}
	return 0
}

// next is the state after s and a byte of the class, with its mark.
func (m *automaton) next(s uint32, class uint8) uint32 {
	for s >= m.nrows {
		if t := m.edge(s, class); t != 0 {
			return m.marked(t)
		}
		s = m.fail[s]
	}
	return m.rows[s*m.classes+uint32(class)]
}

package match

import (
	"encoding/binary"
	"regexp"
	"regexp/syntax"
	"slices"
	"unicode"
	"unicode/utf8"
)

// A dfa says whether a regular expression matches somewhere in a text, as
// regexp.Regexp.Match does, at the cost of a table look-up for each byte. The
// library follows all ways through the expression at once and takes ten times
// as long: on an argument list made for it, half a millisecond.
//
// States are made when a text leads to them. There are at most maxStates of
// them; then all are dropped and made anew. A text that makes states faster
// than it uses them is left to the library, and so is an expression that needs
// too many again and again.
type dfa struct {
	re   *regexp.Regexp
	prog *syntax.Prog

	bounds []rune // where classes of characters begin; the first is 0
	ascii  [utf8.RuneSelf]uint8
	first  []rune // a character of each class
	width  int    // classes, and one for the end of the text

	states []dfaState
	next   []int32 // by state and class; see the constants
	byKey  map[string]int32
	drops  int  // how often states were dropped
	steps  int  // states looked for in this text
	kept   int  // bytes of them
	pool   *int // bytes that all together may still keep

	seen  []uint32 // by instruction: the closure it was seen in
	round uint32
	stack []uint32
	set   []uint32
	key   []byte
}

// A dfaState is the instructions that wait for the next character, and what
// the one before was, as far as \b, ^ and the like ask for it.
type dfaState struct {
	insts  []uint32
	before rune
}

const (
	maxStates  = 256
	maxDrops   = 8       // then the library is faster
	poolBytes  = 8 << 20 // of the states of all expressions of a matcher
	maxClasses = 96      // an expression with more is left to the library, as is one
	maxInsts   = 512

	unknownState = 0  // not made yet; the start is state 1
	matchState   = -1 // it matches, whatever follows
)

// newDFA makes a dfa; nil for an expression that is left to the library.
func newDFA(re *regexp.Regexp, pool *int) *dfa {
	tree, err := syntax.Parse(re.String(), syntax.Perl)
	if err != nil {
		return nil
	}
	prog, err := syntax.Compile(tree.Simplify())
	if err != nil || len(prog.Inst) > maxInsts {
		return nil
	}
	d := &dfa{re: re, prog: prog, pool: pool, seen: make([]uint32, len(prog.Inst))}
	if !d.classify() {
		return nil
	}
	return d
}

// classify divides characters into classes that the expression treats alike.
func (d *dfa) classify() bool {
	// Words and lines matter to \b and ^.
	d.bounds = []rune{0, '\n', '\n' + 1, '0', '9' + 1, 'A', 'Z' + 1, '_', '_' + 1, 'a', 'z' + 1, utf8.RuneSelf}
	for i := range d.prog.Inst {
		in := &d.prog.Inst[i]
		if in.Op != syntax.InstRune && in.Op != syntax.InstRune1 {
			continue
		}
		if len(in.Rune) == 1 { // and what it folds to, if it does
			r := in.Rune[0]
			d.bounds = append(d.bounds, r, r+1)
			for f := unicode.SimpleFold(r); f != r; f = unicode.SimpleFold(f) {
				d.bounds = append(d.bounds, f, f+1)
			}
			continue
		}
		for j := 0; j+1 < len(in.Rune); j += 2 {
			d.bounds = append(d.bounds, in.Rune[j], in.Rune[j+1]+1)
		}
	}
	slices.Sort(d.bounds)
	d.bounds = slices.Compact(d.bounds)
	if len(d.bounds) > maxClasses {
		return false
	}
	d.first, d.width = d.bounds, len(d.bounds)+1
	for b := range rune(utf8.RuneSelf) {
		d.ascii[b] = uint8(d.class(b))
	}
	return true
}

// class is the class of a character.
func (d *dfa) class(r rune) int {
	i, found := slices.BinarySearch(d.bounds, r)
	if !found {
		i--
	}
	return i
}

// match says whether the expression matches somewhere in text, which is valid
// UTF-8.
func (d *dfa) match(text []byte) bool {
	if d.drops >= maxDrops {
		return d.re.Match(text)
	}
	if len(d.states) == 0 {
		d.reset()
	}
	d.steps = 0
	s := int32(1)
	for i := 0; i < len(text); {
		var c int
		if b := text[i]; b < utf8.RuneSelf {
			c = int(d.ascii[b])
			i++
		} else {
			r, n := utf8.DecodeRune(text[i:])
			c = d.class(r)
			i += n
		}
		t := d.next[int(s)*d.width+c]
		if t == unknownState {
			if t = d.step(s, c); d.drops >= maxDrops || d.steps > maxStates+i/8 {
				return d.re.Match(text)
			}
		}
		if t == matchState {
			return true
		}
		s = t
	}
	end := d.width - 1
	t := d.next[int(s)*d.width+end]
	if t == unknownState {
		t = d.step(s, end)
	}
	return t == matchState
}

// reset drops all states but the start, which is state 1: nothing waits yet,
// before the first character.
func (d *dfa) reset() {
	d.states = append([]dfaState(nil), dfaState{}, dfaState{before: -1})
	d.next = make([]int32, 2*d.width)
	d.byKey = map[string]int32{}
	*d.pool += d.kept
	d.kept = 0
}

// step makes the state after s and a character of class c, or the end.
func (d *dfa) step(s int32, c int) int32 {
	d.steps++
	after := rune(-1)
	if c < d.width-1 {
		after = d.first[c]
	}
	from := d.states[s]
	matched := d.close(from, syntax.EmptyOpContext(from.before, after))
	switch {
	case matched:
		d.next[int(s)*d.width+c] = matchState
		return matchState
	case after < 0: // no match at the end; any state that is none will do
		d.next[int(s)*d.width+c] = s
		return s
	}
	// Of what waits now, what takes the character waits for the next one.
	waits := d.set[:0]
	for _, pc := range d.set {
		if in := &d.prog.Inst[pc]; in.MatchRune(after) && !slices.Contains(waits, in.Out) {
			waits = append(waits, in.Out)
		}
	}
	slices.Sort(waits)
	t := d.state(waits, kindOf(after))
	if d.drops < maxDrops && int(s)*d.width+c < len(d.next) && d.states[s].same(from) {
		d.next[int(s)*d.width+c] = t
	}
	return t
}

func (s dfaState) same(o dfaState) bool {
	return s.before == o.before && slices.Equal(s.insts, o.insts)
}

// kindOf stands for all characters that are the same to \b and ^.
func kindOf(r rune) rune {
	switch {
	case r == '\n':
		return '\n'
	case syntax.IsWordChar(r):
		return 'a'
	}
	return ' '
}

// state finds or makes a state.
func (d *dfa) state(waits []uint32, before rune) int32 {
	d.key = append(d.key[:0], byte(before))
	for _, pc := range waits {
		d.key = binary.AppendUvarint(d.key, uint64(pc))
	}
	if t, ok := d.byKey[string(d.key)]; ok {
		return t
	}
	size := 4*d.width + 8*len(waits) + 2*len(d.key) + 64 // nearly
	if len(d.states) >= maxStates || size > *d.pool {
		d.drops++
		d.reset()
	}
	*d.pool -= size
	d.kept += size
	t := int32(len(d.states))
	d.states = append(d.states, dfaState{slices.Clone(waits), before})
	d.next = append(d.next, make([]int32, d.width)...)
	d.byKey[string(d.key)] = t
	return t
}

// close follows what needs no character from the instructions of a state and
// from the start, where a match may begin anywhere, and leaves in d.set those
// that wait for one. It reports whether the expression matches already.
func (d *dfa) close(s dfaState, at syntax.EmptyOp) (matched bool) {
	d.round++
	d.set = d.set[:0]
	d.stack = append(append(d.stack[:0], s.insts...), uint32(d.prog.Start))
	for len(d.stack) > 0 {
		pc := d.stack[len(d.stack)-1]
		d.stack = d.stack[:len(d.stack)-1]
		if d.seen[pc] == d.round {
			continue
		}
		d.seen[pc] = d.round
		switch in := &d.prog.Inst[pc]; in.Op {
		case syntax.InstMatch:
			return true
		case syntax.InstAlt, syntax.InstAltMatch:
			d.stack = append(d.stack, in.Out, in.Arg)
		case syntax.InstCapture, syntax.InstNop:
			d.stack = append(d.stack, in.Out)
		case syntax.InstEmptyWidth:
			if syntax.EmptyOp(in.Arg)&^at == 0 {
				d.stack = append(d.stack, in.Out)
			}
		case syntax.InstRune, syntax.InstRune1, syntax.InstRuneAny, syntax.InstRuneAnyNotNL:
			d.set = append(d.set, pc)
		}
	}
	return false
}

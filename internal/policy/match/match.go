package match

import (
	"fmt"
	"math/bits"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A Rule is what a Matcher decides.
type Rule struct {
	// Condition is of type bool.
	Condition *celenv.Expr
	// Exceptions are decided by Exception, when the caller asks.
	Exceptions []*celenv.Expr
	// Kinds are the kinds of event the rule looks at; 0 is none. It is only
	// evaluated for these, whatever is active.
	Kinds event.Kinds
}

// A Verdict says what an expression is for the event.
type Verdict struct {
	Truth celenv.Truth
	Err   error // why it Failed; nil otherwise
}

// A Hit is a rule that is not False.
type Hit struct {
	Rule int // index in what New got
	Verdict
}

// A Matcher decides rules. It belongs to one goroutine.
type Matcher struct {
	env   *celenv.Env
	rules []Rule

	// What New made; it does not change.
	code       []instr
	start      []int32   // by rule: pc of its condition
	exceptions [][]int32 // by rule: pcs of its exceptions
	refStart   []int32   // by ref: pc of the shared formula
	atoms      []atom
	any        lists // of atoms
	leaves     []leaf
	fields     []field
	needs      []need // by rule
	byAtom     lists  // rules that need an atom
	byLeaf     lists  // rules that need a leaf
	plans      [numKinds]plan

	dfaPool int // see dfa

	state // of the event at hand
}

// numKinds is more than there are: a Kinds has 32 bits.
const numKinds = 32

// A plan is what to do for one kind of event.
type plan struct {
	rules  Bits    // that look at the kind
	always Bits    // of them, those that need nothing
	fields []int32 // to read, because rules need atoms of them
	leaves []int32 // to ask, because rules need them
}

// A field is a text field that atoms are about.
type field struct {
	of     celenv.Field
	finder *finder
	rules  Bits // that need an atom of it

	// Of the event at hand:
	epoch   uint32 // it was read for this event
	missing bool   // it, or one of its texts, is
}

// state is what is known about the event at hand.
type state struct {
	reader
	epoch uint32
	hit   Bits    // atoms that are true
	found []int32 // the same, as a list
	cand  Bits    // rules to look at
	hits  []Hit

	leafMemo, refMemo []memo
	errs              map[int32]error // of leaves that failed, and of shared formulas at ^ref
	err               error           // the first failure of the expression at hand
}

// memo is a value that was found for the event of that epoch.
type memo struct {
	epoch uint32
	truth celenv.Truth
}

func (m *Matcher) prepare() {
	m.epoch = 1
	m.hit, m.cand = NewBits(len(m.atoms)), NewBits(len(m.rules))
	m.leafMemo, m.refMemo = make([]memo, len(m.leaves)), make([]memo, len(m.refStart))
	m.errs = map[int32]error{}
}

// turn goes to the event a stands at.
func (m *Matcher) turn(a *celenv.Activation) {
	m.act = a
	for _, i := range m.found {
		m.hit.Clear(int(i))
	}
	m.found, m.hits = m.found[:0], m.hits[:0]
	if len(m.errs) > 0 {
		clear(m.errs)
	}
	if m.epoch++; m.epoch == 0 { // after 2^32 events
		clear(m.leafMemo)
		clear(m.refMemo)
		for i := range m.fields {
			m.fields[i].epoch = 0
		}
		m.epoch = 1
	}
}

// Evaluate decides the active rules for the event a stands at. It returns
// those that are not False, in their order; the slice is valid until the next
// call.
func (m *Matcher) Evaluate(a *celenv.Activation, active Bits) []Hit {
	m.turn(a)
	k := a.Kind()
	if k >= numKinds {
		return nil
	}
	p := &m.plans[k]
	clear(m.cand)
	for _, f := range p.fields {
		m.candidates(f, active)
	}
	for _, l := range p.leaves {
		if m.lazy(l) != celenv.False {
			m.add(m.byLeaf.of(l))
		}
	}
	for w := range m.cand {
		m.cand[w] |= p.always[w]
		m.cand[w] &= p.rules[w]
		if w < len(active) {
			m.cand[w] &= active[w]
		} else {
			m.cand[w] = 0
		}
	}
	for m.decideCandidates() {
	}
	return m.hits
}

// decideCandidates decides the rules in m.cand. A panic in one is a bug, of
// ours or of CEL's; it must not take the others with it. more is true when the
// caller has to go on after one.
func (m *Matcher) decideCandidates() (more bool) {
	r := 0
	defer func() {
		if p := recover(); p != nil {
			m.hits = append(m.hits, Hit{r, Verdict{celenv.Failed, fmt.Errorf("panic: %v", p)}})
			more = true
		}
	}()
	for w := range m.cand {
		for m.cand[w] != 0 {
			r = w<<6 + bits.TrailingZeros64(m.cand[w])
			m.cand[w] &= m.cand[w] - 1
			if v := m.verdict(m.start[r]); v.Truth != celenv.False {
				m.hits = append(m.hits, Hit{r, v})
			}
		}
	}
	return false
}

func (m *Matcher) add(rules []int32) {
	for _, r := range rules {
		m.cand.Set(int(r))
	}
}

// candidates reads a field and notes the rules that need what is found in it.
// Where a text is missing every rule that needs the field may be undecided.
func (m *Matcher) candidates(f int32, active Bits) {
	fi := &m.fields[f]
	if !intersect(fi.rules, active) {
		return
	}
	from := len(m.found)
	m.read(fi)
	for _, a := range m.found[from:] {
		m.add(m.byAtom.of(a))
	}
	if fi.missing {
		for w, set := range fi.rules {
			m.cand[w] |= set
		}
	}
}

func intersect(a, b Bits) bool {
	for w := range a[:min(len(a), len(b))] {
		if a[w]&b[w] != 0 {
			return true
		}
	}
	return false
}

// read finds the atoms of a field that are true, if that was not done before.
func (m *Matcher) read(fi *field) {
	if fi.epoch == m.epoch {
		return
	}
	fi.epoch = m.epoch
	n, known := m.act.Texts(fi.of)
	fi.missing = !known
	for i := range n {
		text, known := m.act.Text(fi.of, i)
		if !known {
			fi.missing = true
			continue
		}
		m.found = fi.finder.find(text, m.hit, m.found)
	}
}

// Exception decides the i-th exception of a rule for the event of the last
// Evaluate.
func (m *Matcher) Exception(rule, i int) Verdict { return m.guarded(m.exceptions[rule][i]) }

// guarded is verdict for one formula, which may panic.
func (m *Matcher) guarded(pc int32) (v Verdict) {
	defer func() {
		if p := recover(); p != nil {
			v = Verdict{celenv.Failed, fmt.Errorf("panic: %v", p)}
		}
	}()
	return m.verdict(pc)
}

func (m *Matcher) verdict(pc int32) (v Verdict) {
	m.err = nil
	if v.Truth = m.eval(pc); v.Truth == celenv.Failed {
		v.Err = m.err
	}
	return v
}

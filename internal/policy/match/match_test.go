package match

import (
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match/matchtest"
)

func TestBits(t *testing.T) {
	b := NewBits(130)
	for _, i := range []int{0, 63, 64, 129} {
		if b.Has(i) {
			t.Errorf("%d is in an empty set", i)
		}
		if b.Set(i); !b.Has(i) {
			t.Errorf("%d is not in the set after Set", i)
		}
	}
	if b.Clear(64); b.Has(64) || !b.Has(63) || !b.Has(129) || b.Has(1) || b.Has(5000) {
		t.Errorf("after Clear(64): %v", b)
	}
}

// Every occurrence of every pattern is found, also inside others, with rows
// for all states, for some and for the first alone.
func TestAutomatonFindsAll(t *testing.T) {
	patterns := []string{"bash", "bashrc", "as", "s", "rc", "a", "aa", "aab", "\xff", "é", "hrc", "sh"}
	texts := []string{"", "bashrc", "BASHRC", "xbashbashrcx", "aaab", "\xff\xff", "éé", "ba sh", strings.Repeat("a", 50), "cbashr"}
	for _, dense := range []int{0, 200, 400, 1 << 20} {
		m := newAutomaton(patterns, dense)
		for _, text := range texts {
			got := map[[2]int]int{}
			s := uint32(0)
			for i := range len(text) {
				s = m.next(s&^output, m.class[text[i]])
				if s&output == 0 {
					continue
				}
				for u := s &^ output; u != 0; u = m.more[u] {
					if p := m.own[u]; p >= 0 {
						got[[2]int{int(p), i + 1}]++
					}
				}
			}
			for p, pattern := range patterns {
				for end := 1; end <= len(text); end++ {
					want := 0
					if strings.HasSuffix(lower(text[:end]), pattern) {
						want = 1
					}
					if n := got[[2]int{p, end}]; n != want {
						t.Errorf("rows of %d bytes, %q in %q, ending at %d: found %d times, want %d", dense, pattern, text, end, n, want)
					}
				}
			}
		}
	}
}

func compileRules(t testing.TB, sources ...string) (*celenv.Env, []Rule) {
	t.Helper()
	env, err := celenv.New()
	if err != nil {
		t.Fatal(err)
	}
	s, err := env.NewScope(matchtest.Lists)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range matchtest.Variables {
		if err := s.AddVariable(v[0], v[1]); err != nil {
			t.Fatal(err)
		}
	}
	rules := make([]Rule, len(sources))
	for i, src := range sources {
		x, err := s.Condition(src)
		if err != nil {
			t.Fatalf("%s: %v", src, err)
		}
		rules[i] = Rule{Condition: x, Kinds: event.KindSet(event.Exec)}
	}
	return env, rules
}

func active(n int) Bits {
	b := NewBits(n)
	for i := range n {
		b.Set(i)
	}
	return b
}

func TestEvaluateAllocatesNothing(t *testing.T) {
	env, rules := compileRules(t, matchtest.Grow(matchtest.Written(), 150, 3)...)
	m, err := New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	a, on := env.NewActivation("n"), active(len(rules))
	events := matchtest.Everyday(100, 1)
	i := 0
	each := func() {
		a.Reset(events[i%len(events)])
		m.Evaluate(a, on)
		i++
	}
	for range events {
		each() // texts as long as they get
	}
	if n := testing.AllocsPerRun(1000, each); n != 0 {
		t.Errorf("%v allocations for an event", n)
	}
}

// A rule that panics has failed, and the ones before and after it are as they
// would be without it.
func TestPanicHarmsNoOther(t *testing.T) {
	env, rules := compileRules(t, "process.name == 'runc'", "process.args[1] == 'x'", "process.pid > 0", "process.exe != ''")
	rules[1].Condition = new(celenv.Expr) // without a program: a nil pointer
	rules[3].Exceptions = []*celenv.Expr{new(celenv.Expr), rules[2].Condition}
	m, err := New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	ev := matchtest.Everyday(1, 1)[0]
	ev.Process.Name = "runc"
	a := env.NewActivation("n")
	for range 3 {
		a.Reset(ev)
		got := m.Evaluate(a, active(4))
		if len(got) != 4 {
			t.Fatalf("%d rules are not false, want 4: %v", len(got), got)
		}
		for i, h := range got {
			want := celenv.True
			if i == 1 {
				want = celenv.Failed
			}
			if h.Rule != i || h.Truth != want || (h.Err != nil) != (want == celenv.Failed) {
				t.Errorf("rule %d: %v (%v), want %v", h.Rule, h.Truth, h.Err, want)
			}
		}
		if v := m.Exception(3, 0); v.Truth != celenv.Failed || v.Err == nil {
			t.Errorf("the exception that panics: %v", v)
		}
		if v := m.Exception(3, 1); v.Truth != celenv.True {
			t.Errorf("the exception after it: %v", v)
		}
	}
}

// Rules are looked at only for the kinds they are for, and only when active.
func TestKindsAndActive(t *testing.T) {
	env, rules := compileRules(t, "process.pid >= 0", "process.pid >= 0", "process.pid >= 0 || process.name == 'x'")
	rules[1].Kinds = event.KindSet(event.Fork, event.Exit)
	rules[2].Kinds = 0
	m, err := New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	a := env.NewActivation("n")
	for _, tt := range []struct {
		kind   event.Kind
		active Bits
		want   []int
	}{
		{event.Exec, active(3), []int{0}},
		{event.Fork, active(3), []int{1}},
		{event.Exit, active(3), []int{1}},
		{event.UIDChange, active(3), nil},
		{event.Kind(200), active(3), nil},
		{event.Exec, NewBits(3), nil},
		{event.Exec, nil, nil},
	} {
		ev := matchtest.Everyday(1, 1)[0]
		ev.Kind = tt.kind
		a.Reset(ev)
		got := m.Evaluate(a, tt.active)
		if len(got) != len(tt.want) || len(got) == 1 && got[0].Rule != tt.want[0] {
			t.Errorf("%v, active %v: %v, want %v", tt.kind, tt.active, got, tt.want)
		}
	}
}

// After as many events as an epoch can count, nothing of an old one is taken
// for the event at hand.
func TestEpochsWrap(t *testing.T) {
	env, rules := compileRules(t, "process.name == 'runc' && process.uid == 0 || variables.shellByServer")
	m, err := New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	a := env.NewActivation("n")
	yes, no := matchtest.Everyday(1, 1)[0], matchtest.Everyday(1, 1)[0]
	yes.Process.Name, yes.Process.UID, no.Process.Name, no.Process.UID = "runc", 0, "x", 7
	a.Reset(yes)
	m.epoch = 1 // what Evaluate sees as its event is 2
	m.Evaluate(a, active(1))
	m.epoch = 1<<32 - 2
	for i, ev := range []*event.Event{no, no, no, yes, no} {
		a.Reset(ev)
		if got := len(m.Evaluate(a, active(1))) == 1; got != (ev == yes) {
			t.Errorf("event %d: match is %v", i, got)
		}
	}
}

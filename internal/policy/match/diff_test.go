package match_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
	"github.com/procession-dev/procession/internal/policy/match/matchtest"
)

var (
	pairs = flag.Int("pairs", 10_000, "pairs of a rule and an event to hold the matcher against CEL")
	seed  = flag.Uint64("seed", 1, "seed of what is random")
)

func newScope(t testing.TB) (*celenv.Env, *celenv.Scope) {
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
	return env, s
}

func allKinds() event.Kinds { return event.KindSet(event.AllKinds()...) }

func all(n int) match.Bits {
	b := match.NewBits(n)
	for i := range n {
		b.Set(i)
	}
	return b
}

// rulesOf compiles conditions; what does not compile is left out and counted.
func rulesOf(t testing.TB, s *celenv.Scope, sources []string) (rules []match.Rule, refused int) {
	t.Helper()
	for _, src := range sources {
		x, err := s.Condition(src)
		if err != nil {
			refused++
			continue
		}
		rules = append(rules, match.Rule{Condition: x, Exceptions: []*celenv.Expr{x}, Kinds: allKinds()})
	}
	return rules, refused
}

// compare holds a matcher of rules against CEL for an event, and gives the
// number of pairs of each truth value.
func compare(t testing.TB, m *match.Matcher, rules []match.Rule, a *celenv.Activation, ev *event.Event, active match.Bits) (counts [4]int) {
	t.Helper()
	a.Reset(ev)
	got := map[int]match.Verdict{}
	last := -1
	for _, h := range m.Evaluate(a, active) {
		if h.Rule <= last {
			t.Fatalf("rule %d comes after rule %d", h.Rule, last)
		}
		got[h.Rule], last = h.Verdict, h.Rule
	}
	for i, r := range rules {
		if !active.Has(i) {
			if v, ok := got[i]; ok {
				t.Fatalf("rule %d is not active, and is %v", i, v)
			}
			continue
		}
		want, _ := r.Condition.Truth(a)
		counts[want]++
		if v := got[i]; v.Truth != want || (v.Truth == celenv.Failed) != (v.Err != nil) {
			t.Errorf("%s\n is %v (%v), CEL says %v, for %s", r.Condition.Source(), v.Truth, v.Err, want, describe(ev))
		}
		if v := match.Decide(a, r.Condition); v.Truth != want || (v.Truth == celenv.Failed) != (v.Err != nil) {
			t.Errorf("%s\n on its own is %v (%v), CEL says %v, for %s", r.Condition.Source(), v.Truth, v.Err, want, describe(ev))
		}
		if len(r.Exceptions) > 0 {
			if v := m.Exception(i, 0); v.Truth != want {
				t.Errorf("%s\n as an exception is %v (%v), CEL says %v, for %s", r.Condition.Source(), v.Truth, v.Err, want, describe(ev))
			}
		}
	}
	return counts
}

func describe(ev *event.Event) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v", ev.Kind)
	for p := ev.Process; p != nil; p = p.Parent {
		fmt.Fprintf(&b, "\n  exe %.80q name %.80q argv %.80q cwd %.80q ids %v sources %v", p.Exe, p.Name, p.Cmdline, p.Cwd, p.IDs, p.Sources)
	}
	return b.String()
}

// The matcher says what CEL says: of conditions nobody would write, about
// events of which half is missing.
func TestAgreesWithCEL(t *testing.T) {
	r := rand.New(rand.NewPCG(*seed, 7))
	var counts [4]int
	done, refused := 0, 0
	for done < *pairs && !t.Failed() {
		env, s := newScope(t)
		var sources []string
		for range 200 {
			sources = append(sources, matchtest.Condition(r, 1+r.IntN(4)))
		}
		rules, no := rulesOf(t, s, sources)
		refused += no
		m, err := match.New(env, rules)
		if err != nil {
			t.Fatal(err)
		}
		a := env.NewActivation("n1")
		for range 50 {
			active := all(len(rules))
			for range r.IntN(20) {
				active.Clear(r.IntN(len(rules)))
			}
			for v, n := range compare(t, m, rules, a, matchtest.Random(r), active) {
				counts[v] += n
				done += n
			}
		}
	}
	t.Logf("%d pairs: %d false, %d true, %d undecided, %d failed; %d conditions did not compile", done, counts[0], counts[1], counts[2], counts[3], refused)
	for v, n := range counts {
		if n < done/200 {
			t.Errorf("only %d of %d pairs are %v: the test does not test that", n, done, celenv.Truth(v))
		}
	}
}

// The same for conditions as they are written, and as many grown from them.
func TestWrittenRulesAgreeWithCEL(t *testing.T) {
	agreeOnRules(t, matchtest.Grow(matchtest.Written(), min(300, *pairs/60), *seed))
}

// The same for the corpus of published rules, which is not part of the
// repository.
func TestCorpusAgreesWithCEL(t *testing.T) {
	rules, err := matchtest.Sigma(filepath.Join(corpus(t), "sigma-linux"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d published rules", len(rules))
	if len(rules) < 50 {
		t.Fatalf("only %d rules were converted", len(rules))
	}
	agreeOnRules(t, matchtest.Grow(rules, min(2*len(rules), max(len(rules), *pairs/60)), *seed))
}

func corpus(t testing.TB) string {
	t.Helper()
	root := os.Getenv("PROCESSION_CORPUS")
	if root == "" {
		root = "../../../../shared/corpus"
	}
	if _, err := os.Stat(root); err != nil {
		t.Skipf("no corpus of published rules: %v (PROCESSION_CORPUS names its folder)", err)
	}
	return root
}

func agreeOnRules(t *testing.T, sources []string) {
	t.Helper()
	env, s := newScope(t)
	rules, refused := rulesOf(t, s, sources)
	long := 0 // with a thousand values, for which there are lists
	for _, src := range sources {
		if len(src) > 16<<10 {
			long++
		}
	}
	if refused > long {
		t.Fatalf("%d of %d conditions do not compile, %d of them are too long", refused, len(sources), long)
	}
	m, err := match.New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(*seed, 9))
	a := env.NewActivation("n1")
	var counts [4]int
	done := 0
	for i := 0; done < *pairs/2 && !t.Failed(); i++ {
		ev := matchtest.Random(r)
		if i%2 == 0 {
			ev = matchtest.Provoking(r, sources)
		}
		for v, n := range compare(t, m, rules, a, ev, all(len(rules))) {
			counts[v] += n
			done += n
		}
	}
	t.Logf("%d pairs: %d false, %d true, %d undecided, %d failed", done, counts[0], counts[1], counts[2], counts[3])
	if counts[celenv.True] < done/2000 || counts[celenv.Undecided] == 0 {
		t.Errorf("%d of %d pairs are true, %d undecided: the test does not test that", counts[celenv.True], done, counts[celenv.Undecided])
	}
}

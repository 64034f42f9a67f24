package match_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
	"github.com/procession-dev/procession/internal/policy/match/matchtest"
)

// What is meant to take long is refused, or evaluated like anything else: as
// CEL says and within a time that nobody notices.
func TestHardCases(t *testing.T) {
	chain := func(n int, op, term string) string {
		return strings.TrimSuffix(strings.Repeat(term+op, n), op)
	}
	for _, tt := range []struct{ name, src, refused string }{
		{"1 MiB", chain(1<<16, " || ", "process.pid == 1"), "bytes; at most"},
		{"deep parentheses", strings.Repeat("(", 5000) + "true" + strings.Repeat(")", 5000), "recursion"},
		{"deep negation", strings.Repeat("!(", 5000) + "true" + strings.Repeat(")", 5000), "recursion"},
		{"deep choices", strings.Repeat("(true ? ", 1500) + "true" + strings.Repeat(" : false)", 1500), "bytes; at most"},
		{"loops in loops", "process.args.exists(a, process.args.exists(b, process.args.exists(c, a == b)))", "nesting"},
		{"a big regular expression", "process.cmdline.matches('(((a{100}){100}){100}){100}')", "regular expression"},
		{"a wide regular expression", "process.cmdline.matches('" + strings.Repeat("(a|b|c)?", 1500) + "')", "regex program size"},
		{"thousand terms", chain(700, " || ", "process.pid == 1"), ""},
		{"as deep as may be", strings.Repeat("!(", 40) + "process.exe == ''" + strings.Repeat(")", 40), ""},
		{"a catastrophic regular expression", "process.cmdline.matches('(a*)*b') || process.cmdline.matches('(x+x+)+y') || process.cmdline.matches('(a|a?)+$')", ""},
		{"a regular expression with many ways", "process.cmdline.matches('(.*)(.*)(.*)(.*)(.*)[^a]x$')", ""},
		{"loops over long lists", "process.args.exists(a, a in lists.servers && a.contains('x') || a.matches('^(a|b|ab)*c$'))", ""},
	} {
		env, s := newScope(t)
		x, err := s.Condition(tt.src)
		switch {
		case tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused) && !strings.Contains(err.Error(), "matches")):
			t.Errorf("%s: error %v, want one about %q", tt.name, err, tt.refused)
		case tt.refused == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		}
		if err != nil {
			continue
		}
		rules := []match.Rule{{Condition: x, Exceptions: []*celenv.Expr{x}, Kinds: allKinds()}}
		m, err := match.New(env, rules)
		if err != nil {
			t.Fatal(err)
		}
		a := env.NewActivation("n")
		for _, text := range []string{"a", "xx", "ab\x00", "\xff", "/app/lib/x.jar:", "aX\x00y"} {
			start := time.Now()
			compare(t, m, rules, a, matchtest.Hostile(text, 128<<10), all(1))
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%s: %q takes %v", tt.name, text, took)
			}
		}
	}
}

// Variables that double with each line must not become formulas that do.
func TestVariablesDoNotMultiply(t *testing.T) {
	env, err := celenv.New()
	if err != nil {
		t.Fatal(err)
	}
	s, err := env.NewScope(nil)
	if err != nil {
		t.Fatal(err)
	}
	last := "process.name == 'x'"
	for i := range 60 {
		name := fmt.Sprintf("v%d", i)
		if err := s.AddVariable(name, last+" && process.uid >= 0 || "+last); err != nil {
			t.Fatal(err)
		}
		last = "variables." + name
	}
	x, err := s.Condition(last + " || !" + last + " && process.name == 'y'")
	if err != nil {
		t.Fatal(err)
	}
	rules := []match.Rule{{Condition: x, Kinds: allKinds()}}
	m, err := match.New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	a := env.NewActivation("n")
	ev := matchtest.Everyday(1, 1)[0]
	for _, name := range []string{"x", "y", "z"} {
		ev.Process.Name = name
		a.Reset(ev)
		got := len(m.Evaluate(a, all(1))) == 1
		if got != (name != "z") {
			t.Errorf("%s: match is %v", name, got)
		}
		if v := match.Decide(a, x); (v.Truth == celenv.True) != got {
			t.Errorf("%s: match is %v, on its own it is %v", name, got, v.Truth)
		}
	}
	if n := len(m.Explain(a, 0, 100)); n == 0 || n > 256 {
		t.Errorf("the explanation has %d terms", n)
	}
	m.Rule(0)
}

// Ten thousand rules are decided as each of them alone.
func TestTenThousandRules(t *testing.T) {
	env, s := newScope(t)
	few, _ := rulesOf(t, s, matchtest.Written())
	rules := make([]match.Rule, 10_000/len(few)*len(few)) // each as often as the others
	for i := range rules {
		rules[i] = few[i%len(few)]
	}
	m, err := match.New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	small, err := match.New(env, few)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	a := env.NewActivation("n")
	hits := 0
	for range 20 {
		ev := matchtest.Provoking(r, matchtest.Written())
		a.Reset(ev)
		want := append([]match.Hit(nil), small.Evaluate(a, all(len(few)))...)
		got := m.Evaluate(a, all(len(rules)))
		if len(got) != len(want)*(len(rules)/len(few)) {
			t.Fatalf("%d rules are not false, want %d times %d", len(got), len(want), len(rules)/len(few))
		}
		for i, h := range got {
			if w := want[i%len(want)]; h.Rule != i/len(want)*len(few)+w.Rule || h.Truth != w.Truth {
				t.Fatalf("hit %d is %+v, want %+v", i, h, w)
			}
		}
		hits += len(got)
	}
	if hits == 0 {
		t.Error("no rule matched at all")
	}
}

// An activation may be held on to with any event, also one whose process is
// missing everything.
func TestNothingKnown(t *testing.T) {
	env, s := newScope(t)
	rules, _ := rulesOf(t, s, matchtest.Written())
	m, err := match.New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	a := env.NewActivation("")
	for _, k := range event.AllKinds() {
		compare(t, m, rules, a, &event.Event{Kind: k, Process: &event.Process{}, Synthetic: true}, all(len(rules)))
	}
}

package match_test

import (
	"fmt"
	"testing"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
	"github.com/procession-dev/procession/internal/policy/match/matchtest"
)

func matcher(t testing.TB, n int) (*match.Matcher, *celenv.Env, []match.Rule) {
	t.Helper()
	env, s := newScope(t)
	rules, refused := rulesOf(t, s, matchtest.Grow(matchtest.Written(), n, 7))
	if refused > 0 {
		t.Fatalf("%d conditions do not compile", refused)
	}
	m, err := match.New(env, rules)
	if err != nil {
		t.Fatal(err)
	}
	return m, env, rules
}

// What one event costs the matcher alone; see internal/policy for the whole.
func BenchmarkMatcher(b *testing.B) {
	events := matchtest.Everyday(2000, 4)
	for _, n := range []int{10, 100, 1000, 3000, 10000} {
		b.Run(fmt.Sprintf("everyday/rules=%d", n), func(b *testing.B) {
			m, env, _ := matcher(b, n)
			bench(b, m, env, all(n), events)
		})
	}
	for name, text := range map[string]string{
		"paths":    "/app/lib/dependency-12.jar:",
		"literals": "curl wget|sh nc -e /dev/tcp/ base64 -d iptables -F -exec /bin/sh ",
		"argv":     "-e\x00",
		"invalid":  "\xff\x00",
	} {
		b.Run("hostile-"+name+"/rules=1000", func(b *testing.B) {
			m, env, _ := matcher(b, 1000)
			bench(b, m, env, all(1000), []*event.Event{matchtest.Hostile(text, 128<<10)})
		})
	}
}

func bench(b *testing.B, m *match.Matcher, env *celenv.Env, active match.Bits, events []*event.Event) {
	a := env.NewActivation("n1")
	b.ReportAllocs()
	i, hits := 0, 0
	for b.Loop() {
		a.Reset(events[i%len(events)])
		hits += len(m.Evaluate(a, active))
		i++
	}
	b.ReportMetric(float64(hits)/float64(i), "hits/op")
}

func BenchmarkNew(b *testing.B) {
	env, s := newScope(b)
	sources := matchtest.Grow(matchtest.Written(), 3000, 7)
	for b.Loop() {
		rules, _ := rulesOf(b, s, sources)
		if _, err := match.New(env, rules); err != nil {
			b.Fatal(err)
		}
	}
}

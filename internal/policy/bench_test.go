package policy_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/policytest"
)

func everyday(t testing.TB) []*event.Event {
	t.Helper()
	events, err := policytest.Events(os.DirFS(packDir), "tests/everyday.test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// What one event costs with the starter pack: everyday events, and argument
// lists that are long on purpose.
func BenchmarkEvaluate(b *testing.B) {
	c := newCompiler(b)
	set := loadPack(b, c)
	engine := policy.NewEngine(c, policy.Config{Node: "n"})
	engine.Swap(set)
	all := everyday(b)
	kinds := map[string][]*event.Event{"everyday": all}
	for _, ev := range all {
		kinds[ev.Kind.String()] = append(kinds[ev.Kind.String()], ev)
	}
	long := func(cmdline string) []*event.Event {
		ev := *all[0]
		p := *ev.Process
		p.Name, p.Exe, p.Cmdline, p.CmdlineLen = "bash", "/usr/bin/bash", cmdline, uint32(len(cmdline))
		ev.Process = &p
		return []*event.Event{&ev}
	}
	kinds["bash-128KiB-one-argument"] = long("bash\x00-c\x00" + strings.Repeat("curl /usr/share/doc ", 6554) + "\x00")
	kinds["bash-128KiB-of-arguments"] = long("bash\x00" + strings.Repeat("-e\x00", 43690))
	kinds["bash-128KiB-against-the-patterns"] = long("bash\x00-c\x00" + strings.Repeat("sh curl |$( ", 10923) + "\x00")
	for _, name := range []string{"everyday", "Exec", "UIDChange", "Fork", "bash-128KiB-one-argument", "bash-128KiB-of-arguments",
		"bash-128KiB-against-the-patterns"} {
		events := kinds[name]
		b.Run(fmt.Sprintf("%s/rules=%d", name, len(set.Rules())), func(b *testing.B) {
			b.ReportAllocs()
			start := processorTime(b)
			n := 0
			for b.Loop() {
				engine.Evaluate(events[n%len(events)], func(*policy.Match) {})
				n++
			}
			b.ReportMetric(float64(processorTime(b)-start)/float64(n), "cpu-ns/op")
		})
	}
}

// processorTime is what this process has used: on a machine that others use
// as well it says more than the wall clock.
func processorTime(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// A kind that no rule looks at must cost nothing.
func TestUnwatchedKindAllocatesNothing(t *testing.T) {
	c := newCompiler(t)
	engine := policy.NewEngine(c, policy.Config{})
	engine.Swap(loadPack(t, c))
	for _, ev := range everyday(t) {
		if engine.Set().Kinds().Has(ev.Kind) {
			continue
		}
		emit := func(*policy.Match) { t.Errorf("a match for %v", ev.Kind) }
		if n := testing.AllocsPerRun(100, func() { engine.Evaluate(ev, emit) }); n != 0 {
			t.Errorf("%v: %v allocations", ev.Kind, n)
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	c := newCompiler(b)
	data, err := os.ReadFile(packDir + "/remote-shells.yaml")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		objects, err := policy.Parse("f", data)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Compile(objects[0]); err != nil {
			b.Fatal(err)
		}
	}
}

package policy_test

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match/matchtest"
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

const perPolicy = 30

// grownPolicies are n rules as an author writes them: those of matchtest and
// others grown from them, perPolicy to a policy.
func grownPolicies(tb testing.TB, n int) (texts [][]byte) {
	tb.Helper()
	var lists []v1alpha1.List
	for name, values := range matchtest.Lists {
		lists = append(lists, v1alpha1.List{Name: name, Values: values})
	}
	var variables []v1alpha1.Variable
	for _, v := range matchtest.Variables {
		variables = append(variables, v1alpha1.Variable{Name: v[0], Expression: v[1]})
	}
	conditions := matchtest.Grow(matchtest.Written(), n, 7)
	for i := 0; i < n; i += perPolicy {
		o := v1alpha1.ClusterDetectionPolicy{
			TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: v1alpha1.KindClusterDetectionPolicy},
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("grown-%d", i)},
		}
		o.Spec.Lists, o.Spec.Variables = lists, variables
		for j, src := range conditions[i:min(i+perPolicy, n)] {
			o.Spec.Rules = append(o.Spec.Rules, v1alpha1.Rule{Name: fmt.Sprintf("r%d", j), Events: []v1alpha1.EventKind{"Exec"},
				Severity: v1alpha1.SeverityHigh, Condition: src, MessageExpression: "process.name + ' runs ' + process.cmdline"})
		}
		text, err := yaml.Marshal(o)
		if err != nil {
			tb.Fatal(err)
		}
		texts = append(texts, text)
	}
	return texts
}

func compileAll(tb testing.TB, c *policy.Compiler, texts [][]byte) *policy.Set {
	tb.Helper()
	var policies []*policy.Policy
	for _, text := range texts {
		objects, err := policy.Parse("grown.yaml", text)
		if err != nil {
			tb.Fatal(err)
		}
		p, err := c.Compile(objects[0])
		if err != nil {
			tb.Fatal(err)
		}
		policies = append(policies, p)
	}
	set, err := policy.NewSet(policies...)
	if err != nil {
		tb.Fatal(err)
	}
	return set
}

func grownSet(tb testing.TB, c *policy.Compiler, n int) *policy.Set {
	tb.Helper()
	return compileAll(tb, c, grownPolicies(tb, n))
}

func newEngine(tb testing.TB, c *policy.Compiler, set *policy.Set) *policy.Engine {
	tb.Helper()
	e := policy.NewEngine(c, policy.Config{Node: "n"})
	if err := e.Swap(set); err != nil {
		tb.Fatal(err)
	}
	return e
}

// What one event costs: the engine, and for comparison CEL rule by rule, as
// rules grow in number; events meant to take long; the starter pack. The
// figures in docs/engine.md come from here.
func BenchmarkEvaluate(b *testing.B) {
	everydayLife := matchtest.Everyday(2000, 4)
	for _, n := range []int{10, 100, 1000, 3000} {
		b.Run(fmt.Sprintf("engine/rules=%d", n), func(b *testing.B) {
			c := newCompiler(b)
			engine := newEngine(b, c, grownSet(b, c, n))
			benchmark(b, everydayLife, func(ev *event.Event) { engine.Evaluate(ev, func(*policy.Match) {}) })
		})
	}
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("celgo/rules=%d", n), func(b *testing.B) {
			rules, a := celRules(b, n)
			a.Reset(everydayLife[0])
			for _, x := range rules {
				x.Truth(a) // plans it
			}
			benchmark(b, everydayLife, func(ev *event.Event) {
				a.Reset(ev)
				for _, x := range rules {
					x.Truth(a)
				}
			})
		})
	}
	for name, text := range map[string]string{
		"paths":    "/app/lib/dependency-12.jar:",
		"argv":     "-e\x00",
		"literals": "curl wget|sh nc -e /dev/tcp/ base64 -d iptables -F -exec /bin/sh ",
		"regexps":  "wget curl iptables nft socket | x ",
		"invalid":  "\xff\x00",
	} {
		b.Run("hostile-128KiB-"+name+"/rules=1000", func(b *testing.B) {
			c := newCompiler(b)
			engine := newEngine(b, c, grownSet(b, c, 1000))
			benchmark(b, []*event.Event{matchtest.Hostile(text, 128<<10)}, func(ev *event.Event) { engine.Evaluate(ev, func(*policy.Match) {}) })
		})
	}
	benchmarkPack(b)
}

// celRules are the conditions of grownSet, one after the other as CEL has
// them.
func celRules(b *testing.B, n int) ([]*celenv.Expr, *celenv.Activation) {
	env, err := celenv.New()
	if err != nil {
		b.Fatal(err)
	}
	var rules []*celenv.Expr
	var s *celenv.Scope
	for i, src := range matchtest.Grow(matchtest.Written(), n, 7) {
		if i%perPolicy == 0 {
			if s, err = env.NewScope(matchtest.Lists); err != nil {
				b.Fatal(err)
			}
			for _, v := range matchtest.Variables {
				if err := s.AddVariable(v[0], v[1]); err != nil {
					b.Fatal(err)
				}
			}
		}
		x, err := s.Condition(src)
		if err != nil {
			b.Fatal(err)
		}
		rules = append(rules, x)
	}
	return rules, env.NewActivation("n")
}

func benchmark(b *testing.B, events []*event.Event, judge func(*event.Event)) {
	for start, i := time.Now(), 0; i < len(events) && time.Since(start) < time.Second; i++ {
		judge(events[i]) // regular expressions learn
	}
	b.ReportAllocs()
	start := processorTime(b)
	n := 0
	for b.Loop() {
		judge(events[n%len(events)])
		n++
	}
	b.ReportMetric(float64(processorTime(b)-start)/float64(n), "cpu-ns/op")
}

// benchmarkPack is about everyday events and the starter pack, and argument
// lists that are long on purpose.
func benchmarkPack(b *testing.B) {
	c := newCompiler(b)
	set := loadPack(b, c)
	engine := newEngine(b, c, set)
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
		b.Run(fmt.Sprintf("pack-%s/rules=%d", name, len(set.Rules())), func(b *testing.B) {
			benchmark(b, kinds[name], func(ev *event.Event) { engine.Evaluate(ev, func(*policy.Match) {}) })
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

// What it takes to put thousands of rules in force: processor time from YAML
// to the set that is evaluated, and the memory that is kept.
func BenchmarkCompileRules(b *testing.B) {
	for _, n := range []int{1000, 3000} {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			texts := grownPolicies(b, n)
			var used int64
			var kept uint64
			i := 0
			for b.Loop() {
				start := processorTime(b)
				kept = rulesInForce(b, texts, func() { used += processorTime(b) - start })
				i++
			}
			b.ReportMetric(float64(used)/float64(i)/1e9, "cpu-s/op")
			b.ReportMetric(float64(kept)/(1<<20), "MiB")
		})
	}
}

// rulesInForce puts rules in force, calls done, evaluates some events and
// gives the bytes that are kept.
func rulesInForce(tb testing.TB, texts [][]byte, done func()) uint64 {
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	c := newCompiler(tb)
	engine := newEngine(tb, c, compileAll(tb, c, texts))
	done()
	for _, ev := range matchtest.Everyday(200, 4) {
		engine.Evaluate(ev, func(*policy.Match) {})
	}
	kept := heap() - before
	runtime.KeepAlive(engine)
	return kept
}

// Rules take the memory that docs/engine.md names: less than 40 MiB for three
// thousand.
func TestRulesFitInMemory(t *testing.T) {
	const n = 600
	kept := rulesInForce(t, grownPolicies(t, n), func() {})
	t.Logf("%d rules: %.1f MiB", n, float64(kept)/(1<<20))
	if limit := uint64(40<<20) * n / 3000; kept >= limit {
		t.Errorf("%d rules take %d bytes; less than %d are promised", n, kept, limit)
	}
}

package policy

import (
	"bytes"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

// tenant is a policy of a namespace with one rule that matches what it sees.
func tenant(namespace, more string) string {
	return strings.Replace(withTenantRule("      condition: \"true\"\n"+more), "namespace: shop", "namespace: "+namespace, 1)
}

// line makes a lineage of processes that run in these workloads, the oldest
// first, and an exec of the last.
func line(ws ...*event.Workload) *event.Event {
	var p *event.Process
	for i, w := range ws {
		q := execOf(7).Process
		q.PID, q.PPID, q.Parent, q.Workload = int32(100+i), int32(99+i), p, w
		q.Name, q.Cmdline = fmt.Sprintf("n%d", i), fmt.Sprintf("n%d\x00--token=secret\x00", i)
		p = q
	}
	return &event.Event{Kind: event.Exec, Process: p, Time: noon}
}

// What a policy of a namespace must not say is refused when it is compiled.
func TestTenantsAreRefused(t *testing.T) {
	for _, tt := range []struct{ name, old, new, want string }{
		{"the node's name", `"true"`, "node.name == 'a'", "policy shop/p: rule r: spec.rules[0].condition: 1:1: node.name is not known to a policy in a namespace"},
		{"by way of a variable", "spec:\n", "spec:\n  variables: [{name: v, expression: node.name}]\n", "spec.variables[0].expression: 1:1: node.name is not known"},
		{"in a message", `"true"`, "\"true\"\n      messageExpression: node.name", "spec.rules[0].messageExpression: 1:1: node.name is not known"},
		{"in an exception", `"true"`, "\"true\"\n      exceptions: [{name: x, condition: node.name == 'a', reason: because it is}]", "spec.rules[0].exceptions[0].condition: 1:1: node.name is not known"},
		{"in a key", `"true"`, "\"true\"\n      aggregate: {window: 1m, by: [node.name]}", "spec.rules[0].aggregate.by[0]: 1:1: node.name is not known"},
		{"the node's labels", `"true"`, "node.labels['a'] == 'b'", "spec.rules[0].condition"},
		{"the environment", `"true"`, "process.env['TOKEN'] != ''", "spec.rules[0].condition"},
		{"hosts", "spec:\n", "spec:\n  scope: {targets: [Host]}\n", "spec.scope.targets: is not known"},
		{"other namespaces", "spec:\n", "spec:\n  scope: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: bank}}}\n", "spec.scope.namespaceSelector: is not known"},
		{"nodes", "spec:\n", "spec:\n  scope: {nodeSelector: {}}\n", "spec.scope.nodeSelector: is not known"},
		{"no namespace", ", namespace: shop", "", "metadata.namespace: is missing"},
		{"a namespace like a path", "namespace: shop", "namespace: ../bank", "metadata.namespace: is \"../bank\""},
		{"exceptions from elsewhere", "spec:\n", "spec:\n  namespacedExceptions: Accept\n", "spec.namespacedExceptions: is not supported yet"},
	} {
		text := strings.Replace(tenant("shop", ""), tt.old, tt.new, 1)
		if text == tenant("shop", "") {
			t.Fatalf("%s: nothing was changed", tt.name)
		}
		if err := compileText("f", text); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s:\n got %v\nwant %s", tt.name, err, tt.want)
		}
	}
}

// A rule that is always true and alerts when it is unsure: what it sees is
// its own namespace's pods.
func TestTenantSeesItsNamespaceOnly(t *testing.T) {
	c := mustCompiler(t)
	for _, tt := range []struct {
		name string
		w    *event.Workload
		want string
	}{
		{"its own", inPod("shop", "web", nil), "match"},
		{"another namespace", inPod("bank", "web", nil), "unseen"},
		{"a namespace that begins alike", inPod("shop2", "web", nil), "unseen"},
		{"the host", &event.Workload{Place: event.PlaceHost}, "unseen"},
		{"a container in no pod", &event.Workload{Place: event.PlaceContainer, ContainerID: "c"}, "unseen"},
		{"a pod that is not known", &event.Workload{Place: event.PlaceContainer, ContainerID: "c", PodUID: "u"}, "undecided"},
		{"a place that is not known", &event.Workload{}, "undecided"},
		{"nothing is known", nil, "undecided"},
	} {
		e := NewEngine(c, Config{Node: "n", Budget: Untimed()})
		if err := e.Swap(mustSet(t, c, tenant("shop", "      onUndecided: Alert\n"))); err != nil {
			t.Fatal(err)
		}
		got := "unseen"
		open := e.Evaluate(line(tt.w), func(*Match) { got = "match" })
		s := e.Stats()[0]
		if s.Undecided > 0 {
			got += " undecided"
		}
		if got = strings.TrimPrefix(got, "unseen "); got != tt.want || open != (tt.want == "undecided") {
			t.Errorf("%s: %s, want %s; open %v", tt.name, got, tt.want, open)
		}
		checkSums(t, e)
	}
}

// An alert of a namespace's rule tells nothing of processes outside its pods:
// not their names, not their arguments, not their pids.
func TestTenantAlertShowsItsPodOnly(t *testing.T) {
	c := mustCompiler(t)
	e := NewEngine(c, Config{Node: "n", Budget: Untimed()})
	set := mustSet(t, c, tenant("shop", "      messageExpression: \"parent.name + ' ' + grandparent.cmdline\"\n"),
		strings.Replace(withRule("      condition: \"true\"\n"), "[Exec]", "[Exec, PtraceAttach]", 1),
		strings.Replace(strings.Replace(tenant("shop", ""), "[Exec]", "[PtraceAttach]", 1), "{name: p,", "{name: traced,", 1))
	if err := e.Swap(set); err != nil {
		t.Fatal(err)
	}
	host, shop, bank := &event.Workload{Place: event.PlaceHost}, inPod("shop", "web", nil), inPod("bank", "db", nil)
	chain := func(p *event.Process) string {
		out := fmt.Sprintf("ppid %d %v", p.PPID, p.Has(event.FieldParent))
		for p = p.Parent; p != nil; p = p.Parent {
			out += fmt.Sprintf(" %s ppid %d %v", p.Name, p.PPID, p.Has(event.FieldParent))
		}
		return out
	}
	for _, tt := range []struct {
		name            string
		ev              *event.Event
		cluster, tenant string
		message         string
	}{
		{"first process", line(host, host, shop), "ppid 101 true n1 ppid 100 true n0 ppid 99 true", "ppid 0 true", "? ?"},
		{"child", line(host, shop, shop), "ppid 101 true n1 ppid 100 true n0 ppid 99 true", "ppid 101 true n1 ppid 0 true", "n1 ?"},
		{"grandchild", line(shop, shop, shop), "ppid 101 true n1 ppid 100 true n0 ppid 99 true", "ppid 101 true n1 ppid 100 true n0 ppid 0 false", "n1 n0 --token=secret"},
		{"out of another pod", line(bank, bank, shop), "ppid 101 true n1 ppid 100 true n0 ppid 99 true", "ppid 0 true", "? ?"},
		{"unknown parent", line(shop, nil, shop), "ppid 101 true n1 ppid 100 true n0 ppid 99 true", "ppid 0 false", "? n0 --token=secret"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := map[string]string{}
			e.Evaluate(tt.ev, func(m *Match) {
				got[m.Rule.Namespace] = chain(m.Event.Process)
				if m.Rule.Namespace != "" && m.Message != tt.message {
					t.Errorf("message %q, want %q", m.Message, tt.message)
				}
			})
			if d := cmp.Diff(map[string]string{"": tt.cluster, "shop": tt.tenant}, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if chain(tt.ev.Process) != tt.cluster {
				t.Error("the event itself was changed")
			}
		})
	}
	for name, target := range map[string]struct {
		w    *event.Workload
		seen bool
	}{"its own": {shop, true}, "another namespace's": {bank, false}, "the host's": {host, false}, "nobody knows whose": {nil, false}} {
		ev := line(shop)
		ev.Kind, ev.Target = event.PtraceAttach, line(host, target.w).Process
		n := 0
		e.Evaluate(ev, func(m *Match) {
			if n++; m.Rule.Namespace == "" {
				return
			}
			if x := m.Event.Target; (x != nil) != target.seen || x != nil && (x.Parent != nil || x.PPID != 0) {
				t.Errorf("%s: target %+v", name, x)
			}
		})
		if n != 2 || ev.Target == nil {
			t.Errorf("%s: %d alerts", name, n)
		}
	}
}

// Whatever policies of namespaces say, the cluster's rules and those of other
// namespaces do as they did without them.
func TestTenantsTouchNobodyElse(t *testing.T) {
	cluster := aggregating(", by: [process.cwd]") + "    - {name: t, events: [Exec], severity: Low, condition: process.uid == 7, threshold: {count: 3, window: 1h}}\n"
	bank := tenant("bank", "")
	hostile := []string{
		// The same names, switched off, excepted, held back and limited.
		strings.Replace(tenant("shop", "      mode: Disabled\n"), "spec:\n", "spec:\n  mode: Disabled\n", 1),
		strings.Replace(tenant("shop", `      exceptions: [{name: all, condition: "true", reason: because we can}]
      threshold: {count: 1000, window: 24h}
    - {name: t, events: [Exec], severity: Low, condition: "true", aggregate: {window: 24h, by: [process.pid]}}
    - {name: slow, events: [Exec], severity: Low, condition: "process.args.exists(a, a.matches('(a|b|ab)*c')) || ancestors.exists(a, a.args.size() > 10000)"}
    - {name: failing, events: [Exec], severity: Low, condition: "process.args[99] == ''"}
`), "spec:\n", "spec:\n  rateLimit: {alerts: 1, window: 24h}\n", 1),
	}
	hostile[1] = strings.Replace(hostile[1], "{name: p,", "{name: q,", 1)
	run := func(texts ...string) string {
		// Not the processor's clock: a slow machine would use a budget up.
		s := newScene(t, Config{clock: func() time.Duration { return 0 }}, texts...)
		var out []string
		shop, theirs := inPod("shop", "web", nil), inPod("bank", "db", nil)
		for i := range int32(1000) {
			for j, w := range []*event.Workload{shop, theirs, {Place: event.PlaceHost}} {
				s.at(time.Duration(i)*time.Second, i*3+int32(j)+1, func(p *event.Process) {
					p.Workload, p.Cwd = w, fmt.Sprint("/", i%7)
					p.Parent.Workload = w
				})
			}
		}
		s.e.Flush(s.emit)
		for i, m := range s.all {
			if m.Rule.Namespace != "shop" { // but for the number of the first, which counts all alerts
				out = append(out, m.Rule.ID+" "+regexp.MustCompile(` first \d+`).ReplaceAllString(s.lines[i], ""))
			}
		}
		for _, x := range s.e.Stats() {
			if x.Rule.Namespace != "shop" {
				out = append(out, fmt.Sprint(x.Rule.ID, x.Seen, x.Evaluated, x.Matched, x.Alerts, x.BelowThreshold, x.Aggregated, x.Summaries, x.RateLimited, x.OverBudget))
			}
		}
		checkSums(t, s.e)
		return strings.Join(out, "\n")
	}
	if d := cmp.Diff(run(cluster, bank), run(append(hostile, cluster, bank)...)); d != "" {
		t.Errorf("-without +with:\n%s", d)
	}
}

// Policies beyond a namespace's budget are left out: the last ones by name,
// and only those.
func TestBudgetOfRules(t *testing.T) {
	named := func(namespace, name, more string) string {
		return strings.Replace(tenant(namespace, more), "{name: p,", "{name: "+name+",", 1)
	}
	second := "    - {name: second, events: [Exec], severity: Low, condition: \"true\"}\n"
	var log bytes.Buffer
	s := newScene(t, Config{Budget: Budget{Rules: 3}, Log: slog.New(slog.NewTextHandler(&log, nil))},
		named("shop", "a", second), named("shop", "b", second), named("shop", "c", ""), named("bank", "a", second), withRule("      condition: \"true\"\n"+second+second[:0]))
	got := s.e.Namespaces()
	for i := range got {
		got[i].Time = 0
	}
	want := []Namespace{
		{Name: "bank", Rules: 2, Atoms: got[0].Atoms, Opaque: got[0].Opaque},
		{Name: "shop", Rules: 2, Atoms: got[1].Atoms, Opaque: got[1].Opaque, OverBudget: []OverBudget{
			{"b", "with it the namespace has 4 rules; its budget on this node is 3"},
			{"c", "it comes after b, for which there was no room"}}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	s.at(0, 1, func(p *event.Process) { p.Workload = inPod("shop", "web", nil) })
	s.at(0, 2, func(p *event.Process) { p.Workload = inPod("bank", "web", nil) })
	states := map[string]string{}
	for _, x := range s.e.Stats() {
		states[x.Rule.ID] = fmt.Sprintf("%s %d", x.State, x.Alerts)
	}
	if d := cmp.Diff(map[string]string{
		"ClusterDetectionPolicy//p/r": "Active 2", "ClusterDetectionPolicy//p/second": "Active 2",
		"DetectionPolicy/bank/a/r": "Active 1", "DetectionPolicy/bank/a/second": "Active 1",
		"DetectionPolicy/shop/a/r": "Active 1", "DetectionPolicy/shop/a/second": "Active 1",
		"DetectionPolicy/shop/b/r": "OverBudget 0", "DetectionPolicy/shop/b/second": "OverBudget 0",
		"DetectionPolicy/shop/c/r": "OverBudget 0",
	}, states); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if !strings.Contains(log.String(), "policy=shop/b") || strings.Contains(log.String(), "policy=shop/a") {
		t.Errorf("log:\n%s", &log)
	}
	// With room again they are in force.
	if err := s.e.Swap(mustSet(t, s.c, named("shop", "b", second))); err != nil {
		t.Fatal(err)
	}
	if x := s.e.Namespaces(); len(x) != 1 || len(x[0].OverBudget) != 0 || s.e.Stats()[0].State != "Active" {
		t.Errorf("%+v", x)
	}
}

// Texts and terms only CEL decides count as well.
func TestBudgetOfTerms(t *testing.T) {
	var list []string
	for i := range 100 {
		list = append(list, fmt.Sprintf("value-%d", i))
	}
	texts := strings.Replace(tenant("shop", ""), "values: [a]", "values: ["+strings.Join(list, ", ")+"]", 1)
	texts = strings.Replace(texts, `condition: "true"`, "condition: process.cmdline.containsAny(lists.l)", 1)
	opaque := strings.Replace(tenant("bank", ""), `condition: "true"`, "condition: process.args.filter(a, a.startsWith('-')).size() > 3", 1)
	s := newScene(t, Config{Budget: Budget{Atoms: 50, Opaque: 0 + 1}}, texts, opaque)
	var got []string
	for _, n := range s.e.Namespaces() {
		for _, o := range n.OverBudget {
			got = append(got, n.Name+"/"+o.Policy+": "+o.Reason)
		}
	}
	if d := cmp.Diff([]string{"shop/p: with it the namespace has 100 texts to look for; its budget on this node is 50"}, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	twice := strings.Replace(opaque, "size() > 3", "size() > 3 && process.args.filter(a, a.endsWith('-')).size() > 3", 1)
	if err := s.e.Swap(mustSet(t, s.c, twice)); err != nil {
		t.Fatal(err)
	}
	if n := s.e.Namespaces()[0]; len(n.OverBudget) != 1 || n.OverBudget[0].Reason != "with it the namespace has 2 terms only CEL decides; its budget on this node is 1" {
		t.Errorf("%+v", n)
	}
}

// A namespace whose rules take too long is not asked for the rest of the
// second; others are, and what was skipped is counted.
func TestBudgetOfTime(t *testing.T) {
	var clock time.Duration
	cost := 3 * time.Millisecond
	var log bytes.Buffer
	s := newScene(t, Config{Budget: Budget{Time: 10 * time.Millisecond}, Log: slog.New(slog.NewTextHandler(&log, nil)),
		clock: func() time.Duration { clock += cost; return clock }}, // each look at it takes that long
		tenant("shop", ""), tenant("bank", ""), withRule("      condition: \"true\"\n"))
	in := func(namespace string) {
		s.at(0, 1, func(p *event.Process) { p.Workload = inPod(namespace, "web", nil) })
	}
	counts := func() string {
		out := ""
		for _, x := range s.e.Stats() {
			out += fmt.Sprintf("%s/%s %d+%d ", x.Rule.Namespace, x.State, x.Alerts, x.OverBudget)
		}
		return out
	}
	for range 10 {
		in("shop")
	}
	in("bank")
	if got, want := counts(), "/Active 11+0 bank/Active 1+0 shop/OverBudget 4+6 "; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	clock += time.Second
	in("shop")
	if got, want := counts(), "/Active 12+0 bank/Active 1+0 shop/OverBudget 5+6 "; got != want {
		t.Errorf("a second later: got %s, want %s", got, want)
	}
	clock += time.Minute
	if got, want := counts(), "/Active 12+0 bank/Active 1+0 shop/Active 5+6 "; got != want {
		t.Errorf("a minute later: got %s, want %s", got, want)
	}
	n := s.e.Namespaces()
	if n[1].Name != "shop" || n[1].Skipped != 6 || n[1].Time != 5*cost || n[0].Skipped != 0 {
		t.Errorf("%+v", n)
	}
	if got := strings.Count(log.String(), "namespace=shop"); got != 1 {
		t.Errorf("told %d times:\n%s", got, &log)
	}
	checkSums(t, s.e)
}

// What was open when it happened is decided when it is known whose it was.
func TestReconsider(t *testing.T) {
	unlisted := &event.Workload{Place: event.PlaceContainer, ContainerID: "shop-web", PodUID: "u-shop"}
	s := newScene(t, Config{}, tenant("shop", ""), tenant("bank", ""), withRule(`      condition: pod.namespace == 'shop'
    - {name: loud, events: [Exec], severity: Low, condition: pod.namespace == 'shop', onUndecided: Alert}
    - {name: not, events: [Exec], severity: Low, condition: pod.namespace == 'bank'}
    - {name: sure, events: [Exec], severity: Low, condition: process.uid == 7}
    - {name: excepted, events: [Exec], severity: Low, condition: pod.namespace == 'shop', exceptions: [{name: x, condition: process.uid == 7, reason: because it is}]}
    - {name: still, events: [Exec], severity: Low, condition: process.cwd == '/w' && pod.namespace == 'shop'}
`))
	ev := line(unlisted)
	ev.Process.Sources[event.FieldCwd] = event.SourceNone
	if !s.e.Evaluate(ev, s.emit) {
		t.Error("nothing is open")
	}
	s.told("0s loud pid 100", "0s sure pid 100")
	snap := Snapshot(ev)
	snap.Process.Workload = inPod("shop", "web", nil)
	s.e.Reconsider(snap, unlisted, s.emit)
	s.told("0s r pid 100", "0s r pid 100")
	ids := map[string]bool{}
	for _, m := range s.all[2:] {
		ids[m.Rule.ID] = m.Late
	}
	if d := cmp.Diff(map[string]bool{"ClusterDetectionPolicy//p/r": true, "DetectionPolicy/shop/p/r": true}, ids); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if snap.Process.Workload.Pod == nil {
		t.Error("the event was changed")
	}
	for _, x := range s.e.Stats() {
		if x.Seen > 1 {
			t.Errorf("%s was counted twice: %+v", x.Rule.ID, x)
		}
	}
}

// All namespaces together have a budget as well, of which each is sure of its
// share: who comes late is not left with nothing.
func TestBudgetOfAllNamespaces(t *testing.T) {
	var clock time.Duration
	cost := 3 * time.Millisecond
	s := newScene(t, Config{Budget: Budget{Time: 50 * time.Millisecond, All: 24 * time.Millisecond},
		clock: func() time.Duration { clock += cost; return clock }}, tenant("a", ""), tenant("b", ""), tenant("c", ""), tenant("d", ""))
	in := func(namespace string) {
		s.at(0, 1, func(p *event.Process) { p.Workload = inPod(namespace, "web", nil) })
	}
	for range 20 {
		in("a")
	}
	for range 20 {
		in("b")
		in("c")
	}
	got := map[string]string{}
	for _, x := range s.e.Stats() {
		got[x.Rule.Namespace] = fmt.Sprintf("%d+%d", x.Alerts, x.OverBudget)
	}
	if d := cmp.Diff(map[string]string{"a": "8+12", "b": "2+18", "c": "2+18", "d": "0+0"}, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	clock += time.Second
	in("a")
	if n := s.e.Namespaces()[0]; n.Time != 9*cost {
		t.Errorf("a second later: %+v", n)
	}
	checkSums(t, s.e)
}

package policy

import (
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/event"
)

// inPod is a container of a pod that is known.
func inPod(namespace, container string, labels map[string]string) *event.Workload {
	return &event.Workload{Place: event.PlaceContainer, ContainerID: namespace + "-" + container, ContainerName: container, PodUID: "u-" + namespace,
		Pod: &event.Pod{UID: "u-" + namespace, Namespace: namespace, Name: "pod", Labels: labels}}
}

// Selectors of all kinds, and what is not known.
func TestSelectors(t *testing.T) {
	web := map[string]string{"app": "web", "tier": "front"}
	labelled := inPod("shop", "web", web)
	labelled.Pod.NamespaceLabels = map[string]string{"team": "red"}
	nameless := inPod("shop", "", web)
	sandbox := inPod("shop", "", web)
	sandbox.Sandbox = true
	var (
		host     = &event.Workload{Place: event.PlaceHost}
		unknown  = &event.Workload{}
		podless  = &event.Workload{Place: event.PlaceContainer, ContainerID: "c"}
		unlisted = &event.Workload{Place: event.PlaceContainer, ContainerID: "c", PodUID: "u"}
		shop     = inPod("shop", "web", web)
		bare     = inPod("bank", "db", nil)
	)
	for _, tt := range []struct {
		scope string
		w     *event.Workload
		node  map[string]string
		want  string // match, undecided or no
	}{
		{"podSelector: {}", shop, nil, "match"},
		{"podSelector: {}", bare, nil, "match"},
		{"podSelector: {}", host, nil, "no"},
		{"podSelector: {}", podless, nil, "no"},
		{"podSelector: {}", unlisted, nil, "undecided"},
		{"podSelector: {}", unknown, nil, "undecided"},
		{"podSelector: {}", nil, nil, "undecided"},
		{"targets: [Host]", unlisted, nil, "no"},
		{"targets: [Containers]", unlisted, nil, "match"},
		{"podSelector: {matchLabels: {app: web}}", shop, nil, "match"},
		{"podSelector: {matchLabels: {app: db}}", shop, nil, "no"},
		{"podSelector: {matchLabels: {app: web, tier: back}}", shop, nil, "no"},
		{"podSelector: {matchLabels: {app: web}}", bare, nil, "no"},
		{"podSelector: {matchExpressions: [{key: app, operator: In, values: [web, api]}]}", shop, nil, "match"},
		{"podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [web]}]}", shop, nil, "no"},
		{"podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [web]}]}", bare, nil, "match"},
		{"podSelector: {matchExpressions: [{key: app, operator: Exists}]}", shop, nil, "match"},
		{"podSelector: {matchExpressions: [{key: app, operator: Exists}]}", bare, nil, "no"},
		{"podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}", shop, nil, "no"},
		{"podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}", bare, nil, "match"},

		{"containers: [web]", shop, nil, "match"},
		{"containers: [db, sidecar]", shop, nil, "no"},
		{"containers: [web]", nameless, nil, "undecided"},
		{"containers: [web]", sandbox, nil, "no"},
		{"containers: [web]", host, nil, "no"},
		{"containers: [web]", podless, nil, "no"},

		{"namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}", shop, nil, "match"},
		{"namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}", bare, nil, "no"},
		{"namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system]}]}", shop, nil, "match"},
		{"namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system]}]}", unlisted, nil, "undecided"},
		{"namespaceSelector: {matchLabels: {team: red}}", shop, nil, "undecided"},
		{"namespaceSelector: {matchLabels: {team: red}}", labelled, nil, "match"},
		{"namespaceSelector: {matchLabels: {team: blue}}", labelled, nil, "no"},
		{"namespaceSelector: {matchLabels: {team: red, kubernetes.io/metadata.name: bank}}", shop, nil, "no"},
		{"namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {app: db}}", shop, nil, "no"},

		{"nodeSelector: {matchLabels: {pool: a}}", host, nil, "undecided"},
		{"nodeSelector: {matchLabels: {pool: a}}", host, map[string]string{"pool": "a"}, "match"},
		{"nodeSelector: {matchLabels: {pool: a}}", shop, map[string]string{}, "no"},
		{"nodeSelector: {}", shop, nil, "match"},
		{"nodeSelector: {matchLabels: {pool: a}}, podSelector: {}", unlisted, map[string]string{"pool": "b"}, "no"},
		{"nodeSelector: {matchLabels: {pool: a}}, podSelector: {}", unlisted, map[string]string{"pool": "a"}, "undecided"},
	} {
		c := mustCompiler(t)
		e := NewEngine(c, Config{NodeLabels: tt.node, Budget: Untimed()})
		if err := e.Swap(mustSet(t, c, withSpec("scope: {"+tt.scope+"}"))); err != nil {
			t.Fatal(err)
		}
		ev := execOf(0)
		ev.Process.Workload = tt.w
		got := "no"
		e.Evaluate(ev, func(*Match) { got = "match" })
		s := e.Stats()[0]
		if s.Undecided == 1 {
			got = "undecided"
		}
		if got != tt.want || (s.Seen == 1) != (got != "no") {
			t.Errorf("%s in %+v on %v: %s, want %s; %+v", tt.scope, tt.w, tt.node, got, tt.want, s)
		}
		// A condition that is false decides, wherever it is.
		ev = execOf(1)
		ev.Process.Workload = tt.w
		e.Evaluate(ev, func(m *Match) { t.Errorf("%s: a false condition matches", tt.scope) })
		if s := e.Stats()[0]; s.NotMatched != s.Seen/2 {
			t.Errorf("%s: a false condition is undecided: %+v", tt.scope, s)
		}
		checkSums(t, e)
	}
}

// A rule that is not sure of its scope alerts when it says so, marked.
func TestUndecidedScopeAlerts(t *testing.T) {
	c := mustCompiler(t)
	e := NewEngine(c, Config{Budget: Untimed()})
	text := strings.Replace(withRule("      condition: process.uid == 7\n      onUndecided: Alert\n"), "spec:\n", "spec:\n  scope: {podSelector: {}}\n", 1)
	if err := e.Swap(mustSet(t, c, text)); err != nil {
		t.Fatal(err)
	}
	ev := execOf(7)
	ev.Process.Workload = &event.Workload{Place: event.PlaceContainer, ContainerID: "c", PodUID: "u"}
	n := 0
	open := e.Evaluate(ev, func(m *Match) {
		if n++; !m.Undecided {
			t.Error("not marked as undecided")
		}
	})
	if n != 1 || !open {
		t.Errorf("%d alerts, open %v", n, open)
	}
}

// A scope is asked once for a workload, and what was resolved is bounded.
func TestScopeIsResolvedOnce(t *testing.T) {
	c := mustCompiler(t)
	e := NewEngine(c, Config{Budget: Untimed()})
	if err := e.Swap(mustSet(t, c, withSpec("scope: {podSelector: {matchLabels: {app: web}}}"))); err != nil {
		t.Fatal(err)
	}
	emit := func(*Match) {}
	shop := inPod("shop", "web", map[string]string{"app": "web"})
	ev := execOf(1)
	ev.Process.Workload = shop
	e.Evaluate(ev, emit)
	if n := testing.AllocsPerRun(100, func() { e.Evaluate(ev, emit) }); n != 0 {
		t.Errorf("an event in a known workload allocates %v times", n)
	}
	shop.Pod.Labels["app"] = "db" // nobody may do so; it shows that nobody looks again
	e.Evaluate(ev, emit)
	if s := e.Stats()[0]; s.Seen != 103 && s.Seen != 104 {
		t.Errorf("seen %d", s.Seen)
	}
	for range 3 * maxPlaces {
		ev.Process.Workload = inPod("shop", "web", map[string]string{"app": "web"})
		e.Evaluate(ev, emit)
	}
	if n := len(e.places); n > maxPlaces {
		t.Errorf("%d workloads are remembered", n)
	}
	if n := len(e.classes); n != 1 {
		t.Errorf("%d classes for one set of rules", n)
	}
	checkSums(t, e)
	if s := e.Stats()[0]; s.Seen < 3*maxPlaces {
		t.Errorf("seen %d after forgetting", s.Seen)
	}
}

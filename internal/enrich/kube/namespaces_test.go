package kube

import (
	"testing"

	"github.com/procession-dev/procession/internal/event"
)

// Labels of namespaces reach pods that are known, that come, and that change,
// whichever is told first; unknown is not none.
func TestNamespaceLabels(t *testing.T) {
	p, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	pod := func(uid, namespace string) *Pod {
		return &Pod{Pod: event.Pod{UID: uid, Namespace: namespace, Name: "web", Labels: map[string]string{}}}
	}
	want := func(what, uid, team string) {
		t.Helper()
		got, _, _ := p.Find(uid, "")
		switch {
		case got == nil:
			t.Fatalf("%s: no pod %s", what, uid)
		case team == "unknown" && got.NamespaceLabels != nil, team != "unknown" && got.NamespaceLabels == nil, team != "unknown" && got.NamespaceLabels["team"] != team:
			t.Errorf("%s: pod %s has %v, want %q", what, uid, got.NamespaceLabels, team)
		}
	}
	p.replace([]*Pod{pod("1", "shop"), pod("2", "bank")}, 0)
	want("nobody watches", "1", "unknown")
	before, _, _ := p.Find("1", "")
	g := p.Generation()
	p.SetNamespaces(map[string]map[string]string{"shop": {"team": "a"}})
	if p.Generation() == g {
		t.Error("the generation did not change")
	}
	want("told after the pods", "1", "a")
	want("not among them", "2", "unknown")
	if before.NamespaceLabels != nil {
		t.Error("a pod that was given away changed")
	}
	p.replace([]*Pod{pod("1", "shop"), pod("2", "bank"), pod("3", "shop")}, 0)
	want("a new pod", "3", "a")
	want("an old pod in a new list", "1", "a")
	g = p.Generation()
	p.replace([]*Pod{pod("1", "shop"), pod("2", "bank"), pod("3", "shop")}, 0)
	p.SetNamespaces(map[string]map[string]string{"shop": {"team": "a"}})
	if p.Generation() != g {
		t.Error("nothing changed, and the generation did")
	}
	p.SetNamespaces(map[string]map[string]string{"shop": {"team": "b"}, "bank": {}})
	p.update(pod("4", "bank"), false)
	want("changed", "1", "b")
	want("none is known", "4", "")
	p.SetNamespaces(nil)
	want("nobody watches any more", "1", "unknown")
}

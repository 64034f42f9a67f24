package source_test

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
)

func tenant(namespace, name, condition string) string {
	s := strings.Replace(text(name, condition), "kind: Cluster", "kind: ", 1)
	return strings.Replace(s, "{name: "+name, "{namespace: "+namespace+", name: "+name, 1)
}

// The same name may stand for a policy of the cluster and for one in each
// namespace; each is kept, refused and reused by itself.
func TestNamespaces(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.yaml")
	all := []string{text("p", one), tenant("shop", "p", one), tenant("bank", "p", one)}
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	// Each look is that of a directory that was loaded once and is read again.
	d := source.NewDir(dir, nil)
	load := func(texts ...string) source.Update {
		t.Helper()
		write(t, file, strings.Join(texts, "---\n"))
		var got source.Update
		if err := d.Load(c, func(u source.Update) { got = u }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	states := func(u source.Update) (out []string) {
		for _, p := range u.Files[0].Policies {
			out = append(out, p.Name+"="+string(p.State))
		}
		return out
	}
	byName := func(u source.Update) map[string]*policy.Policy {
		out := map[string]*policy.Policy{}
		for _, p := range u.Set.Policies() {
			out[p.FullName()] = p
		}
		return out
	}
	first := load(all...)
	if d := cmp.Diff([]string{"p=Loaded", "shop/p=Loaded", "bank/p=Loaded"}, states(first)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	// One namespace's policy is broken: its last good version stays, and the
	// others are not even compiled again.
	second := load(all[0], tenant("shop", "p", broken), all[2])
	if d := cmp.Diff([]string{"p=Loaded", "bank/p=Loaded", "shop/p=Kept"}, states(second)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	before, after := byName(first), byName(second)
	for name, p := range before {
		if after[name] != p {
			t.Errorf("%s was compiled again", name)
		}
	}
	third := load(all[0], tenant("shop", "p", two), all[2])
	if now := byName(third); now["p"] != before["p"] || now["bank/p"] != before["bank/p"] || now["shop/p"] == before["shop/p"] {
		t.Error("the wrong policies were compiled again")
	}
	var ids []string
	for _, r := range third.Set.Rules() {
		ids = append(ids, r.ID)
	}
	if d := cmp.Diff([]string{"ClusterDetectionPolicy//p/r", "DetectionPolicy/bank/p/r", "DetectionPolicy/shop/p/r"}, ids); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	fourth := load(all[0], all[1], all[1])
	if err := fourth.Files[0].Err; err == nil || !strings.Contains(err.Error(), "policy shop/p: metadata.name: is the name of another policy in this file as well") {
		t.Errorf("twice: %v", err)
	}
}

// A namespace with thousands of rules has its first ones compiled, and takes
// nothing from others.
func TestNamespaceWithTooManyRules(t *testing.T) {
	large := func(name string) source.Object {
		o := inNamespace("shop", name, one)
		_, rule, _ := strings.Cut(string(o.Text), "  rules:\n")
		for i := range 127 {
			o.Text = append(o.Text, strings.Replace(rule, "name: r,", "name: r"+strconv.Itoa(i)+",", 1)...)
		}
		return o
	}
	w := newWatched(t, "")
	var all []source.Object
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		all = append(all, large(name))
	}
	w.set(namespaced, append(all, inNamespace("bank", "z", one))...)
	rules := map[string]int{}
	for _, r := range w.last.Set.Rules() {
		rules[r.Namespace+"/"+r.Policy]++
	}
	if d := cmp.Diff(map[string]int{"shop/a": 128, "shop/b": 128, "shop/c": 128, "shop/d": 128, "bank/z": 1}, rules); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	refused := 0
	for _, f := range w.last.Files {
		if f.Err != nil && strings.Contains(f.Err.Error(), "of a namespace no more than 512 are compiled") {
			refused++
		}
	}
	if refused != 2 {
		t.Errorf("%d policies are refused, want 2", refused)
	}
	w.set(namespaced, all[4:]...) // with room again they are compiled
	if n := len(w.last.Set.Rules()); n != 256 {
		t.Errorf("%d rules, want 256", n)
	}
}

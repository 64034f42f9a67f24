package source_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
)

const cluster, namespaced = "ClusterDetectionPolicy", "DetectionPolicy"

func object(name, condition string) source.Object {
	return source.Object{Name: name, Text: []byte(text(name, condition))}
}

func inNamespace(namespace, name, condition string) source.Object {
	t := strings.Replace(text(name, condition), "ClusterDetectionPolicy", "DetectionPolicy", 1)
	t = strings.Replace(t, "{name: "+name+"}", "{name: "+name+", namespace: "+namespace+"}", 1)
	return source.Object{Namespace: namespace, Name: name, Text: []byte(t)}
}

// an agent's view of a cluster's policies.
type watched struct {
	t       *testing.T
	o       *source.Objects
	last    source.Update
	updates int
}

func (w *watched) update(u source.Update) { w.last, w.updates = u, w.updates+1 }

func newWatched(t *testing.T, file string) *watched {
	t.Helper()
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	w := &watched{t: t, o: source.NewObjects(file, slog.New(slog.DiscardHandler))}
	if err := w.o.Load(c, w.update); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *watched) set(kind string, objects ...source.Object) {
	w.t.Helper()
	if err := w.o.Set(kind, objects, w.update); err != nil {
		w.t.Fatal(err)
	}
}

func (w *watched) want(s string) {
	w.t.Helper()
	if d := cmp.Diff(strings.TrimSpace(s), strings.TrimSpace(brief(w.last))); d != "" {
		w.t.Errorf("(-want +got):; %s", d)
	}
}

// Objects come, change, break and go; each kind leaves the other alone.
func TestObjects(t *testing.T) {
	w := newWatched(t, "")
	w.set(cluster, object("a", one), object("b", one))
	w.want("a: a=Loaded(1); b: b=Loaded(1)")
	w.set(namespaced, inNamespace("shop", "a", two))
	w.want("a: a=Loaded(1); b: b=Loaded(1); a: shop/a=Loaded(2)")
	n := w.updates
	w.set(cluster, object("b", one), object("a", one))
	if w.updates != n {
		t.Error("nothing changed, and it was told")
	}
	w.set(cluster, object("a", broken), object("b", two))
	w.want("a: a=Kept(1) !; b: b=Loaded(2); a: shop/a=Loaded(2)")
	w.set(cluster, object("a", two))
	w.want("a: a=Loaded(2); a: shop/a=Loaded(2)")
	w.set(namespaced)
	w.want("a: a=Loaded(2)")
	w.set(cluster)
	w.want("")
}

// What was in force is in force after a restart without an API server, also
// the last good version of a policy that is broken now.
func TestObjectsKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policies.json")
	w := newWatched(t, file)
	w.set(cluster, object("a", one), object("b", one), object("c", broken))
	w.set(cluster, object("a", broken), object("b", two), object("c", broken))
	before := brief(w.last)

	w = newWatched(t, file)
	w.want(before)
	// The API server answers, with the same: nothing happens.
	n := w.updates
	w.set(cluster, object("a", broken), object("b", two), object("c", broken))
	if w.updates != n {
		t.Error("nothing changed since before the restart, and it was told")
	}
	w.set(cluster, object("a", two))
	newWatched(t, file).want("a: a=Loaded(2)")
}

// A file that was damaged puts nothing in force that nobody wrote, and is
// replaced by the next change.
func TestObjectsDamaged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policies.json")
	w := newWatched(t, file)
	w.set(cluster, object("a", one))
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(good); i += 1 + len(good)/50 {
		for name, bad := range map[string][]byte{
			"flipped": append(append(append([]byte{}, good[:i]...), good[i]^1), good[i+1:]...),
			"cut":     good[:i],
		} {
			if err := os.WriteFile(file, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			w := newWatched(t, file)
			if got := brief(w.last); got != "" {
				t.Errorf("%s at %d: in force is %q", name, i, got)
			}
		}
	}
	w = newWatched(t, file)
	w.set(cluster, object("b", one))
	newWatched(t, file).want("b: b=Loaded(1)")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	newWatched(t, file).want("")
}

// A tenant that makes too many policies takes none from others.
func TestObjectsBounded(t *testing.T) {
	w := newWatched(t, "")
	var many []source.Object
	for i := range 105 {
		many = append(many, inNamespace("greedy", fmt.Sprintf("p%03d", i), one))
	}
	many = append(many, inNamespace("modest", "p", one))
	w.set(namespaced, many...)
	if n := len(w.last.Set.Rules()); n != 101 {
		t.Errorf("%d rules in force, want 100 of one namespace and 1 of the other", n)
	}
	refused := 0
	for _, f := range w.last.Files {
		if f.Err != nil {
			refused++
			if !strings.Contains(f.Err.Error(), "at most 100") {
				t.Errorf("%s: %v", f.File, f.Err)
			}
		}
	}
	if refused != 5 {
		t.Errorf("%d are refused, want 5", refused)
	}
	n := w.updates
	w.set(namespaced, many...)
	if w.updates != n {
		t.Error("nothing changed, and it was told")
	}
}

func TestObjectsBeforeLoad(t *testing.T) {
	o := source.NewObjects("", nil)
	if err := o.Set(cluster, nil, func(source.Update) {}); err == nil {
		t.Error("Set before Load worked")
	}
}

package policy_test

import (
	"io/fs"
	"os"
	"path"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/policytest"
)

// packDir holds the starter pack; its tests stand in tests.
const packDir = "../../deploy/helm/procession/policies"

func newCompiler(t testing.TB) *policy.Compiler {
	t.Helper()
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// loadPack compiles the starter pack.
func loadPack(t testing.TB, c *policy.Compiler) *policy.Set {
	t.Helper()
	files, err := fs.Glob(os.DirFS(packDir), "*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no policies in %s: %v", packDir, err)
	}
	var policies []*policy.Policy
	for _, f := range files {
		data, err := os.ReadFile(path.Join(packDir, f))
		if err != nil {
			t.Fatal(err)
		}
		objects, err := policy.Parse(f, data)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			p, err := c.Compile(o)
			if err != nil {
				t.Fatal(err)
			}
			policies = append(policies, p)
		}
	}
	set, err := policy.NewSet(policies...)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func TestPackCases(t *testing.T) {
	c := newCompiler(t)
	fsys := os.DirFS(packDir)
	tested := map[string]bool{}
	var reports []*policytest.Report
	files, err := fs.Glob(fsys, "tests/*.test.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests in %s: %v", packDir, err)
	}
	for _, f := range files {
		t.Run(path.Base(f), func(t *testing.T) {
			r, err := policytest.Run(c, fsys, f)
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range r.Cases {
				for _, problem := range x.Failures {
					t.Errorf("case %q: %s", x.Name, problem)
				}
			}
			reports = append(reports, r)
		})
		tested[strings.TrimSuffix(path.Base(f), ".test.yaml")+".yaml"] = true
	}
	for _, u := range policytest.Uncovered(reports...) {
		t.Error(u)
	}
	policies, err := fs.Glob(fsys, "*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range policies {
		if !tested[f] {
			t.Errorf("%s has no tests/%s", f, strings.Replace(f, ".yaml", ".test.yaml", 1))
		}
	}
}

// What every rule of the pack must have besides a condition.
func TestPackIsComplete(t *testing.T) {
	c := newCompiler(t)
	set := loadPack(t, c)
	if n := len(set.Rules()); n < 50 {
		t.Errorf("%d rules, want 50 or more", n)
	}
	for _, p := range set.Policies() {
		for _, w := range p.Warnings {
			t.Errorf("warning: %v", w)
		}
		list, err := c.Inspect(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range list {
			if i := x.Condition; i.Always || i.Never || len(i.Odd) > 0 || len(i.Opaque) > 0 || len(x.Silent) > 0 {
				t.Errorf("%s: lint would complain: %+v, silent exceptions %v", x.Rule.ID, i, x.Silent)
			}
		}
	}
	for _, r := range set.Rules() {
		s := r.Spec
		if s.Title == "" || s.Description == "" || len(s.Mitre) == 0 || s.MessageExpression == "" {
			t.Errorf("%s: title, description, mitre and messageExpression must be given", r.ID)
		}
	}
}

// The example on the reference page is a policy that loads.
func TestReferenceExample(t *testing.T) {
	page, err := os.ReadFile("../../docs/rules.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "```yaml\n")
	example, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("there is no example")
	}
	objects, err := policy.Parse("docs/rules.md", []byte(example))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newCompiler(t).Compile(objects[0]); err != nil {
		t.Fatal(err)
	}
}

// The page about policies shows one that compiles.
func TestPoliciesPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/policies.md")
	if err != nil {
		t.Fatal(err)
	}
	c := newCompiler(t)
	n := 0
	for _, part := range strings.Split(string(page), "```yaml\n")[1:] {
		text, _, _ := strings.Cut(part, "```")
		objects, err := policy.Parse("docs/policies.md", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			if _, err := c.Compile(o); err != nil {
				t.Error(err)
			}
			n++
		}
	}
	if n == 0 {
		t.Error("the page shows no policy")
	}
}

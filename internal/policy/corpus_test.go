package policy_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
)

// corpusFiles lists the YAML files below a folder of the corpus of published
// rules, which is not part of the repository.
func corpusFiles(t *testing.T, folder string) []string {
	t.Helper()
	root := os.Getenv("PROCESSION_CORPUS")
	if root == "" {
		root = "../../../shared/corpus"
	}
	dir := filepath.Join(root, folder)
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("no corpus of published rules: %v (PROCESSION_CORPUS names its folder)", err)
	}
	var files []string
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasPrefix(filepath.Ext(path), ".y") {
			files = append(files, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no rules below %s", dir)
	}
	return files
}

// Files that are no policies are refused with an error that says so.
func TestCorpusIsRefused(t *testing.T) {
	for _, f := range append(corpusFiles(t, "sigma-linux"), corpusFiles(t, "falco-rules")...) {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		objects, err := policy.Parse("f", data)
		var errs policy.Errors
		if len(objects) != 0 || !errors.As(err, &errs) {
			t.Errorf("%s: %d policies, error %v", f, len(objects), err)
		}
	}
}

// What detection engineers look for, with all its quotes, backslashes and
// blanks, comes through YAML, lists and expressions as it is: a command line
// that holds a value matches, and one that holds none does not.
func TestCorpusValues(t *testing.T) {
	c := newCompiler(t)
	values := 0
	for _, f := range corpusFiles(t, "sigma-linux") {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var rule struct {
			Detection any `json:"detection"`
		}
		if err := yaml.Unmarshal(data, &rule); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		list := texts(rule.Detection, nil)
		if len(list) == 0 || len(list) > v1alpha1.MaxListValues {
			continue
		}
		values += len(list)
		p := v1alpha1.ClusterDetectionPolicy{
			TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.APIVersion, Kind: v1alpha1.KindClusterDetectionPolicy},
			ObjectMeta: metav1.ObjectMeta{Name: "corpus"},
			Spec: v1alpha1.ClusterDetectionPolicySpec{PolicySpec: v1alpha1.PolicySpec{
				Lists: []v1alpha1.List{{Name: "values", Values: list}},
				Rules: []v1alpha1.Rule{{Name: "r", Events: []v1alpha1.EventKind{"Exec"}, Severity: "Low",
					Condition: "process.cmdline.containsAny(lists.values) && process.args.exists(a, a in lists.values)"}},
			}},
		}
		text, err := yaml.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		objects, err := policy.Parse(f, text)
		if err != nil {
			t.Fatal(err)
		}
		compiled, err := c.Compile(objects[0])
		if err != nil {
			t.Fatal(err)
		}
		set, err := policy.NewSet(compiled)
		if err != nil {
			t.Fatal(err)
		}
		engine := policy.NewEngine(c, policy.Config{})
		engine.Swap(set)
		matches := 0
		for _, v := range list {
			engine.Evaluate(execWith("x\x00"+v+"\x00"), func(*policy.Match) { matches++ })
		}
		engine.Evaluate(execWith("\x01\x02\x00"), func(*policy.Match) { matches += 1 << 20 })
		if matches != len(list) {
			t.Errorf("%s: %d of %d values match", f, matches, len(list))
		}
	}
	t.Logf("%d values", values)
}

// texts collects the texts in a decoded YAML value.
func texts(v any, out []string) []string {
	switch v := v.(type) {
	case string:
		if v != "" {
			out = append(out, v)
		}
	case []any:
		for _, x := range v {
			out = texts(x, out)
		}
	case map[string]any:
		for _, x := range v {
			out = texts(x, out)
		}
	}
	return out
}

func execWith(cmdline string) *event.Event {
	p := &event.Process{PID: 7, Name: "x", Exe: "/bin/x", Cmdline: cmdline, CmdlineLen: uint32(len(cmdline))}
	for f := range p.Sources {
		p.Sources[f] = event.SourceRecord
	}
	return &event.Event{Kind: event.Exec, Process: p}
}

package source_test

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"errors"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
	"github.com/procession-dev/procession/internal/testenv"
)

func text(name, condition string) string {
	return fmt.Sprintf(`apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: %s}
spec:
  rules:
    - {name: r, events: [Exec], severity: Low, condition: "%s"}
`, name, condition)
}

const (
	one    = "process.uid == 1"
	two    = "process.uid == 2"
	broken = "process.uuid == 1"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// brief is what matters of an update: each policy's state and condition.
func brief(u source.Update) string {
	inForce := map[string]string{}
	for _, r := range u.Set.Rules() {
		name := r.Policy
		if r.Namespace != "" {
			name = r.Namespace + "/" + name
		}
		inForce[name] = strings.TrimPrefix(r.Spec.Condition, "process.uid == ")
	}
	var lines []string
	for _, f := range u.Files {
		line := filepath.Base(f.File) + ":"
		for _, p := range f.Policies {
			line += fmt.Sprintf(" %s=%s", p.Name, p.State)
			if p.State != source.Refused {
				line += "(" + inForce[p.Name] + ")"
				if p.Digest == "" || p.Rules != 1 {
					line += fmt.Sprintf(" digest %q, %d rules", p.Digest, p.Rules)
				}
			}
		}
		if f.Err != nil {
			line += " !"
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "; ")
}

// A running directory.
type running struct {
	t       *testing.T
	dir     string
	updates chan source.Update
	log     *testenv.Buffer
}

func run(t *testing.T, dir string) *running {
	t.Helper()
	r := &running{t: t, dir: dir, updates: make(chan source.Update, 100), log: new(testenv.Buffer)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	d := source.NewDir(dir, slog.New(slog.NewTextHandler(r.log, nil)))
	go func() { done <- d.Run(ctx, func(u source.Update) { r.updates <- u }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// until waits for an update that says want, and says how long it took.
func (r *running) until(want string) source.Update {
	r.t.Helper()
	start := time.Now()
	timeout := time.After(8 * time.Second) // less than RescanEvery: a notification it must be
	var got []string
	for {
		select {
		case u := <-r.updates:
			b := brief(u)
			if b == want {
				if took := time.Since(start); took > 2*time.Second {
					r.t.Errorf("%q took %v", want, took)
				}
				return u
			}
			got = append(got, b)
		case <-timeout:
			r.t.Fatalf("no update says\n %s\nbut they say\n %s\nlog:\n%s", want, strings.Join(got, "\n "), r.log)
		}
	}
}

func TestMissingDirectory(t *testing.T) {
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(t.TempDir(), "none")
	err = source.NewDir(missing, nil).Load(c, func(source.Update) { t.Error("an update") })
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "policy directory: open "+missing) {
		t.Errorf("Load: %v", err)
	}
	if err := source.NewDir(missing, nil).Run(t.Context(), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Run: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "")
	if err := source.NewDir(file, nil).Load(c, nil); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), text("a", one)+"---\n"+text("b", broken)+"---\n"+text("c", two))
	write(t, filepath.Join(dir, "b.yml"), text("d", one))
	write(t, filepath.Join(dir, "c.yaml"), text("d", two)+"---\n"+text("e", two)+"---\n"+text("e", one))
	write(t, filepath.Join(dir, "d.yaml"), "{")
	write(t, filepath.Join(dir, "README.md"), "{")
	write(t, filepath.Join(dir, ".hidden.yaml"), "{")
	write(t, filepath.Join(dir, "a.yaml~"), "{")
	if err := os.Mkdir(filepath.Join(dir, "tests.yaml"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o644); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "huge.yaml"), "#"+strings.Repeat("a", policy.MaxFileBytes))
	if err := os.Symlink("nowhere", filepath.Join(dir, "link.yaml")); err != nil {
		t.Fatal(err)
	}
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	var got source.Update
	if err := source.NewDir(dir, nil).Load(c, func(u source.Update) { got = u }); err != nil {
		t.Fatal(err)
	}
	want := "a.yaml: a=Loaded(1) c=Loaded(2) b=Refused !; b.yml: d=Loaded(1); c.yaml: d=Refused e=Loaded(2) !; d.yaml: !; huge.yaml: !; pipe.yaml: !"
	if b := brief(got); b != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	errs := map[string]string{}
	for _, f := range got.Files {
		if f.Err != nil {
			errs[filepath.Base(f.File)] = strings.ReplaceAll(f.Err.Error(), dir+"/", "")
		}
	}
	if d := cmp.Diff(map[string]string{
		"a.yaml": "a.yaml:13: policy b: rule r: spec.rules[0].condition: 1:1: there is no variable process.uuid; did you mean process.euid?\n | process.uuid == 1\n | ^",
		"c.yaml": "c.yaml: policy d: metadata.name: is the name of a policy in b.yml as well; names must be unique\n" +
			"c.yaml:15: policy e: metadata.name: is the name of another policy in this file as well; names must be unique",
		"d.yaml":    "d.yaml:1: this is not YAML as expected: did not find expected node content",
		"huge.yaml": "huge.yaml: the file has 1048577 bytes; at most 1048576 are allowed",
		"pipe.yaml": "pipe.yaml is not a file",
	}, errs); d != "" {
		t.Errorf("errors (-want +got):\n%s", d)
	}
}

func TestChanges(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")
	write(t, a, text("a", one))
	r := run(t, dir)
	r.until("a.yaml: a=Loaded(1)")
	write(t, a, text("a", two))
	r.until("a.yaml: a=Loaded(2)")
	write(t, b, text("b", one))
	r.until("a.yaml: a=Loaded(2); b.yaml: b=Loaded(1)")
	// An editor: a new file takes the place of the old one.
	write(t, a+".tmp", text("a", one))
	if err := os.Rename(a+".tmp", a); err != nil {
		t.Fatal(err)
	}
	r.until("a.yaml: a=Loaded(1); b.yaml: b=Loaded(1)")
	// Broken: the last good one stays, again and again.
	write(t, a, text("a", broken))
	u := r.until("a.yaml: a=Kept(1) !; b.yaml: b=Loaded(1)")
	if d := u.Files[0].Policies[0].Digest; d != u.Set.Policies()[0].Digest {
		t.Errorf("the report's digest %s is not that of the policy in force", d)
	}
	write(t, a, "{")
	r.until("a.yaml: a=Kept(1) !; b.yaml: b=Loaded(1)")
	write(t, a, "")
	r.until("a.yaml: a=Kept(1) !; b.yaml: b=Loaded(1)")
	if !strings.Contains(r.log.String(), "there is no policy in the file") {
		t.Errorf("the log does not tell of the empty file:\n%s", r.log)
	}
	write(t, a, text("a", two))
	r.until("a.yaml: a=Loaded(2); b.yaml: b=Loaded(1)")
	// One policy of a file is broken: the other one changes.
	write(t, a, text("a", broken)+"---\n"+text("a2", two))
	r.until("a.yaml: a2=Loaded(2) a=Kept(2) !; b.yaml: b=Loaded(1)")
	// It leaves the file for good.
	write(t, a, text("a2", two))
	r.until("a.yaml: a2=Loaded(2); b.yaml: b=Loaded(1)")
	// Another file claims the name, and gets it when the first is removed.
	write(t, filepath.Join(dir, "0.yaml"), text("b", two))
	r.until("0.yaml: b=Refused !; a.yaml: a2=Loaded(2); b.yaml: b=Loaded(1)")
	if err := os.Remove(b); err != nil {
		t.Fatal(err)
	}
	r.until("0.yaml: b=Loaded(2); a.yaml: a2=Loaded(2)")
	if err := os.Rename(a, a+".off"); err != nil {
		t.Fatal(err)
	}
	r.until("0.yaml: b=Loaded(2)")
	// What is no policy file changes nothing; what comes after it does.
	write(t, filepath.Join(dir, "notes.txt"), "x")
	write(t, filepath.Join(dir, "0.yaml"), text("b", one))
	r.until("0.yaml: b=Loaded(1)")
}

// A ConfigMap is mounted as a link ..data to a folder; an update makes a new
// folder and renames a new link over the old one.
func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	version := func(name string, files map[string]string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		for f, x := range files {
			write(t, filepath.Join(dir, name, f), x)
		}
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", map[string]string{"a.yaml": text("a", one)})
	if err := os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	r := run(t, dir)
	r.until("a.yaml: a=Loaded(1)")
	version("..2", map[string]string{"a.yaml": text("a", two), "b.yaml": text("b", two)})
	r.until("a.yaml: a=Loaded(2)")
	if err := os.Symlink("..data/b.yaml", filepath.Join(dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	r.until("a.yaml: a=Loaded(2); b.yaml: b=Loaded(2)")
	version("..3", map[string]string{"b.yaml": text("b", one)})
	r.until("b.yaml: b=Loaded(1)")
}

// The directory itself goes and comes back: the rules stay in force, and the
// new one is watched.
func TestDirectoryReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "policies")
	mkdir := func() {
		t.Helper()
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mkdir()
	write(t, filepath.Join(dir, "a.yaml"), text("a", one))
	r := run(t, dir)
	r.until("a.yaml: a=Loaded(1)")
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(r.log.String(), "policy files cannot be read; the rules in force stay") {
		select {
		case u := <-r.updates:
			t.Fatalf("without a directory: %s", brief(u))
		case <-time.After(10 * time.Millisecond):
		case <-t.Context().Done():
			t.Fatal(r.log)
		}
	}
	mkdir()
	write(t, filepath.Join(dir, "a.yaml"), text("a", two))
	r.until("a.yaml: a=Loaded(2)")
	write(t, filepath.Join(dir, "a.yaml"), text("a", one)) // the new directory is watched
	r.until("a.yaml: a=Loaded(1)")
}

// What changed between Load and Run is not missed.
func TestChangeBeforeRun(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), text("a", one))
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	updates := make(chan source.Update, 10)
	d := source.NewDir(dir, nil)
	if err := d.Load(c, func(u source.Update) { updates <- u }); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.yaml"), text("a", two))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.Run(ctx, func(u source.Update) { updates <- u }) }()
	for _, want := range []string{"a.yaml: a=Loaded(1)", "a.yaml: a=Loaded(2)"} {
		select {
		case u := <-updates:
			if b := brief(u); b != want {
				t.Errorf("got %s, want %s", b, want)
			}
		case <-time.After(8 * time.Second):
			t.Fatalf("no update says %s", want)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Run leaves nothing open behind.
func TestRunClosesItsFiles(t *testing.T) {
	dir := t.TempDir()
	inotifies := func() int {
		links, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		return len(slices.DeleteFunc(links, func(l string) bool {
			to, err := os.Readlink(l)
			return err != nil || !strings.Contains(to, "inotify")
		}))
	}
	before := inotifies()
	ctx, cancel := context.WithCancel(t.Context())
	err := source.NewDir(dir, nil).Run(ctx, func(source.Update) { cancel() })
	if after := inotifies(); err != nil || after != before {
		t.Errorf("Run: %v; %d inotify files before and %d after", err, before, after)
	}
}

package author

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const okPolicy = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: NAME}
spec:
  rules: [{name: r, events: [Exec], severity: Low, condition: process.name == 'x'}]
`

// nobody runs the binary as somebody who may not read everything.
func nobody(t *testing.T, dir string, args ...string) (out string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), built(t), args...)
	cmd.Dir = dir
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// openDir is a folder that everybody may enter.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "author-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Dir(built(t))
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A walk ends, whatever links there are, finds what it should, and says what
// it could not look into.
func TestFoldersWithTraps(t *testing.T) {
	dir := openDir(t)
	named := func(n string) string { return strings.Replace(okPolicy, "NAME", n, 1) }
	write(t, filepath.Join(dir, "p/a.yaml"), named("a"))
	write(t, filepath.Join(dir, "p/deep/er/b.yml"), named("b"))
	write(t, filepath.Join(dir, "p/values.yaml"), "replicas: 3\n")
	write(t, filepath.Join(dir, "p/.hidden/c.yaml"), "not: even\n  yaml")
	write(t, filepath.Join(dir, "p/.d.yaml"), "not: even\n  yaml")
	write(t, filepath.Join(dir, "elsewhere/e.yaml"), named("e"))
	for link, to := range map[string]string{"p/loop": ".", "p/deep/up": "../..", "p/f.yaml": "../elsewhere/e.yaml", "p/folder.yaml": "../elsewhere", "linked": "elsewhere"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	out, code := nobody(t, dir, "policy", "lint", "--fail-on", "error", "p")
	if code != ExitOK || !strings.Contains(out, "3 files, 3 rules: 0 errors") || !strings.Contains(out, "1 file of YAML without a policy left out") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	if out, code = nobody(t, dir, "policy", "lint", "--fail-on", "error", "linked"); code != ExitOK || !strings.Contains(out, "linked/e.yaml:5: ") {
		t.Errorf("a link to a folder that is named is not entered: exit %d:\n%s", code, out)
	}

	locked := filepath.Join(dir, "p/locked")
	write(t, filepath.Join(locked, "x.yaml"), named("x"))
	write(t, filepath.Join(dir, "p/secret.yaml"), named("s"))
	if err := errors.Join(os.Chmod(locked, 0), os.Chmod(filepath.Join(dir, "p/secret.yaml"), 0),
		syscall.Mkfifo(filepath.Join(dir, "p/pipe.yaml"), 0o644), os.Symlink("nowhere", filepath.Join(dir, "p/gone.yaml"))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(locked, 0o755) })
	out, code = nobody(t, dir, "policy", "lint", "p")
	for _, want := range []string{"p/locked: permission denied", "p/secret.yaml: permission denied", "p/pipe.yaml: is not a file",
		"p/gone.yaml: no such file", "3 files, 3 rules", "4 paths could not be read"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not said", want)
		}
	}
	if code != ExitUsage || t.Failed() {
		t.Errorf("exit %d:\n%s", code, out)
	}
}

// Each command refuses what it cannot use, soon, and says what it is.
func TestUnusableFiles(t *testing.T) {
	dir := openDir(t)
	write(t, filepath.Join(dir, "ok.yaml"), strings.Replace(okPolicy, "NAME", "ok", 1))
	write(t, filepath.Join(dir, "big.yaml"), strings.Replace(okPolicy, "NAME", "big", 1)+strings.Repeat("#", 1<<20))
	write(t, filepath.Join(dir, "nested.yaml"), "procession.dev: "+strings.Repeat("[", 200_000))
	write(t, filepath.Join(dir, "nested.json"), `{"procession.dev": `+strings.Repeat(`{"a":`, 200_000))
	write(t, filepath.Join(dir, "bomb.yaml"), "a: &a [x,x,x,x,x,x,x,x,x]\n"+bomb("a", "b")+bomb("b", "c")+bomb("c", "d")+bomb("d", "e")+bomb("e", "f")+bomb("f", "g")+"procession.dev: *g\n")
	write(t, filepath.Join(dir, "empty.yaml"), "")
	write(t, filepath.Join(dir, "bytes.yaml"), "procession.dev: \"\xff\xfe\x00\"\n")
	write(t, filepath.Join(dir, "event.json"), `{"kind":"Exec","process":{"pid":1},"place":"host","stamp":"1"}`)
	for _, tt := range []struct {
		args string
		code int
		want string
	}{
		{"lint", ExitUsage, "a file or a folder is missing"},
		{"lint nope.yaml", ExitUsage, "nope.yaml: no such file"},
		{"lint big.yaml", ExitUsage, "big.yaml: has more than 1048576 bytes"},
		{"lint nested.yaml", ExitFindings, "nested.yaml:1: error: "},
		{"lint nested.json", ExitFindings, "nested.json:1: error: "},
		{"lint bomb.yaml", ExitFindings, "bomb.yaml:1: error: "},
		{"lint empty.yaml", ExitFindings, "there is no policy in the file"},
		{"lint bytes.yaml", ExitFindings, "bytes.yaml:1: error: "},
		{"lint /dev/zero", ExitUsage, "/dev/zero: is not a file"},
		{"lint --format xml ok.yaml", ExitUsage, `--format: "xml" is neither`},
		{"lint --color pink ok.yaml", ExitUsage, `--color: "pink" is none`},
		{"lint --fail-on note ok.yaml", ExitUsage, `--fail-on: "note" is neither`},
		{"lint --at today ok.yaml", ExitUsage, `--at: "today" is no time`},
		{"lint --at", ExitUsage, "flag needs an argument"},
		{"lint --nope", ExitUsage, "flag provided but not defined"},
		{"test", ExitUsage, "a file or a folder is missing"},
		{"test nope.test.yaml", ExitUsage, "nope.test.yaml: no such file"},
		{"test empty.yaml", ExitUsage, "there is no policy in the file"},
		{"explain ok.yaml", ExitUsage, "--event is missing"},
		{"explain --event event.json", ExitUsage, "a policy is missing"},
		{"explain - --event -", ExitUsage, "cannot both come from standard input"},
		{"explain ok.yaml --event nope.json", ExitUsage, "nope.json: no such file"},
		{"explain ok.yaml --event nested.json", ExitUsage, "nested.json: "},
		{"explain ok.yaml --event bomb.yaml", ExitUsage, "bomb.yaml: "},
		{"explain ok.yaml --event /dev/zero", ExitUsage, "/dev/zero: is not a file"},
		{"explain ok.yaml --event .", ExitUsage, ".: is a folder"},
		{"explain big.yaml --event event.json", ExitUsage, "more than 1048576 bytes"},
		{"explain ok.yaml --event event.json", ExitOK, "undecided"},
		{"explain -- ok.yaml", ExitUsage, "--event is missing"},
		{"replay", ExitUsage, "one recording must be named"},
		{"replay event.json", ExitUsage, "--policies is missing"},
		{"replay a b --policies c", ExitUsage, "one recording must be named"},
		{"replay nope.rec --policies ok.yaml", ExitUsage, "nope.rec: no such file"},
		{"replay event.json --policies ok.yaml", ExitUsage, "this is no recording"},
		{"replay . --policies ok.yaml", ExitUsage, "this is no recording"},
		{"replay event.json --policies ok.yaml --limit -1", ExitUsage, "--limit: -1"},
		{"nope", ExitUsage, `unknown command "nope"`},
		{"", ExitUsage, "Usage:"},
		{"--help", ExitOK, "explain POLICY... --event FILE"},
		{"lint --help", ExitOK, "wide-exception"},
		{"test --help", ExitOK, "expect: [{rule: shell-to-network, severity: High}]"},
		{"explain --help", ExitOK, "--matching"},
		{"replay --help", ExitOK, "--against"},
	} {
		out, code := nobody(t, dir, append([]string{"policy"}, strings.Fields(tt.args)...)...)
		if code != tt.code || !strings.Contains(out, tt.want) || len(out) > 8<<10 {
			t.Errorf("%s: exit %d, want %d and %q, got\n%.2000s", tt.args, code, tt.code, tt.want, out)
		}
	}
}

func bomb(from, to string) string {
	return fmt.Sprintf("%s: &%s [%s]\n", to, to, strings.TrimSuffix(strings.Repeat("*"+from+",", 9), ","))
}

// Text of others does not reach a terminal as it is.
func TestHostileText(t *testing.T) {
	dir := openDir(t)
	const evil = "\x1b]0;owned\x07\u202e"
	write(t, filepath.Join(dir, "e.yaml"), `{kind: Exec, process: {name: "x\e]0;owned\a\u202e", args: ["e\e]0;owned\a\u202e"], exe: "/\e]0;owned\a\u202e"}}`)
	write(t, filepath.Join(dir, "p.yaml"), strings.Replace(strings.Replace(okPolicy, "NAME", "p", 1), "process.name == 'x'", `process.cmdline.contains('e') && process.name != 'x'`, 1))
	out, code := nobody(t, dir, "policy", "explain", "p.yaml", "--event", "e.yaml", "--color", "never")
	if code != ExitOK || !strings.Contains(out, ": match") || strings.ContainsAny(out, "\x1b\x07\u202e") {
		t.Errorf("exit %d: %q", code, out)
	}
	if !strings.Contains(out, `\x1b]0;owned\x07\u{202e}`) {
		t.Errorf("the value is not shown, escaped (%q): %q", evil, out)
	}
}

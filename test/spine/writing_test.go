package spine

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A step is a part of docs/writing-policies.md that the test does.
type step struct {
	kind string // sh, sh first, text, text first, exit, Ctrl-C
	text string
	line int
}

var exitNote = regexp.MustCompile(`<!-- exit (\d+) -->`)

// steps reads the page: shell blocks, the output that follows them, and notes.
func steps(t *testing.T) []step {
	t.Helper()
	page, err := os.ReadFile(root + "/docs/writing-policies.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []step
	block := -1
	n := 0
	for l := range strings.Lines(string(page)) {
		n++
		l = strings.TrimSuffix(l, "\n")
		fence, isFence := strings.CutPrefix(l, "```")
		switch {
		case isFence && block >= 0:
			block = -1
		case isFence:
			out = append(out, step{kind: fence, line: n})
			block = len(out) - 1
		case block >= 0:
			out[block].text += l + "\n"
		case strings.Contains(l, "<!-- Ctrl-C -->"):
			out = append(out, step{kind: "Ctrl-C", line: n})
		default:
			if m := exitNote.FindStringSubmatch(l); m != nil {
				out = append(out, step{kind: "exit", text: m[1], line: n})
			}
		}
	}
	return out
}

// says tells whether text holds the lines of want, in their order and with
// others between them; "…" stands for anything.
func says(text, want string) bool {
	rest := strings.Split(text, "\n")
	for w := range strings.Lines(want) {
		parts := strings.Split(strings.TrimSuffix(w, "\n"), "…")
		for i := range parts {
			parts[i] = regexp.QuoteMeta(parts[i])
		}
		line := regexp.MustCompile("^" + strings.Join(parts, ".*") + "$")
		i := 0
		for i < len(rest) && !line.MatchString(rest[i]) {
			i++
		}
		if i == len(rest) {
			return false
		}
		if strings.TrimSuffix(w, "\n") != "…" {
			rest = rest[i+1:]
		}
	}
	return true
}

// TestWritingPolicies does what docs/writing-policies.md says, command by
// command, in two terminals, on the real kernel.
func TestWritingPolicies(t *testing.T) {
	all := steps(t)
	tree, dir := built(t), t.TempDir()
	for _, name := range []string{"bin", "hack", "deploy"} {
		if err := os.Symlink(filepath.Join(tree, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	shell := func(script string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), "bash", "-c", script)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PROCESSION_LISTEN="+freePort(t), "NO_COLOR=1", "PROCESSION_NODE=node-under-test")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as a terminal's Ctrl-C is heard by all of them
		return cmd
	}
	var first *proc
	output, code, ran := "", 0, 0
	for i, s := range all {
		switch s.kind {
		case "sh first":
			first = start(t, "first terminal", shell(s.text))
			first.waitFor("listening", time.Minute)
		case "Ctrl-C":
			if err := syscall.Kill(-first.cmd.Process.Pid, syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			if err := first.wait(30 * time.Second); err != nil {
				t.Fatalf("line %d: the first terminal after Ctrl-C: %v", s.line, err)
			}
		case "text first":
			eventually(t, "the first terminal says\n"+s.text, 30*time.Second, func() bool {
				text, _ := first.text()
				return says(text, s.text)
			})
		case "sh":
			out, err := shell(s.text).CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			output, code = string(out), exitCode(err)
			ran++
			if want := exitAfter(all[i+1:]); code != want {
				t.Fatalf("line %d: exit code %d, want %d\n%s\n%s", s.line, code, want, s.text, output)
			}
		case "text":
			if !says(output, s.text) {
				t.Fatalf("line %d: the page says\n%s\nand it is\n%s", s.line, s.text, output)
			}
		}
	}
	if ran < 10 {
		t.Errorf("the page has only %d blocks of commands", ran)
	}
}

// exitAfter finds the exit code that is noted for a block of commands: beside
// its output, before the next block.
func exitAfter(rest []step) int {
	for _, s := range rest {
		switch s.kind {
		case "exit":
			return int(s.text[0] - '0')
		case "sh", "sh first":
			return 0
		}
	}
	return 0
}

func TestSays(t *testing.T) {
	for _, tt := range []struct {
		text, want string
		says       bool
	}{
		{"a\nb\nc\n", "a\nc\n", true},
		{"a\nb\nc\n", "c\na\n", false},
		{"a\n", "a\na\n", false},
		{"a b c\n", "a … c\n", true},
		{"a b c\n", "b\n", false},
		{"a b c\n", "a …\n", true},
		{"a.c\n", "abc\n", false},
		{"abc\n", "a.c\n", false},
		{"a\nb\n", "…\nb\n", true},
		{"", "a\n", false},
	} {
		if got := says(tt.text, tt.want); got != tt.says {
			t.Errorf("says(%q, %q) is %v", tt.text, tt.want, got)
		}
	}
}

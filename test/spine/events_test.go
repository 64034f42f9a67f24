package spine

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An eventLine is a line of agent events --format json.
type eventLine struct {
	Kind    string `json:"kind"`
	Process struct {
		procLine
		ArgsBytes int    `json:"argsBytes"`
		ArgsRaw   string `json:"argsRaw"`
		ArgsCut   bool   `json:"argsTruncated"`
	} `json:"process"`
}

// events runs agent events while act runs, and returns stdout and stderr. act
// may wait for a text that agent events prints.
func events(t *testing.T, act func(printed func(text string)), args ...string) (stdout []byte, stderr string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(built(t), "bin", "agent"), append([]string{"events"}, args...)...)
	out := newOutput()
	cmd.Stdout = out
	p := start(t, "agent events", cmd)
	p.waitFor("listening\n", 60*time.Second)
	act(func(text string) { t.Helper(); p.waitIn(out, text, 60*time.Second) })
	if err := p.stop(syscall.SIGTERM, 60*time.Second); err != nil {
		t.Errorf("agent events after SIGTERM: %v", err)
	}
	told, _ := out.text()
	said, _ := p.text()
	return []byte(told), said
}

func parseEvents(t *testing.T, out []byte) []eventLine {
	t.Helper()
	var evs []eventLine
	for line := range bytes.Lines(out) {
		var ev eventLine
		if err := json.Unmarshal(line, &ev); err != nil {
			t.Fatalf("line %d is no JSON: %v\n%.300q", len(evs)+1, err, line)
		}
		evs = append(evs, ev)
	}
	return evs
}

// TestEveryExecIsNamed runs 2,000 short programs back to back.
func TestEveryExecIsNamed(t *testing.T) {
	const n = 2000
	out, said := events(t, func(func(string)) {
		for i := range n {
			if err := exec.Command("/bin/true", fmt.Sprintf("spine-event-%d;", i)).Run(); err != nil {
				t.Fatal(err)
			}
		}
	}, "--format", "json", "--kinds", "exec")
	if strings.Contains(said, "lost") {
		t.Errorf("the agent says: %s", said)
	}
	seen := map[string]int{}
	for _, ev := range parseEvents(t, out) {
		if ev.Kind != "Exec" {
			t.Fatalf("--kinds exec printed a %s", ev.Kind)
		}
		if a := ev.Process.Args; len(a) == 2 && strings.HasPrefix(a[1], "spine-event-") {
			seen[a[1]]++
			if !strings.HasSuffix(ev.Process.Exe, "/bin/true") || ev.Process.Name != "true" || ev.Process.UID == nil || ev.Process.Cwd == "" {
				t.Errorf("exe, name, uid or cwd is wrong or missing: %+v", ev)
			}
		}
	}
	for i := range n {
		if c := seen[fmt.Sprintf("spine-event-%d;", i)]; c != 1 {
			t.Errorf("exec %d was told %d times", i, c)
		}
	}
}

// TestHostileArguments runs a program with 128 KiB of arguments that try to
// move the cursor, forge lines, reorder text and break UTF-8.
func TestHostileArguments(t *testing.T) {
	hostile := []string{
		"spine-hostile", "\x1b[2J\x1b[1;1H\x1b]0;owned\a", "two\nlines\r", "\xff\xfe\xc3(", "a\u202eb\u2066c\u200bd", "", " quo'te\" ",
		"\u009b31m", "{\"kind\":\"Exit\"}",
	}
	for size := 0; size < 128<<10; size += 1 << 10 {
		hostile = append(hostile, strings.Repeat("\x1b[5mA", 170)+"....")
	}
	act := func(printed func(string)) {
		// The program stays until it has been looked at: what the record does not
		// hold of a long command line is read from the living process.
		cmd := &exec.Cmd{Path: "/bin/cat", Args: append([]string{"cat", "-"}, hostile...)}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		printed("spine-hostile")
		in.Close()
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
	}

	out, _ := events(t, act, "--format", "json", "--kinds", "exec", "--name", "cat")
	found := false
	for _, ev := range parseEvents(t, out) {
		p := ev.Process
		if len(p.Args) < 3 || p.Args[2] != "spine-hostile" {
			continue
		}
		found = true
		raw, err := base64.StdEncoding.DecodeString(p.ArgsRaw)
		if err != nil {
			t.Fatalf("argsRaw: %v", err)
		}
		got := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
		if want := append([]string{"cat", "-"}, hostile...); !slices.Equal(got, want) || p.ArgsCut || p.ArgsBytes != len(raw) {
			t.Errorf("arguments are not complete: %d of %d arguments, %d bytes, cut %v", len(got), len(want), len(raw), p.ArgsCut)
		}
	}
	if !found {
		t.Fatal("the program was not told")
	}
	for i, c := range bytes.ReplaceAll(out, []byte("\n"), nil) {
		if c < 0x20 || c == 0x7f {
			t.Fatalf("byte %d of the JSON is the control character %#x", i, c)
		}
	}

	text, _ := events(t, act, "--format", "text", "--color", "never", "--kinds", "exec", "--name", "cat")
	if !bytes.Contains(text, []byte("spine-hostile")) {
		t.Fatal("the program is not in the text")
	}
	for i, r := range string(text) {
		switch {
		case r == '\n':
		case r < 0x20, r >= 0x7f && r < 0xa0, r == 0x200b, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069, r == 0xfffd:
			t.Fatalf("at byte %d the terminal gets %U", i, r)
		}
	}
	if n := bytes.Count(text, []byte("\n")); n > 1+strings.Count(string(text), " exec ") {
		t.Errorf("%d lines for %d events: a process made a line of its own", n, strings.Count(string(text), " exec "))
	}
}

package author

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the outputs in testdata anew")

// binary builds cmd/procession once.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "procession-author-")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-o", filepath.Join(dir, "procession"), "../../cmd/procession").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("go build: %v\n%s", err, out)
	}
	return dir, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, _ := binary(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

func built(t *testing.T) string {
	t.Helper()
	dir, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "procession")
}

// A script is a file of testdata: commands, one a line and each beginning with
// "$ ", then the files they see and, as the file named output, what they say.
type script struct {
	commands []string
	files    map[string]string
	names    []string
}

var section = regexp.MustCompile(`(?m)^-- (\S+) --\n`)

func parseScript(t *testing.T, text string) *script {
	t.Helper()
	s := &script{files: map[string]string{}}
	marks := section.FindAllStringSubmatchIndex(text, -1)
	if marks == nil {
		t.Fatal("the script has no files")
	}
	for line := range strings.Lines(text[:marks[0][0]]) {
		if c, ok := strings.CutPrefix(line, "$ "); ok {
			s.commands = append(s.commands, strings.TrimSuffix(c, "\n"))
		}
	}
	for i, m := range marks {
		end := len(text)
		if i+1 < len(marks) {
			end = marks[i+1][0]
		}
		name := text[m[2]:m[3]]
		s.files[name] = text[m[1]:end]
		s.names = append(s.names, name)
	}
	return s
}

// Each script is run with the real binary, in a folder with the script's
// files, and says what it said before.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	bin := built(t)
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txtar"), func(t *testing.T) {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			s := parseScript(t, string(text))
			dir := t.TempDir()
			for name, data := range s.files {
				if name == "output" {
					continue
				}
				if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var out strings.Builder
			for _, c := range s.commands {
				out.WriteString(run(t, bin, dir, c))
			}
			if *update {
				head, _, ok := strings.Cut(string(text), "-- output --\n")
				if !ok {
					t.Fatal("the script has no output")
				}
				if err := os.WriteFile(f, []byte(head+"-- output --\n"+out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(s.files["output"], out.String()); d != "" {
				t.Errorf("-want +got (go test -run Scripts -update ./internal/author writes it anew):\n%s", d)
			}
		})
	}
}

// run runs a command line. "procession < FILE" gives it standard input; other
// programs are not to be had.
func run(t *testing.T, bin, dir, line string) string {
	t.Helper()
	args, in, _ := strings.Cut(line, " < ")
	words := strings.Fields(args)
	if words[0] != "procession" {
		t.Fatalf("%q is not our command", line)
	}
	cmd := exec.CommandContext(t.Context(), bin, words[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TZ=America/New_York") // must not show
	if in != "" {
		data, err := os.ReadFile(filepath.Join(dir, in))
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdin = bytes.NewReader(data)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "$ %s\n%s", line, &stdout)
	for l := range strings.Lines(stderr.String()) {
		fmt.Fprintf(&b, "! %s\n", strings.TrimSuffix(l, "\n"))
	}
	fmt.Fprintf(&b, "[exit %d]\n", cmd.ProcessState.ExitCode())
	return b.String()
}

// On the PATH under another name it is a plugin of kubectl, and says so.
func TestKubectlPlugin(t *testing.T) {
	link := filepath.Join(t.TempDir(), "kubectl-procession")
	if err := os.Symlink(built(t), link); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"--help":                "kubectl procession policy    write detection policies",
		"policy --help":         "kubectl procession policy lint PATH...",
		"policy explain --help": "kubectl procession policy explain my-rules.yaml",
	} {
		out, err := exec.CommandContext(t.Context(), link, strings.Fields(args)...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) || strings.Contains(string(out), "{policy}") {
			t.Errorf("%s: %v, want %q in\n%s", args, err, want, out)
		}
	}
}

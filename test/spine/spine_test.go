package spine

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/testenv"
)

const root = "../.."

// binaries builds agent, collector and demo once and returns their folder,
// which has the layout of a checkout: bin/, hack/, deploy/.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "procession-spine-")
	if err != nil {
		return "", err
	}
	// As "make build" does it, so that its build cache serves.
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "bin")+"/", "./cmd/...", "./test/demo")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return dir, fmt.Errorf("%v: %v\n%s", cmd.Args, err, out)
	}
	for _, d := range []string{"hack", "deploy"} {
		abs, err := filepath.Abs(filepath.Join(root, d))
		if err != nil {
			return dir, err
		}
		if err := os.Symlink(abs, filepath.Join(dir, d)); err != nil {
			return dir, err
		}
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, _ := binaries(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

func built(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// freePort returns an address on loopback that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// An output keeps what a program writes, and can be waited on.
type output struct {
	mu   sync.Mutex
	out  bytes.Buffer
	wake chan struct{} // closed and renewed at each write
}

func newOutput() *output { return &output{wake: make(chan struct{})} }

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out.Write(b)
	close(o.wake)
	o.wake = make(chan struct{})
	return len(b), nil
}

func (o *output) text() (string, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.out.String(), o.wake
}

// A proc is a program under test: its output is kept, and is shown when the
// test fails.
type proc struct {
	*output
	t    *testing.T
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait, once done is closed
}

func start(t *testing.T, name string, cmd *exec.Cmd) *proc {
	t.Helper()
	p := &proc{output: newOutput(), t: t, name: name, cmd: cmd, done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = p
	}
	cmd.Stderr = p
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		select {
		case <-p.done:
		default:
			cmd.Process.Kill()
			<-p.done
		}
		if t.Failed() {
			text, _ := p.text()
			if len(text) > 8000 {
				text = text[:2000] + "\n...\n" + text[len(text)-6000:]
			}
			t.Logf("output of %s:\n%s", name, text)
		}
	})
	return p
}

// waitFor waits until the output contains s.
func (p *proc) waitFor(s string, limit time.Duration) {
	p.t.Helper()
	p.waitIn(p.output, s, limit)
}

// waitIn waits until one of its outputs contains s.
func (p *proc) waitIn(o *output, s string, limit time.Duration) {
	p.t.Helper()
	deadline := time.After(limit)
	for {
		text, more := o.text()
		if strings.Contains(text, s) {
			return
		}
		select {
		case <-more:
		case <-p.done:
			if text, _ := o.text(); !strings.Contains(text, s) {
				p.t.Fatalf("%s ended (%v) without printing %q", p.name, p.err, s)
			}
			return
		case <-deadline:
			p.t.Fatalf("%s did not print %q within %v", p.name, s, limit)
		}
	}
}

// stop sends sig and waits for the end.
func (p *proc) stop(sig syscall.Signal, limit time.Duration) error {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Fatal(err)
	}
	return p.wait(limit)
}

func (p *proc) wait(limit time.Duration) error {
	p.t.Helper()
	select {
	case <-p.done:
		return p.err
	case <-time.After(limit):
		p.t.Fatalf("%s did not end within %v", p.name, limit)
		return nil
	}
}

func exitCode(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// An alertLine is a line of the NDJSON file.
type alertLine struct {
	ID          string    `json:"id"`
	Type        string    `json:"type"`
	Time        time.Time `json:"time"`
	CommittedAt time.Time `json:"committedAt"`
	Severity    string    `json:"severity"`
	Rule        string    `json:"rule"`
	Message     string    `json:"message"`
	Node        string    `json:"node"`
	Kind        string    `json:"kind"`
	Place       string    `json:"place"`
	Process     procLine  `json:"process"`
	Aggregated  *struct{} `json:"aggregated"`
	raw         string
}

type procLine struct {
	PID       int32             `json:"pid"`
	PPID      *int32            `json:"ppid"`
	Exe       string            `json:"exe"`
	Name      string            `json:"name"`
	Args      []string          `json:"args"`
	Cwd       string            `json:"cwd"`
	UID       *uint32           `json:"uid"`
	EUID      *uint32           `json:"euid"`
	GID       *uint32           `json:"gid"`
	Sources   map[string]string `json:"sources"`
	Ancestors []procLine        `json:"ancestors"`
}

// lines reads the complete lines of an NDJSON file.
func lines(t *testing.T, file string) []alertLine {
	t.Helper()
	return decodeLines[alertLine](t, file)
}

func (a *alertLine) keep(raw string) { a.raw = raw }

func decodeLines[T any](t *testing.T, file string) []T {
	t.Helper()
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []T
	r := bufio.NewReader(f)
	for {
		b, err := r.ReadBytes('\n')
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		var a T
		if err := json.Unmarshal(b, &a); err != nil {
			t.Fatalf("line %d of %s is no JSON: %v\n%.300s", len(out)+1, file, err, b)
		}
		if k, ok := any(&a).(interface{ keep(string) }); ok {
			k.keep(string(b))
		}
		out = append(out, a)
	}
}

// eventually polls a condition that another process makes true.
func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestRunAndDemo is the first thing a user does: make run, make demo, Ctrl-C.
func TestRunAndDemo(t *testing.T) {
	dir := built(t)
	state := t.TempDir()
	cmd := exec.Command("hack/run.sh")
	cmd.Path = filepath.Join(dir, "hack", "run.sh")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PROCESSION_RUN="+state, "PROCESSION_LISTEN="+freePort(t), "PROCESSION_NODE=node-under-test")
	run := start(t, "run.sh", cmd)
	run.waitFor("listening", 60*time.Second)

	alerts := filepath.Join(state, "alerts.ndjson")
	eventually(t, "the alert file exists", 10*time.Second, func() bool { _, err := os.Stat(alerts); return err == nil })
	// Twice: what is done again soon must not be held back as a repeat.
	for _, more := range [][]string{nil, nil, {"--measure", "100"}} {
		demo := exec.Command(filepath.Join(dir, "bin", "demo"), append([]string{"--expect", alerts, "--wait", "20s"}, more...)...)
		out, err := demo.CombinedOutput()
		if err != nil {
			t.Fatalf("demo: %v\n%s", err, out)
		}
		if more != nil {
			t.Logf("%s", out)
		}
	}
	if err := run.stop(syscall.SIGINT, 30*time.Second); err != nil {
		t.Errorf("run.sh after Ctrl-C: %v", err)
	}

	seen := map[string]bool{}
	demos := 0
	var latencies []time.Duration
	for _, a := range lines(t, alerts) {
		if a.Kind == "Loss" {
			t.Errorf("a loss without a cause: %s", a.raw)
			continue
		}
		if seen[a.ID] {
			t.Errorf("alert %s is there twice", a.ID)
		}
		seen[a.ID] = true
		if !slices.ContainsFunc(a.Process.Ancestors, func(p procLine) bool { return p.PID == int32(os.Getpid()) }) {
			continue // what else runs on this machine
		}
		demos++
		checkAlert(t, a)
		if a.Aggregated == nil { // a sum of repeats is made when its window is over
			latencies = append(latencies, a.CommittedAt.Sub(a.Time))
		}
	}
	if want := 2*8 + 100; demos < want {
		t.Fatalf("got %d alerts of the demo, want at least %d", demos, want)
	}
	slices.Sort(latencies)
	t.Logf("kernel event to commit over %d alerts: p50 %v p99 %v max %v", len(latencies),
		latencies[len(latencies)/2], latencies[len(latencies)*99/100], latencies[len(latencies)-1])
	if p99 := latencies[len(latencies)*99/100]; p99 > time.Second {
		t.Errorf("kernel event to commit: p99 %v is above 1 s", p99)
	}
}

// checkAlert holds an alert to what a SOC analyst needs of it.
func checkAlert(t *testing.T, a alertLine) {
	t.Helper()
	bad := func(format string, args ...any) {
		t.Helper()
		t.Errorf("alert %s (%s): %s\n%.2000s", a.ID, a.Rule, fmt.Sprintf(format, args...), a.raw)
	}
	p := a.Process
	switch {
	case !strings.HasPrefix(a.ID, "local/node-under-test/"):
		bad("id is not cluster/node/epoch/seq")
	case a.Node != "node-under-test":
		bad("node %q", a.Node)
	case a.Severity == "" || a.Rule == "" || a.Message == "" || a.Kind == "" || a.Time.IsZero() || a.CommittedAt.IsZero():
		bad("severity, rule, message, kind, time or committedAt is missing")
	case p.PID == 0 || p.Exe == "" || len(p.Args) == 0 || p.Cwd == "":
		bad("pid, exe, args or cwd is missing")
	case p.UID == nil || p.EUID == nil || p.GID == nil:
		bad("ids are missing")
	case a.Place != "host" && a.Place != "container":
		bad("place %q", a.Place)
	case len(p.Ancestors) == 0:
		bad("no ancestors")
	case p.Ancestors[len(p.Ancestors)-1].PID != 1:
		bad("ancestors do not reach pid 1")
	}
	for _, anc := range p.Ancestors {
		if len(anc.Args) == 0 && anc.PID != 1 && anc.PID != 2 {
			bad("ancestor %d has no argv", anc.PID)
		}
	}
}

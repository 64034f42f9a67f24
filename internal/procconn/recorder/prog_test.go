//go:build linux

package recorder

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/testenv"
)

// buildProg gives the path of testdata/prog.c compiled, a program that lives for
// some 20 microseconds if it is told to do nothing. Where there is no compiler
// PROCESSION_TEST_HELPERS names the directory in which it is ready made.
func buildProg(t testing.TB) string {
	t.Helper()
	prog := filepath.Join(t.TempDir(), "prog")
	if dir := os.Getenv("PROCESSION_TEST_HELPERS"); dir != "" {
		b, err := os.ReadFile(filepath.Join(dir, "prog"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(prog, b, 0o755); err != nil {
			t.Fatal(err)
		}
		return prog
	}
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		testenv.Skip(t, "no C compiler: "+err.Error())
	}
	out, err := exec.Command(gcc, "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector",
		"-o", prog, filepath.Join("testdata", "prog.c")).CombinedOutput()
	if err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return prog
}

// A log keeps every record of a listener, and lets the test wait for one.
type log struct {
	mu   sync.Mutex
	more *sync.Cond
	recs []event.Record
}

func newLog() *log {
	l := &log{}
	l.more = sync.NewCond(&l.mu)
	return l
}

func (l *log) add(rec *event.Record) {
	l.mu.Lock()
	l.recs = append(l.recs, keep(rec))
	l.mu.Unlock()
	l.more.Broadcast()
}

// find waits for the first record that is asked for.
func (l *log) find(t testing.TB, what string, is func(*event.Record) bool) event.Record {
	t.Helper()
	late := false
	timer := time.AfterFunc(10*time.Second, func() {
		l.mu.Lock()
		late = true
		l.mu.Unlock()
		l.more.Broadcast()
	})
	defer timer.Stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 0; ; {
		for ; i < len(l.recs); i++ {
			if is(&l.recs[i]) {
				return l.recs[i]
			}
		}
		if late {
			t.Fatalf("no record of %s among %d", what, len(l.recs))
		}
		l.more.Wait()
	}
}

// of waits for the first record of a kind about a process.
func (l *log) of(t testing.TB, kind event.Kind, tgid int) event.Record {
	t.Helper()
	return l.find(t, fmt.Sprintf("%v of %d", kind, tgid), func(r *event.Record) bool {
		return r.Kind == kind && r.TGID == int32(tgid)
	})
}

// all are the records of a kind that pass.
func (l *log) all(kind event.Kind, is func(*event.Record) bool) []event.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []event.Record
	for i := range l.recs {
		if l.recs[i].Kind == kind && is(&l.recs[i]) {
			out = append(out, l.recs[i])
		}
	}
	return out
}

// A proc is a child of the test that waits for its standard input.
type proc struct {
	*exec.Cmd
	stdin io.WriteCloser
}

// start starts cmd with a pipe to its standard input.
func start(t testing.TB, cmd *exec.Cmd) *proc {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &proc{cmd, in}
	t.Cleanup(func() { p.end() })
	return p
}

// byte lets the program go on from one "r".
func (p *proc) byte(t testing.TB) {
	t.Helper()
	if _, err := p.stdin.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
}

// end closes standard input and waits.
func (p *proc) end() *os.ProcessState {
	p.stdin.Close()
	p.Wait()
	return p.ProcessState
}

// spin keeps both CPUs busy until the test ends.
func spin(t testing.TB, prog string, n int) {
	t.Helper()
	for range n {
		cmd := exec.Command(prog, "k")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
	}
}

// argv is how arguments lie in memory.
func argv(args ...string) []byte {
	var b bytes.Buffer
	for _, a := range args {
		b.WriteString(a)
		b.WriteByte(0)
	}
	return b.Bytes()
}

// procStart is the start time in /proc/PID/stat, in clock ticks.
func procStart(t testing.TB, pid int) uint64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	var n uint64
	if _, err := fmt.Sscan(string(f[19]), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// sameStart says whether a start time in ns is the one that /proc shows.
func sameStart(t testing.TB, ns uint64, pid int) bool {
	t.Helper()
	const ticksPerSecond = 100 // USER_HZ
	return ns/(uint64(time.Second)/ticksPerSecond) == procStart(t, pid)
}

// newCgroup makes a cgroup with the given levels in the hierarchy that is
// recorded, and gives its directory.
func newCgroup(t testing.TB, r *Recorder, levels ...string) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var dir string
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		v1 := f[2] == "cgroup" && slices.Contains(strings.Split(f[3], ","), "memory")
		if v1 || f[2] == "cgroup2" && !r.Features().CgroupV1 {
			dir = f[1]
		}
	}
	if dir == "" {
		testenv.Skip(t, "the cgroup hierarchy is not mounted")
	}
	return testenv.Cgroup(t, dir, strings.Join(levels, "/"))
}

// procCgroup is the cgroup of a living process as /proc shows it.
func procCgroup(t testing.TB, r *Recorder, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if r.Features().CgroupV1 && slices.Contains(strings.Split(f[1], ","), "memory") || !r.Features().CgroupV1 && f[0] == "0" {
			return f[2]
		}
	}
	t.Fatalf("no cgroup of %d in %q", pid, b)
	return ""
}

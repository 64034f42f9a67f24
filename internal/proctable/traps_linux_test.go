package proctable

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/testenv"
)

// startWaiting starts a process that goes on until its standard input ends,
// which letGo brings about, and waits for.
func startWaiting(t *testing.T, cmd *exec.Cmd) (pid int32, letGo func()) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	letGo = sync.OnceFunc(func() {
		in.Close()
		cmd.Wait()
	})
	t.Cleanup(letGo)
	return int32(cmd.Process.Pid), letGo
}

// seen is how many events were told so far.
func (w *watcher) seen() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.sights)
}

// expect says whether exactly these events of a process were told, in this
// order, after the first from of all. The fall-back, which reads several
// sockets, counts what came too late to be put in order.
func (w *watcher) expect(from int, pid int32, want ...string) {
	w.Helper()
	var got []string
	w.mu.Lock()
	for _, s := range w.sights[from:] {
		if s.process.PID == pid {
			got = append(got, s.kind.Short())
		}
	}
	w.mu.Unlock()
	if w.conn.Stats().Late > 0 {
		slices.Sort(got)
		slices.Sort(want)
	}
	if !slices.Equal(got, want) {
		w.Errorf("events of %d: %q, want %q", pid, got, want)
	}
}

// The kernel tells the beginning and end of a thread as it does a process's.
func testThreads(t *testing.T, w *watcher) {
	from := w.seen()
	pid := run(t, command("threads"))
	w.find("exit", about(event.Exit, pid))
	w.expect(from, pid, "fork", "exec", "exit")
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sights[from:] {
		if s.process.PPID == pid {
			t.Errorf("a thread is taken for a process: %s of %s", s.kind, s.lineage)
		}
	}
}

// What was true at exec stays so: /proc says "(deleted)" afterwards.
func testUnlinked(t *testing.T, w *watcher) {
	path := filepath.Join(t.TempDir(), "cat")
	b, err := os.ReadFile("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, string(b))
	pid, letGo := startWaiting(t, exec.Command(path))
	ex := w.find("exec", about(event.Exec, pid))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if now, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil || now != path+" (deleted)" {
		t.Errorf("/proc says %q, %v", now, err)
	}
	letGo()
	for _, s := range []sight{ex, w.find("exit", about(event.Exit, pid))} {
		if p := s.process; w.has(p, event.FieldExe) && (p.Exe != path || p.Marks.Has(event.MarkDeleted)) {
			t.Errorf("%s: exe %q, marks %b", s.kind, p.Exe, p.Marks)
		}
	}
}

// Only what a process was started with counts, not what it writes over it.
func testRewrittenArgv(t *testing.T, w *watcher) {
	cmd := command("rewrite-argv", "secret-4711", "more")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	pid, letGo := startWaiting(t, cmd)
	w.find("exec", about(event.Exec, pid))
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || strings.Contains(string(b), "secret") {
		t.Fatalf("/proc says %q, %v: nothing was rewritten", b, err)
	}
	letGo()
	for _, k := range []event.Kind{event.Exec, event.Exit} {
		if p := w.find(k.Short(), about(k, pid)).process; w.has(p, event.FieldArgs) && p.Cmdline != "role\x00secret-4711\x00more\x00" {
			t.Errorf("%s: args %q", k, p.Cmdline)
		}
	}
}

func testFailedExec(t *testing.T, w *watcher) {
	from := w.seen()
	pid := run(t, command("exec-fails"))
	w.find("exit", about(event.Exit, pid))
	w.expect(from, pid, "fork", "exec", "exit")
}

// The kernel's message repeats the real and effective id, which stay.
func testSavedID(t *testing.T, w *watcher) {
	pid, letGo := startWaiting(t, command("only-saved-id"))
	s := w.find("id change", about(event.UIDChange, pid))
	letGo()
	if want := (event.IDs{SUID: 1000}); !s.known || s.before != (event.IDs{}) || s.process.IDs != want {
		t.Errorf("%+v (%t) -> %+v", s.before, s.known, s.process.IDs)
	}
}

// Ids are those of the first pid namespace; the process's own is a fact of it.
func testPidNamespace(t *testing.T, w *watcher) {
	cmd := exec.Command("/bin/true", "as-1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	pid := run(t, cmd)
	p := w.find("exec", about(event.Exec, pid)).process
	if p.PPID != int32(os.Getpid()) {
		t.Errorf("parent %d", p.PPID)
	}
	var ours unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &ours); err != nil {
		t.Fatal(err)
	}
	if w.exact && (p.InnerPID != 1 || p.NS.PID == 0 || uint64(p.NS.PID) == ours.Ino) {
		t.Errorf("inside it has pid %d, in namespace %d; ours is %d", p.InnerPID, p.NS.PID, ours.Ino)
	}
}

// cgroupRoot is the mounted hierarchy whose path is a process's Cgroup.
func cgroupRoot(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	v2 := ""
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		switch {
		case f[2] == "cgroup" && slices.Contains(strings.Split(f[3], ","), "memory"):
			return f[1]
		case f[2] == "cgroup2":
			v2 = f[1]
		}
	}
	if v2 == "" {
		testenv.Skip(t, "no cgroup hierarchy is mounted")
	}
	return v2
}

// A runtime moves a process after its fork, and there is no event for it: the
// cgroup counts as it is at exec.
func testMovedCgroup(t *testing.T, w *watcher) {
	name := fmt.Sprintf("procession-proctable-%d", os.Getpid())
	dir := testenv.Cgroup(t, cgroupRoot(t), name+"/inner")
	pid, letGo := startWaiting(t, command("exec-when-told"))
	before := w.find("first exec", about(event.Exec, pid)).process
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Appendln(nil, pid), 0); err != nil {
		testenv.Skip(t, "a process cannot be moved: "+err.Error())
	}
	letGo()
	after := w.find("second exec", withArg(pid, "moved")).process
	if w.has(before, event.FieldCgroup) && strings.Contains(before.Cgroup, name) {
		t.Errorf("before: %q", before.Cgroup)
	}
	if w.has(after, event.FieldCgroup) && !strings.HasSuffix(after.Cgroup, "/"+name+"/inner") {
		t.Errorf("after: %q", after.Cgroup)
	}
	if exit := w.find("exit", about(event.Exit, pid)).process; w.has(after, event.FieldCgroup) && exit.Cgroup != after.Cgroup {
		t.Errorf("at the end: %q", exit.Cgroup)
	}
}

// Whatever the CPUs were on which they happened, a process's events come in
// their order.
func testOrder(t *testing.T, w *watcher) {
	from := w.seen()
	var wg sync.WaitGroup
	pids := make(chan int32, 200)
	for range 4 {
		wg.Go(func() {
			for range cap(pids) / 4 {
				cmd := exec.Command("/bin/true", "in-order")
				if err := cmd.Run(); err != nil {
					t.Error(err)
					return
				}
				pids <- int32(cmd.Process.Pid)
			}
		})
	}
	wg.Wait()
	close(pids)
	last := run(t, exec.Command("/bin/true", "last"))
	w.find("last exit", about(event.Exit, last))
	for pid := range pids {
		w.find("exit", about(event.Exit, pid))
		w.expect(from, pid, "fork", "exec", "exit")
	}
}

// TestKernelLateStart: processes begin and end while the agent starts. Heard
// first, scanned then, and applied last, nobody is missing and nobody who ended
// is taken for alive.
func TestKernelLateStart(t *testing.T) {
	for _, m := range []procconn.Mode{procconn.Require, procconn.Off} {
		t.Run(string(m), func(t *testing.T) {
			const long, short = 30, 90
			begun, ended := make(chan int32, long), make(chan int32, short)
			storming := make(chan bool)
			var wg sync.WaitGroup
			wg.Go(func() {
				for i := range long {
					cmd := exec.Command("/bin/cat", "-", fmt.Sprintf("stays-%d", i))
					in, err := cmd.StdinPipe()
					if err == nil {
						err = cmd.Start()
					}
					if err != nil {
						t.Error(err)
						return
					}
					t.Cleanup(func() {
						in.Close()
						cmd.Wait()
					})
					begun <- int32(cmd.Process.Pid)
					if i == 3 {
						close(storming)
					}
				}
			})
			wg.Go(func() {
				for range short {
					cmd := exec.Command("/bin/true")
					if err := cmd.Run(); err != nil {
						t.Error(err)
					}
					ended <- int32(cmd.Process.Pid)
				}
			})
			<-storming
			w := watchKernel(t, m, Config{})
			wg.Wait()
			last := run(t, exec.Command("/bin/true", "last"))
			w.find("last exit", about(event.Exit, last))
			w.stop()
			close(begun)
			close(ended)
			for pid := range begun {
				if p := w.tab.Lookup(pid); p == nil || p.Exited || !strings.Contains(lineage(p), self()) {
					t.Errorf("process %d is missing: %+v", pid, p)
				} else if w.exact && !strings.HasPrefix(p.Cmdline, "/bin/cat\x00-\x00stays-") {
					t.Errorf("process %d: args %q", pid, p.Cmdline)
				}
			}
			for pid := range ended {
				if p := w.tab.Lookup(pid); p != nil && !p.Exited {
					t.Errorf("process %d is a ghost: %+v", pid, p)
				}
			}
		})
	}
}

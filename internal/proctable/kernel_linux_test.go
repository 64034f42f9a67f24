package proctable

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/procfs"
	"github.com/procession-dev/procession/internal/testenv"
)

// role makes the test binary play a process to watch, instead of testing.
const role = "PROCTABLE_TEST_ROLE"

func init() {
	if os.Getenv(role) != "" {
		runtime.LockOSThread() // main runs on the first thread
	}
}

func TestMain(m *testing.M) {
	name := os.Getenv(role)
	if name == "" {
		os.Exit(m.Run())
	}
	play, ok := roles[name]
	if !ok {
		panic("no role " + name)
	}
	// Nothing that goes wrong in a role outlives the tests for long.
	time.AfterFunc(time.Minute, func() { os.Exit(8) })
	play()
	os.Exit(7)
}

var roles = map[string]func(){
	"nothing": func() {},
	"wait":    func() { os.Stdin.Read(make([]byte, 1)) },
	"exec-by-thread": func() {
		go func() {
			runtime.LockOSThread()
			become("nothing", "by-thread")
		}()
		select {}
	},
	"first-thread-ends-then-exec": func() {
		go func() {
			runtime.LockOSThread()
			untilZombie(os.Getpid())
			become("nothing", "by-survivor")
		}()
		unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	},
	"first-thread-ends": func() {
		go func() {
			runtime.LockOSThread()
			os.Stdin.Read(make([]byte, 1))
			os.Exit(3)
		}()
		unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	},
	"exec-twice": func() { become("nothing", "second") },
	"clone-parent": func() {
		_, err := syscall.ForkExec("/proc/self/exe", []string{"cloned"}, &syscall.ProcAttr{
			Env: playing("nothing"), Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_PARENT},
		})
		check(err)
	},
	"setresuid-threads": func() {
		for range 3 {
			go func() {
				runtime.LockOSThread()
				select {}
			}()
		}
		check(syscall.Setresuid(1000, 1001, 0)) // in all threads, as the C library does it
	},
	"setresuid-one-thread": func() {
		done := make(chan bool)
		go func() {
			runtime.LockOSThread()
			unix.RawSyscall(unix.SYS_SETRESUID, 1000, 1001, 0)
			done <- true
		}()
		<-done
	},
	"threads": func() {
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(runtime.LockOSThread) // the thread ends with the goroutine
		}
		wg.Wait()
	},
	"rewrite-argv": func() {
		for _, a := range os.Args[1:] { // they lie where the kernel has put them
			clear(unsafe.Slice(unsafe.StringData(a), len(a)))
		}
		fmt.Println("done")
		os.Stdin.Read(make([]byte, 1))
	},
	"exec-fails": func() {
		if syscall.Exec("/nonexistent", []string{"x"}, nil) == nil || syscall.Exec("/proc/self/status", []string{"x"}, nil) == nil {
			panic("came back from an exec")
		}
	},
	"only-saved-id": func() {
		keep := ^uintptr(0)
		unix.RawSyscall(unix.SYS_SETRESUID, keep, keep, 1000)
		os.Stdin.Read(make([]byte, 1))
	},
	"exec-when-told": func() {
		os.Stdin.Read(make([]byte, 1))
		become("nothing", "moved")
	},
	"generations": func() {
		n, err := strconv.Atoi(os.Args[1])
		check(err)
		if n > 0 {
			cmd := command("generations", strconv.Itoa(n-1))
			check(cmd.Start())
		}
	},
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// become runs the test binary anew in this process. The first thread may be
// gone, and /proc/self/exe with it.
func become(name string, args ...string) {
	check(syscall.Exec("/proc/thread-self/exe", append([]string{"become"}, args...), playing(name)))
}

// playing is the environment of a process in a role. The role this process has
// itself must go: of two values the first counts, and a role that starts itself
// anew never ends.
func playing(name string) []string {
	env := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, role+"=") })
	return append(env, role+"="+name)
}

func untilZombie(pid int) {
	fs, err := procfs.New("")
	check(err)
	for st := (procfs.Stat{}); !st.Exiting(); runtime.Gosched() {
		check(fs.Stat(int32(pid), &st))
	}
}

// command runs the test binary in a role.
func command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "role"
	cmd.Env = playing(name)
	return cmd
}

// run runs cmd to its end and returns its pid.
func run(t *testing.T, cmd *exec.Cmd) int32 {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() == 2 {
		t.Fatalf("%q: %v: %s", cmd.Args, err, out.Bytes())
	}
	return int32(cmd.Process.Pid)
}

// sight is an event as it was reported.
type sight struct {
	kind    event.Kind
	process event.Process
	lineage string
	parents []event.Process
	before  event.IDs
	known   bool // before is
	thread  int32
	dur     time.Duration
}

// watcher is a table fed by the kernel of this machine.
type watcher struct {
	*testing.T
	tab    *Table
	conn   *procconn.Conn
	mu     sync.Mutex
	sights []sight
	from   int       // of sights: those before are of no interest any more
	more   chan bool // one in it after each event
	lost   uint64
	ev     event.Event
	ticks  bool
	exact  bool   // the recorder misses nothing
	stop   func() // ends the watch: tab may be looked at then
}

// has says whether a fact is there to be checked. It may be missing in the
// fall-back, where /proc is read when the process may be gone.
func (w *watcher) has(p event.Process, f event.Field) bool {
	w.Helper()
	if !p.Has(f) && w.exact {
		w.Errorf("process %d (%s): no %v", p.PID, p.Name, f)
	}
	return p.Has(f)
}

func (w *watcher) Record(r *event.Record) {
	if !w.tab.Apply(r, &w.ev) {
		return
	}
	s := sight{
		kind: w.ev.Kind, process: *w.ev.Process, lineage: lineage(w.ev.Process), before: w.ev.Before,
		known: w.ev.HasBefore, thread: r.PID, dur: w.ev.Duration,
	}
	for a := w.ev.Process.Parent; a != nil; a = a.Parent {
		s.parents = append(s.parents, *a)
	}
	w.mu.Lock()
	w.sights = append(w.sights, s)
	w.mu.Unlock()
	select {
	case w.more <- true:
	default:
	}
}

func (w *watcher) Lost(l procconn.Loss) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lost += l.Count
}

func (w *watcher) Idle() {
	if w.ticks {
		w.tab.Tick(w.tab.now())
	}
}

// find waits for the event about a process that ok accepts.
func (w *watcher) find(what string, ok func(*sight) bool) (found sight) {
	w.Helper()
	w.until(what, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		i := slices.IndexFunc(w.sights[w.from:], func(s sight) bool { return ok(&s) })
		if i >= 0 {
			found = w.sights[w.from+i]
		}
		return i >= 0
	})
	return found
}

// until looks at the events after each new one, until ok.
func (w *watcher) until(what string, ok func() bool) {
	w.Helper()
	for late := time.After(20 * time.Second); !ok(); {
		select {
		case <-w.more:
		case <-late:
			w.Fatalf("no event: %s", what)
		}
	}
}

// of are all events so far about a process.
func (w *watcher) of(pid int32, kinds ...event.Kind) (found []sight) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sights[w.from:] {
		if s.process.PID == pid && slices.Contains(kinds, s.kind) {
			found = append(found, s)
		}
	}
	return found
}

func about(k event.Kind, pid int32) func(*sight) bool {
	return func(s *sight) bool { return s.kind == k && s.process.PID == pid }
}

func withArg(pid int32, arg string) func(*sight) bool {
	return func(s *sight) bool {
		return s.kind == event.Exec && s.process.PID == pid && strings.Contains(s.process.Cmdline, arg)
	}
}

// watchKernel subscribes, scans and then applies what comes, as the agent does.
func watchKernel(t *testing.T, m procconn.Mode, c Config) *watcher {
	t.Helper()
	testenv.Root(t)
	conn, err := procconn.Open(t.Context(), procconn.Config{Recorder: m, Cwd: true, DrainInterval: time.Millisecond})
	testenv.SkipOn(t, err, procconn.ErrNotSupported, procconn.ErrPermission)
	fs, err := procfs.New("")
	if err != nil {
		t.Fatal(err)
	}
	c.FS = fs
	w := &watcher{T: t, conn: conn, more: make(chan bool, 1), ticks: c.ExitGrace != 0, exact: m == procconn.Require}
	if w.tab, err = New(c); err != nil {
		t.Fatal(err)
	}
	if n, err := w.tab.Scan(); err != nil || n < 2 {
		t.Fatalf("Scan() = %d, %v", n, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- conn.Run(ctx, w) }()
	w.stop = sync.OnceFunc(func() {
		stop()
		if err := errors.Join(<-done, conn.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		w.stop()
		if !t.Failed() {
			checkTable(t, w.tab)
		}
		fs.Close()
	})
	return w
}

// TestKernel plays the traps of process events on the kernel of this machine.
func TestKernel(t *testing.T) {
	for _, m := range []procconn.Mode{procconn.Require, procconn.Off} {
		name := map[procconn.Mode]string{procconn.Require: "recorder", procconn.Off: "fallback"}[m]
		t.Run(name, func(t *testing.T) {
			w := watchKernel(t, m, Config{})
			for _, c := range []struct {
				name string
				test func(t *testing.T, w *watcher)
			}{
				{"vfork", testVfork},
				{"exec by a thread", testExecByThread},
				{"first thread ends", testFirstThreadEnds},
				{"double exec", testDoubleExec},
				{"clone parent", testCloneParent},
				{"script", testScript},
				{"memfd", testMemfd},
				{"deleted", testDeleted},
				{"empty argv", testEmptyArgv},
				{"long argv", testLongArgv},
				{"set-uid program", testSetUID},
				{"ids of all threads", testThreadIDs},
				{"ids of one thread", testOneThreadIDs},
				{"generations", testGenerations},
				{"pid reuse", testPidReuse},
				{"threads begin and end", testThreads},
				{"unlinked while it runs", testUnlinked},
				{"argv rewritten", testRewrittenArgv},
				{"exec that fails", testFailedExec},
				{"only the saved id", testSavedID},
				{"own pid namespace", testPidNamespace},
				{"moved to another cgroup", testMovedCgroup},
				{"order", testOrder},
			} {
				t.Run(c.name, func(t *testing.T) {
					// Pids come back, on a busy machine soon: what was
					// before is about others.
					w.T, w.from = t, w.seen()
					c.test(t, w)
				})
			}
			w.T = t
			if w.lost != 0 {
				t.Errorf("%d events lost", w.lost)
			}
		})
	}
}

// self is how every lineage goes on above a process the test starts.
func self() string { return fmt.Sprintf(" < %d:%s", os.Getpid(), filepath.Base(os.Args[0])) }

func testVfork(t *testing.T, w *watcher) {
	pid := run(t, exec.Command("/bin/true", "vforked")) // os/exec makes a vfork
	fork, ex, exit := w.find("fork", about(event.Fork, pid)), w.find("exec", about(event.Exec, pid)), w.find("exit", about(event.Exit, pid))
	if !strings.Contains(fork.lineage, self()) || !strings.Contains(ex.lineage, self()) || !strings.Contains(exit.lineage, self()) {
		t.Errorf("lineages: %s; %s; %s", fork.lineage, ex.lineage, exit.lineage)
	}
	if last := ex.parents[len(ex.parents)-1]; last.PID != 1 && last.PPID != 0 {
		t.Errorf("lineage ends before the first process: %s", ex.lineage)
	}
	if w.has(ex.process, event.FieldArgs) && ex.process.Cmdline != "/bin/true\x00vforked\x00" {
		t.Errorf("args %q", ex.process.Cmdline)
	}
	if exit.process.Cmdline != ex.process.Cmdline || exit.dur <= 0 || exit.dur > 20*time.Second {
		t.Errorf("exit: %q after %v", exit.process.Cmdline, exit.dur)
	}
}

func testExecByThread(t *testing.T, w *watcher) {
	pid := run(t, command("exec-by-thread"))
	ex := w.find("second exec", withArg(pid, "by-thread"))
	if ex.process.Exited || ex.process.Execs != 2 || !strings.Contains(ex.lineage, self()) {
		t.Errorf("%s, %+v", ex.lineage, ex.process)
	}
	w.find("last exit", func(s *sight) bool { return about(event.Exit, pid)(s) && s.process.Execs == 2 })
}

func testFirstThreadEnds(t *testing.T, w *watcher) {
	pid := run(t, command("first-thread-ends-then-exec"))
	ex := w.find("exec of the surviving thread", withArg(pid, "by-survivor"))
	if ex.process.Exited || ex.process.Execs != 2 || !strings.Contains(ex.lineage, self()) {
		t.Errorf("%s, %+v", ex.lineage, ex.process)
	}
	w.find("last exit", func(s *sight) bool { return about(event.Exit, pid)(s) && s.process.Execs == 2 })
	if n := len(w.of(pid, event.Exit)); n != 2 {
		t.Errorf("%d exits, want that of the first thread and that of the process", n)
	}
}

func testDoubleExec(t *testing.T, w *watcher) {
	pid := run(t, command("exec-twice", "first"))
	w.find("exit", about(event.Exit, pid))
	execs := w.of(pid, event.Exec)
	if len(execs) != 2 {
		t.Fatalf("%d execs", len(execs))
	}
	for i, want := range []string{"role\x00first\x00", "become\x00second\x00"} {
		if p := execs[i].process; w.has(p, event.FieldArgs) && p.Cmdline != want {
			t.Errorf("exec %d: %q, want %q", i+1, p.Cmdline, want)
		}
	}
}

func testCloneParent(t *testing.T, w *watcher) {
	pid := run(t, command("clone-parent"))
	ex := w.find("exec", func(s *sight) bool {
		return s.kind == event.Exec && strings.HasPrefix(s.process.Cmdline, "cloned") && strings.Contains(s.lineage, self())
	})
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(int(ex.process.PID), &status, 0, nil); err != nil {
		t.Errorf("the cloned process is not the test's child: %v", err)
	}
	if ex.process.PPID != int32(os.Getpid()) {
		t.Errorf("ppid %d, want %d", ex.process.PPID, os.Getpid())
	}
	// Only the recorder knows who made it.
	if byRecord := ex.process.Sources[event.FieldArgs] == event.SourceRecord; byRecord && ex.parents[0].PID != pid {
		t.Errorf("creator %d, want %d: %s", ex.parents[0].PID, pid, ex.lineage)
	}
}

func testScript(t *testing.T, w *watcher) {
	path := filepath.Join(t.TempDir(), "run.sh")
	writeFile(t, path, "#!/bin/sh -e\nexit 0\n")
	cmd := exec.Command(path, "one", "two")
	cmd.Args[0] = "lost"
	pid := run(t, cmd)
	p := w.find("exec", about(event.Exec, pid)).process
	sh, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	if w.has(p, event.FieldArgs) && p.Cmdline != "/bin/sh\x00-e\x00"+path+"\x00one\x00two\x00" {
		t.Errorf("args %q", p.Cmdline)
	}
	if w.has(p, event.FieldExe) && p.Exe != sh || w.has(p, event.FieldFile) && p.File != path {
		t.Errorf("exe %q, file %q", p.Exe, p.File)
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func testMemfd(t *testing.T, w *watcher) {
	fd, err := unix.MemfdCreate("evil", 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "evil")
	defer f.Close()
	b, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	cmd := exec.Command(path)
	cmd.Args[0] = "[kworker/0:1]"
	pid := run(t, cmd)
	p := w.find("exec", about(event.Exec, pid)).process
	if w.has(p, event.FieldExe) && (p.Exe != "/memfd:evil (deleted)" || !p.Marks.Has(event.MarkMemfd)) ||
		w.has(p, event.FieldArgs) && p.Cmdline != "[kworker/0:1]\x00" {
		t.Errorf("exe %q, args %q, marks %b", p.Exe, p.Cmdline, p.Marks)
	}
}

func copyTrue(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, string(b))
}

func testDeleted(t *testing.T, w *watcher) {
	dir := t.TempDir()
	path := filepath.Join(dir, "gone")
	copyTrue(t, path)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	os.Remove(path)
	pid := run(t, exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())))
	p := w.find("exec", about(event.Exec, pid)).process
	if w.has(p, event.FieldExe) && (p.Exe != path+" (deleted)" || !p.Marks.Has(event.MarkDeleted)) {
		t.Errorf("exe %q, marks %b", p.Exe, p.Marks)
	}
}

func testEmptyArgv(t *testing.T, w *watcher) {
	pid, err := syscall.ForkExec("/bin/true", []string{}, &syscall.ProcAttr{})
	if err != nil {
		testenv.Skip(t, "exec without arguments: "+err.Error())
	}
	syscall.Wait4(pid, nil, 0, nil)
	p := w.find("exec", about(event.Exec, int32(pid))).process
	if w.has(p, event.FieldArgs) && (p.Cmdline != "\x00" || p.CmdlineLen != 1) {
		t.Errorf("args %q (%d)", p.Cmdline, p.CmdlineLen)
	}
}

func testLongArgv(t *testing.T, w *watcher) {
	long := strings.Repeat("x", 50_000)
	cmd := command("wait", long, "end")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	pid := int32(cmd.Process.Pid)
	p := w.find("exec", about(event.Exec, pid)).process
	want := "role\x00" + long + "\x00end\x00"
	if p.Cmdline != want || p.Sources[event.FieldArgs] != event.SourceProc {
		t.Errorf("%d of %d bytes from %v, want %d", len(p.Cmdline), p.CmdlineLen, p.Sources[event.FieldArgs], len(want))
	}
}

func testSetUID(t *testing.T, w *watcher) {
	dir := t.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	path := filepath.Join(dir, "suid")
	copyTrue(t, path)
	if err := os.Chmod(path, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	var fs unix.Statfs_t
	if unix.Statfs(path, &fs) == nil && fs.Flags&unix.ST_NOSUID != 0 {
		testenv.Skip(t, "set-uid files have no effect in "+dir)
	}
	cmd := exec.Command(path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	pid := run(t, cmd)
	ex := w.find("exec", about(event.Exec, pid))
	if ex.process.UID != 65534 || ex.process.EUID != 0 {
		t.Errorf("exec: ids %+v", ex.process.IDs)
	}
	ids := w.of(pid, event.UIDChange)
	if len(ids) != 2 {
		t.Fatalf("%d id changes, want two: to nobody, and back by the program's file", len(ids))
	}
	if s := ids[0]; !s.known || s.before.UID != 0 || s.process.UID != 65534 {
		t.Errorf("first: %+v -> %+v", s.before, s.process.IDs)
	}
	if s := ids[1]; !s.known || s.before.EUID != 65534 || s.process.EUID != 0 || s.process.UID != 65534 {
		t.Errorf("second: %+v -> %+v", s.before, s.process.IDs)
	}
	if s := ids[1]; s.process.Exe == path || s.process.Execs != 0 {
		t.Errorf("the change comes before the exec, but shows %s", s.lineage)
	}
}

func testThreadIDs(t *testing.T, w *watcher) {
	before := w.tab.Stats().Repeats
	pid := run(t, command("setresuid-threads"))
	w.find("exit", about(event.Exit, pid))
	ids := w.of(pid, event.UIDChange)
	if len(ids) != 1 {
		t.Fatalf("%d id changes, want one for all threads", len(ids))
	}
	if s := ids[0]; !s.known || s.before.UID != 0 || s.process.UID != 1000 || s.process.EUID != 1001 || s.process.SUID != 0 {
		t.Errorf("%+v -> %+v", s.before, s.process.IDs)
	}
	if n := w.tab.Stats().Repeats - before; n < 3 {
		t.Errorf("%d repeats, want one for each further thread", n)
	}
}

func testOneThreadIDs(t *testing.T, w *watcher) {
	pid := run(t, command("setresuid-one-thread"))
	s := w.find("id change", about(event.UIDChange, pid))
	if s.thread == pid || !s.known || s.before.UID != 0 || s.process.UID != 1000 {
		t.Errorf("by thread %d: %+v -> %+v", s.thread, s.before, s.process.IDs)
	}
}

// Each generation starts the next and ends: the last one's lineage leads
// through all of them to the test.
func testGenerations(t *testing.T, w *watcher) {
	const n = 10
	run(t, command("generations", strconv.Itoa(n)))
	last := w.find("last generation", func(s *sight) bool {
		return s.kind == event.Exec && s.process.Cmdline == "role\x000\x00" && strings.Contains(s.lineage, self())
	})
	if len(last.parents) < n+2 {
		t.Fatalf("lineage: %s", last.lineage)
	}
	for i := range n {
		p := last.parents[i]
		if want := fmt.Sprintf("role\x00%d\x00", i+1); w.has(p, event.FieldArgs) && p.Cmdline != want {
			t.Errorf("ancestor %d: %q, want %q", i+1, p.Cmdline, want)
		}
	}
	if last.parents[n].PID != int32(os.Getpid()) {
		t.Errorf("lineage: %s", last.lineage)
	}
}

// testPidReuse makes the kernel give the same pid twice within a moment.
func testPidReuse(t *testing.T, w *watcher) {
	const next = "/proc/sys/kernel/ns_last_pid"
	for try := range 100 {
		first := run(t, exec.Command("/bin/true", "life-1", strconv.Itoa(try)))
		if err := os.WriteFile(next, []byte(strconv.Itoa(int(first)-1)), 0o644); err != nil {
			testenv.Skip(t, "pids cannot be chosen: "+err.Error())
		}
		cmd := exec.Command("/bin/sh", "-c", "/bin/true; :", "life-2", strconv.Itoa(try))
		if run(t, cmd) != first {
			continue // somebody else forked
		}
		w.until("second end", func() bool { return len(w.of(first, event.Exit)) == 2 })
		execs := w.of(first, event.Exec)
		if len(execs) != 2 {
			t.Fatalf("%d execs", len(execs))
		}
		a, b := execs[0].process, execs[1].process
		if a.Key() == b.Key() && a.StartExact || a.Execs != 1 || b.Execs != 1 {
			t.Errorf("one process for two:\n%+v\n%+v", a, b)
		}
		child := w.find("child of the second", func(s *sight) bool {
			return s.kind == event.Exec && len(s.parents) > 0 && s.parents[0].PID == first
		})
		if filepath.Base(child.parents[0].Exe) == "true" || !strings.Contains(child.lineage, self()) {
			t.Errorf("child: %s", child.lineage)
		}
		return
	}
	testenv.Skip(t, "no pid came back in 100 attempts")
}

// A process whose first thread ended is known as alive until it ends.
func TestKernelFirstThreadGone(t *testing.T) {
	w := watchKernel(t, procconn.Off, Config{ExitGrace: 20 * time.Millisecond})
	cmd := command("first-thread-ends", "goes-on")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := int32(cmd.Process.Pid)
	w.find("exit of the first thread", about(event.Exit, pid))
	until(t, "the process is known to go on", func() bool { return w.tab.Stats().LeaderExits > 0 })
	// It is known by name still when it does something.
	in.Close()
	cmd.Wait()
	remembered := func() bool { st := w.tab.Stats(); return st.Remembered > 0 }
	until(t, "everything that ended is forgotten", func() bool { return !remembered() })
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// After a loss a rescan of the real /proc finds what the table missed.
func TestKernelRescan(t *testing.T) {
	testenv.Root(t)
	fs, err := procfs.New("")
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	tab, err := New(Config{FS: fs})
	if err != nil {
		t.Fatal(err)
	}
	ends := command("wait", "ends")
	endsIn, _ := ends.StdinPipe()
	if err := ends.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := tab.Scan(); err != nil {
		t.Fatal(err)
	}
	endsIn.Close()
	ends.Wait()
	begins := command("wait", "begins")
	beginsIn, _ := begins.StdinPipe()
	if err := begins.Start(); err != nil {
		t.Fatal(err)
	}
	defer begins.Wait()
	defer beginsIn.Close()

	var told []string
	if err := tab.Rescan(func(ev *event.Event) {
		if !ev.Synthetic {
			t.Errorf("%s of %d is not marked as found by a scan", ev.Kind, ev.Process.PID)
		}
		if pid := int(ev.Process.PID); pid == ends.Process.Pid || pid == begins.Process.Pid {
			told = append(told, fmt.Sprintf("%s %q", ev.Kind.Short(), ev.Process.Cmdline))
		}
	}); err != nil {
		t.Fatal(err)
	}
	if len(told) != 3 || told[0] != `exit "role\x00ends\x00"` || told[1] != `fork "role\x00begins\x00"` || told[2] != `exec "role\x00begins\x00"` {
		t.Errorf("told: %q", told)
	}
	if p := tab.Lookup(int32(begins.Process.Pid)); !strings.Contains(lineage(p), self()) {
		t.Error(lineage(p))
	}
	checkTable(t, tab)
}

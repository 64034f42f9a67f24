//go:build linux

package recorder

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// each runs a test with both ways of reading the kernel.
func each(t *testing.T, cfg Config, test func(t *testing.T, r *Recorder)) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			cfg.ForceProbe = v.probe
			r := load(t, cfg)
			if !v.probe && !r.Features().TypedLoads {
				t.Skip("no typed loads here: " + r.Features().TypedRefused)
			}
			if v.probe && r.Features().TypedLoads {
				t.Fatal("typed loads in spite of ForceProbe")
			}
			test(t, r)
		})
	}
}

// Nothing that ran is missed, and each record is about the process it names:
// processes of 20 microseconds, with busy CPUs, in a cgroup like a container's
// and with ids of their own.
func TestEveryExec(t *testing.T) {
	each(t, Config{Cwd: true}, func(t *testing.T, r *Recorder) {
		n := 2000
		if !r.Features().TypedLoads {
			n = 500
		}
		if testing.Short() {
			n = 200
		}
		prog := buildProg(t)
		if err := os.Chmod(filepath.Dir(prog), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Dir(filepath.Dir(prog)), 0o755); err != nil {
			t.Fatal(err)
		}
		dir := newCgroup(t, r, fmt.Sprintf("kubepods-%d", os.Getpid()), "burstable", "pod8c2f3b1e-6a70-4d0e-9d39-30a5c3a40c33",
			strings.Repeat("0123456789abcdef", 4))
		l := newLog()
		ear := listen(t, r, l.add)
		spin(t, prog, runtime.NumCPU())

		cmd := exec.Command(prog, "r", "n", strconv.Itoa(n), prog)
		cmd.Dir = filepath.Dir(prog)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: 4321}}
		storm := start(t, cmd)
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(storm.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
		want := event.Record{Facts: event.Facts{
			IDs:    event.IDs{UID: 1234, GID: 4321, SUID: 1234, SGID: 4321, EUID: 1234, EGID: 4321, FSUID: 1234, FSGID: 4321},
			Comm:   []byte("prog"),
			Exe:    []byte(prog),
			File:   []byte(prog),
			Cwd:    []byte(cmd.Dir),
			Cgroup: []byte(procCgroup(t, r, storm.Process.Pid)),
			PPID:   int32(storm.Process.Pid),
		}}
		storm.byte(t)
		if st := storm.end(); !st.Success() {
			t.Fatal(st)
		}
		ear.close(t)

		parent := l.of(t, event.Exec, storm.Process.Pid)
		tags := map[string]bool{}
		for _, rec := range l.all(event.Exec, func(r *event.Record) bool { return r.PPID == want.PPID }) {
			if rec.Have&allExecFields != allExecFields {
				t.Fatalf("missing fields: have %b of %b", rec.Have, allExecFields)
			}
			arg := bytes.Split(rec.Cmdline, []byte{0})
			if len(arg) != 3 || string(arg[0]) != "tiny" || len(rec.Cmdline) != int(rec.CmdlineLen) {
				t.Fatalf("argv %q of %d bytes", rec.Cmdline, rec.CmdlineLen)
			}
			tags[string(arg[1])] = true
			if rec.IDs != want.IDs || rec.ParentStart != parent.Start || rec.Start < parent.Start || rec.CapEffective != 0 {
				t.Fatalf("wrong identity in %+v", rec.Facts)
			}
			for _, text := range []struct {
				name      string
				got, want []byte
			}{
				{"comm", rec.Comm, want.Comm}, {"exe", rec.Exe, want.Exe}, {"file", rec.File, want.File},
				{"cwd", rec.Cwd, want.Cwd}, {"cgroup", rec.Cgroup, want.Cgroup},
			} {
				if !bytes.Equal(text.got, text.want) {
					t.Fatalf("%s is %q, want %q", text.name, text.got, text.want)
				}
			}
		}
		for i := range n {
			if !tags[fmt.Sprintf("tag-%d", i)] {
				t.Fatalf("exec %d of %d is missing (%d recorded)", i, n, len(tags))
			}
		}
		if c := settled(t, r); c.Lost != 0 || c.Gap != 0 || c.Forged != 0 || r.Malformed() != 0 || uint64(ear.n) != c.Recorded {
			t.Fatalf("delivered %d, malformed %d, counters %+v", ear.n, r.Malformed(), c)
		}
		// The child of each fork is known from birth: pid and exact start.
		forks := map[event.Key]bool{}
		for _, f := range l.all(event.Fork, func(r *event.Record) bool { return r.TGID == want.PPID }) {
			forks[event.Key{PID: f.PeerTGID, Start: f.PeerStart}] = true
		}
		for _, rec := range l.all(event.Exec, func(r *event.Record) bool { return r.PPID == want.PPID }) {
			if !forks[event.Key{PID: rec.TGID, Start: rec.Start}] {
				t.Fatalf("no fork gave birth to %d of %d", rec.TGID, rec.Start)
			}
		}
	})
}

// allExecFields are the facts that an exec has on any kernel.
var allExecFields = event.FieldSet(event.FieldStart, event.FieldParent, event.FieldName, event.FieldExe, event.FieldFile,
	event.FieldArgs, event.FieldCwd, event.FieldIDs, event.FieldCaps, event.FieldCgroup, event.FieldNS, event.FieldSession,
	event.FieldNNP, event.FieldExeFile)

// A process that becomes another program at once: a reader of /proc would see
// the second program twice.
func TestDoubleExec(t *testing.T) {
	const n = 200
	r := load(t, Config{})
	prog := buildProg(t)
	l := newLog()
	ear := listen(t, r, l.add)
	second := prog + "2"
	if err := os.Link(prog, second); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(prog, "d", strconv.Itoa(n), prog, second)
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	ear.close(t)
	execs := map[int32][]event.Record{}
	for _, rec := range l.all(event.Exec, func(r *event.Record) bool { return r.PPID == int32(cmd.Process.Pid) }) {
		execs[rec.TGID] = append(execs[rec.TGID], rec)
	}
	seen := map[string]bool{}
	for pid, e := range execs {
		if len(e) != 2 {
			t.Fatalf("%d execs of %d", len(e), pid)
		}
		i, ok := strings.CutPrefix(string(bytes.Split(e[1].Cmdline, []byte{0})[0]), "first-")
		if !ok {
			t.Fatalf("second argv %q", e[1].Cmdline)
		}
		seen[i] = true
		if want := argv(prog, "x", second, "first-"+i, "tag-"+i); !bytes.Equal(e[0].Cmdline, want) || string(e[0].Exe) != prog {
			t.Errorf("first: %s %q, want %s %q", e[0].Exe, e[0].Cmdline, prog, want)
		}
		if want := argv("first-"+i, "tag-"+i); !bytes.Equal(e[1].Cmdline, want) || string(e[1].Exe) != second {
			t.Errorf("second: %s %q, want %s %q", e[1].Exe, e[1].Cmdline, second, want)
		}
	}
	if len(seen) != n {
		t.Errorf("%d double execs, want %d", len(seen), n)
	}
}

// What the other kinds say.
func TestKinds(t *testing.T) {
	each(t, Config{Kinds: event.KindSet(event.AllKinds()...)}, func(t *testing.T, r *Recorder) {
		prog := buildProg(t)
		l := newLog()
		listen(t, r, l.add)

		t.Run("exec", func(t *testing.T) {
			p := start(t, exec.Command(prog, "w", "tag"))
			e := l.of(t, event.Exec, p.Process.Pid)
			checkExec(t, r, p.Process.Pid, &e)
		})
		t.Run("exec with long arguments", func(t *testing.T) {
			long := strings.Repeat("x", 5000)
			p := start(t, exec.Command(prog, "w", long))
			e := l.of(t, event.Exec, p.Process.Pid)
			all := argv(prog, "w", long)
			if int(e.CmdlineLen) != len(all) || !bytes.Equal(e.Cmdline, all[:argsMax]) {
				t.Errorf("%d bytes of %d: %.64q; want %d of %d", len(e.Cmdline), e.CmdlineLen, e.Cmdline, argsMax, len(all))
			}
		})
		t.Run("exec with a long name", func(t *testing.T) {
			// As long as the kernel takes: PATH_MAX with its NUL.
			name := filepath.Dir(prog) + "/"
			name += strings.Repeat("./", (4095-len(name)-len("prog"))/2) + "prog"
			p := start(t, exec.Command(name, "w"))
			e := l.of(t, event.Exec, p.Process.Pid)
			if string(e.File) != name || string(e.Exe) != prog {
				t.Errorf("file %d bytes %.64q, exe %q", len(e.File), e.File, e.Exe)
			}
		})
		t.Run("exec by a thread", func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", "w", "from-a-thread")
			cmd.Env = append(os.Environ(), execFromThread+"="+prog)
			p := start(t, cmd)
			e := l.find(t, "exec by a thread", func(r *event.Record) bool {
				return r.Kind == event.Exec && r.TGID == int32(p.Process.Pid) && string(r.Exe) == prog
			})
			checkExec(t, r, p.Process.Pid, &e)
		})
		t.Run("fork", func(t *testing.T) {
			p := start(t, exec.Command(prog, "n", "1", prog, "tag"))
			p.end()
			f := l.of(t, event.Fork, p.Process.Pid)
			x := l.of(t, event.Exit, int(f.PeerTGID))
			if f.PeerPID != f.PeerTGID || f.RealParent != f.TGID || f.PeerStart == 0 || f.PeerStart != x.Start || f.PPID != int32(os.Getpid()) {
				t.Errorf("fork %+v of child %+v", f, x)
			}
		})
		t.Run("fork as a sibling", func(t *testing.T) {
			p := start(t, exec.Command(prog, "r", "c", "w"))
			p.byte(t)
			f := l.of(t, event.Fork, p.Process.Pid)
			var st unix.WaitStatus
			if _, err := unix.Wait4(int(f.PeerTGID), &st, 0, nil); err != nil {
				t.Fatal(err)
			}
			x := l.of(t, event.Exit, int(f.PeerTGID))
			if f.RealParent != int32(os.Getpid()) || f.PeerStart == 0 || f.PeerStart != x.Start || string(f.Comm) != "prog" {
				t.Errorf("fork %+v of %+v, want the creator, its parent %d and the child's start", f, x, os.Getpid())
			}
		})
		t.Run("exit", func(t *testing.T) {
			p := start(t, exec.Command(prog, "b", "100", "e", "42"))
			st := p.end()
			x := l.of(t, event.Exit, p.Process.Pid)
			e := l.of(t, event.Exec, p.Process.Pid)
			if event.ExitCode(x.Status) != 42 || event.Signal(x.Status) != 0 || x.ExitSignal != int32(unix.SIGCHLD) {
				t.Errorf("status %#x, signal to the parent %d", x.Status, x.ExitSignal)
			}
			if x.Start != e.Start || x.IDs != e.IDs || !bytes.Equal(x.Cgroup, e.Cgroup) || string(x.Comm) != "prog" {
				t.Errorf("exit %+v of another than exec %+v", x.Facts, e.Facts)
			}
			// The kernel's own sum counts by samples; ours may lack the last tick.
			used := st.UserTime() + st.SystemTime()
			if got := time.Duration(x.RunTime); got < used-50*time.Millisecond || got > used+50*time.Millisecond || got == 0 {
				t.Errorf("run time %v, want %v", got, used)
			}
			if got, want := int64(x.MaxRSS), st.SysUsage().(*syscall.Rusage).Maxrss<<10; got != want {
				t.Errorf("max rss %d, want %d", got, want)
			}
		})
		t.Run("killed", func(t *testing.T) {
			p := start(t, exec.Command(prog, "w"))
			l.of(t, event.Exec, p.Process.Pid)
			p.Process.Kill()
			p.end()
			if x := l.of(t, event.Exit, p.Process.Pid); event.Signal(x.Status) != int(unix.SIGKILL) {
				t.Errorf("status %#x", x.Status)
			}
		})
		t.Run("coredump", func(t *testing.T) {
			p := start(t, exec.Command(prog, "a"))
			p.end()
			c := l.of(t, event.CoreDump, p.Process.Pid)
			e := l.of(t, event.Exec, p.Process.Pid)
			if string(c.Exe) != prog || c.Start != e.Start || !bytes.Equal(c.Cgroup, e.Cgroup) || c.ExeFile != e.ExeFile {
				t.Errorf("core dump %+v of exec %+v", c.Facts, e.Facts)
			}
		})
		t.Run("uid and gid", func(t *testing.T) {
			p := start(t, exec.Command(prog, "u", "w"))
			u, g := l.of(t, event.UIDChange, p.Process.Pid), l.of(t, event.GIDChange, p.Process.Pid)
			if g.ID != 2000 || g.EID != 2001 || u.ID != 1000 || u.EID != 1001 {
				t.Errorf("gid %d %d, uid %d %d", g.ID, g.EID, u.ID, u.EID)
			}
			if want := (event.IDs{GID: 2000, EGID: 2001, SGID: 2002, FSGID: 2001}); g.IDs != want {
				t.Errorf("ids after the change of group %+v, want %+v", g.IDs, want)
			}
			if want := (event.IDs{UID: 1000, EUID: 1001, SUID: 1002, FSUID: 1001, GID: 2000, EGID: 2001, SGID: 2002, FSGID: 2001}); u.IDs != want {
				t.Errorf("ids after the change of user %+v, want %+v", u.IDs, want)
			}
			if g.CapEffective == 0 || u.CapEffective != 0 || u.CapPermitted != 0 {
				t.Errorf("capabilities %x, then %x", g.CapEffective, u.CapEffective)
			}
			if string(u.Exe) != prog || string(u.Comm) != "prog" || string(u.Cgroup) != procCgroup(t, r, p.Process.Pid) {
				t.Errorf("who: %s %s %s", u.Exe, u.Comm, u.Cgroup)
			}
		})
		t.Run("session", func(t *testing.T) {
			p := start(t, exec.Command(prog, "s", "w"))
			s := l.of(t, event.SessionChange, p.Process.Pid)
			if s.SID != s.TGID || string(s.Exe) != prog {
				t.Errorf("session %d of %d, %s", s.SID, s.TGID, s.Exe)
			}
		})
		t.Run("ptrace", func(t *testing.T) { testPtrace(t, l, prog) })
		t.Run("comm", func(t *testing.T) {
			p := start(t, exec.Command(prog, "m", "fifteen-letters-and-more", "w"))
			c := l.of(t, event.CommChange, p.Process.Pid)
			if string(c.Comm) != "fifteen-letters" || !sameStart(t, c.Start, p.Process.Pid) || c.PPID != int32(os.Getpid()) {
				t.Errorf("%q of %+v", c.Comm, c.Facts)
			}
		})
		t.Run("comm of another thread", func(t *testing.T) { testThreadComm(t, l) })
	})
}

// checkExec compares an exec's record with /proc, the process being alive.
func checkExec(t *testing.T, r *Recorder, pid int, e *event.Record) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &st); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		t.Fatal(err)
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		t.Fatal(err)
	}
	if string(e.Exe) != exe || !bytes.Equal(e.Cmdline, cmdline) || string(e.Cgroup) != procCgroup(t, r, pid) {
		t.Errorf("exe %s, argv %q, cgroup %s; want %s, %q, %s", e.Exe, e.Cmdline, e.Cgroup, exe, cmdline, procCgroup(t, r, pid))
	}
	f := e.ExeFile
	if f.Ino != st.Ino || unix.Mkdev(uint32(f.Dev>>20), uint32(f.Dev&0xfffff)) != st.Dev || uint32(f.Mode) != st.Mode ||
		f.UID != st.Uid || f.GID != st.Gid || uint64(f.Nlink) != uint64(st.Nlink) {
		t.Errorf("file %+v, want %+v", f, st)
	}
	if !sameStart(t, e.Start, pid) || !sameStart(t, e.ParentStart, os.Getpid()) || e.PPID != int32(os.Getpid()) {
		t.Errorf("start %d, parent %d started %d", e.Start, e.PPID, e.ParentStart)
	}
	for _, ns := range []struct {
		name string
		got  uint32
	}{{"pid", e.NS.PID}, {"mnt", e.NS.Mnt}, {"user", e.NS.User}, {"net", e.NS.Net}} {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns.name))
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%s:[%d]", ns.name, ns.got); link != want {
			t.Errorf("namespace %s, want %s", want, link)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	nnp := 0
	if e.NoNewPrivs {
		nnp = 1
	}
	for _, want := range []string{
		fmt.Sprintf("Name:\t%s\n", e.Comm),
		fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d\n", e.UID, e.EUID, e.SUID, e.FSUID),
		fmt.Sprintf("Gid:\t%d\t%d\t%d\t%d\n", e.GID, e.EGID, e.SGID, e.FSGID),
		fmt.Sprintf("CapPrm:\t%016x\n", e.CapPermitted),
		fmt.Sprintf("CapEff:\t%016x\n", e.CapEffective),
		fmt.Sprintf("Threads:\t%d\n", e.Threads),
		fmt.Sprintf("NoNewPrivs:\t%d\n", nnp),
		fmt.Sprintf("NSpid:\t%d\n", e.InnerPID),
		fmt.Sprintf("NSsid:\t%d\n", e.SID),
	} {
		if !bytes.Contains(status, []byte(want)) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	if e.Have.Has(event.FieldLogin) {
		for file, got := range map[string]uint32{"loginuid": e.LoginUID, "sessionid": e.AuditSession} {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file)); err == nil && string(b) != strconv.FormatUint(uint64(got), 10) {
				t.Errorf("%s %d, want %s", file, got, b)
			}
		}
	}
}

func testPtrace(t *testing.T, l *log, prog string) {
	p := start(t, exec.Command(prog, "w"))
	tracee := l.of(t, event.Exec, p.Process.Pid)
	// A tracer is a thread: all requests must come from the one that attached.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := syscall.PtraceAttach(p.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := syscall.Wait4(p.Process.Pid, nil, 0, nil); err != nil {
		t.Fatal(err)
	}
	if err := syscall.PtraceDetach(p.Process.Pid); err != nil {
		t.Fatal(err)
	}
	mine := func(kind event.Kind) event.Record {
		return l.find(t, kind.String(), func(r *event.Record) bool { return r.Kind == kind && r.PeerTGID == int32(p.Process.Pid) })
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []event.Kind{event.PtraceAttach, event.PtraceDetach} {
		rec := mine(kind)
		if rec.TGID != int32(os.Getpid()) || rec.PID != int32(unix.Gettid()) || string(rec.Exe) != self || !sameStart(t, rec.Start, os.Getpid()) {
			t.Errorf("%v: tracer %d/%d %s, want %d/%d %s", kind, rec.PID, rec.TGID, rec.Exe, unix.Gettid(), os.Getpid(), self)
		}
	}
	if rec := mine(event.PtraceAttach); rec.PeerStart != tracee.Start || rec.PeerPID != int32(p.Process.Pid) {
		t.Errorf("tracee %d of %d, want %d of %d", rec.PeerPID, rec.PeerStart, p.Process.Pid, tracee.Start)
	}
}

// testThreadComm renames a thread from another one of the process: the record is
// about the thread that has a new name. Kernels before 5.16 do not tell.
func testThreadComm(t *testing.T, l *log) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid, renamed := make(chan int), make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with its name
		tid <- unix.Gettid()
		<-renamed
	}()
	id := <-tid
	err := os.WriteFile(fmt.Sprintf("/proc/self/task/%d/comm", id), []byte("other-thread"), 0)
	close(renamed)
	if err != nil {
		t.Fatal(err)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	if major < 5 || major == 5 && minor < 16 {
		t.Skip("a kernel that does not tell")
	}
	rec := l.find(t, "comm", func(r *event.Record) bool { return r.Kind == event.CommChange && r.PID == int32(id) })
	if string(rec.Comm) != "other-thread" || rec.TGID != int32(os.Getpid()) || !sameStart(t, rec.Start, os.Getpid()) {
		t.Errorf("%q of %d", rec.Comm, rec.TGID)
	}
}

// execFromThread makes the test binary exec a program from another thread than
// the first, with its own arguments.
const execFromThread = "PROCESSION_TEST_EXEC_FROM_THREAD"

func init() { runtime.LockOSThread() } // TestMain runs on the first thread

func TestMain(m *testing.M) {
	if prog := os.Getenv(execFromThread); prog != "" {
		failed := make(chan error)
		go func() { failed <- syscall.Exec(prog, append([]string{prog}, os.Args[1:]...), nil) }()
		fmt.Fprintln(os.Stderr, <-failed)
		os.Exit(1)
	}
	runtime.UnlockOSThread()
	os.Exit(m.Run())
}

package procconn

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/procession-dev/procession/internal/event"
	"golang.org/x/sys/unix"
)

func is(k event.Kind, tgid int32) func(*event.Record) bool {
	return func(r *event.Record) bool { return r.Kind == k && r.TGID == tgid }
}

// TestEveryKind makes one event of each kind and looks at it.
func TestEveryKind(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		w := newWitness()
		watch(t, Config{Recorder: m, Cwd: true}, w)
		self := int32(os.Getpid())
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()

		cmd := child("ids", "one", "", "three")
		cmd.Dir = dir
		var uid event.Record
		pid := runChildWhile(t, cmd, func(pid int32) { uid = w.find(t, "setuid", is(event.UIDChange, pid)) })
		fork := w.find(t, "fork", func(r *event.Record) bool { return r.Kind == event.Fork && r.PeerTGID == pid })
		if fork.TGID != self || fork.PeerPID != pid || fork.RealParent != self {
			t.Errorf("fork: %d/%d of real parent %d made %d, want parent %d", fork.PID, fork.TGID, fork.RealParent, fork.PeerPID, self)
		}
		checkExec(t, w.find(t, "exec", is(event.Exec, pid)), execWant{
			exe: exe, args: "/proc/self/exe\x00one\x00\x00three\x00", cwd: dir, ppid: self,
		})
		if sid := w.find(t, "setsid", is(event.SessionChange, pid)); !sid.Have.Has(event.FieldSession) || sid.SID != pid || sid.TTY != 0 {
			t.Errorf("setsid: SID %d, TTY %d, have %b; want session %d", sid.SID, sid.TTY, sid.Have, pid)
		}
		comm := w.find(t, "comm", is(event.CommChange, pid))
		if string(comm.Comm) != oddName || comm.PID != pid {
			t.Errorf("comm: %q of %d, want %q of %d", comm.Comm, comm.PID, oddName, pid)
		}
		gid := w.find(t, "setgid", is(event.GIDChange, pid))
		if gid.ID != 1001 || gid.EID != 1002 || uid.ID != 1004 || uid.EID != 1005 {
			t.Errorf("ids: gid %d/%d, uid %d/%d", gid.ID, gid.EID, uid.ID, uid.EID)
		}
		want := event.IDs{UID: 1004, EUID: 1005, SUID: 1006, FSUID: 1005, GID: 1001, EGID: 1002, SGID: 1003, FSGID: 1002}
		if !uid.Have.Has(event.FieldIDs) || uid.IDs != want {
			t.Errorf("all ids after setuid (-want +got):\n%s", cmp.Diff(want, uid.IDs))
		}
		exit := w.find(t, "exit", is(event.Exit, pid))
		if event.ExitCode(exit.Status) != 7 || exit.ExitSignal != int32(unix.SIGCHLD) || exit.PPID != self {
			t.Errorf("exit: status %#x, signal to parent %d, parent %d", exit.Status, exit.ExitSignal, exit.PPID)
		}
	})
}

type execWant struct {
	exe, args, cwd string
	ppid           int32
}

// checkExec checks the facts both ways give. In the fall-back a fact may be
// missing, though not here, where the process lives for long.
func checkExec(t *testing.T, r event.Record, want execWant) {
	t.Helper()
	for _, f := range []event.Field{event.FieldStart, event.FieldParent, event.FieldName, event.FieldExe, event.FieldArgs,
		event.FieldCwd, event.FieldIDs, event.FieldCaps, event.FieldCgroup, event.FieldSession, event.FieldNNP, event.FieldExeFile} {
		if !r.Have.Has(f) {
			t.Errorf("exec: no %v", f)
		}
	}
	got := execWant{string(r.Exe), string(r.Cmdline), string(r.Cwd), r.PPID}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(execWant{})); d != "" {
		t.Errorf("exec (-want +got):\n%s", d)
	}
	var st unix.Stat_t
	if err := unix.Stat(want.exe, &st); err != nil {
		t.Fatal(err)
	}
	dev := uint64(unix.Major(st.Dev))<<20 | uint64(unix.Minor(st.Dev))
	if f := r.ExeFile; f.Dev != dev || f.Ino != st.Ino || uint32(f.Mode) != st.Mode || f.UID != st.Uid || uint64(f.Nlink) != uint64(st.Nlink) {
		t.Errorf("exec: file %+v, want device %#x, inode %d, mode %#o", r.ExeFile, dev, st.Ino, st.Mode)
	}
	if boot := r.Stamp + sinceBoot(); r.Start > boot || boot-r.Start > uint64(time.Minute) {
		t.Errorf("exec: started at %d, ran exec at %d", r.Start, boot)
	}
	if int(r.CmdlineLen) != len(r.Cmdline) || r.IDs != (event.IDs{}) || len(r.Cgroup) == 0 || r.Cgroup[0] != '/' {
		t.Errorf("exec: %d of %d bytes of arguments, ids %+v, cgroup %q", len(r.Cmdline), r.CmdlineLen, r.IDs, r.Cgroup)
	}
}

func TestSignalsAndTraces(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		w := newWitness()
		watch(t, Config{Recorder: m}, w)

		sh := func(script string) int32 {
			cmd := exec.Command("/bin/sh", "-c", script)
			cmd.Dir = t.TempDir() // for the core
			return runChild(t, cmd)
		}
		pid := sh("kill -TERM $$")
		if r := w.find(t, "exit by SIGTERM", is(event.Exit, pid)); event.Signal(r.Status) != int(unix.SIGTERM) {
			t.Errorf("exit by SIGTERM: status %#x", r.Status)
		}
		pid = sh("ulimit -c 0; kill -SEGV $$")
		if r := w.find(t, "core dump", is(event.CoreDump, pid)); r.PPID != int32(os.Getpid()) {
			t.Errorf("core dump: parent %d, want %d", r.PPID, os.Getpid())
		}
		if r := w.find(t, "exit by SIGSEGV", is(event.Exit, pid)); event.Signal(r.Status) != int(unix.SIGSEGV) {
			t.Errorf("exit by SIGSEGV: status %#x", r.Status)
		}

		tracer := runChild(t, child("tracer"))
		attach := w.find(t, "ptrace attach", is(event.PtraceAttach, tracer))
		detach := w.find(t, "ptrace detach", func(r *event.Record) bool {
			return r.Kind == event.PtraceDetach && r.PeerTGID == attach.PeerTGID
		})
		if m == Off {
			tracer = 0 // the message of a detach does not name him
		}
		if detach.TGID != tracer {
			t.Errorf("ptrace detach by %d, want %d", detach.TGID, tracer)
		}
		w.find(t, "exit of the tracee", is(event.Exit, attach.PeerTGID))
	})
}

// TestShortProcesses: the arguments and the program of 2,000 processes that
// live for less than a millisecond, seen both ways at the same time.
func TestShortProcesses(t *testing.T) {
	n, part := 2000, 0.97
	if testing.Short() { // in an emulator, whose CPUs wake each other up late
		n, part = 200, 0.75
	}
	// Whether the fall-back wins its race is also up to who else wants a CPU at
	// that moment; it must be able to. "make proof" takes the median.
	for try := 1; ; try++ {
		short := shortOf(shortProcesses(t, n, part, Config{Recorder: Auto}, Config{Recorder: Off}))
		if short == "" {
			return
		}
		if try == 3 {
			t.Fatal(short)
		}
		t.Logf("try %d: %s", try, short)
	}
}

func shortOf(tallies []*tally) string {
	for _, y := range tallies {
		if y.short != "" {
			return y.short
		}
	}
	return ""
}

// TestShortProcessesBusy: the fall-back's readers do not wait for Go, neither while
// the agent computes on every CPU nor while the garbage collector stops the world
// again and again. Readers that need a P for each process see 40 in 100.
func TestShortProcessesBusy(t *testing.T) {
	part := 0.97
	if testing.Short() { // in an emulator, whose CPUs wake each other up late
		part = 0.75
	}
	for what, busy := range map[string]func(){"computing": func() {}, "collecting": runtime.GC} {
		t.Run(what, func(t *testing.T) {
			var stop atomic.Bool
			defer stop.Store(true)
			for range runtime.NumCPU() {
				go func() {
					for !stop.Load() {
						busy()
					}
				}()
			}
			if short := shortOf(shortProcesses(t, 300, part, Config{Recorder: Off})); short != "" {
				t.Error(short)
			}
		})
	}
}

// TestSingleReader: on large machines one reader serves all CPUs. It loses the
// race more often, and still every process is seen.
func TestSingleReader(t *testing.T) {
	tallies := shortProcesses(t, 300, 0.3, Config{Recorder: Off, single: true})
	if short := shortOf(tallies); short != "" {
		t.Error(short)
	}
	s := tallies[0].c.Status()
	if s.Way != Single || s.Readers != 1 || s.Pinned != 0 {
		t.Errorf("status %+v, want one reader for all", s)
	}
	if n := tallies[0].c.Stats().Delivered[event.Exec]; n < 300 {
		t.Errorf("%d of 300 execs handed over", n)
	}
}

// A tally is what one Conn saw of shortProcesses.
type tally struct {
	c          *Conn
	w          *witness
	stop       func()
	argv, both []bool
	ended      bool   // a later process was seen
	short      string // the fall-back: how it missed its part
}

func (y *tally) isOver() bool {
	y.w.mu.Lock()
	defer y.w.mu.Unlock()
	return y.ended
}

// shortProcesses runs n short processes. The recorder must see all of them,
// the fall-back the given part, or its tally says how it fell short.
func shortProcesses(t *testing.T, n int, part float64, cfgs ...Config) (tallies []*tally) {
	exe, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	real := realPath(t, exe)
	for _, cfg := range cfgs {
		y := &tally{w: newWitness(), argv: make([]bool, n), both: make([]bool, n)}
		y.w.keep = func(r *event.Record) bool {
			if r.Kind != event.Exec || !r.Have.Has(event.FieldArgs) {
				return false
			}
			args := bytes.Split(r.Cmdline, []byte{0})
			if bytes.Contains(r.Cmdline, []byte("last-of-them")) {
				y.w.note(func() { y.ended = true })
			}
			if len(args) < 2 || string(args[0]) != exe {
				return false
			}
			if i, err := strconv.Atoi(strings.TrimPrefix(string(args[1]), "tag-")); err == nil && i >= 0 && i < n {
				y.argv[i] = true
				y.both[i] = r.Have.Has(event.FieldExe) && string(r.Exe) == real
			}
			return false
		}
		y.c, y.stop = watch(t, cfg, y.w)
		tallies = append(tallies, y)
	}
	script := fmt.Sprintf("i=0; while [ $i -lt %d ]; do %s tag-$i; i=$((i+1)); done", n, exe)
	runChild(t, exec.Command("/bin/sh", "-c", script))
	for _, y := range tallies {
		for !y.isOver() {
			runChild(t, exec.Command("/bin/sh", "-c", "sleep 0.05; : last-of-them"))
		}
		y.stop()
		want, way := n, y.c.Status().Way
		if way != ByRecorder {
			// Not read at all, by the cap on the readers' CPU time, is no race lost;
			// each such exec was delivered without facts, and counted.
			want = int(part * float64(n-min(n, int(y.c.Stats().Facts.Throttled))))
		}
		argv, both := count(y.argv), count(y.both)
		t.Logf("%s: arguments of %d, arguments and program of %d of %d; %+v", way, argv, both, n, y.c.Stats().Facts)
		if both < want {
			y.short = fmt.Sprintf("%s: arguments of %d, arguments and program of %d, want at least %d of %d", way, argv, both, want, n)
			if way == ByRecorder {
				t.Error(y.short)
			}
		}
	}
	return tallies
}

func count(a []bool) (sum int) {
	for _, ok := range a {
		if ok {
			sum++
		}
	}
	return sum
}

func realPath(t *testing.T, p string) string {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestDoubleExec: each exec has its own arguments, also when the process runs
// the next one at once. In the fall-back facts may be missing, never wrong.
func TestDoubleExec(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		const n = 15
		w := newWitness()
		w.keep = func(r *event.Record) bool { return r.Kind == event.Exec || r.Kind == event.Exit }
		watch(t, Config{Recorder: m}, w)
		missing := 0
		for i := range n {
			tag := fmt.Sprintf("tag-%d", i)
			pid := runChild(t, child("twice", tag))
			w.find(t, "exit", is(event.Exit, pid))
			var got []string
			w.mu.Lock()
			recs := w.recs
			w.mu.Unlock()
			for _, r := range recs {
				if r.Kind != event.Exec || r.TGID != pid {
					continue
				}
				if !r.Have.Has(event.FieldArgs) {
					missing++
					got = append(got, "")
					continue
				}
				got = append(got, string(bytes.ReplaceAll(r.Cmdline, []byte{0}, []byte{' '})))
			}
			want := []string{"/proc/self/exe " + tag + " ", "second of " + tag + " "}
			if len(got) != 2 || got[0] != want[0] && got[0] != "" || got[1] != want[1] && got[1] != "" {
				t.Errorf("execs %q, want %q", got, want)
			}
		}
		t.Logf("%d of %d without arguments", missing, 2*n)
		if m == Require && missing > 0 || missing > n/2 {
			t.Errorf("%d of %d execs without arguments", missing, 2*n)
		}
	})
}

// TestForged: what another program sends to the socket is counted, and nobody
// hears of it.
func TestForged(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		const pid = 4_000_000 // above what the kernel gives
		w := newWitness()
		c, stop := watch(t, Config{Recorder: m}, w)
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		sa, err := unix.Getsockname(c.src.listener().fd)
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []*unix.SockaddrNetlink{
			{Family: unix.AF_NETLINK, Pid: sa.(*unix.SockaddrNetlink).Pid},
			{Family: unix.AF_NETLINK, Groups: cnIdxProc},
		} {
			b := AppendMessage(nil, &Message{What: WhatExit, Stamp: monotonic(), PID: pid, TGID: pid})
			if err := unix.Sendto(fd, b, 0, to); err != nil {
				t.Fatalf("send to %+v: %v", to, err)
			}
			b = AppendMessage(nil, &Message{What: WhatExec, Stamp: monotonic(), PID: pid, TGID: pid})
			if err := unix.Sendto(fd, b, 0, to); err != nil {
				t.Fatalf("send to %+v: %v", to, err)
			}
		}
		w.find(t, "exit of a later process", is(event.Exit, runChild(t, child("nothing"))))
		stop()
		// The fall-back's listening socket takes no execs, but one of the
		// readers takes the one sent to the group.
		want := uint64(4)
		if m == Off {
			want = 3
		}
		if s := c.Stats(); s.Forged < want { // more if other tests forge as well
			t.Errorf("forged: %d, want %d", s.Forged, want)
		}
		for _, r := range w.recs {
			if r.TGID == pid {
				t.Errorf("forged record handed over: %+v", r)
			}
		}
	})
}

// TestHeartbeat: when events stop, that is noticed, told and repaired.
func TestHeartbeat(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		w := newWitness()
		w.keep = func(*event.Record) bool { return false }
		c, stop := watch(t, Config{Recorder: m, Heartbeat: 200 * time.Millisecond}, w)
		w.await(t, "heartbeats", func() bool { return c.Stats().BeatsSeen >= 3 })
		if s := c.Status(); !s.Alive || s.HeartbeatAge > 10*time.Second {
			t.Errorf("status %+v, want alive", s)
		}
		seen := c.Stats().BeatsSeen
		// On 6.6 and later this silences our socket and no other. Before, others
		// may have listened and not said that they stopped: it takes as many.
		for n := 0; c.Stats().BeatsMissed == 0; n++ {
			if n > 500 {
				t.Fatal("no heartbeat is missed after 500 of IGNORE")
			}
			if err := c.src.listener().request(opIgnore, 0); err != nil {
				t.Fatal(err)
			}
			awaitBeat(t, c, w)
		}
		w.await(t, "heartbeats again", func() bool { return c.Stats().BeatsSeen >= seen+2 && c.Status().Alive })
		stop()
		if s := c.Stats(); s.Relistens == 0 {
			t.Errorf("no LISTEN was sent again: %+v", s)
		}
	})
}

// awaitBeat waits until a heartbeat that was sent from now on came back or was
// missed.
func awaitBeat(t *testing.T, c *Conn, w *witness) {
	t.Helper()
	before := c.Stats()
	w.await(t, "a heartbeat that comes or not", func() bool {
		s := c.Stats()
		return s.BeatsMissed > before.BeatsMissed || s.BeatsSeen >= before.BeatsSeen+2
	})
}

// TestStop: Run ends soon after its context, and nothing stays behind.
func TestStop(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		// What the runtime and the packages below make once is there after
		// one turn.
		var before [3]int
		for i := range 3 {
			w := newWitness()
			c := openHere(t, Config{Recorder: m})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- c.Run(ctx, w) }()
			pid := runChild(t, child("nothing"))
			w.find(t, "exit", is(event.Exit, pid))
			begin := time.Now()
			cancel()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if d := time.Since(begin); d > 2*time.Second {
				t.Errorf("Run ended %v after its context", d)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if err := c.Run(t.Context(), w); err == nil {
				t.Error("Run a second time: no error")
			}
			if i == 0 {
				before = inUse(t, before)
			}
		}
		if after := inUse(t, before); after != before {
			t.Errorf("goroutines, descriptors, mappings of the ring: %v before, %v after", before, after)
		}
	})
}

// TestGoodbye: who ends says so to the kernel, which on kernels before 6.6 goes
// on sending for the sake of everybody who did not.
func TestGoodbye(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		watch(t, Config{Recorder: m}, newWitness()) // the kernel answers while anybody listens
		heard, err := openSocket("", 4<<20, attachClassic(bulkFilter(0, 0)))
		if err != nil {
			t.Fatal(err)
		}
		defer heard.close()
		ignored := func() (n int) {
			var cnt counters
			for _, m := range readTruth(t, heard, &cnt) {
				if m.What == WhatNone && m.Ack == 0+1 { // the answer to our IGNORE, which has number 0
					n++
				}
			}
			return n
		}
		c := openHere(t, Config{Recorder: m})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx, newWitness()) }()
		ignored() // by others on this machine
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if n := ignored(); n == 0 {
			t.Error("no IGNORE at the end of Run")
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if err := openHere(t, Config{Recorder: m}).Close(); err != nil {
			t.Fatal(err)
		}
		if n := ignored(); n == 0 {
			t.Error("no IGNORE at a Close without Run")
		}
	})
}

// inUse counts what could leak; it waits a little for what is about to end.
func inUse(t *testing.T, want [3]int) (n [3]int) {
	t.Helper()
	for range 100 {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		n = [3]int{runtime.NumGoroutine(), len(fds), bytes.Count(maps, []byte("bpf"))}
		if n == want {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	return n
}

// TestCloseWithoutRun: Close alone frees everything too.
func TestCloseWithoutRun(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		openHere(t, Config{Recorder: m}).Close()
		before := inUse(t, [3]int{})
		if err := openHere(t, Config{Recorder: m}).Close(); err != nil {
			t.Fatal(err)
		}
		if after := inUse(t, before); after != before {
			t.Errorf("goroutines, descriptors, mappings of the ring: %v before, %v after", before, after)
		}
	})
}

// TestBeforeRun: what comes between Open and Run is handed over.
func TestBeforeRun(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		w := newWitness()
		c := openHere(t, Config{Recorder: m})
		defer c.Close()
		pid := runChild(t, child("nothing", "early"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx, w) }()
		r := w.find(t, "exec", is(event.Exec, pid))
		if string(r.Cmdline) != "/proc/self/exe\x00early\x00" {
			t.Errorf("arguments %q", r.Cmdline)
		}
		w.find(t, "exit", is(event.Exit, pid))
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		addsUp(t, c.Stats)
	})
}

// TestIdle: an idle Conn says so every second, and does not spin.
func TestIdle(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		w := newWitness()
		_, stop := watch(t, Config{Recorder: m, Kinds: event.KindSet(event.CoreDump)}, w)
		w.await(t, "Idle", func() bool { return w.idles > 0 })
		w.mu.Lock()
		first := w.idles
		w.mu.Unlock()
		begin := time.Now()
		w.await(t, "Idle again", func() bool { return w.idles > first })
		if d := time.Since(begin); d > 10*time.Second {
			t.Errorf("Idle after %v", d)
		}
		stop()
		if w.idles > 100 {
			t.Errorf("idle %d times within some seconds", w.idles)
		}
	})
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  Config
		want string // in the error
	}{
		{"mode", Config{Recorder: "always"}, "recorder:"},
		{"kinds", Config{Kinds: 1 << 30}, "kinds:"},
		{"interval too short", Config{DrainInterval: time.Microsecond}, "drainInterval:"},
		{"interval too long", Config{DrainInterval: time.Second}, "drainInterval:"},
		{"ring not a power of two", Config{RingBytes: 100_000}, "ringBytes:"},
		{"ring too small", Config{RingBytes: 4096}, "ringBytes:"},
		{"buffer too small", Config{RcvBuf: 1}, "rcvBuf:"},
		{"heartbeat", Config{Heartbeat: time.Millisecond}, "heartbeat:"},
	} {
		if _, err := Open(t.Context(), c.cfg); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error that begins with %q", c.name, err, c.want)
		}
	}
	if _, err := (Config{}).withDefaults(); err != nil {
		t.Errorf("zero value: %v", err)
	}
}

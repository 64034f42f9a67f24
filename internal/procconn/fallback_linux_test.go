package procconn

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/testenv"
	"golang.org/x/sys/unix"
)

// passes says which messages a filter lets through, by asking the kernel: a
// filter works on any datagram socket.
func passes(t *testing.T, filter []unix.SockFilter, all []Message) (pass []bool) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	if err := attachClassic(filter)(p[1]); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 256)
	for i := range all {
		b := AppendMessage(nil, &all[i])
		if _, err := unix.Write(p[0], b); err != nil && err != unix.EPERM {
			t.Fatal(err)
		}
		n, _, err := unix.Recvfrom(p[1], buf, unix.MSG_DONTWAIT)
		if err == nil && !bytes.Equal(buf[:n], b) {
			t.Fatalf("filter cut message %+v to %d bytes", all[i], n)
		}
		pass = append(pass, err == nil)
	}
	return pass
}

func TestFilters(t *testing.T) {
	const self = 0x01020304 // no palindrome, should the byte order be wrong
	process := func(w What) Message { return Message{What: w, CPU: 1, PID: 7, TGID: 7, PeerPID: 8, PeerTGID: 8} }
	thread := func(w What) Message { return Message{What: w, CPU: 1, PID: 9, TGID: 7, PeerPID: 9, PeerTGID: 8} }
	own := func(cpu uint32) Message { return Message{What: WhatComm, CPU: cpu, PID: 5, TGID: self} }
	execOn := func(cpu uint32) Message { return Message{What: WhatExec, CPU: cpu, PID: 7, TGID: 7} }
	all := event.KindSet(event.AllKinds()...)
	none := event.KindSet(event.Exec)
	bulkAll, bulkNone := bulkFilter(self, all), bulkFilter(self, none)
	one, rest, single := execFilter(self, []int{1}, true), execFilter(self, []int{0, 1, 2}, false), execFilter(self, nil, false)
	for _, c := range []struct {
		name                                   string
		m                                      Message
		bulkAll, bulkNone, one, others, single bool
	}{
		{"acknowledgement", process(WhatNone), true, true, false, false, false},
		{"unknown event", process(0x400), true, true, false, false, false},
		{"fork of a process", process(WhatFork), true, false, false, false, false},
		{"fork of a thread", thread(WhatFork), false, false, false, false, false},
		{"exit of a process", process(WhatExit), true, false, false, false, false},
		{"exit of a thread", thread(WhatExit), false, false, false, false, false},
		{"uid of a process", process(WhatUID), true, false, false, false, false},
		{"uid of a thread", thread(WhatUID), true, false, false, false, false},
		{"gid", process(WhatGID), true, false, false, false, false},
		{"session", process(WhatSID), true, false, false, false, false},
		{"ptrace", process(WhatPtrace), true, false, false, false, false},
		{"core dump", process(WhatCoreDump), true, false, false, false, false},
		{"name of another", thread(WhatComm), true, false, false, false, false},
		{"own name on CPU 0", own(0), true, true, false, false, true},
		{"own name on CPU 1", own(1), true, true, true, false, true},
		{"own name on CPU 3", own(3), true, true, false, true, true},
		{"exec on CPU 0", execOn(0), false, false, false, false, true},
		{"exec on CPU 1", execOn(1), false, false, true, false, true},
		{"exec on CPU 3", execOn(3), false, false, false, true, true},
		{"exec on CPU 257", execOn(257), false, false, false, true, true},
	} {
		for _, f := range []struct {
			name   string
			filter []unix.SockFilter
			want   bool
		}{{"bulk, all kinds", bulkAll, c.bulkAll}, {"bulk, no kinds", bulkNone, c.bulkNone}, {"exec on CPU 1", one, c.one},
			{"exec on other CPUs than 0 to 2", rest, c.others}, {"exec everywhere", single, c.single}} {
			if got := passes(t, f.filter, []Message{c.m})[0]; got != f.want {
				t.Errorf("%s: filter %q passes: %v, want %v", c.name, f.name, got, f.want)
			}
		}
	}
}

func TestParseCPUList(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []int // nil: error
	}{
		{"", nil}, {"a", nil}, {"3-1", nil}, {"1-", nil}, {"-1", nil}, {"99999999999", nil}, {"0-65535,0-65535", nil},
		{"0\n", []int{0}}, {"0-3,8\n", []int{0, 1, 2, 3, 8}}, {"2,4-5", []int{2, 4, 5}},
	} {
		got, err := parseCPUList(c.in)
		if (err != nil) != (c.want == nil) || err == nil && !slices.Equal(got, c.want) {
			t.Errorf("parseCPUList(%q) = %v, %v; want %v", c.in, got, err, c.want)
		}
	}
}

// A looker does with one process what a reader and Run do with one exec.
type looker struct {
	gathering
	snapshotter
	h heard
}

func newLooker(t testing.TB) *looker {
	t.Helper()
	fd, err := openProc()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &looker{gathering: gathering{proc: fd, cwd: true}, snapshotter: snapshotter{cwd: true}}
}

func (l *looker) take(f *event.Facts, tgid int32, stamp, bootOffset uint64, text []byte) ([]byte, outcome, doubt) {
	l.gather(tgid)
	l.h.report = l.report
	for i := range l.parts {
		l.h.parts[i] = l.parts[i][:l.sizes[i]]
	}
	return l.facts(f, &l.h, stamp, bootOffset, text)
}

// startChild starts a child and waits until it shows its arguments: Start
// returns in the middle of the exec, when the kernel has closed what is to be
// closed and not yet put the arguments where /proc finds them.
func startChild(t *testing.T, cmd *exec.Cmd) int32 {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 0 {
			return int32(cmd.Process.Pid)
		}
		runtime.Gosched()
	}
}

func TestSnapshot(t *testing.T) {
	s := newLooker(t)
	room := func() []byte { return make([]byte, 0, snapshotRoom) }
	all := fallbackFacts(true)

	pid := startChild(t, child("long", "a", strings.Repeat("x", 5000)))
	var f event.Facts
	_, o, d := s.take(&f, pid, monotonic(), sinceBoot(), room())
	if o != complete || d != 0 || f.Have != all || f.From != event.SourceProc {
		t.Errorf("living process: outcome %v, doubt %v, have %b of %b", o, d, f.Have, all)
	}
	args := "/proc/self/exe\x00a\x00" + strings.Repeat("x", 5000) + "\x00"
	if string(f.Cmdline) != args[:partMax] || int(f.CmdlineLen) != len(args) {
		t.Errorf("arguments: %d of %d bytes, want %d of %d", len(f.Cmdline), f.CmdlineLen, partMax, len(args))
	}

	// An event from before the process began, here right after boot (a guest may
	// be up for less than any time one could subtract), is another process's.
	f = event.Facts{}
	if text, o, _ := s.take(&f, pid, uint64(time.Millisecond), sinceBoot(), room()); o != wrongProcess || len(text) != 0 || f.Have != 0 {
		t.Errorf("younger process with the pid: outcome %v, have %b", o, f.Have)
	}

	// A zombie: the kernel shows a cgroup that may not be true.
	cmd := child("nothing")
	pid = startChild(t, cmd)
	var si unix.Siginfo
	if err := unix.Waitid(unix.P_PID, int(pid), &si, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	f = event.Facts{}
	_, o, _ = s.take(&f, pid, monotonic(), sinceBoot(), room())
	if o != partial || f.Have.Has(event.FieldArgs) || f.Have.Has(event.FieldExe) || !f.Have.Has(event.FieldIDs) || string(f.Cgroup) == "/" {
		t.Errorf("zombie: outcome %v, have %b, cgroup %q", o, f.Have, f.Cgroup)
	}
	cmd.Wait()
	f = event.Facts{}
	if _, o, _ = s.take(&f, pid, monotonic(), sinceBoot(), room()); o != gone || f.Have != 0 {
		t.Errorf("process that is gone: outcome %v, have %b", o, f.Have)
	}
}

// TestSnapshotOfDeleted: a program without a name is marked.
func TestSnapshotOfDeleted(t *testing.T) {
	s := newLooker(t)
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/program (deleted)"
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "60")
	pid := startChild(t, cmd)
	var f event.Facts
	text := make([]byte, 0, snapshotRoom)
	s.take(&f, pid, monotonic(), sinceBoot(), text)
	if string(f.Exe) != path || f.Marks != 0 {
		t.Errorf("a misleading name: exe %q, marks %b", f.Exe, f.Marks)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f = event.Facts{}
	s.take(&f, pid, monotonic(), sinceBoot(), text)
	if string(f.Exe) != path+" (deleted)" || f.Marks != event.MarkDeleted || f.ExeFile.Nlink != 0 {
		t.Errorf("deleted: exe %q, marks %b, links %d", f.Exe, f.Marks, f.ExeFile.Nlink)
	}

	fd, err := unix.MemfdCreate("evil", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	mem := os.NewFile(uintptr(fd), "evil")
	defer mem.Close()
	if _, err := mem.Write(program); err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), "60")
	pid = startChild(t, cmd)
	f = event.Facts{}
	s.take(&f, pid, monotonic(), sinceBoot(), text)
	if string(f.Exe) != "/memfd:evil (deleted)" || f.Marks != event.MarkDeleted|event.MarkMemfd {
		t.Errorf("memfd: exe %q, marks %b", f.Exe, f.Marks)
	}
}

// TestGuard: facts that may be a later program's are thrown away.
func TestGuard(t *testing.T) {
	const ms, us = uint64(time.Millisecond), uint64(time.Microsecond)
	args := event.FieldSet(event.FieldArgs, event.FieldExe)
	exec := func(tgid int32, stamp, ready uint64, cmdline string) *item {
		it := &item{ready: ready, outcome: complete}
		it.rec = event.Record{Kind: event.Exec, TGID: tgid, Stamp: stamp}
		if cmdline != "" {
			it.rec.Cmdline, it.rec.Have = []byte(cmdline), args
		} else {
			it.outcome = gone
		}
		return it
	}
	for _, c := range []struct {
		name          string
		first, second *item // in the order of arrival
		dropFirst     bool
		dropSecond    bool
	}{
		{"different arguments", exec(1, 0, 30*us, "a"), exec(1, 40*us, 70*us, "b"), false, false},
		{"the same arguments at once", exec(1, 0, 30*us, "a"), exec(1, 40*us, 70*us, "a"), true, false},
		{"the same arguments before the first were read", exec(1, 0, 90*us, "a"), exec(1, 40*us, 95*us, "a"), true, false},
		{"the same arguments much later", exec(1, 0, 30*us, "a"), exec(1, 20*ms, 21*ms, "a"), false, false},
		{"second not read, at once", exec(1, 0, 30*us, "a"), exec(1, 40*us, 70*us, ""), true, false},
		{"second not read, later", exec(1, 0, 30*us, "a"), exec(1, 5*ms, 6*ms, ""), false, false},
		{"first not read", exec(1, 0, 30*us, ""), exec(1, 40*us, 70*us, "a"), false, false},
		{"another process", exec(1, 0, 30*us, "a"), exec(2, 40*us, 70*us, "a"), false, false},
		{"another process in the same place of the table", exec(1, 0, 30*us, "a"), exec(4097, 40*us, 70*us, "a"), false, false},
		{"the older one comes later, same arguments", exec(1, 40*us, 70*us, "a"), exec(1, 0, 80*us, "a"), false, true},
		{"the older one comes later, different arguments", exec(1, 40*us, 70*us, "b"), exec(1, 0, 80*us, "a"), false, false},
	} {
		f := &fallback{}
		f.check(c.first)
		f.check(c.second)
		if got := c.first.outcome == superseded; got != c.dropFirst {
			t.Errorf("%s: first dropped: %v, want %v", c.name, got, c.dropFirst)
		}
		if got := c.second.outcome == superseded; got != c.dropSecond {
			t.Errorf("%s: second dropped: %v, want %v", c.name, got, c.dropSecond)
		}
		for _, it := range []*item{c.first, c.second} {
			if d := cmp.Diff(event.Facts{}, it.rec.Facts); it.outcome == superseded && d != "" {
				t.Errorf("%s: facts kept:\n%s", c.name, d)
			}
		}
	}
	// The younger one was handed over already.
	f := &fallback{}
	young, old := exec(1, 40*us, 70*us, "a"), exec(1, 0, 80*us, "a")
	f.check(young)
	f.recent[1].it = nil
	if f.check(old); old.outcome != superseded {
		t.Error("an older exec after a younger one was handed over: facts kept")
	}
}

// TestShare: a reader that uses more than its share of the CPU becomes an
// ordinary thread and reads nothing until the second is over.
func TestShare(t *testing.T) {
	testenv.Root(t)
	done := make(chan struct{})
	onOwnThread(func() {
		defer close(done)
		r := &execReader{cpu: -1, share: usualShare}
		first := raise(fifo)
		r.report.class = first
		if !r.mayRead() {
			t.Error("may not read at first")
		}
		for begin := threadCPU(); threadCPU()-begin <= usualShare; {
		}
		turns := 0
		for r.mayRead() {
			if turns++; turns > 8 {
				t.Error("may read although its share is spent")
				return
			}
		}
		if c := r.report.class; c == fifo {
			t.Errorf("class %v with its share spent", c)
		}
		r.window -= uint64(time.Second) // a second goes by
		if !r.mayRead() {
			t.Error("may not read in the next second")
		}
		if c := r.report.class; c != first {
			t.Errorf("class %v in the next second, want %v", c, first)
		}
	})
	<-done
}

// TestNoRealTimeBudget: where the kernel refuses SCHED_FIFO, as it does in a
// cgroup v1 without a real-time budget, a thread gets nice -20.
func TestNoRealTimeBudget(t *testing.T) {
	testenv.Root(t)
	const cpu = "/sys/fs/cgroup/cpu"
	if _, err := os.Stat(cpu + "/cpu.rt_runtime_us"); err != nil {
		t.Skip("no real-time budgets here: only cgroup v1 with CONFIG_RT_GROUP_SCHED has them")
	}
	group := testenv.Cgroup(t, cpu, fmt.Sprintf("procession-procconn-%d", os.Getpid()))
	done := make(chan struct{})
	onOwnThread(func() {
		defer close(done)
		enter := func(dir string) {
			if err := os.WriteFile(dir+"/tasks", fmt.Append(nil, unix.Gettid()), 0); err != nil {
				t.Error(err)
			}
		}
		enter(group)
		if c := raise(fifo); c != nice {
			t.Errorf("class %v", c)
		}
		if prio, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err != nil || prio != 40 { // 20 - nice
			t.Errorf("priority %d, %v, want 40", prio, err)
		}
		enter(cpu)
	})
	<-done
}

// TestShareInAFlood: while programs run as fast as the machine can start them a
// reader keeps to its share: it is an ordinary thread then, reads nothing, and
// hands every exec over all the same. When the flood is over it races again.
func TestShareInAFlood(t *testing.T) {
	if testing.Short() {
		t.Skip("in an emulator programs start too slowly to be a flood")
	}
	w := newWitness()
	w.keep = func(r *event.Record) bool { return false }
	c, stop := watch(t, Config{Recorder: Off, share: time.Millisecond}, w)
	fastest := func() (best class) {
		for _, r := range c.src.(*fallback).readers {
			if r.pinned.Load() {
				best = max(best, class(r.class.Load()))
			}
		}
		return best
	}
	first := fastest()
	if first == normal {
		testenv.Skip(t, "readers run at no priority here")
	}
	program, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	run := func(n int) {
		runChild(t, exec.Command("/bin/sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do %s; i=$((i+1)); done", n, program)))
	}
	lowered, made := false, uint64(0)
	for end := time.Now().Add(20 * time.Second); ; {
		run(200)
		made += 201
		lowered = lowered || fastest() < first
		if c.Stats().Facts.Throttled >= 200 && (lowered || first != fifo) || time.Now().After(end) {
			break
		}
	}
	if s := c.Stats(); s.Facts.Throttled < 200 || first == fifo && !lowered {
		t.Errorf("%d of %d execs were not read about, priority lowered: %t; the share has no effect: %+v", s.Facts.Throttled, made, lowered, s.Facts)
	}
	for end := time.Now().Add(20 * time.Second); fastest() < first; {
		if time.Now().After(end) {
			t.Fatal("the reader does not race again")
		}
		run(1) // the next second begins with the exec after it
		made += 2
	}
	w.await(t, "all execs", func() bool { return c.Stats().Delivered[event.Exec] >= made })
	stop()
}

// sendOne is send where run calls it: outside Go's scheduler, since it waits.
//
//go:nosplit
//go:norace
func (r *execReader) sendOne() syscall.Errno {
	enter()
	e := r.send(0)
	leave()
	return e
}

// TestReports: what a reader's thread tells comes to Run whole and in order, also
// when Run is behind and the thread has to wait for room, and in pieces.
func TestReports(t *testing.T) {
	const total = 3000
	stop, err := newDoorbell()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.close()
	r := &execReader{f: &fallback{stop: stop}, cpu: -1, sock: &socket{fd: -1}}
	if err := r.open(128 << 10); err != nil {
		t.Fatal(err)
	}
	defer r.close()
	size := func(i, part int) int { return (i*131 + part*977) % (partMax + 1) }
	sent := make(chan syscall.Errno, 1)
	go func() {
		for i := range total {
			r.recv.hdrs[0].n = messageLen
			r.recv.bufs[0] = byte(i)
			r.ready = uint64(i)
			for part := range r.parts {
				n := size(i, part)
				r.sizes[part] = uint32(n)
				for k := range n {
					r.parts[part][k] = byte(i + part)
				}
			}
			if e := r.sendOne(); e != 0 {
				sent <- e
				return
			}
		}
		sent <- 0
	}()
	var h heard
	for i := 0; i < total; {
		ok, err := r.next(&h)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			waitFor([]unix.PollFd{{Fd: int32(r.from), Events: unix.POLLIN}}, time.Second)
			continue
		}
		if h.report.ready != uint64(i) || len(h.message) != messageLen || h.message[0] != byte(i) || h.fromKernel {
			t.Fatalf("report %d is number %d, message of %d bytes, of the kernel: %t", i, h.report.ready, len(h.message), h.fromKernel)
		}
		for part, b := range h.parts {
			if len(b) != size(i, part) || bytes.Count(b, []byte{byte(i + part)}) != len(b) {
				t.Fatalf("report %d, part %d: %d bytes %.20x, want %d", i, part, len(b), b, size(i, part))
			}
		}
		i++
	}
	if e := <-sent; e != 0 {
		t.Error(e)
	}
	// A thread that waits for room when Run closes ends without an error.
	go func() {
		var e syscall.Errno
		for n := 0; e == 0 && n < total; n++ {
			e = r.sendOne()
		}
		sent <- e
	}()
	select {
	case e := <-sent:
		t.Fatalf("room for %d reports: %v", total, e)
	case <-time.After(50 * time.Millisecond): // only to make it likely that it waits
	}
	if err := unix.Shutdown(r.from, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if e := <-sent; e != 0 {
		t.Errorf("after the end: %v", e)
	}
}

// TestStore: memory is used again, and is bounded.
func TestStore(t *testing.T) {
	s := newStore(8, 64, 8, 4)
	var held []*item
	give := func(k int) {
		for _, it := range held[:k] {
			it.done()
		}
		held = held[:copy(held, held[k:])]
	}
	for n := range 20_000 {
		it := s.slot()
		for ; it == nil; it = s.slot() {
			if len(held) < 24 {
				t.Fatalf("full with %d items", len(held))
			}
			give(len(held) / 2) // some are held back
		}
		c := it.in
		c.text, it.rec.Comm = add(c.text, fmt.Appendf(nil, "%d", n))
		it.rec.Seq = uint32(n)
		for _, o := range held {
			if o == it || string(o.rec.Comm) != fmt.Sprint(o.rec.Seq) {
				t.Fatalf("item %d has the text %q", o.rec.Seq, o.rec.Comm)
			}
		}
		held = append(held, it)
	}
	give(len(held))
	if s.chunks > 4 {
		t.Errorf("%d chunks", s.chunks)
	}
}

func TestOwnThreadIsNeverTheMainThread(t *testing.T) {
	tids := make(chan int)
	for range 20 {
		onOwnThread(func() { tids <- unix.Gettid() })
	}
	for range 20 {
		if tid := <-tids; tid == os.Getpid() {
			t.Error("the main thread was given away")
		}
	}
}

// nobody is a Handler that does nothing.
type nobody struct{}

func (nobody) Record(*event.Record) {}
func (nobody) Lost(Loss)            {}
func (nobody) Idle()                {}

// TestNoAllocation: nothing is allocated per event, from the kernel to the
// Handler.
func TestNoAllocation(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		c := openHere(t, Config{Recorder: m, Cwd: true})
		defer c.Close()
		c.h = nobody{}
		done := make(chan struct{})
		onOwnThread(func() {
			defer close(done)
			before := c.Stats().Delivered
			// A thread's new name and new ids are a COMM and a GID event; the
			// fall-back reads the ids from /proc.
			id := 1000
			if n := testing.AllocsPerRun(300, func() {
				id++
				if err := setName("no-allocation"); err != nil {
					t.Error(err)
				}
				unix.RawSyscallNoError(unix.SYS_SETRESGID, uintptr(id), uintptr(id), 0)
				unix.RawSyscallNoError(unix.SYS_SETRESGID, 0, 0, 0)
				if _, _, err := c.look(false); err != nil {
					t.Error(err)
				}
			}); n != 0 {
				t.Errorf("%v allocations per look", n)
			}
			nap(2 * holdBack)
			if _, _, err := c.look(false); err != nil {
				t.Error(err)
			}
			after := c.Stats().Delivered
			if comm, gid := after[event.CommChange]-before[event.CommChange], after[event.GIDChange]-before[event.GIDChange]; comm < 300 || gid < 600 {
				t.Errorf("%d COMM and %d GID events in 300 turns", comm, gid)
			}
		})
		<-done
	})
	t.Run("snapshot", func(t *testing.T) {
		s := newLooker(t)
		text := make([]byte, 0, snapshotRoom)
		pid := int32(os.Getpid())
		var o outcome
		if n := testing.AllocsPerRun(100, func() {
			var f event.Facts
			_, o, _ = s.take(&f, pid, monotonic(), sinceBoot(), text)
		}); n != 0 || o != complete {
			t.Errorf("%v allocations per snapshot, outcome %v", n, o)
		}
	})
}

func BenchmarkSnapshot(b *testing.B) {
	s := newLooker(b)
	text := make([]byte, 0, snapshotRoom)
	pid := int32(os.Getpid())
	for b.Loop() {
		var f event.Facts
		s.take(&f, pid, 1<<62, 0, text)
	}
}

//go:build linux

package recorder

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// Seen = Recorded + Lost, and what is Recorded is delivered: with a ring of one
// page and a reader that sleeps.
func TestLossIsExact(t *testing.T) {
	each(t, Config{RingBytes: os.Getpagesize()}, func(t *testing.T, r *Recorder) {
		prog := buildProg(t)
		_, hangUp := openConn(t, r)
		storm := func(n int) *exec.Cmd {
			cmd := exec.Command(prog, "n", strconv.Itoa(n), prog)
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			return cmd
		}
		const n = 300
		slept := storm(n)
		c := settled(t, r)
		if c.Seen < 3*n || c.Lost == 0 || c.Recorded == 0 {
			t.Fatalf("a storm of %d processes: %+v", n, c)
		}
		delivered, children := 0, 0
		drain := func() {
			for {
				got, err := r.Drain(func(rec *event.Record) {
					if rec.Kind == event.Exec && rec.PPID == int32(slept.Process.Pid) {
						children++
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				if got == 0 {
					return
				}
				delivered += got
			}
		}
		drain()
		if children == 0 || children >= n {
			t.Fatalf("%d of %d execs recorded: the test tests nothing", children, n)
		}
		// With room again, recording goes on.
		before := children
		slept = storm(1)
		hangUp() // the rest of the machine goes on too
		drain()
		if children == before {
			t.Error("nothing is recorded after a loss")
		}
		if c := settled(t, r); uint64(delivered) != c.Recorded || c.Seen != c.Recorded+c.Lost || r.Malformed() != 0 {
			t.Errorf("delivered %d, malformed %d, %+v", delivered, r.Malformed(), c)
		}
	})
}

// A message that another program sends is counted, wherever it claims to come
// from, and never delivered.
func TestForged(t *testing.T) {
	r := load(t, Config{})
	l := newLog()
	ear := listen(t, r, l.add)
	sa, err := unix.Getsockname(ear.fd)
	if err != nil {
		t.Fatal(err)
	}
	evil, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(evil)
	before := total(r)
	const forgedPID = 4_194_303
	messages := [][]byte{
		message(whatExec, 0, 1, forgedPID, forgedPID),
		message(whatExec, 9_999, 1, forgedPID, forgedPID), // no such CPU
		message(whatExec, 0, 1, forgedPID, forgedPID)[:40],
		{1},
	}
	for _, m := range messages {
		to := &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: sa.(*unix.SockaddrNetlink).Pid}
		if err := unix.Sendto(evil, m, 0, to); err != nil {
			t.Fatal(err)
		}
	}
	after := total(r)
	if got := after.Forged - before.Forged; got != uint64(len(messages)) {
		t.Errorf("%d forged messages counted, want %d", got, len(messages))
	}
	if _, _, err := unix.Recvfrom(ear.fd, make([]byte, 1), unix.MSG_DONTWAIT); err != unix.EAGAIN {
		t.Errorf("a message is queued on the socket: %v", err)
	}
	ear.close(t)
	for _, rec := range l.recs {
		if rec.TGID == forgedPID {
			t.Errorf("forged record delivered: %+v", rec)
		}
	}
}

// message is a connector message as the kernel sends it. data is the beginning
// of the event data.
func message(what, cpu, seq uint32, data ...uint32) []byte {
	payload := make([]byte, 40)
	le := binary.LittleEndian
	le.PutUint32(payload, what)
	le.PutUint32(payload[4:], cpu)
	le.PutUint64(payload[8:], 12345)
	for i, d := range data {
		le.PutUint32(payload[16+4*i:], d)
	}
	m := connMessage(0, payload)
	le.PutUint32(m[24:], seq)
	return m
}

// feed runs the program on a message, as if the kernel had sent it.
func feed(t *testing.T, r *Recorder, msg []byte) {
	t.Helper()
	ret, err := r.prog.Run(&ebpf.RunOptions{Data: append(make([]byte, 14), msg...)}) // behind an Ethernet header
	if err != nil {
		t.Fatal(err)
	}
	if ret != 0 {
		t.Fatalf("the program lets %d bytes pass", ret)
	}
}

// What the program does with messages that cannot be provoked.
func TestProgram(t *testing.T) {
	self := uint32(os.Getpid())
	other := self + 1
	for _, c := range []struct {
		name  string
		kinds event.Kinds
		msgs  [][]byte
		want  CPU // of CPU 0
		kind  []event.Kind
	}{
		{name: "cut off", msgs: [][]byte{message(whatExec, 0, 1, self, self)[:75]}, want: CPU{Forged: 1}},
		{name: "empty", msgs: [][]byte{nil}, want: CPU{Forged: 1}},
		{name: "another connector", msgs: [][]byte{func() []byte {
			m := message(whatExec, 0, 1, self, self)
			m[16] = 9
			return m
		}()}, want: CPU{Forged: 1}},
		{name: "no such kind", msgs: [][]byte{message(0x10, 0, 5, self, self)}, want: CPU{NextSeq: 6, Started: true}},
		{name: "first number", msgs: [][]byte{message(whatExec, 0, 77, self, self)},
			want: CPU{Seen: 1, Recorded: 1, NextSeq: 78, Started: true}, kind: []event.Kind{event.Exec}},
		{name: "numbers left out before selection", kinds: event.KindSet(event.Exit),
			msgs: [][]byte{message(whatExec, 0, 77), message(whatExec, 0, 81), message(whatExec, 0, 82), message(whatExec, 0, 84)},
			want: CPU{Gap: 4, NextSeq: 85, Started: true}},
		{name: "numbers wrap around", msgs: [][]byte{message(0x10, 0, math.MaxUint32-1), message(0x10, 0, math.MaxUint32), message(0x10, 0, 0), message(0x10, 0, 3)},
			want: CPU{Gap: 2, NextSeq: 4, Started: true}},
		{name: "threads", msgs: [][]byte{message(whatFork, 0, 1, self, self, other, self), message(whatExit, 0, 2, other, self)},
			want: CPU{NextSeq: 3, Started: true}},
		{name: "process fork and exit", msgs: [][]byte{message(whatFork, 0, 1, self, self, other, other), message(whatExit, 0, 2, self, self, 0, 0, 1, 1)},
			want: CPU{Seen: 2, Recorded: 2, NextSeq: 3, Started: true}, kind: []event.Kind{event.Fork, event.Exit}},
		{name: "attach only", kinds: event.KindSet(event.PtraceAttach),
			msgs: [][]byte{message(whatPtrace, 0, 1, other, other, self, self), message(whatPtrace, 0, 2, other, other, 0, 0)},
			want: CPU{Seen: 1, Recorded: 1, NextSeq: 3, Started: true}, kind: []event.Kind{event.PtraceAttach}},
		{name: "detach only", kinds: event.KindSet(event.PtraceDetach),
			msgs: [][]byte{message(whatPtrace, 0, 1, other, other, self, self), message(whatPtrace, 0, 2, other, other, 0, 0)},
			want: CPU{Seen: 1, Recorded: 1, NextSeq: 3, Started: true}, kind: []event.Kind{event.PtraceDetach}},
		{name: "unwanted kinds", kinds: event.KindSet(event.Exec),
			msgs: [][]byte{message(whatFork, 0, 1, self, self, other, other), message(whatUID, 0, 2, self, self), message(whatGID, 0, 3, self, self),
				message(whatSID, 0, 4, self, self), message(whatPtrace, 0, 5, other, other, self, self), message(whatComm, 0, 6, other, other),
				message(whatCoreDump, 0, 7, self, self), message(whatExit, 0, 8, self, self)},
			want: CPU{NextSeq: 9, Started: true}},
		{name: "another process's name", msgs: [][]byte{message(whatComm, 0, 1, other, other)}, want: CPU{NextSeq: 2, Started: true}},
		{name: "a heartbeat", kinds: event.KindSet(event.Exec), msgs: [][]byte{message(whatComm, 0, 1, self, self)},
			want: CPU{Seen: 1, Recorded: 1, NextSeq: 2, Started: true}, kind: []event.Kind{event.CommChange}},
		{name: "an ack", kinds: event.KindSet(event.Exec), msgs: [][]byte{message(whatAck, 0, 1, 22)},
			want: CPU{Seen: 1, Recorded: 1, NextSeq: 2, Started: true}, kind: []event.Kind{event.KindUnknown}},
		// The facts are this process's: they may not be booked to another.
		{name: "facts of another process", msgs: [][]byte{message(whatExec, 0, 1, other, other)},
			want: CPU{Seen: 1, Recorded: 1, NextSeq: 2, Started: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := load(t, Config{Kinds: c.kinds, SelfTGID: int32(self), RingBytes: 64 << 10})
			for _, m := range c.msgs {
				feed(t, r, m)
			}
			var kinds []event.Kind
			n, err := r.Drain(func(rec *event.Record) { kinds = append(kinds, rec.Kind) })
			if err != nil {
				t.Fatal(err)
			}
			got := r.Counters(nil)[0]
			got.Forged = total(r).Forged // counted on whichever CPU it was
			if got != c.want {
				t.Errorf("counters %+v, want %+v", got, c.want)
			}
			if fmt.Sprint(kinds) != fmt.Sprint(c.kind) {
				t.Errorf("kinds %v, want %v", kinds, c.kind)
			}
			if uint64(n)+r.Malformed() != got.Recorded {
				t.Errorf("delivered %d, malformed %d, recorded %d", n, r.Malformed(), got.Recorded)
			}
		})
	}
}

// A heartbeat goes the whole way, with any kinds, and only our own does.
func TestHeartbeat(t *testing.T) {
	r := load(t, Config{Kinds: event.KindSet(event.Exec), SelfTGID: int32(os.Getpid())})
	l := newLog()
	ear := listen(t, r, l.add)
	prog := buildProg(t)
	numbers := func() (n uint64) {
		for _, c := range r.Counters(nil) {
			n += uint64(c.NextSeq)
		}
		return n
	}
	before := numbers()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old, err := os.ReadFile("/proc/thread-self/comm")
	if err != nil {
		t.Fatal(err)
	}
	setName := func(name string) {
		p, _ := unix.BytePtrFromString(name)
		if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(p)), 0, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	defer setName(strings.TrimSpace(string(old)))
	if err := exec.Command(prog, "m", "not-ours").Run(); err != nil {
		t.Fatal(err)
	}
	setName("heart-1")
	b := l.find(t, "heartbeat", func(r *event.Record) bool { return r.Kind == event.CommChange && string(r.Comm) == "heart-1" })
	if b.TGID != int32(os.Getpid()) || b.PID != int32(unix.Gettid()) {
		t.Errorf("heartbeat of %d/%d, want %d/%d", b.PID, b.TGID, unix.Gettid(), os.Getpid())
	}
	if numbers() <= before {
		t.Error("the counters did not move")
	}
	ear.close(t)
	for _, rec := range l.all(event.CommChange, func(r *event.Record) bool { return r.TGID != int32(os.Getpid()) }) {
		t.Errorf("the name %q of another process", rec.Comm)
	}
}

func TestWait(t *testing.T) {
	r := load(t, Config{Kinds: event.KindSet(event.SessionChange)})
	self := uint32(os.Getpid())
	want := func(what string, want bool, within, timeout time.Duration) {
		t.Helper()
		from := time.Now()
		got, err := r.Wait(timeout)
		if took := time.Since(from); err != nil || got != want || took > within {
			t.Fatalf("%s: Wait = %v, %v after %v; want %v within %v", what, got, err, took, want, within)
		}
	}
	drain := func(want int) {
		t.Helper()
		if n, err := r.Drain(func(*event.Record) {}); n != want || err != nil {
			t.Fatalf("Drain = %d, %v; want %d", n, err, want)
		}
	}
	want("nothing, look only", false, time.Second, 0)
	from := time.Now()
	want("nothing", false, 5*time.Second, 30*time.Millisecond)
	if time.Since(from) < 30*time.Millisecond {
		t.Error("Wait did not wait")
	}

	feed(t, r, message(whatSID, 0, 1, self, self))
	want("a record", true, 5*time.Second, -1)
	want("a record that nobody took", true, 5*time.Second, -1)
	drain(1)
	want("taken", false, time.Second, 0)

	if err := r.Wake(); err != nil {
		t.Fatal(err)
	}
	want("woken before", false, 5*time.Second, -1)
	woken := make(chan error)
	go func() { woken <- r.Wake() }()
	want("woken meanwhile", false, 5*time.Second, -1)
	if err := <-woken; err != nil {
		t.Fatal(err)
	}
	want("wake-ups are used up", false, time.Second, 0)

	// No record is slept over, whatever the reader does at that moment.
	const n = 2000
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range n {
			r.prog.Run(&ebpf.RunOptions{Data: append(make([]byte, 14), message(whatSID, 0, 1, self, self)...)})
			runtime.Gosched()
		}
	}()
	for got := 0; got < n; {
		k, err := r.Drain(func(*event.Record) {})
		if err != nil {
			t.Fatal(err)
		}
		if got += k; k == 0 {
			want(fmt.Sprintf("record %d of %d", got, n), true, 20*time.Second, 20*time.Second)
		}
	}
	<-done
}

func TestDrainAllocatesNothing(t *testing.T) {
	r := load(t, Config{Cwd: true})
	prog := buildProg(t)
	_, hangUp := openConn(t, r)
	if out, err := exec.Command(prog, "n", "50", prog).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	hangUp() // no new records: the ring can be read again and again
	want := settled(t, r).Recorded
	again := func() {
		r.ring.pos = 0
		n, err := r.Drain(func(rec *event.Record) {
			if len(rec.Cgroup) == 0 && rec.Kind != event.KindUnknown {
				t.Error("empty record")
			}
		})
		if uint64(n) != want || err != nil {
			t.Fatalf("Drain = %d, %v; want %d", n, err, want)
		}
	}
	if n := testing.AllocsPerRun(20, again); n != 0 {
		t.Errorf("Drain of %d records allocates %v times", want, n)
	}
	var cpus []CPU
	if n := testing.AllocsPerRun(20, func() { cpus = r.Counters(cpus[:0]) }); n != 0 {
		t.Errorf("Counters allocates %v times", n)
	}
	if n := testing.AllocsPerRun(20, func() { r.Wait(0) }); n != 0 {
		t.Errorf("Wait allocates %v times", n)
	}
}

// Cgroups deeper than a record has room for lose their top, not their leaf.
func TestDeepCgroup(t *testing.T) {
	each(t, Config{}, func(t *testing.T, r *Recorder) {
		prog := buildProg(t)
		levels := []string{fmt.Sprintf("procession-deep-%d", os.Getpid())}
		for i := range cgroupDepth + 3 {
			levels = append(levels, fmt.Sprintf("level-%d", i))
		}
		dir := newCgroup(t, r, levels...)
		l := newLog()
		listen(t, r, l.add)
		p := start(t, exec.Command(prog, "r", "x", prog, prog, "w"))
		if err := os.WriteFile(dir+"/cgroup.procs", []byte(strconv.Itoa(p.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
		p.byte(t)
		e := l.find(t, "exec", func(r *event.Record) bool {
			return r.Kind == event.Exec && r.TGID == int32(p.Process.Pid) && bytes.Equal(r.Cmdline, argv(prog, "w"))
		})
		full := procCgroup(t, r, p.Process.Pid)
		if !e.Marks.Has(event.MarkCgroupCut) || !strings.HasSuffix(full, string(e.Cgroup)) || bytes.Count(e.Cgroup, []byte("/")) != cgroupDepth {
			t.Errorf("cgroup %q, marks %b; want the last %d levels of %q", e.Cgroup, e.Marks, cgroupDepth, full)
		}
		p.end()
	})
}

// Load and Close leave nothing open.
func TestClose(t *testing.T) {
	load(t, Config{}) // whatever is opened once
	fds := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before := fds()
	for range 3 {
		r, err := Load(Config{RingBytes: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if got := r.Counters(nil); got != nil {
			t.Errorf("counters after Close: %v", got)
		}
	}
	if after := fds(); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

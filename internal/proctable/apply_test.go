package proctable

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

func TestConfigRefuses(t *testing.T) {
	for _, c := range []struct {
		want string
		cfg  Config
	}{
		{"maxProcesses", Config{MaxProcesses: 63}},
		{"maxProcesses", Config{MaxProcesses: -1}},
		{"maxArgs", Config{MaxArgs: -1}},
		{"maxArgs", Config{MaxArgs: 1 << 20}},
		{"maxText", Config{MaxText: -1}},
		{"exitGrace", Config{ExitGrace: -time.Second}},
	} {
		if _, err := New(c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("New(%+v): %v, want an error about %s", c.cfg, err, c.want)
		}
	}
}

func TestMalformedRecordsAreCounted(t *testing.T) {
	w := newWorld(t, Config{})
	bad := []*event.Record{
		{},
		{Kind: event.CoreDump + 1, PID: 1, TGID: 1},
		{Kind: event.Exec},
		{Kind: event.Exec, PID: -1, TGID: -1},
		{Kind: event.Exec, PID: 0, TGID: 5},
		{Kind: event.Fork, PID: 5, TGID: 5},
		{Kind: event.Fork, PID: 5, TGID: 5, PeerPID: 6, PeerTGID: -6},
		{Kind: event.PtraceAttach, PeerPID: 6, PeerTGID: 6},
		{Kind: event.PtraceDetach, PID: 6, TGID: 6},
	}
	for _, r := range bad {
		w.mustNot(r)
	}
	if st := w.tab.Stats(); st.Malformed != uint64(len(bad)) || st.Applied != st.Malformed {
		t.Errorf("stats: %+v", st)
	}
}

func TestForkInheritsExecReplaces(t *testing.T) {
	w := newWorld(t, Config{})
	r := w.execRec(1, 0, "/sbin/init", "init")
	r.Cwd, r.SID, r.TTY, r.LoginUID, r.AuditSession, r.NoNewPrivs = []byte("/root"), 1, 3, 1000, 9, true
	r.CapPermitted, r.CapEffective, r.ExeFile = 7, 3, event.ExeFile{Ino: 44}
	r.Marks = event.MarkUpper | event.MarkUpperKnown
	r.Have |= event.FieldSet(event.FieldCwd, event.FieldSession, event.FieldLogin, event.FieldNNP, event.FieldCaps, event.FieldExeFile)
	init := w.must(r).Process
	c := w.fork(1, 50)

	want := *init
	want.PID, want.PPID, want.Parent, want.ParentStart, want.Start, want.StartExact = 50, 1, init, init.Start, c.Start, false
	want.InnerPID, want.Execs = 0, 0
	for f := range want.Sources {
		if want.Sources[f] != event.SourceNone {
			want.Sources[f] = event.SourceLineage
		}
	}
	want.Sources[event.FieldStart], want.Sources[event.FieldParent] = event.SourceMessage, event.SourceRecord
	if d := cmp.Diff(&want, c); d != "" {
		t.Errorf("fork: %s", d)
	}
	if est := w.start[50]; c.Start < est || c.Start-est > ms {
		t.Errorf("start: estimated %d, true %d", c.Start, est)
	}

	c = w.exec(50, 1, "/bin/date", "date", "-u")
	if !c.StartExact || c.Start != w.start[50] {
		t.Errorf("start is not exact: %d, want %d", c.Start, w.start[50])
	}
	if c.Cmdline != "date\x00-u\x00" || c.CmdlineLen != 8 || c.Name != "date" || c.Exe != "/bin/date" || c.File != "/bin/date" {
		t.Errorf("program: %+v", c)
	}
	// What this record did not have is missing, not the old program's.
	for _, f := range []event.Field{event.FieldCwd, event.FieldCaps, event.FieldExeFile} {
		if c.Has(f) {
			t.Errorf("%v is known from %v", f, c.Sources[f])
		}
	}
	if c.Cwd != "" || c.CapEffective != 0 || c.ExeFile != (event.ExeFile{}) || c.Marks != 0 {
		t.Errorf("left over: %+v", c)
	}
	// What an exec does not change stays.
	if c.SID != 1 || c.TTY != 3 || c.LoginUID != 1000 || !c.NoNewPrivs || c.Sources[event.FieldLogin] != event.SourceLineage {
		t.Errorf("lost: %+v", c)
	}
	if c.Parent != init || c.Execs != 1 {
		t.Errorf("lineage: %s, execs %d", lineage(c), c.Execs)
	}
	if c.Sources[event.FieldCgroup] != event.SourceRecord || c.Cgroup != "/cg/date" {
		t.Errorf("cgroup: %q from %v", c.Cgroup, c.Sources[event.FieldCgroup])
	}
}

// In the fall-back an exec can be heard of a process that is gone: nothing is
// known but that it was.
func TestExecWithoutFacts(t *testing.T) {
	w := newWorld(t, Config{})
	w.bare = true
	w.exec(1, 0, "/sbin/init", "init")
	w.must(withIDs(w.rec(event.SessionChange, 1), 0, 0))
	w.fork(1, 50)
	r := w.rec(event.Exec, 50)
	r.From = event.SourceMessage
	p := w.must(r).Process
	for _, f := range []event.Field{event.FieldName, event.FieldExe, event.FieldFile, event.FieldArgs, event.FieldCwd, event.FieldCaps, event.FieldNS} {
		if p.Has(f) {
			t.Errorf("%v is known from %v", f, p.Sources[f])
		}
	}
	if p.Exe != "" || p.Cmdline != "" || p.Name != "" {
		t.Errorf("the old program's text stays: %+v", p)
	}
	if p.Parent == nil || p.Parent.Exe != "/sbin/init" {
		t.Errorf("lineage: %s", lineage(p))
	}
	// The cgroup of before is a hint; whoever wants identity sees its source.
	p = w.must(func() *event.Record {
		r := w.rec(event.Exec, 50)
		r.From, r.Cgroup, r.Have = event.SourceProc, []byte("/pod"), event.FieldSet(event.FieldCgroup)
		return r
	}()).Process
	if p.Sources[event.FieldCgroup] != event.SourceProc || p.Cgroup != "/pod" {
		t.Errorf("cgroup %q from %v", p.Cgroup, p.Sources[event.FieldCgroup])
	}
	p = w.must(w.rec(event.Exec, 50)).Process
	if p.Sources[event.FieldCgroup] != event.SourceLineage || p.Cgroup != "/pod" {
		t.Errorf("cgroup %q from %v", p.Cgroup, p.Sources[event.FieldCgroup])
	}
}

func TestThreadsAreNotProcesses(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	r := w.rec(event.Fork, 1)
	r.PeerPID, r.PeerTGID = 60, 1
	w.mustNot(r)
	r = w.rec(event.Exit, 1)
	r.PID = 60
	w.mustNot(r)
	r = w.rec(event.CommChange, 1)
	r.PID, r.Comm, r.Have = 60, []byte("worker"), event.FieldSet(event.FieldName)
	w.mustNot(r)
	p := w.tab.Lookup(1)
	if p.Exited || p.Name != "init" || w.tab.Lookup(60) != nil || w.tab.Stats().Threads != 3 {
		t.Errorf("%+v, stats %+v", p, w.tab.Stats())
	}
}

func TestExecByOtherThread(t *testing.T) {
	for _, bare := range []bool{false, true} {
		t.Run(fmt.Sprintf("bare=%v", bare), func(t *testing.T) {
			w := newWorld(t, Config{})
			w.bare = bare
			w.exec(1, 0, "/sbin/init", "init")
			w.fork(1, 70)
			w.exec(70, 1, "/bin/threads", "threads")
			w.fork(70, 71)
			// The first thread ends, alone: told like the end of the process.
			r := w.exitRec(70, 0)
			r.Threads = 2
			w.must(r)
			if p := w.tab.Lookup(70); !p.Exited {
				t.Error("exit not noted")
			}
			w.wait(20 * time.Millisecond)
			p := w.exec(70, 1, "/bin/next", "next")
			if p.Exited || p.ExitedAt != 0 || p.Execs != 2 || lineage(p) != "70:next < 1:init" {
				t.Errorf("%s, %+v", lineage(p), p)
			}
			if c := w.tab.Lookup(71); c.Parent != p {
				t.Errorf("the child lost its parent: %s", lineage(c))
			}
			if st := w.tab.Stats(); st.Revived != 1 || st.Unknown != 1 || st.Replaced != 0 {
				t.Errorf("stats: %+v", st)
			}
			if ev := w.exit(70); !ev.Process.Exited {
				t.Error("second exit not noted")
			}
			w.wait(time.Minute)
			w.tick()
			if w.tab.Lookup(70).Exited != true || w.tab.Lookup(71).Parent.PID != 70 {
				t.Error("forgotten although it has a child")
			}
		})
	}
}

// A bare exec long after an exit, without a fork in between, is another
// process: its fork was lost.
func TestExecLongAfterExit(t *testing.T) {
	w := newWorld(t, Config{})
	w.bare = true
	w.exec(1, 0, "/sbin/init", "init")
	w.fork(1, 70)
	w.fork(70, 71) // keeps 70 remembered
	w.exit(70)
	w.wait(time.Minute)
	w.tick()
	old := w.tab.Lookup(70)
	p := w.exec(70, 1, "/bin/next", "next")
	if p == old || p.Parent == old || w.tab.Lookup(71).Parent != old || !old.Exited {
		t.Errorf("%s; child of the old one: %s", lineage(p), lineage(w.tab.Lookup(71)))
	}
}

func TestVforkAndDoubleExec(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	w.fork(1, 80)
	first := w.exec(80, 1, "/bin/a", "a", "stage1").Cmdline
	second := w.exec(80, 1, "/bin/b", "b", "stage2")
	if first != "a\x00stage1\x00" || second.Cmdline != "b\x00stage2\x00" || second.Execs != 2 {
		t.Errorf("first %q, second %+v", first, second)
	}
	ev := w.must(w.exitRec(80, 0x300))
	if ev.Status != 0x300 || ev.Process.Status != 0x300 || ev.Process.Exe != "/bin/b" || ev.Duration < 2*time.Millisecond || ev.Duration > 4*time.Millisecond {
		t.Errorf("exit: status %#x, %s after %v", ev.Status, ev.Process.Exe, ev.Duration)
	}
}

func TestCloneParent(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	w.fork(1, 90)
	w.exec(90, 1, "/usr/bin/shim", "shim")
	w.fork(90, 91)
	w.exec(91, 90, "/usr/bin/runc", "runc", "init")
	r := w.forkRec(91, 92)
	r.RealParent = 90 // the creator's parent, as asked for with CLONE_PARENT
	p := w.must(r).Process
	if p.PPID != 90 || p.ParentStart != w.start[90] || lineage(p) != "92:runc < 91:runc < 90:shim < 1:init" {
		t.Errorf("ppid %d, %s", p.PPID, lineage(p))
	}
	p = w.exec(92, 90, "/app", "app")
	if p.PPID != 90 || lineage(p) != "92:app < 91:runc < 90:shim < 1:init" {
		t.Errorf("ppid %d, %s", p.PPID, lineage(p))
	}
}

// Facts that only look odd go through as recorded.
func TestOddPrograms(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	for i, c := range []struct {
		name, comm, exe, file, args string
		marks                       event.Marks
	}{
		{"script", "run.sh", "/bin/dash", "./run.sh", "/bin/sh\x00-e\x00./run.sh\x00one\x00", 0},
		{"memfd", "3", "/memfd:evil (deleted)", "/dev/fd/3", "[kworker/0:1]\x00", event.MarkMemfd},
		{"deleted", "gone", "/tmp/gone (deleted)", "./gone", "gone\x00", event.MarkDeleted},
		{"runc's sealed copy", "6", "/", "/dev/fd/6", "runc\x00init\x00", event.MarkDetached},
		{"empty argv", "x", "/bin/x", "/bin/x", "\x00", 0},
		{"no program but a name", "x", "", "", "", 0},
		{"not text", "\xff\x00\x1b[2J", "/\xfe\n", "\x80", "\xff\xfe\x00\n\x00", 0},
	} {
		pid := int32(100 + i)
		w.fork(1, pid)
		r := w.execRec(pid, 1, c.exe)
		r.Comm, r.File, r.Cmdline, r.Marks, r.CmdlineLen = []byte(c.comm), []byte(c.file), []byte(c.args), c.marks, uint32(len(c.args))
		p := w.must(r).Process
		if p.Name != c.comm || p.Exe != c.exe || p.File != c.file || p.Cmdline != c.args || p.Marks != c.marks || p.ArgsCut() {
			t.Errorf("%s: %+v", c.name, p)
		}
	}
}

func TestPidReuse(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	w.fork(1, 200)
	old := w.exec(200, 1, "/bin/old", "old")
	w.fork(200, 201)

	// The exit of 200 and the fork of its successor were lost.
	w.wait(5 * time.Second)
	w.start[200] = w.stamp + slept
	p := w.exec(200, 1, "/bin/new", "new")
	if p == old || !old.Exited || p.Execs != 1 {
		t.Fatalf("the old process lives on: %+v", p)
	}
	if got := lineage(w.tab.Lookup(201)); got != "201:old < 200:old < 1:init" {
		t.Errorf("child of the old process: %s", got)
	}
	if st := w.tab.Stats(); st.Replaced != 1 {
		t.Errorf("stats: %+v", st)
	}
	// A late record of the old process is not about the new one.
	r := w.exitRec(200, 9)
	r.Start = old.Start
	ev := w.must(r)
	if ev.Process == p || p.Exited || ev.Process.Exe == "/bin/new" || w.tab.Stats().Stale != 1 {
		t.Errorf("late exit: %+v", ev.Process)
	}
	// The same without any start in the records.
	w.bare = true
	w.exit(200)
	w.fork(1, 200)
	q := w.exec(200, 1, "/bin/third", "third")
	if q == p || !p.Exited || q.Parent.PID != 1 {
		t.Errorf("third: %+v", q)
	}
}

// Two processes of one pid within one clock tick are two.
func TestPidReuseWithinATick(t *testing.T) {
	w := newWorld(t, Config{})
	w.bare = true
	w.exec(1, 0, "/sbin/init", "init")
	tick := func(r *event.Record) *event.Record {
		r.Start, r.StartTicks = (r.Stamp+slept)/10_000_000*10_000_000, true
		r.Have |= event.FieldSet(event.FieldStart)
		return r
	}
	w.fork(1, 300)
	a := w.must(tick(w.execRec(300, 1, "/bin/a", "a"))).Process
	w.exit(300)
	w.fork(1, 300)
	b := w.must(tick(w.execRec(300, 1, "/bin/b", "b"))).Process
	if a == b || a.Start != b.Start || !a.Exited || b.Exited {
		t.Errorf("a %+v\nb %+v", a, b)
	}
}

// A start known by tick and the exact one are one process.
func TestTickIsUpgraded(t *testing.T) {
	w := newWorld(t, Config{})
	r := w.execRec(400, 0, "/bin/a", "a")
	r.From, r.Start, r.StartTicks = event.SourceProc, 7_000_000_000, true
	r.Have |= event.FieldSet(event.FieldStart)
	p := w.must(r).Process
	if p.StartExact || p.Start != 7_000_000_000 {
		t.Fatalf("%+v", p)
	}
	r = w.rec(event.SessionChange, 400)
	r.Start, r.Have = 7_009_999_999, event.FieldSet(event.FieldStart)
	if q := w.must(r).Process; q != p || !p.StartExact || p.Start != 7_009_999_999 {
		t.Errorf("not upgraded: %+v", q)
	}
	// And by tick again, it stays exact.
	r = w.rec(event.SessionChange, 400)
	r.Start, r.StartTicks, r.Have = 7_000_000_000, true, event.FieldSet(event.FieldStart)
	if q := w.must(r).Process; q != p || !p.StartExact || p.Start != 7_009_999_999 {
		t.Errorf("exactness lost: %+v", q)
	}
	r = w.rec(event.SessionChange, 400)
	r.Start, r.Have = 7_010_000_000, event.FieldSet(event.FieldStart)
	if q := w.must(r).Process; q == p {
		t.Error("the next tick is taken for the same process")
	}
}

func TestForkEstimate(t *testing.T) {
	for _, c := range []struct {
		name  string
		early int64 // ns, how much before its fork event the child started
		same  bool
	}{
		{"usual", 20_000, true},
		{"creator was preempted", 900_000_000, true},
		{"clocks were read with an error", -1_000_000, true},
		{"started long before", 2_000_000_000, false},
		{"started after", -10_000_000, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, Config{})
			w.exec(1, 0, "/sbin/init", "init")
			p := w.fork(1, 50)
			w.start[50] = uint64(int64(w.stamp+slept) - c.early)
			q := w.exec(50, 1, "/bin/x", "x")
			if (p == q) != c.same {
				t.Errorf("same process: %v, want %v", p == q, c.same)
			}
		})
	}
}

func TestIDChange(t *testing.T) {
	ids := func(uid, euid, suid uint32) event.IDs {
		return event.IDs{UID: uid, EUID: euid, SUID: suid, FSUID: euid}
	}
	change := func(w *world, tid int32, after event.IDs) *event.Record {
		r := w.rec(event.UIDChange, 50)
		r.PID, r.ID, r.EID = tid, after.UID, after.EUID
		if !w.bare {
			r.Have |= event.FieldSet(event.FieldIDs)
			r.IDs = after
		}
		return r
	}
	setup := func(t *testing.T, bare bool) *world {
		w := newWorld(t, Config{})
		w.exec(1, 0, "/sbin/init", "init")
		w.fork(1, 50)
		w.exec(50, 1, "/bin/x", "x")
		w.bare = bare
		return w
	}
	for _, bare := range []bool{false, true} {
		t.Run(fmt.Sprintf("one thread, bare=%v", bare), func(t *testing.T) {
			w := setup(t, bare)
			ev := w.must(change(w, 50, ids(1000, 1001, 0)))
			if !ev.HasBefore || ev.Before != ids(0, 0, 0) || ev.Process.UID != 1000 || ev.Process.EUID != 1001 || ev.Process.SUID != 0 {
				t.Errorf("before %+v, after %+v", ev.Before, ev.Process.IDs)
			}
			want := event.SourceRecord
			if bare {
				want = event.SourceMessage
			}
			if got := ev.Process.Sources[event.FieldIDs]; got != want {
				t.Errorf("ids from %v, want %v", got, want)
			}
			ev = w.must(change(w, 50, ids(1000, 0, 0)))
			if ev.Before.EUID != 1001 || ev.Process.EUID != 0 {
				t.Errorf("before %+v, after %+v", ev.Before, ev.Process.IDs)
			}
		})
		t.Run(fmt.Sprintf("setresuid of a threaded program, bare=%v", bare), func(t *testing.T) {
			w := setup(t, bare)
			ev := w.must(change(w, 52, ids(1000, 1000, 1000)))
			if !ev.HasBefore || ev.Before != ids(0, 0, 0) {
				t.Errorf("before %+v", ev.Before)
			}
			for _, tid := range []int32{50, 51, 53} {
				w.mustNot(change(w, tid, ids(1000, 1000, 1000)))
			}
			if st := w.tab.Stats(); st.Repeats != 3 {
				t.Errorf("stats: %+v", st)
			}
			// The next change of the same process is news again.
			w.must(change(w, 50, ids(0, 0, 1000)))
			w.mustNot(change(w, 52, ids(0, 0, 1000)))
		})
	}
	t.Run("one thread alone", func(t *testing.T) {
		w := setup(t, false)
		w.must(change(w, 50, ids(1000, 1000, 1000)))
		w.wait(10 * time.Second)
		ev := w.must(change(w, 52, ids(0, 0, 0)))
		if !ev.HasBefore || ev.Before.UID != 1000 || ev.Process.UID != 0 {
			t.Errorf("before %+v, after %+v", ev.Before, ev.Process.IDs)
		}
		// A further thread, later: the process shows 0 already, but this is
		// no echo. What that thread was before is not known.
		w.wait(10 * time.Second)
		if ev = w.must(change(w, 53, ids(0, 0, 0))); ev.HasBefore {
			t.Errorf("before %+v", ev.Before)
		}
		// The same thread back and forth.
		w.must(change(w, 53, ids(1000, 1000, 1000)))
		ev = w.must(change(w, 53, ids(0, 0, 0)))
		if !ev.HasBefore || ev.Before.UID != 1000 {
			t.Errorf("before %+v", ev.Before)
		}
	})
	t.Run("/proc is read too late, bare", func(t *testing.T) {
		w := setup(t, true)
		r := withIDs(w.rec(event.GIDChange, 50), 1000, 7)
		r.From, r.ID, r.EID, r.GID = event.SourceProc, 7, 7, 7
		ev := w.must(r)
		if ev.Process.GID != 7 || ev.Process.SGID != 7 || ev.Process.UID != 0 {
			t.Errorf("group: %+v", ev.Process.IDs)
		}
		r = withIDs(w.rec(event.UIDChange, 50), 2000, 7) // changed again since
		r.From, r.ID, r.EID = event.SourceProc, 1000, 1000
		ev = w.must(r)
		if ev.Before.UID != 0 || ev.Before.GID != 7 || ev.Process.UID != 1000 || ev.Process.SUID != 0 {
			t.Errorf("user: %+v -> %+v", ev.Before, ev.Process.IDs)
		}
	})
	t.Run("only the saved id, bare", func(t *testing.T) {
		w := setup(t, true)
		w.must(change(w, 50, ids(0, 0, 0))) // the values are the old ones
		w.must(change(w, 50, ids(0, 0, 0))) // and again: a thread does not repeat itself
	})
	t.Run("the change in between was lost", func(t *testing.T) {
		w := setup(t, false)
		w.must(change(w, 52, ids(0, 1000, 0)))
		if ev := w.must(change(w, 52, ids(0, 1000, 0))); ev.HasBefore {
			t.Errorf("before %+v", ev.Before)
		}
	})
	t.Run("unknown process", func(t *testing.T) {
		w := setup(t, false)
		r := change(w, 77, ids(1000, 0, 0))
		r.TGID, r.Start = 77, 5
		if ev := w.must(r); ev.HasBefore || ev.Process.UID != 1000 {
			t.Errorf("before %+v, after %+v", ev.Before, ev.Process.IDs)
		}
	})
	t.Run("groups", func(t *testing.T) {
		w := setup(t, true)
		r := w.rec(event.GIDChange, 50)
		r.ID, r.EID = 7, 8
		ev := w.must(r)
		if !ev.HasBefore || ev.Before != (event.IDs{}) || ev.Process.GID != 7 || ev.Process.EGID != 8 || ev.Process.FSGID != 8 || ev.Process.UID != 0 {
			t.Errorf("before %+v, after %+v", ev.Before, ev.Process.IDs)
		}
	})
	t.Run("set-uid program", func(t *testing.T) {
		w := setup(t, false)
		w.must(change(w, 50, ids(1000, 1000, 1000)))
		// The id change comes first, and shows the new program already.
		r := withArgs(change(w, 50, ids(1000, 0, 0)), "/bin/su", "su")
		ev := w.must(r)
		if ev.Before.EUID != 1000 || ev.Process.EUID != 0 || ev.Process.Exe != "/bin/x" || ev.Process.Name != "x" {
			t.Errorf("change: before %+v, %+v", ev.Before, ev.Process)
		}
		p := w.exec(50, 1, "/bin/su", "su")
		if p.Exe != "/bin/su" || p.Name != "su" {
			t.Errorf("exec: %+v", p)
		}
	})
}

func TestForkTakesTheThreadsIDs(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	r := withIDs(w.forkRec(1, 50), 1000, 1000)
	r.PID = 9 // a thread of init that changed its own ids
	p := w.must(r).Process
	if p.UID != 1000 || w.tab.Lookup(1).UID != 0 || p.Sources[event.FieldIDs] != event.SourceLineage {
		t.Errorf("child %+v, creator %+v", p.IDs, w.tab.Lookup(1).IDs)
	}
}

func TestRenameAndSession(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	w.fork(1, 50)
	r := w.rec(event.CommChange, 50)
	r.Comm, r.Have = []byte("kworker/0:1"), r.Have|event.FieldSet(event.FieldName)
	ev := w.must(r)
	if !ev.HasPrev || ev.PrevName != "init" || ev.Process.Name != "kworker/0:1" || ev.Process.Exe != "/sbin/init" {
		t.Errorf("previous %q, %+v", ev.PrevName, ev.Process)
	}
	r = w.rec(event.SessionChange, 50)
	r.SID, r.Have = 50, r.Have|event.FieldSet(event.FieldSession)
	if ev = w.must(r); ev.Process.SID != 50 || !ev.Process.Has(event.FieldSession) {
		t.Errorf("%+v", ev.Process)
	}
	r = w.rec(event.CoreDump, 50)
	if ev = w.must(r); ev.Process.PID != 50 {
		t.Errorf("%+v", ev.Process)
	}
	r = w.rec(event.CommChange, 77)
	r.Comm, r.Have = []byte("new"), event.FieldSet(event.FieldName)
	if ev = w.must(r); ev.HasPrev || ev.Process.Name != "new" {
		t.Errorf("unknown process: previous %q, %+v", ev.PrevName, ev.Process)
	}
}

func TestPtrace(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	w.fork(1, 50)
	w.exec(50, 1, "/bin/gdb", "gdb")
	w.fork(1, 60)
	w.exec(60, 1, "/bin/victim", "victim")
	r := w.rec(event.PtraceAttach, 50)
	r.PID, r.PeerPID, r.PeerTGID, r.PeerStart = 51, 61, 60, w.start[60]
	ev := w.must(r)
	if ev.Process.Exe != "/bin/gdb" || ev.Target == nil || ev.Target.Exe != "/bin/victim" {
		t.Errorf("attach: %+v, %+v", ev.Process, ev.Target)
	}
	// The message of a detach does not name the tracer.
	r = w.rec(event.PtraceDetach, 0)
	r.PeerPID, r.PeerTGID = 61, 60
	if ev = w.must(r); ev.Process.Exe != "/bin/gdb" || ev.Target.Exe != "/bin/victim" {
		t.Errorf("detach: %+v, %+v", ev.Process, ev.Target)
	}
	r = w.rec(event.PtraceDetach, 0)
	r.PeerPID, r.PeerTGID = 61, 60
	if ev = w.must(r); ev.Process == nil || ev.Process.PID != 0 || ev.Target.Exe != "/bin/victim" {
		t.Errorf("detach without attach: %+v, %+v", ev.Process, ev.Target)
	}
	r = w.rec(event.PtraceAttach, 50)
	r.PeerPID, r.PeerTGID, r.PeerStart = 99, 99, 12345
	if ev = w.must(r); ev.Target == nil || ev.Target.PID != 99 {
		t.Errorf("unknown tracee: %+v", ev.Target)
	}
}

// Whatever is known about a process is remembered as long as it has
// descendants, and not longer.
func TestLineageSurvivesExits(t *testing.T) {
	w := newWorld(t, Config{})
	w.exec(1, 0, "/sbin/init", "init")
	const first, last = 100, 120
	for pid := int32(first); pid <= last; pid++ {
		parent := pid - 1
		if pid == first {
			parent = 1
		}
		w.fork(parent, pid)
		w.exec(pid, parent, fmt.Sprintf("/bin/gen%d", pid), "gen", fmt.Sprint(pid))
		if parent != 1 {
			w.exit(parent)
		}
		w.wait(10 * time.Second)
		w.tick()
	}
	p := w.tab.Lookup(last)
	n := 0
	for a := p.Parent; a != nil; a = a.Parent {
		n++
		if a.PID == 1 {
			break
		}
		want := fmt.Sprintf("/bin/gen%d", a.PID)
		if !a.Exited || a.Exe != want || a.Cmdline != fmt.Sprintf("gen\x00%d\x00", a.PID) || a.PID != last-int32(n) || !a.Has(event.FieldIDs) {
			t.Errorf("ancestor %d: %+v", n, a)
		}
	}
	if n != last-first+1 {
		t.Errorf("%d ancestors: %s", n, lineage(p))
	}
	if st := w.tab.Stats(); st.Remembered != last-first || st.Live != 2 {
		t.Errorf("stats: %+v", st)
	}
	w.exit(last)
	w.wait(10 * time.Second)
	w.tick()
	if st := w.tab.Stats(); st.Remembered != 0 || st.Live != 1 || st.Evicted+st.Spliced != 0 || w.tab.Lookup(110) != nil {
		t.Errorf("stats: %+v", st)
	}
}

// A process that forks and ends over and over must not fill the table with its
// ended ancestors, nor push out where it came from.
func TestEndlessChain(t *testing.T) {
	for _, execs := range []bool{false, true} {
		t.Run(fmt.Sprintf("execs=%v", execs), func(t *testing.T) {
			w := newWorld(t, Config{})
			w.exec(1, 0, "/sbin/init", "init")
			w.fork(1, 10)
			w.exec(10, 1, "/usr/sbin/sshd", "sshd")
			w.fork(10, 11)
			w.exec(11, 10, "/bin/evil", "evil")
			pid := int32(11)
			for i := range 5000 {
				next := 1000 + int32(i)
				w.fork(pid, next)
				if execs {
					w.exec(next, pid, fmt.Sprintf("/bin/%d", next), "x")
				}
				w.exit(pid)
				pid = next
				w.wait(100 * time.Millisecond)
				w.tick()
			}
			w.wait(time.Minute)
			w.tick()
			p := w.tab.Lookup(pid)
			n := 0
			var last [3]int32
			for a := p.Parent; a != nil; a = a.Parent {
				last = [3]int32{last[1], last[2], a.PID}
				n++
			}
			if n > maxDepth+1 || n < 8 || last != [3]int32{11, 10, 1} {
				t.Errorf("%d ancestors, the oldest %v", n, last)
			}
			st := w.tab.Stats()
			if st.Remembered > maxDepth || st.Spliced+uint64(n) < 5000 || st.Evicted != 0 {
				t.Errorf("stats: %+v", st)
			}
			if execs && p.Parent.Exe != fmt.Sprintf("/bin/%d", p.Parent.PID) {
				t.Errorf("parent: %+v", p.Parent)
			}
		})
	}
}

func TestFullTable(t *testing.T) {
	w := newWorld(t, Config{MaxProcesses: 64})
	w.exec(1, 0, "/sbin/init", "init")
	// More ended processes than there is room for: the oldest go.
	for pid := int32(100); pid < 200; pid++ {
		w.fork(1, pid)
		w.exit(pid)
	}
	st := w.tab.Stats()
	if st.Live+st.Remembered > 64 || st.Evicted == 0 || st.Untracked != 0 || w.tab.Lookup(199) == nil || w.tab.Lookup(100) != nil {
		t.Errorf("stats: %+v", st)
	}
	// Of a lineage the oldest links go, its ends stay connected.
	for pid := int32(200); pid < 300; pid++ {
		w.fork(max(199, pid-1), pid)
		w.exec(pid, pid-1, fmt.Sprintf("/bin/%d", pid), "x")
		if pid > 200 {
			w.exit(pid - 1)
		}
	}
	p := w.tab.Lookup(299)
	if p == nil || p.Parent == nil || p.Parent.PID != 298 || w.tab.Stats().Spliced == 0 {
		t.Errorf("%s, stats %+v", lineage(p), w.tab.Stats())
	}
	// Full of living processes: events are reported all the same, with facts.
	for pid := int32(300); pid < 400; pid++ {
		w.fork(1, pid)
	}
	if st := w.tab.Stats(); st.Untracked == 0 || st.Live+st.Remembered > 64 {
		t.Errorf("stats: %+v", st)
	}
	q := w.fork(1, 400)
	if q.PID != 400 || q.Exe != "/sbin/init" || q.Parent == nil || w.tab.Lookup(400) != nil {
		t.Errorf("fork: %+v", q)
	}
	q = w.exec(400, 1, "/bin/x", "x")
	if q.Exe != "/bin/x" || lineage(q) != "400:x < 1:init" || w.tab.Lookup(400) != nil {
		t.Errorf("exec: %s", lineage(q))
	}
	// And room is used again.
	for pid := int32(300); pid < 330; pid++ {
		w.exit(pid)
	}
	w.fork(1, 401)
	if w.tab.Lookup(401) == nil {
		t.Error("no room although processes ended")
	}
}

func TestTextIsBounded(t *testing.T) {
	w := newWorld(t, Config{MaxArgs: 1000, MaxText: 100 << 10})
	w.exec(1, 0, "/sbin/init", "init")
	long := strings.Repeat("a", 100<<10)
	w.fork(1, 50)
	p := w.exec(50, 1, "/bin/x", long)
	if len(p.Cmdline) != len(long)+1 || p.ArgsCut() {
		t.Errorf("during the event: %d bytes", len(p.Cmdline))
	}
	c := w.fork(50, 51)
	for _, p := range []*event.Process{p, c} {
		if len(p.Cmdline) != 1000 || !p.ArgsCut() || int(p.CmdlineLen) != len(long)+1 || p.Exe != "/bin/x" || p.File != "/bin/x" {
			t.Errorf("afterwards: %d of %d bytes, %+v", len(p.Cmdline), p.CmdlineLen, p.Exe)
		}
	}
	deep := "/" + strings.Repeat("d/", 1000) + "leaf"
	for pid := int32(100); pid < 300; pid++ {
		w.fork(1, pid)
		r := w.execRec(pid, 1, deep, strings.Repeat("b", 900))
		r.Cwd = []byte(deep)
		r.Have |= event.FieldSet(event.FieldCwd)
		if p := w.must(r).Process; len(p.Cmdline) != 901 || p.Exe != deep {
			t.Fatalf("during the event: %+v", p)
		}
	}
	w.tick()
	st := w.tab.Stats()
	if st.TextBytes > 100<<10+200*1200 || st.Trimmed == 0 {
		t.Errorf("stats: %+v", st)
	}
	p = w.tab.Lookup(299)
	if !p.ArgsCut() || len(p.Cmdline) != leanArgs || !p.Marks.Has(event.MarkExeCut|event.MarkCwdCut) ||
		!strings.HasSuffix(p.Exe, "/leaf") || len(p.Exe) > leanPath || p.Has(event.FieldFile) || p.File != "" {
		t.Errorf("under pressure: %+v", p)
	}
}

func TestUnknownProcesses(t *testing.T) {
	w := newWorld(t, Config{})
	p := w.fork(500, 501) // its creator was never heard of
	if p.Parent == nil || p.Parent.PID != 500 || p.PPID != 500 {
		t.Errorf("fork: %+v", p)
	}
	p = w.exec(600, 599, "/bin/x", "x")
	if p.Parent != nil || p.PPID != 599 || p.Exe != "/bin/x" {
		t.Errorf("exec: %+v", p)
	}
	w.start[700] = w.stamp + slept - 3*s
	ev := w.must(withIDs(w.exitRec(700, 256), 5, 5))
	if ev.Process.PID != 700 || ev.Process.UID != 5 || ev.Duration < 3*time.Second || ev.Duration > 3*time.Second+5*time.Millisecond {
		t.Errorf("exit: %+v after %v", ev.Process, ev.Duration)
	}
	if w.tab.Lookup(700) != nil {
		t.Error("a process is remembered of which only the end is known")
	}
	if st := w.tab.Stats(); st.Unknown != 3 || st.Reported != 3 {
		t.Errorf("stats: %+v", st)
	}
}

// Recordings replay to the same events, whenever and wherever.
func TestReplayIsDeterministic(t *testing.T) {
	run := func() string {
		w := newWorld(t, Config{Clock: FixedClock{Mono: 5, Boot: 5 + slept, Wall: bootDay}})
		var b strings.Builder
		note := func(ev *event.Event) {
			fmt.Fprintf(&b, "%v %s %s %v\n", ev.Time, ev.Kind, lineage(ev.Process), ev.Duration)
		}
		w.exec(1, 0, "/sbin/init", "init")
		for pid := int32(10); pid < 200; pid++ {
			note(w.must(w.forkRec(1+pid%7, pid)))
			note(w.must(w.execRec(pid, 1, fmt.Sprint("/bin/", pid), "x")))
			if pid%3 == 0 {
				note(w.exit(pid))
			}
			w.tick()
		}
		return b.String()
	}
	a, b := run(), run()
	if a != b {
		t.Error(cmp.Diff(a, b))
	}
	if !strings.Contains(a, "2026-01-02") {
		t.Errorf("times are not the recording's: %.100s", a)
	}
}

func TestAllocations(t *testing.T) {
	w := newWorld(t, Config{ExitGrace: time.Nanosecond})
	w.exec(1, 0, "/sbin/init", "init")
	fork, exec, exit := w.forkRec(1, 50), w.execRec(50, 1, "/bin/x", "x", "-y", "z"), w.exitRec(50, 0)
	fork.PeerStart, exec.Start, exit.Start = 0, 0, 0
	exec.Have &^= event.FieldSet(event.FieldStart)
	exit.Have &^= event.FieldSet(event.FieldStart)
	step := func(r *event.Record) {
		w.stamp += ms
		r.Stamp = w.stamp
		w.apply(r)
	}
	life := func(withExec bool) func() {
		return func() {
			step(fork)
			if withExec {
				step(exec)
			}
			step(exit)
			w.tick()
		}
	}
	life(true)()
	if n := testing.AllocsPerRun(1000, life(false)); n != 0 {
		t.Errorf("fork and exit allocate %v times", n)
	}
	// The program's text, and the cgroup's, as no process of it is left.
	if n := testing.AllocsPerRun(1000, life(true)); n > 2 {
		t.Errorf("fork, exec and exit allocate %v times", n)
	}
	w.fork(1, 60)
	w.exec(60, 1, "/bin/x", "x")
	if n := testing.AllocsPerRun(1000, life(true)); n > 1 {
		t.Errorf("fork, exec and exit in a known cgroup allocate %v times", n)
	}
}

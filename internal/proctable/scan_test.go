package proctable

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

func needProc(t testing.TB) {
	if runtime.GOOS != "linux" {
		t.Skip("package procfs reads on Linux only")
	}
}

// scanWorld is a world over a tree with an init, a shell, and a daemon.
func scanWorld(t testing.TB, c Config) (*world, *tree) {
	t.Helper()
	needProc(t)
	tr := newTree(t)
	tr.put(treeProc{pid: 1, start: 10 * ms, exe: "/sbin/init", args: []string{"init"}})
	tr.put(treeProc{pid: 20, ppid: 1, start: 100 * s, exe: "/usr/sbin/sshd", args: []string{"sshd", "-D"}})
	tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: "/bin/bash", args: []string{"-bash"}, uid: 1000, gid: 1000})
	c.FS = tr.fs()
	w := newWorld(t, c)
	if n, err := w.tab.Scan(); err != nil || n != 3 {
		t.Fatalf("Scan() = %d, %v", n, err)
	}
	return w, tr
}

func TestScan(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	p := w.tab.Lookup(30)
	if lineage(p) != "30:bash < 20:sshd < 1:init" || p.StartExact || p.Start != 200*s || p.UID != 1000 || p.Cmdline != "-bash\x00" {
		t.Errorf("%s, %+v", lineage(p), p)
	}
	for _, f := range []event.Field{event.FieldStart, event.FieldParent, event.FieldName, event.FieldExe, event.FieldArgs, event.FieldIDs, event.FieldCgroup} {
		if p.Sources[f] != event.SourceProc {
			t.Errorf("%v from %v", f, p.Sources[f])
		}
	}
	// A parent with a higher pid, a zombie, a process whose first thread is gone.
	tr.put(treeProc{pid: 40, ppid: 50, start: 302 * s, exe: "/bin/child", args: []string{"child"}})
	tr.put(treeProc{pid: 50, ppid: 1, start: 301 * s, exe: "/bin/parent", args: []string{"parent"}})
	tr.put(treeProc{pid: 60, ppid: 1, start: 300 * s, exe: "/bin/dead", state: "Z"})
	tr.put(treeProc{pid: 70, ppid: 1, start: 300 * s, exe: "/bin/half", state: "Z", threads: 3})
	if n, err := w.tab.Scan(); err != nil || n != 6 {
		t.Fatalf("Scan() = %d, %v", n, err)
	}
	if got := lineage(w.tab.Lookup(40)); got != "40:child < 50:parent < 1:init" {
		t.Error(got)
	}
	if w.tab.Lookup(60) != nil || w.tab.Lookup(70) == nil {
		t.Error("zombie taken in, or half a process left out")
	}
	if st := w.tab.Stats(); st.Scans != 2 || st.Live != 6 || st.ScanErrors != 0 {
		t.Errorf("stats: %+v", st)
	}
}

func TestScanDoesNotOverwrite(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	r := w.execRec(30, 20, "/bin/vi", "vi", "secret")
	r.Start, r.Have = 200*s+5*ms, r.Have|event.FieldSet(event.FieldStart)
	w.must(r)
	// The process has rewritten its arguments since.
	tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: "/bin/vi", args: []string{"zzz"}, cwd: "/root"})
	if _, err := w.tab.Scan(); err != nil {
		t.Fatal(err)
	}
	p := w.tab.Lookup(30)
	if p.Cmdline != "vi\x00secret\x00" || !p.StartExact || p.Sources[event.FieldArgs] != event.SourceRecord || p.Cgroup != "/cg/vi" {
		t.Errorf("overwritten: %+v", p)
	}
	if p.Cwd != "/root" || p.Sources[event.FieldCwd] != event.SourceProc {
		t.Errorf("not completed: cwd %q from %v", p.Cwd, p.Sources[event.FieldCwd])
	}
}

// Subscribe, scan, apply what was recorded meanwhile: nothing is missing and
// nothing twice.
func TestRecordsFromBeforeTheScan(t *testing.T) {
	needProc(t)
	tr := newTree(t)
	w := newWorld(t, Config{FS: tr.fs()})
	w.start[1] = 10 * ms
	var queue []*event.Record
	queue = append(queue, w.forkRec(1, 100), w.execRec(100, 1, "/bin/a", "a")) // lives
	queue = append(queue, w.forkRec(100, 101), w.execRec(101, 100, "/bin/b", "b"), w.exitRec(101, 0))
	queue = append(queue, w.forkRec(100, 102)) // will exec after the scan was read
	queue = append(queue, w.execRec(100, 1, "/bin/c", "c"))
	lateExec := w.execRec(102, 100, "/bin/d", "d")
	w.clock.at(w.stamp)

	tr.put(treeProc{pid: 1, start: 10 * ms, exe: "/sbin/init", args: []string{"init"}})
	tr.put(treeProc{pid: 100, ppid: 1, start: w.start[100], exe: "/bin/c", args: []string{"c"}})
	tr.put(treeProc{pid: 102, ppid: 100, start: w.start[102], exe: "/bin/c", args: []string{"c"}})
	if n, err := w.tab.Scan(); err != nil || n != 3 {
		t.Fatalf("Scan() = %d, %v", n, err)
	}
	var got []string
	for _, r := range append(queue, lateExec) {
		ev := w.must(r)
		got = append(got, fmt.Sprintf("%s %s", ev.Kind.Short(), lineage(ev.Process)))
	}
	want := []string{
		"fork 100:c < 1:init", // known from the scan already as what it became
		"exec 100:a < 1:init",
		"fork 101:a < 100:a < 1:init",
		"exec 101:b < 100:a < 1:init",
		"exit 101:b < 100:a < 1:init",
		"fork 102:c < 100:a < 1:init",
		"exec 100:c < 1:init",
		"exec 102:d < 100:c < 1:init",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if st := w.tab.Stats(); st.Live != 3 || st.Remembered != 1 || st.Replaced != 0 {
		t.Errorf("stats: %+v", st)
	}
	if p := w.tab.Lookup(100); !p.StartExact || p.Start != w.start[100] {
		t.Errorf("%+v", p)
	}
}

// An exit without a start (fall-back) from before the scan must not end the
// process that has the pid now.
func TestStaleExitAfterScan(t *testing.T) {
	needProc(t)
	tr := newTree(t)
	w := newWorld(t, Config{FS: tr.fs()})
	w.bare = true
	exit := w.exitRec(100, 0)
	w.wait(50 * time.Millisecond)
	w.clock.at(w.stamp)
	tr.put(treeProc{pid: 100, ppid: 1, start: w.stamp + slept - 20*ms, exe: "/bin/new", args: []string{"new"}})
	if _, err := w.tab.Scan(); err != nil {
		t.Fatal(err)
	}
	if ev := w.must(exit); ev.Process.Exe != "" || w.tab.Lookup(100).Exited || w.tab.Stats().Stale != 1 {
		t.Errorf("exit of %+v, new process %+v", ev.Process, w.tab.Lookup(100))
	}
}

func TestRescan(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	tr.put(treeProc{pid: 31, ppid: 30, start: 201 * s, exe: "/bin/busybox", args: []string{"sh"}})
	tr.put(treeProc{pid: 32, ppid: 30, start: 201 * s, exe: "/usr/sbin/nginx", args: []string{"nginx"}})
	tr.put(treeProc{pid: 33, ppid: 30, start: 201 * s, exe: "/bin/same", args: []string{"same"}})
	if _, err := w.tab.Scan(); err != nil {
		t.Fatal(err)
	}
	if got := w.rescan(); got != "" {
		t.Fatalf("nothing changed, but:\n%s", got)
	}

	tr.drop(33)
	// Upgraded under its feet, otherwise the same.
	tr.put(treeProc{pid: 20, ppid: 1, start: 100 * s, exe: "/usr/sbin/sshd (deleted)", args: []string{"sshd", "-D"}, stack: 77})
	w.tab.procs[20].image = 77
	// Became root.
	tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: "/bin/bash", args: []string{"-bash"}})
	// Another program in the same file.
	tr.put(treeProc{pid: 31, ppid: 30, start: 201 * s, exe: "/bin/busybox", args: []string{"wget", "evil"}})
	// Only gave itself a title.
	tr.put(treeProc{pid: 32, ppid: 30, start: 201 * s, exe: "/usr/sbin/nginx", args: []string{"nginx: master"}, stack: w.tab.procs[32].image})
	// A fork of 30, and its child, with a program.
	tr.put(treeProc{pid: 35, ppid: 30, start: 900 * s, exe: "/bin/bash", args: []string{"-bash"}})
	tr.put(treeProc{pid: 34, ppid: 35, start: 901 * s, exe: "/bin/new", args: []string{"new"}})
	// Came and went.
	tr.put(treeProc{pid: 36, ppid: 1, start: 902 * s, exe: "/bin/gone", state: "Z"})
	want := "exit 33 same\nfork 35 bash\nfork 34 new\nexec 34 new\nuid 30 bash 1000/1000->0/0\ngid 30 bash 1000/1000->0/0\nexec 31 busybox\n"
	if got := w.rescan(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got := lineage(w.tab.Lookup(34)); got != "34:new < 35:bash < 30:bash < 20:sshd < 1:init" {
		t.Error(got)
	}
	if p := w.tab.Lookup(33); !p.Exited {
		t.Errorf("%+v", p)
	}
	if got := w.rescan(); got != "" {
		t.Errorf("told twice:\n%s", got)
	}
	if st := w.tab.Stats(); st.Synthetic != 7 || st.Rescans != 3 {
		t.Errorf("stats: %+v", st)
	}

	// A pid that came back: the old one ended, the new one is new.
	tr.put(treeProc{pid: 35, ppid: 1, start: 950 * s, exe: "/bin/other", args: []string{"other"}})
	if got, want := w.rescan(), "exit 35 bash\nfork 35 other\nexec 35 other\n"; got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got := lineage(w.tab.Lookup(34)); !strings.HasPrefix(got, "34:new < 35:bash < 30") {
		t.Error(got)
	}
}

// Of a process whose exec was recorded the address of its stack is not known:
// then other arguments are taken for another program, once.
func TestRescanAfterRecordedExec(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	w.start[30], w.start[20] = 200*s, 100*s
	now := func(exe string, args ...string) string {
		tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: exe, args: args})
		return w.rescan()
	}
	w.exec(30, 20, "/bin/busybox", "sh")
	if got := now("/bin/busybox", "sh"); got != "" || w.tab.procs[30].image == 0 {
		t.Errorf("the same: %s", got)
	}
	w.exec(30, 20, "/bin/busybox", "sh", "-c")
	if got := now("/bin/busybox", "wget", "evil"); got != "exec 30 busybox\n" {
		t.Errorf("other arguments: %s", got)
	}
	if got := w.rescan(); got != "" {
		t.Errorf("told twice: %s", got)
	}
	w.exec(30, 20, "/bin/busybox", "sh")
	if got := now("/bin/other", "sh"); got != "exec 30 other\n" {
		t.Errorf("other file: %s", got)
	}
	// Arguments that are gone prove nothing.
	w.exec(30, 20, "/bin/busybox", "sh")
	if got := now("/bin/busybox"); got != "" {
		t.Errorf("no arguments: %s", got)
	}
	if p := w.tab.Lookup(30); p.Cmdline != "sh\x00" || p.Execs != 6 {
		t.Errorf("%+v", p)
	}
}

// The first event about a process that the table does not know: /proc says who
// it is, if it still is the same.
func TestUnknownSubjectIsRead(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	tr.put(treeProc{pid: 50, ppid: 30, start: 300 * s, exe: "/bin/known", args: []string{"known"}})
	tr.put(treeProc{pid: 51, ppid: 30, start: 2000 * s, exe: "/bin/later", args: []string{"later"}})
	r := withIDs(w.rec(event.UIDChange, 50), 5, 5)
	r.Start, r.Have = 300*s+7*ms, r.Have|event.FieldSet(event.FieldStart)
	ev := w.must(r)
	if lineage(ev.Process) != "50:known < 30:bash < 20:sshd < 1:init" || !ev.Process.StartExact || ev.Process.UID != 5 {
		t.Errorf("%s, %+v", lineage(ev.Process), ev.Process)
	}
	if ev.HasBefore { // read after the change, so it is no before
		t.Errorf("before: %+v", ev.Before)
	}
	r = withIDs(w.rec(event.UIDChange, 50), 6, 6)
	r.Start, r.Have = 300*s+7*ms, r.Have|event.FieldSet(event.FieldStart)
	if ev = w.must(r); !ev.HasBefore || ev.Before.UID != 5 {
		t.Errorf("before: %+v, known %v", ev.Before, ev.HasBefore)
	}
	// A bare record about a pid that another process took after it.
	w.bare = true
	if p := w.must(w.rec(event.SessionChange, 51)).Process; p.Exe != "" {
		t.Errorf("a stranger: %+v", p)
	}
	if st := w.tab.Stats(); st.Unknown != 2 {
		t.Errorf("stats: %+v", st)
	}
	n := 0
	for range w.tab.All() {
		n++
	}
	if n != 5 {
		t.Errorf("All: %d processes", n)
	}
}

// What a rescan told is not told again by records that were on their way.
func TestRecordsAfterARescan(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	w.start[30] = 200 * s
	w.start[20] = 100 * s
	w.start[1] = 10 * ms
	fork := w.forkRec(30, 40)
	mid := w.execRec(40, 30, "/bin/mid", "mid") // over before the rescan
	exec := withIDs(w.execRec(40, 30, "/bin/x", "x"), 0, 0)
	uid := withIDs(w.rec(event.UIDChange, 30), 0, 0)
	gid := withIDs(w.rec(event.GIDChange, 30), 0, 0)
	exit := w.exitRec(20, 7)
	tr.drop(20)
	tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: "/bin/bash", args: []string{"-bash"}})
	tr.put(treeProc{pid: 40, ppid: 30, start: w.start[40], exe: "/bin/x", args: []string{"x"}})
	if got, want := w.rescan(), "exit 20 sshd\nfork 40 x\nexec 40 x\nuid 30 bash 1000/1000->0/0\ngid 30 bash 1000/1000->0/0\n"; got != want {
		t.Fatalf("got:\n%s\nwant:\n%s", got, want)
	}
	w.mustNot(fork)
	ev := w.must(mid)
	if ev.Process.Exe != "/bin/mid" || w.tab.Lookup(40).Exe != "/bin/x" || lineage(ev.Process) != "40:mid < 30:bash < 20:sshd < 1:init" {
		t.Errorf("%s, but the table shows %s", lineage(ev.Process), w.tab.Lookup(40).Exe)
	}
	w.mustNot(exec)
	w.mustNot(uid)
	w.mustNot(gid)
	w.mustNot(exit)
	if p := w.tab.Lookup(20); p.Status != 7 || !p.Exited {
		t.Errorf("%+v", p)
	}
	if st := w.tab.Stats(); st.Late != 5 {
		t.Errorf("stats: %+v", st)
	}
	// What comes later is news.
	w.must(w.execRec(40, 30, "/bin/x", "x"))
	w.must(w.exitRec(40, 0))
}

func TestMissingParentIsAskedOnce(t *testing.T) {
	needProc(t)
	tr := newTree(t)
	tr.put(treeProc{pid: 1, start: 10 * ms, exe: "/sbin/init", args: []string{"init"}})
	tr.put(treeProc{pid: 20, ppid: 1, start: 100 * s, exe: "/usr/sbin/sshd", args: []string{"sshd"}})
	tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: "/bin/bash", args: []string{"-bash"}})
	w := newWorld(t, Config{FS: tr.fs()})
	w.start[30], w.start[40] = 200*s+3*ms, 900*s
	p := w.exec(40, 30, "/bin/x", "x")
	if lineage(p) != "40:x < 30:bash < 20:sshd < 1:init" || !p.Parent.StartExact || p.Parent.Sources[event.FieldExe] != event.SourceProc {
		t.Errorf("%s, parent %+v", lineage(p), p.Parent)
	}
	// The parent's pid belongs to another process by now; or to none.
	w.start[31], w.start[41] = 150*s, 901*s
	tr.put(treeProc{pid: 31, ppid: 1, start: 990 * s, exe: "/bin/innocent", args: []string{"i"}})
	for range 3 {
		if p = w.exec(41, 31, "/bin/y", "y"); p.Parent != nil || p.PPID != 31 {
			t.Errorf("%s", lineage(p))
		}
	}
	w.start[42] = 902 * s
	for range 3 {
		if p = w.exec(42, 99, "/bin/z", "z"); p.Parent != nil {
			t.Errorf("%s", lineage(p))
		}
	}
	if st := w.tab.Stats(); st.ParentsAsked != 5 || st.ParentsMissing != 2 {
		t.Errorf("stats: %+v", st)
	}
	// An event about a process that was there before the table: read at once.
	r := w.rec(event.SessionChange, 20)
	r.Start, r.Have = 100*s, event.FieldSet(event.FieldStart)
	if q := w.must(r).Process; q.Exe != "/usr/sbin/sshd" || q.PID != 20 {
		t.Errorf("%+v", q)
	}
}

func TestCutRecordsAreCompleted(t *testing.T) {
	long := []string{"java", strings.Repeat("x", 5000), "end"}
	whole := strings.Join(append(long, ""), "\x00")
	deep := "/" + strings.Repeat("deep/", 100)
	for _, c := range []struct {
		name           string
		change         func(*treeProc)
		args, exe, cwd string
		cgroup         string
		src            event.Source
		done           bool
	}{
		{"still there", func(*treeProc) {}, whole, deep + "java", deep + "cwd", deep + "cg", event.SourceProc, true},
		{"arguments rewritten", func(p *treeProc) { p.args = []string{"java", strings.Repeat("z", 5000), "end"} }, whole[:2048], deep + "java", deep + "cwd", deep + "cg", event.SourceRecord, false},
		{"end of the arguments cut off", func(p *treeProc) { p.args = p.args[:2] }, whole[:2048], deep + "java", deep + "cwd", deep + "cg", event.SourceRecord, false},
		{"another program by now", func(p *treeProc) { p.exe, p.args, p.cwd, p.cgroup = "/bin/sh", []string{"sh"}, "/", "/other" }, whole[:2048], "/deep/java", "/deep/cwd", "/deep/cg", event.SourceRecord, false},
		{"another process by now", func(p *treeProc) { p.start += s }, whole[:2048], "/deep/java", "/deep/cwd", "/deep/cg", event.SourceRecord, false},
		{"gone", func(p *treeProc) { p.pid = 51 }, whole[:2048], "/deep/java", "/deep/cwd", "/deep/cg", event.SourceRecord, false},
		{"in a cgroup namespace of our own", func(p *treeProc) { p.cgroup = "/../x/deep/cg" }, whole, deep + "java", deep + "cwd", "/deep/cg", event.SourceProc, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, tr := scanWorld(t, Config{MaxArgs: 3000})
			w.start[30] = 200 * s
			w.fork(30, 50)
			p := treeProc{pid: 50, ppid: 30, start: w.start[50], exe: deep + "java", args: append([]string(nil), long...), cwd: deep + "cwd", cgroup: deep + "cg"}
			c.change(&p)
			tr.put(p)
			r := w.execRec(50, 30, "/deep/java")
			r.Cmdline, r.CmdlineLen = []byte(whole[:2048]), uint32(len(whole))
			r.Cwd, r.Cgroup = []byte("/deep/cwd"), []byte("/deep/cg")
			r.Have |= event.FieldSet(event.FieldCwd)
			r.Marks = event.MarkExeCut | event.MarkCwdCut | event.MarkCgroupCut | event.MarkUpper
			got := w.must(r).Process
			if got.Cmdline != c.args || got.Exe != c.exe || got.Cwd != c.cwd || got.Cgroup != c.cgroup {
				t.Errorf("args %d bytes, exe %.30q, cwd %.30q, cgroup %.30q", len(got.Cmdline), got.Exe, got.Cwd, got.Cgroup)
			}
			if int(got.CmdlineLen) != len(whole) || got.Sources[event.FieldArgs] != c.src || !got.Marks.Has(event.MarkUpper) {
				t.Errorf("length %d, from %v, marks %b", got.CmdlineLen, got.Sources[event.FieldArgs], got.Marks)
			}
			if cut := got.Marks & (event.MarkExeCut | event.MarkCwdCut | event.MarkCgroupCut); c.done != (cut == 0 && !got.ArgsCut()) {
				t.Errorf("marks %b", got.Marks)
			}
			if st := w.tab.Stats(); st.Completed+st.Incomplete != 1 || (st.Completed == 1) != c.done {
				t.Errorf("stats: %+v", st)
			}
			w.tick()
			if got.Cmdline != c.args[:min(len(c.args), 3000)] {
				t.Errorf("kept: %d bytes", len(got.Cmdline))
			}
		})
	}
}

// A process whose memory cannot be read does not hold up the table.
func TestStuckArguments(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	tr.put(treeProc{pid: 66, ppid: 30, start: 900 * s, exe: "/bin/evil", args: []string{"evil"}})
	fifo := filepath.Join(tr.dir, "66", "cmdline")
	os.Remove(fifo)
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if n, err := w.tab.Scan(); err != nil || n != 4 {
		t.Fatalf("Scan() = %d, %v", n, err)
	}
	if d := time.Since(begin); d < scanWait || d > 20*scanWait {
		t.Errorf("the scan took %v", d)
	}
	p := w.tab.Lookup(66)
	if p == nil || p.Exe != "/bin/evil" || p.Has(event.FieldArgs) {
		t.Errorf("%+v", p)
	}
	if st := w.tab.Stats(); st.Stuck != 1 || w.tab.stuck.Load() != 1 {
		t.Errorf("stats: %+v, waiting %d", st, w.tab.stuck.Load())
	}
	// Others are read as before.
	tr.put(treeProc{pid: 67, ppid: 30, start: 900 * s, exe: "/bin/good", args: []string{"good"}})
	if got := w.rescan(); got != "fork 67 good\nexec 67 good\n" {
		t.Error(got)
	}
	if p := w.tab.Lookup(67); p.Cmdline != "good\x00" {
		t.Errorf("%+v", p)
	}
	// The reader that was given up ends when the process lets go.
	f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	for deadline := time.Now().Add(10 * time.Second); w.tab.stuck.Load() != 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("the reader still waits")
		}
		if f, err := os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			f.Close() // the rescan has left readers there as well
		}
	}
}

// A process whose first thread ended is not forgotten while it lives.
func TestFirstThreadEnds(t *testing.T) {
	w, tr := scanWorld(t, Config{})
	w.bare = true
	tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: "/bin/bash", state: "Z", threads: 4, uid: 1000, gid: 1000})
	r := w.exitRec(30, 0)
	r.Threads = 0 // the fall-back does not know
	if ev := w.must(r); !ev.Process.Exited {
		t.Errorf("%+v", ev.Process)
	}
	for range 3 {
		w.wait(time.Minute)
		w.tick()
		if p := w.tab.Lookup(30); p == nil || p.Exited || p.Exe != "/bin/bash" {
			t.Fatalf("forgotten while alive: %+v", p)
		}
		if got := w.rescan(); got != "" {
			t.Errorf("rescan: %s", got)
		}
	}
	checkTable(t, w.tab)
	tr.put(treeProc{pid: 30, ppid: 20, start: 200 * s, exe: "/bin/bash", state: "Z", threads: 1})
	w.wait(time.Minute)
	w.tick()
	if w.tab.Lookup(30) != nil {
		t.Error("kept although dead")
	}
	if st := w.tab.Stats(); st.LeaderExits != 1 || st.Live != 2 || st.Remembered != 0 {
		t.Errorf("stats: %+v", st)
	}
}

func TestScanOfMoreThanFits(t *testing.T) {
	needProc(t)
	tr := newTree(t)
	for pid := int32(1); pid <= 100; pid++ {
		tr.put(treeProc{pid: pid, ppid: pid - 1, start: uint64(pid) * s, exe: "/bin/x", args: []string{"x"}})
	}
	w := newWorld(t, Config{FS: tr.fs(), MaxProcesses: 64})
	if n, err := w.tab.Scan(); err != nil || n != 64 {
		t.Errorf("Scan() = %d, %v", n, err)
	}
	if st := w.tab.Stats(); st.Untracked != 36 || st.Live != 64 {
		t.Errorf("stats: %+v", st)
	}
	checkTable(t, w.tab)
	w.rescan()
}

func TestWithoutProc(t *testing.T) {
	w := newWorld(t, Config{})
	if n, err := w.tab.Scan(); n != 0 || err != nil {
		t.Errorf("Scan() = %d, %v", n, err)
	}
	if err := w.tab.Rescan(func(*event.Event) { t.Error("told something") }); err != nil {
		t.Error(err)
	}
}

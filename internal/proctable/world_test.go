package proctable

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
)

const (
	ms = uint64(time.Millisecond)
	s  = uint64(time.Second)
)

// slept is how long the test's machine slept since boot: start times and event
// stamps must not be mixed up.
const slept = 5 * s

// testClock stands at a moment until it is moved.
type testClock struct{ now Instant }

func (c *testClock) Now() Instant { return c.now }

func (c *testClock) at(mono uint64) {
	c.now.Wall = c.now.Wall.Add(time.Duration(mono - c.now.Mono))
	c.now.Boot += mono - c.now.Mono
	c.now.Mono = mono
}

// world feeds a table as a kernel with (or, if bare, without) the recorder
// would. Time goes on by a millisecond with each record.
type world struct {
	testing.TB
	tab   *Table
	clock *testClock
	stamp uint64
	bare  bool
	start map[int32]uint64 // exact, on the boot clock
	ev    event.Event
}

var bootDay = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func newWorld(t testing.TB, c Config) *world {
	t.Helper()
	w := &world{TB: t, stamp: 1000 * s, start: map[int32]uint64{1: 1 * ms}}
	w.clock = &testClock{Instant{Mono: w.stamp, Boot: w.stamp + slept, Wall: bootDay.Add(time.Duration(w.stamp + slept))}}
	if c.Clock == nil {
		c.Clock = w.clock
	}
	tab, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	w.tab = tab
	t.Cleanup(func() { checkTable(t, tab) })
	return w
}

func (w *world) wait(d time.Duration) { w.stamp += uint64(d) }

// rec is a record by a process (or, with tid, one of its threads).
func (w *world) rec(k event.Kind, pid int32) *event.Record {
	w.stamp += ms
	r := &event.Record{Kind: k, Stamp: w.stamp, PID: pid, TGID: pid}
	if !w.bare {
		r.From = event.SourceRecord
		if s := w.start[pid]; s != 0 {
			r.Start = s
			r.Have |= event.FieldSet(event.FieldStart)
		}
	}
	return r
}

// apply applies r and hands back the event; nil if there is none to report.
func (w *world) apply(r *event.Record) *event.Event {
	w.Helper()
	if r.Stamp > w.clock.now.Mono {
		w.clock.at(r.Stamp)
	}
	if !w.tab.Apply(r, &w.ev) {
		return nil
	}
	if w.ev.Process == nil || w.ev.Kind != r.Kind || w.ev.Record != r || w.ev.Stamp != r.Stamp {
		w.Fatalf("bad event %+v for %+v", w.ev, r)
	}
	return &w.ev
}

func (w *world) must(r *event.Record) *event.Event {
	w.Helper()
	ev := w.apply(r)
	if ev == nil {
		w.Fatalf("not reported: %+v", r)
	}
	return ev
}

func (w *world) mustNot(r *event.Record) {
	w.Helper()
	if ev := w.apply(r); ev != nil {
		w.Fatalf("reported: %+v", r)
	}
}

func (w *world) forkRec(creator, child int32) *event.Record {
	r := w.rec(event.Fork, creator)
	r.PeerPID, r.PeerTGID, r.RealParent = child, child, creator
	w.start[child] = r.Stamp + slept - 20_000 // 20 us before the event
	return r
}

func (w *world) fork(creator, child int32) *event.Process {
	w.Helper()
	return w.must(w.forkRec(creator, child)).Process
}

// withArgs adds what an exec's record says about the program.
func withArgs(r *event.Record, exe string, args ...string) *event.Record {
	r.Have |= event.FieldSet(event.FieldName, event.FieldExe, event.FieldFile, event.FieldArgs)
	r.Comm = []byte(filepath.Base(exe))
	r.Exe, r.File = []byte(exe), []byte(exe)
	r.Cmdline = nil
	for _, a := range args {
		r.Cmdline = append(append(r.Cmdline, a...), 0)
	}
	r.CmdlineLen = uint32(len(r.Cmdline))
	return r
}

func withIDs(r *event.Record, uid, gid uint32) *event.Record {
	r.Have |= event.FieldSet(event.FieldIDs)
	r.IDs = event.IDs{UID: uid, EUID: uid, SUID: uid, FSUID: uid, GID: gid, EGID: gid, SGID: gid, FSGID: gid}
	return r
}

func (w *world) execRec(pid, ppid int32, exe string, args ...string) *event.Record {
	r := withArgs(w.rec(event.Exec, pid), exe, args...)
	if w.bare {
		r.From = event.SourceProc
		return r
	}
	r.Have |= event.FieldSet(event.FieldParent, event.FieldCgroup, event.FieldNS)
	r.PPID, r.ParentStart = ppid, w.start[ppid]
	r.Cgroup = []byte("/cg/" + filepath.Base(exe))
	r.NS = event.NS{PID: 1, Mnt: 2, User: 3, Net: 4}
	return withIDs(r, 0, 0)
}

func (w *world) exec(pid, ppid int32, exe string, args ...string) *event.Process {
	w.Helper()
	return w.must(w.execRec(pid, ppid, exe, args...)).Process
}

func (w *world) exitRec(pid int32, status uint32) *event.Record {
	r := w.rec(event.Exit, pid)
	r.Status = status
	r.Threads = 1
	return r
}

func (w *world) exit(pid int32) *event.Event {
	w.Helper()
	return w.must(w.exitRec(pid, 0))
}

func (w *world) tick() {
	if w.stamp > w.clock.now.Mono {
		w.clock.at(w.stamp)
	}
	w.tab.Tick(w.stamp)
}

// lineage names p and its ancestors.
func lineage(p *event.Process) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:%s", p.PID, filepath.Base(p.Exe))
	for a := p.Parent; a != nil; a = a.Parent {
		fmt.Fprintf(&b, " < %d:%s", a.PID, filepath.Base(a.Exe))
	}
	return b.String()
}

// checkTable checks what must hold between any two calls.
func checkTable(t testing.TB, tab *Table) {
	t.Helper()
	tab.settle()
	seen := make(map[*entry]bool)
	var visit func(e *entry)
	visit = func(e *entry) {
		if e == nil || seen[e] {
			return
		}
		seen[e] = true
		if (e.parent == nil) != (e.Parent == nil) || e.parent != nil && e.Parent != &e.parent.Process {
			t.Errorf("process %d: parent entry and parent process differ", e.PID)
		}
		n := 0
		for c := e.child; c != nil; c = c.older {
			if n++; n > tab.n || c.parent != e {
				t.Fatalf("process %d: broken list of children", e.PID)
			}
			visit(c)
		}
		if e.lo > e.hi {
			t.Errorf("process %d: start in [%d, %d]", e.PID, e.lo, e.hi)
		}
		if e.Exited && e.on == nil {
			t.Errorf("process %d has ended and is in no list", e.PID)
		}
		if e.on == &tab.lingering && (e.child == nil || !e.Exited) {
			t.Errorf("process %d lingers for nobody", e.PID)
		}
		visit(e.parent)
	}
	for pid, e := range tab.procs {
		if e.PID != pid {
			t.Errorf("process %d is found as %d", e.PID, pid)
		}
		visit(e)
	}
	for _, l := range []*list{&tab.ended, &tab.lingering} {
		var last *entry
		for e := l.head; e != nil; e = e.next {
			if e.on != l || e.prev != last {
				t.Fatalf("process %d: broken list", e.PID)
			}
			visit(e)
			last = e
		}
		if l.tail != last {
			t.Fatal("broken list: wrong tail")
		}
	}
	if len(seen) != tab.n || tab.n > tab.cfg.MaxProcesses {
		t.Errorf("%d processes, counted %d, at most %d", len(seen), tab.n, tab.cfg.MaxProcesses)
	}

	texts, live, refs := make(map[*text]int), uint64(0), int64(0)
	for e := range seen {
		if !e.Exited {
			live++
		}
		for _, x := range []*text{e.prog, e.group} {
			if x != nil {
				texts[x]++
			}
		}
		if e.group != nil && tab.groups[e.Cgroup] != e.group {
			t.Errorf("process %d: cgroup %q is not the shared one", e.PID, e.Cgroup)
		}
	}
	for x, n := range texts {
		if x.refs != n {
			t.Errorf("text %.40q: %d users, counted %d", x.s, n, x.refs)
		}
		refs += int64(len(x.s))
	}
	st := tab.Stats()
	if st.TextBytes != uint64(refs) {
		t.Errorf("%d bytes of text, counted %d", refs, st.TextBytes)
	}
	if st.Live != live || st.Live+st.Remembered != uint64(tab.n) {
		t.Errorf("live %d, remembered %d; counted %d, %d", live, uint64(tab.n)-live, st.Live, st.Remembered)
	}
	if sum := st.Reported + st.Threads + st.Repeats + st.Late + st.Malformed; st.Applied != sum {
		t.Errorf("applied %d, but reported and the rest are %d: %+v", st.Applied, sum, st)
	}
}

// tree is a proc file system in a directory.
type tree struct {
	testing.TB
	dir string
}

func newTree(t testing.TB) *tree { return &tree{t, t.TempDir()} }

func (tr *tree) fs() *procfs.FS {
	tr.Helper()
	fs, err := procfs.New(tr.dir)
	if err != nil {
		tr.Fatal(err)
	}
	tr.Cleanup(func() { fs.Close() })
	return fs
}

// treeProc is a process of a tree.
type treeProc struct {
	pid, ppid int32
	start     uint64 // ns since boot
	comm, exe string
	args      []string
	uid, gid  uint32
	state     string // default S
	threads   int
	stack     uint64 // default derived from exe and args; 1: not known
	cgroup    string // default /tree
	cwd       string // default /
}

// put makes or replaces a process.
func (tr *tree) put(p treeProc) {
	tr.Helper()
	dir := filepath.Join(tr.dir, fmt.Sprint(p.pid))
	tr.drop(p.pid)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tr.Fatal(err)
	}
	args := strings.Join(append(p.args, ""), "\x00")
	if p.state == "" {
		p.state = "S"
	}
	if p.threads == 0 {
		p.threads = 1
	}
	if p.comm == "" {
		p.comm = filepath.Base(p.exe)
	}
	if p.cgroup == "" {
		p.cgroup = "/tree"
	}
	if p.cwd == "" {
		p.cwd = "/"
	}
	if p.stack == 0 {
		p.stack = 0x7ffc00000000
		for _, c := range p.exe + args {
			p.stack = p.stack*31 + uint64(c)
		}
		p.stack >>= 4
	}
	flags, exe := 0x400000, p.exe
	if p.state == "Z" {
		flags, exe, args, p.stack = flags|4, "", "", 0
	}
	files := map[string]string{
		"stat": fmt.Sprintf("%d (%s) %s %d %d %d 0 -1 %d 0 0 0 0 0 0 0 0 20 0 %d 0 %d 0 0 0 0 0 %d"+strings.Repeat(" 0", 24)+"\n",
			p.pid, p.comm, p.state, p.ppid, p.pid, p.pid, flags, p.threads, p.start/procfs.Tick, p.stack),
		"status": fmt.Sprintf("Name:\tx\nTgid:\t%d\nUid:\t%[2]d\t%[2]d\t%[2]d\t%[2]d\nGid:\t%[3]d\t%[3]d\t%[3]d\t%[3]d\nNSpid:\t%[1]d\nCapPrm:\t000000000000000f\nCapEff:\t0000000000000003\nNoNewPrivs:\t0\n",
			p.pid, p.uid, p.gid),
		"cmdline": args,
		"cgroup":  "0::" + p.cgroup + "\n",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			tr.Fatal(err)
		}
	}
	if exe != "" {
		os.Symlink(exe, filepath.Join(dir, "exe"))
		os.Symlink(p.cwd, filepath.Join(dir, "cwd"))
	}
}

func (tr *tree) drop(pid int32) {
	if err := os.RemoveAll(filepath.Join(tr.dir, fmt.Sprint(pid))); err != nil {
		tr.Fatal(err)
	}
}

// rescan tells what a rescan reports, one line per event.
func (w *world) rescan() string {
	w.Helper()
	w.wait(time.Millisecond)
	w.clock.at(w.stamp)
	var b bytes.Buffer
	err := w.tab.Rescan(func(ev *event.Event) {
		if !ev.Synthetic || ev.Record != nil || ev.Process == nil || ev.Stamp != w.stamp {
			w.Errorf("bad event: %+v", ev)
		}
		fmt.Fprintf(&b, "%s %d %s", ev.Kind.Short(), ev.Process.PID, filepath.Base(ev.Process.Exe))
		if ev.HasBefore {
			fmt.Fprintf(&b, " %d/%d->%d/%d", ev.Before.UID, ev.Before.GID, ev.Process.UID, ev.Process.GID)
		}
		b.WriteByte('\n')
	})
	if err != nil {
		w.Fatal(err)
	}
	checkTable(w, w.tab)
	return b.String()
}

package proctable

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
)

// Scan puts every process of /proc into the table and returns how many are
// alive. It is the baseline: subscribe first, then scan, then apply what was
// recorded meanwhile, and nothing is missing and nothing is there twice. What
// the table knows already from records is not overwritten, only completed.
// Processes that have ended are left out: their Exit is past. A process that
// cannot be read is counted (Stats.ScanErrors), not an error.
func (t *Table) Scan() (int, error) {
	t.settle()
	if t.cfg.FS == nil {
		return 0, nil
	}
	pids, err := t.cfg.FS.Pids()
	if err != nil {
		return 0, fmt.Errorf("scan processes: %w", err)
	}
	t.count.scans.Add(1)
	var found []*entry
	for _, pid := range pids {
		rd := t.readAlive(pid)
		if rd == nil {
			continue
		}
		w := tickWindow(&rd.Stat)
		e := t.procs[pid]
		if e != nil && e.compare(w, 0) == same {
			e.narrow(w, event.SourceProc)
			t.completeEntry(e, rd)
		} else {
			t.makeRoom(1)
			var kept bool
			if e, kept = t.newEntry(pid, t.now()); !kept {
				continue
			}
			e.setStart(w, event.SourceProc)
			t.setReading(e, rd)
		}
		t.trim()
		found = append(found, e)
	}
	// A parent may come after its child: pids wrap around.
	for _, e := range found {
		t.makeRoom(room)
		t.findParent(e)
	}
	return len(found), nil
}

// now is the present on the clock of event stamps.
func (t *Table) now() uint64 {
	t.time.measure()
	return t.time.last.Mono
}

func tickWindow(st *procfs.Stat) window { return window{st.Start(), st.Start() + procfs.Tick - 1} }

// readAlive reads a process during a scan; nil if it has ended.
func (t *Table) readAlive(pid int32) *procfs.Reading {
	rd, err := t.read(pid, t.cfg.MaxArgs, scanWait)
	switch {
	case err == nil && !rd.Stat.Dead():
		return rd
	case err != nil && !errors.Is(err, procfs.ErrGone):
		t.count.scanErrors.Add(1)
	}
	return nil
}

// setReading gives e all that was read.
func (t *Table) setReading(e *entry, rd *procfs.Reading) {
	t.setFacts(e, &rd.Facts)
	for _, f := range [...]event.Field{event.FieldName, event.FieldExe, event.FieldArgs, event.FieldCwd} {
		if rd.Have.Has(f) {
			e.Sources[f] = event.SourceProc
		}
	}
	e.Marks, e.CmdlineLen = rd.Marks, rd.CmdlineLen
	t.setProgram(e, program{name: rd.Comm, exe: rd.Exe, args: rd.Cmdline, cwd: rd.Cwd})
	if rd.Have.Has(event.FieldCgroup) {
		t.setCgroup(e, rd.Cgroup, event.SourceProc)
	}
	e.image = image(&rd.Stat)
	t.trimLater(e)
}

// completeEntry gives e what was read and is missing in it.
func (t *Table) completeEntry(e *entry, rd *procfs.Reading) {
	f := rd.Facts
	for i, s := range e.Sources {
		if s != event.SourceNone {
			f.Have &^= event.FieldSet(event.Field(i))
		}
	}
	t.setFacts(e, &f)
	if f.Have.Has(event.FieldCgroup) {
		t.setCgroup(e, f.Cgroup, event.SourceProc)
	}
	t.fill(e, &f)
	if plain(string(rd.Exe)) == plain(e.Exe) {
		e.image = image(&rd.Stat)
	}
}

// image tells one start of a program from another: the address of its stack,
// random for each exec. 0 and 1 stand for "may not be known".
func image(st *procfs.Stat) uint64 {
	if st.StartStack <= 1 || st.Exiting() {
		return 0
	}
	return st.StartStack
}

// plain is a path without the mark of a file that has no name any more.
func plain(exe string) string { return strings.TrimSuffix(exe, " (deleted)") }

// fromProc makes the process of a record from what /proc says now; nil if it
// has ended, or is another one.
func (t *Table) fromProc(pid int32, w window, stamp uint64) *entry {
	rd, err := t.read(pid, t.cfg.MaxArgs, eventWait)
	if err != nil || rd.Stat.Dead() {
		return nil
	}
	have := tickWindow(&rd.Stat)
	_, at := t.time.boot(stamp)
	if w.hi < have.lo || w.lo > have.hi || have.lo > at+forkSlack {
		return nil
	}
	e, _ := t.newEntry(pid, t.now())
	e.setStart(have, event.SourceProc)
	e.narrow(w, event.SourceRecord)
	t.setReading(e, rd)
	return e
}

// findParent links e to its parent, if it has no creator yet: to the one in
// the table, else to the one in /proc, and so on up. It asks once for each
// process, so that a parent that is gone is not asked for with every event.
func (t *Table) findParent(e *entry) {
	for range maxDepth {
		if e.Parent != nil || e.orphan || e.PPID <= 0 || e.PPID == e.PID {
			return
		}
		p := t.procs[e.PPID]
		if p == nil || !p.mayBeParentOf(e) {
			if p = t.askParent(e); p == nil {
				e.orphan = true
				return
			}
		}
		if !t.holds(e) {
			e.Parent = &p.Process
			return
		}
		if !t.holds(p) || p.descends(e) {
			e.orphan = true
			return
		}
		e.adopt(p)
		e = p
	}
}

// mayBeParentOf says whether p, which has the pid of c's parent, can be it.
func (p *entry) mayBeParentOf(c *entry) bool {
	if c.ParentStart != 0 {
		if c.ParentStart < p.lo || c.ParentStart > p.hi {
			return false
		}
		p.narrow(window{c.ParentStart, c.ParentStart}, c.Sources[event.FieldParent])
		return true
	}
	return p.lo <= c.hi
}

// askParent reads the parent of e from /proc.
func (t *Table) askParent(e *entry) *entry {
	if t.cfg.FS == nil || t.n >= t.cfg.MaxProcesses {
		return nil
	}
	t.count.parentsAsked.Add(1)
	rd, err := t.read(e.PPID, t.cfg.MaxArgs, eventWait)
	if err == nil {
		w := tickWindow(&rd.Stat)
		s := e.ParentStart
		if w.lo <= e.hi && (s == 0 || s >= w.lo && s <= w.hi) {
			p, _ := t.newEntry(e.PPID, t.now())
			p.setStart(w, event.SourceProc)
			if s != 0 {
				p.narrow(window{s, s}, e.Sources[event.FieldParent])
			}
			t.setReading(p, rd)
			return p
		}
	}
	t.count.parentsMissing.Add(1)
	return nil
}

// cut says whether a record lacks text that /proc may still have.
func cut(r *event.Record) bool {
	const marks = event.MarkExeCut | event.MarkCwdCut | event.MarkCgroupCut
	return r.Have.Has(event.FieldArgs) && int(r.CmdlineLen) > len(r.Cmdline) || r.Marks&marks != 0
}

// complete fills in from /proc what is cut in the record of an exec, and
// returns the cgroup. It believes /proc only if the process is still the same
// and what it says agrees with what was recorded: the process may have run
// another program meanwhile, or rewritten its arguments.
func (t *Table) complete(e *entry, r *event.Record, p *program) (cgroup []byte) {
	cgroup = r.Cgroup
	rd, err := t.read(r.TGID, procfs.DefaultMaxArgs, eventWait)
	if err != nil || e.compare(tickWindow(&rd.Stat), 0) != same {
		t.count.incomplete.Add(1)
		return cgroup
	}
	e.narrow(tickWindow(&rd.Stat), event.SourceProc)
	done := true
	take := func(f event.Field, isCut, agrees bool) bool {
		if !isCut || !r.Have.Has(f) {
			return false
		}
		if !agrees || !rd.Have.Has(f) {
			done = false
			return false
		}
		e.Sources[f] = event.SourceProc
		return true
	}
	whole := len(rd.Cmdline) == int(rd.CmdlineLen)
	if take(event.FieldArgs, int(r.CmdlineLen) > len(r.Cmdline),
		bytes.HasPrefix(rd.Cmdline, r.Cmdline) && (!whole || rd.CmdlineLen == r.CmdlineLen)) {
		p.args = rd.Cmdline
	}
	sameFile := !r.Have.Has(event.FieldExeFile) || rd.ExeFile.Dev == r.ExeFile.Dev && rd.ExeFile.Ino == r.ExeFile.Ino
	if take(event.FieldExe, r.Marks.Has(event.MarkExeCut), sameFile && bytes.HasSuffix(rd.Exe, r.Exe)) {
		p.exe = rd.Exe
		e.Marks &^= event.MarkExeCut
	}
	if take(event.FieldCwd, r.Marks.Has(event.MarkCwdCut), bytes.HasSuffix(rd.Cwd, r.Cwd)) {
		p.cwd = rd.Cwd
		e.Marks &^= event.MarkCwdCut
	}
	// From inside a cgroup namespace of our own, paths are relative.
	if take(event.FieldCgroup, r.Marks.Has(event.MarkCgroupCut),
		bytes.HasSuffix(rd.Cgroup, r.Cgroup) && !bytes.HasPrefix(rd.Cgroup, []byte("/.."))) {
		cgroup = rd.Cgroup
		e.Marks &^= event.MarkCgroupCut
	}
	if done {
		t.count.completed.Add(1)
	} else {
		t.count.incomplete.Add(1)
	}
	return cgroup
}

// Rescan compares the table with /proc, after records were lost, and calls
// emit for each difference, with an event that is valid during the call:
//
//   - Exit of a process that is gone; its Status is not known and 0;
//   - Fork of a process that is new, and Exec as well unless it runs exactly
//     what its parent runs;
//   - Exec of a process that runs another program. The same file with other
//     arguments counts too, unless /proc proves that there was no exec: some
//     programs rewrite their arguments;
//   - UIDChange and GIDChange.
//
// All are Synthetic, without Record, at the time of the scan. Emit may read the
// table but not change it.
//
// A rescan costs some 20 us per known process and 60 to 100 us per new one, in
// the goroutine of the caller, while records wait. If records are lost again
// and again, call it once the loss is over, and at most once in some seconds.
func (t *Table) Rescan(emit func(*event.Event)) error {
	t.settle()
	if t.cfg.FS == nil {
		return nil
	}
	pids, err := t.cfg.FS.Pids()
	if err != nil {
		return fmt.Errorf("rescan processes: %w", err)
	}
	t.count.rescans.Add(1)
	t.scans++
	t.makeRoom(room)
	rs := rescan{t: t, at: t.now(), emit: emit}
	known, fresh := rs.sort(pids)
	rs.exits()
	rs.arrivals(fresh)
	for _, e := range known {
		rs.check(e)
		t.trim()
	}
	return nil
}

// A rescan is one comparison with /proc.
type rescan struct {
	t    *Table
	at   uint64 // stamp of the scan
	ev   event.Event
	emit func(*event.Event)
}

// tell emits an event about e and notes it, so that a record of it, still on
// its way, is not reported again.
func (rs *rescan) tell(k event.Kind, e *entry) {
	if e.told != rs.at {
		e.told, e.toldKinds = rs.at, 0
	}
	e.toldKinds |= event.KindSet(k)
	rs.ev.Kind, rs.ev.Stamp, rs.ev.Time = k, rs.at, rs.t.time.wall(rs.at)
	rs.ev.Synthetic, rs.ev.Process = true, &e.Process
	rs.t.count.synthetic.Add(1)
	rs.emit(&rs.ev)
	rs.ev.Reset()
}

// sort tells known processes from new ones.
func (rs *rescan) sort(pids []int32) (known []*entry, fresh []int32) {
	t := rs.t
	for _, pid := range pids {
		var st procfs.Stat
		err := t.cfg.FS.Stat(pid, &st)
		e := t.procs[pid]
		switch {
		case errors.Is(err, procfs.ErrGone):
		case err != nil:
			t.count.scanErrors.Add(1)
			if e != nil {
				e.scan = t.scans // not seen, but not gone either
			}
		case st.Dead():
		case e == nil || e.compare(tickWindow(&st), 0) != same:
			fresh = append(fresh, pid)
		default:
			e.scan = t.scans
			e.narrow(tickWindow(&st), event.SourceProc)
			if e.Exited { // its first thread only
				t.count.leaderExits.Add(1)
				t.keepAlive(e, rs.at)
			}
			known = append(known, e)
		}
	}
	return known, fresh
}

// exits reports the processes that are gone.
func (rs *rescan) exits() {
	t := rs.t
	var gone []*entry
	for _, e := range t.procs {
		if !e.Exited && e.scan != t.scans {
			gone = append(gone, e)
		}
	}
	slices.SortFunc(gone, func(a, b *entry) int { return cmp.Compare(a.PID, b.PID) })
	for _, e := range gone {
		leaderless := e.on != nil // the Exit of its first thread was reported
		t.end(e, rs.at)
		e.tellsEnd = true
		if leaderless {
			continue
		}
		if at, _ := t.time.boot(rs.at); e.Has(event.FieldStart) && at > e.Start {
			rs.ev.Duration = duration(at - e.Start)
		}
		rs.tell(event.Exit, e)
	}
}

// arrivals reports new processes, parents before children.
func (rs *rescan) arrivals(fresh []int32) {
	t := rs.t
	var found []*entry
	for _, pid := range fresh {
		rd := t.readAlive(pid)
		if rd == nil {
			continue
		}
		t.makeRoom(1)
		e, kept := t.newEntry(pid, rs.at)
		if !kept {
			continue
		}
		e.setStart(tickWindow(&rd.Stat), event.SourceProc)
		e.scan = t.scans
		t.setReading(e, rd)
		t.trim()
		found = append(found, e)
	}
	slices.SortFunc(found, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(a.lo, b.lo), cmp.Compare(a.PID, b.PID))
	})
	for _, e := range found {
		t.makeRoom(room)
		t.findParent(e)
	}
	for _, e := range found {
		rs.tell(event.Fork, e)
		if p := e.parent; p == nil || e.Exe != p.Exe || e.Cmdline != p.Cmdline {
			e.Execs++
			rs.tell(event.Exec, e)
		}
	}
}

// check reports what changed in a known process.
func (rs *rescan) check(e *entry) {
	t := rs.t
	before, known := e.IDs, e.Has(event.FieldIDs)
	if known && rs.unchanged(e) {
		return
	}
	rd, err := t.read(e.PID, t.cfg.MaxArgs, scanWait)
	if err != nil || rd.Stat.Dead() || e.compare(tickWindow(&rd.Stat), 0) != same {
		return // it ended just now, and a record will say so
	}
	if rs.otherProgram(e, rd) {
		resetProgram(e)
		t.setReading(e, rd)
		e.Execs++
		rs.tell(event.Exec, e)
	} else {
		t.completeEntry(e, rd)
	}
	if known && rd.Have.Has(event.FieldIDs) {
		rs.idChanges(e, before, &rd.Facts)
	}
}

// unchanged says, at a tenth of the price of a whole reading, whether program
// and ids of e are the same as before: the stack lies where it lay, the file
// has the same name, and so on.
func (rs *rescan) unchanged(e *entry) bool {
	t, fs := rs.t, rs.t.cfg.FS
	if e.image == 0 || !e.Has(event.FieldExe) {
		return false
	}
	var s procfs.Status
	if fs.Status(e.PID, &s) != nil || !s.HasIDs() || s.IDs() != e.IDs {
		return false
	}
	exe, err := fs.AppendExe(t.buf[:0], e.PID)
	t.buf = exe[:0]
	if err != nil || plain(string(exe)) != plain(e.Exe) {
		return false
	}
	var st procfs.Stat
	return fs.Stat(e.PID, &st) == nil && e.compare(tickWindow(&st), 0) == same && image(&st) == e.image
}

// otherProgram says whether e runs another program than the table knows.
func (rs *rescan) otherProgram(e *entry, rd *procfs.Reading) bool {
	if rd.Stat.KernelThread() || !rd.Have.Has(event.FieldExe) {
		return false
	}
	if e.Has(event.FieldExe) && plain(string(rd.Exe)) != plain(e.Exe) && !e.Marks.Has(event.MarkExeCut) {
		return true
	}
	if now := image(&rd.Stat); now != 0 && e.image != 0 {
		return now != e.image
	}
	if !rd.Have.Has(event.FieldArgs) || !e.Has(event.FieldArgs) {
		return false
	}
	n := min(len(rd.Cmdline), len(e.Cmdline))
	return string(rd.Cmdline[:n]) != e.Cmdline[:n] || rd.CmdlineLen != e.CmdlineLen
}

// idChanges reports ids that are not the ones before.
func (rs *rescan) idChanges(e *entry, before event.IDs, f *event.Facts) {
	after := f.IDs
	e.IDs = after
	e.Sources[event.FieldIDs] = event.SourceProc
	if f.Have.Has(event.FieldCaps) {
		e.CapPermitted, e.CapEffective = f.CapPermitted, f.CapEffective
		e.Sources[event.FieldCaps] = event.SourceProc
	}
	users := func(i event.IDs) [4]uint32 { return [4]uint32{i.UID, i.EUID, i.SUID, i.FSUID} }
	groups := func(i event.IDs) [4]uint32 { return [4]uint32{i.GID, i.EGID, i.SGID, i.FSGID} }
	if users(before) != users(after) {
		rs.ev.Before, rs.ev.HasBefore = before, true
		rs.tell(event.UIDChange, e)
	}
	if groups(before) != groups(after) {
		rs.ev.Before, rs.ev.HasBefore = before, true
		rs.tell(event.GIDChange, e)
	}
}

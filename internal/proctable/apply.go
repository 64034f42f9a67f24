package proctable

import (
	"math"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// Apply takes a record into the table and fills ev with what happened, and
// says whether there is something to report. Record and event stay the
// caller's; ev.Process and what it leads to are the table's, see the package's
// comment. Records should come in the order of their stamps; a few
// milliseconds of disorder do no harm.
func (t *Table) Apply(r *event.Record, ev *event.Event) bool {
	t.settle()
	t.count.applied.Add(1)
	if malformed(r) {
		t.count.malformed.Add(1)
		return false
	}
	if ofThread(r) {
		t.count.threads.Add(1)
		return false
	}
	t.makeRoom(room)
	// Suspends matter to the start times of forks; for the rest of it a
	// measurement a tenth of a second old is good enough.
	slack := uint64(100 * time.Millisecond)
	if r.Kind == event.Fork {
		slack = 0
	}
	t.time.cover(r.Stamp, slack)

	ev.Reset()
	ev.Kind, ev.Stamp, ev.Time, ev.Record = r.Kind, r.Stamp, t.time.wall(r.Stamp), r
	var report bool
	switch r.Kind {
	case event.Exec:
		report = t.exec(r, ev)
	case event.Fork:
		report = t.fork(r, ev)
	case event.Exit:
		report = t.exit(r, ev)
	case event.UIDChange, event.GIDChange:
		report = t.idChange(r, ev)
	case event.PtraceAttach, event.PtraceDetach:
		report = t.ptrace(r, ev)
	case event.CommChange:
		report = t.rename(r, ev)
	default: // SessionChange, CoreDump
		e := t.subject(r)
		t.refresh(e, r)
		ev.Process, report = &e.Process, true
	}
	if report {
		t.count.reported.Add(1)
	}
	return report
}

// malformed says whether a record names no process, or no kind.
func malformed(r *event.Record) bool {
	if r.Kind == event.KindUnknown || r.Kind > event.CoreDump {
		return true
	}
	switch r.Kind {
	case event.PtraceDetach: // whoever let go may be unknown
		return r.PeerTGID <= 0 || r.TGID < 0
	case event.Fork, event.PtraceAttach:
		return r.PeerTGID <= 0 || r.PeerPID <= 0 || r.TGID <= 0
	}
	return r.TGID <= 0 || r.PID <= 0
}

// ofThread says whether a record is about a thread, not about its process.
func ofThread(r *event.Record) bool {
	switch r.Kind {
	case event.Fork:
		return r.PeerPID != r.PeerTGID
	case event.Exit, event.CommChange:
		return r.PID != r.TGID
	}
	return false
}

// subject finds the process a record is about, or makes it.
func (t *Table) subject(r *event.Record) *entry {
	w := startWindow(&r.Facts)
	e := t.find(r.TGID, w, r.Stamp, r.From)
	if e != nil {
		return e
	}
	return t.learn(r.TGID, w, r)
}

// find is the known process with a pid and a start, as of stamp; nil if there
// is none. It is loose if the table has gone on to a younger process.
func (t *Table) find(pid int32, w window, stamp uint64, src event.Source) *entry {
	e := t.procs[pid]
	if e == nil {
		return nil
	}
	if e.Exited && w == anyStart && stamp > e.due {
		return nil // the pid alone does not say that it is still this process
	}
	_, at := t.time.boot(stamp)
	switch e.compare(w, at+forkSlack) {
	case later:
		return nil
	case earlier:
		t.count.stale.Add(1)
		e = t.looseEntry(pid)
		e.setStart(w, src)
		return e
	}
	e.narrow(w, src)
	return e
}

// learn makes the process of a record that is not in the table: from the
// record, and for what that does not say from /proc.
func (t *Table) learn(pid int32, w window, r *event.Record) *entry {
	t.count.unknown.Add(1)
	if r.Kind == event.Exit && pid == r.TGID {
		// Nothing is left to read, and nothing will come of it.
		e := t.looseEntry(pid)
		e.setStart(w, r.From)
		return e
	}
	if r.Kind != event.Exec && t.cfg.FS != nil {
		if e := t.fromProc(pid, w, r.Stamp); e != nil {
			return e
		}
	}
	e, _ := t.newEntry(pid, r.Stamp)
	e.setStart(w, r.From)
	return e
}

// programFields are the facts that a new program replaces. What a program
// cannot change by its start stays: parent, session, login; and ids, whose
// changes have events of their own.
var programFields = [...]event.Field{
	event.FieldName, event.FieldExe, event.FieldFile, event.FieldArgs, event.FieldCwd,
	event.FieldExeFile, event.FieldCaps, event.FieldNS,
}

func (t *Table) exec(r *event.Record, ev *event.Event) bool {
	e := t.subject(r)
	if e.toldBy(event.Exec, r.Stamp) && sameProgram(e, r) {
		t.count.late.Add(1)
		t.refresh(e, r)
		return false
	}
	if e.knownAfter(r.Stamp) {
		e = t.looseCopy(e) // the table shows what it ran after this
	}
	switch {
	case e.Exited && r.Stamp >= e.ExitedAt && t.holds(e):
		// What had ended was the first thread only: another one has taken its
		// pid, and the process goes on.
		t.count.revived.Add(1)
		t.revive(e)
	case !e.Exited && e.on != nil:
		e.unlist() // the same, but it was known to go on
	}
	t.setExec(e, r)
	t.trimLater(e)
	t.findParent(e)
	ev.Process = &e.Process
	return true
}

// setExec gives e the program of a record, and nothing of the old one.
func (t *Table) setExec(e *entry, r *event.Record) {
	resetProgram(e)
	e.Execs++
	p, argsLen := recordProgram(r)
	e.CmdlineLen = argsLen
	e.Marks |= r.Marks
	t.setFacts(e, &r.Facts)
	for _, f := range programFields {
		if r.Have.Has(f) {
			e.Sources[f] = r.From
		}
	}
	cgroup := r.Cgroup
	if cut(r) && t.cfg.FS != nil {
		cgroup = t.complete(e, r, &p)
	}
	t.setProgram(e, p)
	if r.Have.Has(event.FieldCgroup) {
		t.setCgroup(e, cgroup, e.Sources[event.FieldCgroup])
	}
}

// resetProgram forgets what an exec changes, or may have changed.
func resetProgram(e *entry) {
	for _, f := range programFields {
		e.Sources[f] = event.SourceNone
	}
	if e.Has(event.FieldCgroup) {
		// A process is moved between cgroups without a message, and the start
		// of a container is the usual time for it: what was known is a hint now.
		e.Sources[event.FieldCgroup] = event.SourceLineage
	}
	if !e.NoNewPrivs { // once set it stays
		e.Sources[event.FieldNNP] = event.SourceNone
	}
	e.ExeFile, e.Marks, e.CmdlineLen = event.ExeFile{}, e.Marks&event.MarkCgroupCut, 0
	e.CapPermitted, e.CapEffective, e.NS, e.InnerPID = 0, 0, event.NS{}, 0
	e.image = 0
}

// sameProgram says whether e already shows what a record of an exec says.
func sameProgram(e *entry, r *event.Record) bool {
	n := min(len(r.Cmdline), len(e.Cmdline))
	return string(r.Exe) == e.Exe && string(r.Cmdline[:n]) == e.Cmdline[:n] &&
		(n == len(r.Cmdline) || n == len(e.Cmdline)) && r.CmdlineLen == e.CmdlineLen
}

// recordProgram is the text of a record, without what it does not have.
func recordProgram(r *event.Record) (p program, argsLen uint32) {
	if r.Have.Has(event.FieldName) {
		p.name = r.Comm
	}
	if r.Have.Has(event.FieldExe) {
		p.exe = r.Exe
	}
	if r.Have.Has(event.FieldFile) {
		p.file = r.File
	}
	if r.Have.Has(event.FieldArgs) {
		p.args, argsLen = r.Cmdline, max(r.CmdlineLen, uint32(len(r.Cmdline)))
	}
	if r.Have.Has(event.FieldCwd) {
		p.cwd = r.Cwd
	}
	return p, argsLen
}

// setFacts takes over the numbers of facts that are there, all but the start.
func (t *Table) setFacts(e *entry, f *event.Facts) {
	set := func(field event.Field) bool {
		if !f.Have.Has(field) {
			return false
		}
		e.Sources[field] = f.From
		return true
	}
	if set(event.FieldParent) {
		e.PPID, e.ParentStart = f.PPID, f.ParentStart
	}
	if set(event.FieldIDs) {
		e.IDs = f.IDs
	}
	if set(event.FieldCaps) {
		e.CapPermitted, e.CapEffective = f.CapPermitted, f.CapEffective
	}
	if set(event.FieldNS) {
		e.NS, e.InnerPID = f.NS, f.InnerPID
	}
	if set(event.FieldSession) {
		e.SID, e.TTY = f.SID, f.TTY
	}
	if set(event.FieldLogin) {
		e.LoginUID, e.AuditSession = f.LoginUID, f.AuditSession
	}
	if set(event.FieldNNP) {
		e.NoNewPrivs = f.NoNewPrivs
	}
	if f.Have.Has(event.FieldCgroup) {
		e.Sources[event.FieldCgroup] = f.From
	}
	if f.Have.Has(event.FieldExeFile) && !e.Has(event.FieldExeFile) {
		e.ExeFile = f.ExeFile
		e.Sources[event.FieldExeFile] = f.From
	}
}

// refresh takes over what a record other than an exec says about its subject
// as it is now. The program's facts are filled in only where they are
// missing: in a set-uid exec the id change comes before the exec, with the new
// program's name already.
func (t *Table) refresh(e *entry, r *event.Record) {
	f := r.Facts
	if r.PID != r.TGID || r.Kind == event.CommChange {
		// Of a thread that need not be the first one, or, for a new name, of
		// whoever wrote it: these belong to threads.
		f.Have &^= event.FieldSet(event.FieldIDs, event.FieldCaps, event.FieldName, event.FieldNS,
			event.FieldLogin, event.FieldNNP, event.FieldCgroup)
	}
	if r.Kind == event.UIDChange || r.Kind == event.GIDChange {
		f.Have &^= event.FieldSet(event.FieldIDs)
		if e.Has(event.FieldName) {
			f.Have &^= event.FieldSet(event.FieldName)
		}
	}
	t.setFacts(e, &f)
	if f.Have.Has(event.FieldCgroup) {
		t.setCgroup(e, f.Cgroup, f.From)
		e.Marks = e.Marks&^event.MarkCgroupCut | f.Marks&event.MarkCgroupCut
	}
	if f.Have.Has(event.FieldName) && string(f.Comm) != e.Name {
		e.Name = string(f.Comm)
	}
	if f.Have.Has(event.FieldName) {
		e.Sources[event.FieldName] = f.From
	}
	t.fill(e, &f)
	t.findParent(e)
}

// fill adds text of the program where there is none.
func (t *Table) fill(e *entry, f *event.Facts) {
	want := func(field event.Field) bool { return f.Have.Has(field) && !e.Has(field) }
	if !want(event.FieldName) && !want(event.FieldExe) && !want(event.FieldFile) && !want(event.FieldArgs) &&
		!want(event.FieldCwd) {
		return
	}
	p := e.program()
	add := func(field event.Field, to *[]byte, b []byte) {
		if want(field) {
			*to = b
			e.Sources[field] = f.From
		}
	}
	if want(event.FieldArgs) {
		e.CmdlineLen = max(f.CmdlineLen, uint32(len(f.Cmdline)))
	}
	if want(event.FieldExe) {
		e.Marks = e.Marks&event.MarkCgroupCut | f.Marks
	}
	add(event.FieldName, &p.name, f.Comm)
	add(event.FieldExe, &p.exe, f.Exe)
	add(event.FieldFile, &p.file, f.File)
	add(event.FieldArgs, &p.args, f.Cmdline)
	add(event.FieldCwd, &p.cwd, f.Cwd)
	t.setProgram(e, p)
	t.trimLater(e)
}

func (t *Table) fork(r *event.Record, ev *event.Event) bool {
	lo, hi := t.time.boot(r.Stamp)
	w := window{lo - min(lo, forkBound), hi + forkSlack}
	if r.PeerStart != 0 {
		w = window{r.PeerStart, r.PeerStart}
	}
	creator := t.subject(r)
	t.refresh(creator, r)

	if c := t.procs[r.PeerTGID]; c != nil && c.seen > r.Stamp && c.compare(w, 0) == same {
		// Evidence of the child came before that of its making: a scan, or
		// records of several sockets in a wrong order.
		c.narrow(w, event.SourceMessage)
		if t.holds(creator) && !creator.descends(c) {
			c.adopt(creator)
		}
		ev.Process = &c.Process
		if c.toldBy(event.Fork, r.Stamp) {
			t.count.late.Add(1)
			return false
		}
		return true
	}

	c, kept := t.newEntry(r.PeerTGID, r.Stamp)
	c.inherit(creator)
	if r.Have.Has(event.FieldIDs) { // of the thread that forked
		c.IDs = r.IDs
		c.Sources[event.FieldIDs] = event.SourceLineage
	}
	c.lo, c.hi = w.lo, w.hi
	c.Start, c.StartExact = lo, false
	c.Sources[event.FieldStart] = event.SourceMessage
	if r.PeerStart != 0 {
		c.Start, c.StartExact = r.PeerStart, true
		c.Sources[event.FieldStart] = r.From
	}
	c.PPID, c.ParentStart = r.TGID, creator.exactStart()
	if r.RealParent > 0 && r.RealParent != r.TGID {
		c.PPID, c.ParentStart = r.RealParent, 0
		if p := t.procs[r.RealParent]; p != nil {
			c.ParentStart = p.exactStart()
		}
	}
	c.Sources[event.FieldParent] = event.SourceMessage
	if r.Have != 0 && r.From == event.SourceRecord {
		c.Sources[event.FieldParent] = event.SourceRecord
	}
	if kept {
		c.prog, c.group = creator.prog.share(), creator.group.share()
		t.beChild(c, creator)
	} else {
		c.Parent = &creator.Process
	}
	ev.Process = &c.Process
	return true
}

// exactStart is the start if it is known exactly, else 0.
func (e *entry) exactStart() uint64 {
	if e.StartExact {
		return e.Start
	}
	return 0
}

// inherit gives e everything of its creator but the identity.
func (e *entry) inherit(from *entry) {
	pid := e.PID
	e.Process = from.Process
	for f, s := range e.Sources {
		if s != event.SourceNone {
			e.Sources[f] = event.SourceLineage
		}
	}
	e.PID, e.InnerPID, e.Parent = pid, 0, nil
	e.Execs, e.Exited, e.ExitedAt, e.Status = 0, false, 0, 0
	e.image = from.image
}

// beChild links a child to a creator that is in the table.
func (t *Table) beChild(c, creator *entry) {
	if !t.holds(creator) {
		return
	}
	c.adopt(creator)
	if c.depth > maxDepth {
		t.shorten(c)
	}
}

// holds says whether e is in the table, not loose.
func (t *Table) holds(e *entry) bool { return e.on != nil || t.procs[e.PID] == e }

func (t *Table) exit(r *event.Record, ev *event.Event) bool {
	e := t.subject(r)
	t.refresh(e, r)
	ev.Process, ev.Status, ev.RunTime = &e.Process, r.Status, duration(r.RunTime)
	if e.Has(event.FieldStart) {
		if at, _ := t.time.boot(r.Stamp); at > e.Start {
			ev.Duration = duration(at - e.Start)
		}
	}
	e.Status = r.Status
	// With one thread at its end a process is over; with more it may be that
	// only the first one is.
	e.tellsEnd = r.Threads == 1
	if e.toldBy(event.Exit, r.Stamp) {
		t.count.late.Add(1)
		return false
	}
	if t.holds(e) {
		if e.Exited {
			t.count.remembered.Add(-1)
			t.count.live.Add(1)
		}
		t.end(e, r.Stamp)
	} else {
		e.Exited, e.ExitedAt = true, r.Stamp
	}
	return true
}

func (t *Table) idChange(r *event.Record, ev *event.Event) bool {
	e := t.subject(r)
	ids, src := newIDs(e, r)
	before := e.IDs
	known := e.Has(event.FieldIDs)
	if known && ids == before {
		switch {
		case e.toldBy(r.Kind, r.Stamp):
			t.refresh(e, r)
			t.count.late.Add(1)
			return false
		case e.changer != 0 && r.PID != e.changer && distance(r.Stamp, e.changed) <= uint64(RepeatWindow):
			t.refresh(e, r)
			t.count.repeats.Add(1)
			return false
		case r.PID != r.TGID || src == event.SourceRecord:
			known = false // its ids were others before, but not those of the process
		}
	}
	if e.Sources[event.FieldIDs] == event.SourceProc && e.seen >= r.Stamp {
		known = false // what /proc said was read after the change
	}
	if e.knownAfter(r.Stamp) {
		e, known = t.looseCopy(e), false // the table shows the ids after this change
	}
	caps, hasCaps := e.CapPermitted, e.Has(event.FieldCaps)
	t.refresh(e, r)
	if known {
		ev.Before, ev.HasBefore = before, true
		ev.CapsBefore, ev.HasCapsBefore = caps, hasCaps
	}
	if src == event.SourceRecord || e.Has(event.FieldIDs) {
		e.Sources[event.FieldIDs] = src
	}
	e.IDs, e.changer, e.changed = ids, r.PID, r.Stamp
	ev.Process = &e.Process
	return true
}

// newIDs are the ids after a change, and where they come from. The recorder
// has them all, as they were in the task. Without it there are two in the
// message. What /proc says in addition was read later, and may be the result
// of a later change: it is believed if it agrees with the message, and for the
// kind of ids that changed. Else the file system id is that of the effective
// one, as always unless a program asks otherwise, and the saved one is left as
// it was.
func newIDs(e *entry, r *event.Record) (ids event.IDs, src event.Source) {
	ids, src = e.IDs, event.SourceMessage
	if r.Have.Has(event.FieldIDs) && r.From == event.SourceRecord {
		return r.IDs, event.SourceRecord
	}
	read := r.IDs
	if r.Kind == event.UIDChange {
		ids.UID, ids.EUID, ids.FSUID = r.ID, r.EID, r.EID
		if r.Have.Has(event.FieldIDs) && read.UID == r.ID && read.EUID == r.EID {
			ids.SUID, ids.FSUID = read.SUID, read.FSUID
		}
		return ids, src
	}
	ids.GID, ids.EGID, ids.FSGID = r.ID, r.EID, r.EID
	if r.Have.Has(event.FieldIDs) && read.GID == r.ID && read.EGID == r.EID {
		ids.SGID, ids.FSGID = read.SGID, read.FSGID
	}
	return ids, src
}

// distance is the time between two stamps; their order is not certain.
func distance(a, b uint64) uint64 { return max(a, b) - min(a, b) }

func duration(ns uint64) time.Duration { return time.Duration(min(ns, math.MaxInt64)) }

func (t *Table) ptrace(r *event.Record, ev *event.Event) bool {
	var w = anyStart
	if r.PeerStart != 0 {
		w = window{r.PeerStart, r.PeerStart}
	}
	target := t.find(r.PeerTGID, w, r.Stamp, r.From)
	if target == nil {
		target = t.learn(r.PeerTGID, w, r)
	}
	var tracer *entry
	switch {
	case r.TGID > 0:
		tracer = t.subject(r)
		t.refresh(tracer, r)
	case t.procs[target.tracer] != nil: // a message of a detach does not name the tracer
		tracer = t.procs[target.tracer]
	default:
		tracer = t.looseEntry(0)
	}
	if target.tracer = tracer.PID; r.Kind == event.PtraceDetach {
		target.tracer = 0
	}
	ev.Process, ev.Target = &tracer.Process, &target.Process
	return true
}

func (t *Table) rename(r *event.Record, ev *event.Event) bool {
	e := t.subject(r)
	ev.PrevName, ev.HasPrev = e.Name, e.Has(event.FieldName)
	t.refresh(e, r)
	if r.Have.Has(event.FieldName) {
		e.Name = string(r.Comm)
		e.Sources[event.FieldName] = r.From
	}
	ev.Process = &e.Process
	return true
}

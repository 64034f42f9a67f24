package recorder

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/procession-dev/procession/internal/event"
)

// A DecodeError says where a record is not what it should be.
type DecodeError struct {
	Off  int    // byte offset in the record
	Want string // what should have been there
}

// Error names the offset and the expectation.
func (e *DecodeError) Error() string {
	return fmt.Sprintf("record: byte %d: want %s", e.Off, e.Want)
}

// A Decoder turns records into event.Record. It keeps the room in which paths
// are put together, so one Decoder serves one goroutine.
type Decoder struct {
	text []byte
}

// deleted is what the kernel appends to the path of a file without a name
// (d_path, fs/d_path.c).
const deleted = " (deleted)"

// NewDecoder makes a Decoder.
func NewDecoder() *Decoder {
	return &Decoder{text: make([]byte, 0, cgroupMax+exeMax+cwdMax+3*len("/")+2*len(deleted))}
}

// Decode overwrites rec with the record in b and allocates nothing. Text in rec
// lies in b or in the Decoder: it is valid until b changes or Decode is called
// again. The error is a *DecodeError; rec is then empty.
//
// The answer to somebody's LISTEN or IGNORE has no kind: it becomes a record of
// event.KindUnknown, see AckOf.
func (d *Decoder) Decode(b []byte, rec *event.Record) error {
	*rec = event.Record{}
	sec, err := split(b)
	if err != nil {
		return err
	}
	if err := decodeMessage(b, rec); err != nil {
		*rec = event.Record{}
		return err
	}
	rec.From = event.SourceRecord
	d.text = d.text[:0]
	decodeTask(b, rec)
	d.decodeText(b, &sec, rec)
	return nil
}

// AckOf says whether rec is the answer to a LISTEN or IGNORE. ack is the
// request's cn_msg.ack + 1, so that the caller finds his own among those of
// other programs; errno is 0 if the kernel agreed. Record.TGID is the process
// that asked.
func AckOf(rec *event.Record) (ack, errno uint32, ok bool) {
	return rec.ID, rec.Status, rec.Kind == event.KindUnknown
}

func u32(b []byte, off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }
func u64(b []byte, off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
func i32(b []byte, off int) int32  { return int32(u32(b, off)) }

// sections are the texts behind the header, as they lie there.
type sections struct {
	cgroup, exe, cwd, file, args []byte
}

// split checks the frame of a record and cuts its text into sections. The
// header is complete after it, and each section lies inside b.
func split(b []byte) (s sections, err error) {
	if len(b) < headSize {
		return s, &DecodeError{len(b), "a header"}
	}
	if u32(b, offVersion) != Version {
		return s, &DecodeError{offVersion, "version 1"}
	}
	if uint64(u32(b, offLen)) != uint64(len(b)) {
		return s, &DecodeError{offLen, "the length of the record"}
	}
	if u32(b, offFlags)&^flagsKnown != 0 {
		return s, &DecodeError{offFlags, "known flags only"}
	}
	off := headSize
	for _, t := range [...]struct {
		dst      *[]byte
		off, max int
	}{
		{&s.cgroup, offCgroupLen, cgroupMax},
		{&s.exe, offExeLen, exeMax},
		{&s.cwd, offCwdLen, cwdMax},
		{&s.file, offFileLen, fileMax},
		{&s.args, offArgsLen, argsMax},
	} {
		n := u32(b, t.off)
		if n > uint32(t.max) || int(n) > len(b)-off {
			return s, &DecodeError{t.off, "a length inside the record"}
		}
		*t.dst = b[off : off+int(n) : off+int(n)]
		off += int(n)
	}
	if off != len(b) {
		return s, &DecodeError{off, "the end of the record"}
	}
	for _, names := range [...][]byte{s.cgroup, s.exe, s.cwd, s.file} {
		if len(names) > 0 && names[len(names)-1] != 0 {
			return s, &DecodeError{headSize, "names that end with NUL"}
		}
	}
	if u32(b, offArgsTotal) < u32(b, offArgsLen) {
		return s, &DecodeError{offArgsTotal, "at least the bytes that are there"}
	}
	return s, nil
}

// decodeMessage fills in what the connector's message says, and who did it.
//
// The facts of a record are those of the task that ran the program. Where the
// message names that task too both must agree: a record in which they do not
// would put one process's facts on another.
func decodeMessage(b []byte, rec *event.Record) error {
	rec.CPU, rec.Seq, rec.Stamp = u32(b, offCPU), u32(b, offSeq), u64(b, offStamp)
	rec.PID, rec.TGID = i32(b, offPID), i32(b, offTGID)
	if rec.PID <= 0 || rec.TGID <= 0 {
		return &DecodeError{offPID, "a task"}
	}
	subject := dataTGID // where the message names the subject's process
	switch u32(b, offWhat) {
	case whatAck:
		rec.ID, rec.Status = u32(b, offAck), u32(b, dataErr)
		return nil
	case whatFork:
		rec.Kind = event.Fork
		rec.RealParent = i32(b, forkParentTGID)
		rec.PeerPID, rec.PeerTGID = i32(b, forkChildPID), i32(b, forkChildTGID)
		subject = offTGID // the message does not name the creator
	case whatExec:
		rec.Kind = event.Exec
	case whatUID:
		rec.Kind = event.UIDChange
		rec.ID, rec.EID = u32(b, idNew), u32(b, idNewEff)
	case whatGID:
		rec.Kind = event.GIDChange
		rec.ID, rec.EID = u32(b, idNew), u32(b, idNewEff)
	case whatSID:
		rec.Kind = event.SessionChange
	case whatPtrace:
		rec.Kind = event.PtraceAttach
		rec.PeerPID, rec.PeerTGID = i32(b, dataPID), i32(b, dataTGID)
		subject = ptraceTracerTGID
		if u32(b, ptraceTracerPID) == 0 {
			rec.Kind = event.PtraceDetach
			subject = offTGID // the message does not name the tracer
		}
	case whatComm:
		rec.Kind = event.CommChange
	case whatCoreDump:
		rec.Kind = event.CoreDump
	case whatExit:
		rec.Kind = event.Exit
		rec.Status, rec.ExitSignal = u32(b, exitCode), i32(b, exitSignal)
	default:
		return &DecodeError{offWhat, "a kind of event"}
	}
	if i32(b, subject) != rec.TGID {
		return &DecodeError{subject, "the process that the record is about"}
	}
	if subject == dataTGID {
		// The thread that changed: for a name it may be another one of the
		// process than the one that wrote it.
		rec.PID = i32(b, dataPID)
	}
	if f := u32(b, offFlags); f&flagPeer != 0 && i32(b, offPeerPID) == rec.PeerPID {
		rec.PeerStart = u64(b, offPeerStart)
	}
	return nil
}

// decodeTask fills in the numbers about the task.
func decodeTask(b []byte, rec *event.Record) {
	flags := u32(b, offFlags)
	if rec.Start = u64(b, offStart); rec.Start != 0 {
		rec.Have |= event.FieldSet(event.FieldStart)
	}
	if rec.Kind == event.KindUnknown {
		return
	}
	decodeParent(b, rec)
	if flags&flagIDs != 0 {
		rec.Have |= event.FieldSet(event.FieldIDs)
		rec.IDs = event.IDs{
			UID: u32(b, offIDs), GID: u32(b, offIDs+4),
			SUID: u32(b, offIDs+8), SGID: u32(b, offIDs+12),
			EUID: u32(b, offIDs+16), EGID: u32(b, offIDs+20),
			FSUID: u32(b, offIDs+24), FSGID: u32(b, offIDs+28),
		}
	}
	if flags&flagCaps != 0 {
		rec.Have |= event.FieldSet(event.FieldCaps)
		rec.CapPermitted, rec.CapEffective = u64(b, offCaps), u64(b, offCaps+8)
	}
	if flags&flagNS != 0 {
		rec.Have |= event.FieldSet(event.FieldNS)
		rec.NS = event.NS{PID: u32(b, offNSPID), Mnt: u32(b, offNSMnt), User: u32(b, offNSUser), Net: u32(b, offNSNet)}
		rec.InnerPID = i32(b, offInnerPID)
	}
	if flags&flagSession != 0 {
		rec.Have |= event.FieldSet(event.FieldSession)
		rec.SID, rec.TTY = i32(b, offSID), i32(b, offTTY)
	}
	if flags&flagLogin != 0 {
		rec.Have |= event.FieldSet(event.FieldLogin)
		rec.LoginUID, rec.AuditSession = u32(b, offLogin), u32(b, offAuditSession)
	}
	rec.Have |= event.FieldSet(event.FieldNNP)
	rec.NoNewPrivs = u32(b, offTaskFlags)&1 != 0 // PFA_NO_NEW_PRIVS
	rec.Threads = i32(b, offThreads)
	if flags&flagExeFile != 0 {
		rec.Have |= event.FieldSet(event.FieldExeFile)
		rec.ExeFile = event.ExeFile{
			Dev: uint64(u32(b, offExeDev)), Ino: u64(b, offExeIno), Mode: uint16(u32(b, offExeMode)),
			UID: u32(b, offExeOwner), GID: u32(b, offExeOwner+4),
			Nlink: u32(b, offExeNlink), Magic: u64(b, offExeMagic),
		}
	}
	if rec.Kind == event.Exit {
		rec.RunTime, rec.MaxRSS = runTime(b), u64(b, offMaxRSS)
	}
}

// decodeParent fills in the parent. A dying task may have been reaped already,
// and its parent with it: what it still points to is then no process any more,
// and the kernel leaves the parent out of the message too.
func decodeParent(b []byte, rec *event.Record) {
	ppid, start := i32(b, offPPID), u64(b, offParentStart)
	if start == 0 && ppid != 0 || rec.Kind == event.Exit && i32(b, exitParentTGID) != ppid {
		return
	}
	rec.Have |= event.FieldSet(event.FieldParent)
	rec.PPID, rec.ParentStart = ppid, start
}

// runTime is the CPU time of a process that ends: of the thread that ran the
// program and of those that ended before. As soon as a task is dead (and no
// longer a zombie) the kernel may have added the first to the second.
func runTime(b []byte) uint64 {
	own, others := u64(b, offRunTime), u64(b, offRunTimeOthers)
	const exitZombie = 0x20 // EXIT_ZOMBIE, include/linux/sched.h
	if u32(b, offExitState)&exitZombie != 0 {
		return own + others
	}
	return max(own, others)
}

// decodeText fills in names and paths, and the marks that follow from them.
func (d *Decoder) decodeText(b []byte, s *sections, rec *event.Record) {
	flags := u32(b, offFlags)
	if rec.Kind == event.CommChange {
		rec.Have |= event.FieldSet(event.FieldName)
		rec.Comm = untilNUL(b[commName : commName+commSize : commName+commSize])
	} else if flags&flagComm != 0 {
		rec.Have |= event.FieldSet(event.FieldName)
		rec.Comm = untilNUL(b[offComm : offComm+commSize : offComm+commSize])
	}
	if flags&(flagCgroupTop|flagCgroupCut) != 0 {
		rec.Have |= event.FieldSet(event.FieldCgroup)
		rec.Cgroup = d.join(s.cgroup, "")
		if flags&flagCgroupCut != 0 {
			rec.Marks |= event.MarkCgroupCut
		}
	}
	d.decodeExe(b, s.exe, rec)
	if p := flags >> cwdShift; p&(pathTop|pathPseudo|pathCut) != 0 {
		rec.Have |= event.FieldSet(event.FieldCwd)
		rec.Cwd, _ = d.path(s.cwd, p)
		if p&pathCut != 0 {
			rec.Marks |= event.MarkCwdCut
		}
	}
	if flags&flagFile != 0 {
		rec.Have |= event.FieldSet(event.FieldFile)
		rec.File = untilNUL(s.file)
	}
	if flags&flagArgs != 0 {
		rec.Have |= event.FieldSet(event.FieldArgs)
		rec.Cmdline, rec.CmdlineLen = s.args, u32(b, offArgsTotal)
	}
}

// decodeExe fills in the path of the executable, and what it tells about it.
func (d *Decoder) decodeExe(b, names []byte, rec *event.Record) {
	flags := u32(b, offFlags)
	if flags&flagUpperKnown != 0 {
		rec.Marks |= event.MarkUpperKnown
		if flags&flagUpper != 0 {
			rec.Marks |= event.MarkUpper
		}
	}
	p := flags >> exeShift & pathBits
	if p&(pathTop|pathPseudo|pathCut) == 0 {
		return // a name on the way could not be read
	}
	var memfd bool
	rec.Have |= event.FieldSet(event.FieldExe)
	rec.Exe, memfd = d.path(names, p)
	switch {
	case memfd:
		rec.Marks |= event.MarkMemfd
		return // it is on a mount of the kernel's own: nothing below applies
	case p&pathUnhash != 0:
		rec.Marks |= event.MarkDeleted
	}
	if p&pathCut != 0 {
		rec.Marks |= event.MarkExeCut
		return // the walk did not come far enough to know the rest
	}
	if p&pathRoot == 0 {
		rec.Marks |= event.MarkOutsideRoot
	}
	if flags&flagExeNS == 0 {
		return
	}
	// Mounts that are in no mount namespace, or in an anonymous one as made by
	// open_tree(2): MNT_NS_ANON_INO since 6.18, without number before.
	const anonymousNS = 0xeffffff7
	switch ns := u32(b, offExeNS); {
	case ns == 0 || ns == anonymousNS:
		rec.Marks |= event.MarkDetached
	case flags&flagNS != 0 && ns != rec.NS.Mnt:
		rec.Marks |= event.MarkForeign
	}
}

// path puts a path together as readlink of /proc/PID/exe shows it, and says
// whether it is an anonymous file.
func (d *Decoder) path(names []byte, p uint32) (path []byte, memfd bool) {
	if p&pathPseudo != 0 {
		last := bytes.LastIndexByte(names[:max(len(names)-1, 0)], 0) + 1
		if last == 0 && string(names) != "/\x00" {
			// A file that never had a place in a tree names itself
			// (simple_dname, fs/d_path.c): "/memfd:x (deleted)". Its name is the
			// workload's: nothing but the number of names tells it from the rest.
			return d.join(names, deleted), true
		}
		// The walk ended at the root of a file system, beside the mount's root:
		// the file was moved out of a bind mount. From where it is now no path
		// leads to it, and the kernel shows "/" (prepend_path, "escaped").
		names = nil
	}
	if p&pathUnhash != 0 {
		return d.join(names, deleted), false
	}
	return d.join(names, ""), false
}

// join puts names, leaf first and each with its NUL, together as a path. A name
// with its slash takes as much room as with its NUL.
func (d *Decoder) join(names []byte, suffix string) []byte {
	from := len(d.text)
	at := from + len(names)
	d.text = d.text[:at]
	for len(names) > 0 {
		n := bytes.IndexByte(names, 0)
		at -= n + 1
		d.text[at] = '/'
		copy(d.text[at+1:], names[:n])
		names = names[n+1:]
	}
	if len(d.text) == from {
		d.text = append(d.text, '/')
	}
	d.text = append(d.text, suffix...)
	return d.text[from:len(d.text):len(d.text)]
}

// untilNUL cuts b at its first NUL: kernels before 5.11 leave the rest of an
// older name behind it.
func untilNUL(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i:i]
	}
	return b
}

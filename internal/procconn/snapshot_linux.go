package procconn

import (
	"bytes"
	"fmt"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
	"golang.org/x/sys/unix"
)

const (
	commMax = 15

	// snapshotRoom is what facts may append to the text buffer.
	snapshotRoom = 4*partMax + commMax
)

// A snapshotter makes facts of what was gathered in /proc. It belongs to one thread,
// allocates nothing, and trusts nothing that was read. It differs from procfs.FS in
// what it is for: one attempt within microseconds, while the process stands still,
// instead of a right answer in the end.
type snapshotter struct {
	cwd    bool // the working directory is wanted
	stat   procfs.Stat
	status procfs.Status
}

// fallbackFacts are the facts a snapshot can give.
func fallbackFacts(cwd bool) event.Fields {
	f := event.FieldSet(event.FieldStart, event.FieldParent, event.FieldName, event.FieldExe, event.FieldArgs,
		event.FieldIDs, event.FieldCaps, event.FieldCgroup, event.FieldSession, event.FieldNNP, event.FieldExeFile)
	if cwd {
		f |= event.FieldSet(event.FieldCwd)
	}
	return f
}

func openProc() (int, error) {
	fd, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /proc: %w", err)
	}
	return fd, nil
}

// facts makes of what was gathered about a process that ran exec at stamp the facts
// f. Text is appended to text, which must have snapshotRoom left: f points into it.
// bootOffset is that of sinceBoot.
//
// While a further exec goes on the arguments read as empty, and afterwards they are
// others; so if they were the same after exe, exe belongs to them. An exec does not
// move to another cgroup.
func (s *snapshotter) facts(f *event.Facts, h *heard, stamp, bootOffset uint64, text []byte) ([]byte, outcome, doubt) {
	var d doubt
	start := len(text)
	// No arguments at all means that the memory is gone: an exec without any still
	// has one NUL.
	text, f.Cmdline = add(text, h.parts[partArgs])
	have(f, event.FieldArgs, len(f.Cmdline) > 0)
	if f.CmdlineLen = uint32(len(f.Cmdline)); f.CmdlineLen == partMax {
		f.CmdlineLen++ // cut; stat may know the true length
	}
	text, f.Exe = add(text, h.parts[partExe])
	have(f, event.FieldExe, len(f.Exe) > 0)
	if path, ok := procfs.ParseCgroup(h.parts[partCgroup]); ok {
		text, f.Cgroup = add(text, path)
	}
	exeFile(f, h)
	text, f.Cwd = add(text, h.parts[partCwd])
	have(f, event.FieldCwd, len(f.Cwd) > 0)
	if f.Have != 0 && !h.same {
		// Keep the arguments, the first thing read: they were right then.
		d |= doubtExe
		f.Exe, f.Cwd, f.ExeFile, f.Marks = nil, nil, event.ExeFile{}, 0
		f.Have &= event.FieldSet(event.FieldArgs)
	}
	s.ids(f, h.parts[partStatus])
	text, alive := s.times(f, h.parts[partStat], text)

	if f.Have.Has(event.FieldStart) && f.Start > stamp+bootOffset+procfs.Tick {
		*f = event.Facts{}
		return text[:start], wrongProcess, 0
	}
	// /proc answers "/" for a task that has just died, and means nothing by
	// it. Who lives now, after the cgroup was read, lived then.
	if len(f.Cgroup) == 1 && !alive {
		d |= doubtCgroup
		f.Cgroup = nil
	}
	have(f, event.FieldCgroup, len(f.Cgroup) > 0)
	if h.denied {
		d |= doubtDenied
	}
	if f.Have == 0 {
		return text, gone, d
	}
	f.From = event.SourceProc
	if want := fallbackFacts(s.cwd); f.Have&want != want {
		return text, partial, d
	}
	return text, complete, d
}

// add appends b to text and returns where it is there, nil for nothing.
func add(text, b []byte) (grown, added []byte) {
	if len(b) == 0 {
		return text, nil
	}
	at := len(text)
	text = append(text, b...)
	return text, text[at:len(text):len(text)]
}

func have(f *event.Facts, field event.Field, ok bool) {
	if ok {
		f.Have |= event.FieldSet(field)
	}
}

// exeFile is about the file behind the program's path, found by the same link, so
// that a path which leads elsewhere by now does no harm.
func exeFile(f *event.Facts, h *heard) {
	if len(f.Exe) == 0 || !h.hasStatx {
		return
	}
	x := &h.statx
	f.ExeFile = event.ExeFile{
		Dev: uint64(x.Dev_major)<<20 | uint64(x.Dev_minor), Ino: x.Ino,
		Mode: x.Mode, UID: x.Uid, GID: x.Gid, Nlink: x.Nlink,
	}
	have(f, event.FieldExeFile, true)
	// A name may end like this without being deleted, but not without a link.
	if x.Nlink == 0 && bytes.HasSuffix(f.Exe, []byte(" (deleted)")) {
		f.Marks |= event.MarkDeleted
		if bytes.HasPrefix(f.Exe, []byte("/memfd:")) {
			f.Marks |= event.MarkMemfd
		}
	}
}

// ids are ids and capabilities, from /proc/<pid>/status.
func (s *snapshotter) ids(f *event.Facts, status []byte) {
	st := &s.status
	if len(status) == 0 || procfs.ParseStatus(status, st) != nil {
		return
	}
	if st.HasIDs() {
		f.IDs = event.IDs{
			UID: st.UIDs[0], EUID: st.UIDs[1], SUID: st.UIDs[2], FSUID: st.UIDs[3],
			GID: st.GIDs[0], EGID: st.GIDs[1], SGID: st.GIDs[2], FSGID: st.GIDs[3],
		}
		have(f, event.FieldIDs, true)
	}
	if st.HasCaps() {
		f.CapPermitted, f.CapEffective = st.CapPrm, st.CapEff
		have(f, event.FieldCaps, true)
	}
	f.NoNewPrivs = st.NoNewPrivs
	have(f, event.FieldNNP, st.HasNoNewPrivs())
}

// times are start time, parent, session and name, and whether the task lives, from
// /proc/<pid>/stat.
func (s *snapshotter) times(f *event.Facts, stat, text []byte) (grown []byte, alive bool) {
	st := &s.stat
	if len(stat) == 0 || procfs.ParseStat(stat, st) != nil {
		return text, false
	}
	comm := st.Comm()
	text, f.Comm = add(text, comm[:min(len(comm), commMax)])
	have(f, event.FieldName, len(f.Comm) > 0)
	f.Start, f.StartTicks = st.Start(), true
	f.PPID, f.SID, f.TTY, f.Threads = st.PPID, st.Session, st.TTY, st.Threads
	f.Have |= event.FieldSet(event.FieldStart, event.FieldParent, event.FieldSession)
	if f.CmdlineLen > partMax && st.ArgsLen > partMax && st.ArgsLen < 1<<32 {
		f.CmdlineLen = uint32(st.ArgsLen)
	}
	return text, !st.Exiting()
}

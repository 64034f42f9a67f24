package procconn

import (
	"bytes"
	"fmt"
	"syscall"
	"unsafe"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
	"golang.org/x/sys/unix"
)

// What a snapshot may be at most, in bytes.
const (
	cmdlineMax = 4096
	pathMax    = 4096 // exe, cwd
	cgroupMax  = 4096 // the whole file; ten hierarchies of cgroup v1
	statMax    = 1024
	statusMax  = 4096 // capabilities stand behind the groups: missing for a task with hundreds of them
	commMax    = 15

	// snapshotRoom is what take may append to the text buffer.
	snapshotRoom = cmdlineMax + 2*pathMax + cgroupMax + commMax
)

// A snapshotter reads the facts about one process after another from /proc. It
// belongs to one thread, allocates nothing, and trusts nothing it reads. It
// differs from procfs.FS in what it is for: one attempt within microseconds,
// while the process stands still, instead of a right answer in the end.
type snapshotter struct {
	proc int // descriptor of /proc, held: no path walk from the root, no surprise by a later mount
	cwd  bool

	path   [32]byte // "<pid>/<file>" and NUL
	prefix int      // length of "<pid>/"

	again  [cmdlineMax]byte
	file   [max(cgroupMax, statMax, statusMax)]byte
	stat   procfs.Stat
	status procfs.Status
	statx  unix.Statx_t
	denied bool
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

// take reads what there is about the process that ran exec at stamp and fills
// f. Text is appended to text, which must have snapshotRoom left: f points
// into it. bootOffset is that of sinceBoot.
//
// The order is that of what matters most. Arguments, exe and its file, and the
// working directory go when the process exits; so does what cgroup says, while ids
// and times stay until it is reaped. The arguments are read again after exe: while
// a further exec goes on they read as empty, and afterwards they are others; so if
// they are the same, exe belongs to them. An exec does not move to another cgroup.
func (s *snapshotter) take(f *event.Facts, tgid int32, stamp, bootOffset uint64, text []byte) ([]byte, outcome, doubt) {
	s.denied = false
	s.setPID(tgid)
	var d doubt
	start := len(text)

	cmdline := s.openFile("cmdline\x00")
	text = s.readArgs(f, cmdline, text)
	text, f.Exe = s.readLink(text, "exe\x00")
	have(f, event.FieldExe, len(f.Exe) > 0)
	text, f.Cgroup = s.readCgroup(text)
	s.readExeFile(f)
	if s.cwd {
		text, f.Cwd = s.readLink(text, "cwd\x00")
		have(f, event.FieldCwd, len(f.Cwd) > 0)
	}
	same := f.Have == 0 || s.sameArgs(f, cmdline)
	closeFile(cmdline)
	if !same {
		// Keep the arguments, the first thing read: they were right then.
		d |= doubtExe
		f.Exe, f.Cwd, f.ExeFile, f.Marks = nil, nil, event.ExeFile{}, 0
		f.Have &= event.FieldSet(event.FieldArgs)
	}
	s.readStatus(f)
	text, alive := s.readStat(f, text)

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
	if s.denied {
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

// takeIDs reads the ids of a task, also of a thread, and fills f if they are
// there.
func (s *snapshotter) takeIDs(f *event.Facts, pid int32) {
	s.setPID(pid)
	s.readStatus(f)
	if f.Have != 0 {
		f.From = event.SourceProc
	}
}

func have(f *event.Facts, field event.Field, ok bool) {
	if ok {
		f.Have |= event.FieldSet(field)
	}
}

// readArgs reads the arguments. Nothing at all means that the memory is gone:
// an exec without arguments still has one NUL.
func (s *snapshotter) readArgs(f *event.Facts, fd int, text []byte) []byte {
	at := len(text)
	n := s.readAt0(fd, text[at:at+cmdlineMax])
	if n <= 0 {
		return text
	}
	text = text[:at+n]
	f.Cmdline, f.CmdlineLen = text[at:at+n:at+n], uint32(n)
	if n == cmdlineMax {
		f.CmdlineLen++ // cut; readStat may know the true length
	}
	have(f, event.FieldArgs, true)
	return text
}

// sameArgs reads the arguments again. The descriptor stands for the process,
// not for its memory: after an exec it reads the new program's.
func (s *snapshotter) sameArgs(f *event.Facts, fd int) bool {
	n := s.readAt0(fd, s.again[:])
	return n > 0 && bytes.Equal(s.again[:n], f.Cmdline)
}

// readExeFile reads the file behind the program's path, by the same link, so that
// a path which leads elsewhere by now does no harm.
func (s *snapshotter) readExeFile(f *event.Facts) {
	if len(f.Exe) == 0 || !s.readFile("exe\x00") {
		return
	}
	x := &s.statx
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

// readCgroup appends the path of the task's cgroup to text.
func (s *snapshotter) readCgroup(text []byte) (grown, path []byte) {
	n := s.read("cgroup\x00", s.file[:cgroupMax])
	if n <= 0 {
		return text, nil
	}
	path, ok := procfs.ParseCgroup(s.file[:n])
	if !ok {
		return text, nil
	}
	at := len(text)
	text = append(text, path...)
	return text, text[at:len(text):len(text)]
}

// readStatus reads ids and capabilities.
func (s *snapshotter) readStatus(f *event.Facts) {
	n := s.read("status\x00", s.file[:statusMax])
	if n <= 0 {
		return
	}
	st := &s.status
	if procfs.ParseStatus(s.file[:n], st) != nil {
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

// readStat reads start time, parent, session and name, and whether the task
// lives.
func (s *snapshotter) readStat(f *event.Facts, text []byte) (grown []byte, alive bool) {
	n := s.read("stat\x00", s.file[:statMax])
	if n <= 0 {
		return text, false
	}
	st := &s.stat
	if procfs.ParseStat(s.file[:n], st) != nil {
		return text, false
	}
	at := len(text)
	comm := st.Comm()
	text = append(text, comm[:min(len(comm), commMax)]...)
	f.Comm = text[at:len(text):len(text)]
	have(f, event.FieldName, len(f.Comm) > 0)
	f.Start, f.StartTicks = st.Start(), true
	f.PPID, f.SID, f.TTY, f.Threads = st.PPID, st.Session, st.TTY, st.Threads
	f.Have |= event.FieldSet(event.FieldStart, event.FieldParent, event.FieldSession)
	if f.CmdlineLen > cmdlineMax && st.ArgsLen > cmdlineMax && st.ArgsLen < 1<<32 {
		f.CmdlineLen = uint32(st.ArgsLen)
	}
	return text, !st.Exiting()
}

// setPID makes pid the process whose files are read.
func (s *snapshotter) setPID(pid int32) {
	var digits [10]byte
	i := len(digits)
	for n := uint32(pid); ; n /= 10 {
		i--
		digits[i] = byte('0' + n%10)
		if n < 10 {
			break
		}
	}
	s.prefix = copy(s.path[:], digits[i:])
	s.path[s.prefix] = '/'
	s.prefix++
}

// pathOf is the path of one file of the process; name ends with NUL.
func (s *snapshotter) pathOf(name string) unsafe.Pointer {
	copy(s.path[s.prefix:], name)
	return unsafe.Pointer(&s.path[0])
}

// read reads a file of the process from its beginning, in one go: a second
// read could be of another time. It returns -1 if that cannot be done.
func (s *snapshotter) read(name string, b []byte) int {
	fd := s.openFile(name)
	n := s.readAt0(fd, b)
	closeFile(fd)
	return n
}

// openFile opens a file of the process, or returns -1. None of the calls here
// is a raw one: a process can make a reader of its memory wait, and a thread
// that keeps its P meanwhile would hold up the whole agent.
func (s *snapshotter) openFile(name string) int {
	fd, _, e := syscall.Syscall6(unix.SYS_OPENAT, uintptr(s.proc), uintptr(s.pathOf(name)),
		unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	if e != 0 {
		s.note(e)
		return -1
	}
	return int(fd)
}

func (s *snapshotter) readAt0(fd int, b []byte) int {
	if fd < 0 {
		return -1
	}
	n, _, e := syscall.Syscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0, 0)
	if e != 0 {
		s.note(e)
		return -1
	}
	return int(n)
}

func closeFile(fd int) {
	if fd >= 0 {
		syscall.Syscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	}
}

// readLink appends a link's target to text. A target as long as the room is
// cut, and thrown away.
func (s *snapshotter) readLink(text []byte, name string) (grown, target []byte) {
	at := len(text)
	room := text[at : at+pathMax]
	r, _, e := syscall.Syscall6(unix.SYS_READLINKAT, uintptr(s.proc), uintptr(s.pathOf(name)),
		uintptr(unsafe.Pointer(&room[0])), uintptr(len(room)), 0, 0)
	if e != 0 {
		s.note(e)
		return text, nil
	}
	n := int(r)
	if n <= 0 || n == len(room) {
		return text, nil
	}
	return text[:at+n], room[:n:n]
}

// readFile follows a link of the process and reads the inode at its end. It
// does not ask the file system's server: that may be the workload's own FUSE
// daemon, which would keep us waiting.
func (s *snapshotter) readFile(name string) bool {
	_, _, e := syscall.Syscall6(unix.SYS_STATX, uintptr(s.proc), uintptr(s.pathOf(name)),
		unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(&s.statx)), 0)
	if e != 0 {
		s.note(e)
	}
	return e == 0
}

func (s *snapshotter) note(e syscall.Errno) {
	if e == unix.EACCES || e == unix.EPERM {
		s.denied = true
	}
}

package procconn

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An exec reader's thread and everything in this file run outside Go's scheduler,
// between enter and leave, like one system call. A thread that comes back to Go
// needs a P there. When sysmon has given its P away, wants the goroutine to make
// room since it has had the same P for 10 ms, or stops the world, it sleeps until
// another thread hands it a P; and that one may itself be waiting for a CPU, behind
// programs that compute. The processes it was to look at run away meanwhile: of very
// short ones 0.5 % on an idle machine, up to 6 % on a busy one.
//
// So nothing here may grow the stack, allocate, or store a pointer: there are only
// functions that are nosplit, in this package, and raw system calls. What takes long,
// as a process can make a reader of its memory wait, holds up nobody else.

// enter and leave are what the syscall package does around each system call. The
// runtime lets golang.org/x/sys and others have them under these names, and keeps
// them for that (go.dev/issue/67401).
//
//go:linkname enter runtime.entersyscall
func enter()

//go:linkname leave runtime.exitsyscall
func leave()

// The parts of a gathering: the files and links of a process that are read.
const (
	partArgs = iota
	partExe
	partCgroup
	partCwd
	partStatus
	partStat
	numParts
)

// partMax is what is read at most of one: capabilities stand behind the groups in
// status, and are missing for a task with hundreds of them.
const partMax = 4096

// A report is what an exec reader's thread tells Run about one datagram. It is
// followed by the datagram and by the parts. None of it has pointers.
type report struct {
	size       uint32           // bytes of all of it
	datagram   uint32           // bytes
	sizes      [numParts]uint32 // bytes read of each part; 0: none, or there are none
	ready      uint64           // ns, CLOCK_MONOTONIC: when all had been read; 0: nothing was
	outcome    outcome          // superseded or throttled: why nothing was read; else complete
	class      class            // the thread's
	pinned     bool             // the thread is
	fromKernel bool             // the datagram is
	denied     bool             // something could not be read for want of rights
	same       bool             // the arguments were the same after exe
	hasStatx   bool
	statx      unix.Statx_t // of the file behind exe
}

// A gathering is what /proc says about one process, as read. It belongs to one
// thread.
type gathering struct {
	report
	parts [numParts][partMax]byte

	proc   int // descriptor of /proc, held: no path walk from the root, no surprise by a later mount
	cwd    bool
	path   [32]byte // "<pid>/<file>" and NUL
	prefix uintptr  // length of "<pid>/"
	again  [partMax]byte
}

// gather reads everything about a process, in the order of what matters most.
// Arguments, exe and its file, and the working directory go when the process
// exits; so does what cgroup says, while ids and times stay until it is reaped.
//
//go:nosplit
//go:norace
func (g *gathering) gather(tgid int32) {
	g.begin(tgid)
	cmdline := g.open(fileCmdline)
	g.sizes[partArgs] = g.readAt0(cmdline, &g.parts[partArgs])
	g.sizes[partExe] = g.readLink(fileExe, &g.parts[partExe])
	g.read(fileCgroup, partCgroup)
	g.hasStatx = g.sizes[partExe] > 0 && g.readFile(fileExe)
	if g.cwd {
		g.sizes[partCwd] = g.readLink(fileCwd, &g.parts[partCwd])
	}
	g.same = g.sameArgs(cmdline)
	closeFile(cmdline)
	g.read(fileStatus, partStatus)
	g.read(fileStat, partStat)
	g.ready = monotonic()
}

// gatherStatus reads the status of a task, also of a thread.
//
//go:nosplit
//go:norace
func (g *gathering) gatherStatus(pid int32) {
	g.begin(pid)
	g.read(fileStatus, partStatus)
}

// lookAtStatus is gatherStatus for a goroutine.
//
//go:nosplit
func (g *gathering) lookAtStatus(pid int32) {
	enter()
	g.gatherStatus(pid)
	leave()
}

// begin makes pid the process whose files are read.
//
//go:nosplit
//go:norace
func (g *gathering) begin(pid int32) {
	g.denied = false
	size := uintptr(1)
	for n := uint32(pid); n >= 10; n /= 10 {
		size++
	}
	g.path[size&31] = '/'
	g.prefix = size + 1
	for n := uint32(pid); size > 0; n /= 10 {
		size--
		g.path[size&31] = byte('0' + n%10)
	}
}

// A file is the name of a file of a process, with NUL.
type file [8]byte

var (
	fileCmdline = file{'c', 'm', 'd', 'l', 'i', 'n', 'e'}
	fileExe     = file{'e', 'x', 'e'}
	fileCgroup  = file{'c', 'g', 'r', 'o', 'u', 'p'}
	fileCwd     = file{'c', 'w', 'd'}
	fileStatus  = file{'s', 't', 'a', 't', 'u', 's'}
	fileStat    = file{'s', 't', 'a', 't'}
)

// pathOf is the path of one file of the process.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (g *gathering) pathOf(f file) uintptr {
	*(*file)(unsafe.Add(unsafe.Pointer(&g.path), g.prefix)) = f
	return uintptr(unsafe.Pointer(&g.path))
}

// sameArgs reads the arguments again. The descriptor stands for the process, not
// for its memory: after an exec it reads the new program's.
//
//go:nosplit
//go:norace
func (g *gathering) sameArgs(fd int) bool {
	n := g.readAt0(fd, &g.again)
	if n == 0 || n != g.sizes[partArgs] {
		return false
	}
	for i := range n {
		if g.again[i&(partMax-1)] != g.parts[partArgs][i&(partMax-1)] {
			return false
		}
	}
	return true
}

// read reads a file of the process from its beginning, in one go: a second read
// could be of another time.
//
//go:nosplit
//go:norace
func (g *gathering) read(f file, part uint) {
	fd := g.open(f)
	g.sizes[part] = g.readAt0(fd, &g.parts[part])
	closeFile(fd)
}

// open opens a file of the process, or returns -1.
//
//go:nosplit
//go:norace
func (g *gathering) open(f file) int {
	fd, _, e := syscall.RawSyscall6(unix.SYS_OPENAT, uintptr(g.proc), g.pathOf(f), unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	if e != 0 {
		g.note(e)
		return -1
	}
	return int(fd)
}

//go:nosplit
//go:norace
func (g *gathering) readAt0(fd int, b *[partMax]byte) uint32 {
	if fd < 0 {
		return 0
	}
	n, _, e := syscall.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(b)), partMax, 0, 0, 0)
	if e != 0 {
		g.note(e)
		return 0
	}
	return uint32(n)
}

//go:nosplit
//go:norace
func closeFile(fd int) {
	if fd >= 0 {
		syscall.RawSyscall6(unix.SYS_CLOSE, uintptr(fd), 0, 0, 0, 0, 0)
	}
}

// readLink reads a link's target. One as long as the room is cut, and thrown away.
//
//go:nosplit
//go:norace
func (g *gathering) readLink(f file, b *[partMax]byte) uint32 {
	n, _, e := syscall.RawSyscall6(unix.SYS_READLINKAT, uintptr(g.proc), g.pathOf(f), uintptr(unsafe.Pointer(b)), partMax, 0, 0)
	if e != 0 {
		g.note(e)
		return 0
	}
	if n >= partMax {
		return 0
	}
	return uint32(n)
}

// readFile follows a link of the process and reads the inode at its end. It does
// not ask the file system's server: that may be the workload's own FUSE daemon,
// which would keep us waiting.
//
//go:nosplit
//go:norace
func (g *gathering) readFile(f file) bool {
	_, _, e := syscall.RawSyscall6(unix.SYS_STATX, uintptr(g.proc), g.pathOf(f),
		unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(&g.statx)), 0)
	if e != 0 {
		g.note(e)
	}
	return e == 0
}

//go:nosplit
//go:norace
func (g *gathering) note(e syscall.Errno) {
	if e == unix.EACCES || e == unix.EPERM {
		g.denied = true
	}
}

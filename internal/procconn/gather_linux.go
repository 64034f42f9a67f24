package procconn

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Everything in this file runs outside Go's scheduler, between enter and leave: in
// one piece, like a single system call. A thread that comes back from each call to
// Go needs a P each time. When sysmon has given its P away, stops the world, or
// wants the goroutine to make room since it has had the same P for 10 ms, the thread
// sleeps until another one hands it a P, and the process it was to look at runs
// away meanwhile: of 1,000 very short ones this made four lose their arguments.
//
// So nothing here may grow the stack, allocate, or store a pointer: only functions
// that are nosplit, in this file, and raw system calls. A call that takes long, as
// a process can make a reader of its memory wait, holds up nobody.

// enter and leave are what the syscall package does around every system call. The
// runtime lets golang.org/x/sys and others have them under these names, with the
// promise to keep them (go.dev/issue/67401).
//
//go:linkname enter runtime.entersyscall
func enter()

//go:linkname leave runtime.exitsyscall
func leave()

// A gathering is what /proc says about one process, as read. It belongs to one
// thread and holds no pointers.
type gathering struct {
	proc int // descriptor of /proc, held: no path walk from the root, no surprise by a later mount
	cwd  bool

	tgid   int32  // of the process; 0: nothing is here
	ready  uint64 // ns, CLOCK_MONOTONIC: when everything was read
	denied bool   // some of it for want of rights

	// again is the arguments once more.
	cmdline, exe, cgroup, dir, again, status, stat part
	statx                                          unix.Statx_t
	hasStatx                                       bool

	path   [32]byte // "<pid>/<file>" and NUL
	prefix uintptr  // length of "<pid>/"
}

// partMax is what is read at most of one file: capabilities stand behind the groups
// in status, and are missing for a task with hundreds of them.
const partMax = 4096

// A part is one file or link: n bytes, 0 if it could not be read or was empty.
type part struct {
	n int
	b [partMax]byte
}

func (p *part) bytes() []byte { return p.b[:p.n] }

// gather reads everything about a process, in the order of what matters most.
// Arguments, exe and its file, and the working directory go when the process
// exits; so does what cgroup says, while ids and times stay until it is reaped. The
// arguments are read again after exe: see facts.
//
//go:nosplit
//go:norace
func (g *gathering) gather(tgid int32) {
	g.begin(tgid)
	cmdline := g.open("cmdline\x00")
	g.readAt0(cmdline, &g.cmdline)
	g.readLink("exe\x00", &g.exe)
	g.read("cgroup\x00", &g.cgroup)
	g.hasStatx = g.exe.n > 0 && g.readFile("exe\x00")
	g.dir.n = 0
	if g.cwd {
		g.readLink("cwd\x00", &g.dir)
	}
	g.readAt0(cmdline, &g.again)
	closeFile(cmdline)
	g.read("status\x00", &g.status)
	g.read("stat\x00", &g.stat)
	g.ready = monotonic()
}

// gatherStatus reads the status of a task, also of a thread.
//
//go:nosplit
//go:norace
func (g *gathering) gatherStatus(pid int32) {
	g.begin(pid)
	g.read("status\x00", &g.status)
}

// begin makes pid the process whose files are read.
//
//go:nosplit
//go:norace
func (g *gathering) begin(pid int32) {
	g.tgid, g.denied = pid, false
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

// pathOf is the path of one file of the process; name ends with NUL.
//
//go:nosplit
//go:norace
func (g *gathering) pathOf(name string) uintptr {
	for i := range len(name) {
		g.path[(g.prefix+uintptr(i))&31] = name[i]
	}
	return uintptr(unsafe.Pointer(&g.path))
}

// read reads a file of the process from its beginning, in one go: a second read
// could be of another time.
//
//go:nosplit
//go:norace
func (g *gathering) read(name string, p *part) {
	fd := g.open(name)
	g.readAt0(fd, p)
	closeFile(fd)
}

// open opens a file of the process, or returns -1.
//
//go:nosplit
//go:norace
func (g *gathering) open(name string) int {
	fd, _, e := syscall.RawSyscall6(unix.SYS_OPENAT, uintptr(g.proc), g.pathOf(name), unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	if e != 0 {
		g.note(e)
		return -1
	}
	return int(fd)
}

//go:nosplit
//go:norace
func (g *gathering) readAt0(fd int, p *part) {
	p.n = 0
	if fd < 0 {
		return
	}
	n, _, e := syscall.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&p.b)), partMax, 0, 0, 0)
	if e != 0 {
		g.note(e)
		return
	}
	p.n = int(n)
}

//go:nosplit
//go:norace
func closeFile(fd int) {
	if fd >= 0 {
		syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	}
}

// readLink reads a link's target. One as long as the room is cut, and thrown away.
//
//go:nosplit
//go:norace
func (g *gathering) readLink(name string, p *part) {
	p.n = 0
	n, _, e := syscall.RawSyscall6(unix.SYS_READLINKAT, uintptr(g.proc), g.pathOf(name), uintptr(unsafe.Pointer(&p.b)), partMax, 0, 0)
	if e != 0 {
		g.note(e)
		return
	}
	if n < partMax {
		p.n = int(n)
	}
}

// readFile follows a link of the process and reads the inode at its end. It does
// not ask the file system's server: that may be the workload's own FUSE daemon,
// which would keep us waiting.
//
//go:nosplit
//go:norace
func (g *gathering) readFile(name string) bool {
	_, _, e := syscall.RawSyscall6(unix.SYS_STATX, uintptr(g.proc), g.pathOf(name),
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

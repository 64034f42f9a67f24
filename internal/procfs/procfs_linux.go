package procfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// An FS is a proc file system.
type FS struct {
	root *os.File
	fd   int // of root
}

// New opens the proc file system at root; "" is /proc. It must be the one of
// the host's pid namespace for pids to mean what the kernel's events say.
func New(root string) (*FS, error) {
	if root == "" {
		root = "/proc"
	}
	f, err := os.OpenFile(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open proc file system: %w", err)
	}
	return &FS{root: f, fd: int(f.Fd())}, nil
}

// Close releases the file system. No other call may be running.
func (fs *FS) Close() error { return fs.root.Close() }

// path is PID/NAME with a final NUL. Pids are numbers and names constants of
// this package, so a path cannot leave the root.
type path [64]byte

func (p *path) set(pid int32, name string) {
	b := strconv.AppendInt(p[:0], int64(pid), 10)
	if name != "" {
		b = append(b, '/')
		b = append(b, name...)
	}
	p[len(b)] = 0
}

// openat and its like take bytes, not strings: making a string for each of
// five files of each process is most of the allocation of a scan.
func (fs *FS) openat(pid int32, name string, flags int) (int, error) {
	var p path
	p.set(pid, name)
	for {
		fd, _, e := unix.Syscall6(unix.SYS_OPENAT, uintptr(fs.fd), uintptr(unsafe.Pointer(&p[0])),
			uintptr(flags|unix.O_CLOEXEC|unix.O_NOFOLLOW), 0, 0, 0)
		runtime.KeepAlive(fs)
		if e == 0 {
			return int(fd), nil
		}
		if e != unix.EINTR {
			return -1, e
		}
	}
}

func read(fd int, b []byte) (int, error) {
	for {
		n, _, e := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if e == 0 {
			return int(n), nil
		}
		if e != unix.EINTR {
			return 0, e
		}
	}
}

// appendFile appends at most limit bytes of a file of a process to dst.
func (fs *FS) appendFile(dst []byte, pid int32, name string, limit int) ([]byte, error) {
	fd, err := fs.openat(pid, name, unix.O_RDONLY)
	if err != nil {
		return dst, fs.failure(pid, name, err)
	}
	defer syscall.Close(fd)
	start := len(dst)
	for len(dst)-start < limit {
		if cap(dst) == len(dst) {
			dst = append(dst, make([]byte, max(1024, len(dst)-start))...)[:len(dst)]
		}
		room := dst[len(dst):min(cap(dst), start+limit)]
		n, err := read(fd, room)
		if err != nil {
			return dst[:start], fs.failure(pid, name, err)
		}
		if n == 0 {
			break
		}
		dst = dst[:len(dst)+n]
	}
	return dst, nil
}

// appendLink appends the text of a link of a process to dst.
func (fs *FS) appendLink(dst []byte, pid int32, name string) ([]byte, error) {
	var p path
	p.set(pid, name)
	// A full buffer may mean a cut text, so there is room for one byte more.
	start := len(dst)
	if cap(dst)-start < 256 {
		dst = append(dst, make([]byte, 256)...)[:start]
	}
	for {
		room := dst[start:cap(dst)]
		n, _, e := unix.Syscall6(unix.SYS_READLINKAT, uintptr(fs.fd), uintptr(unsafe.Pointer(&p[0])),
			uintptr(unsafe.Pointer(&room[0])), uintptr(len(room)), 0, 0)
		runtime.KeepAlive(fs)
		switch {
		case e == unix.EINTR:
		case e != 0:
			return dst, fs.failure(pid, name, e)
		case int(n) < len(room) || len(room) > maxLink:
			return dst[:start+int(n)], nil
		default:
			dst = append(dst, make([]byte, maxLink+1)...)[:start]
		}
	}
}

// failure turns an errno into this package's errors.
func (fs *FS) failure(pid int32, name string, err error) error {
	switch err {
	case unix.ESRCH:
		return ErrGone
	case unix.ENOENT:
		// A kernel thread has no exe, a kernel without audit no loginuid:
		// the process itself may well be there.
		if fs.exists(pid) {
			return ErrMissing
		}
		return ErrGone
	case unix.EACCES, unix.EPERM:
		return ErrMissing
	}
	return fmt.Errorf("read /proc/%d/%s: %w", pid, name, err)
}

func (fs *FS) exists(pid int32) bool {
	var p path
	p.set(pid, "")
	_, _, e := unix.Syscall6(unix.SYS_FACCESSAT, uintptr(fs.fd), uintptr(unsafe.Pointer(&p[0])), unix.F_OK, 0, 0, 0)
	runtime.KeepAlive(fs)
	return e == 0
}

// AppendCmdline appends pid's arguments to dst, at most limit bytes of them,
// each ending with NUL. Nothing appended and no error means a kernel thread, a
// zombie, or a process that gave its arguments away: arguments are never
// empty, an empty argv is one NUL.
func (fs *FS) AppendCmdline(dst []byte, pid int32, limit int) ([]byte, error) {
	return fs.appendFile(dst, pid, "cmdline", limit)
}

// AppendExe appends the path of pid's program to dst, as the kernel shows it:
// with " (deleted)" at its end once the file has no name any more.
func (fs *FS) AppendExe(dst []byte, pid int32) ([]byte, error) {
	return fs.appendLink(dst, pid, "exe")
}

// AppendCwd appends pid's current directory to dst.
func (fs *FS) AppendCwd(dst []byte, pid int32) ([]byte, error) {
	return fs.appendLink(dst, pid, "cwd")
}

// AppendCgroup appends the path of pid's cgroup to dst: see ParseCgroup. For
// a process that is dying the kernel says "/" on cgroup v1; that is
// ErrMissing.
func (fs *FS) AppendCgroup(dst []byte, pid int32) ([]byte, error) {
	start := len(dst)
	dst, err := fs.appendFile(dst, pid, "cgroup", maxCgroup)
	if err != nil {
		return dst, err
	}
	p, ok := ParseCgroup(dst[start:])
	if !ok {
		return dst[:start], ErrMissing
	}
	dst = append(dst[:start], p...)
	if len(p) > 1 {
		return dst, nil
	}
	// Asked after the read: whoever made the kernel say "/" by dying is seen
	// dying now, or gone.
	var st Stat
	if err := fs.Stat(pid, &st); err != nil {
		return dst[:start], err
	}
	if st.Exiting() {
		return dst[:start], ErrMissing
	}
	return dst, nil
}

// Stat reads /proc/PID/stat.
func (fs *FS) Stat(pid int32, st *Stat) error {
	var a [maxStat]byte
	b, err := fs.appendFile(a[:0], pid, "stat", maxStat)
	if err != nil {
		return err
	}
	if err := ParseStat(b, st); err != nil {
		return fmt.Errorf("/proc/%d: %w", pid, err)
	}
	return nil
}

// Status reads /proc/PID/status.
func (fs *FS) Status(pid int32, s *Status) error {
	var a [4096]byte
	b, err := fs.appendFile(a[:0], pid, "status", maxStatus)
	if err != nil {
		return err
	}
	if err := ParseStatus(b, s); err != nil {
		return fmt.Errorf("/proc/%d: %w", pid, err)
	}
	return nil
}

// Owner is the effective user and group id of pid, by the owner of its
// directory: a fifth of the price of Status.
func (fs *FS) Owner(pid int32) (euid, egid uint32, err error) {
	var p path
	p.set(pid, "")
	var sx unix.Statx_t
	if err := fs.statx(&p, unix.AT_SYMLINK_NOFOLLOW, &sx); err != nil {
		return 0, 0, fs.failure(pid, "", err)
	}
	return sx.Uid, sx.Gid, nil
}

// statx never asks a file system's server: that may be the workload's own
// FUSE daemon, which would keep us waiting.
func (fs *FS) statx(p *path, flags int, sx *unix.Statx_t) error {
	for {
		_, _, e := unix.Syscall6(unix.SYS_STATX, uintptr(fs.fd), uintptr(unsafe.Pointer(&p[0])),
			uintptr(flags|unix.AT_STATX_DONT_SYNC), unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(sx)), 0)
		runtime.KeepAlive(fs)
		if e == 0 {
			return nil
		}
		if e != unix.EINTR {
			return e
		}
	}
}

// ExeFile identifies the file pid runs. Its Magic stays 0, unknown: statfs
// would ask the file system's server, and wait for it.
func (fs *FS) ExeFile(pid int32, f *event.ExeFile) error {
	var p path
	p.set(pid, "exe")
	var sx unix.Statx_t
	if err := fs.statx(&p, 0, &sx); err != nil {
		return fs.failure(pid, "exe", err)
	}
	*f = event.ExeFile{
		Dev: uint64(sx.Dev_major)<<20 | uint64(sx.Dev_minor), Ino: sx.Ino,
		Mode: sx.Mode, UID: sx.Uid, GID: sx.Gid, Nlink: sx.Nlink,
	}
	return nil
}

// LoginUID is the user who logged in; 4294967295 is none. ErrMissing on
// kernels without audit.
func (fs *FS) LoginUID(pid int32) (uint32, error) { return fs.number(pid, "loginuid") }

// SessionID is the audit session; 4294967295 is none.
func (fs *FS) SessionID(pid int32) (uint32, error) { return fs.number(pid, "sessionid") }

func (fs *FS) number(pid int32, name string) (uint32, error) {
	var a [32]byte
	b, err := fs.appendFile(a[:0], pid, name, len(a))
	if err != nil {
		return 0, err
	}
	n, ok := parseNumber(b)
	if !ok {
		return 0, fmt.Errorf("/proc/%d/%s: %s is not a number", pid, name, excerpt(b))
	}
	return n, nil
}

// NS reads the inode numbers of pid's namespaces.
func (fs *FS) NS(pid int32) (event.NS, error) {
	var n [4]uint32
	for i, link := range [...]string{"ns/pid", "ns/mnt", "ns/user", "ns/net"} {
		var a [512]byte
		b, err := fs.appendLink(a[:0], pid, link)
		if err != nil {
			return event.NS{}, err
		}
		var ok bool
		if n[i], ok = parseNS(b); !ok {
			return event.NS{}, fmt.Errorf("/proc/%d/%s: %s names no namespace", pid, link, excerpt(b))
		}
	}
	return event.NS{PID: n[0], Mnt: n[1], User: n[2], Net: n[3]}, nil
}

// AppendPids appends the ids of all processes to dst, in ascending order on a
// real proc file system.
func (fs *FS) AppendPids(dst []int32) ([]int32, error) { return fs.appendNumbers(dst, ".") }

// Pids lists all processes.
func (fs *FS) Pids() ([]int32, error) { return fs.AppendPids(nil) }

// liveThread finds a thread of pid that has not ended.
func (fs *FS) liveThread(pid int32) (int32, error) {
	var a [64]int32
	tids, err := fs.appendNumbers(a[:0], strconv.Itoa(int(pid))+"/task")
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return 0, ErrGone
		}
		return 0, err
	}
	for _, tid := range tids {
		var st Stat
		if tid != pid && fs.Stat(tid, &st) == nil && !st.Exiting() {
			return tid, nil
		}
	}
	return 0, ErrGone
}

func (fs *FS) appendNumbers(dst []int32, dir string) ([]int32, error) {
	fd, err := unix.Openat(fs.fd, dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return dst, fmt.Errorf("list processes: %w", err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return dst, fmt.Errorf("list processes: %w", err)
		}
		if n == 0 {
			return dst, nil
		}
		dst = appendDirents(dst, buf[:n])
	}
}

// appendDirents appends the names that are numbers. Each entry is inode u64,
// offset u64, length u16, type u8, name with a final NUL (struct
// linux_dirent64, include/linux/dirent.h).
func appendDirents(dst []int32, b []byte) []int32 {
	const nameOff = 19
	for len(b) > nameOff {
		n := int(binary.NativeEndian.Uint16(b[16:]))
		if n <= nameOff || n > len(b) {
			break
		}
		name := b[nameOff:n]
		b = b[n:]
		var pid int64
		i := 0
		for i < len(name) && name[i] >= '0' && name[i] <= '9' && pid < 1<<31 {
			pid = pid*10 + int64(name[i]-'0')
			i++
		}
		if i > 0 && i < len(name) && name[i] == 0 && pid > 0 && pid < 1<<31 {
			dst = append(dst, int32(pid))
		}
	}
	return dst
}

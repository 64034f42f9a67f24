package enrich

import (
	"bytes"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
)

// Users finds the names of processes' users, in the passwd file of the
// process's own root directory: a container's users are its own.
//
// The file is the workload's to write, so it is only a hint for people, and
// reading it must do no harm. It is opened below the process's root (a link
// cannot lead out of it), on the same mount, without waiting; only a regular
// file on a local file system is read, at most so many bytes and names of it,
// in time, or not at all. What was read is kept for a while, by container and
// root directory: a process that changes its root cannot name the users of
// others.
//
// Name belongs to one goroutine.
type Users struct {
	fs    *procfs.FS
	proc  string
	known map[root]*passwd
	stuck atomic.Int32 // reads that were given up and still wait
	load  func(dir int) (map[uint32]string, error)
	slow  time.Duration

	counts struct{ reads, failed, slow atomic.Uint64 }
}

// A root is a root directory, in a container.
type root struct {
	container string
	dev, ino  uint64
}

type passwd struct {
	names map[uint32]string // nil: could not be read
	until time.Time
}

// Bounds of reading names.
const (
	maxPasswd  = 256 << 10 // bytes of a passwd file
	maxUsers   = 4096      // names of one
	maxUser    = 64        // bytes of a name
	maxRoots   = 256
	namesFor   = time.Minute
	maxStuck   = 4
	slowPasswd = 50 * time.Millisecond
)

// UserStats counts reads of passwd files.
type UserStats struct {
	Reads  uint64
	Failed uint64 // of these, no name could be had
	Slow   uint64 // of these, because the file system did not answer in time
}

// NewUsers finds names by means of a proc file system; "" is /proc.
func NewUsers(proc string) (*Users, error) {
	if proc == "" {
		proc = "/proc"
	}
	fs, err := procfs.New(proc)
	if err != nil {
		return nil, fmt.Errorf("names of users: %w", err)
	}
	return &Users{fs: fs, proc: proc, known: make(map[root]*passwd), load: readPasswd, slow: slowPasswd}, nil
}

// Stats may be called from any goroutine.
func (u *Users) Stats() UserStats {
	return UserStats{Reads: u.counts.reads.Load(), Failed: u.counts.failed.Load(), Slow: u.counts.slow.Load()}
}

// Name is the name of p's real user, "" if it has none. ok is false when it
// could not be found out, as of a process that is gone.
func (u *Users) Name(p *event.Process) (name string, ok bool) {
	if p.Exited || !p.Has(event.FieldIDs) || !u.is(p) {
		return "", false
	}
	dir, err := unix.Open(fmt.Sprintf("%s/%d/root", u.proc, p.PID), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	var st unix.Stat_t
	err = unix.Fstat(dir, &st)
	id, mapped := u.inside(p)
	if err != nil || !mapped || !u.is(p) { // all of it was p's
		unix.Close(dir)
		return "", false
	}
	key := root{dev: st.Dev, ino: st.Ino}
	if w := p.Workload; w != nil {
		key.container = w.ContainerID
	}
	now := time.Now()
	f := u.known[key]
	if f == nil || now.After(f.until) {
		f = &passwd{names: u.read(dir), until: now.Add(namesFor)}
		u.remember(key, f)
	} else {
		unix.Close(dir)
	}
	return f.names[id], f.names != nil
}

// is says whether pid still is p.
func (u *Users) is(p *event.Process) bool {
	var st procfs.Stat
	if u.fs.Stat(p.PID, &st) != nil || !p.Has(event.FieldStart) {
		return false
	}
	return st.Start() <= p.Start && p.Start < st.Start()+procfs.Tick
}

func (u *Users) remember(key root, f *passwd) {
	if len(u.known) >= maxRoots {
		for k, old := range u.known {
			if old.until.Before(f.until.Add(-namesFor)) {
				delete(u.known, k)
			}
		}
		if len(u.known) >= maxRoots {
			clear(u.known)
		}
	}
	u.known[key] = f
}

// read reads the file below dir, and closes dir. A file system that does not
// answer (a lazy image, a server that is away) is left alone.
func (u *Users) read(dir int) map[uint32]string {
	u.counts.reads.Add(1)
	if u.stuck.Load() >= maxStuck {
		unix.Close(dir)
		u.counts.failed.Add(1)
		u.counts.slow.Add(1)
		return nil
	}
	result := make(chan map[uint32]string, 1)
	u.stuck.Add(1)
	go func() {
		defer u.stuck.Add(-1)
		defer unix.Close(dir)
		names, err := u.load(dir)
		if err != nil {
			names = nil
		}
		result <- names
	}()
	t := time.NewTimer(u.slow)
	defer t.Stop()
	select {
	case names := <-result:
		if names == nil {
			u.counts.failed.Add(1)
		}
		return names
	case <-t.C:
		u.counts.failed.Add(1)
		u.counts.slow.Add(1)
		return nil
	}
}

// inside is the real user id as p's own user namespace has it.
func (u *Users) inside(p *event.Process) (id uint32, ok bool) {
	const first = 4026531837 // PROC_USER_INIT_INO, include/linux/proc_ns.h
	if p.Has(event.FieldNS) && p.NS.User == first {
		return p.UID, true
	}
	// At most 340 lines of three numbers (user_namespaces(7)).
	b, err := readFile(fmt.Sprintf("%s/%d/uid_map", u.proc, p.PID), 16<<10)
	if err != nil {
		return 0, false
	}
	for line := range bytes.Lines(b) {
		var in, out, n uint64
		if k, _ := fmt.Sscan(string(line), &in, &out, &n); k != 3 {
			return 0, false
		}
		if v := uint64(p.UID); v >= out && v-out < n {
			return uint32(in + v - out), true
		}
	}
	return 0, false
}

// local are the file systems that are read from without asking anybody.
func local(magic int64) bool {
	switch magic {
	case unix.OVERLAYFS_SUPER_MAGIC, unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC,
		unix.RAMFS_MAGIC, unix.SQUASHFS_MAGIC, unix.EROFS_SUPER_MAGIC_V1, unix.F2FS_SUPER_MAGIC, 0x2fc12fc1, 0xca451a4e: // ZFS, bcachefs
		return true
	}
	return false
}

// readPasswd reads etc/passwd below a directory. It is opened for reading only
// when it is known to be a file: to open a device can do things.
func readPasswd(dir int) (map[uint32]string, error) {
	fd, err := unix.Openat2(dir, "etc/passwd", &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	var sfs unix.Statfs_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if err := unix.Fstatfs(fd, &sfs); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || !local(sfs.Type) {
		return nil, unix.EINVAL
	}
	b, err := readFile(fmt.Sprintf("/proc/self/fd/%d", fd), maxPasswd)
	if err != nil {
		return nil, err
	}
	return parsePasswd(b), nil
}

func readFile(path string, most int) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return readAll(fd, most)
}

// readAll reads the first bytes of a file, at most so many.
func readAll(fd, most int) ([]byte, error) {
	b := make([]byte, 0, 4<<10)
	for len(b) < most {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := unix.Read(fd, b[len(b):min(cap(b), most)])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, err
		case n == 0:
			return b, nil
		default:
			b = b[:len(b)+n]
		}
	}
	return b, nil
}

// parsePasswd reads passwd(5): the first name of each uid, as getpwuid finds
// it. Lines that are none are left out.
func parsePasswd(b []byte) map[uint32]string {
	names := make(map[uint32]string)
	for line := range bytes.Lines(b) {
		name, rest, ok1 := bytes.Cut(line, []byte(":"))
		_, rest, ok2 := bytes.Cut(rest, []byte(":"))
		uid, _, ok3 := bytes.Cut(rest, []byte(":"))
		if !ok1 || !ok2 || !ok3 || !userName(name) {
			continue
		}
		n, err := strconv.ParseUint(string(uid), 10, 32)
		if err != nil {
			continue
		}
		if _, twice := names[uint32(n)]; twice {
			continue
		}
		if len(names) == maxUsers {
			break
		}
		names[uint32(n)] = string(name)
	}
	return names
}

// userName accepts what useradd does, and a little more.
func userName(b []byte) bool {
	if len(b) == 0 || len(b) > maxUser {
		return false
	}
	for _, c := range b {
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_', c == '-', c == '.', c == '@', c == '$':
		default:
			return false
		}
	}
	return true
}

package spool

import (
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A memDisk is a disk that forgets what was not synced, and refuses on demand.
type memDisk struct {
	mu     sync.Mutex // guards all, and the inodes
	names  map[string]*inode
	synced map[string]*inode // the directory as it is on disk

	ops    int                                   // writes and syncs so far
	refuse func(op int, kind, name string) error // asked before each; nil: never
	off    bool                                  // after a power cut: everything fails
	sync   func()                                // called before each sync of a segment, which may take its time; nil: not
}

type inode struct {
	data, synced []byte
	page         []byte // mapped; outside Go's heap, as a real one
}

var errPowerCut = syscall.ESHUTDOWN

func newMemDisk() *memDisk {
	return &memDisk{names: map[string]*inode{}, synced: map[string]*inode{}}
}

// op asks whether one write or sync may go on.
func (d *memDisk) op(kind, name string) error {
	if d.off {
		return errPowerCut
	}
	d.ops++
	if d.refuse != nil {
		return d.refuse(d.ops, kind, name)
	}
	return nil
}

func (d *memDisk) setRefuse(f func(op int, kind, name string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refuse = f
}

func (d *memDisk) OpenFile(path string, flag int, _ fs.FileMode) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off {
		return nil, errPowerCut
	}
	name := filepath.Base(path)
	in := d.names[name]
	switch {
	case in == nil && flag&os.O_CREATE == 0:
		return nil, &fs.PathError{Op: "open", Path: path, Err: unix.ENOENT}
	case in == nil:
		if err := d.op("create", name); err != nil {
			return nil, err
		}
		in = &inode{}
		d.names[name] = in
	case flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: path, Err: unix.EEXIST}
	case flag&os.O_TRUNC != 0:
		in.data = nil
	}
	return &memFile{d, in, name}, nil
}

func (d *memDisk) Remove(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := filepath.Base(path)
	if d.off {
		return errPowerCut
	}
	if d.names[name] == nil {
		return &fs.PathError{Op: "remove", Path: path, Err: unix.ENOENT}
	}
	delete(d.names, name)
	return nil
}

func (d *memDisk) List(string) ([]dirEntry, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []dirEntry
	for n, in := range d.names {
		out = append(out, dirEntry{n, int64(len(in.data))})
	}
	return out, nil
}

func (d *memDisk) SyncDir(string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op("syncdir", ""); err != nil {
		return err
	}
	d.synced = maps.Clone(d.names)
	return nil
}

// powerCut ends the disk and returns what is on it afterwards: what was
// synced, and of the rest, by sectors and names, whatever rnd says.
func (d *memDisk) powerCut(rnd *rand.Rand) *memDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.off = true
	after := newMemDisk()
	all := map[string]*inode{}
	maps.Copy(all, d.names)
	maps.Copy(all, d.synced)
	for _, name := range slices.Sorted(maps.Keys(all)) { // in order: a seed must repeat
		now, then := d.names[name], d.synced[name]
		in := then
		if now != then && rnd.IntN(2) == 0 {
			in = now // an unsynced creation or removal that made it
		}
		if in == nil {
			continue
		}
		in.unmapLocked()
		b := torn(rnd, in.synced, in.data)
		after.names[name] = &inode{data: b, synced: slices.Clone(b)}
	}
	after.synced = maps.Clone(after.names)
	return after
}

// torn mixes two states of a file, by sectors, with any length in between.
func torn(rnd *rand.Rand, old, new []byte) []byte {
	n := len(old)
	if len(new) != len(old) {
		switch rnd.IntN(3) {
		case 0:
			n = len(new)
		case 1:
			n = min(len(old), len(new)) + rnd.IntN(max(len(old), len(new))-min(len(old), len(new))+1)
		}
	}
	b := make([]byte, n)
	for off := 0; off < n; off += 512 {
		from := old
		if rnd.IntN(2) == 0 {
			from = new
		}
		if off < len(from) {
			copy(b[off:min(off+512, n)], from[off:])
		}
	}
	return b
}

func (in *inode) unmapLocked() {
	if in.page != nil {
		copy(in.data, in.page)
	}
}

type memFile struct {
	d    *memDisk
	in   *inode
	name string
}

func (f *memFile) ReadAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.off {
		return 0, errPowerCut
	}
	f.in.unmapLocked()
	if off >= int64(len(f.in.data)) {
		return 0, io.EOF
	}
	n := copy(b, f.in.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.d.op("write", f.name)
	if err != nil {
		b = b[:len(b)/2] // a full disk takes a part
	}
	if end := int(off) + len(b); end > len(f.in.data) {
		f.in.data = append(f.in.data, make([]byte, end-len(f.in.data))...)
	}
	return copy(f.in.data[off:], b), err
}

func (f *memFile) Close() error { return nil }

func (f *memFile) Size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return int64(len(f.in.data)), nil
}

func (f *memFile) Truncate(n int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.op("truncate", f.name); err != nil {
		return err
	}
	f.in.data = f.in.data[:n]
	return nil
}

func (f *memFile) Sync() error { return f.syncAs("sync") }

func (f *memFile) Datasync() error {
	f.d.mu.Lock()
	slow := f.d.sync
	f.d.mu.Unlock()
	if slow != nil {
		slow()
	}
	return f.syncAs("datasync")
}

func (f *memFile) syncAs(kind string) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.op(kind, f.name); err != nil {
		return err
	}
	f.in.unmapLocked()
	f.in.synced = slices.Clone(f.in.data)
	return nil
}

// Map gives memory outside the heap: the race detector does not watch a real
// mapping either.
func (f *memFile) Map(n int) ([]byte, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.off {
		return nil, errPowerCut
	}
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	copy(p, f.in.data)
	f.in.page = p
	return p, nil
}

func (f *memFile) Unmap(b []byte) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.in.unmapLocked()
	f.in.page = nil
	return unix.Munmap(b)
}

package spool

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// A fileSystem is what the spool does to files; tests put disks under it that
// refuse and forget.
type fileSystem interface {
	OpenFile(path string, flag int, perm fs.FileMode) (file, error)
	Remove(path string) error
	List(dir string) ([]dirEntry, error)
	SyncDir(dir string) error
}

type dirEntry struct {
	name string
	size int64 // bytes; of regular files only, others are not listed
}

type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	Datasync() error
	Sync() error
	Map(n int) ([]byte, error) // the file's first n bytes, shared
	Unmap(b []byte) error
}

type osFS struct{}

func (osFS) OpenFile(path string, flag int, perm fs.FileMode) (file, error) {
	// The directory is ours alone, but a link in it would still lead elsewhere.
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW, perm)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Remove(path string) error { return os.Remove(path) }

func (osFS) List(dir string) ([]dirEntry, error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []dirEntry
	for _, e := range ents {
		if !e.Type().IsRegular() {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile: Verify looks at live spools
		}
		if err != nil {
			return nil, err
		}
		out = append(out, dirEntry{e.Name(), fi.Size()})
	}
	return out, nil
}

func (osFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (f osFile) Map(n int) ([]byte, error) {
	b, err := unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return b, os.NewSyscallError("mmap", err)
}

func (f osFile) Unmap(b []byte) error { return unix.Munmap(b) }

package pki

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/wholefile"
)

// A Storage is where an Authority keeps its files.
type Storage interface {
	// Begin looks at the files. What is written until Commit is seen by others
	// whole or, if they were quicker, not at all: then Commit returns
	// ErrConflict. A storage may instead keep others out until Close.
	Begin() (Files, error)
}

// Files is one look at an authority's files, and the changes to them.
type Files interface {
	Path(name string) string          // what the file is called in messages
	Read(name string) ([]byte, error) // fs.ErrNotExist when there is none
	Write(name string, b []byte) error
	Remove(name string) error
	Commit() error
	Close()
}

// ErrConflict reports that somebody else changed the files meanwhile.
var ErrConflict = errors.New("the files of the certificate authority were changed meanwhile")

// BundleFile is the one file that is not secret and is made for others.
const BundleFile = "ca.crt"

// A folder is a directory as a Storage. Others are kept out by a lock, and each
// file is written whole or not at all, in the order of the calls.
type folder string

func (d folder) Begin() (Files, error) {
	unlock, err := lock(filepath.Join(string(d), ".lock"))
	if err != nil {
		return nil, err
	}
	return folderFiles{d, unlock}, nil
}

type folderFiles struct {
	folder
	unlock func()
}

func (d folder) Path(name string) string               { return filepath.Join(string(d), name) }
func (f folderFiles) Read(name string) ([]byte, error) { return os.ReadFile(f.Path(name)) }

func (f folderFiles) Write(name string, b []byte) error {
	mode := fs.FileMode(0o600)
	if filepath.Ext(name) == ".crt" {
		mode = 0o644
	}
	return wholefile.Replace(f.Path(name), b, mode)
}

func (f folderFiles) Remove(name string) error {
	if err := os.Remove(f.Path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a file of the certificate authority: %w", err)
	}
	return wholefile.SyncDir(string(f.folder))
}

func (f folderFiles) Commit() error { return nil }
func (f folderFiles) Close()        { f.unlock() }

// lock keeps other processes from making the same files meanwhile.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the certificate authority: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the certificate authority: %w", err)
	}
	return func() { f.Close() }, nil
}

//go:build !linux

package procfs

import "github.com/procession-dev/procession/internal/event"

// An FS is a proc file system. There is none here.
type FS struct{}

// New returns ErrUnsupported.
func New(root string) (*FS, error) { return nil, ErrUnsupported }

// Close does nothing.
func (*FS) Close() error { return nil }

// The methods below exist so that callers build; without New none is called.

// AppendCmdline returns ErrUnsupported.
func (*FS) AppendCmdline(dst []byte, pid int32, limit int) ([]byte, error) {
	return dst, ErrUnsupported
}

// AppendExe returns ErrUnsupported.
func (*FS) AppendExe(dst []byte, pid int32) ([]byte, error) { return dst, ErrUnsupported }

// AppendCwd returns ErrUnsupported.
func (*FS) AppendCwd(dst []byte, pid int32) ([]byte, error) { return dst, ErrUnsupported }

// AppendCgroup returns ErrUnsupported.
func (*FS) AppendCgroup(dst []byte, pid int32) ([]byte, error) { return dst, ErrUnsupported }

// Stat returns ErrUnsupported.
func (*FS) Stat(pid int32, st *Stat) error { return ErrUnsupported }

// Status returns ErrUnsupported.
func (*FS) Status(pid int32, s *Status) error { return ErrUnsupported }

// Owner returns ErrUnsupported.
func (*FS) Owner(pid int32) (euid, egid uint32, err error) { return 0, 0, ErrUnsupported }

// ExeFile returns ErrUnsupported.
func (*FS) ExeFile(pid int32, f *event.ExeFile) error { return ErrUnsupported }

// LoginUID returns ErrUnsupported.
func (*FS) LoginUID(pid int32) (uint32, error) { return 0, ErrUnsupported }

// SessionID returns ErrUnsupported.
func (*FS) SessionID(pid int32) (uint32, error) { return 0, ErrUnsupported }

// NS returns ErrUnsupported.
func (*FS) NS(pid int32) (event.NS, error) { return event.NS{}, ErrUnsupported }

// AppendPids returns ErrUnsupported.
func (*FS) AppendPids(dst []int32) ([]int32, error) { return dst, ErrUnsupported }

// Pids returns ErrUnsupported.
func (*FS) Pids() ([]int32, error) { return nil, ErrUnsupported }

func (*FS) liveThread(pid int32) (int32, error) { return 0, ErrUnsupported }

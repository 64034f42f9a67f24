package testenv

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Cgroup makes the cgroups of path (names with slashes between them) below
// root, a directory in a cgroup file system, and returns the last one's
// directory. What it made is removed at the end; what was there stays. Without
// the right to make one the test is skipped.
func Cgroup(t testing.TB, root, path string) string {
	t.Helper()
	dir := root
	for name := range strings.SplitSeq(path, "/") {
		dir = filepath.Join(dir, name)
		made := dir
		switch err := os.Mkdir(made, 0o755); {
		case err == nil:
			t.Cleanup(func() {
				if err := RemoveCgroup(made); err != nil {
					t.Error(err)
				}
			})
		case !os.IsExist(err):
			Skip(t, "cannot make a cgroup: "+err.Error())
		}
	}
	return dir
}

// RemoveCgroup removes a cgroup without children. A process that has been
// waited for leaves its cgroup a moment later: that is waited for as well.
func RemoveCgroup(dir string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := os.Remove(dir)
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

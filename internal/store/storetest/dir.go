package storetest

import (
	"os"
	"testing"
)

// Dir is t.TempDir in memory where there is such a file system: syncing costs
// nothing there, and what a test says of processes that are killed holds the
// same. Tests about the disk itself use t.TempDir.
func Dir(t testing.TB) string {
	const shm = "/dev/shm"
	dir, err := os.MkdirTemp(shm, "procession-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove %s: %v", dir, err)
		}
	})
	return dir
}

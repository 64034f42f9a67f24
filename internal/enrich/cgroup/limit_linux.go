package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"

	"github.com/containerd/cgroups/v3"
)

// unlimited is more than any machine has. The kernel says no limit by "max" in
// v2, and in v1 by the number of pages that an int64 can count the bytes of.
const unlimited = 1 << 60

// MemoryLimit is how many bytes of memory this process's cgroup may use, and
// those above it as far as they can be seen from here; 0 is no limit.
func MemoryLimit() (int64, error) { return memoryLimit("/") }

// memoryLimit finds proc and sys below root.
func memoryLimit(root string) (int64, error) {
	v1, v2, err := cgroups.ParseCgroupFileUnified(filepath.Join(root, "proc/self/cgroup"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // a kernel without cgroups
	}
	if err != nil {
		return 0, fmt.Errorf("limit of memory: which cgroup: %w", err)
	}
	limit := int64(unlimited)
	lower := func(n int64, err error) error {
		limit = min(limit, n)
		return err
	}
	top := filepath.Join(root, "sys/fs/cgroup")
	if own, ok := v1["memory"]; ok {
		// The kernel has looked at those above.
		err = lower(stat(filepath.Join(inside(filepath.Join(top, "memory"), own), "memory.stat"), "hierarchical_memory_limit"))
	} else {
		for dir := inside(top, v2); err == nil && len(dir) >= len(top); dir = filepath.Dir(dir) {
			// Beyond high the kernel makes the process wait; at max it kills it.
			err = errors.Join(lower(number(filepath.Join(dir, "memory.high"))), lower(number(filepath.Join(dir, "memory.max"))))
		}
	}
	if err != nil {
		return 0, fmt.Errorf("limit of memory: %w", err)
	}
	if limit == unlimited {
		return 0, nil
	}
	return limit, nil
}

// inside is the directory of a cgroup below where its hierarchy is mounted. In
// a container the mount begins at its own cgroup, while the name may be that from
// outside.
func inside(mount, cgroup string) string {
	dir := filepath.Join(mount, path.Clean("/"+cgroup))
	if _, err := os.Stat(dir); err != nil {
		return mount
	}
	return dir
}

// number reads a file with one number. A cgroup without the file, as the
// first, has no limit.
func number(file string) (int64, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return unlimited, nil
	}
	if err != nil {
		return unlimited, err
	}
	return parse(file, bytes.TrimSpace(b))
}

// stat reads one of the lines "name number" of a file.
func stat(file, name string) (int64, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return unlimited, nil
	}
	if err != nil {
		return unlimited, err
	}
	for line := range bytes.Lines(b) {
		if v, ok := bytes.CutPrefix(line, []byte(name+" ")); ok {
			return parse(file, bytes.TrimSpace(v))
		}
	}
	return unlimited, fmt.Errorf("%s: no line %s", file, name)
}

// parse reads what file has for a limit.
func parse(file string, b []byte) (int64, error) {
	if string(b) == "max" {
		return unlimited, nil
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil || n < 0 {
		return unlimited, fmt.Errorf("%s: %.32q is no number of bytes", file, b)
	}
	return min(n, unlimited), nil
}

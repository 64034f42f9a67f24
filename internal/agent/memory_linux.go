package agent

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// newSettler makes one for this process. There may be one only: dividing a
// second time would put the program together again.
func newSettler() (settler, error) {
	text, err := findText()
	if err == nil {
		err = text.divide()
	}
	return settler{resident: resident, unmap: text.unmap, collect: debug.FreeOSMemory}, err
}

// resident is this process's resident memory (proc(5): the second field of statm,
// in pages).
func resident() (int, error) {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	f := bytes.Fields(b)
	if len(f) < 2 {
		return 0, fmt.Errorf("read /proc/self/statm: %q has no second field", b)
	}
	pages, err := strconv.Atoi(string(f[1]))
	if err != nil {
		return 0, fmt.Errorf("read /proc/self/statm: %w", err)
	}
	return pages * os.Getpagesize(), nil
}

// An ownText is where the program's own file is mapped and nothing can write to
// it: ranges of addresses, which stay where they are.
type ownText [][2]uintptr

// unmap gives back the pages.
//
// They are a clean copy of the file. Without this those that were touched stay
// mapped for as long as the agent lives, and count as its resident memory,
// although most of the code and tables in them run once. Unmapping them loses
// nothing: what runs again is mapped again from the page cache, at a minor
// fault for every piece of it.
func (t ownText) unmap() error {
	for _, r := range t {
		if _, _, e := syscall.Syscall(unix.SYS_MADVISE, r[0], r[1]-r[0], unix.MADV_DONTNEED); e != 0 {
			return fmt.Errorf("give back pages of the program: %w", e)
		}
	}
	return nil
}

// divide has the kernel map less of the program at a time.
//
// With each page that is touched the kernel maps what it has around it, up to
// 64 KiB but never beyond the mapping: three times as much as is used. Pieces that
// take turns in a flag remain mappings of their own. The flag, not to be in a
// core dump, is without effect: what is a clean copy of a file is in none.
func (t ownText) divide() error {
	piece := uintptr(max(16<<10, os.Getpagesize()))
	for _, r := range t {
		for at := r[0]; at < r[1]; at += 2 * piece {
			if _, _, e := syscall.Syscall(unix.SYS_MADVISE, at, min(piece, r[1]-at), unix.MADV_DONTDUMP); e != 0 {
				return fmt.Errorf("divide the mapping of the program: %w", e)
			}
		}
	}
	return nil
}

// findText looks for the program among the mappings.
func findText() (t ownText, err error) {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if from, to, ok := textRange(lines.Text(), exe); ok {
			t = append(t, [2]uintptr{from, to})
		}
	}
	return t, lines.Err()
}

// textRange is the range of a line of maps if it is a part of exe that nothing
// can write to: what was written is not in the file, and must stay.
func textRange(line, exe string) (from, to uintptr, ok bool) {
	f := strings.Fields(line)
	if len(f) < 6 || strings.Join(f[5:], " ") != exe {
		return 0, 0, false
	}
	perm := f[1]
	if len(perm) != 4 || perm[1] != '-' || perm[3] != 'p' {
		return 0, 0, false
	}
	if n, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); n != 2 || err != nil || to <= from {
		return 0, 0, false
	}
	return from, to, true
}

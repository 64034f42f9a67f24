package agent

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// settleMemory gives back what is not in use: the garbage of reading the
// kernel's types and compiling rules, and the pages of the program's own file
// that were touched on the way.
//
// Those pages are a clean copy of a file. Without this they stay mapped for as
// long as the agent lives, and count as its resident memory, although most of
// the code and tables in them run once. Unmapping them loses nothing: what runs
// again is mapped again from the page cache, at a minor fault for every 64 KiB.
func settleMemory() error {
	debug.FreeOSMemory()
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		from, to, ok := ownText(lines.Text(), exe)
		if !ok {
			continue
		}
		if _, _, e := syscall.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); e != 0 {
			return fmt.Errorf("give back pages of %s: %w", exe, e)
		}
	}
	return lines.Err()
}

// ownText is the range of a line of maps if it is a part of exe that nothing
// can write to: what was written is not in the file, and must stay.
func ownText(line, exe string) (from, to uintptr, ok bool) {
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

package agent

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// An ownMemory is this process's.
type ownMemory struct {
	settler
	statm *os.File
	text  [][2]uintptr // ranges of the program's file that nothing can write to
}

func newSettler() (*ownMemory, error) {
	m := new(ownMemory)
	if err := m.findText(); err != nil {
		return nil, err
	}
	err := m.divideText()
	if err != nil {
		return nil, err
	}
	if m.statm, err = os.Open("/proc/self/statm"); err != nil {
		return nil, err
	}
	m.settler = settler{resident: m.read, unmap: m.unmapText, collect: debug.FreeOSMemory}
	return m, nil
}

func (m *ownMemory) close() { m.statm.Close() }

// read is the resident memory (proc(5): the second field of statm, in pages).
func (m *ownMemory) read() (int, error) {
	var b [128]byte
	n, err := m.statm.ReadAt(b[:], 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	f := bytes.Fields(b[:n])
	if len(f) < 2 {
		return 0, fmt.Errorf("read /proc/self/statm: %q has no second field", b[:n])
	}
	pages, err := strconv.Atoi(string(f[1]))
	if err != nil {
		return 0, fmt.Errorf("read /proc/self/statm: %w", err)
	}
	return pages * os.Getpagesize(), nil
}

// unmapText gives back the pages of the program's own file.
//
// They are a clean copy of the file. Without this those that were touched stay
// mapped for as long as the agent lives, and count as its resident memory,
// although most of the code and tables in them run once. Unmapping them loses
// nothing: what runs again is mapped again from the page cache, at a minor
// fault for every piece of it.
func (m *ownMemory) unmapText() error {
	for _, r := range m.text {
		if _, _, e := syscall.Syscall(unix.SYS_MADVISE, r[0], r[1]-r[0], unix.MADV_DONTNEED); e != 0 {
			return fmt.Errorf("give back pages of the program: %w", e)
		}
	}
	return nil
}

// divideText has the kernel map less of the program at a time.
//
// With each page that is touched the kernel maps what it has around it, up to
// 64 KiB but never beyond the mapping: three times as much as is used. Pieces that
// take turns in a flag remain mappings of their own. The flag, not to be in a
// core dump, is without effect: what is a clean copy of a file is in none.
func (m *ownMemory) divideText() error {
	piece := uintptr(max(16<<10, os.Getpagesize()))
	for _, r := range m.text {
		for at := r[0]; at < r[1]; at += 2 * piece {
			if _, _, e := syscall.Syscall(unix.SYS_MADVISE, at, min(piece, r[1]-at), unix.MADV_DONTDUMP); e != 0 {
				return fmt.Errorf("divide the mapping of the program: %w", e)
			}
		}
	}
	return nil
}

// findText looks for the program among the mappings. They stay where they are.
func (m *ownMemory) findText() error {
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
		if from, to, ok := ownText(lines.Text(), exe); ok {
			m.text = append(m.text, [2]uintptr{from, to})
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

package agent

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/testenv"
)

func TestOwnText(t *testing.T) {
	const exe = "/usr/bin/agent"
	for _, tt := range []struct {
		name, line string
		from, to   uintptr
	}{
		{"empty", "", 0, 0},
		{"anonymous", "c000000000-c000400000 rw-p 00000000 00:00 0 ", 0, 0},
		{"written data of the program", "01ccd000-01d5f000 rw-p 018cd000 fe:00 9978226 /usr/bin/agent", 0, 0},
		{"another file", "00400000-00f51000 r-xp 00000000 fe:00 9978226 /usr/lib/libc.so", 0, 0},
		{"a file that begins with the name", "00400000-00f51000 r-xp 00000000 fe:00 9978226 /usr/bin/agent x", 0, 0},
		{"shared", "00400000-00f51000 r--s 00000000 fe:00 9978226 /usr/bin/agent", 0, 0},
		{"no range", "00400000 r-xp 00000000 fe:00 9978226 /usr/bin/agent", 0, 0},
		{"backwards", "00f51000-00400000 r-xp 00000000 fe:00 9978226 /usr/bin/agent", 0, 0},
		{"code", "00400000-00f51000 r-xp 00000000 fe:00 9978226                            /usr/bin/agent", 0x400000, 0xf51000},
		{"tables", "00f51000-01ccd000 r--p 00b51000 fe:00 9978226    /usr/bin/agent", 0xf51000, 0x1ccd000},
	} {
		from, to, ok := ownText(tt.line, exe)
		if from != tt.from || to != tt.to || ok != (tt.to != 0) {
			t.Errorf("%s: %q: %#x-%#x %t, want %#x-%#x", tt.name, tt.line, from, to, ok, tt.from, tt.to)
		}
	}
}

// Afterwards less of the program is resident, and all of it still runs.
func TestSettleMemory(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The whole program, as if the start had used all of it.
	lines(t, "/proc/self/maps", func(line string) {
		if from, to, ok := ownText(line, exe); ok {
			_, _, e := syscall.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_POPULATE_READ)
			if e != 0 {
				testenv.Skip(t, "the kernel does not map pages on request: "+e.Error())
			}
		}
	})
	resident := func() (kb int) {
		t.Helper()
		counts := false
		lines(t, "/proc/self/smaps", func(line string) {
			w := strings.Fields(line)
			if strings.Contains(w[0], "-") {
				_, _, counts = ownText(line, exe)
			}
			if counts && w[0] == "Rss:" {
				n, err := strconv.Atoi(w[1])
				if err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				kb += n
			}
		})
		return kb
	}
	before := resident()
	m, err := newSettler()
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if err := m.look(time.Now()); err != nil {
		t.Fatal(err)
	}
	if is, err := m.read(); err != nil || is < 1<<20 || is > 1<<30 {
		t.Errorf("resident memory is %d bytes, %v", is, err)
	}
	if after := resident(); before == 0 || after > before/2 {
		t.Errorf("%d kB of the program are resident, %d before; want half or less", after, before)
	}
}

func lines(t *testing.T, file string, each func(string)) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		each(line)
	}
}

package agent

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/enrich/cgroup"
	"github.com/procession-dev/procession/internal/testenv"
)

func TestTextRange(t *testing.T) {
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
		from, to, ok := textRange(tt.line, exe)
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
		if from, to, ok := textRange(line, exe); ok {
			_, _, e := syscall.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_POPULATE_READ)
			if e != 0 {
				testenv.Skip(t, "the kernel does not map pages on request: "+e.Error())
			}
		}
	})
	ofProgram := func() (kb int) {
		t.Helper()
		counts := false
		lines(t, "/proc/self/smaps", func(line string) {
			w := strings.Fields(line)
			if strings.Contains(w[0], "-") {
				_, _, counts = textRange(line, exe)
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
	before := ofProgram()
	m, err := newSettler()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.look(time.Now()); err != nil {
		t.Fatal(err)
	}
	if is, err := m.resident(); err != nil || is < 1<<20 || is > 1<<30 {
		t.Errorf("resident memory is %d bytes, %v", is, err)
	}
	if after := ofProgram(); before == 0 || after > before/2 {
		t.Errorf("%d kB of the program are resident, %d before; want half or less", after, before)
	}
}

// TestLimitMemory: in a cgroup with a limit Go has one below it, but where the
// operator said otherwise.
func TestLimitMemory(t *testing.T) {
	const child = "PROCESSION_LIMIT_MEMORY" // its cgroup
	if dir := os.Getenv(child); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
		limitMemory(slog.New(slog.NewTextHandler(os.Stderr, nil)))
		fmt.Printf("limit %d\n", memoryLimit())
		return
	}
	testenv.Root(t)
	root, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(root); err != nil {
		root, file = "/sys/fs/cgroup", "memory.max"
	}
	dir := testenv.Cgroup(t, root, fmt.Sprintf("procession-limit-%d/inner", os.Getpid()))
	if file == "memory.max" {
		for _, d := range []string{root, filepath.Dir(dir)} {
			if err := os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
				testenv.Skip(t, "no limits of memory for cgroups: "+err.Error())
			}
		}
	}
	above, err := cgroup.MemoryLimit()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		outer, inner, env string
		want              int64
	}{
		{"1G", "512M", "GOMEMLIMIT=", 512<<20*9/10 + 1 - besideGo},
		{"256M", "512M", "GOMEMLIMIT=", 256<<20*9/10 + 1 - besideGo},
		{"-1", "-1", "GOMEMLIMIT=", 0},
		{"1G", "512M", "GOMEMLIMIT=100MiB", 100 << 20},
		{"1G", "512M", "GOMEMLIMIT=off", 0},
	} {
		if above != 0 && c.inner == "-1" {
			continue // this test itself runs in a cgroup with a limit
		}
		for d, limit := range map[string]string{filepath.Dir(dir): c.outer, dir: c.inner} {
			if file == "memory.max" && limit == "-1" {
				limit = "max"
			}
			if err := os.WriteFile(filepath.Join(d, file), []byte(limit), 0); err != nil {
				testenv.Skip(t, "a cgroup cannot be limited here: "+err.Error())
			}
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestLimitMemory$")
		cmd.Env = append(os.Environ(), child+"="+dir, c.env)
		out, err := cmd.CombinedOutput()
		if want := fmt.Sprintf("limit %d\n", c.want); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("outer %s, inner %s, %s: %v, %s; want %s", c.outer, c.inner, c.env, err, out, want)
		}
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

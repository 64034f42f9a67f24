package enrich

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
	"github.com/procession-dev/procession/internal/testenv"
)

// rootedStage makes the test program one that lives below other roots: it
// changes to each directory that it reads.
const rootedStage = "PROCESSION_TEST_ROOT"

func liveBelow() error {
	top, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if err := cmpErr(unix.Fchdir(top), unix.Chroot("."), unix.Chroot(in.Text()), unix.Chdir("/")); err != nil {
			return err
		}
		fmt.Println("there")
	}
	return in.Err()
}

// below starts a process whose root is dir, and describes it. enter changes to
// another root.
func below(t *testing.T, dir string, attr *syscall.SysProcAttr) (p *event.Process, enter func(dir string)) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), rootedStage+"=1")
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	in, said := testenv.Talk(t, cmd)
	enter = func(dir string) {
		t.Helper()
		fmt.Fprintln(in, dir)
		if _, err := said.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	enter(dir)
	fs, err := procfs.New("")
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	var st procfs.Stat
	if err := fs.Stat(int32(cmd.Process.Pid), &st); err != nil {
		t.Fatal(err)
	}
	p = &event.Process{PID: int32(cmd.Process.Pid), Start: st.Start(), IDs: event.IDs{UID: 33}}
	p.Sources[event.FieldStart], p.Sources[event.FieldIDs] = event.SourceProc, event.SourceProc
	return p, enter
}

// patient finds names however slow the machine is.
func patient(t *testing.T) *Users {
	t.Helper()
	u, err := NewUsers("")
	if err != nil {
		t.Fatal(err)
	}
	u.slow = time.Minute
	return u
}

const names = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/:\nother:x:33:33::/:\n"

func TestUserNames(t *testing.T) {
	testenv.Root(t)
	p, enter := below(t, "/", nil)
	for _, c := range []struct {
		name  string
		build func(dir string) error
		want  string
		known bool
	}{
		{"a file", func(d string) error { return os.WriteFile(d+"/etc/passwd", []byte(names), 0o644) }, "www-data", true},
		{"none", func(string) error { return nil }, "", false},
		{"empty", func(d string) error { return os.WriteFile(d+"/etc/passwd", nil, 0o644) }, "", true},
		{"a link inside", func(d string) error {
			return cmpErr(os.WriteFile(d+"/users", []byte(names), 0o644), os.Symlink("/users", d+"/etc/passwd"))
		}, "www-data", true},
		{"a link out", func(d string) error { return os.Symlink("../../../../../../../../etc/passwd", d+"/etc/passwd") }, "", false},
		{"a link to itself", func(d string) error { return os.Symlink("passwd", d+"/etc/passwd") }, "", false},
		{"a link into proc", func(d string) error { return os.Symlink("/proc/1/root/etc/passwd", d+"/etc/passwd") }, "", false},
		{"a directory", func(d string) error { return os.Mkdir(d+"/etc/passwd", 0o755) }, "", false},
		{"a FIFO", func(d string) error { return unix.Mkfifo(d+"/etc/passwd", 0o644) }, "", false},
		{"a device that never ends", func(d string) error { return unix.Mknod(d+"/etc/passwd", unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))) }, "", false},
		{"a terabyte of nothing behind a name", func(d string) error {
			return cmpErr(os.WriteFile(d+"/etc/passwd", []byte(names), 0o644), os.Truncate(d+"/etc/passwd", 1<<40))
		}, "www-data", true},
		{"a name beyond the bound", func(d string) error {
			return os.WriteFile(d+"/etc/passwd", []byte(strings.Repeat("#\n", maxPasswd/2)+names), 0o644)
		}, "", true},
		{"a million names", func(d string) error {
			var b strings.Builder
			for i := range 1 << 20 {
				fmt.Fprintf(&b, "u%d:x:%d:\n", i, i+1000)
			}
			return os.WriteFile(d+"/etc/passwd", []byte(names+b.String()), 0o644)
		}, "www-data", true},
		{"a name for a terminal", func(d string) error {
			return os.WriteFile(d+"/etc/passwd", []byte("\x1b[2J:x:33:\n"+strings.Repeat("x", 100)+":x:33:\n:x:33:\nok:x:33:\n"), 0o644)
		}, "ok", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := cmpErr(os.Mkdir(filepath.Join(dir, "etc"), 0o755), c.build(dir)); err != nil {
				testenv.Skip(t, err.Error())
			}
			u := patient(t)
			enter(dir)
			for range 2 { // the second time from the cache
				if got, ok := u.Name(p); got != c.want || ok != c.known {
					t.Errorf("got %q, %v, want %q, %v", got, ok, c.want, c.known)
				}
			}
			if s := u.Stats(); s.Reads != 1 || s.Slow != 0 {
				t.Errorf("%+v", s)
			}
			for _, f := range u.known {
				if len(f.names) > maxUsers {
					t.Errorf("%d names are kept", len(f.names))
				}
			}
		})
	}
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func TestUserNamesOfAnotherMountAreNotRead(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir+"/etc", "tmpfs", 0, ""); err != nil {
		testenv.Skip(t, err.Error())
	}
	t.Cleanup(func() { unix.Unmount(dir+"/etc", unix.MNT_DETACH) })
	if err := os.WriteFile(dir+"/etc/passwd", []byte(names), 0o644); err != nil {
		t.Fatal(err)
	}
	p, _ := below(t, dir, nil)
	if got, ok := patient(t).Name(p); got != "" || ok {
		t.Errorf("got %q", got)
	}
}

// A pid that is another process's by now names nobody, and a root of its own
// names the users of no other process.
func TestUserNamesAreTheProcessesOwn(t *testing.T) {
	testenv.Root(t)
	real, fake := t.TempDir(), t.TempDir()
	for dir, text := range map[string]string{real: names, fake: "admin:x:33:\n"} {
		if err := cmpErr(os.Mkdir(dir+"/etc", 0o755), os.WriteFile(dir+"/etc/passwd", []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	u := patient(t)
	w := &event.Workload{Place: event.PlaceContainer, ContainerID: webID}
	p, _ := below(t, real, nil)
	q, _ := below(t, fake, nil)
	p.Workload, q.Workload = w, w
	a, _ := u.Name(q)
	if b, _ := u.Name(p); a != "admin" || b != "www-data" {
		t.Errorf("got %q and %q", a, b)
	}
	other := *p
	other.Start -= uint64(time.Second)
	if got, ok := u.Name(&other); got != "" || ok {
		t.Errorf("a process that had the pid before is %q", got)
	}
	gone := *p
	gone.Exited = true
	if got, ok := u.Name(&gone); got != "" || ok {
		t.Errorf("a process that has ended is %q", got)
	}
}

// In a user namespace ids are others inside.
func TestUserNamesInAUserNamespace(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := cmpErr(os.Mkdir(dir+"/etc", 0o755), os.WriteFile(dir+"/etc/passwd", []byte(names), 0o644)); err != nil {
		t.Fatal(err)
	}
	p, _ := below(t, dir, &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}, {ContainerID: 33, HostID: 100033, Size: 10}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	})
	u := patient(t)
	p.UID = 100033
	if got, ok := u.Name(p); got != "www-data" || !ok {
		t.Errorf("got %q", got)
	}
	p.UID = 33 // is nobody inside
	if got, ok := u.Name(p); got != "" || ok {
		t.Errorf("an id that is not mapped is %q", got)
	}
}

// A file system that does not answer delays nobody for long, and not twice.
func TestSlowFileSystem(t *testing.T) {
	testenv.Root(t)
	u, err := NewUsers("")
	if err != nil {
		t.Fatal(err)
	}
	forever := make(chan struct{})
	t.Cleanup(func() { close(forever) })
	u.load = func(int) (map[uint32]string, error) {
		<-forever
		return nil, nil
	}
	u.slow = time.Millisecond
	p, _ := below(t, t.TempDir(), nil)
	for i := range 3 * maxStuck {
		p.Workload = &event.Workload{ContainerID: fmt.Sprint(i)} // each a root that was not read yet
		if got, ok := u.Name(p); got != "" || ok {
			t.Fatal(got)
		}
	}
	if n := u.stuck.Load(); n != maxStuck {
		t.Errorf("%d reads wait, want at most %d", n, maxStuck)
	}
	if s := u.Stats(); s.Reads != 3*maxStuck || s.Failed != s.Reads || s.Slow != s.Reads {
		t.Errorf("%+v", s)
	}
}

func TestUserCacheIsBounded(t *testing.T) {
	u, err := NewUsers("")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 * maxRoots {
		u.remember(root{container: fmt.Sprint(i)}, &passwd{until: time.Now().Add(namesFor)})
		if len(u.known) > maxRoots {
			t.Fatalf("%d files are kept", len(u.known))
		}
	}
}

func FuzzPasswd(f *testing.F) {
	f.Add([]byte(names))
	f.Add([]byte("a:b:c:d\n::0:\n\xff:x:1:"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got := parsePasswd(b)
		if len(got) > maxUsers {
			t.Fatalf("%d names", len(got))
		}
		for id, name := range got {
			if !userName([]byte(name)) {
				t.Fatalf("%d is %q", id, name)
			}
		}
	})
}

package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/testenv"
)

// role makes the test binary play a process to look at, instead of testing.
const role = "PROCFS_TEST_ROLE"

func init() {
	if os.Getenv(role) != "" {
		runtime.LockOSThread() // main runs on the first thread
	}
}

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "":
		os.Exit(m.Run())
	case "wait":
		fmt.Println("ready")
		os.Stdin.Read(make([]byte, 1))
	case "exec-for-ever":
		// Two programs by turns, in one process: /proc/self/exe as "self", and
		// the same file by another name as "other". Not really for ever, should
		// nobody stop it.
		if began, err := strconv.ParseInt(os.Args[3], 10, 64); err != nil || time.Now().Unix() > began+60 {
			os.Exit(1)
		}
		next := []string{"other", os.Args[2], os.Args[1], os.Args[3]}
		if os.Args[0] == "other" {
			next[0] = "self"
		}
		panic(unix.Exec(os.Args[2], next, os.Environ()))
	case "first-thread-ends":
		go func() {
			runtime.LockOSThread()
			fmt.Println("ready")
			b := make([]byte, 1)
			os.Stdin.Read(b)
			os.Exit(0)
		}()
		unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	}
}

// start runs the test binary in a role, until the test is over.
func start(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), role+"="+name)
	_, out := testenv.Talk(t, cmd)
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func open(t testing.TB, root string) *FS {
	t.Helper()
	fs, err := New(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fs.Close() })
	return fs
}

func TestNewRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{file, filepath.Join(file, "below"), "/no/such/directory"} {
		if fs, err := New(root); err == nil {
			fs.Close()
			t.Errorf("New(%q) succeeded", root)
		}
	}
}

const (
	testID     = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	testCgroup = "/kubepods/burstable/pod1fc8cbb1-1d73-41f8-a9ba-825cb32d14b2/" + testID
)

func TestReadTrees(t *testing.T) {
	base := event.FieldSet(event.FieldStart, event.FieldParent, event.FieldName, event.FieldSession,
		event.FieldIDs, event.FieldCaps, event.FieldNNP)
	program := event.FieldSet(event.FieldExe, event.FieldArgs, event.FieldCwd)
	ns := event.NS{PID: 4026532201, Mnt: 4026532199, User: 4026531837, Net: 4026532203}
	const all = ^uint64(0) >> 23
	for _, c := range []struct {
		tree string
		pid  int32
		err  error
		dead bool
		want event.Facts
	}{
		{tree: "container", pid: 1, err: ErrGone},
		{tree: "first-thread-ended", pid: 301, err: ErrNotProcess},
		{
			tree: "container", pid: 4242, want: event.Facts{
				Have:  base | program | event.FieldSet(event.FieldNS, event.FieldLogin, event.FieldCgroup),
				Start: 9876540000000, PPID: 4200, SID: 4242, TTY: 2, Threads: 3, LoginUID: 1000, AuditSession: 3,
				IDs:          event.IDs{UID: 101, EUID: 101, SUID: 101, FSUID: 101, GID: 101, EGID: 102, SGID: 103, FSGID: 104},
				CapPermitted: 0xa80425fb, CapEffective: 0x400, NoNewPrivs: true, NS: ns, InnerPID: 7,
				Comm: []byte("nginx"), Exe: []byte("/usr/sbin/nginx"), Cwd: []byte("/srv/www"),
				Cmdline: []byte("nginx: worker process\x00-g\x00daemon off;\x00"), CmdlineLen: 37, Cgroup: []byte(testCgroup),
			},
		},
		{
			tree: "name-imitates-stat", pid: 100, want: event.Facts{
				Have: base | program | event.FieldSet(event.FieldCgroup), Start: 550000000, PPID: 77, SID: 100, Threads: 1,
				InnerPID: 100, CapPermitted: all, CapEffective: all, Comm: []byte("a) R 1 1 1 0 -1 (b"),
				Exe: []byte("/bin/x"), Cwd: []byte("/"), Cmdline: []byte{0}, CmdlineLen: 1, Cgroup: []byte("/init.scope"),
			},
		},
		{
			tree: "name-with-newline", pid: 101, want: event.Facts{
				Have: base | program | event.FieldSet(event.FieldCgroup), Start: 550000000, PPID: 77, SID: 101, Threads: 1,
				IDs:      event.IDs{UID: 1000, EUID: 1000, SUID: 1000, FSUID: 1000},
				InnerPID: 101, CapPermitted: all, CapEffective: all, Comm: []byte("x\nUid:\t0 0 0"),
				Exe: []byte("/bin/x (deleted)"), Cwd: []byte("/tmp"), Cmdline: []byte("x\x00"), CmdlineLen: 2,
				Cgroup: []byte("/user.slice"),
			},
		},
		{
			tree: "zombie-shows-host-cgroup", pid: 200, dead: true, want: event.Facts{
				Have: base, Start: 1234560000000, PPID: 1, SID: 200, Threads: 1, InnerPID: 200,
				CapPermitted: all, CapEffective: all, Comm: []byte("sh"),
			},
		},
		{
			tree: "dying-shows-host-cgroup", pid: 201, dead: true, want: event.Facts{
				Have: base, Start: 1234560000000, PPID: 1, SID: 201, Threads: 1, InnerPID: 201,
				CapPermitted: all, CapEffective: all, Comm: []byte("sh"),
			},
		},
		{
			tree: "zombie-v2-keeps-cgroup", pid: 202, dead: true, want: event.Facts{
				Have: base | event.FieldSet(event.FieldCgroup), Start: 1234560000000, PPID: 1, SID: 202, Threads: 1,
				InnerPID: 202, CapPermitted: all, CapEffective: all, Comm: []byte("sh"), Cgroup: []byte(testCgroup),
			},
		},
		{
			tree: "root-cgroup-of-the-host", pid: 203, want: event.Facts{
				Have: base | program | event.FieldSet(event.FieldCgroup), Start: 1234560000000, PPID: 1, SID: 203, Threads: 1,
				InnerPID: 203, CapPermitted: all, CapEffective: all, Comm: []byte("init"), Exe: []byte("/sbin/init"),
				Cwd: []byte("/"), Cmdline: []byte("init\x00"), CmdlineLen: 5, Cgroup: []byte("/"),
			},
		},
		{
			tree: "first-thread-ended", pid: 300, want: event.Facts{
				Have:  base | program | event.FieldSet(event.FieldNS, event.FieldCgroup),
				Start: 1234560000000, PPID: 1, SID: 300, Threads: 2, InnerPID: 301, NS: ns,
				IDs:          event.IDs{UID: 33, EUID: 33, SUID: 33, FSUID: 33},
				CapPermitted: all, CapEffective: all, Comm: []byte("miner"), Exe: []byte("/tmp/.x/miner"), Cwd: []byte("/tmp/.x"),
				Cmdline: []byte("/tmp/.x/miner\x00--pool\x00"), CmdlineLen: 21, Cgroup: []byte(testCgroup),
			},
		},
		{
			tree: "kernel-thread", pid: 2, want: event.Facts{
				Have:  base | event.FieldSet(event.FieldCwd, event.FieldCgroup),
				Start: 10000000, Threads: 1, InnerPID: 2, CapPermitted: all, CapEffective: all,
				Comm: []byte("kworker/u8:3-events_unbound_long"), Cwd: []byte("/"), Cgroup: []byte("/"),
			},
		},
		{
			tree: "spoofed-cgroup", pid: 400, want: event.Facts{
				Have: base | program | event.FieldSet(event.FieldCgroup), Start: 1234560000000, PPID: 1, SID: 400, Threads: 1,
				InnerPID: 400, CapPermitted: all, CapEffective: all, Comm: []byte("x"), Exe: []byte("/x"), Cwd: []byte("/"),
				Cmdline: []byte("x\x00"), CmdlineLen: 2, Cgroup: []byte("/kubepods/0::/wrong4:memory:/x"),
			},
		},
		{
			tree: "no-login-no-namespaces", pid: 500, want: event.Facts{
				Have: base | program | event.FieldSet(event.FieldCgroup), Start: 1234560000000, PPID: 1, SID: 500, Threads: 1,
				InnerPID: 500, CapPermitted: all, CapEffective: all, Comm: []byte("x"), Exe: []byte("/x"), Cwd: []byte("/"),
				Cmdline: []byte("a\x00"), CmdlineLen: 2, Cgroup: []byte("/s"),
			},
		},
		{
			tree: "arguments-given-away", pid: 501, want: event.Facts{
				Have:  base | event.FieldSet(event.FieldExe, event.FieldCwd, event.FieldCgroup),
				Start: 1234560000000, PPID: 1, SID: 501, Threads: 1, InnerPID: 501, CapPermitted: all, CapEffective: all,
				Comm: []byte("x"), Exe: []byte("/x"), Cwd: []byte("/"), Cgroup: []byte("/s"),
			},
		},
	} {
		t.Run(fmt.Sprintf("%s/%d", c.tree, c.pid), func(t *testing.T) {
			fs := open(t, "testdata/"+c.tree)
			r := new(Reading)
			err := fs.Read(c.pid, DefaultMaxArgs, r)
			if !errors.Is(err, c.err) {
				t.Fatalf("Read(%d): %v, want %v", c.pid, err, c.err)
			}
			if err != nil {
				return
			}
			if r.Stat.Dead() != c.dead {
				t.Errorf("dead: got %v, want %v", r.Stat.Dead(), c.dead)
			}
			// The test's trees may lie on a machine that has the program.
			r.Have &^= event.FieldSet(event.FieldExeFile)
			r.ExeFile = event.ExeFile{}
			c.want.From, c.want.StartTicks = event.SourceProc, true
			if d := cmp.Diff(clean(c.want), clean(r.Facts)); d != "" {
				t.Errorf("Read(%d): %s", c.pid, d)
			}
		})
	}
}

// clean makes texts of no length equal.
func clean(f event.Facts) event.Facts {
	for _, b := range []*[]byte{&f.Comm, &f.Exe, &f.File, &f.Cmdline, &f.Cwd, &f.Cgroup} {
		if len(*b) == 0 {
			*b = nil
		}
	}
	return f
}

func TestPidsOfTree(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"1", "42", "2147483647", "2147483648", "007x", "self", "-5", "0", "99999999999999999999"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	pids, err := open(t, dir).Pids()
	slices.Sort(pids)
	if err != nil || !slices.Equal(pids, []int32{1, 42, 2147483647}) {
		t.Fatalf("Pids() = %v, %v", pids, err)
	}
}

// A process with very many groups has its capabilities behind them.
func TestStatusBehindManyGroups(t *testing.T) {
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "9"), 0o700)
	text := "Name:\tx\nTgid:\t9\nUid:\t1\t2\t3\t4\nGid:\t1\t2\t3\t4\nGroups:\t" + strings.Repeat("4294967294 ", 65536) +
		"\nNSpid:\t9\nCapPrm:\t00000000000000ff\nCapEff:\t0000000000000001\n"
	if err := os.WriteFile(filepath.Join(dir, "9/status"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var s Status
	if err := open(t, dir).Status(9, &s); err != nil || s.CapPrm != 0xff || s.CapEff != 1 || !s.HasIDs() {
		t.Fatalf("Status: %+v, %v", s, err)
	}
}

// Nothing but the files of a process is opened, whatever links a tree holds.
func TestLinksAreNotFollowed(t *testing.T) {
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "9"), 0o700)
	for _, name := range []string{"cmdline", "stat", "status", "cgroup", "loginuid"} {
		if err := os.Symlink("/etc/passwd", filepath.Join(dir, "9", name)); err != nil {
			t.Fatal(err)
		}
	}
	fs := open(t, dir)
	if b, err := fs.AppendCmdline(nil, 9, 100); err == nil || len(b) != 0 {
		t.Errorf("AppendCmdline: %q, %v", b, err)
	}
	if b, err := fs.AppendCgroup(nil, 9); err == nil || len(b) != 0 {
		t.Errorf("AppendCgroup: %q, %v", b, err)
	}
	if _, err := fs.LoginUID(9); err == nil {
		t.Error("LoginUID succeeded")
	}
}

func FuzzCmdline(f *testing.F) {
	f.Add([]byte("sh\x00-c\x00true\x00"), 100)
	f.Add([]byte{0}, 1)
	f.Add([]byte("no end"), 3)
	f.Add([]byte(""), 0)
	f.Add(bytes.Repeat([]byte("a\x00"), 5000), 4096)
	dir := f.TempDir()
	fs := open(f, dir)
	pid := filepath.Join(dir, "9")
	os.Mkdir(pid, 0o700)
	stat := statLine(9, "x", "S", 1, 1, 0, 0, 1, 5, 77, 1000, 1000+1<<20)
	for name, text := range map[string]string{"stat": stat, "status": "Tgid:\t9\n", "cgroup": ""} {
		if err := os.WriteFile(filepath.Join(pid, name), []byte(text), 0o600); err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, args []byte, limit int) {
		if limit < 0 || limit > 1<<20 {
			return
		}
		if err := os.WriteFile(filepath.Join(pid, "cmdline"), args, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := fs.AppendCmdline([]byte("before"), 9, limit)
		if err != nil || string(got) != "before"+string(args[:min(len(args), limit)]) {
			t.Fatalf("AppendCmdline(%q, %d) = %q, %v", args, limit, got, err)
		}
		var r Reading
		if err := fs.Read(9, limit, &r); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(args, r.Cmdline) || len(r.Cmdline) > limit {
			t.Fatalf("Read(%q, %d): %q", args, limit, r.Cmdline)
		}
		// Cut text says so; text that is whole does not.
		if whole := limit > 0 && len(args) <= limit; whole != (int(r.CmdlineLen) == len(r.Cmdline) && len(r.Cmdline) == len(args)) &&
			len(args) > 0 && limit > 0 {
			t.Fatalf("Read(%q, %d): %d of %d bytes", args, limit, len(r.Cmdline), r.CmdlineLen)
		}
	})
}

func TestReadSelf(t *testing.T) {
	fs := open(t, "")
	var r Reading
	pid := int32(os.Getpid())
	if err := fs.Read(pid, DefaultMaxArgs, &r); err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Readlink("/proc/self/exe")
	cwd, _ := os.Getwd()
	args := strings.Join(os.Args, "\x00") + "\x00"
	if string(r.Exe) != exe || string(r.Cwd) != cwd || string(r.Cmdline) != args || int(r.CmdlineLen) != len(args) {
		t.Errorf("text: exe %q, cwd %q, args %q (%d)", r.Exe, r.Cwd, r.Cmdline, r.CmdlineLen)
	}
	if r.PPID != int32(os.Getppid()) || r.UID != uint32(os.Getuid()) || r.EGID != uint32(os.Getegid()) {
		t.Errorf("numbers: ppid %d, ids %+v", r.PPID, r.IDs)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/exe", &st); err != nil {
		t.Fatal(err)
	}
	if r.ExeFile.Ino != st.Ino || r.ExeFile.Dev != uint64(unix.Major(st.Dev))<<20|uint64(unix.Minor(st.Dev)) ||
		r.ExeFile.Mode != uint16(st.Mode) {
		t.Errorf("file: %+v, want inode %d mode %o", r.ExeFile, st.Ino, st.Mode)
	}
	if unix.Stat("/proc/self/ns/net", &st) == nil && uint64(r.NS.Net) != st.Ino {
		t.Errorf("net namespace: %d, want %d", r.NS.Net, st.Ino)
	}
	if euid, egid, err := fs.Owner(pid); err != nil || euid != r.EUID || egid != r.EGID {
		t.Errorf("Owner: %d, %d, %v", euid, egid, err)
	}
	pids, err := fs.Pids()
	if err != nil || !slices.Contains(pids, pid) || !slices.Contains(pids, 1) || !slices.IsSorted(pids) {
		t.Errorf("Pids: %v, %v", pids, err)
	}
	if err := fs.Stat(1<<30, &Stat{}); !errors.Is(err, ErrGone) {
		t.Errorf("Stat of no process: %v", err)
	}
}

// Process 1 may be closed even to root; it is still a process.
func TestReadInit(t *testing.T) {
	var r Reading
	if err := open(t, "").Read(1, DefaultMaxArgs, &r); err != nil {
		t.Fatal(err)
	}
	if want := event.FieldSet(event.FieldStart, event.FieldName, event.FieldIDs); r.Have&want != want || r.PPID != 0 {
		t.Fatalf("Read(1): %+v", r.Facts)
	}
}

// Every process of the machine can be read, or is gone.
func TestReadEverything(t *testing.T) {
	fs := open(t, "")
	pids, err := fs.Pids()
	if err != nil {
		t.Fatal(err)
	}
	var r Reading
	n := 0
	for _, pid := range pids {
		switch err := fs.Read(pid, 4096, &r); {
		case err == nil:
			n++
		case !errors.Is(err, ErrGone):
			t.Errorf("Read(%d): %v", pid, err)
		}
	}
	if n < 2 {
		t.Errorf("read %d of %d processes", n, len(pids))
	}
}

func TestArgsAreCut(t *testing.T) {
	cmd := start(t, "wait", strings.Repeat("x", 3000), "end")
	fs := open(t, "")
	var r Reading
	total := len("/proc/self/exe") + 1 + 3001 + 4
	for _, limit := range []int{1, 100, total - 1, total, total + 1} {
		if err := fs.Read(int32(cmd.Process.Pid), limit, &r); err != nil {
			t.Fatal(err)
		}
		if len(r.Cmdline) != min(limit, total) || int(r.CmdlineLen) != total {
			t.Errorf("limit %d: got %d of %d bytes, want %d of %d", limit, len(r.Cmdline), r.CmdlineLen, min(limit, total), total)
		}
	}
	if err := fs.Read(int32(cmd.Process.Pid), 0, &r); err != nil || r.Have.Has(event.FieldArgs) {
		t.Errorf("no arguments wanted: %q, %v", r.Cmdline, err)
	}
}

func TestZombieAndGone(t *testing.T) {
	fs := open(t, "")
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := int32(cmd.Process.Pid)
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, int(pid), &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	var r Reading
	if err := fs.Read(pid, DefaultMaxArgs, &r); err != nil || !r.Stat.Dead() {
		t.Fatalf("zombie: %v, %+v", err, r.Stat)
	}
	if r.Have.Has(event.FieldExe) || r.Have.Has(event.FieldArgs) || r.Have.Has(event.FieldCgroup) && string(r.Cgroup) == "/" {
		t.Errorf("zombie: %+v", r.Facts)
	}
	if _, err := fs.AppendExe(nil, pid); !errors.Is(err, ErrMissing) {
		t.Errorf("exe of a zombie: %v", err)
	}
	cmd.Wait()
	if err := fs.Read(pid, DefaultMaxArgs, &r); !errors.Is(err, ErrGone) {
		t.Errorf("after wait: %v", err)
	}
	if _, err := fs.AppendExe(nil, pid); !errors.Is(err, ErrGone) {
		t.Errorf("exe after wait: %v", err)
	}
}

// A program whose main thread has ended hides from a reader that asks for the
// process only.
func TestFirstThreadEnded(t *testing.T) {
	cmd := start(t, "first-thread-ends", "hidden")
	fs := open(t, "")
	pid := int32(cmd.Process.Pid)
	var st Stat
	for deadline := time.Now().Add(5 * time.Second); !st.Exiting(); {
		if err := fs.Stat(pid, &st); err != nil || time.Now().After(deadline) {
			t.Fatalf("first thread does not end: %v, state %c", err, st.State)
		}
	}
	var r Reading
	if err := fs.Read(pid, DefaultMaxArgs, &r); err != nil {
		t.Fatal(err)
	}
	if r.Stat.Dead() || string(r.Cmdline) != "/proc/self/exe\x00hidden\x00" || len(r.Exe) == 0 || len(r.Cgroup) == 0 {
		t.Errorf("Read: dead %v, %+v", r.Stat.Dead(), r.Facts)
	}
}

// However often a process runs another program while it is read, arguments,
// name and executable of a reading belong together.
func TestReadDuringExecs(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	exe := map[string]string{"self": filepath.Join(dir, "self"), "other": filepath.Join(dir, "other")}
	for _, path := range exe {
		b, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// Each program is handed the path of the one after the next, and its own.
	cmd := exec.Command(exe["self"])
	cmd.Args = []string{"self", exe["self"], exe["other"], strconv.FormatInt(time.Now().Unix(), 10)}
	cmd.Env = append(os.Environ(), role+"=exec-for-ever")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	fs := open(t, "")
	var r Reading
	seen := make(map[string]int)
	for deadline := time.Now().Add(20 * time.Second); seen["self"] < 100 || seen["other"] < 100; {
		if time.Now().After(deadline) {
			t.Fatalf("readings: %v", seen)
		}
		if err := fs.Read(int32(cmd.Process.Pid), 4096, &r); err != nil {
			t.Fatal(err)
		}
		if !r.Have.Has(event.FieldArgs) || !r.Have.Has(event.FieldExe) || !r.Have.Has(event.FieldName) {
			seen["missing"]++
			continue
		}
		name, _, _ := strings.Cut(string(r.Cmdline), "\x00")
		seen[name]++
		if string(r.Exe) != exe[name] || string(r.Comm) != name {
			t.Fatalf("name %q, exe %q, args %q", r.Comm, r.Exe, r.Cmdline)
		}
	}
}

func TestSnapshot(t *testing.T) {
	var f event.Facts
	buf, err := open(t, "testdata/container").Snapshot(4242, &f, make([]byte, 7, 50))
	if err != nil || string(f.Exe) != "/usr/sbin/nginx" || string(f.Cgroup) != testCgroup || len(buf) < 100 {
		t.Errorf("exe %q, cgroup %q, %v", f.Exe, f.Cgroup, err)
	}
	if n := len(f.Exe); cap(f.Exe) != n {
		t.Error("appending to one text overwrites the next")
	}
}

func TestReadAllocatesNothing(t *testing.T) {
	fs := open(t, "")
	pid := int32(os.Getpid())
	var r Reading
	read := func() {
		if err := fs.Read(pid, DefaultMaxArgs, &r); err != nil {
			t.Fatal(err)
		}
	}
	read()
	if n := testing.AllocsPerRun(100, read); n != 0 {
		t.Errorf("Read allocates %v times", n)
	}
	dst := make([]byte, 0, 8192)
	if n := testing.AllocsPerRun(100, func() {
		fs.AppendCmdline(dst, pid, 4096)
		fs.AppendExe(dst, pid)
		fs.AppendCgroup(dst, pid)
		fs.Owner(pid)
	}); n != 0 {
		t.Errorf("the reads for an exec allocate %v times", n)
	}
}

func TestNoDescriptorLeaks(t *testing.T) {
	testenv.Root(t)
	count := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before := count()
	fs, err := New("")
	if err != nil {
		t.Fatal(err)
	}
	var r Reading
	for _, pid := range []int32{1, int32(os.Getpid()), 1 << 30} {
		fs.Read(pid, 100, &r)
	}
	fs.Close()
	if after := count(); after != before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

func BenchmarkRead(b *testing.B) {
	fs := open(b, "")
	pid := int32(os.Getppid())
	var r Reading
	b.ReportAllocs()
	for b.Loop() {
		if err := fs.Read(pid, 4096, &r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStat(b *testing.B) {
	fs := open(b, "")
	pid := int32(os.Getppid())
	b.ReportAllocs()
	for b.Loop() {
		var st Stat
		if err := fs.Stat(pid, &st); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkExecReads(b *testing.B) {
	fs := open(b, "")
	pid := int32(os.Getppid())
	dst := make([]byte, 0, 64<<10)
	b.ReportAllocs()
	for b.Loop() {
		fs.AppendCmdline(dst, pid, 4096)
		fs.AppendExe(dst, pid)
		fs.AppendCgroup(dst, pid)
		fs.Owner(pid)
	}
}

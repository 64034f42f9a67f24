// Command init is the first and only user process of a test VM. It makes the
// machine look like a node (mounts, loopback, cgroups shaped like a pod's),
// runs the programs named in its Job one after the other, tells the host how
// each went, and powers off.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/test/vm/internal/wire"
)

// A console writes frames to the host.
type console struct {
	mu  sync.Mutex // guards the sequence, and keeps lines whole
	w   io.Writer
	seq uint32
	buf []byte
}

func (c *console) send(k wire.Kind, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	c.buf = wire.Frame{Seq: c.seq, Kind: k, Text: text}.Append(c.buf[:0])
	c.w.Write(c.buf) // there is nobody to tell: the host sees the gap
}

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: only for the first process of a test VM")
		os.Exit(2)
	}
	out := &console{w: os.Stdout}
	// A panic of the first process would be a panic of the kernel.
	defer powerOff()
	defer func() {
		if p := recover(); p != nil {
			out.send(wire.KindFault, fmt.Sprint("panic: ", p))
		}
	}()
	job, err := setUp(out)
	if err != nil {
		out.send(wire.KindFault, err.Error())
		return
	}
	out.send(wire.KindUp, wire.JSON(describe(job)))
	cgroups, err := podCgroups(job)
	if err != nil {
		out.send(wire.KindFault, err.Error())
		return
	}
	failed := false
	for i, r := range job.Runs {
		end, err := run(out, i, r, cgroups)
		if err != nil {
			out.send(wire.KindFault, fmt.Sprintf("%s: %v", r.Name, err))
			failed = true
			continue
		}
		failed = failed || end.Exit != 0 || end.Tainted != 0
	}
	if failed {
		sendKernelLog(out, 60)
	}
	out.send(wire.KindBye, "")
}

// powerOff ends the machine; what was written has left the serial port before.
func powerOff() {
	unix.IoctlSetInt(1, unix.TCSBRK, 1)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// setUp turns the bare kernel into something like a node.
func setUp(out *console) (*wire.Job, error) {
	if err := switchRoot(); err != nil {
		return nil, err
	}
	for _, m := range []struct{ src, dst, typ string }{
		{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"},
		{"tmpfs", "/dev/shm", "tmpfs"}, {"devpts", "/dev/pts", "devpts"}, {"tmpfs", "/tmp", "tmpfs"}, {"tmpfs", "/run", "tmpfs"},
		{"bpf", "/sys/fs/bpf", "bpf"}, {"tracefs", "/sys/kernel/tracing", "tracefs"},
		{"debugfs", "/sys/kernel/debug", "debugfs"}, {"securityfs", "/sys/kernel/security", "securityfs"},
	} {
		// Directories below /sys cannot be made; they are there when the kernel has the file system.
		if err := os.MkdirAll(m.dst, 0o755); err != nil && strings.HasPrefix(m.dst, "/sys/") {
			continue
		}
		if err := unix.Mount(m.src, m.dst, m.typ, 0, ""); err != nil && !strings.HasPrefix(m.dst, "/sys/") {
			return nil, fmt.Errorf("mount %s: %w", m.dst, err)
		}
	}
	if err := errors.Join(os.Chmod("/tmp", 0o1777), os.MkdirAll("/root", 0o700)); err != nil {
		return nil, err
	}
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, "/dev/"+name); err != nil {
			return nil, err
		}
	}
	if err := rawConsole(out); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(wire.JobFile)
	if err != nil {
		return nil, err
	}
	job := new(wire.Job)
	if err := json.Unmarshal(b, job); err != nil {
		return nil, fmt.Errorf("%s: %w", wire.JobFile, err)
	}
	if d := time.Since(job.Now); d < -time.Hour || d > time.Hour {
		tv := unix.NsecToTimeval(job.Now.UnixNano())
		if err := unix.Settimeofday(&tv); err != nil {
			return nil, fmt.Errorf("set the clock: %w", err)
		}
	}
	if err := unix.Sethostname([]byte(job.Hostname)); err != nil {
		return nil, fmt.Errorf("set the host name: %w", err)
	}
	// Every applet busybox has, sh among them.
	if out, err := exec.Command(wire.Busybox, "--install", "-s", "/bin").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("busybox: %w: %s", err, out)
	}
	for _, m := range job.Modules {
		if err := loadModule(m); err != nil {
			return nil, err
		}
	}
	if err := loopbackUp(); err != nil {
		return nil, err
	}
	// As container runtimes do. RLIMIT_MEMLOCK stays as the kernel made it:
	// raising it where BPF needs that is the agent's work.
	lim := unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return nil, fmt.Errorf("raise RLIMIT_NOFILE: %w", err)
	}
	return job, mountCgroups(job.Cgroup)
}

// switchRoot copies the initramfs into a tmpfs and makes that the root: the
// initramfs itself is no mount that pivot_root would leave.
func switchRoot() error {
	const root = "/newroot"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount the root: %w", err)
	}
	err := filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path == root:
			return fs.SkipDir
		case path == "/":
			return nil
		case d.IsDir():
			return os.MkdirAll(root+path, 0o755)
		case d.Type().IsRegular():
			return moveFile(path, root+path)
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(to, root+path)
		}
		return nil // the console's device node: devtmpfs has it
	})
	if err != nil {
		return fmt.Errorf("copy the root: %w", err)
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}

// moveFile copies a file and removes the original, so that the memory for it
// is not needed twice.
func moveFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, st.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Remove(from)
}

// rawConsole opens the console anew on this root and stops the terminal from
// rewriting what goes through it.
func rawConsole(out *console) error {
	f, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ISIG | unix.ICANON
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	for fd := range 3 {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("console: %w", err)
		}
	}
	out.w = f
	return nil
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", filepath.Base(file), err)
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

const cgroupRoot = "/sys/fs/cgroup"

// mountCgroups mounts the unified hierarchy, or the old ones as systemd's
// hybrid mode does: one per controller, and an empty v2 beside them.
func mountCgroups(version string) error {
	if version == "v2" {
		if err := unix.Mount("cgroup2", cgroupRoot, "cgroup2", 0, ""); err != nil {
			return fmt.Errorf("mount cgroup2: %w", err)
		}
		return nil
	}
	if err := unix.Mount("tmpfs", cgroupRoot, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount %s: %w", cgroupRoot, err)
	}
	ctrls, err := v1Controllers()
	if err != nil {
		return err
	}
	for _, c := range ctrls {
		dir := v1Dir(c)
		opts := c
		if strings.HasPrefix(c, "name=") {
			opts = "none," + c
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		err := unix.Mount("cgroup", dir, "cgroup", 0, opts)
		if errors.Is(err, unix.EINVAL) {
			// Newer kernels drop the old form of one controller after the other.
			err = os.Remove(dir)
		}
		if err != nil {
			return fmt.Errorf("mount cgroup %s: %w", c, err)
		}
	}
	dir := filepath.Join(cgroupRoot, "unified")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return unix.Mount("cgroup2", dir, "cgroup2", 0, "")
}

func v1Dir(controller string) string {
	return filepath.Join(cgroupRoot, strings.TrimPrefix(controller, "name="))
}

// v1Controllers names the enabled controllers, and systemd's own hierarchy.
func v1Controllers() ([]string, error) {
	b, err := os.ReadFile("/proc/cgroups")
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 4 && f[3] == "1" && !strings.HasPrefix(f[0], "#") {
			names = append(names, f[0])
		}
	}
	return append(names, "name=systemd"), nil
}

// podCgroups makes one cgroup per hierarchy, shaped as kubelet and containerd
// make them for a container of a burstable pod.
func podCgroups(job *wire.Job) (dirs []string, err error) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	const uid = "3c7a8e4e-1111-2222-3333-444455556666"
	if job.Cgroup == "v2" {
		dirs = []string{filepath.Join(cgroupRoot, "kubepods.slice", "kubepods-burstable.slice",
			"kubepods-burstable-pod"+strings.ReplaceAll(uid, "-", "_")+".slice", "cri-containerd-"+id+".scope")}
	} else {
		mounted, err := os.ReadDir(cgroupRoot)
		if err != nil {
			return nil, err
		}
		for _, m := range mounted {
			dirs = append(dirs, filepath.Join(cgroupRoot, m.Name(), "kubepods", "burstable", "pod"+uid, id))
		}
	}
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("make the pod's cgroup: %w", err)
		}
		inheritCpuset(d)
	}
	return dirs, nil
}

// inheritCpuset copies cpus and mems down from the root: a new v1 cpuset has
// none, and no process can enter it.
func inheritCpuset(dir string) {
	rel, err := filepath.Rel(filepath.Join(cgroupRoot, "cpuset"), dir)
	if err != nil || strings.HasPrefix(rel, "..") {
		return
	}
	at := filepath.Join(cgroupRoot, "cpuset")
	for _, part := range strings.Split(rel, "/") {
		next := filepath.Join(at, part)
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(at, f)); err == nil {
				os.WriteFile(filepath.Join(next, f), b, 0o644) // shows at once when a process enters
			}
		}
		at = next
	}
}

func describe(job *wire.Job) wire.Guest {
	var u unix.Utsname
	unix.Uname(&u)
	var up unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &up)
	_, btf := os.Stat("/sys/kernel/btf/vmlinux")
	return wire.Guest{
		Release: unix.ByteSliceToString(u.Release[:]), Machine: unix.ByteSliceToString(u.Machine[:]),
		Cmdline: text("/proc/cmdline"), BTF: btf == nil, LSM: text("/sys/kernel/security/lsm"),
		Lockdown: selected(text("/sys/kernel/security/lockdown")), Cgroup: job.Cgroup,
		Uptime: time.Duration(up.Nano()), Tainted: tainted(),
	}
}

func text(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// selected is the word in brackets: "none [integrity] confidentiality".
func selected(s string) string {
	_, s, _ = strings.Cut(s, "[")
	s, _, _ = strings.Cut(s, "]")
	return s
}

func tainted() uint64 {
	n, _ := strconv.ParseUint(text("/proc/sys/kernel/tainted"), 10, 64)
	return n
}

// run starts one program, passes its output on line by line, and waits for it
// and for whatever it left behind.
func run(out *console, i int, r wire.Run, cgroups []string) (wire.End, error) {
	out.send(wire.KindBegin, strconv.Itoa(i))
	rd, wr, err := os.Pipe()
	if err != nil {
		return wire.End{}, err
	}
	defer rd.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return wire.End{}, err
	}
	defer null.Close()
	env := append([]string{"PATH=/bin:" + wire.HelpersDir, "HOME=/root", "TMPDIR=/tmp", "USER=root",
		wire.EnvHelpers + "=" + wire.HelpersDir, wire.EnvFiles + "=" + wire.FilesDir,
		wire.EnvCgroup + "=" + strings.Join(cgroups, ":")}, r.Env...)
	start := time.Now()
	pid, err := syscall.ForkExec(r.Args[0], r.Args, &syscall.ProcAttr{
		Dir: r.Dir, Env: env, Files: []uintptr{null.Fd(), wr.Fd(), wr.Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	wr.Close()
	if err != nil {
		return wire.End{}, fmt.Errorf("start %s: %w", r.Args[0], err)
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		sendLines(out, rd)
	}()
	// The first process is everybody's last parent: it reaps strangers too.
	end := wire.End{Run: i}
	for {
		var ws syscall.WaitStatus
		p, err := syscall.Wait4(-1, &ws, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return wire.End{}, fmt.Errorf("wait: %w", err)
		}
		if p == pid {
			end.Exit = ws.ExitStatus()
			if ws.Signaled() {
				end.Signal = int(ws.Signal())
			}
			break
		}
	}
	end.Elapsed = time.Since(start)
	end.Tainted = tainted()
	killRest()
	<-copied
	out.send(wire.KindEnd, wire.JSON(end))
	return end, nil
}

// killRest ends every other process, so that one run cannot disturb the next,
// and so that the pipe has no writer left.
func killRest() {
	for {
		syscall.Kill(-1, syscall.SIGKILL)
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(-1, &ws, 0, nil); errors.Is(err, syscall.ECHILD) {
			return
		}
	}
}

func sendLines(out *console, r io.Reader) {
	br := bufio.NewReaderSize(r, 16<<10)
	for {
		// A line longer than the buffer comes in parts: joined by the reader
		// of the frames, which puts no line end after a part without one.
		line, err := br.ReadSlice('\n')
		if len(line) > 0 {
			out.send(wire.KindLine, string(line))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// sendKernelLog sends the newest n lines of the kernel's log.
func sendKernelLog(out *console, n int) {
	buf := make([]byte, 1<<20)
	got, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSpace(string(buf[:got])), "\n")
	for _, l := range lines[max(0, len(lines)-n):] {
		out.send(wire.KindKmsg, l)
	}
}

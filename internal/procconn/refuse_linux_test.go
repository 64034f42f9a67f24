package procconn

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/procession-dev/procession/internal/testenv"
	"golang.org/x/sys/unix"
)

// An attempt is what openAndTell tells about its Open.
type attempt struct {
	Err           string
	NotSupported  bool
	NotPermitted  bool
	Way           Way
	Reason        string
	Log           string
	Scheduling    string
	Limits        []string
	Network       string // that its sockets are in, and
	Own           string // that all its threads are in; "" if they differ
	ExecsSeen     int
	WithArguments int
}

// openAndTell opens a Conn as its arguments say, looks at a process of its own
// and prints an attempt.
func openAndTell() error {
	var log bytes.Buffer
	cfg := Config{Log: slog.New(slog.NewTextHandler(&log, nil))}
	for _, arg := range os.Args[1:] {
		switch arg {
		case "require":
			cfg.Recorder = Require
			continue
		case "off":
			cfg.Recorder = Off
			continue
		}
		if err := restrict(arg); err != nil {
			return fmt.Errorf("%s: %w", arg, err)
		}
	}
	var a attempt
	c, err := Open(context.Background(), cfg)
	if err != nil {
		a.Err, a.NotSupported, a.NotPermitted = err.Error(), errors.Is(err, ErrNotSupported), errors.Is(err, ErrPermission)
		return json.NewEncoder(os.Stdout).Encode(a)
	}
	defer c.Close()
	w := newWitness()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, w) }()
	if err := exec.Command("/bin/sleep", "0.05").Run(); err != nil {
		return err
	}
	cancel()
	if err := <-done; err != nil {
		return err
	}
	for _, r := range w.recs {
		if r.Kind.Short() == "exec" && r.Facts.PPID == int32(os.Getpid()) {
			a.ExecsSeen++
			if string(r.Cmdline) == "/bin/sleep\x000.05\x00" {
				a.WithArguments++
			}
		}
	}
	s := c.Status()
	a.Log = log.String()
	a.Way, a.Reason, a.Scheduling, a.Network = s.Way, s.Reason, s.Scheduling, s.Network
	if a.Own, err = ownNetwork(); err != nil {
		return err
	}
	for _, l := range s.Limits {
		// What the kernel lacks is no matter of what was taken away here.
		if strings.HasPrefix(l.Missing, "CAP_") || l.Missing == "recorder" {
			a.Limits = append(a.Limits, l.Missing)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(a)
}

// ownNetwork is the network namespace that every thread of this process is in;
// "" if they differ.
func ownNetwork() (string, error) {
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		return "", err
	}
	own := ""
	for _, path := range threads {
		ns, err := os.Readlink(path)
		switch {
		case errors.Is(err, os.ErrNotExist): // the thread has ended
		case err != nil:
			return "", err
		case own != "" && own != ns:
			return "", nil
		default:
			own = ns
		}
	}
	return own, nil
}

// restrict takes something away from this process.
func restrict(what string) error {
	switch what {
	case "uid-1000":
		// Through libc-like calls for all threads; they drop every capability.
		if err := syscall.Setgroups(nil); err != nil {
			return err
		}
		if err := syscall.Setgid(1000); err != nil {
			return err
		}
		return syscall.Setuid(1000)
	case "no-connector":
		return refuse(unix.SYS_SOCKET, 2, unix.NETLINK_CONNECTOR, unix.EPROTONOSUPPORT)
	case "security-module":
		return refuse(unix.SYS_SOCKET, 2, unix.NETLINK_CONNECTOR, unix.EACCES)
	case "before-6.6":
		// Group 1 and no capability: the bind of older kernels.
		return refuse(unix.SYS_BIND, 2, unix.SizeofSockaddrNetlink, unix.EPERM)
	case "no-setns":
		return refuse(unix.SYS_SETNS, 1, unix.CLONE_NEWNET, unix.EPERM)
	case "no-bpf":
		return refuse(unix.SYS_BPF, 5, 0, unix.EPERM) // bpf(2) has three arguments
	}
	return errors.New("unknown restriction")
}

// refuse makes a system call fail with errno on every thread from now on, if
// its argument arg has the value.
func refuse(nr uint32, arg, value uint32, errno unix.Errno) error {
	st := func(code uint16, k uint32, jt, jf uint8) unix.SockFilter {
		return unix.SockFilter{Code: code, K: k, Jt: jt, Jf: jf}
	}
	const load, equal, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	// struct seccomp_data: nr at 0, args from 16, little-endian.
	f := []unix.SockFilter{
		st(load, 0, 0, 0), st(equal, nr, 0, 3),
		st(load, 16+8*arg, 0, 0), st(equal, value, 0, 1),
		st(ret, unix.SECCOMP_RET_ERRNO|uint32(errno), 0, 0),
		st(ret, unix.SECCOMP_RET_ALLOW, 0, 0),
	}
	p := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	_, _, e := syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&p)))
	if e != 0 {
		return e
	}
	return nil
}

func try(t *testing.T, attr *syscall.SysProcAttr, restrictions ...string) attempt {
	t.Helper()
	testenv.Root(t)
	cmd := child("open", restrictions...)
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if cmd.ProcessState == nil {
		testenv.Skip(t, fmt.Sprintf("cannot start a child with %+v: %v", attr, err))
	}
	var a attempt
	if json.Unmarshal(out, &a) != nil {
		t.Fatalf("child: %v: %s", err, out)
	}
	return a
}

// TestRefusals: each way in which a kernel refuses has its own error, which
// says what to do.
func TestRefusals(t *testing.T) {
	root := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	for _, c := range []struct {
		name     string
		attr     *syscall.SysProcAttr
		restrict []string
		notPerm  bool // ErrPermission, else ErrNotSupported
		want     []string
	}{
		{"another network namespace, and no way out", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET}, []string{"no-setns"}, false,
			[]string{"network namespace", "hostNetwork: true", "SYS_ADMIN"}},
		{"another pid namespace", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, nil, false, []string{"pid namespace", "hostPID: true"}},
		{"another user namespace", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: root, GidMappings: root}, nil, false,
			[]string{"user namespace", "hostUsers"}},
		{"no connector in the kernel", nil, []string{"no-connector"}, false, []string{"CONFIG_CONNECTOR"}},
		{"an older kernel without CAP_NET_ADMIN", nil, []string{"before-6.6"}, true, []string{"NET_ADMIN"}},
		{"no BPF, but the recorder required", nil, []string{"no-bpf", "require"}, false, []string{"CAP_BPF", "recorder: auto"}},
		{"a security module", nil, []string{"security-module"}, true, []string{"SELinux"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := try(t, c.attr, c.restrict...)
			if a.NotPermitted != c.notPerm || a.NotSupported == c.notPerm {
				t.Errorf("permission %v, support %v: %s", a.NotPermitted, a.NotSupported, a.Err)
			}
			for _, w := range c.want {
				if !strings.Contains(a.Err, w) {
					t.Errorf("error without %q: %s", w, a.Err)
				}
			}
		})
	}
}

// TestNetworkNamespace: in a network namespace of its own a process makes its
// sockets in the host's, says so, and stays where it is with every thread.
func TestNetworkNamespace(t *testing.T) {
	for _, mode := range []string{"require", "off"} {
		t.Run(mode, func(t *testing.T) {
			host, err := os.Readlink("/proc/self/ns/net")
			if err != nil {
				t.Fatal(err)
			}
			a := try(t, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET}, mode)
			if a.Err != "" {
				t.Fatal(a.Err)
			}
			if !slices.Contains(hostNetworks[:], a.Network) {
				t.Errorf("sockets in %q, want one of %q", a.Network, hostNetworks)
			}
			if a.Own == "" || a.Own == host {
				t.Errorf("threads in %q, want all in their own namespace, which is not %s", a.Own, host)
			}
			if a.ExecsSeen != 1 {
				t.Errorf("own execs seen: %d, want 1", a.ExecsSeen)
			}
		})
	}
}

// TestReduced: with less than it would like the Conn works and says what that
// costs.
func TestReduced(t *testing.T) {
	ambient := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}, AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON}}
	for _, c := range []struct {
		name     string
		attr     *syscall.SysProcAttr
		restrict string
		recorder bool
		sched    string
		limits   string
	}{
		{"no BPF", nil, "no-bpf", false, "fifo 10", "recorder"},
		{"nothing but a user", nil, "uid-1000", false, "normal",
			"recorder CAP_BPF CAP_PERFMON CAP_SYS_NICE CAP_SYS_PTRACE CAP_DAC_READ_SEARCH CAP_NET_ADMIN"},
		{"a user with NET_ADMIN, BPF and PERFMON", ambient, "", true, "", "CAP_SYS_NICE CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var restrict []string
			if c.restrict != "" {
				restrict = append(restrict, c.restrict)
			}
			a := try(t, c.attr, restrict...)
			if a.NotPermitted {
				testenv.Skip(t, a.Err) // a kernel before 6.6
			}
			if a.Err != "" {
				t.Fatal(a.Err)
			}
			if byRecorder := a.Way == ByRecorder; byRecorder != c.recorder || byRecorder != (a.Reason == "") {
				t.Errorf("way %s, reason %q: want the recorder: %t, or a fall-back with a reason", a.Way, a.Reason, c.recorder)
			}
			// What the kernel said is in the status and, once, in the log.
			if said := strings.Contains(a.Log, "recorder cannot be used") && strings.Contains(a.Log, a.Reason); said == c.recorder {
				t.Errorf("log %q, reason %q", a.Log, a.Reason)
			}
			if !c.recorder && (!strings.Contains(a.Reason, "operation not permitted") || !strings.Contains(a.Reason, "CAP_BPF") || strings.ContainsAny(a.Reason, "\n\"")) {
				t.Errorf("reason %q: want the kernel's, what is needed, in one line", a.Reason)
			}
			if got := strings.Join(a.Limits, " "); got != c.limits || a.Scheduling != c.sched {
				t.Errorf("limits %q, scheduling %q; want %q, %q", got, a.Scheduling, c.limits, c.sched)
			}
			if a.ExecsSeen != 1 || a.WithArguments != 1 {
				t.Errorf("own execs seen: %d, with arguments: %d; want 1, 1", a.ExecsSeen, a.WithArguments)
			}
			t.Logf("%s: %s", a.Way, a.Reason)
		})
	}
}

// TestRefusedByAnswer: kernels before 6.6 refuse a LISTEN in its answer.
func TestRefusedByAnswer(t *testing.T) {
	if err := diagnoseAck(0); err != nil {
		t.Errorf("errno 0: %v", err)
	}
	if err := diagnoseAck(uint32(unix.EPERM)); !errors.Is(err, ErrPermission) || !errors.Is(err, unix.EPERM) {
		t.Errorf("EPERM: %v", err)
	}
	if err := diagnoseAck(uint32(unix.EINVAL)); err == nil || errors.Is(err, ErrPermission) {
		t.Errorf("EINVAL: %v", err)
	}
}

package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/testenv"
)

func fact(t *testing.T, name string, value any) {
	t.Helper()
	t.Logf("FACT %s %v", name, value)
}

// helper is a static program that comes with the VM.
func helper(t *testing.T, name string) string {
	if os.Getenv("PROCESSION_TEST_VM") == "" {
		t.Skip("made for the guests of the kernel matrix: make vmtest")
	}
	dir := os.Getenv("PROCESSION_TEST_HELPERS")
	if dir == "" {
		testenv.Skip(t, "PROCESSION_TEST_HELPERS names no directory of helper programs")
	}
	return filepath.Join(dir, name)
}

// The layout of a connector message (include/uapi/linux/connector.h,
// cn_proc.h): netlink header, connector header, event.
const (
	cnMsg     = 16
	procEvent = cnMsg + 20
	whatExec  = 2
)

// listen opens a connector socket and asks for events.
func listen(t *testing.T) int {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	testenv.SkipOn(t, err, unix.EPROTONOSUPPORT)
	t.Cleanup(func() { unix.Close(fd) })
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1})
	testenv.SkipOn(t, err, unix.EPERM)
	msg := make([]byte, procEvent+4)
	ne := binary.NativeEndian
	ne.PutUint32(msg[0:], uint32(len(msg)))
	ne.PutUint16(msg[4:], unix.NLMSG_DONE)
	ne.PutUint32(msg[cnMsg:], 1)    // CN_IDX_PROC
	ne.PutUint32(msg[cnMsg+4:], 1)  // CN_VAL_PROC
	ne.PutUint16(msg[cnMsg+16:], 4) // length of the payload
	ne.PutUint32(msg[procEvent:], 1)
	err = unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	testenv.SkipOn(t, err, unix.ECONNREFUSED)
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestConnector runs one program and waits for its exec to be told.
func TestConnector(t *testing.T) {
	testenv.Root(t)
	tiny := helper(t, "tiny")
	fd := listen(t)
	cmd := exec.Command(tiny)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := uint32(cmd.Process.Pid)
	defer cmd.Wait()
	buf := make([]byte, 4096)
	for deadline := time.Now().Add(10 * time.Second); ; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			if time.Now().After(deadline) {
				fact(t, "connector", "silent")
				t.Fatalf("no exec event of pid %d in 10 s", pid)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if n < procEvent+24 {
			continue
		}
		ev := buf[procEvent:n]
		if binary.NativeEndian.Uint32(ev) == whatExec && binary.NativeEndian.Uint32(ev[20:]) == pid {
			fact(t, "connector", "exec events arrive")
			return
		}
	}
}

// TestTypeInformation says what BTF there is.
func TestTypeInformation(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/btf"); err != nil {
		testenv.Skip(t, "no type information: "+err.Error())
	}
	overlay := "built in or not loaded"
	if b, err := os.ReadFile("/proc/modules"); err == nil && strings.Contains("\n"+string(b), "\noverlay ") {
		overlay = "no"
	}
	if _, err := os.Stat("/sys/kernel/btf/overlay"); err == nil {
		overlay = "yes"
	}
	fact(t, "overlay_module_BTF", overlay)
}

// TestLimits says what limits BPF meets.
func TestLimits(t *testing.T) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err != nil {
		t.Fatal(err)
	}
	fact(t, "RLIMIT_MEMLOCK", fmt.Sprintf("%d KiB", lim.Cur>>10))
	if b, err := os.ReadFile("/proc/sys/kernel/unprivileged_bpf_disabled"); err == nil {
		fact(t, "unprivileged_bpf_disabled", strings.TrimSpace(string(b)))
	}
}

// TestNode checks that the VM looks like a node: overlay works, and a process
// can enter the pod's cgroup.
func TestNode(t *testing.T) {
	if os.Getenv("PROCESSION_TEST_VM") == "" {
		t.Skip("only in a test VM")
	}
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "\toverlay\n") {
		t.Errorf("no overlay file system in /proc/filesystems")
	}
	dirs := strings.Split(os.Getenv("PROCESSION_TEST_CGROUP"), ":")
	for _, d := range dirs {
		if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte("0"), 0); err != nil {
			t.Errorf("enter the pod's cgroup: %v", err)
		}
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(own), "3c7a8e4e"); n != len(dirs) {
		t.Errorf("%d lines of /proc/self/cgroup name the pod, want %d:\n%s", n, len(dirs), own)
	}
}

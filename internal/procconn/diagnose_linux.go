package procconn

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Inode numbers of the first namespaces of a kernel (enum in
// include/linux/proc_ns.h, include/uapi/linux/nsfs.h since 6.18), the same
// since 3.8. /proc/1/ns would say it too, but may be closed to us.
const (
	firstPIDNS  = 0xEFFFFFFC
	firstUserNS = 0xEFFFFFFD
)

// diagnose turns the refusal of one step into an error that says what is
// wrong, why it matters and what to do. The kernel gives each cause its own
// errno, so no cause is guessed.
func diagnose(step string, err error) error {
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%w: this kernel has no connector (%s: %w): it was built without CONFIG_CONNECTOR, "+
			"or this is a sandbox such as gVisor; process events cannot be had on this node, use another kernel or node image",
			ErrNotSupported, step, err)
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w: this process is not in the host's network namespace (%s: %w), and the kernel answers only there: "+
			"set hostNetwork: true", ErrNotSupported, step, err)
	case errors.Is(err, unix.EPERM) && !inFirst("user", firstUserNS):
		return otherUserNS(step, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %s was refused (%w): kernels before 6.6 want CAP_NET_ADMIN: add the capability NET_ADMIN, "+
			"and for a container that does not run as root set it on the binary as well", ErrPermission, step, err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %s was refused (%w) by a security module or seccomp: allow netlink connector sockets "+
			"in the SELinux, AppArmor or seccomp profile of this process", ErrPermission, step, err)
	}
	return fmt.Errorf("process connector: %s: %w", step, err)
}

func otherUserNS(step string, err error) error {
	return fmt.Errorf("%w: this process is in a user namespace of its own (%s: %w), and the kernel answers only those in the first one: "+
		"do not set hostUsers: false, and do not run it rootless", ErrNotSupported, step, err)
}

// errSilent is what is wrapped when the kernel ignores a request.
var errSilent = errors.New("no answer from the kernel")

// diagnoseSilence says why a LISTEN was not answered. The kernel ignores the
// request of a process in another pid or user namespace without any error.
func diagnoseSilence() error {
	switch {
	case !inFirst("user", firstUserNS):
		return otherUserNS("listen", errSilent)
	case !inFirst("pid", firstPIDNS):
		return fmt.Errorf("%w: this process is not in the host's pid namespace (listen: %w), and the kernel answers only there: "+
			"set hostPID: true", ErrNotSupported, errSilent)
	case !procEventsBuiltIn():
		return fmt.Errorf("%w: this kernel has a connector but no process events (listen: %w): it was built without CONFIG_PROC_EVENTS; "+
			"use another kernel or node image", ErrNotSupported, errSilent)
	}
	return nil
}

// diagnoseAck turns the errno in an acknowledgement into an error.
func diagnoseAck(errno uint32) error {
	if errno == 0 {
		return nil
	}
	return diagnose("listen", unix.Errno(errno))
}

// inFirst says whether we are in the first namespace of a kind. If that cannot
// be read it says yes: a wrong diagnosis is worse than none.
func inFirst(kind string, inode uint64) bool {
	l, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		return true
	}
	return l == fmt.Sprintf("%s:[%d]", kind, inode)
}

// procEventsBuiltIn says whether cn_proc is registered with the connector. If
// that cannot be read it says yes.
func procEventsBuiltIn() bool {
	b, err := os.ReadFile("/proc/self/net/connector")
	return err != nil || strings.Contains(string(b), "cn_proc")
}

// hasCap says whether this thread has an effective capability.
func hasCap(n uint) bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if unix.Capget(&h, &d[0]) != nil {
		return false
	}
	return d[n/32].Effective&(1<<(n%32)) != 0
}

// fileLimits are about reading what belongs to other users. When says in which
// cases it matters, as the beginning of a sentence.
func fileLimits(when string) (limits []Limit) {
	if !hasCap(unix.CAP_SYS_PTRACE) {
		cost := "program and working directory of other users' processes cannot be read."
		if when == "" {
			cost = "P" + cost[1:]
		}
		limits = append(limits, Limit{"CAP_SYS_PTRACE", when + cost})
	}
	if !hasCap(unix.CAP_DAC_READ_SEARCH) {
		limits = append(limits, Limit{"CAP_DAC_READ_SEARCH", "Policies, certificates and other files that are closed to this user cannot be read."})
	}
	return limits
}

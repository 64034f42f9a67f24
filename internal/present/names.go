package present

import (
	"encoding/hex"
	"strconv"
	"strings"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// capNames are the capabilities by bit (include/uapi/linux/capability.h).
var capNames = [...]string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER",
	"CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP",
	"CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST",
	"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
	"CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE",
	"CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD",
	"CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
	"CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
	"CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF",
	"CAP_CHECKPOINT_RESTORE",
}

// AppendCapability appends the name of a capability by its bit number: CAP_KILL
// for 5, CAP_50 for one this version does not know.
func AppendCapability(dst []byte, bit int) []byte {
	if bit >= 0 && bit < len(capNames) {
		return append(dst, capNames[bit]...)
	}
	dst = append(dst, "CAP_"...)
	return strconv.AppendInt(dst, int64(bit), 10)
}

// signalNames are the signals by number (signal(7), the numbers of x86 and
// arm, which all platforms of the agent share).
var signalNames = [...]string{
	1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP",
	6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 10: "SIGUSR1",
	11: "SIGSEGV", 12: "SIGUSR2", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM",
	16: "SIGSTKFLT", 17: "SIGCHLD", 18: "SIGCONT", 19: "SIGSTOP",
	20: "SIGTSTP", 21: "SIGTTIN", 22: "SIGTTOU", 23: "SIGURG", 24: "SIGXCPU",
	25: "SIGXFSZ", 26: "SIGVTALRM", 27: "SIGPROF", 28: "SIGWINCH",
	29: "SIGIO", 30: "SIGPWR", 31: "SIGSYS",
}

// The real-time signals as programs see them: the C library keeps 32 and 33.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// AppendSignal appends the name of a signal: SIGKILL, SIGRTMIN+3, or SIG200
// for a number that is none.
func AppendSignal(dst []byte, sig int32) []byte {
	switch {
	case sig > 0 && int(sig) < len(signalNames):
		return append(dst, signalNames[sig]...)
	case sig == sigRTMax:
		return append(dst, "SIGRTMAX"...)
	case sig >= sigRTMin && sig < sigRTMax:
		dst = append(dst, "SIGRTMIN"...)
		if sig > sigRTMin {
			dst = append(dst, '+')
			dst = strconv.AppendInt(dst, int64(sig-sigRTMin), 10)
		}
		return dst
	}
	dst = append(dst, "SIG"...)
	return strconv.AppendInt(dst, int64(sig), 10)
}

// severityName is the word of policies and JSON; severityShort that of lines.
func severityName(s pb.Severity) (name, short string) {
	switch s {
	case pb.Severity_SEVERITY_INFORMATIONAL:
		return "Informational", "INFO"
	case pb.Severity_SEVERITY_LOW:
		return "Low", "LOW"
	case pb.Severity_SEVERITY_MEDIUM:
		return "Medium", "MED"
	case pb.Severity_SEVERITY_HIGH:
		return "High", "HIGH"
	case pb.Severity_SEVERITY_CRITICAL:
		return "Critical", "CRIT"
	}
	return "Unspecified", "----"
}

// lossReasonName is the word for a loss in JSON and lines.
func lossReasonName(r pb.LossReason) string {
	switch r {
	case pb.LossReason_LOSS_REASON_SPOOL_FULL:
		return "spool-full"
	case pb.LossReason_LOSS_REASON_CORRUPT:
		return "corrupt"
	case pb.LossReason_LOSS_REASON_DISK:
		return "disk"
	case pb.LossReason_LOSS_REASON_CRASH:
		return "crash"
	case pb.LossReason_LOSS_REASON_QUEUE_FULL:
		return "queue-full"
	case pb.LossReason_LOSS_REASON_TOO_LARGE:
		return "too-large"
	}
	return "unspecified"
}

// An Identity names one alert for ever: it is the same in every resend, in
// every sink and in the store.
type Identity struct {
	Cluster string
	Node    string   // from the agent's credentials, never from its messages
	Epoch   [16]byte // random, new at every start of the agent
	Seq     uint64   // consecutive from 1 within the epoch

	// Committed is when the transaction began that put the alert on the
	// collector's disk; zero before.
	// It is no part of the identity, but known with it.
	Committed time.Time
}

// Append appends cluster/node/epoch/seq, the epoch in hexadecimal.
func (id Identity) Append(dst []byte) []byte {
	dst = append(dst, id.Cluster...)
	dst = append(dst, '/')
	dst = append(dst, id.Node...)
	dst = append(dst, '/')
	dst = hex.AppendEncode(dst, id.Epoch[:])
	dst = append(dst, '/')
	return strconv.AppendUint(dst, id.Seq, 10)
}

// String is cluster/node/epoch/seq, the epoch in hexadecimal.
func (id Identity) String() string { return string(id.Append(nil)) }

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

// Package event holds the nouns every part of the agent shares: what the
// kernel said (Record), what happened to whom (Event), who it was (Process,
// Workload). It imports the standard library only and does nothing by itself.
//
// Two rules keep the nouns honest. A fact that could not be read is missing,
// not empty: Fields says which facts are there. And each fact says where it
// came from: Source.
package event

import (
	"fmt"
	"time"
)

// A Kind says what happened. Its String is the word used in policies
// ("UIDChange"), its Short the word used on the command line ("uid").
type Kind uint8

// The kinds of the kernel's process connector (enum proc_cn_event,
// include/uapi/linux/cn_proc.h). The kernel has one ptrace event for attach
// and detach; here they are two kinds.
const (
	KindUnknown   Kind = iota
	Exec               // a process runs a new program
	Fork               // a process was made
	Exit               // a process ended
	UIDChange          // a user id of a task changed
	GIDChange          // a group id of a task changed
	SessionChange      // a process became a session leader
	PtraceAttach       // a process began to trace another
	PtraceDetach       // a process stopped tracing another
	CommChange         // a task renamed itself
	CoreDump           // a process is about to dump core
	numKinds
)

var kindNames = [numKinds]struct{ name, short string }{
	{"Unknown", "unknown"},
	{"Exec", "exec"},
	{"Fork", "fork"},
	{"Exit", "exit"},
	{"UIDChange", "uid"},
	{"GIDChange", "gid"},
	{"SessionChange", "sid"},
	{"PtraceAttach", "ptrace"},
	{"PtraceDetach", "ptrace-detach"},
	{"CommChange", "comm"},
	{"CoreDump", "coredump"},
}

// String is the kind's name in policies and alerts.
func (k Kind) String() string {
	if k >= numKinds {
		return fmt.Sprintf("Kind(%d)", uint8(k))
	}
	return kindNames[k].name
}

// Short is the kind's name on the command line.
func (k Kind) Short() string {
	if k >= numKinds {
		return fmt.Sprintf("kind-%d", uint8(k))
	}
	return kindNames[k].short
}

// KindByName finds a kind by its name in policies or on the command line.
func KindByName(name string) (Kind, bool) {
	for k := Exec; k < numKinds; k++ {
		if kindNames[k].name == name || kindNames[k].short == name {
			return k, true
		}
	}
	return KindUnknown, false
}

// AllKinds lists every kind but KindUnknown.
func AllKinds() []Kind {
	ks := make([]Kind, 0, numKinds-1)
	for k := Exec; k < numKinds; k++ {
		ks = append(ks, k)
	}
	return ks
}

// Kinds is a set of kinds.
type Kinds uint32

// KindSet makes a set.
func KindSet(ks ...Kind) Kinds {
	var s Kinds
	for _, k := range ks {
		s |= 1 << k
	}
	return s
}

// Has says whether k is in the set.
func (s Kinds) Has(k Kind) bool { return s&(1<<k) != 0 }

// A Source says where a fact came from.
type Source uint8

// Sources, from the most to the least trusted.
const (
	SourceNone    Source = iota // the fact is missing
	SourceRecord                // recorded by the kernel in the task itself, at the moment of the event
	SourceMessage               // in the connector's message
	SourceProc                  // read from /proc after the event
	SourceLineage               // taken over from the parent, at fork
)

var sourceNames = [...]string{"", "record", "message", "proc", "lineage"}

// String is the name used in JSON.
func (s Source) String() string {
	if int(s) >= len(sourceNames) {
		return "unknown"
	}
	return sourceNames[s]
}

// A Field is a fact, or a group of facts that are read together.
type Field uint8

// The facts about a process.
const (
	FieldStart   Field = iota // Start
	FieldParent               // PPID, ParentStart
	FieldName                 // Name
	FieldExe                  // Exe
	FieldFile                 // File
	FieldArgs                 // Cmdline, CmdlineLen
	FieldCwd                  // Cwd
	FieldIDs                  // UID .. FSGID
	FieldCaps                 // CapPermitted, CapEffective
	FieldCgroup               // Cgroup
	FieldNS                   // NS, InnerPID
	FieldSession              // SID, TTY
	FieldLogin                // LoginUID, AuditSession
	FieldNNP                  // NoNewPrivs
	FieldExeFile              // ExeFile
	NumFields
)

var fieldNames = [NumFields]string{
	"start", "parent", "name", "exe", "file", "args", "cwd", "ids", "caps",
	"cgroup", "ns", "session", "login", "noNewPrivs", "exeFile",
}

// String is the name used in JSON.
func (f Field) String() string {
	if f >= NumFields {
		return fmt.Sprintf("field-%d", uint8(f))
	}
	return fieldNames[f]
}

// Fields is a set of fields.
type Fields uint32

// FieldSet makes a set.
func FieldSet(fs ...Field) Fields {
	var s Fields
	for _, f := range fs {
		s |= 1 << f
	}
	return s
}

// Has says whether f is in the set.
func (s Fields) Has(f Field) bool { return s&(1<<f) != 0 }

// A Key names one process on this boot: pids are reused, a pid together with
// its start time in practice is not.
type Key struct {
	PID   int32
	Start uint64 // ns since boot (CLOCK_BOOTTIME); see Process.StartExact
}

// IDs are a task's user and group ids, as the host's user namespace sees them.
// The order is that of struct cred (include/linux/cred.h).
type IDs struct {
	UID, GID, SUID, SGID, EUID, EGID, FSUID, FSGID uint32
}

// NS are inode numbers of a task's namespaces; 0 is unknown.
type NS struct {
	PID, Mnt, User, Net uint32
}

// Marks are yes/no facts about the file a process runs.
type Marks uint16

// Marks of the executable and of the record. A mark that cannot be known (for
// example the overlay layer on a kernel without overlay's type information)
// is unset and MarkUpperKnown is unset too.
const (
	MarkUpper       Marks = 1 << iota // the file lies in the overlay's upper layer: it is not from the image
	MarkUpperKnown                    // MarkUpper is meaningful
	MarkMemfd                         // an anonymous file (memfd_create)
	MarkDeleted                       // no name any more when it was executed
	MarkDetached                      // on a mount that is in no mount namespace
	MarkOutsideRoot                   // not below the task's own root directory
	MarkForeign                       // its mount belongs to another mount namespace than the task
	MarkExeCut                        // Exe is cut short
	MarkCgroupCut                     // Cgroup is cut short
	MarkCwdCut                        // Cwd is cut short
)

// Has says whether all of m are set.
func (s Marks) Has(m Marks) bool { return s&m == m }

// An ExeFile identifies the file a process runs, independent of its path.
type ExeFile struct {
	Dev   uint64 // as in stat(2): major<<20 | minor in the kernel's own form
	Ino   uint64
	Mode  uint16 // with the set-uid and set-gid bits
	UID   uint32 // owner
	GID   uint32 // group
	Nlink uint32
	Magic uint64 // file system type (include/uapi/linux/magic.h)
}

// Facts are what is known about one task at one moment. Only the fields in
// Have are meaningful. Text is raw bytes and belongs to the reader: it is
// valid until the call that handed it over returns. None of it is to be
// trusted: whatever a workload can influence, it will.
type Facts struct {
	Have Fields
	From Source

	Start       uint64 // of the process (thread group leader), ns since boot, CLOCK_BOOTTIME
	StartTicks  bool   // Start is only exact to a clock tick (10 ms): it came from /proc
	PPID        int32
	ParentStart uint64 // ns since boot; 0 unknown

	IDs
	CapPermitted, CapEffective uint64

	NS           NS
	InnerPID     int32 // the pid inside the innermost pid namespace
	SID          int32
	TTY          int32 // terminal index + 1; 0 none
	LoginUID     uint32
	AuditSession uint32
	NoNewPrivs   bool
	Threads      int32

	ExeFile ExeFile
	Marks   Marks

	Comm       []byte // task name, at most 15 bytes
	Exe        []byte // path of the file it runs, in that file's mount namespace
	File       []byte // name handed to execve
	Cmdline    []byte // argv, each argument ends with NUL (the last may lack it when cut)
	CmdlineLen uint32 // true length of argv in bytes; > len(Cmdline) when cut
	Cwd        []byte
	Cgroup     []byte // absolute cgroup path (v2, or of the memory controller)
}

// A Record is what the kernel said in one message of the process connector,
// together with the facts captured with it. The subject (PID, TGID) is the
// task that acted: the creator of a fork, the tracer of a ptrace. The peer is
// what it acted on: the child, the tracee.
type Record struct {
	Kind  Kind
	CPU   uint32
	Seq   uint32 // the connector's per-CPU counter
	Stamp uint64 // ns, CLOCK_MONOTONIC (proc_event.timestamp_ns)

	PID, TGID         int32
	PeerPID, PeerTGID int32
	PeerStart         uint64 // ns since boot; 0 unknown

	ID, EID    uint32 // UID and GID change: new real and effective id
	Status     uint32 // exit: wait status as in wait(2)
	ExitSignal int32  // exit: signal sent to the parent
	RealParent int32  // fork: real_parent's tgid, which differs from TGID for CLONE_PARENT
	RunTime    uint64 // exit: CPU time in ns, if recorded
	MaxRSS     uint64 // exit: bytes, if recorded

	Facts // of the subject
}

// A Process is one process, alive or remembered. Text is valid UTF-8 only
// where a comment says so. A Process belongs to the goroutine that owns the
// process table.
type Process struct {
	PID         int32
	Start       uint64 // ns since boot (CLOCK_BOOTTIME); 0 unknown
	StartExact  bool   // Start is exact to the nanosecond, not to a clock tick
	PPID        int32
	ParentStart uint64
	Parent      *Process // the process that made this one; nil when unknown or none

	Sources [NumFields]Source

	IDs
	CapPermitted, CapEffective uint64
	NS                         NS
	InnerPID                   int32
	SID                        int32
	TTY                        int32
	LoginUID                   uint32
	AuditSession               uint32
	NoNewPrivs                 bool

	ExeFile ExeFile
	Marks   Marks

	Name       string // task name
	Exe        string // resolved path of the program
	File       string // name handed to execve
	Cmdline    string // argv, each argument ends with NUL
	CmdlineLen uint32
	Cwd        string
	Cgroup     string

	Execs    uint32 // how often it ran exec while watched
	Exited   bool
	ExitedAt uint64 // stamp, ns CLOCK_MONOTONIC
	Status   uint32 // wait status, when Exited

	Workload *Workload // nil: not resolved
	Origin   Origin    // how it came to be in its container
}

// Key is the process's identity.
func (p *Process) Key() Key { return Key{p.PID, p.Start} }

// Has says whether the fact is known.
func (p *Process) Has(f Field) bool { return p.Sources[f] != SourceNone }

// ArgsCut says whether Cmdline is shorter than the true argv.
func (p *Process) ArgsCut() bool { return int(p.CmdlineLen) > len(p.Cmdline) }

// A Place says on which side of the container boundary a process runs.
type Place uint8

// Places.
const (
	PlaceUnknown   Place = iota // could not be told; Workload.Reason says why
	PlaceHost                   // no container
	PlaceContainer              // in a container
)

// String is the name used in JSON.
func (p Place) String() string {
	switch p {
	case PlaceHost:
		return "host"
	case PlaceContainer:
		return "container"
	}
	return "unknown"
}

// A Workload says where a process runs. It is shared by all processes of one
// cgroup and never changed after it was handed out: late knowledge is a new
// Workload.
type Workload struct {
	Place       Place
	ContainerID string
	Runtime     string // docker, containerd, cri-o, podman, ...; "" unknown
	PodUID      string // as in the cgroup path; for static pods the config hash
	Reason      string // why something is unknown: process-gone, cgroup-cut, namespace-ambiguous, pod-not-listed, no-kubelet, ...
	ContainerName,
	Image string // as the pod's spec names it
	Container *Container // nil: the kubelet has not told it (yet), or it is in no pod
	Sandbox   bool       // the container is the one that holds a pod's namespaces (pause); the kubelet lists none such
	Pod       *Pod       // nil: unknown or none
}

// A Pod is what the kubelet says about a pod. It is shared and never changed.
type Pod struct {
	UID, Namespace, Name string
	Labels               map[string]string
	NamespaceLabels      map[string]string // labels of its namespace; nil: not known
	Annotations          map[string]string // those that were asked for, by configuration
	ServiceAccount       string
	// The controller: Deployment (found behind its ReplicaSet by the rule such
	// names are made by), DaemonSet, StatefulSet, Job, ...; "" for a pod of its own.
	OwnerKind, OwnerName          string
	HostPID, HostNetwork, HostIPC bool
}

// A ContainerKind says which list of a pod's containers one is in.
type ContainerKind uint8

// Kinds of container.
const (
	ContainerRegular   ContainerKind = iota
	ContainerInit                    // runs to its end before the others start
	ContainerSidecar                 // an init container that goes on running
	ContainerEphemeral               // added to a running pod, as kubectl debug does
)

// String is the name used in JSON and in rules.
func (k ContainerKind) String() string {
	return [...]string{"regular", "init", "sidecar", "ephemeral"}[k&3]
}

// A Container is what the kubelet says about one container of a pod. It is
// shared and never changed.
type Container struct {
	Name        string
	Kind        ContainerKind
	Image       string // as the pod's spec names it
	ImageDigest string // sha256:..., of what runs; "" unknown
	Runtime     string // as in Workload.Runtime; "" unknown
	Privileged  bool
	Probes      [][]string // commands the kubelet runs in it to see whether it is well
	Hooks       [][]string // commands it runs after the start and before the stop
}

// An Origin says how a process came to be in its container.
type Origin uint8

// Origins.
const (
	OriginUnknown Origin = iota // not in a container, or it could not be told
	OriginSetup                 // the runtime's own: it prepares the container, or holds the pod's namespaces (runc init, pause)
	OriginEntry                 // the container's first process
	OriginEntered               // put into the running container from outside: exec session, probe or hook, which only the pod's spec tells
	OriginSession               // put into it from outside, by neither probe nor hook (kubectl exec, ctr exec, nsenter)
	OriginProbe                 // a probe of the pod's spec
	OriginHook                  // a lifecycle hook of the pod's spec
	OriginChild                 // made by a process of the same container
)

var originNames = [...]string{"", "runtimeSetup", "entrypoint", "entered", "execSession", "probe", "lifecycleHook", "child"}

// String is the name used in JSON and in rules; "" for OriginUnknown.
func (o Origin) String() string {
	if int(o) >= len(originNames) {
		return ""
	}
	return originNames[o]
}

// A Cause says why a user id became 0.
type Cause uint8

// Causes, the innocent ones first.
const (
	CauseUnknown     Cause = iota // not asked (no id became 0), or a fact is missing
	CauseSetuid                   // it runs, or is about to run, a set-user-id file of root's
	CauseLogin                    // the same, or a capability, used by a program whose task it is: su, sudo, sshd, cron, ...
	CauseRuntime                  // a container runtime, which prepares a container
	CauseKept                     // one of its ids was 0 before: it goes back to what it never gave up
	CauseCapability               // it had CAP_SETUID
	CauseUnexplained              // none of these: what an exploit of the kernel leaves
)

var causeNames = [...]string{"", "setuid-program", "login", "runtime-setup", "kept-root", "capability", "unexplained"}

// String is the name used in JSON and in rules; "" for CauseUnknown.
func (c Cause) String() string {
	if int(c) >= len(causeNames) {
		return ""
	}
	return causeNames[c]
}

// An Event is one thing that happened, to whom: a Record after the process
// table has found the process and its past.
type Event struct {
	Kind      Kind
	Time      time.Time // wall clock
	Stamp     uint64    // ns, CLOCK_MONOTONIC
	Synthetic bool      // not heard but concluded: found by a scan after a loss
	Record    *Record   // what the kernel said; nil when Synthetic

	Process *Process // who; the child for Fork, the tracer for ptrace. Never nil
	Target  *Process // ptrace: the tracee

	Before    IDs  // UID and GID change: the ids before
	HasBefore bool // Before is known
	// UIDChange: the capabilities before, if known, and why an id became 0.
	CapsBefore    uint64 // permitted
	HasCapsBefore bool
	Cause         Cause
	PrevName      string
	HasPrev       bool // CommChange: PrevName is known

	// User finds the name of a process's real user, when somebody asks for it: it
	// is read from a file of the process's. ok is false when it could not be.
	// Nil: nobody can be asked.
	User func(*Process) (name string, ok bool)

	Status   uint32        // Exit: wait status
	Duration time.Duration // Exit: wall time since the process's start; 0 unknown
	RunTime  time.Duration // Exit: CPU time; 0 unknown
}

// Reset makes ev empty, for reuse.
func (ev *Event) Reset() { *ev = Event{} }

// ExitCode is the code of a wait status, and Signal the signal that ended the
// process, 0 for none (wait(2)).
func ExitCode(status uint32) int { return int(status >> 8 & 0xff) }

// Signal is the signal in a wait status, 0 when the process exited by itself.
func Signal(status uint32) int { return int(status & 0x7f) }

// DumpedCore says whether a wait status has the core flag.
func DumpedCore(status uint32) bool { return status&0x80 != 0 }

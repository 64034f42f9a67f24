package recorder

// This file is the only place that knows where a fact lies in a record. The
// program that writes records (program_linux.go) and the Decoder use the same
// constants; docs/record-format.md is checked against the table below.
//
// A record is a header of fixed size and then text: cgroup names, path of the
// executable, path of the working directory, file name, arguments, one behind
// the other without padding. Numbers are little-endian. Bytes 12 to 64 are the
// connector's message as the kernel sent it, from cn_msg.seq on
// (struct cn_msg, include/uapi/linux/connector.h; struct proc_event,
// include/uapi/linux/cn_proc.h).

// Version is the version of the record format. A Decoder refuses any other.
const Version = 1

// Offsets of the header's fields.
const (
	offLen     = 0
	offVersion = 4
	offFlags   = 8

	offSeq    = 12
	offAck    = 16
	offMsgLen = 20
	offWhat   = 24
	offCPU    = 28
	offStamp  = 32
	offData   = 40

	offPID           = 64
	offTGID          = 68
	offStart         = 72
	offParentStart   = 80
	offPPID          = 88
	offSID           = 92
	offIDs           = 96
	offCaps          = 128
	offLogin         = 144
	offAuditSession  = 148
	offNSPID         = 152
	offNSMnt         = 156
	offNSUser        = 160
	offNSNet         = 164
	offInnerPID      = 168
	offTTY           = 172
	offTaskFlags     = 176
	offThreads       = 180
	offExeIno        = 184
	offExeMagic      = 192
	offExeDev        = 200
	offExeNlink      = 204
	offExeOwner      = 208
	offExeMode       = 216
	offExeNS         = 220
	offComm          = 224
	offRunTime       = 240
	offRunTimeOthers = 248
	offMaxRSS        = 256
	offExitState     = 264
	offPeerPID       = 268
	offPeerStart     = 272

	offCgroupLen = 280
	offExeLen    = 284
	offCwdLen    = 288
	offFileLen   = 292
	offArgsLen   = 296
	offArgsTotal = 300

	headSize = 304
)

// Room for the text sections. A path is read name by name, and a name has up to
// 256 bytes with its NUL, so a path may be cut up to 256 bytes before its room ends.
const (
	nameMax   = 256  // NAME_MAX + 1
	cgroupMax = 1280 // bytes of cgroup names
	exeMax    = 4096 // PATH_MAX
	cwdMax    = 4096
	fileMax   = 4096 // PATH_MAX with its NUL: never cut
	argsMax   = 2048

	cgroupDepth = 16 // levels of cgroups
	pathDepth   = 64 // names and mounts in a path

	// MaxRecord is the size of the largest possible record in bytes.
	MaxRecord = headSize + cgroupMax + exeMax + cwdMax + fileMax + argsMax
)

// Bits of the header's flags. A fact that has a bit was read if it is set; flags
// and pathFlags below tell about each.
const (
	flagIDs        = 1 << iota // ids
	flagCaps                   // caps
	flagComm                   // comm
	flagSession                // sid, tty
	flagLogin                  // login, audit-session
	flagNS                     // ns-*, inner-pid
	flagExeFile                // exe-ino ... exe-mode
	flagUpperKnown             // flagUpper is meaningful
	flagUpper                  // the executable lies in overlayfs' upper layer
	flagExeNS                  // exe-ns
	flagCgroupTop              // the cgroup names reach up to the root
	flagCgroupCut              // the cgroup names stop before the root
	flagFile                   // file
	flagArgs                   // args, args-total
	flagPeer                   // peer-pid, peer-start
	flagSpare

	// The same for both paths: shifted by exeShift and cwdShift.
	pathTop    = 1 << 0 // the names reach up to the top of the mount namespace, or of a detached mount
	pathPseudo = 1 << 1 // the names end at a directory entry without parent that is no mount's root
	pathCut    = 1 << 2 // the names stop before the top
	pathUnhash = 1 << 3 // the file has lost its name: it is deleted
	pathRoot   = 1 << 4 // the task's own root directory lies on the way up
	pathBits   = 1<<5 - 1

	exeShift = 16
	cwdShift = 24

	flagsKnown = flagSpare - 1 | pathBits<<exeShift | (pathBits&^pathRoot)<<cwdShift
)

// The kinds of message (enum proc_cn_event). whatAck is the answer to a LISTEN
// or IGNORE of anybody.
const (
	whatAck      = 0
	whatFork     = 0x00000001
	whatExec     = 0x00000002
	whatUID      = 0x00000004
	whatGID      = 0x00000040
	whatSID      = 0x00000080
	whatPtrace   = 0x00000100
	whatComm     = 0x00000200
	whatCoreDump = 0x40000000
	whatExit     = 0x80000000
)

// Fields of the message's event data (union event_data of struct proc_event),
// as offsets in the record.
const (
	dataPID  = offData     // all but ack and fork: process_pid
	dataTGID = offData + 4 // and process_tgid

	dataErr = offData // ack: error number

	forkParentPID  = offData
	forkParentTGID = offData + 4
	forkChildPID   = offData + 8
	forkChildTGID  = offData + 12

	idNew    = offData + 8 // uid, gid: new real id
	idNewEff = offData + 12

	ptraceTracerPID  = offData + 8 // 0: detach
	ptraceTracerTGID = offData + 12

	commName = offData + 8 // 16 bytes

	exitCode       = offData + 8
	exitSignal     = offData + 12
	exitParentPID  = offData + 16
	exitParentTGID = offData + 20
)

const commSize = 16 // TASK_COMM_LEN

// A field is one row of the header.
type field struct {
	name      string
	off, size int
	meaning   string
}

// fields is the header, in order and without holes.
var fields = [...]field{
	{"len", offLen, 4, "size of the whole record in bytes"},
	{"version", offVersion, 4, "version of this format"},
	{"flags", offFlags, 4, "what was read, and marks (below)"},

	{"seq", offSeq, 4, "cn_msg.seq: the connector's counter of this CPU"},
	{"ack", offAck, 4, "cn_msg.ack"},
	{"msg-len", offMsgLen, 4, "cn_msg.len and cn_msg.flags"},
	{"what", offWhat, 4, "proc_event.what"},
	{"cpu", offCPU, 4, "proc_event.cpu"},
	{"stamp", offStamp, 8, "proc_event.timestamp_ns, CLOCK_MONOTONIC"},
	{"data", offData, 24, "proc_event.event_data"},

	{"pid", offPID, 4, "the task that ran the program: its thread id"},
	{"tgid", offTGID, 4, "and its process id"},
	{"start", offStart, 8, "start of that process, ns since boot (CLOCK_BOOTTIME)"},
	{"parent-start", offParentStart, 8, "start of its parent process"},
	{"ppid", offPPID, 4, "process id of its parent"},
	{"sid", offSID, 4, "session id"},
	{"ids", offIDs, 32, "uid, gid, suid, sgid, euid, egid, fsuid, fsgid"},
	{"caps", offCaps, 16, "capabilities permitted, effective"},
	{"login", offLogin, 4, "login uid"},
	{"audit-session", offAuditSession, 4, "audit session"},
	{"ns-pid", offNSPID, 4, "inode number of the innermost pid namespace"},
	{"ns-mnt", offNSMnt, 4, "of the mount namespace"},
	{"ns-user", offNSUser, 4, "of the user namespace"},
	{"ns-net", offNSNet, 4, "of the network namespace"},
	{"inner-pid", offInnerPID, 4, "process id inside the innermost pid namespace"},
	{"tty", offTTY, 4, "terminal index + 1, 0 none"},
	{"task-flags", offTaskFlags, 4, "bit 0: no_new_privs"},
	{"threads", offThreads, 4, "number of threads"},
	{"exe-ino", offExeIno, 8, "inode of the executable"},
	{"exe-magic", offExeMagic, 8, "type of its file system"},
	{"exe-dev", offExeDev, 4, "its device"},
	{"exe-nlink", offExeNlink, 4, "its number of names"},
	{"exe-owner", offExeOwner, 8, "uid, gid"},
	{"exe-mode", offExeMode, 4, "type and permissions"},
	{"exe-ns", offExeNS, 4, "inode number of the mount namespace that its mount belongs to, 0 none"},
	{"comm", offComm, 16, "task name, ends at the first NUL"},
	{"run-time", offRunTime, 8, "exit: CPU time of the thread, ns"},
	{"run-time-others", offRunTimeOthers, 8, "exit: CPU time of the threads that ended before, ns"},
	{"max-rss", offMaxRSS, 8, "exit: largest resident size, bytes"},
	{"exit-state", offExitState, 4, "exit: task_struct.exit_state"},
	{"peer-pid", offPeerPID, 4, "fork: the child; ptrace: the tracee (thread id)"},
	{"peer-start", offPeerStart, 8, "start of the peer's process, ns since boot"},

	{"cgroup-len", offCgroupLen, 4, "bytes of cgroup names"},
	{"exe-len", offExeLen, 4, "bytes of the executable's path"},
	{"cwd-len", offCwdLen, 4, "bytes of the working directory's path"},
	{"file-len", offFileLen, 4, "bytes of the file name, with its NUL"},
	{"args-len", offArgsLen, 4, "bytes of argv"},
	{"args-total", offArgsTotal, 4, "true length of argv"},
}

// A flagRow is one bit, or range of bits, of the header's flags.
type flagRow struct {
	name    string
	bits    uint32
	meaning string
}

// flags are the header's flags, in order.
var flags = [...]flagRow{
	{"ids", flagIDs, "`ids` was read"},
	{"caps", flagCaps, "`caps` was read"},
	{"comm", flagComm, "`comm` was read"},
	{"session", flagSession, "`sid` and `tty` were read"},
	{"login", flagLogin, "`login` and `audit-session` were read"},
	{"ns", flagNS, "`ns-*` and `inner-pid` were read"},
	{"exe-file", flagExeFile, "`exe-ino` to `exe-mode` were read"},
	{"upper-known", flagUpperKnown, "the executable lies on overlayfs, and its layer could be told"},
	{"upper", flagUpper, "it lies in the upper layer"},
	{"exe-ns", flagExeNS, "`exe-ns` was read"},
	{"cgroup-top", flagCgroupTop, "the cgroup names reach up to the root"},
	{"cgroup-cut", flagCgroupCut, "the cgroup names stop before the root"},
	{"file", flagFile, "the file name was read"},
	{"args", flagArgs, "argv and `args-total` were read"},
	{"peer", flagPeer, "`peer-pid` and `peer-start` were read"},
	{"exe-path", pathBits << exeShift, "how the walk up from the executable ended (below)"},
	{"cwd-path", (pathBits &^ pathRoot) << cwdShift, "the same for the working directory"},
}

// pathFlags are the flags of one path.
var pathFlags = [...]flagRow{
	{"top", pathTop, "at the top of a mount namespace, or of a detached mount"},
	{"pseudo", pathPseudo, "at an entry without parent that is no mount's root: an anonymous file (one name), or one moved out of its mount"},
	{"cut", pathCut, "before the top: too many names, or no room"},
	{"unhashed", pathUnhash, "the file is in no directory any more (not an end of the walk)"},
	{"root", pathRoot, "the task's root directory lies on the way (not an end of the walk)"},
}

// Counters of one CPU: a value of the mmap'ed array that the program counts in.
// They are written under the connector's per-CPU lock, except for ctForged,
// which is added to atomically.
const (
	ctSeen     = 0
	ctRecorded = 8
	ctLost     = 16
	ctGap      = 24
	ctForged   = 32
	ctNextSeq  = 40 // u32
	ctStarted  = 44 // u32: ctNextSeq is meaningful
	ctSize     = 64
)

// Package procfs reads what a proc file system says about one process.
//
// Everything in it was written by, or can be steered by, the process that is
// read about: names with parentheses and newlines in them, rewritten
// arguments, executables that are gone. So every read is bounded, every
// parser is pure and fuzzed, and nothing outside the root handed to New is
// opened.
//
// What it promises:
//
//   - A process that vanished is ErrGone, never a half-filled answer. What a
//     process does not have, or what may not be read, is ErrMissing, and in
//     a Reading a fact that is not in Have.
//   - The facts of one Reading are about one process: its start time was the
//     same before and after. The facts about its program (name, executable,
//     arguments, directory) are about one program: an exec in between makes
//     the Reading start over, or leaves those facts out.
//   - A task that is dying shows cgroup "/" on cgroup v1, like a process of
//     the host. That answer is never passed on: the cgroup is missing then.
//   - A thread group whose first thread has ended is not taken for a zombie:
//     its facts are read through a thread that is alive.
//
// What it cannot promise: arguments are the memory of the process at the
// moment of the read, and it may have rewritten them since it was started.
// Reading them can also block for as long as the process likes, if it mapped
// a file of a FUSE file system of its own there; a caller that cannot wait
// must read on a goroutine it can give up.
//
// An FS is safe for concurrent use. On platforms without /proc, New returns
// ErrUnsupported; the parsers work everywhere.
package procfs

import "errors"

// ErrGone reports that the process ended before, or while, it was read. It is
// the normal fate of a process, not a failure.
var ErrGone = errors.New("process is gone")

// ErrMissing reports that the process is there but the fact is not: a kernel
// thread or a zombie has no executable, and some files may not be read even
// by root (a security module, a process outside of our user namespace).
var ErrMissing = errors.New("not known to /proc, or not readable")

// ErrNotProcess reports a thread id where a process id was wanted. /proc
// answers for thread ids too, although it does not list them.
var ErrNotProcess = errors.New("a thread, not a process")

// ErrUnsupported reports a platform without a proc file system.
var ErrUnsupported = errors.New("no proc file system on this platform")

// Tick is the length of a clock tick in ns. Start times in /proc are cut to
// ticks of USER_HZ, which is 100 per second on every architecture Kubernetes
// runs on (include/asm-generic/param.h).
const Tick = 10_000_000

// Limits of one read, in bytes. They are above what an honest kernel writes;
// a longer file is cut and its last, incomplete line ignored.
const (
	maxStat   = 4 << 10
	maxStatus = 1 << 20  // 65,536 supplementary groups stand before the capabilities
	maxCgroup = 64 << 10 // a path of PATH_MAX for each controller of cgroup v1
	maxLink   = 4 << 10  // PATH_MAX: what readlink of a proc link can return
	// DefaultMaxArgs is how many bytes of argv Snapshot reads.
	DefaultMaxArgs = 256 << 10
)

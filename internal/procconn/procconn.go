package procconn

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// ErrNotSupported reports that process events cannot be had here: a kernel
// without them, or a network, pid or user namespace other than the host's.
var ErrNotSupported = errors.New("process connector not supported")

// ErrPermission reports that this process may not hear process events. The
// text of the error says which capability is missing.
var ErrPermission = errors.New("process connector not permitted")

// A Mode says whether the eBPF recorder is used.
type Mode string

// Modes.
const (
	Auto    Mode = "auto"    // use it if the kernel lets us, and say so if not; the default
	Off     Mode = "off"     // never use it
	Require Mode = "require" // Open fails without it
)

// Config configures Open. The zero value works.
type Config struct {
	// Recorder says whether to use the eBPF recorder. Default Auto.
	Recorder Mode
	// Kinds are the kinds handed to the Handler. Default all.
	Kinds event.Kinds
	// Cwd also records the working directory at exec, for 0.1 us per exec with
	// the recorder and 7 us without.
	Cwd bool
	// DrainInterval is how long the reader sleeps between two looks while
	// events keep coming: about twice the typical delay of an event, and the
	// main cost of the reader. 1 to 50 ms, default 10 ms. The recorder's sleeps
	// twice as long, up to 20 ms, while few events come. An idle reader does not
	// wake up.
	DrainInterval time.Duration
	// RingBytes is the size of the recorder's ring, a power of two from 64 KiB
	// to 1 GiB. Default 4 MiB, about 9,900 usual records.
	RingBytes int
	// RcvBuf is the receive buffer asked for each socket of the fall-back, in
	// bytes; the kernel doubles it. A queued event takes 832 bytes. 4 KiB to
	// 1 GiB. Default 8 MiB for each exec socket and 32 MiB for the other kinds.
	// Memory is used only while events are queued.
	RcvBuf int
	// Heartbeat is how often an event of our own must come back through the
	// kernel. At least 10 ms, default 10 s.
	Heartbeat time.Duration
	// Log takes what an operator should know. Default: nothing is logged.
	Log *slog.Logger

	network string // path of the network namespace to make sockets in; "" this process's
	single  bool   // one reader for all CPUs, as on large machines: for tests
	// share of a CPU that a reader of the fall-back may use in a second; 0 is
	// the usual: for tests.
	share time.Duration
}

func (c Config) withDefaults() (Config, error) {
	if c.Recorder == "" {
		c.Recorder = Auto
	}
	switch c.Recorder {
	case Auto, Off, Require:
	default:
		return c, fmt.Errorf("recorder: %.64q is none of auto, off, require", string(c.Recorder))
	}
	all := event.KindSet(event.AllKinds()...)
	if c.Kinds == 0 {
		c.Kinds = all
	}
	if c.Kinds&^all != 0 {
		return c, fmt.Errorf("kinds: set %#x has unknown kinds %#x", uint32(c.Kinds), uint32(c.Kinds&^all))
	}
	if c.DrainInterval == 0 {
		c.DrainInterval = 10 * time.Millisecond
	}
	if c.DrainInterval < time.Millisecond || c.DrainInterval > 50*time.Millisecond {
		return c, fmt.Errorf("drainInterval: %v is outside 1ms to 50ms", c.DrainInterval)
	}
	if c.RingBytes == 0 {
		c.RingBytes = 4 << 20
	}
	if c.RingBytes < 64<<10 || c.RingBytes > 1<<30 || c.RingBytes&(c.RingBytes-1) != 0 {
		return c, fmt.Errorf("ringBytes: %d is no power of two from %d to %d", c.RingBytes, 64<<10, 1<<30)
	}
	if c.RcvBuf != 0 && (c.RcvBuf < 4<<10 || c.RcvBuf > 1<<30) {
		return c, fmt.Errorf("rcvBuf: %d bytes is outside %d to %d", c.RcvBuf, 4<<10, 1<<30)
	}
	if c.Heartbeat == 0 {
		c.Heartbeat = 10 * time.Second
	}
	if c.Heartbeat < 10*time.Millisecond {
		return c, fmt.Errorf("heartbeat: %v is below the minimum of 10ms", c.Heartbeat)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// A Handler takes what Run reads. Calls are serial and come from one thread,
// which reads nothing while a call lasts: a Handler that is slower than the
// events for longer than the buffers last causes a Loss.
type Handler interface {
	// Record takes one record. r and its bytes are valid only during the call.
	Record(r *event.Record)
	// Lost says that events were lost: what is known of processes may be wrong
	// and /proc must be scanned again.
	Lost(l Loss)
	// Idle comes after each look at the kernel's buffers when nothing more
	// waits there, and at least every second.
	Idle()
}

// A Cause says where events were lost.
type Cause uint8

// Causes.
const (
	LostRing     Cause = iota // the recorder's ring was full
	LostSequence              // the kernel numbered events that it never sent
	LostSocket                // the receive buffer of a socket was full
	LostQueue                 // too many records came before Run took them
	NumCauses
)

// String is the name used in logs and metrics.
func (c Cause) String() string {
	switch c {
	case LostRing:
		return "ring"
	case LostSequence:
		return "sequence"
	case LostSocket:
		return "socket"
	case LostQueue:
		return "queue"
	}
	return fmt.Sprintf("cause-%d", uint8(c))
}

// A Loss says how many events were lost, exactly, and when.
type Loss struct {
	Cause Cause
	CPU   int    // that made the events; -1 for unknown or several
	Count uint64 // events
	Since uint64 // ns, CLOCK_MONOTONIC: nothing was lost in this way before, except what was told
	Until uint64 // ns, CLOCK_MONOTONIC: counted then
}

// PerKind counts by event.Kind.
type PerKind [int(event.CoreDump) + 1]uint64

// Sum is the sum over all kinds.
func (p PerKind) Sum() (n uint64) {
	for _, v := range p {
		n += v
	}
	return n
}

// Stats are counts since Open. They add up:
//
//	Received = Delivered + NotAsked + Own + Acks + Unknown + Malformed + Forged
//	           + Lost[LostQueue] + Waiting
//
// exactly when nothing is in flight, for a moment otherwise within one batch.
type Stats struct {
	Received  uint64 // messages or records taken from the kernel
	Delivered PerKind
	NotAsked  uint64 // of kinds that Config.Kinds does not have
	Own       uint64 // our heartbeats
	Acks      uint64 // answers to anybody's LISTEN or IGNORE
	Unknown   uint64 // of kinds this package does not know, or not of the process connector
	Malformed uint64
	Forged    uint64 // sent by a program, not by the kernel
	Waiting   uint64 // taken and not yet delivered

	Lost [NumCauses]uint64
	Late uint64 // handed over out of order, because more than 10 ms late

	BeatsSent   uint64
	BeatsSeen   uint64
	BeatsMissed uint64
	Relistens   uint64

	Facts FactStats
}

// FactStats count, for the fall-back, the reads of /proc at exec. They add up:
// Execs = Complete + Partial + Gone + Superseded + WrongProcess + Throttled.
type FactStats struct {
	Execs        uint64
	Complete     uint64 // every fact of the mode was read
	Partial      uint64 // some facts were not: see the next three
	Gone         uint64 // nothing: the process had ended
	Superseded   uint64 // thrown away: the process had run exec again, so the facts may be the later program's
	WrongProcess uint64 // thrown away: a younger process has the pid
	Throttled    uint64 // not read: the reader had used its share of the CPU

	Denied       uint64 // single reads refused: CAP_SYS_PTRACE is missing
	DeadCgroup   uint64 // cgroup "/" not believed, because the task was dead
	Inconsistent uint64 // exe thrown away: the arguments changed while it was read
}

// A Way is how events are seen.
type Way string

// Ways.
const (
	ByRecorder Way = "recorder"         // eBPF filter, all facts from the task itself
	PerCPU     Way = "fallback-per-cpu" // classic filters, one reader thread on each CPU
	Single     Way = "fallback-single"  // classic filters, one reader thread
)

// Status says how events are seen, and what that means. It is for people as
// well as for programs.
type Status struct {
	Way    Way
	Reason string // why it is not the recorder; "" if it is

	Since time.Time // nothing before is known: events were proven to arrive then

	Facts      event.Fields // what an exec's record can have in this way
	Scheduling string       // of the threads that race processes: "fifo 10", "nice -20" or "normal"; "" with the recorder
	Readers    int          // threads that race processes
	Pinned     int          // of them, bound to one CPU
	RcvBuf     int          // bytes got for the socket that takes the most; 0 with the recorder

	// Network is the network namespace that sockets were made in, a path in
	// /proc; "" if it is this process's own.
	Network string

	Limits []Limit // what is missing here and what that costs

	Alive        bool          // the last heartbeat came back in time
	HeartbeatAge time.Duration // since the last one that came back was sent
}

// A Limit is something this process was not given, and what it costs.
type Limit struct {
	Missing string // "CAP_SYS_NICE"
	Cost    string // one sentence
}

// String is one line for people: what is missing, and what that costs.
func (l Limit) String() string { return l.Missing + ": " + l.Cost }

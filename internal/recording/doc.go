// Package recording keeps what the kernel said in a file, so that it can be
// judged again: on another machine, with other policies, as often as wanted,
// with the same result each time.
//
// A recording begins with the processes that ran when it started, then holds
// records and losses in the order they came. It is written in compressed,
// checksummed blocks: a recording that was cut off is read up to its last
// whole block, and a damaged block is an error that says where, never wrong
// records. docs/recording-format.md has the format.
//
// Recordings hold argv and paths of every process. They are as confidential
// as the machine they come from.
package recording

import "github.com/procession-dev/procession/internal/event"

// Version is the format's version. A reader refuses any other.
const Version = 1

// A Header says where and when a recording was made.
type Header struct {
	Wall   int64  // wall clock at the start, ns since 1970
	Stamp  uint64 // CLOCK_MONOTONIC at that moment, ns
	Boot   uint64 // CLOCK_BOOTTIME at that moment, ns
	Kernel string // release of the kernel
	Mode   string // how events were captured
}

// An Entry is one thing in a recording: exactly one field is set.
type Entry struct {
	Process *Baseline     // ran when the recording started
	Record  *event.Record // was heard
	Loss    *Loss         // was not
}

// A Baseline is a process that ran when the recording started.
type Baseline struct {
	PID   int32
	Facts event.Facts
}

// A Loss says that events were lost.
type Loss struct {
	Cause        uint8
	CPU          int32
	Events       uint64
	Since, Until uint64 // ns, CLOCK_MONOTONIC
}

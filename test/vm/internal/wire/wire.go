// Package wire is what passes between the two sides of a VM run: the Job that
// the guest's init finds in its initramfs, and the frames it answers with on
// the serial console.
//
// The console is shared with the kernel, which may write into the middle of a
// line. So every frame carries a sequence number and a checksum: a damaged
// frame is noticed and counted, it is never taken for a result.
package wire

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"
)

// JobFile is where the guest finds its Job.
const JobFile = "/job.json"

// Environment of a test in the guest.
const (
	EnvHelpers = "PROCESSION_TEST_HELPERS" // directory of prebuilt static helper programs
	EnvCgroup  = "PROCESSION_TEST_CGROUP"  // cgroup directories shaped like a pod's container, one per hierarchy, joined by ":"
	EnvVM      = "PROCESSION_TEST_VM"      // name of the kernel, for example 6.1-amd64
	EnvFiles   = "PROCESSION_TEST_FILES"   // directory of the files given with -files
)

// Places in the guest.
const (
	HelpersDir = "/helpers"
	FilesDir   = "/files"
	ModulesDir = "/modules"
	Busybox    = "/bin/busybox"
)

// A Job is what the guest is to do.
type Job struct {
	Hostname string
	Now      time.Time // the host's clock: a machine without a clock driver starts in 1970
	Cgroup   string    // "v2", or "v1": the old hierarchies, and an empty v2 one beside them
	Modules  []string  // module files to load, in this order
	Runs     []Run
}

// A Run is one program to run.
type Run struct {
	Name string // import path, or file name
	Dir  string // working directory
	Args []string
	Env  []string
}

// A Guest is what the guest says about itself once it is up.
type Guest struct {
	Release  string // uname -r
	Machine  string // uname -m
	Cmdline  string
	BTF      bool   // /sys/kernel/btf/vmlinux is there
	LSM      string // active security modules
	Lockdown string // none, integrity, confidentiality; "" without securityfs
	Cgroup   string // as in Job
	Uptime   time.Duration
	Tainted  uint64 // /proc/sys/kernel/tainted
}

// An End says how a Run ended.
type End struct {
	Run     int
	Exit    int // exit code; -1 when ended by a signal
	Signal  int
	Elapsed time.Duration
	Tainted uint64 // after the run: a kernel warning shows here
}

// A Kind is a kind of frame.
type Kind string

// Frames, in the order they come.
const (
	KindUp    Kind = "up"    // Guest as JSON
	KindBegin Kind = "begin" // number of the Run
	KindLine  Kind = "line"  // one line of the Run's output
	KindEnd   Kind = "end"   // End as JSON
	KindKmsg  Kind = "kmsg"  // one line of the kernel's log
	KindFault Kind = "fault" // the guest itself failed
	KindBye   Kind = "bye"   // the last frame
)

// A Frame is one message of the guest.
type Frame struct {
	Seq  uint32 // from 1, no gaps
	Kind Kind
	Text string
}

const mark = "@vm "

// Append writes the frame as one line.
func (f Frame) Append(dst []byte) []byte {
	body := fmt.Sprintf("%d %s %s", f.Seq, f.Kind, strconv.QuoteToASCII(f.Text))
	return fmt.Appendf(dst, "%s%08x %s\n", mark, crc32.ChecksumIEEE([]byte(body)), body)
}

// Parse finds a frame in one line of console output. It reports ok == false
// for a line without any, and an error for a damaged one.
func Parse(line string) (f Frame, ok bool, err error) {
	i := strings.Index(line, mark)
	if i < 0 {
		return Frame{}, false, nil
	}
	line = strings.TrimRight(line[i+len(mark):], "\r\n")
	sum, body, found := strings.Cut(line, " ")
	if !found {
		return Frame{}, false, fmt.Errorf("frame: no body in %.80q", line)
	}
	want, err := strconv.ParseUint(sum, 16, 32)
	if err != nil {
		return Frame{}, false, fmt.Errorf("frame: checksum %.16q is not a number", sum)
	}
	if got := crc32.ChecksumIEEE([]byte(body)); got != uint32(want) {
		return Frame{}, false, fmt.Errorf("frame: checksum of %.80q is %08x, not %08x", body, got, want)
	}
	parts := strings.SplitN(body, " ", 3)
	if len(parts) != 3 {
		return Frame{}, false, fmt.Errorf("frame: %d parts in %.80q, want 3", len(parts), body)
	}
	seq, err := strconv.ParseUint(parts[0], 10, 32)
	if err != nil {
		return Frame{}, false, fmt.Errorf("frame: sequence %.16q is not a number", parts[0])
	}
	text, err := strconv.Unquote(parts[2])
	if err != nil {
		return Frame{}, false, fmt.Errorf("frame: text %.80q is not quoted", parts[2])
	}
	return Frame{Seq: uint32(seq), Kind: Kind(parts[1]), Text: text}, true, nil
}

// JSON is v as the text of a frame. The types of this package always marshal.
func JSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

package procfs

import (
	"bytes"
	"fmt"
	"math"
	"strconv"

	"github.com/procession-dev/procession/internal/event"
)

// A Stat is what /proc/PID/stat says (proc_pid_stat(5)).
type Stat struct {
	PID        int32
	State      byte // R, S, D, Z, T, ...
	PPID       int32
	Session    int32
	TTY        int32  // terminal index + 1; 0 none
	Flags      uint32 // PF_..., include/linux/sched.h
	Threads    int32
	StartTicks uint64 // since boot, in ticks
	StartStack uint64 // address; 0 or 1 when it may not be known
	ArgsLen    uint64 // length of the argument area; 0 unknown

	comm    [64]byte // kernel workers show more than the 15 bytes of a task's name
	commLen uint8
}

// Flags of a task (include/linux/sched.h).
const (
	flagExiting = 0x00000004 // PF_EXITING
	flagKThread = 0x00200000 // PF_KTHREAD
)

// Comm is the task's name.
func (st *Stat) Comm() []byte { return st.comm[:st.commLen] }

// Start is the start time in ns since boot, exact to a Tick.
func (st *Stat) Start() uint64 { return st.StartTicks * Tick }

// Exiting says whether the task is on its way out, or a zombie. For the first
// thread of a process that is not yet the end of the process: see Dead.
func (st *Stat) Exiting() bool {
	return st.Flags&flagExiting != 0 || st.State == 'Z' || st.State == 'X'
}

// Dead says whether the process as a whole has ended: its first thread has,
// and there is no other.
func (st *Stat) Dead() bool { return st.Exiting() && st.Threads <= 1 }

// KernelThread says whether the task belongs to the kernel and has no program.
func (st *Stat) KernelThread() bool { return st.Flags&flagKThread != 0 }

// sameProgram says whether no exec came between two readings of one process.
// Each exec makes a new stack at a random address.
func (st *Stat) sameProgram(o *Stat) bool {
	return st.StartStack == o.StartStack && bytes.Equal(st.Comm(), o.Comm())
}

// ParseStat parses the content of /proc/PID/stat into st.
func ParseStat(b []byte, st *Stat) error {
	*st = Stat{}
	// comm may contain ") " or a newline: it goes from the first parenthesis
	// to the last one, as no later field can hold a parenthesis.
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 2 || end < open {
		return fmt.Errorf("stat: no name in parentheses in %s", excerpt(b))
	}
	pid, ok := parseUint(b[:open-1])
	if !ok || b[open-1] != ' ' || pid > math.MaxInt32 {
		return fmt.Errorf("stat: no pid in %s", excerpt(b))
	}
	st.PID = int32(pid)
	st.commLen = uint8(copy(st.comm[:], b[open+1:end]))

	const first, started = 3, 22 // state is field 3; a stat without a start time is of no use
	rest, n := b[end+1:], first
	for ; ; n++ {
		var f []byte
		if f, rest = word(rest); f == nil {
			break
		}
		if err := st.set(n, f); err != nil {
			return err
		}
	}
	if n <= started {
		return fmt.Errorf("stat: %d fields, want at least %d", n-1, started)
	}
	return nil
}

// set takes over field n (counted from 1, as in proc_pid_stat(5)).
func (st *Stat) set(n int, f []byte) error {
	switch n {
	case 3:
		st.State = f[0]
		return nil
	case 4, 6, 7, 9, 20, 22, 28, 48, 49:
	default:
		return nil
	}
	if n == 6 && string(f) == "-1" {
		return nil // a task that is being reaped has no session any more
	}
	v, ok := parseUint(f)
	max := uint64(math.MaxUint64)
	switch n {
	case 4, 6, 20:
		max = math.MaxInt32
	case 7, 9:
		max = math.MaxUint32
	}
	if !ok || v > max {
		return fmt.Errorf("stat: field %d: %s is not a number up to %d", n, excerpt(f), max)
	}
	switch n {
	case 4:
		st.PPID = int32(v)
	case 6:
		st.Session = int32(v)
	case 7:
		st.TTY = ttyIndex(uint32(v))
	case 9:
		st.Flags = uint32(v)
	case 20:
		st.Threads = int32(v)
	case 22:
		if v > math.MaxUint64/Tick {
			return fmt.Errorf("stat: field %d: start time %d is out of range", n, v)
		}
		st.StartTicks = v
	case 28:
		st.StartStack = v
	case 48:
		st.ArgsLen = v // the start; the end follows
	case 49:
		if start := st.ArgsLen; start != 0 && v > start {
			st.ArgsLen = v - start
		} else {
			st.ArgsLen = 0
		}
	}
	return nil
}

// ttyIndex turns the device number of a terminal (new_encode_dev,
// include/linux/kdev_t.h) into its index in its driver, plus 1.
func ttyIndex(dev uint32) int32 {
	if dev == 0 {
		return 0
	}
	major := dev >> 8 & 0xfff
	minor := int32(dev&0xff | dev>>12&^0xff)
	if major == 4 { // virtual consoles from minor 1 on, serial lines from 64 on
		switch {
		case minor >= 64:
			return minor - 64 + 1
		case minor >= 1:
			return minor
		}
	}
	return minor + 1
}

// A Status is what /proc/PID/status says (proc_pid_status(5)). Ids are those
// of the reader's user namespace.
type Status struct {
	TGID       int32
	UIDs, GIDs [4]uint32 // real, effective, saved, file system
	InnerPID   int32     // in the innermost pid namespace; 0 unknown
	CapPrm     uint64
	CapEff     uint64
	NoNewPrivs bool

	have uint8 // of the lines below
}

// Lines of a status that were there.
const (
	haveTGID uint8 = 1 << iota
	haveUIDs
	haveGIDs
	haveCapPrm
	haveCapEff
	haveNNP
)

func (s *Status) has(h uint8) bool { return s.have&h == h }

// IDs are UIDs and GIDs under their names.
func (s *Status) IDs() event.IDs {
	return event.IDs{
		UID: s.UIDs[0], EUID: s.UIDs[1], SUID: s.UIDs[2], FSUID: s.UIDs[3],
		GID: s.GIDs[0], EGID: s.GIDs[1], SGID: s.GIDs[2], FSGID: s.GIDs[3],
	}
}

// HasIDs says whether UIDs and GIDs were there.
func (s *Status) HasIDs() bool { return s.has(haveUIDs | haveGIDs) }

// HasCaps says whether CapPrm and CapEff were there.
func (s *Status) HasCaps() bool { return s.has(haveCapPrm | haveCapEff) }

// HasNoNewPrivs says whether NoNewPrivs was there (Linux 4.10).
func (s *Status) HasNoNewPrivs() bool { return s.has(haveNNP) }

// ParseStatus parses the content of /proc/PID/status into s. Lines it does
// not know are skipped; of a line that comes twice the first counts. The
// process's name stands on the first line with newlines escaped, so it cannot
// make lines of its own.
func ParseStatus(b []byte, s *Status) error {
	*s = Status{}
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			break // cut: the last line may lack its end
		}
		line := b[:i]
		b = b[i+1:]
		c := bytes.IndexByte(line, ':')
		if c < 0 {
			continue
		}
		if err := s.set(line[:c], line[c+1:]); err != nil {
			return err
		}
	}
	if !s.has(haveTGID) {
		return fmt.Errorf("status: no Tgid")
	}
	return nil
}

func (s *Status) set(key, val []byte) error {
	var h uint8
	ok := true
	switch string(key) {
	case "Tgid":
		h = haveTGID
	case "Uid":
		h = haveUIDs
	case "Gid":
		h = haveGIDs
	case "CapPrm":
		h = haveCapPrm
	case "CapEff":
		h = haveCapEff
	case "NoNewPrivs":
		h = haveNNP
	case "NSpid":
		if s.InnerPID == 0 {
			s.InnerPID, ok = lastPID(val)
		}
	default:
		return nil
	}
	if s.have&h != 0 {
		return nil
	}
	switch h {
	case haveTGID:
		w, rest := word(val)
		n, good := parseUint(w)
		s.TGID, ok = int32(n), good && n <= math.MaxInt32 && blank(rest)
	case haveUIDs:
		ok = fourIDs(val, &s.UIDs)
	case haveGIDs:
		ok = fourIDs(val, &s.GIDs)
	case haveCapPrm:
		s.CapPrm, ok = hex64(val)
	case haveCapEff:
		s.CapEff, ok = hex64(val)
	case haveNNP:
		w, rest := word(val)
		n, good := parseUint(w)
		s.NoNewPrivs, ok = n != 0, good && blank(rest)
	}
	if !ok {
		return fmt.Errorf("status: %s: bad value %s", excerpt(key), excerpt(val))
	}
	s.have |= h
	return nil
}

func fourIDs(val []byte, ids *[4]uint32) bool {
	for i := range ids {
		var w []byte
		w, val = word(val)
		n, ok := parseUint(w)
		if !ok || n > math.MaxUint32 {
			return false
		}
		ids[i] = uint32(n)
	}
	return blank(val)
}

func lastPID(val []byte) (int32, bool) {
	var last uint64
	for {
		w, rest := word(val)
		if w == nil {
			return int32(last), last > 0
		}
		n, ok := parseUint(w)
		if !ok || n > math.MaxInt32 {
			return 0, false
		}
		last, val = n, rest
	}
}

// ParseCgroup chooses from the content of /proc/PID/cgroup the path that
// tells the workload: that of the memory controller where cgroup v1 has it,
// else that of cgroup v2, else that of systemd's own v1 hierarchy. On a hybrid
// machine all processes may be in "/" of v2, so v2 alone would not do. It is
// the same choice the recorder makes in the kernel.
//
// The path is absolute as seen from the reader's cgroup namespace, and can be
// chosen by whoever may make cgroups, which a workload usually may not. A
// mark that the cgroup was removed is cut off. ok is false if there is none.
func ParseCgroup(b []byte) (path []byte, ok bool) {
	const none, systemd, v2, memory = 0, 1, 2, 3
	best := none
	for len(b) > 0 && best < memory {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			break // cut
		}
		line := b[:i]
		b = b[i+1:]
		c1 := bytes.IndexByte(line, ':')
		if c1 < 0 {
			continue
		}
		c2 := bytes.IndexByte(line[c1+1:], ':') // the path may hold colons, what is before may not
		if c2 < 0 {
			continue
		}
		id, ctl, p := line[:c1], line[c1+1:c1+1+c2], line[c1+c2+2:]
		rank := none
		switch {
		case string(id) == "0" && len(ctl) == 0:
			rank = v2
		case string(ctl) == "name=systemd":
			rank = systemd
		case hasController(ctl, "memory"):
			rank = memory
		}
		p = bytes.TrimSuffix(p, []byte(" (deleted)"))
		if rank > best && len(p) > 0 && p[0] == '/' {
			best, path = rank, p
		}
	}
	return path, best != none
}

func hasController(list []byte, name string) bool {
	for len(list) > 0 {
		one, rest, _ := bytes.Cut(list, []byte(","))
		if string(one) == name {
			return true
		}
		list = rest
	}
	return false
}

// parseNS takes the inode number out of the text of a namespace link,
// "net:[4026531840]".
func parseNS(b []byte) (uint32, bool) {
	i := bytes.IndexByte(b, '[')
	if i < 0 || b[len(b)-1] != ']' {
		return 0, false
	}
	n, ok := parseUint(b[i+1 : len(b)-1])
	return uint32(n), ok && n > 0 && n <= math.MaxUint32
}

// parseNumber parses a file that holds one number.
func parseNumber(b []byte) (uint32, bool) {
	w, rest := word(b)
	n, ok := parseUint(w)
	return uint32(n), ok && n <= math.MaxUint32 && blank(rest)
}

// excerpt quotes the beginning of b for a message. It copies, so that the
// buffers of the callers can stay on their stacks.
func excerpt(b []byte) string { return strconv.Quote(string(b[:min(len(b), 64)])) }

// word cuts the first word off b; it is nil if there is none.
func word(b []byte) (w, rest []byte) {
	i := 0
	for i < len(b) && space(b[i]) {
		i++
	}
	j := i
	for j < len(b) && !space(b[j]) {
		j++
	}
	if i == j {
		return nil, nil
	}
	return b[i:j], b[j:]
}

func space(c byte) bool { return c == ' ' || c == '\t' || c == '\n' }

func blank(b []byte) bool {
	w, _ := word(b)
	return w == nil
}

// parseUint is strconv.ParseUint for bytes in base 10.
func parseUint(b []byte) (uint64, bool) {
	if len(b) == 0 {
		return 0, false
	}
	var n uint64
	for _, c := range b {
		d := uint64(c - '0')
		if d > 9 || n > (math.MaxUint64-d)/10 {
			return 0, false
		}
		n = n*10 + d
	}
	return n, true
}

// hex64 parses a word of at most 16 hexadecimal digits.
func hex64(b []byte) (uint64, bool) {
	w, rest := word(b)
	if len(w) == 0 || len(w) > 16 || !blank(rest) {
		return 0, false
	}
	var n uint64
	for _, c := range w {
		switch {
		case c >= '0' && c <= '9':
			n = n<<4 | uint64(c-'0')
		case c >= 'a' && c <= 'f':
			n = n<<4 | uint64(c-'a'+10)
		default:
			return 0, false
		}
	}
	return n, true
}

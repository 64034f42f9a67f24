package recorder

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// ErrUnsupported reports that this kernel, or this process on it, cannot
// record. It is wrapped with the reason: no BTF, a missing capability, a struct
// that looks different, or what the kernel's verifier said.
var ErrUnsupported = errors.New("recorder not supported here")

// Config says what to record. The zero value works.
type Config struct {
	// Kinds of events to record; zero is all but event.CommChange.
	Kinds event.Kinds

	// Cwd: record the working directory at exec (about 0.1 us per exec).
	Cwd bool

	// RingBytes is the size of the ring: a power of two and a multiple of the
	// page size. The usual record has 400 to 500 bytes, the largest MaxRecord.
	// Default 4 MiB.
	RingBytes int

	// SelfTGID, if not 0, is the process whose CommChange events are always
	// recorded: it renames a thread of its own to prove that events arrive.
	SelfTGID int32

	// ForceProbe: do not load through typed pointers, as if the kernel were
	// older than 5.11. For tests.
	ForceProbe bool
}

func (c Config) withDefaults() (Config, error) {
	if c.Kinds == 0 {
		c.Kinds = event.KindSet(event.AllKinds()...) &^ event.KindSet(event.CommChange)
	}
	if unknown := c.Kinds &^ event.KindSet(event.AllKinds()...); unknown != 0 {
		return c, fmt.Errorf("kinds: unknown kinds %#x", uint32(unknown))
	}
	if c.RingBytes == 0 {
		c.RingBytes = 4 << 20
	}
	if n := c.RingBytes; n < os.Getpagesize() || n&(n-1) != 0 || n > 1<<30 {
		return c, fmt.Errorf("ringBytes: %d is not a power of two between %d and %d", n, os.Getpagesize(), 1<<30)
	}
	if c.SelfTGID < 0 {
		return c, fmt.Errorf("selfTGID: %d is not a process id", c.SelfTGID)
	}
	return c, nil
}

// Features says what this kernel gives.
type Features struct {
	TypedLoads   bool   // facts are read by typed loads, not by one call per number
	TypedRefused string // why not, if the kernel refused
	Overlay      bool   // the overlay layer of an executable can be told
	CgroupV1     bool   // Facts.Cgroup is the path in the memory controller's hierarchy, not in v2
	Audit        bool   // login uid and audit session exist
	Instructions int    // length of the program
}

// String is for a log line.
func (f Features) String() string {
	loads, layer, cgroup := "probe_read", "unknown", "v2"
	if f.TypedLoads {
		loads = "typed"
	}
	if f.Overlay {
		layer = "known"
	}
	if f.CgroupV1 {
		cgroup = "v1 memory"
	}
	return fmt.Sprintf("loads: %s, overlay layer: %s, cgroup: %s, audit: %t, instructions: %d", loads, layer, cgroup, f.Audit, f.Instructions)
}

// A CPU is what one CPU's messages came to, since Attach.
type CPU struct {
	CPU      int
	Seen     uint64 // messages wanted: Recorded + Lost
	Recorded uint64 // records in the ring
	Lost     uint64 // records for which the ring had no room
	Gap      uint64 // messages that the connector numbered but did not send
	Forged   uint64 // messages that did not come from the kernel; counted where they were sent
	NextSeq  uint32 // cn_msg.seq that comes next: it moves with every message, wanted or not
	Started  bool   // a message was there: NextSeq is meaningful
}

// A Recorder is the program, its maps and the reader's side of the ring. Wake
// and Counters may be called by anybody at any time before Close; all else
// belongs to one goroutine.
type Recorder struct {
	prog                    *ebpf.Program
	ringMap, scratch, ctMap *ebpf.Map
	ring                    *ring
	counters                []byte // mmap'ed, ctSize per CPU
	cpus                    int
	sleeper                 *sleeper
	features                Features

	dec       *Decoder
	rec       event.Record
	malformed atomic.Uint64
}

// Load reads the kernel's type information, builds the program and loads it. It
// takes some 100 ms, two thirds of it the kernel's verifier. The types need 4 MB
// for that time, 12 where they cannot be mapped (before 6.16). Load gives them
// back, with all other garbage of this program, before it makes the ring. The
// error wraps ErrUnsupported if the fall-back is due.
func Load(cfg Config) (*Recorder, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return nil, fmt.Errorf("%w: records are little-endian, this machine is not", ErrUnsupported)
	}
	cgroupV1, err := memoryIsV1()
	if err != nil {
		return nil, err
	}
	k, err := readKernel(cgroupV1)
	if err != nil {
		return nil, fmt.Errorf("%w: kernel types: %w", ErrUnsupported, err)
	}
	debug.FreeOSMemory()
	r := &Recorder{dec: NewDecoder()}
	r.features = Features{
		Overlay:  k.overlayKnown,
		CgroupV1: cgroupV1,
		Audit:    k.task.loginUID >= 0 && k.task.sessionID >= 0,
	}
	if err := r.open(cfg, k); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// memoryIsV1 says whether the memory controller has a hierarchy of its own
// (cgroup v1). The line of a process in it is then the cgroup that container
// runtimes mean.
func memoryIsV1() (bool, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false, fmt.Errorf("which cgroup hierarchy: %w", err)
	}
	for line := range bytes.Lines(b) {
		if f := bytes.SplitN(line, []byte(":"), 3); len(f) == 3 {
			for c := range bytes.SplitSeq(f[1], []byte(",")) {
				if string(c) == "memory" {
					return true, nil
				}
			}
		}
	}
	return false, nil
}

// readKernel finds its way in the running kernel's structs. The type information
// is garbage afterwards.
func readKernel(cgroupV1 bool) (*kernel, error) {
	types := btf.NewCache()
	vmlinux, err := types.Kernel()
	if err != nil {
		return nil, err
	}
	k, err := newKernel(vmlinux, cgroupV1)
	if err != nil {
		return nil, err
	}
	if !k.findOverlay(vmlinux) {
		if module, err := types.Module("overlay"); err == nil {
			k.findOverlay(module)
		}
	}
	return k, nil
}

// open makes the maps, loads the program and maps the memory that is shared
// with it.
func (r *Recorder) open(cfg Config, k *kernel) error {
	// Before 5.11 BPF memory counts against this limit. If it cannot be raised
	// the maps say so.
	limit := rlimit.RemoveMemlock()

	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	r.cpus = cpus
	for _, m := range []struct {
		dst  **ebpf.Map
		spec ebpf.MapSpec
	}{
		{&r.ringMap, ebpf.MapSpec{Name: "procession_ring", Type: ebpf.RingBuf, MaxEntries: uint32(cfg.RingBytes)}},
		{&r.scratch, ebpf.MapSpec{Name: "procession_scr", Type: ebpf.Array, KeySize: 4, ValueSize: (MaxRecord + 7) &^ 7, MaxEntries: uint32(cpus)}},
		{&r.ctMap, ebpf.MapSpec{Name: "procession_cnt", Type: ebpf.Array, KeySize: 4, ValueSize: ctSize, MaxEntries: uint32(cpus), Flags: unix.BPF_F_MMAPABLE}},
	} {
		if *m.dst, err = ebpf.NewMap(&m.spec); err != nil {
			// The library's own guess at a refusal is the memory lock limit. It is
			// that only if it could not be raised, before 5.11.
			if errors.Is(err, unix.EPERM) {
				err = unix.EPERM
			}
			if limit != nil {
				err = fmt.Errorf("%w, and the memory lock limit, which counts before Linux 5.11, could not be raised (CAP_SYS_RESOURCE)", err)
			}
			return unsupported("map "+m.spec.Name, err)
		}
	}
	if err := r.load(cfg, k); err != nil {
		return err
	}
	if r.ring, err = openRing(r.ringMap.FD(), cfg.RingBytes); err != nil {
		return err
	}
	page := os.Getpagesize()
	if r.counters, err = unix.Mmap(r.ctMap.FD(), 0, (cpus*ctSize+page-1)&^(page-1), unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map the counters: %w", err)
	}
	r.sleeper, err = newSleeper(r.ring, r.ringMap.FD())
	return err
}

// load loads the program, with typed loads if the kernel takes it so.
func (r *Recorder) load(cfg Config, k *kernel) (err error) {
	build := func(typed bool) error {
		p := &program{
			k: k, kinds: cfg.Kinds, cwd: cfg.Cwd, cgroupV1: r.features.CgroupV1, self: cfg.SelfTGID,
			ring: r.ringMap.FD(), scratch: r.scratch.FD(), counters: r.ctMap.FD(),
		}
		p.typed = typed
		spec := &ebpf.ProgramSpec{Name: "procession_rec", Type: ebpf.SocketFilter, License: "GPL", Instructions: p.run()}
		r.features.TypedLoads, r.features.Instructions = typed, len(spec.Instructions)
		r.prog, err = ebpf.NewProgram(spec)
		return err
	}
	if !cfg.ForceProbe {
		// Conclusive or not, the verifier has the last word.
		if err := features.HaveProgramHelper(ebpf.SocketFilter, asm.FnGetCurrentTaskBtf); err != nil {
			r.features.TypedRefused = err.Error()
		} else if err := build(true); err == nil {
			return nil
		} else if errors.Is(err, unix.EPERM) {
			return unsupported("program", err)
		} else {
			r.features.TypedRefused = verdict(err)
		}
	}
	if err := build(false); err != nil {
		return unsupported("program", err)
	}
	return nil
}

// unsupported wraps what the kernel said to a map or program.
func unsupported(what string, err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: %s: %s (needs CAP_BPF and CAP_PERFMON, and a kernel not locked down to confidentiality)", ErrUnsupported, what, verdict(err))
	}
	return fmt.Errorf("%w: %s: %s", ErrUnsupported, what, verdict(err))
}

// verdict is an error's text with the last lines of the verifier's log.
func verdict(err error) string {
	var v *ebpf.VerifierError
	if !errors.As(err, &v) {
		return err.Error()
	}
	const lines = 6
	log := v.Log[max(0, len(v.Log)-lines):]
	return v.Cause.Error() + ": " + strings.Join(log, "; ")
}

// Features says what this kernel gives.
func (r *Recorder) Features() Features { return r.features }

// Attach puts the program on a connector socket. Do it before bind: what arrives
// earlier is queued on the socket and not recorded. The socket keeps the program
// when the Recorder is closed.
func (r *Recorder) Attach(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_BPF, r.prog.FD()); err != nil {
		return fmt.Errorf("attach the recorder to the socket: %w", err)
	}
	return nil
}

// Drain decodes the records that are waiting when it is called, in order, and
// hands each to fn. The record and its text are valid during the call of fn
// only; fn may change the record. n is the number of calls. Drain allocates
// nothing. The error means that the ring is of no use any more.
//
// A record that does not decode is counted by Malformed and left out.
func (r *Recorder) Drain(fn func(*event.Record)) (n int, err error) {
	end := r.ring.produced()
	for {
		b, step, err := r.ring.next(end)
		if b == nil {
			return n, err
		}
		if err := r.dec.Decode(b, &r.rec); err != nil {
			r.malformed.Add(1)
		} else {
			fn(&r.rec)
			n++
		}
		r.ring.advance(step)
	}
}

// Full is how full the ring is now, 0 to 1: of what Drain has not handed over.
// fn may call it.
func (r *Recorder) Full() float64 { return float64(r.ring.waiting()) / float64(r.ring.size) }

// DrainRaw is Drain without the decoding: for captures. fn may keep nothing.
func (r *Recorder) DrainRaw(fn func(raw []byte)) (n int, err error) {
	end := r.ring.produced()
	for {
		b, step, err := r.ring.next(end)
		if b == nil {
			return n, err
		}
		fn(b)
		n++
		r.ring.advance(step)
	}
}

// Malformed is the number of records that Drain could not decode.
func (r *Recorder) Malformed() uint64 { return r.malformed.Load() }

// Wait blocks until a record is in the ring, timeout is over, or Wake is called;
// now and then it ends early. It says whether a record is there. A negative
// timeout is endless; 0 only looks.
//
// A reader that drains by its own clock while events come, with Nap between,
// and calls Wait only after an empty Drain, is woken once per quiet time and not
// per event. Wait and Nap make no system call that blocks: call them from a
// goroutine that is not locked to its thread, or Go has to change threads.
func (r *Recorder) Wait(timeout time.Duration) (bool, error) {
	if timeout != 0 {
		if err := r.sleeper.sleep(timeout, true); err != nil {
			return false, err
		}
	}
	return r.ring.waiting() > 0, nil
}

// Nap blocks for d, whatever is recorded meanwhile, or until Wake is called; now
// and then it ends early.
func (r *Recorder) Nap(d time.Duration) error { return r.sleeper.sleep(d, false) }

// Wake ends a Wait or Nap, or the next one if none is going on.
func (r *Recorder) Wake() error { return r.sleeper.wake() }

// Counters appends the counters of every possible CPU to dst. They are read from
// shared memory, without a system call. While events come Recorded + Lost may
// lag behind Seen by one record per CPU, never the other way round.
func (r *Recorder) Counters(dst []CPU) []CPU {
	for i := range r.cpus {
		at := func(off int) *uint64 { return (*uint64)(unsafe.Pointer(&r.counters[i*ctSize+off])) }
		c := CPU{CPU: i}
		c.Recorded = atomic.LoadUint64(at(ctRecorded))
		c.Lost = atomic.LoadUint64(at(ctLost))
		c.Seen = atomic.LoadUint64(at(ctSeen))
		c.Gap = atomic.LoadUint64(at(ctGap))
		c.Forged = atomic.LoadUint64(at(ctForged))
		next := atomic.LoadUint64(at(ctNextSeq)) // with ctStarted in its upper half
		c.NextSeq, c.Started = uint32(next), next>>32 != 0
		dst = append(dst, c)
	}
	return dst
}

// Close frees the ring, the maps and the program. Close the socket first: as
// long as it is open the kernel goes on counting what nobody can read.
func (r *Recorder) Close() error {
	if r.ring != nil {
		r.ring.close()
		r.ring = nil
	}
	if r.counters != nil {
		unix.Munmap(r.counters)
		r.counters, r.cpus = nil, 0
	}
	if r.sleeper != nil {
		r.sleeper.close()
		r.sleeper = nil
	}
	var errs []error
	if r.prog != nil {
		errs = append(errs, r.prog.Close())
	}
	for _, m := range []*ebpf.Map{r.ringMap, r.scratch, r.ctMap} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}

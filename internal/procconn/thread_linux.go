package procconn

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// onOwnThread runs f on a thread that ends with it, so that f may change the
// thread's scheduling class, affinity and name. f never gets the main thread,
// which cannot end and whose name is the process's. onOwnThread does not wait.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// While this goroutine holds the main thread nobody else gets it.
			started := make(chan struct{})
			go func() {
				runtime.LockOSThread() // never unlocked: the thread ends with f
				close(started)
				f()
			}()
			<-started
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
}

// A class is a scheduling class of a thread.
type class uint8

const (
	normal class = iota
	nice         // SCHED_OTHER, nice -20
	fifo         // SCHED_FIFO, priority 10
)

const fifoPriority = 10 // above everything normal, below the kernel's own threads

func (c class) String() string {
	switch c {
	case fifo:
		return "fifo " + strconv.Itoa(fifoPriority)
	case nice:
		return "nice -20"
	}
	return "normal"
}

// raise gives the calling thread the best class that it may have, at most
// want. CAP_SYS_NICE is needed for more than normal, and for fifo a real-time
// budget in the thread's cgroup where those exist (CONFIG_RT_GROUP_SCHED).
//
//go:nosplit
//go:norace
func raise(want class) class {
	// RESET_ON_FORK: a thread that the Go runtime clones from here must not
	// inherit the class.
	if want == fifo && setClass(unix.SchedAttr{Policy: unix.SCHED_FIFO, Priority: fifoPriority}) {
		return fifo
	}
	if want >= nice && setClass(unix.SchedAttr{Policy: unix.SCHED_NORMAL, Nice: -20}) {
		return nice
	}
	return normal
}

//go:nosplit
//go:norace
func setClass(a unix.SchedAttr) bool {
	a.Size, a.Flags = unix.SizeofSchedAttr, unix.SCHED_FLAG_RESET_ON_FORK
	_, _, e := syscall.RawSyscall6(unix.SYS_SCHED_SETATTR, 0, uintptr(unsafe.Pointer(&a)), 0, 0, 0, 0)
	return e == 0
}

// pin binds the calling thread to one CPU.
func pin(cpu int) error {
	var s unix.CPUSet
	s.Set(cpu)
	if err := unix.SchedSetaffinity(0, &s); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", cpu, err)
	}
	return nil
}

// usableCPUs lists the CPUs that are online and that this thread may use, and
// says how many are online. unix.CPUSet ends at 1024; CPUs beyond it are
// online but not usable here.
func usableCPUs() (usable []int, online int, err error) {
	var s unix.CPUSet
	if err := unix.SchedGetaffinity(0, &s); err != nil {
		return nil, 0, fmt.Errorf("read CPU affinity: %w", err)
	}
	b, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return nil, 0, fmt.Errorf("read online CPUs: %w", err)
	}
	on, err := parseCPUList(string(b))
	if err != nil {
		return nil, 0, fmt.Errorf("read online CPUs: %w", err)
	}
	for _, n := range on {
		if n < 64*len(s) && s.IsSet(n) {
			usable = append(usable, n)
		}
	}
	return usable, len(on), nil
}

// parseCPUList parses the kernel's list format, "0-3,8".
func parseCPUList(list string) ([]int, error) {
	const most = 1 << 16
	var cpus []int
	for part := range strings.SplitSeq(strings.TrimSpace(list), ",") {
		lo, hi, isRange := strings.Cut(part, "-")
		from, err := strconv.ParseUint(lo, 10, 16)
		to := from
		if err == nil && isRange {
			to, err = strconv.ParseUint(hi, 10, 16)
		}
		if err != nil || to < from || len(cpus)+int(to-from) > most {
			return nil, fmt.Errorf("%.64q is no CPU list", list)
		}
		for n := from; n <= to; n++ {
			cpus = append(cpus, int(n))
		}
	}
	return cpus, nil
}

// threadCPU is the CPU time used by the calling thread.
//
//go:nosplit
//go:norace
func threadCPU() time.Duration { return time.Duration(clock(unix.CLOCK_THREAD_CPUTIME_ID)) }

// nameThread gives the calling thread the name that it has. Every call makes a
// COMM event: this is the heartbeat.
func nameThread() error {
	var name [16]byte // TASK_COMM_LEN, include/linux/sched.h
	for _, op := range [...]uintptr{unix.PR_GET_NAME, unix.PR_SET_NAME} {
		if _, _, e := syscall.RawSyscall(unix.SYS_PRCTL, op, uintptr(unsafe.Pointer(&name[0])), 0); e != 0 {
			return fmt.Errorf("rename thread: %w", e)
		}
	}
	return nil
}

// A doorbell wakes threads that wait in a system call.
type doorbell struct{ fd int }

func newDoorbell() (*doorbell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make eventfd: %w", err)
	}
	return &doorbell{fd}, nil
}

// ring wakes all who wait; until silence, nobody waits any more.
func (d *doorbell) ring() {
	one := uint64(1)
	syscall.RawSyscall(unix.SYS_WRITE, uintptr(d.fd), uintptr(unsafe.Pointer(&one)), 8)
}

func (d *doorbell) silence() {
	var n uint64
	syscall.RawSyscall(unix.SYS_READ, uintptr(d.fd), uintptr(unsafe.Pointer(&n)), 8)
}

func (d *doorbell) close() { unix.Close(d.fd) }

// waitFor blocks until one of the descriptors can be read, or for at most d.
// d < 0 is for ever. It gives up the thread's P and may return early.
func waitFor(fds []unix.PollFd, d time.Duration) {
	var ts *unix.Timespec
	if d >= 0 {
		t := unix.NsecToTimespec(int64(d))
		ts = &t
	}
	var p *unix.PollFd
	if len(fds) > 0 {
		p = &fds[0]
	}
	syscall.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(p)), uintptr(len(fds)), uintptr(unsafe.Pointer(ts)), 0, 0, 0)
}

package procconn

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What an exec reader's thread may do.
const (
	// maxPinned is the most CPUs that get a reader of their own. Every socket
	// costs every event's sender 0.25 us to reject it.
	maxPinned = 16
	// usualShare is how much CPU time a reader may use in a second. A real-time
	// thread without a limit could starve what it watches.
	usualShare = 250 * time.Millisecond
	// readerBatch is how many messages a reader takes before it reads the facts of
	// the first.
	readerBatch = 16
	// reportBuf is how many bytes may wait for Run, of all readers together: some
	// 2,000 execs, with the kernel's own overhead. It is kernel memory, and used
	// only then.
	reportBuf = 8 << 20
)

// An execReader takes exec messages from its own socket and reads the facts
// while the process stands still: its thread is bound to the CPU on which the
// process runs exec and preempts it there before its first instruction. What it
// finds it writes to Run, through a socket: the thread never comes back to Go.
type execReader struct {
	f    *fallback
	cpu  int // -1: all CPUs without a reader of their own
	sock *socket
	to   int           // the thread's end of the socket pair
	from int           // Run's end
	done chan struct{} // closed when the thread ends; nil if it never began
	err  error         // why it ended, if not for stop; written before done is closed

	// Run's, as told by the thread.
	class  atomic.Uint32 // class got
	pinned atomic.Bool
	beat   uint64 // stamp of the last heartbeat that came
	due    bool   // the last heartbeat was made for this reader too
	buf    []byte // bytes of reports; those from begin to end are not taken yet
	begin  int
	end    int

	// The thread's own. It stores no pointers here.
	gathering
	message  [datagramRoom]byte
	recv     *receiver
	fds      [2]unix.PollFd
	hdr      unix.Msghdr
	iovs     [2 + numParts]unix.Iovec
	affinity unix.CPUSet
	share    time.Duration // CPU time that the thread may use in a second
	window   uint64        // ns, CLOCK_MONOTONIC: when the running second of share began
	used     time.Duration // CPU time used before it
	turn     uint
	spent    bool
}

const (
	reportLen = int(unsafe.Sizeof(report{}))
	reportMax = reportLen + datagramRoom + numParts*partMax
)

// open makes what the thread needs, with room for as many bytes of reports.
func (r *execReader) open(room int) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	r.to, r.from = fds[0], fds[1]
	if unix.SetsockoptInt(r.to, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, room) != nil {
		// As much as every program may have, some 100 reports. What waits beyond
		// that waits in the connector's socket.
		_ = unix.SetsockoptInt(r.to, unix.SOL_SOCKET, unix.SO_SNDBUF, room)
	}
	r.buf = make([]byte, 2*reportMax)
	r.recv = newReceiver(readerBatch)
	r.fds = [2]unix.PollFd{{Fd: int32(r.sock.fd), Events: unix.POLLIN}, {Fd: int32(r.f.stop.fd), Events: unix.POLLIN}}
	r.iovs[0].Base, r.iovs[1].Base = (*byte)(unsafe.Pointer(&r.report)), &r.message[0]
	r.iovs[0].SetLen(reportLen)
	for i := range r.parts {
		r.iovs[2+i].Base = &r.parts[i][0]
	}
	r.hdr.Iov = &r.iovs[0]
	r.hdr.SetIovlen(len(r.iovs))
	return nil
}

// start starts the thread, and returns when it has its CPU and class.
func (r *execReader) start() {
	ready := make(chan struct{})
	r.done = make(chan struct{})
	onOwnThread(func() {
		defer close(r.done)
		if r.cpu >= 0 {
			r.affinity.Set(r.cpu)
		}
		r.report.pinned, r.report.class = r.pin(), raise(fifo)
		r.pinned.Store(r.report.pinned)
		r.class.Store(uint32(r.report.class))
		close(ready)
		_, r.err = received(0, r.run())
	})
	<-ready
}

// close frees everything, once the thread has ended.
func (r *execReader) close() {
	r.sock.close()
	if r.from != r.to { // open succeeded
		unix.Close(r.to)
		unix.Close(r.from)
	}
}

// run is the thread, until stop rings. See gather_linux.go for what it may do.
//
//go:nosplit
//go:norace
func (r *execReader) run() (e syscall.Errno) {
	enter()
	for e == 0 {
		_, _, e = syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&r.fds)), 2, 0, 0, 0, 0)
		if e == unix.EINTR {
			e = 0
			continue
		}
		if e != 0 || r.fds[1].Revents != 0 {
			break // a thread with this priority must not go round without waiting
		}
		n := 0
		if n, e = r.recv.recvmmsg(r.sock.fd); nothingYet(e) {
			n, e = 0, 0
		}
		for i := 0; i < n && e == 0; i++ {
			e = r.handle(i, n)
		}
	}
	leave()
	return e
}

// handle reads the facts for datagram i of n and reports both.
//
//go:nosplit
//go:norace
func (r *execReader) handle(i, n int) syscall.Errno {
	r.outcome, r.ready, r.denied, r.same, r.hasStatx = complete, 0, false, false, false
	r.sizes = [numParts]uint32{}
	if tgid := r.recv.execOf(i); tgid > 0 {
		switch {
		case r.superseded(i, n, tgid):
			r.outcome = superseded
		case !r.mayRead():
			r.outcome = throttled
		default:
			r.gather(tgid)
		}
	}
	return r.send(i)
}

// superseded says whether the process of datagram i has run exec again by now, so
// that what /proc says is about another program.
//
//go:nosplit
//go:norace
func (r *execReader) superseded(i, n int, tgid int32) bool {
	for i++; i < n; i++ {
		if r.recv.execOf(i) == tgid {
			return true
		}
	}
	return false
}

// send writes the report about datagram i. It waits for room if Run is behind: what
// comes meanwhile waits in the connector's socket, and what does not fit there is
// counted as lost.
//
//go:nosplit
//go:norace
func (r *execReader) send(i int) syscall.Errno {
	r.datagram, r.fromKernel = r.recv.copy(i, &r.message)
	r.size = uint32(reportLen) + r.datagram
	r.iovs[1].Len = uint64(r.datagram)
	for k, size := range r.sizes {
		r.iovs[2+k].Len = uint64(size)
		r.size += size
	}
	for {
		n, _, e := syscall.RawSyscall6(unix.SYS_SENDMSG, uintptr(r.to), uintptr(unsafe.Pointer(&r.hdr)), unix.MSG_NOSIGNAL, 0, 0, 0)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EPIPE:
			return 0 // close: stop rings too
		case e == 0 && n != uintptr(r.size):
			return unix.EMSGSIZE // does not happen: the kernel cuts what is larger than 32 KiB
		}
		return e
	}
}

// mayRead says whether the thread has CPU time left in this second. If not it
// becomes an ordinary thread until the second is over.
//
//go:nosplit
//go:norace
func (r *execReader) mayRead() bool {
	now := monotonic()
	if now-r.window >= uint64(time.Second) {
		r.window, r.used = now, threadCPU()
		// A change of the container's CPU set may have moved the thread.
		r.report.pinned = r.pin()
		if r.spent {
			r.spent = false
			r.report.class = raise(fifo)
		}
	}
	if r.turn++; !r.spent && r.turn%8 == 0 && threadCPU()-r.used > r.share {
		r.spent = true
		r.report.class = raise(nice)
	}
	return !r.spent
}

// pin binds the thread to its CPU, if it has one.
//
//go:nosplit
//go:norace
func (r *execReader) pin() bool {
	if r.cpu < 0 {
		return false
	}
	_, _, e := syscall.RawSyscall6(unix.SYS_SCHED_SETAFFINITY, 0, unsafe.Sizeof(r.affinity), uintptr(unsafe.Pointer(&r.affinity)), 0, 0, 0)
	return e == 0
}

// A heard is one report as Run takes it; it is good until the next one is taken.
type heard struct {
	report
	message []byte
	parts   [numParts][]byte
}

// next takes a report, if there is a whole one.
func (r *execReader) next(h *heard) (bool, error) {
	for {
		if b := r.buf[r.begin:r.end]; len(b) >= reportLen {
			copy((*[reportLen]byte)(unsafe.Pointer(&h.report))[:], b)
			if int(h.size) <= len(b) {
				h.cut(b[reportLen:h.size])
				r.begin += int(h.size)
				return true, nil
			}
		}
		if r.begin > 0 {
			r.end, r.begin = copy(r.buf, r.buf[r.begin:r.end]), 0
		}
		n, _, e := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(r.from), uintptr(unsafe.Pointer(&r.buf[r.end])),
			uintptr(len(r.buf)-r.end), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case e == unix.EINTR:
		case e == unix.EAGAIN || e == 0 && n == 0: // close shuts it down
			return false, nil
		case e != 0:
			return false, fmt.Errorf("hear from the reader of CPU %d: %w", r.cpu, e)
		default:
			r.end += int(n)
		}
	}
}

func (h *heard) cut(b []byte) {
	h.message, b = b[:h.datagram], b[h.datagram:]
	for i, size := range h.sizes {
		h.parts[i], b = b[:size], b[size:]
	}
}

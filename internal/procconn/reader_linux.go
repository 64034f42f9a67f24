package procconn

import (
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
	// readerBatch is how many messages a reader looks at before it reads the
	// facts of the first.
	readerBatch = 16
)

// An execReader takes exec messages from its own socket and reads the facts
// while the process stands still: the thread is bound to the CPU on which the
// process runs exec and preempts it there before its first instruction.
type execReader struct {
	f    *fallback
	cpu  int // -1: all CPUs without a reader of their own
	sock *socket
	q    *queue
	// share is how much CPU time the thread may use in a second.
	share time.Duration

	class  atomic.Uint32 // class got
	pinned atomic.Bool
	beat   atomic.Uint64 // stamp of the last heartbeat that came
	due    bool          // the last heartbeat was made for this reader too; of the thread of Run
	ready  chan struct{} // closed when class and pinned are set
	done   chan struct{} // closed when the thread ends; nil if it never began
	err    error         // why it ended, if not for stop; written before done is closed

	// The thread's own.
	snap   snapshotter
	recv   *receiver
	fds    [2]unix.PollFd // the socket, the end
	msgs   []Message
	window uint64 // ns, CLOCK_MONOTONIC: when the running second of share began
	used   time.Duration
	turn   int
	spent  bool
	offset uint64 // sinceBoot
}

// run is the thread.
func (r *execReader) run() {
	defer close(r.done)
	r.pinned.Store(r.cpu >= 0 && pin(r.cpu) == nil)
	r.class.Store(uint32(raise(fifo)))
	close(r.ready)
	r.fds = [2]unix.PollFd{{Fd: int32(r.sock.fd), Events: unix.POLLIN}, {Fd: int32(r.f.stop.fd), Events: unix.POLLIN}}
	for {
		n, err := received(r.next(!r.spent))
		if err != nil {
			r.err = err
			return
		}
		if r.fds[1].Revents != 0 {
			return
		}
		r.decode(n)
		for i := range r.msgs {
			if !r.handle(i) {
				return
			}
		}
	}
}

// next waits for messages, takes them, and, if it may look, gathers what /proc says
// about the process of the first, nearly always the only one: all in one piece, see
// gather_linux.go.
//
//go:nosplit
//go:norace
func (r *execReader) next(look bool) (n int, e syscall.Errno) {
	r.snap.tgid = 0
	enter()
	syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&r.fds)), 2, 0, 0, 0, 0)
	n, e = r.recv.recvmmsg(r.sock.fd)
	if look && e == 0 && n > 0 {
		if tgid := r.recv.firstExec(); tgid > 0 {
			r.snap.gather(tgid)
		}
	}
	leave()
	return n, e
}

// decode turns n datagrams into messages.
func (r *execReader) decode(n int) {
	r.msgs = r.msgs[:0]
	for i := range n {
		b, fromKernel := r.recv.datagram(i)
		if !fromKernel {
			r.f.c.n.received.Add(1)
			r.f.c.n.forged.Add(1)
			continue
		}
		for more := true; more; more = len(b) > 0 {
			r.msgs = append(r.msgs, Message{})
			m := &r.msgs[len(r.msgs)-1]
			r.f.c.n.received.Add(1)
			var ok bool
			if b, ok = r.f.c.n.decode(b, m); !ok {
				r.msgs = r.msgs[:len(r.msgs)-1]
			}
		}
	}
}

// handle reads the facts for message i. It says false when it is time to stop.
func (r *execReader) handle(i int) bool {
	m := &r.msgs[i]
	if m.What == WhatComm {
		r.f.c.n.own.Add(1)
		r.beat.Store(max(r.beat.Load(), m.Stamp))
		r.f.rouse()
		return true
	}
	if m.What != WhatExec {
		r.f.c.n.unknown.Add(1) // the filter lets nothing else pass
		return true
	}
	it := r.q.slot()
	for ; it == nil; it = r.q.slot() {
		// Run is behind. Let the socket's buffer take what comes, and count
		// what does not fit.
		r.f.rouse()
		if r.f.stopped(5 * time.Millisecond) {
			return false
		}
	}
	m.Fill(&it.rec)
	switch {
	case r.again(i):
		it.outcome = superseded
	case !r.mayRead():
		it.outcome = throttled
	default:
		if i > 0 || r.snap.tgid != m.TGID {
			r.snap.look(m.TGID)
		}
		c := it.in
		c.text, it.outcome, it.doubt = r.snap.facts(&it.rec.Facts, m.Stamp, r.offset, c.text)
		it.ready = r.snap.ready
	}
	r.f.c.n.waiting.Add(1)
	r.q.publish()
	r.f.rouse()
	return true
}

// again says whether the process of message i has run exec again by now, so
// that what /proc says is about another program.
func (r *execReader) again(i int) bool {
	for _, m := range r.msgs[i+1:] {
		if m.TGID == r.msgs[i].TGID && m.What == WhatExec {
			return true
		}
	}
	return false
}

// mayRead says whether the thread has CPU time left in this second. If not it
// becomes an ordinary thread until the second is over.
func (r *execReader) mayRead() bool {
	now := monotonic()
	if now-r.window >= uint64(time.Second) {
		r.window, r.used, r.offset = now, threadCPU(), sinceBoot()
		// A change of the container's CPU set may have moved the thread.
		r.pinned.Store(r.cpu >= 0 && pin(r.cpu) == nil)
		if r.spent {
			r.spent = false
			r.class.Store(uint32(raise(fifo)))
		}
	}
	if r.turn++; !r.spent && r.turn%8 == 0 && threadCPU()-r.used > r.share {
		r.spent = true
		r.class.Store(uint32(raise(nice)))
	}
	return !r.spent
}

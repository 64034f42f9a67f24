package procconn

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A socket is one connector socket.
type socket struct {
	fd     int
	rcvBuf int  // bytes got, as the kernel counts them (twice what was asked)
	forced bool // SO_RCVBUFFORCE was allowed
	drops  uint32
	full   float64 // share of the buffer in use when drops was read
	since  uint64  // when drops was read, ns CLOCK_MONOTONIC
}

// openSocket makes a socket in a network namespace (see newSocket) and joins the
// group, with the filter attached by
// attach before that, since events pass unfiltered otherwise. Errors are those
// of diagnose.
func openSocket(network string, rcvBuf int, attach func(fd int) error) (*socket, error) {
	fd, err := newSocket(network)
	if err != nil {
		return nil, err
	}
	s := &socket{fd: fd}
	if err := s.setup(rcvBuf, attach); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *socket) setup(rcvBuf int, attach func(fd int) error) error {
	if rcvBuf > 0 {
		if err := s.setRcvBuf(rcvBuf); err != nil {
			return err
		}
	}
	// Without this an overflow raises ENOBUFS once and drops everything until
	// the queue was read empty: three times the loss.
	if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_NO_ENOBUFS, 1); err != nil {
		return fmt.Errorf("set NETLINK_NO_ENOBUFS: %w", err)
	}
	if err := attach(s.fd); err != nil {
		return fmt.Errorf("attach filter: %w", err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnIdxProc}); err != nil {
		return diagnose("bind", err)
	}
	var err error
	s.since = monotonic()
	s.drops, err = s.readDrops()
	return err
}

func (s *socket) setRcvBuf(n int) error {
	err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n)
	s.forced = err == nil
	if errors.Is(err, unix.EPERM) {
		// Up to net.core.rmem_max anybody may ask; more is cut, not refused.
		err = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, n)
	}
	if err != nil {
		return fmt.Errorf("set receive buffer of %d bytes: %w", n, err)
	}
	s.rcvBuf, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		return fmt.Errorf("read receive buffer size: %w", err)
	}
	return nil
}

func attachClassic(f []unix.SockFilter) func(fd int) error {
	return func(fd int) error {
		p := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &p)
	}
}

// request sends a LISTEN or IGNORE to the kernel.
func (s *socket) request(op, ack uint32) error {
	b := appendRequest(make([]byte, 0, nlHeaderLen+cnHeaderLen+4), op, ack)
	if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return diagnose("listen", err)
	}
	return nil
}

// readDrops reads sk_drops: messages that passed the filter and found no room
// in the buffer. It wraps at 32 bits. In passing it sees how full the buffer is.
func (s *socket) readDrops() (uint32, error) {
	var v [9]uint32 // SK_MEMINFO_VARS, include/uapi/linux/sock_diag.h
	n := uint32(unsafe.Sizeof(v))
	_, _, e := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&v[0])), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return 0, fmt.Errorf("read SO_MEMINFO: %w", e)
	}
	if n < uint32(unsafe.Sizeof(v)) {
		return 0, fmt.Errorf("read SO_MEMINFO: kernel gives %d bytes and no drop count; want 36", n)
	}
	if v[1] > 0 { // SK_MEMINFO_RCVBUF
		s.full = float64(v[0]) / float64(v[1]) // SK_MEMINFO_RMEM_ALLOC
	}
	return v[8], nil
}

// lost says how many messages were dropped since the last call, and since when.
func (s *socket) lost(now uint64) (n uint64, since uint64, err error) {
	d, err := s.readDrops()
	if err != nil {
		return 0, 0, err
	}
	n, since = uint64(d-s.drops), s.since
	s.drops, s.since = d, now
	return n, since, nil
}

func (s *socket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

// A receiver takes many datagrams with one system call. It never blocks and
// allocates nothing.
type receiver struct {
	hdrs  []mmsghdr
	iovs  []unix.Iovec
	names []unix.RawSockaddrNetlink
	bufs  []byte
}

// struct mmsghdr, recvmmsg(2). The compiler pads it as C does.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

const datagramRoom = 256 // the kernel sends 76; what is cut is malformed

func newReceiver(n int) *receiver {
	r := &receiver{
		hdrs:  make([]mmsghdr, n),
		iovs:  make([]unix.Iovec, n),
		names: make([]unix.RawSockaddrNetlink, n),
		bufs:  make([]byte, n*datagramRoom),
	}
	for i := range r.hdrs {
		r.iovs[i].Base = &r.bufs[i*datagramRoom]
		r.iovs[i].SetLen(datagramRoom)
		h := &r.hdrs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&r.names[i]))
		h.Iov = &r.iovs[i]
		h.SetIovlen(1)
	}
	return r
}

// receive takes what is queued, at most as much as there is room for, and
// returns the number of datagrams, 0 for none.
func (r *receiver) receive(fd int) (int, error) { return received(r.recvmmsg(fd)) }

// recvmmsg is receive for where nothing but system calls can be made. Raw: it does
// not block.
//
//go:nosplit
//go:norace
func (r *receiver) recvmmsg(fd int) (int, syscall.Errno) {
	for i := range r.hdrs {
		r.hdrs[i].hdr.Namelen = unix.SizeofSockaddrNetlink
	}
	n, _, e := syscall.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(r.hdrs))),
		uintptr(len(r.hdrs)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), e
}

// received is the answer of recvmmsg for the others.
func received(n int, e syscall.Errno) (int, error) {
	switch {
	case e == 0:
		return n, nil
	case nothingYet(e):
		return 0, nil
	}
	return 0, fmt.Errorf("receive process events: %w", e)
}

// nothingYet says whether the error of recvmmsg is none. NETLINK_NO_ENOBUFS does not
// cover what was pending before; drops are counted elsewhere.
//
//go:nosplit
//go:norace
func nothingYet(e syscall.Errno) bool {
	return e == unix.EAGAIN || e == unix.EINTR || e == unix.ENOBUFS
}

// datagram is the i-th one received, and whether the kernel sent it: any
// process with CAP_NET_ADMIN can send to the group too, but not from port 0.
func (r *receiver) datagram(i int) (b []byte, fromKernel bool) {
	p, n, fromKernel := r.raw(i)
	return unsafe.Slice((*byte)(p), n), fromKernel
}

// execOf is the process that ran exec, if the i-th datagram is about that, else 0.
// It does not replace decode, which says what else it may be.
//
//go:nosplit
//go:norace
func (r *receiver) execOf(i int) int32 {
	b, n, fromKernel := r.raw(i)
	if !fromKernel || n < offUnion+8 || word(b, offWhat) != uint32(WhatExec) {
		return 0
	}
	return int32(word(b, offUnion+4))
}

// copy copies the i-th datagram.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (r *receiver) copy(i int, to *[datagramRoom]byte) (n uint32, fromKernel bool) {
	b, n, fromKernel := r.raw(i)
	*to = *(*[datagramRoom]byte)(b)
	return n, fromKernel
}

// raw is datagram for where nothing but system calls can be made.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (r *receiver) raw(i int) (b unsafe.Pointer, n uint32, fromKernel bool) {
	h := (*mmsghdr)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(r.hdrs)), uintptr(i)*unsafe.Sizeof(mmsghdr{})))
	name := (*unix.RawSockaddrNetlink)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(r.names)), uintptr(i)*unsafe.Sizeof(unix.RawSockaddrNetlink{})))
	return unsafe.Add(unsafe.Pointer(unsafe.SliceData(r.bufs)), i*datagramRoom), min(h.n, datagramRoom),
		h.hdr.Namelen == unix.SizeofSockaddrNetlink && name.Pid == 0
}

//go:nosplit
//go:norace
//go:nocheckptr
func word(b unsafe.Pointer, off uintptr) uint32 { return *(*uint32)(unsafe.Add(b, off)) }

// monotonic is the clock of the connector's time stamps.
//
//go:nosplit
//go:norace
func monotonic() uint64 { return clock(unix.CLOCK_MONOTONIC) }

// clock makes a raw system call: it does not block, and the scheduler need not
// know.
//
//go:nosplit
//go:norace
func clock(id int32) uint64 {
	var t unix.Timespec
	if _, _, e := syscall.RawSyscall6(unix.SYS_CLOCK_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&t)), 0, 0, 0, 0); e != 0 {
		return 0 // cannot happen: the two clocks used exist since 2.6.39
	}
	return uint64(t.Nano())
}

// sinceBoot is what to add to a time stamp to get CLOCK_BOOTTIME. It grows
// when the machine sleeps.
func sinceBoot() uint64 { return clock(unix.CLOCK_BOOTTIME) - monotonic() }

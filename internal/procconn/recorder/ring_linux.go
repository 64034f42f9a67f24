package recorder

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A ring is the reader's side of a BPF ring buffer (kernel/bpf/ringbuf.c): a page
// with the consumer's position, which we write; a page with the producer's, and
// the data twice in a row, so that no record is ever split.
//
// Both positions only grow; the data's place is the position modulo the size.
// The kernel moves the producer's position before it writes a record and clears
// the record's busy bit when the record is complete. We move ours when we are
// done with it, and the room is the kernel's again.
type ring struct {
	cons, prod []byte
	size       uint64
	pos        uint64 // the consumer's position: only the reader writes it
}

const (
	ringBusy    = 1 << 31 // BPF_RINGBUF_BUSY_BIT
	ringDiscard = 1 << 30 // BPF_RINGBUF_DISCARD_BIT
	ringHeader  = 8       // BPF_RINGBUF_HDR_SZ
)

var errRing = errors.New("ring buffer is corrupt")

func openRing(fd, size int) (*ring, error) {
	page := os.Getpagesize()
	cons, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the ring's consumer page: %w", err)
	}
	prod, err := unix.Mmap(fd, int64(page), page+2*size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		unix.Munmap(cons)
		return nil, fmt.Errorf("map the ring's data: %w", err)
	}
	return &ring{cons: cons, prod: prod, size: uint64(size)}, nil
}

// produced is where the kernel will write next.
func (r *ring) produced() uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&r.prod[0])))
}

// next is the record at the reader's position, or nil when there is none before
// end yet. It stays valid until advance is called with the returned step.
func (r *ring) next(end uint64) (sample []byte, step uint64, err error) {
	for r.pos < end {
		at := len(r.prod) - 2*int(r.size) + int(r.pos&(r.size-1))
		head := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.prod[at])))
		if head&ringBusy != 0 {
			return nil, 0, nil // another CPU is writing it this moment
		}
		n := uint64(head &^ (ringBusy | ringDiscard))
		step = (ringHeader + n + 7) &^ 7
		if step > end-r.pos || step > r.size {
			return nil, 0, errRing
		}
		if head&ringDiscard == 0 {
			return r.prod[at+ringHeader : at+ringHeader+int(n)], step, nil
		}
		r.advance(step)
	}
	return nil, 0, nil
}

// advance gives the room of a record back.
func (r *ring) advance(step uint64) {
	r.pos += step
	atomic.StoreUint64((*uint64)(unsafe.Pointer(&r.cons[0])), r.pos)
}

func (r *ring) close() {
	unix.Munmap(r.cons)
	unix.Munmap(r.prod)
}

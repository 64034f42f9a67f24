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
// the data. The kernel offers the data twice in a row, so that no record is ever
// split; but each mapped page counts as resident memory, so it is mapped once
// here, and the rare record that goes over the end is put together in a copy.
//
// Both positions only grow; the data's place is the position modulo the size.
// The kernel moves the producer's position before it writes a record and clears
// the record's busy bit when the record is complete. We move ours when we are
// done with it, and the room is the kernel's again.
type ring struct {
	cons, prod []byte
	data       []byte // of prod
	size       uint64
	pos        uint64 // the consumer's position: only the reader writes it
	split      []byte // room for a record that goes over the end
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
	prod, err := unix.Mmap(fd, int64(page), page+size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		unix.Munmap(cons)
		return nil, fmt.Errorf("map the ring's data: %w", err)
	}
	return &ring{cons: cons, prod: prod, data: prod[page:], size: uint64(size), split: make([]byte, MaxRecord)}, nil
}

// produced is where the kernel will write next.
func (r *ring) produced() uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&r.prod[0])))
}

// waiting is how many bytes the kernel has written and we have not taken.
func (r *ring) waiting() uint64 { return r.produced() - r.pos }

// next is the record at the reader's position, or nil when there is none before
// end yet. It stays valid until advance is called with the returned step.
func (r *ring) next(end uint64) (sample []byte, step uint64, err error) {
	for r.pos < end {
		// A record begins at a multiple of 8, so its header is never split.
		at := r.pos & (r.size - 1)
		head := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[at])))
		if head&ringBusy != 0 {
			return nil, 0, nil // another CPU is writing it this moment
		}
		n := uint64(head &^ (ringBusy | ringDiscard))
		step = (ringHeader + n + 7) &^ 7
		if step > end-r.pos || step > r.size {
			return nil, 0, errRing
		}
		if head&ringDiscard == 0 {
			return r.sample((at+ringHeader)&(r.size-1), n), step, nil
		}
		r.advance(step)
	}
	return nil, 0, nil
}

// sample is the n bytes from at on.
func (r *ring) sample(at, n uint64) []byte {
	if end := at + n; end <= r.size {
		return r.data[at:end:end]
	}
	r.split = append(append(r.split[:0], r.data[at:]...), r.data[:at+n-r.size]...)
	return r.split
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

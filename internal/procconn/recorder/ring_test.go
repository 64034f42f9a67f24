//go:build linux

package recorder

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/procession-dev/procession/internal/event"
)

// testRing is a ring in ordinary memory, and the kernel's side of it.
type testRing struct {
	ring
	written uint64
}

func newTestRing(size int) *testRing {
	prod := make([]byte, os.Getpagesize()+size)
	return &testRing{ring: ring{
		cons: make([]byte, 8), prod: prod, data: prod[os.Getpagesize():], size: uint64(size), split: make([]byte, size),
	}}
}

// write appends a record, as bpf_ringbuf_output does: byte for byte around the
// end, as the data lies there twice for the kernel.
func (r *testRing) write(head uint32, sample []byte) {
	b := binary.NativeEndian.AppendUint32(nil, head|uint32(len(sample)))
	b = append(binary.NativeEndian.AppendUint32(b, 0), sample...)
	for i, c := range b {
		r.data[(r.written+uint64(i))%r.size] = c
	}
	r.written += (uint64(len(b)) + 7) &^ 7
	binary.NativeEndian.PutUint64(r.prod, r.written)
}

// Every record comes out as it went in, wherever in the ring it begins, also
// over the end.
func TestRingWraps(t *testing.T) {
	const size = 4096
	r := newTestRing(size)
	split := 0
	for i := range 3000 {
		n := 1 + i*7%1500
		sample := bytes.Repeat([]byte{byte(i), byte(i >> 8), 0xa5}, n)[:n]
		if i%11 == 0 {
			r.write(ringDiscard, sample) // to be left out
		}
		r.write(0, sample)
		at := r.pos & (size - 1)
		got, step, err := r.next(r.produced())
		if err != nil || !bytes.Equal(got, sample) {
			t.Fatalf("record %d of %d bytes at %d: got %d bytes, %v", i, n, at, len(got), err)
		}
		if &got[0] == &r.split[:1][0] {
			split++
		}
		r.advance(step)
		if got, _, err := r.next(r.produced()); got != nil || err != nil {
			t.Fatalf("after record %d: %d bytes, %v; want none", i, len(got), err)
		}
		if r.waiting() != 0 {
			t.Fatalf("after record %d: %d bytes wait", i, r.waiting())
		}
	}
	if split == 0 {
		t.Error("no record went over the end: nothing was tested")
	}
}

func TestRingRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		head uint32
		err  error
	}{
		"record being written":          {ringBusy | 16, nil},
		"record longer than what waits": {100, errRing},
		"record longer than the ring":   {1 << 29, errRing},
	} {
		r := newTestRing(4096)
		r.write(0, make([]byte, 16))
		binary.NativeEndian.PutUint32(r.data, tt.head)
		if got, _, err := r.next(r.produced()); got != nil || !errors.Is(err, tt.err) {
			t.Errorf("%s: %d bytes, %v; want none and %v", name, len(got), err, tt.err)
		}
	}
}

// The same with the kernel's ring: four pages, taken by a reader that keeps up
// or, on a busy machine, loses some; what it delivers is whole.
func TestRingWrapsInKernel(t *testing.T) {
	size := 4 * os.Getpagesize()
	r := load(t, Config{RingBytes: size, Kinds: event.KindSet(event.Exec)})
	prog := buildProg(t)
	l := newLog()
	ear := listen(t, r, l.add)
	const n = 200
	want := map[int32][]byte{}
	for i := range n {
		cmd := exec.Command(prog, "w", strconv.Itoa(i))
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		want[int32(cmd.Process.Pid)] = argv(cmd.Args...)
	}
	ear.close(t)
	if r.ring.pos < 3*uint64(size) {
		t.Fatalf("%d bytes went through a ring of %d: nothing was tested", r.ring.pos, size)
	}
	told := 0
	for _, e := range l.recs {
		if args := want[e.TGID]; args != nil {
			told++
			if !bytes.Equal(e.Cmdline, args) {
				t.Errorf("pid %d: argv %q, want %q", e.TGID, e.Cmdline, args)
			}
		}
	}
	if lost := total(r).Lost; told+int(lost) < n || r.Malformed() != 0 {
		t.Errorf("%d of %d execs delivered, %d lost, %d malformed", told, n, lost, r.Malformed())
	}
}

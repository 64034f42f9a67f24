package procconn

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// A serial names a message: the connector counts per CPU, before any filter.
type serial struct{ cpu, seq uint32 }

// markAll makes one COMM event on each CPU and returns the name it used.
func markAll(t *testing.T, name string) (cpus []int) {
	t.Helper()
	done := make(chan error, 1)
	onOwnThread(func() {
		var err error
		if cpus, _, err = usableCPUs(); err == nil {
			for _, n := range cpus {
				if err = pin(n); err == nil {
					err = setName(name)
				}
				if err != nil {
					break
				}
			}
		}
		done <- err
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return cpus
}

// marks finds the serials of the marks with a name.
type marks map[string]map[uint32]uint32 // name, CPU: seq

func (m marks) note(r *event.Record) {
	if r.Kind != event.CommChange || len(r.Comm) < 5 || string(r.Comm[:5]) != "mark-" {
		return
	}
	if m[string(r.Comm)] == nil {
		m[string(r.Comm)] = map[uint32]uint32{}
	}
	m[string(r.Comm)][r.CPU] = r.Seq
}

// between says whether a message lies between two marks of its CPU.
func (m marks) between(from, to string, s serial) bool {
	a, ok1 := m[from][s.cpu]
	b, ok2 := m[to][s.cpu]
	return ok1 && ok2 && s.seq-a-1 < b-a-1 // the counter wraps
}

// readTruth reads what a second socket with a large buffer queued.
func readTruth(t *testing.T, s *socket, n *counters) (all []Message) {
	t.Helper()
	recv := newReceiver(64)
	for {
		k, err := recv.receive(s.fd)
		if err != nil {
			t.Fatal(err)
		}
		if k == 0 {
			return all
		}
		for i := range k {
			if b, fromKernel := recv.datagram(i); fromKernel {
				var m Message
				if _, ok := n.decode(b, &m); !ok {
					t.Fatalf("malformed: %x", b)
				}
				all = append(all, m)
			}
		}
	}
}

// TestStorm: with buffers that are much too small and a Handler that is
// stuck, what is handed over and what is told as lost is what the kernel made,
// to the last message. The truth is what another socket heard. The storm has
// 5,000 processes and threads, 1,000 with -short, or 100,000 if PROCESSION_STORM
// is set.
func TestStorm(t *testing.T) {
	forks, threads := 1500, 3500
	if testing.Short() {
		forks, threads = 400, 600
	}
	if os.Getenv("PROCESSION_STORM") != "" {
		forks, threads = 10_000, 90_000
	}
	// Only between the marks is it known what was made. When somebody else's
	// storm overflows these small buffers before or after, the sum is of more.
	for try := 1; ; try++ {
		wrong := stormOnce(t, forks, threads)
		if wrong == "" {
			return
		}
		if try == 3 {
			t.Fatal(wrong)
		}
		t.Logf("try %d: %s", try, wrong)
	}
}

// stormOnce says what does not add up.
func stormOnce(t *testing.T, forks, threads int) (wrong string) {
	kinds := event.KindSet(event.Fork, event.Exit, event.CommChange)
	type side struct {
		name  string
		c     *Conn
		stop  func()
		w     *witness
		marks marks
		got   map[serial]bool
		slow  atomic.Bool
	}
	see := func(name string, cfg Config) *side {
		s := &side{name: name, w: newWitness(), marks: marks{}, got: map[serial]bool{}}
		n := 0
		s.w.keep = func(r *event.Record) bool {
			for n++; n%256 == 0 && s.slow.Load(); {
				time.Sleep(time.Millisecond) // stuck until the storm is over
			}
			s.w.note(func() {
				s.got[serial{r.CPU, r.Seq}] = true
				s.marks.note(r)
			})
			return false
		}
		cfg.Kinds, cfg.Heartbeat = kinds, time.Hour
		s.c, s.stop = watch(t, cfg, s.w)
		return s
	}
	sides := []*side{
		// Looks often: outside of the storm so small a ring is to lose nothing.
		see("recorder", Config{Recorder: Require, RingBytes: 64 << 10, DrainInterval: time.Millisecond}),
		see("fallback", Config{Recorder: Off, RcvBuf: 64 << 10}),
	}
	truth, err := openSocket("", 256<<20, attachClassic(bulkFilter(uint32(0), kinds)))
	if err != nil {
		t.Fatal(err)
	}
	defer truth.close()

	awaitMarks := func(s *side, name string) {
		t.Helper()
		// On a busy machine a mark itself may be lost: then it is made again.
		for range 100 {
			cpus := markAll(t, name)
			for range 20 {
				s.w.mu.Lock()
				ok := len(s.marks[name]) == len(cpus)
				s.w.mu.Unlock()
				if ok {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
		t.Fatalf("%s: no marks %s", s.name, name)
	}
	for _, s := range sides {
		awaitMarks(s, "mark-begin-"+s.name[:3])
		s.slow.Store(true)
	}
	begin := time.Now()
	runChild(t, child("storm", fmt.Sprint(forks), fmt.Sprint(threads)))
	took := time.Since(begin)
	for _, s := range sides {
		s.slow.Store(false)
	}
	for _, s := range sides {
		// Two rounds: when the second mark is there, everything lost before
		// the first was told.
		awaitMarks(s, "mark-end-"+s.name[:3])
		awaitMarks(s, "mark-told-"+s.name[:3])
		s.stop()
	}
	var n counters
	all := readTruth(t, truth, &n)
	if lost, _, err := truth.lost(monotonic()); err != nil || lost != 0 {
		t.Fatalf("the other socket lost %d, %v: no truth", lost, err)
	}
	for _, s := range sides {
		from, to := "mark-begin-"+s.name[:3], "mark-end-"+s.name[:3]
		made, got, acks, heard := 0, 0, 0, map[serial]bool{}
		for _, m := range all {
			at := serial{m.CPU, m.Seq}
			if !s.marks.between(from, to, at) {
				continue
			}
			made++
			heard[at] = true
			if m.What == WhatNone {
				acks++
			}
		}
		for at := range s.got {
			if s.marks.between(from, to, at) {
				got++
				if !heard[at] {
					t.Errorf("%s: handed over %+v, which the other socket did not hear", s.name, at)
				}
			}
		}
		lost := int(s.w.totalLost())
		t.Logf("%s: made %d in %v, handed over %d, lost %d, acknowledgements %d; %d threads were not to be seen",
			s.name, made, took.Round(time.Millisecond), got, lost, acks, threads)
		// An answer to another program's LISTEN may be among the lost or not.
		if d := made - got - lost; d < 0 || d > acks {
			wrong = fmt.Sprintf("%s: %d made, %d handed over + %d lost: %d missing", s.name, made, got, lost, d)
		}
		if lost == 0 {
			t.Errorf("%s: nothing was lost, so nothing was tested", s.name)
		}
		if made < 2*forks {
			t.Errorf("%s: %d messages for %d forks", s.name, made, forks)
		}
		st := s.c.Stats()
		if sum := st.Lost[LostRing] + st.Lost[LostSequence] + st.Lost[LostSocket] + st.Lost[LostQueue]; sum != uint64(lost) {
			t.Errorf("%s: Stats say %d lost, the Handler was told %d", s.name, sum, lost)
		}
	}
	return wrong
}

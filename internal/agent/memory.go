package agent

import (
	"context"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"time"

	"github.com/procession-dev/procession/internal/enrich/cgroup"
)

// When memory is given back: what was done once, a connection, new rules, a
// burst of events, should not stay resident for as long as the agent lives.
const (
	// settleLook is how often the resident memory is looked at: some 10 us.
	settleLook = 10 * time.Second
	// settleSoon is when it is looked at for the first time: by then the agent
	// has connected to a collector that is there.
	settleSoon = time.Second
	// settleGrowth is how many bytes it may have grown since memory was given
	// back last.
	settleGrowth = 3 << 20
	// settlePause is the least time between two collections of garbage for its
	// sake: one takes some 4 ms.
	settlePause = 30 * time.Second
)

// A settler gives memory back. The zero value does nothing.
//
// A start has stages of which each needs a lot for a moment: what Go's packages
// do before main, the compilation of rules, the kernel's types for the recorder.
// What one leaves is given back before the next, or the peak of the resident
// memory would be their sum.
type settler struct {
	log      *slog.Logger
	resident func() (int, error) // bytes; nil: nothing can be given back
	unmap    func() error        // pages of the program: they are in its file; 0.3 ms until those in use are mapped again
	collect  func()              // garbage, and what Go keeps for later

	floor     int       // resident when memory was given back last
	collected time.Time // zero: never
}

// stage is the end of a stage of the start that leaves little garbage.
func (s *settler) stage() {
	if s.resident != nil {
		s.say(s.unmap())
	}
}

// started is the end of the start: all that can be is given back.
//
// From here on garbage is collected when it is half as much as what is in use,
// not as much. The event path makes next to none (two collections in 10,000
// execs), so this costs nothing and leaves a third less of the heap resident; the
// start would take a tenth longer by it.
func (s *settler) started() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	s.say(s.look(time.Now()))
}

// run gives memory back from time to time, after started.
func (s *settler) run(ctx context.Context) {
	tick := time.NewTicker(settleSoon)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			tick.Reset(settleLook)
			s.say(s.look(now))
		}
	}
}

// look gives back what has come since the last time: first what costs little.
func (s *settler) look(now time.Time) error {
	if s.resident == nil {
		return nil
	}
	is, err := s.resident()
	if err != nil || !s.collected.IsZero() && is <= s.floor+settleGrowth {
		return err
	}
	if err := s.unmap(); err != nil {
		return err
	}
	if is, err = s.resident(); err != nil {
		return err
	}
	if s.collected.IsZero() || is > s.floor+settleGrowth && now.Sub(s.collected) >= settlePause {
		s.collected = now
		s.collect()
		if is, err = s.resident(); err != nil {
			return err
		}
		s.floor = is
	}
	s.floor = min(s.floor, is)
	return nil
}

// say tells of a failure. It costs nothing but memory, and is not tried again.
func (s *settler) say(err error) {
	if err != nil {
		s.log.Debug("memory that is not needed is kept", "err", err)
		s.resident = nil
	}
}

// A cgroup's limit counts more than what Go manages.
const (
	// besideGo is what it counts beyond that: the kernel's ring (4 MiB), maps and
	// page tables, and what the program has written of its own data.
	besideGo = 8 << 20
	// leastForGo is more than twice what an agent in a cluster needs at rest. With
	// less Go would collect garbage all the time, for memory that is in use.
	leastForGo = 32 << 20
)

// limitMemory has Go collect garbage more often before the kernel kills the
// agent for its cgroup's limit, where the operator (GOMEMLIMIT) has not.
func limitMemory(log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	of, err := cgroup.MemoryLimit()
	if err != nil {
		log.Warn("the agent does not know how much memory it may use", "err", err)
	}
	if n := goLimit(of); n > 0 {
		debug.SetMemoryLimit(n)
	}
}

// goLimit is the soft limit of Go's memory, in bytes, in a cgroup that may use
// so much; 0 is none.
func goLimit(cgroup int64) int64 {
	if cgroup <= 0 {
		return 0
	}
	return max(leastForGo, cgroup-cgroup/10-besideGo)
}

// memoryLimit is the limit in force, for the log; 0 is none.
func memoryLimit() int64 {
	if n := debug.SetMemoryLimit(-1); n < math.MaxInt64 {
		return n
	}
	return 0
}

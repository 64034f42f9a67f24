package agent

import (
	"context"
	"time"
)

// When memory is given back: what was done once, a start, a connection, new
// rules, a burst of events, should not stay resident for as long as the agent
// lives.
const (
	// settleLook is how often the resident memory is looked at: some 10 us.
	settleLook = 10 * time.Second
	// settleGrowth is how many bytes it may have grown since memory was given
	// back last.
	settleGrowth = 3 << 20
	// settlePause is the least time between two collections of garbage for its
	// sake: one takes some 4 ms.
	settlePause = 30 * time.Second
)

// A settler gives memory back.
type settler struct {
	resident func() (int, error) // bytes
	unmap    func() error        // pages of the program: they are in its file; 0.3 ms until those in use are mapped again
	collect  func()              // garbage, and what Go keeps for later

	floor     int       // resident when memory was given back last
	collected time.Time // zero: never
}

// look gives back what has come since the last time: first what costs little.
func (s *settler) look(now time.Time) error {
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

// settle gives memory back when the start is over, and from time to time after
// that. A failure costs nothing but memory.
func (a *agent) settle(ctx context.Context) {
	s, err := newSettler()
	if err == nil {
		defer s.close()
		tick := time.NewTicker(settleLook)
		defer tick.Stop()
		for err = s.look(time.Now()); err == nil; {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				err = s.look(now)
			}
		}
	}
	a.log.Debug("memory that is not needed is kept", "err", err)
}

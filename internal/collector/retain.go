package collector

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
)

// trimChunk is how many records go in one transaction: agents wait behind it.
const trimChunk = 500

// A janitor removes old records: those older than keep, and the oldest while
// the store is larger than bytes. What a sink does not have yet stays, until
// the store is twice as large. What is old only the wall clock knows: nothing
// is removed by age before it has been steady for an hour.
type janitor struct {
	st    store.Store
	queue *store.Queue
	sinks []*sink.Runner
	keep  time.Duration // 0: for ever
	bytes int64         // 0: no bound
	every time.Duration
	log   *slog.Logger

	clock steadiness

	trimmed *prometheus.CounterVec
	unsent  prometheus.Counter
}

func newJanitor(c *Collector) *janitor {
	j := &janitor{st: c.st, queue: c.queue, sinks: c.sinks, keep: c.cfg.Keep, bytes: c.cfg.KeepBytes, every: time.Minute, log: c.cfg.Log,
		trimmed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_trimmed_records_total",
			Help: "Old records removed from the store, by why: age (--keep) or bytes (--keep-bytes)."}, []string{"reason"}),
		unsent: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_trimmed_unsent_total",
			Help: "Of these, removed before every sink had them: the store had grown to twice its bound while a sink was away. Not zero: that sink will never have them."}),
	}
	j.trimmed.WithLabelValues("age")
	j.trimmed.WithLabelValues("bytes")
	size := func(free bool) func() float64 {
		return func() float64 {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			used, unused, err := j.st.Size(ctx)
			if err != nil {
				return -1
			}
			if free {
				return float64(unused)
			}
			return float64(used)
		}
	}
	c.reg.MustRegister(j.trimmed, j.unsent, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "procession_collector_store_bytes", Help: "What records take in the store, about. -1: it cannot be asked."}, size(false)),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "procession_collector_store_free_bytes", Help: "Room in the database's file that will be used again."}, size(true)))
	return j
}

// run cleans until ctx ends.
func (j *janitor) run(ctx context.Context) {
	if j.keep == 0 && j.bytes == 0 {
		return
	}
	tick := time.NewTicker(j.every)
	defer tick.Stop()
	failing := false
	start := time.Now()
	for {
		now := time.Now()
		steady, jump := j.clock.look(now, now.Sub(start))
		if jump != 0 {
			j.log.Warn("the clock was set; no record is removed by age for a while", slog.Duration("by", jump), slog.Duration("for", steadyFor))
		}
		err := j.clean(ctx, now, steady >= steadyFor)
		if ctx.Err() != nil || errors.Is(err, store.ErrClosed) {
			return
		}
		if err != nil && !failing {
			j.log.Warn("old records cannot be removed", slog.Any("err", err))
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// steadyFor is how long the wall clock must have gone evenly until it is
// believed, after a start as well: a clock that is ahead by months for the
// minutes until a time server answers would empty the store.
const steadyFor = time.Hour

// jumpOver is what two looks at the wall clock may differ by from the time
// between them. What is slewed, or lost to a virtual machine that was paused
// for a moment, is less.
const jumpOver = time.Minute

// A steadiness compares the wall clock with one that does not jump.
type steadiness struct {
	wall  time.Time // at the last look
	up    time.Duration
	since time.Duration // on the clock of up
}

// look returns how long the wall clock has been steady, and by how much it was
// set since the last look, 0 if it was not.
func (s *steadiness) look(wall time.Time, up time.Duration) (steady, jump time.Duration) {
	wall = wall.Round(0) // a difference by the wall clock, not by the other one
	first := s.wall.IsZero()
	jump = wall.Sub(s.wall) - (up - s.up)
	if first || jump.Abs() <= jumpOver {
		jump = 0
	}
	if first || jump != 0 {
		s.since = up
	}
	s.wall, s.up = wall, up
	return up - s.since, jump
}

// clean removes what has to go now, by age only if the clock is believed.
func (j *janitor) clean(ctx context.Context, now time.Time, byAge bool) error {
	floor, err := j.taken(ctx)
	if err != nil {
		return err
	}
	if byAge && j.keep > 0 {
		old, err := j.st.CursorAt(ctx, now.Add(-j.keep))
		if err != nil {
			return err
		}
		if err := j.trim(ctx, min(old, floor), "age", func(int64) int64 { return math.MaxInt64 }); err != nil {
			return err
		}
	}
	if j.bytes == 0 {
		return nil
	}
	head, err := j.st.Head(ctx)
	if err != nil {
		return err
	}
	if err := j.trim(ctx, min(head, floor), "bytes", func(used int64) int64 { return used - j.bytes }); err != nil {
		return err
	}
	return j.trim(ctx, head, "bytes", func(used int64) int64 { return used - 2*j.bytes })
}

// taken is the cursor up to which every sink has everything.
func (j *janitor) taken(ctx context.Context) (int64, error) {
	head, err := j.st.Head(ctx)
	if err != nil {
		return 0, err
	}
	all, err := j.st.Sinks(ctx)
	if err != nil {
		return 0, err
	}
	for _, r := range j.sinks {
		at := all[r.Name()].Cursor // as stored: what is only in memory may be delivered again
		head = min(head, at)
	}
	return head, nil
}

// trim removes the oldest records up to a cursor, while by the store's size
// there are bytes in excess.
func (j *janitor) trim(ctx context.Context, upTo int64, reason string, excess func(used int64) int64) error {
	for {
		used, _, err := j.st.Size(ctx)
		if err != nil || excess(used) <= 0 {
			return err
		}
		head, err := j.st.Head(ctx)
		if err != nil {
			return err
		}
		floor, err := j.taken(ctx)
		if err != nil {
			return err
		}
		oldest, err := j.st.Read(ctx, nil, 0, 1)
		if err != nil || len(oldest) == 0 || oldest[0].Cursor > upTo {
			return err
		}
		unsent, end := oldest[0].Cursor > floor, upTo
		if !unsent {
			end = min(upTo, floor) // what not all sinks have goes by itself, and is told
		}
		each := used/max(1, head-oldest[0].Cursor+1) + 1 // bytes, about
		limit := max(1, min(trimChunk, excess(used)/each))
		res, err := j.queue.Do(ctx, &store.Trim{UpTo: end, Limit: int(limit)})
		if err != nil || res.Trimmed == 0 {
			return err
		}
		j.trimmed.WithLabelValues(reason).Add(float64(res.Trimmed))
		if unsent {
			j.unsent.Add(float64(res.Trimmed))
			j.log.Error("records were removed before every sink had them: the store is twice as large as --keep-bytes", slog.Int("records", res.Trimmed))
		}
	}
}

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
// the store is twice as large.
type janitor struct {
	st    store.Store
	queue *store.Queue
	sinks []*sink.Runner
	keep  time.Duration // 0: for ever
	bytes int64         // 0: no bound
	every time.Duration
	log   *slog.Logger

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
	for {
		err := j.clean(ctx, time.Now())
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

// clean removes what has to go now.
func (j *janitor) clean(ctx context.Context, now time.Time) error {
	floor, err := j.taken(ctx)
	if err != nil {
		return err
	}
	if j.keep > 0 {
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

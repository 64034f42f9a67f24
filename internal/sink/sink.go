package sink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/store"
)

// A Sink is a destination.
type Sink interface {
	// Deliver returns nil when the destination has all of recs for good. After
	// an error the same records, perhaps with more behind them, come again.
	Deliver(ctx context.Context, recs []store.Record) error
}

// A Resumer is a Sink that can tell from its destination what that has, and so
// takes nothing twice after a crash.
type Resumer interface {
	// Resume is called before the first Deliver, again after an error. read
	// gives the records above a cursor as store.Store does. It returns the
	// cursor of the last record the destination has, at least from.
	Resume(ctx context.Context, from int64, read ReadFunc) (cursor int64, err error)
}

// ReadFunc is store.Store's Read.
type ReadFunc func(ctx context.Context, dst []store.Record, after int64, limit int) ([]store.Record, error)

// ErrGone is returned by a Sink whose destination will not come back as long
// as the process lives, as a closed terminal. Its Runner ends.
var ErrGone = errors.New("destination is gone")

// Reader is the part of a store a Runner reads.
type Reader interface {
	Read(ctx context.Context, dst []store.Record, after int64, limit int) ([]store.Record, error)
	Head(ctx context.Context) (int64, error)
	SinkCursor(ctx context.Context, sink string) (cursor int64, ok bool, err error)
}

// Config configures a Runner.
type Config struct {
	Name  string // of the cursor, and in metrics; must stay the same for ever
	Sink  Sink
	Store Reader
	Queue *store.Queue

	// FromNow starts a sink that has no cursor yet behind what the store has;
	// otherwise it starts with the oldest record.
	FromNow bool

	Batch    int           // most records of one Deliver; 0 is 256
	MinPause time.Duration // after the first failure; 0 is 100 ms
	MaxPause time.Duration // after many; 0 is 30 s

	Log *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if c.Name == "" || c.Sink == nil || c.Store == nil || c.Queue == nil {
		return c, errors.New("sink: name, sink, store and queue must be set")
	}
	if c.Batch == 0 {
		c.Batch = 256
	}
	if c.MinPause == 0 {
		c.MinPause = 100 * time.Millisecond
	}
	if c.MaxPause == 0 {
		c.MaxPause = 30 * time.Second
	}
	if c.Batch < 1 || c.MinPause < 0 || c.MaxPause < c.MinPause {
		return c, fmt.Errorf("sink %s: batch %d, pauses %v to %v", c.Name, c.Batch, c.MinPause, c.MaxPause)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Log = c.Log.With(slog.String("sink", c.Name))
	return c, nil
}

// A Runner feeds one sink.
type Runner struct {
	cfg Config
	m   *Metrics

	cursor atomic.Int64  // what the sink has; only Run moves it
	ended  chan struct{} // closed when Run has returned

	moved *store.Ticket // the last cursor on its way to the store; only Run

	mu    sync.Mutex
	moves chan struct{} // closed and replaced when cursor moves; guarded by mu
}

// New returns a Runner; m is shared by all.
func New(cfg Config, m *Metrics) (*Runner, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	r := &Runner{cfg: cfg, m: m, ended: make(chan struct{}), moves: make(chan struct{})}
	if err := m.add(r); err != nil {
		return nil, fmt.Errorf("sink %s: %w", cfg.Name, err)
	}
	return r, nil
}

// Cursor is that of the last record the sink has.
func (r *Runner) Cursor() int64 { return r.cursor.Load() }

// Name is the Config's.
func (r *Runner) Name() string { return r.cfg.Name }

// Run delivers until ctx ends. A record whose delivery ctx cut short is
// delivered again by the next Run.
func (r *Runner) Run(ctx context.Context) error {
	defer close(r.ended)
	err := r.start(ctx)
	var recs []store.Record
	for err == nil {
		changed := r.cfg.Queue.Changed() // before reading, or a commit in between would be missed
		if recs, err = r.read(ctx, recs[:0]); err != nil {
			break
		}
		if len(recs) == 0 {
			select {
			case <-changed:
			case <-ctx.Done():
				return r.stop(ctx.Err())
			}
			continue
		}
		if err = r.deliver(ctx, recs); err == nil {
			r.move(recs[len(recs)-1].Cursor)
			err = r.save(ctx)
		}
		clear(recs) // payloads
	}
	return r.stop(err)
}

func (r *Runner) move(cursor int64) {
	r.cursor.Store(cursor)
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.moves)
	r.moves = make(chan struct{})
}

// WaitFor waits until the sink has everything up to the cursor. It returns
// false if ctx or Run ended before.
func (r *Runner) WaitFor(ctx context.Context, cursor int64) bool {
	for {
		r.mu.Lock()
		moves := r.moves
		r.mu.Unlock()
		if r.Cursor() >= cursor {
			return true
		}
		select {
		case <-moves:
		case <-r.ended:
			return r.Cursor() >= cursor
		case <-ctx.Done():
			return false
		}
	}
}

// stop: being asked to stop is no error, and a sink that is gone ends alone.
func (r *Runner) stop(err error) error {
	switch {
	case errors.Is(err, ErrGone):
		r.cfg.Log.Warn("sink ended; what follows is in the store", slog.Any("err", err))
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, store.ErrClosed):
		return nil
	}
	return fmt.Errorf("sink %s: %w", r.cfg.Name, err)
}

// start finds where to begin.
func (r *Runner) start(ctx context.Context) error {
	return r.retry(ctx, "find the sink's place", func() error {
		from, ok, err := r.cfg.Store.SinkCursor(ctx, r.cfg.Name)
		if err != nil {
			return err
		}
		if !ok && r.cfg.FromNow {
			if from, err = r.cfg.Store.Head(ctx); err != nil {
				return err
			}
			// Stored at once: after a crash before the first delivery "now"
			// would be another, and what came meanwhile be left out.
			if _, err := r.cfg.Queue.Do(ctx, &store.SinkMoved{Sink: r.cfg.Name, Cursor: from}); err != nil {
				return err
			}
		}
		if s, ok := r.cfg.Sink.(Resumer); ok {
			if from, err = s.Resume(ctx, from, r.cfg.Store.Read); err != nil {
				return err
			}
		}
		r.move(from)
		return nil
	})
}

func (r *Runner) read(ctx context.Context, recs []store.Record) ([]store.Record, error) {
	err := r.retry(ctx, "read the store", func() (err error) {
		recs, err = r.cfg.Store.Read(ctx, recs[:0], r.cursor.Load(), r.cfg.Batch)
		return err
	})
	return recs, err
}

func (r *Runner) deliver(ctx context.Context, recs []store.Record) error {
	start := time.Now()
	err := r.retry(ctx, "deliver", func() error { return r.cfg.Sink.Deliver(ctx, recs) })
	if err != nil {
		return err
	}
	r.m.seconds.WithLabelValues(r.cfg.Name).Observe(time.Since(start).Seconds())
	for i := range recs {
		r.m.delivered.WithLabelValues(r.cfg.Name, recs[i].Kind.String()).Inc()
	}
	return nil
}

// save moves the cursor in the store. It does not wait: the commit queue is
// the agents', and a cursor that is behind costs only a second delivery. One
// move at a time is under way; a later one covers all before it.
func (r *Runner) save(ctx context.Context) error {
	if r.moved != nil {
		select {
		case <-r.moved.Done():
			if _, err := r.moved.Result(); err != nil {
				r.m.errors.WithLabelValues(r.cfg.Name, "cursor").Inc()
			}
		default:
			return nil
		}
	}
	t, err := r.cfg.Queue.Submit(ctx, &store.SinkMoved{Sink: r.cfg.Name, Cursor: r.cursor.Load()})
	if err != nil {
		return err
	}
	r.moved = t
	return nil
}

// Flush stores the cursor, after Run has ended.
func (r *Runner) Flush(ctx context.Context) error {
	at := r.cursor.Load()
	if at == 0 {
		return nil
	}
	if _, err := r.cfg.Queue.Do(ctx, &store.SinkMoved{Sink: r.cfg.Name, Cursor: at}); err != nil {
		return fmt.Errorf("store the cursor of sink %s: %w", r.cfg.Name, err)
	}
	return nil
}

// retry calls f until it works or ctx ends. It logs when trouble begins and
// when it is over.
func (r *Runner) retry(ctx context.Context, doing string, f func() error) error {
	for n := 0; ; n++ {
		err := f()
		if err == nil {
			if n > 0 {
				r.cfg.Log.Info("sink works again", slog.String("doing", doing), slog.Int("tries", n+1))
			}
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ErrGone) {
			return err
		}
		r.m.errors.WithLabelValues(r.cfg.Name, "failed").Inc()
		if n == 0 {
			r.cfg.Log.Warn("sink fails; it is tried again until it works", slog.String("doing", doing), slog.Any("err", err))
		}
		pause := time.NewTimer(r.pause(n))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return ctx.Err()
		}
	}
}

// pause after the nth failure: it doubles, and is spread between half and all.
func (r *Runner) pause(n int) time.Duration {
	d := r.cfg.MaxPause
	if n < 32 && r.cfg.MinPause<<n > 0 {
		d = min(d, r.cfg.MinPause<<n)
	}
	return d/2 + rand.N(d/2+1)
}

// Metrics of all sinks.
type Metrics struct {
	delivered *prometheus.CounterVec
	errors    *prometheus.CounterVec
	seconds   *prometheus.HistogramVec
	reg       prometheus.Registerer
}

// NewMetrics makes them; a nil registerer keeps them to itself.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		reg: reg,
		delivered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_sink_delivered_total",
			Help: "Records a sink said it has, by kind."}, []string{"sink", "kind"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_sink_errors_total",
			Help: "Failed tries. failed: the sink or a read for it; it is tried again. cursor: the store did not take the sink's place; after a crash records may come twice."},
			[]string{"sink", "what"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "procession_collector_sink_seconds",
			Help:    "Time until a sink had taken a group of records, with all tries.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10)}, []string{"sink"}),
	}
	if reg != nil {
		reg.MustRegister(m.delivered, m.errors, m.seconds)
	}
	return m
}

func (m *Metrics) add(r *Runner) error {
	m.errors.WithLabelValues(r.cfg.Name, "failed")
	m.errors.WithLabelValues(r.cfg.Name, "cursor")
	if m.reg == nil {
		return nil
	}
	return m.reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "procession_collector_sink_lag_records",
		Help:        "Stored records a sink does not have yet. Growing: the sink is slow or fails. -1: the store cannot be asked.",
		ConstLabels: prometheus.Labels{"sink": r.cfg.Name},
	}, func() float64 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		head, err := r.cfg.Store.Head(ctx)
		if err != nil {
			return -1
		}
		return float64(max(0, head-r.cursor.Load()))
	}))
}

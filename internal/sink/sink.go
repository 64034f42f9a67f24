package sink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
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

// A DeliveryError is returned by a Sink that knows more than that it failed.
type DeliveryError struct {
	Done       int           // records at the front that the destination has
	Refused    bool          // the one behind them will never be taken: it becomes a dead letter
	RetryAfter time.Duration // how long the destination wants to be left alone; 0 did not say
	Err        error
}

func (e *DeliveryError) Error() string { return e.Err.Error() }
func (e *DeliveryError) Unwrap() error { return e.Err }

// Reader is the part of a store a Runner reads.
type Reader interface {
	Read(ctx context.Context, dst []store.Record, after int64, limit int) ([]store.Record, error)
	Head(ctx context.Context) (int64, error)
	Sinks(ctx context.Context) (map[string]store.SinkState, error)
}

// Config configures a Runner.
type Config struct {
	Name   string // of the cursor, and in metrics; must stay the same for ever
	Sink   Sink
	Filter Filter // of what is delivered; the rest is passed by
	Store  Reader
	Queue  *store.Queue

	// Owner is this process's name, where several share a store: the sink runs
	// in the one that has its lease. "" is for a store nobody shares.
	Owner    string
	LeaseFor time.Duration // 0 is 15 s

	// FromNow starts a sink that has no cursor yet behind what the store has;
	// otherwise it starts with the oldest record.
	FromNow bool

	Batch    int           // most records of one Deliver; 0 is 256
	MinPause time.Duration // after the first failure; 0 is 100 ms
	MaxPause time.Duration // after many; 0 is 30 s
	Poll     time.Duration // how often the store is looked at when nothing is committed here; 0 is 2 s

	Log *slog.Logger
}

// maxRetryAfter bounds what a destination can ask for.
const maxRetryAfter = time.Hour

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
	if c.LeaseFor == 0 {
		c.LeaseFor = 15 * time.Second
	}
	if c.Poll == 0 {
		c.Poll = 2 * time.Second
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

	// Of Run alone.
	started bool          // cursor and replay are what the store says
	replay  int64         // store.SinkState.Replay, as of the start
	until   time.Time     // end of the lease
	moved   *store.Ticket // the last cursor on its way to the store
	saved   int64         // the cursor in it
	fails   int           // failures in a row: how long the next pause is
	failing int           // failures since trouble was logged; 0: none is
	recs    []store.Record
	kept    []store.Record // those of recs that pass the filter

	mu     sync.Mutex
	moves  chan struct{} // closed and replaced when cursor moves; guarded by mu
	status Status        // guarded by mu
}

// Status says how a sink stands.
type Status struct {
	Running bool      // false: another process has the lease, or it has ended
	Err     string    // why the last try failed; "" when it did not
	Since   time.Time // of Err: the first of the failures in a row
	Behind  time.Time // when the oldest record that was not taken yet was committed; zero for none
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

// Status takes a snapshot.
func (r *Runner) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

func (r *Runner) tell(change func(*Status)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.status)
}

// Cursor is that of the last record the sink has.
func (r *Runner) Cursor() int64 { return r.cursor.Load() }

// Name is the Config's.
func (r *Runner) Name() string { return r.cfg.Name }

// Run delivers until ctx ends. A record whose delivery ctx cut short is
// delivered again by the next Run.
func (r *Runner) Run(ctx context.Context) error {
	defer close(r.ended)
	defer r.tell(func(s *Status) { s.Running = false })
	for {
		idle, err := r.step(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrGone):
			r.cfg.Log.Warn("sink ended; what follows is in the store", slog.Any("err", err))
			return nil
		case errors.Is(err, store.ErrClosed):
			return nil
		case err != nil:
			r.failed(ctx, err)
		case idle != nil:
			wait(ctx, r.cfg.Poll, idle)
		}
	}
}

// step does one thing: take the lease, find the place, or deliver once. idle is
// not nil when there is nothing to do until it is closed, or for a while.
func (r *Runner) step(ctx context.Context) (idle <-chan struct{}, err error) {
	changed := r.cfg.Queue.Changed() // before looking, or a commit in between would be missed
	if ok, err := r.hold(ctx); err != nil || !ok {
		return changed, err
	}
	if !r.started {
		if err := r.start(ctx); err != nil {
			return nil, fmt.Errorf("find the sink's place: %w", err)
		}
	}
	if r.recs, err = r.cfg.Store.Read(ctx, r.recs[:0], r.cursor.Load(), r.cfg.Batch); err != nil {
		return nil, fmt.Errorf("read the store: %w", err)
	}
	if len(r.recs) == 0 {
		r.works()
		if err := r.skipGone(ctx); err != nil {
			return nil, err
		}
		if err := r.settle(ctx); err != nil {
			return nil, err
		}
		return changed, r.look(ctx)
	}
	r.tell(func(s *Status) { s.Behind = r.recs[0].Committed })
	defer func() { clear(r.recs); clear(r.kept) }() // payloads
	return nil, r.deliver(ctx)
}

// hold sees to it that this process has the lease.
func (r *Runner) hold(ctx context.Context) (bool, error) {
	now := time.Now()
	if r.cfg.Owner == "" || r.until.Sub(now) > r.cfg.LeaseFor*2/3 {
		r.tell(func(s *Status) { s.Running = true })
		return true, nil
	}
	res, err := r.cfg.Queue.Do(ctx, &store.Lease{Name: store.SinkLease(r.cfg.Name), Owner: r.cfg.Owner, For: r.cfg.LeaseFor})
	if err != nil {
		return false, fmt.Errorf("take the lease: %w", err)
	}
	if res.Stale || now.After(r.until) {
		r.started = false // somebody else may have moved it
	}
	if res.Stale {
		r.tell(func(s *Status) { *s = Status{} })
		return false, nil
	}
	r.until = now.Add(r.cfg.LeaseFor)
	r.tell(func(s *Status) { s.Running = true })
	return true, nil
}

// start finds where to begin.
func (r *Runner) start(ctx context.Context) error {
	all, err := r.cfg.Store.Sinks(ctx)
	if err != nil {
		return err
	}
	at, known := all[r.cfg.Name]
	from := at.Cursor
	if !known && r.cfg.FromNow {
		if from, err = r.cfg.Store.Head(ctx); err != nil {
			return err
		}
		// Stored at once: after a crash before the first delivery "now"
		// would be another, and what came meanwhile be left out.
		res, err := r.cfg.Queue.Do(ctx, &store.SinkMoved{Sink: r.cfg.Name, Cursor: from, Owner: r.cfg.Owner})
		if err != nil {
			return err
		}
		if res.Stale {
			return errors.New("sent elsewhere meanwhile")
		}
	}
	if s, ok := r.cfg.Sink.(Resumer); ok && at.Replay == r.replay {
		if from, err = s.Resume(ctx, from, r.readKept); err != nil {
			return err
		}
	}
	r.replay, r.started, r.saved = at.Replay, true, from
	r.move(from)
	return nil
}

// look asks whether somebody sent the sink elsewhere.
func (r *Runner) look(ctx context.Context) error {
	all, err := r.cfg.Store.Sinks(ctx)
	if err != nil {
		return fmt.Errorf("read the store: %w", err)
	}
	if at, ok := all[r.cfg.Name]; ok && at.Replay != r.replay {
		r.sentTo(at)
	}
	return nil
}

func (r *Runner) sentTo(at store.SinkState) {
	r.cfg.Log.Info("sink was sent elsewhere", slog.Int64("from", r.cursor.Load()), slog.Int64("to", at.Cursor))
	r.moved = nil // of the old place: what becomes of it says nothing
	r.replay, r.saved = at.Replay, at.Cursor
	r.move(at.Cursor)
}

// readKept is Read of what passes the filter.
func (r *Runner) readKept(ctx context.Context, dst []store.Record, after int64, limit int) ([]store.Record, error) {
	for n := len(dst); len(dst) == n; {
		all, err := r.cfg.Store.Read(ctx, nil, after, limit)
		if err != nil || len(all) == 0 {
			return dst, err
		}
		for i := range all {
			if r.cfg.Filter.Match(&all[i]) {
				dst = append(dst, all[i])
			}
		}
		after = all[len(all)-1].Cursor
	}
	return dst, nil
}

// deliver offers what was read, once, and notes how far that came.
func (r *Runner) deliver(ctx context.Context) error {
	r.kept = r.kept[:0]
	for i := range r.recs {
		if r.cfg.Filter.Match(&r.recs[i]) {
			r.kept = append(r.kept, r.recs[i])
		}
	}
	var err error
	if len(r.kept) > 0 {
		if r.cfg.Owner != "" { // nothing of ours may arrive after the next owner began
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, r.until)
			defer cancel()
		}
		start := time.Now()
		err = r.cfg.Sink.Deliver(ctx, r.kept)
		r.m.seconds.WithLabelValues(r.cfg.Name).Observe(time.Since(start).Seconds())
	}
	if err == nil {
		r.works()
		return r.passed(ctx, len(r.kept), nil)
	}
	de, ok := errors.AsType[*DeliveryError](err)
	if !ok {
		return err
	}
	if de.Done < 0 || de.Done > len(r.kept) || de.Refused && de.Done == len(r.kept) {
		return fmt.Errorf("sink says that it has %d of %d records: %w", de.Done, len(r.kept), err)
	}
	if de.Done > 0 || de.Refused {
		r.fails = 0
		var refused error
		if de.Refused {
			refused = de.Err
		}
		if perr := r.passed(ctx, de.Done, refused); perr != nil || de.Refused {
			return perr
		}
	}
	return err
}

// passed notes that the first done of kept are delivered and, if refused is not
// nil, that the one behind them never will be.
func (r *Runner) passed(ctx context.Context, done int, refused error) error {
	name := r.cfg.Name
	for i := range r.kept[:done] {
		r.m.delivered.WithLabelValues(name, r.kept[i].Kind.String()).Inc()
	}
	end := len(r.recs) // of what is passed: everything, or up to the first that is not
	through := done
	if refused != nil {
		through++
	}
	if through < len(r.kept) {
		for end = 0; r.recs[end].Cursor != r.kept[through].Cursor; end++ {
		}
	}
	if end == 0 {
		return nil
	}
	r.m.filtered.WithLabelValues(name).Add(float64(end - through))
	if refused == nil {
		r.move(r.recs[end-1].Cursor)
		return r.save(ctx)
	}
	bad := &r.kept[done]
	r.m.dead.WithLabelValues(name).Inc()
	r.cfg.Log.Error("the destination refuses a record for good; it is kept as a dead letter",
		slog.String("node", bad.Node), slog.String("epoch", bad.Epoch.String()), slog.Uint64("seq", bad.Seq), slog.Any("err", refused))
	r.move(r.recs[end-1].Cursor)
	// Waited for: a crash must not forget that it was not delivered.
	res, err := r.cfg.Queue.Do(ctx, r.movedTo(store.Dead{Cursor: bad.Cursor, Reason: cutReason(refused)}))
	return r.settled(res, err)
}

func (r *Runner) movedTo(dead ...store.Dead) *store.SinkMoved {
	return &store.SinkMoved{Sink: r.cfg.Name, Cursor: r.cursor.Load(), Replay: r.replay, Owner: r.cfg.Owner, Dead: dead}
}

// maxReason bounds the text kept with a dead letter.
const maxReason = 512

func cutReason(err error) string {
	s := err.Error()
	return strings.ToValidUTF8(s[:min(len(s), maxReason)], "")
}

// settled is what became of a cursor on its way to the store.
func (r *Runner) settled(res store.Result, err error) error {
	if err != nil {
		r.m.errors.WithLabelValues(r.cfg.Name, "cursor").Inc()
		if errors.Is(err, store.ErrClosed) {
			return err
		}
		return nil
	}
	if res.Stale { // the lease is gone, or the sink was sent elsewhere
		r.until, r.started = time.Time{}, false
	}
	return nil
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

// save moves the cursor in the store. It does not wait: the commit queue is
// the agents', and a cursor that is behind costs only a second delivery. One
// move at a time is under way; a later one covers all before it.
func (r *Runner) save(ctx context.Context) error {
	if r.moved != nil {
		select {
		case <-r.moved.Done():
			was := r.moved
			r.moved = nil
			if err := r.settled(was.Result()); err != nil || !r.started {
				return err
			}
		default:
			return nil
		}
	}
	m := r.movedTo()
	t, err := r.cfg.Queue.Submit(ctx, m)
	if err != nil {
		return err
	}
	r.moved, r.saved = t, m.Cursor
	return nil
}

// skipGone moves the cursor over records that were removed from the store
// before the sink had them: there is nothing more to wait for.
func (r *Runner) skipGone(ctx context.Context) error {
	head, err := r.cfg.Store.Head(ctx)
	if err != nil {
		return fmt.Errorf("read the store: %w", err)
	}
	if head <= r.cursor.Load() {
		return nil
	}
	// In this order: what was committed after the head was read is above it.
	if r.recs, err = r.cfg.Store.Read(ctx, r.recs[:0], r.cursor.Load(), 1); err != nil || len(r.recs) > 0 {
		return err
	}
	r.move(head)
	return nil
}

// settle stores the cursor when nothing more is coming, so that a crash while
// it is quiet repeats nothing.
func (r *Runner) settle(ctx context.Context) error {
	if r.saved == r.cursor.Load() {
		return nil
	}
	if r.moved != nil {
		select {
		case <-r.moved.Done():
		case <-r.moved.Stopped():
			return store.ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return r.save(ctx)
}

// Flush stores the cursor and gives the lease back, after Run has ended.
func (r *Runner) Flush(ctx context.Context) error {
	if !r.started {
		return nil
	}
	if _, err := r.cfg.Queue.Do(ctx, r.movedTo()); err != nil {
		return fmt.Errorf("store the cursor of sink %s: %w", r.cfg.Name, err)
	}
	if r.cfg.Owner == "" {
		return nil
	}
	_, err := r.cfg.Queue.Do(ctx, &store.Lease{Name: store.SinkLease(r.cfg.Name), Owner: r.cfg.Owner})
	return err
}

// failed counts a failure and waits. It logs when trouble begins and when it
// is over, not each try.
func (r *Runner) failed(ctx context.Context, err error) {
	r.m.errors.WithLabelValues(r.cfg.Name, "failed").Inc()
	if r.failing++; r.failing == 1 {
		r.cfg.Log.Warn("sink fails; it is tried again until it works", slog.Any("err", err))
	}
	r.tell(func(s *Status) {
		if s.Err == "" {
			s.Since = time.Now()
		}
		s.Err = err.Error()
	})
	d := r.pause(r.fails)
	r.fails++
	if de, ok := errors.AsType[*DeliveryError](err); ok {
		d = max(d, min(de.RetryAfter, maxRetryAfter))
	}
	wait(ctx, d, nil)
}

func (r *Runner) works() {
	if r.failing > 0 {
		r.cfg.Log.Info("sink works again", slog.Int("failures", r.failing))
	}
	r.fails, r.failing = 0, 0
	r.tell(func(s *Status) { s.Err, s.Since, s.Behind = "", time.Time{}, time.Time{} })
}

// wait for a while, until early is closed, or until ctx ends.
func wait(ctx context.Context, d time.Duration, early <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-early:
	case <-ctx.Done():
	}
}

// pause after the nth failure: anything up to a limit that doubles, so that
// many who failed together do not come back together.
func (r *Runner) pause(n int) time.Duration {
	d := r.cfg.MaxPause
	if n < 32 && r.cfg.MinPause<<n > 0 {
		d = min(d, r.cfg.MinPause<<n)
	}
	return rand.N(d + 1)
}

// Metrics of all sinks.
type Metrics struct {
	delivered *prometheus.CounterVec
	filtered  *prometheus.CounterVec
	dead      *prometheus.CounterVec
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
		filtered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_sink_filtered_total",
			Help: "Records a sink's filter passed by. With delivered and dead they are all it has come past."}, []string{"sink"}),
		dead: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_sink_dead_total",
			Help: "Records a destination refused for good (dead letters). Not zero: look at them with 'collector sink dead NAME'."}, []string{"sink"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_sink_errors_total",
			Help: "Failed tries. failed: the sink or a read for it; it is tried again. cursor: the store did not take the sink's place; after a crash records may come twice."},
			[]string{"sink", "what"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "procession_collector_sink_seconds",
			Help:    "Time of one try to deliver a group of records.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10)}, []string{"sink"}),
	}
	if reg != nil {
		reg.MustRegister(m.delivered, m.filtered, m.dead, m.errors, m.seconds)
	}
	return m
}

func (m *Metrics) add(r *Runner) error {
	m.errors.WithLabelValues(r.cfg.Name, "failed")
	m.errors.WithLabelValues(r.cfg.Name, "cursor")
	m.filtered.WithLabelValues(r.cfg.Name)
	m.dead.WithLabelValues(r.cfg.Name)
	if m.reg == nil {
		return nil
	}
	labels := prometheus.Labels{"sink": r.cfg.Name}
	if err := m.reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "procession_collector_sink_lag_seconds",
		Help:        "Age of the oldest stored record a sink was offered and has not taken; 0 for none.",
		ConstLabels: labels,
	}, func() float64 {
		if at := r.Status().Behind; !at.IsZero() {
			return max(0, time.Since(at).Seconds())
		}
		return 0
	})); err != nil {
		return err
	}
	return m.reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "procession_collector_sink_lag_records",
		Help:        "Stored records a sink does not have yet. Growing: the sink is slow or fails. -1: the store cannot be asked.",
		ConstLabels: labels,
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

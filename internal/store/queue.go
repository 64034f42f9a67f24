package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// ErrClosed reports that the queue has stopped.
var ErrClosed = errors.New("store is closing")

// Bounds of one commit. More would make acks wait longer and gain nothing: at
// 256 batches the sync is far below the inserts.
const (
	groupChanges = 256
	groupBytes   = 8 << 20
)

// A Queue is the single committer: it takes changes from many goroutines, in
// order, and commits whatever waits as one transaction.
type Queue struct {
	st  Store
	log *slog.Logger
	in  chan *Ticket

	stopped chan struct{} // closed when Run has returned

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when there is more to read; guarded by mu

	trouble atomic.Pointer[error] // why the last commit failed, nil if it did not; only Run stores

	commits  prometheus.Counter
	failures *prometheus.CounterVec
	seconds  prometheus.Histogram
	group    prometheus.Histogram
	records  *prometheus.CounterVec
	losses   prometheus.Counter
	lost     prometheus.Counter
}

// A Ticket is a change on its way to the disk.
type Ticket struct {
	c       Change
	done    chan struct{}
	stopped chan struct{}
	res     Result // both written before done is closed
	err     error
}

// QueueConfig configures a Queue. The zero value works.
type QueueConfig struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil: metrics are kept and not shown
}

// NewQueue returns the queue of a store. Run must be called.
func NewQueue(st Store, cfg QueueConfig) *Queue {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	q := &Queue{
		st: st, log: cfg.Log,
		in:      make(chan *Ticket, groupChanges),
		stopped: make(chan struct{}),
		changed: make(chan struct{}),
		commits: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_commits_total",
			Help: "Transactions that reached the disk."}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_commit_failures_total",
			Help: "Transactions the store refused. Nothing of them was acknowledged; agents keep it and send it again. full: no space left."},
			[]string{"reason"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "procession_collector_commit_seconds",
			Help:    "Time of one transaction, with its sync.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14)}),
		group: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "procession_collector_commit_changes",
			Help:    "Batches and other changes in one transaction.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 9)}),
		records: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_records_total",
			Help: "Records by what became of them: stored, rejected (stored with a reason, no item this collector can read), duplicate (stored before), gap and failed (refused, the agent sends them again). With procession_collector_records_refused_total they add up to procession_collector_records_received_total."},
			[]string{"result"}),
		losses: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_losses_total",
			Help: "Loss records stored: ranges of alerts that are gone for good."}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_lost_alerts_total",
			Help: "Alerts within stored loss records."}),
	}
	for _, r := range []string{"stored", "rejected", "duplicate", "gap", "failed"} {
		q.records.WithLabelValues(r)
	}
	for _, r := range []string{"full", "other"} {
		q.failures.WithLabelValues(r)
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(q.commits, q.failures, q.seconds, q.group, q.records, q.losses, q.lost,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "procession_collector_commit_queue",
				Help: "Changes waiting for a transaction.",
			}, func() float64 { return float64(len(q.in)) }))
	}
	return q
}

// Submit puts a change into the queue, behind everything submitted before. It
// blocks while the queue is full.
func (q *Queue) Submit(ctx context.Context, c Change) (*Ticket, error) {
	if err := check(c); err != nil {
		return nil, err
	}
	select {
	case <-q.stopped:
		return nil, ErrClosed
	default:
	}
	t := &Ticket{c: c, done: make(chan struct{}), stopped: q.stopped}
	select {
	case q.in <- t:
		return t, nil
	case <-q.stopped:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Do submits c and waits for its result.
func (q *Queue) Do(ctx context.Context, c Change) (Result, error) {
	t, err := q.Submit(ctx, c)
	if err != nil {
		return Result{}, err
	}
	select {
	case <-t.done:
	case <-q.stopped:
	case <-ctx.Done():
		return Result{}, ctx.Err()
	}
	return t.Result()
}

// Done is closed when the change is on disk or refused.
func (t *Ticket) Done() <-chan struct{} { return t.done }

// Stopped is closed when the queue has ended; Done may then never be.
func (t *Ticket) Stopped() <-chan struct{} { return t.stopped }

// Result is the answer, after Done or Stopped is closed. An error means that
// nothing of the change was stored.
func (t *Ticket) Result() (Result, error) {
	select {
	case <-t.done:
		return t.res, t.err
	default:
		return Result{}, ErrClosed
	}
}

// Stopped is closed when Run has returned.
func (q *Queue) Stopped() <-chan struct{} { return q.stopped }

// Healthy reports why commits fail, nil when the last one worked. It tries no
// commit: agents do, all the time.
func (q *Queue) Healthy() error {
	if e := q.trouble.Load(); e != nil {
		return *e
	}
	return nil
}

// Changed returns a channel that is closed at the next commit that gives
// readers something. Take it before reading, then wait on it.
func (q *Queue) Changed() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.changed
}

// Run commits until ctx ends, then what was submitted before.
func (q *Queue) Run(ctx context.Context) error {
	defer close(q.stopped)
	group := make([]*Ticket, 0, groupChanges)
	for {
		select {
		case t := <-q.in:
			q.commitGroup(q.gather(append(group[:0], t)))
		case <-ctx.Done():
			for {
				select {
				case t := <-q.in:
					q.commitGroup(q.gather(append(group[:0], t)))
				default:
					return nil
				}
			}
		}
	}
}

// gather takes what waits. It waits for nothing itself: while a commit runs
// the next group forms by itself, so the sync sets the pace.
func (q *Queue) gather(group []*Ticket) []*Ticket {
	for size := group[0].bytes(); len(group) < groupChanges && size < groupBytes; {
		select {
		case t := <-q.in:
			group = append(group, t)
			size += t.bytes()
		default:
			return group
		}
	}
	return group
}

func (t *Ticket) bytes() (n int) {
	if b, ok := t.c.(*Batch); ok {
		for i := range b.Records {
			n += len(b.Records[i].Payload)
		}
	}
	return n
}

func (q *Queue) commitGroup(group []*Ticket) {
	changes := make([]Change, len(group))
	for i, t := range group {
		changes[i] = t.c
	}
	start := time.Now()
	results, err := q.st.Commit(context.Background(), changes)
	took := time.Since(start)
	if err == nil && len(results) != len(changes) {
		err = fmt.Errorf("store answered %d of %d changes", len(results), len(changes))
	}
	q.tellHealth(err)
	added := false
	for i, t := range group {
		if err != nil {
			t.err = err
		} else {
			t.res = results[i]
			t.err = t.res.Err
			added = added || t.res.added()
		}
		q.count(t)
		close(t.done)
	}
	if err == nil {
		q.commits.Inc()
		q.seconds.Observe(took.Seconds())
		q.group.Observe(float64(len(group)))
	}
	if added {
		q.mu.Lock()
		close(q.changed)
		q.changed = make(chan struct{})
		q.mu.Unlock()
	}
}

func (q *Queue) count(t *Ticket) {
	q.losses.Add(float64(t.res.Losses))
	q.lost.Add(float64(t.res.LostSeqs))
	b, ok := t.c.(*Batch)
	if !ok {
		return
	}
	if t.err != nil {
		reason := "failed"
		if _, gap := errors.AsType[*GapError](t.err); gap {
			reason = "gap"
		}
		n := 0
		for i := range b.Records {
			if b.Records[i].Kind != Loss {
				n++
			}
		}
		q.records.WithLabelValues(reason).Add(float64(n))
		return
	}
	q.records.WithLabelValues("stored").Add(float64(t.res.Items))
	q.records.WithLabelValues("rejected").Add(float64(t.res.Rejected))
	q.records.WithLabelValues("duplicate").Add(float64(t.res.Duplicates))
}

// tellHealth logs when commits begin to fail and when they work again, not
// each failure: agents try again all the time.
func (q *Queue) tellHealth(err error) {
	if err != nil {
		reason := "other"
		if errors.Is(err, ErrFull) {
			reason = "full"
		}
		q.failures.WithLabelValues(reason).Inc()
		if q.trouble.Load() == nil {
			q.log.Error("the store refuses commits; agents keep their alerts and send them again", slog.Any("err", err))
		}
		q.trouble.Store(&err)
	} else if q.trouble.Swap(nil) != nil {
		q.log.Info("the store takes commits again")
	}
}

package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// gated is a real store whose commits can be held up, or made to fail.
type gated struct {
	store.Store
	enter chan int // takes the size of each group that is about to commit
	leave chan error
}

func (g *gated) Commit(ctx context.Context, cs []store.Change) ([]store.Result, error) {
	g.enter <- len(cs)
	if err := <-g.leave; err != nil {
		return nil, err
	}
	return g.Store.Commit(ctx, cs)
}

func batchOf(node string, from, to uint64) *store.Batch {
	return &store.Batch{Node: node, Epoch: storetest.Epoch(1), Records: storetest.Alerts(from, to), Received: time.Now()}
}

func runQueue(t testing.TB, st store.Store) (q *store.Queue, reg *prometheus.Registry, stop func()) {
	reg = prometheus.NewRegistry()
	q = store.NewQueue(st, store.QueueConfig{Registerer: reg})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- q.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return q, reg, stop
}

func submit(t *testing.T, q *store.Queue, c store.Change) *store.Ticket {
	t.Helper()
	tk, err := q.Submit(t.Context(), c)
	if err != nil {
		t.Fatalf("Submit: %v", err)
	}
	return tk
}

// What waits while a commit runs is the next commit, in order.
func TestQueueGroups(t *testing.T) {
	st := openSQLite(t, storetest.Dir(t))
	defer st.Close()
	g := &gated{st, make(chan int), make(chan error)}
	q, _, stop := runQueue(t, g)
	defer stop()
	changed := q.Changed()
	first := submit(t, q, batchOf("n", 1, 2))
	if n := <-g.enter; n != 1 {
		t.Fatalf("first group has %d changes, want 1", n)
	}
	var rest []*store.Ticket
	for i := range uint64(10) {
		rest = append(rest, submit(t, q, batchOf("n", 3+i, 3+i)))
	}
	mark := submit(t, q, &store.Hello{Node: "n", Lanes: []store.Lane{{Epoch: storetest.Epoch(1)}}, At: time.Now()})
	select {
	case <-first.Done():
		t.Fatal("answered before the commit returned")
	case <-changed:
		t.Fatal("readers were told before the commit returned")
	default:
	}
	g.leave <- nil
	<-first.Done()
	<-changed
	if n := <-g.enter; n != 11 {
		t.Errorf("second group has %d changes, want 11", n)
	}
	g.leave <- nil
	for i, tk := range rest {
		<-tk.Done()
		if res, err := tk.Result(); err != nil || res.UpTo != uint64(3+i) {
			t.Errorf("batch %d: %+v, %v", i, res, err)
		}
	}
	<-mark.Done()
	if res, err := mark.Result(); err != nil || len(res.Marks) != 1 || res.Marks[0] != 12 {
		t.Errorf("mark asked behind the batches: %+v, %v, want 12", res, err)
	}
}

// A failed commit answers everybody with the error, stores nothing, and the
// next one works.
func TestQueueFailure(t *testing.T) {
	st := openSQLite(t, storetest.Dir(t))
	defer st.Close()
	g := &gated{st, make(chan int), make(chan error)}
	q, reg, stop := runQueue(t, g)
	defer stop()
	a, b := submit(t, q, batchOf("n", 1, 2)), submit(t, q, batchOf("m", 1, 3))
	for n := 0; n < 2; { // one group or two
		n += <-g.enter
		g.leave <- fmt.Errorf("commit: %w", store.ErrFull)
	}
	for _, tk := range []*store.Ticket{a, b} {
		<-tk.Done()
		if _, err := tk.Result(); !errors.Is(err, store.ErrFull) {
			t.Errorf("result: %v, want ErrFull", err)
		}
	}
	if err := q.Healthy(); !errors.Is(err, store.ErrFull) {
		t.Errorf("Healthy: %v, want ErrFull", err)
	}
	c := submit(t, q, batchOf("n", 1, 4))
	<-g.enter
	g.leave <- nil
	<-c.Done()
	if res, err := c.Result(); err != nil || res.Items != 4 || res.Duplicates != 0 {
		t.Errorf("after the failure: %+v, %v, want 4 alerts stored", res, err)
	}
	if err := q.Healthy(); err != nil {
		t.Errorf("Healthy: %v", err)
	}
	want := map[string]float64{"stored": 4, "failed": 5, "duplicate": 0, "gap": 0, "rejected": 0}
	if d := cmp.Diff(want, storetest.Counters(t, reg, "procession_collector_records_total")); d != "" {
		t.Errorf("records_total (-want +got):\n%s", d)
	}
}

// What was submitted before the stop is committed; nothing hangs after it.
func TestQueueStops(t *testing.T) {
	st := openSQLite(t, storetest.Dir(t))
	defer st.Close()
	q, _, stop := runQueue(t, st)
	var tickets []*store.Ticket
	for i := range uint64(100) {
		tickets = append(tickets, submit(t, q, batchOf("n", i+1, i+1)))
	}
	stop()
	for i, tk := range tickets {
		if res, err := tk.Result(); err != nil || res.Items != 1 {
			t.Errorf("batch %d: %+v, %v", i, res, err)
		}
	}
	if _, err := q.Submit(t.Context(), batchOf("n", 101, 101)); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Submit after the stop: %v, want ErrClosed", err)
	}
	if _, err := q.Do(t.Context(), batchOf("n", 101, 101)); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Do after the stop: %v, want ErrClosed", err)
	}
}

// Submitters that race with the stop are all answered, and what was answered
// with success is there.
func TestQueueStopRace(t *testing.T) {
	st := openSQLite(t, storetest.Dir(t))
	defer st.Close()
	for round := range 20 {
		q, _, stop := runQueue(t, st)
		var wg sync.WaitGroup
		var mu sync.Mutex
		stored := 0
		for w := range 4 {
			wg.Go(func() {
				for i := uint64(1); ; i++ {
					res, err := q.Do(t.Context(), batchOf(fmt.Sprintf("n%d-%d", round, w), i, i))
					if errors.Is(err, store.ErrClosed) {
						return
					}
					if err != nil {
						t.Errorf("Do: %v", err)
						return
					}
					mu.Lock()
					stored += res.Items
					mu.Unlock()
				}
			})
		}
		if _, err := q.Do(t.Context(), batchOf(fmt.Sprint("m", round), 1, 1)); err != nil {
			t.Fatal(err)
		}
		stop()
		wg.Wait()
		got := 0
		for _, r := range storetest.All(t, st) {
			var a, b int
			if n, _ := fmt.Sscanf(r.Node, "n%d-%d", &a, &b); n == 2 && a == round {
				got++
			}
		}
		// ErrClosed may be answered to what was committed by the last group.
		if got < stored || got > stored+4 {
			t.Fatalf("round %d: %d stored, %d were told so", round, got, stored)
		}
	}
}

func TestQueueSubmitGivesUp(t *testing.T) {
	st := openSQLite(t, storetest.Dir(t))
	defer st.Close()
	q := store.NewQueue(st, store.QueueConfig{}) // Run is never called: the queue fills
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	for {
		if _, err := q.Submit(ctx, batchOf("n", 1, 1)); err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Submit to a full queue: %v, want it to follow its context", err)
			}
			return
		}
	}
}

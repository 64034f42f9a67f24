package collector

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// away is a sink that takes nothing until it is back.
type away struct{ back atomic.Bool }

func (a *away) Deliver(context.Context, []store.Record) error {
	if !a.back.Load() {
		return errors.New("away")
	}
	return nil
}

// Old records go; what a sink does not have yet goes last, and is counted.
func TestJanitor(t *testing.T) {
	st, err := store.OpenSQLite(t.Context(), storetest.Dir(t))
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	queue := store.NewQueue(st, store.QueueConfig{})
	dest := &away{}
	r, err := sink.New(sink.Config{Name: "s", Sink: dest, Store: st, Queue: queue, MinPause: time.Millisecond, MaxPause: 10 * time.Millisecond}, sink.NewMetrics(nil))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- queue.Run(ctx) }()
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		<-done
		st.Close()
	})
	cfg, err := Config{State: "x", Keep: time.Hour, KeepBytes: 16 << 20}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	j := newJanitor(&Collector{cfg: cfg, st: st, queue: queue, sinks: []*sink.Runner{r}, reg: reg})
	j.bytes = 4 << 20 // less than the flag allows, for the test's time
	next := uint64(1)
	add := func(megabytes int) {
		t.Helper()
		for range megabytes {
			rec := storetest.Alert(next)
			rec.Payload = make([]byte, 1<<20)
			rec.CRC32C = store.Checksum(rec.Payload)
			if res, err := queue.Do(t.Context(), &store.Batch{Node: "n", Epoch: storetest.Epoch(1), Records: []store.Record{rec}, Received: time.Now()}); err != nil || res.Items != 1 {
				t.Fatal(err)
			}
			next++
		}
	}
	clean := func(now time.Time) (left int) {
		t.Helper()
		if err := j.clean(t.Context(), now, true); err != nil {
			t.Fatal(err)
		}
		return len(storetest.All(t, st))
	}
	count := func(name string) float64 { return storetest.Sum(t, reg, name) }

	add(5)
	if n := clean(time.Now()); n != 5 {
		t.Errorf("%d of 5 left: what the sink does not have must stay below twice the bound", n)
	}
	if n := clean(time.Now().Add(2 * time.Hour)); n != 5 {
		t.Errorf("%d of 5 left: age does not take from a sink either", n)
	}
	add(7)
	n := clean(time.Now())
	if n > 8 || n < 5 {
		t.Errorf("%d left of 12 MiB with a bound of 4: want about 7, twice the bound", n)
	}
	if got := count("procession_collector_trimmed_unsent_total"); int(got) != 12-n {
		t.Errorf("%v were counted as taken from the sink, want %d", got, 12-n)
	}
	dest.back.Store(true)
	back, cancelWait := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancelWait()
	if !r.WaitFor(back, 12) {
		t.Fatal("the sink is back and does not take the rest")
	}
	if err := r.Flush(t.Context()); err == nil {
		n = clean(time.Now())
	}
	if n > 4 || n < 2 {
		t.Errorf("%d left with a bound of 4 MiB that all sinks have", n)
	}
	n = len(storetest.All(t, st))
	if err := j.clean(t.Context(), time.Now().Add(2*time.Hour), false); err != nil {
		t.Fatal(err)
	}
	if got := len(storetest.All(t, st)); got != n {
		t.Errorf("%d of %d left by a clock that is not believed", got, n)
	}
	if n := clean(time.Now().Add(2 * time.Hour)); n != 0 {
		t.Errorf("%d left that are older than an hour", n)
	}
	if got := count("procession_collector_trimmed_records_total"); got != 12 {
		t.Errorf("%v removed in all, want 12", got)
	}
}

// A clock that is set is not believed for an hour; one that is slewed is.
func TestSteadiness(t *testing.T) {
	start := time.Unix(1_800_000_000, 0)
	type look struct {
		up, set      time.Duration // since the start; the wall clock beside it
		steady, jump time.Duration
	}
	for name, looks := range map[string][]look{
		"even":    {{}, {up: time.Minute, steady: time.Minute}, {up: 2 * time.Hour, steady: 2 * time.Hour}},
		"slewed":  {{}, {up: time.Hour, set: 30 * time.Second, steady: time.Hour}, {up: 2 * time.Hour, set: time.Minute, steady: 2 * time.Hour}},
		"forward": {{}, {up: time.Hour, set: 5 * time.Hour, jump: 5 * time.Hour}, {up: 2 * time.Hour, set: 5 * time.Hour, steady: time.Hour}},
		"back":    {{}, {up: time.Hour, set: -5 * time.Hour, jump: -5 * time.Hour}, {up: 90 * time.Minute, set: -5 * time.Hour, steady: 30 * time.Minute}},
		"there and back": {{}, {up: time.Minute, set: 9000 * time.Hour, jump: 9000 * time.Hour}, {up: time.Hour, jump: -9000 * time.Hour},
			{up: 3 * time.Hour, steady: 2 * time.Hour}},
	} {
		var s steadiness
		for i, l := range looks {
			steady, jump := s.look(start.Add(l.up+l.set), l.up)
			if steady != l.steady || jump != l.jump {
				t.Errorf("%s: look %d: steady for %v, jump %v, want %v, %v", name, i, steady, jump, l.steady, l.jump)
			}
		}
	}
}

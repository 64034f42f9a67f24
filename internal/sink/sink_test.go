package sink_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

// env is a real store with its queue running.
type env struct {
	st    *store.SQLite
	queue *store.Queue
	reg   *prometheus.Registry
	m     *sink.Metrics
	next  uint64
}

func newEnv(t *testing.T, dir string) *env {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	e := &env{st: st, reg: prometheus.NewRegistry(), next: 1}
	e.queue = store.NewQueue(st, store.QueueConfig{})
	e.m = sink.NewMetrics(e.reg)
	ctx, cancel := context.WithCancel(context.Background())
	go e.queue.Run(ctx)
	t.Cleanup(func() {
		cancel()
		<-e.queue.Stopped()
		st.Close()
	})
	return e
}

func (e *env) add(t testing.TB, n int) {
	t.Helper()
	if _, err := e.queue.Do(t.Context(), &store.Batch{Node: "n", Epoch: storetest.Epoch(1), Received: time.Now(),
		Records: storetest.Alerts(e.next, e.next+uint64(n)-1)}); err != nil {
		t.Fatal(err)
	}
	e.next += uint64(n)
}

func (e *env) runner(t *testing.T, name string, s sink.Sink, change func(*sink.Config)) *sink.Runner {
	t.Helper()
	c := sink.Config{Name: name, Sink: s, Store: e.st, Queue: e.queue, Batch: 7, MinPause: 100 * time.Microsecond, MaxPause: time.Millisecond}
	if change != nil {
		change(&c)
	}
	r, err := sink.New(c, e.m)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func run(t *testing.T, r *sink.Runner) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func waitFor(t testing.TB, r *sink.Runner, cursor int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !r.WaitFor(ctx, cursor) {
		t.Fatalf("sink %s came to %d of %d", r.Name(), r.Cursor(), cursor)
	}
}

// collect is a sink that keeps ids.
type collect struct {
	mu  sync.Mutex
	ids []string
	do  func(recs []store.Record) error // before keeping; may keep by itself
}

func (c *collect) Deliver(_ context.Context, recs []store.Record) error {
	if c.do != nil {
		if err := c.do(recs); err != nil {
			return err
		}
	}
	c.keep(recs)
	return nil
}

func (c *collect) keep(recs []store.Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range recs {
		c.ids = append(c.ids, recs[i].ID("c"))
	}
}

func (c *collect) got() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.ids...)
}

func ids(from, to uint64) (out []string) {
	for n := from; n <= to; n++ {
		out = append(out, fmt.Sprintf("c/n/%v/%d", storetest.Epoch(1), n))
	}
	return out
}

func unique(in []string) (out []string) {
	seen := map[string]bool{}
	for _, s := range in {
		if !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	return out
}

func TestRunnerDeliversInOrder(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	e.add(t, 20)
	c := &collect{}
	r := e.runner(t, "s", c, nil)
	stop := run(t, r)
	waitFor(t, r, 20)
	e.add(t, 13) // while it waits
	waitFor(t, r, 33)
	stop()
	if d := cmp.Diff(ids(1, 33), c.got()); d != "" {
		t.Errorf("delivered (-want +got):\n%s", d)
	}
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The next run goes on behind them.
	e.add(t, 2)
	c2 := &collect{}
	reg := e.reg
	if _, err := sink.New(sink.Config{Name: "s", Sink: c2, Store: e.st, Queue: e.queue}, e.m); err == nil {
		t.Error("two sinks of one name, and so of one cursor, were accepted")
	}
	e.m = sink.NewMetrics(nil)
	r2 := e.runner(t, "s", c2, func(c *sink.Config) { c.FromNow = true })
	run(t, r2)
	waitFor(t, r2, 35)
	if d := cmp.Diff(ids(34, 35), c2.got()); d != "" {
		t.Errorf("second run delivered (-want +got):\n%s", d)
	}
	if n := storetest.Counters(t, reg, "procession_collector_sink_delivered_total")["alert,s"]; n != 33 {
		t.Errorf("delivered_total %v of the first run, want 33", n)
	}
}

func TestRunnerFromNow(t *testing.T) {
	dir := storetest.Dir(t)
	e := newEnv(t, dir)
	e.add(t, 10)
	// It fails for ever: its place must be kept all the same.
	bad := &collect{do: func([]store.Record) error { return errors.New("no") }}
	r := e.runner(t, "s", bad, func(c *sink.Config) { c.FromNow = true })
	stop := run(t, r)
	waitFor(t, r, 10)
	e.add(t, 5)
	stop()
	c := &collect{}
	e.m = sink.NewMetrics(nil)
	r = e.runner(t, "s", c, func(c *sink.Config) { c.FromNow = true })
	run(t, r)
	waitFor(t, r, 15)
	if d := cmp.Diff(ids(11, 15), c.got()); d != "" {
		t.Errorf("delivered (-want +got):\n%s", d)
	}
}

// A sink that fails at random, before or after it took the records: at least
// once, in order, same ids, and nobody is stuck.
func TestRunnerLyingSink(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	rnd := rand.New(rand.NewPCG(1, 2))
	c := &collect{}
	fails := 0
	c.do = func(recs []store.Record) error {
		switch rnd.IntN(3) {
		case 0:
			fails++
			return errors.New("refused")
		case 1: // has all or a part, and says no
			fails++
			c.keep(recs[:rnd.IntN(len(recs)+1)])
			return errors.New("connection reset")
		}
		return nil
	}
	r := e.runner(t, "s", c, nil)
	stop := run(t, r)
	for range 20 {
		e.add(t, 10)
	}
	waitFor(t, r, 200)
	stop()
	got := c.got()
	if d := cmp.Diff(ids(1, 200), unique(got)); d != "" {
		t.Errorf("delivered, first of each (-want +got):\n%s", d)
	}
	if len(got) == 200 {
		t.Error("nothing came twice: the sink did not lie")
	}
	if n := storetest.Counters(t, e.reg, "procession_collector_sink_errors_total")["s,failed"]; int(n) != fails {
		t.Errorf("errors_total %v, want %d", n, fails)
	}
}

// A sink that hangs delays neither commits nor another sink, and its lag shows.
func TestRunnerHangingSink(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	hang := make(chan struct{})
	bad := &collect{do: func([]store.Record) error { <-hang; return nil }}
	good := &collect{}
	rb, rg := e.runner(t, "bad", bad, nil), e.runner(t, "good", good, nil)
	run(t, rb)
	run(t, rg)
	for range 50 {
		e.add(t, 10) // waits for its commit
	}
	waitFor(t, rg, 500)
	lag := storetest.Counters(t, e.reg, "procession_collector_sink_lag_records")
	if lag["bad"] != 500 || lag["good"] != 0 {
		t.Errorf("lag %v, want bad 500, good 0", lag)
	}
	close(hang)
	waitFor(t, rb, 500)
}

func TestRunnerEndsWhenTheDestinationIsGone(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	e.add(t, 1)
	r := e.runner(t, "s", &collect{do: func([]store.Record) error { return fmt.Errorf("%w: hung up", sink.ErrGone) }}, nil)
	if err := r.Run(t.Context()); err != nil {
		t.Errorf("Run: %v", err)
	}
	if r.WaitFor(t.Context(), 1) {
		t.Error("WaitFor says that it has the record")
	}
}

// A cursor the store could not take costs a second delivery at most.
func TestRunnerCursorIsStored(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	r := e.runner(t, "s", &collect{}, nil)
	run(t, r)
	for i := range int64(30) {
		e.add(t, 1)
		waitFor(t, r, i+1)
	}
	testenv.Eventually(t, "about 30 in the stored cursor, without a Flush", func() bool {
		all, err := e.st.Sinks(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return all["s"].Cursor >= 29
	})
}

func TestConfigIsChecked(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	for name, c := range map[string]sink.Config{
		"nothing":  {},
		"no name":  {Sink: &collect{}, Store: e.st, Queue: e.queue},
		"pauses":   {Name: "s", Sink: &collect{}, Store: e.st, Queue: e.queue, MinPause: time.Minute, MaxPause: time.Second},
		"no batch": {Name: "s", Sink: &collect{}, Store: e.st, Queue: e.queue, Batch: -1},
	} {
		if _, err := sink.New(c, e.m); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestRender(t *testing.T) {
	alert, err := proto.Marshal(&pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{Rule: "k/ns/p/evil-rule", Severity: pb.Severity_SEVERITY_HIGH, Message: "m\x1b[31m",
		Event: &pb.Event{Kind: "Exec", Process: &pb.Process{Pid: 7, Cmdline: []byte("a\x00\x1b]0;x\x07\x00"), CmdlineLen: 8}}}}})
	if err != nil {
		t.Fatal(err)
	}
	amendment, err := proto.Marshal(&pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 5, Pod: &pb.Pod{Namespace: "shop", Name: "web\x1b[2J"}}}})
	if err != nil {
		t.Fatal(err)
	}
	coverage, err := proto.Marshal(&pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{Capture: "recorder", Events: map[string]uint64{"Exec": 5, "Fork\x1b": 6},
		Lost: map[string]uint64{"ring": 3}, BeatsSent: 6, BeatsSeen: 5}}})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	base := store.Record{Node: "n", Epoch: storetest.Epoch(0xab), Seq: 7, To: 7, Received: at}
	with := func(f func(*store.Record)) *store.Record { r := base; f(&r); return &r }
	id := "c/n/" + strings.Repeat("ab", 16) + "/7"
	tests := []struct {
		name string
		rec  *store.Record
		json map[string]any // some keys
		line []string       // parts
	}{
		{"alert", with(func(r *store.Record) { r.Kind, r.Payload = store.Alert, alert }),
			map[string]any{"id": id, "kind": "Exec", "severity": "High", "node": "n", "cluster": "c"}, []string{"evil-rule", "pid 7"}},
		{"amendment", with(func(r *store.Record) { r.Kind, r.Payload = store.Amendment, amendment }),
			map[string]any{"id": id, "kind": "Amendment", "amends": "c/n/" + strings.Repeat("ab", 16) + "/5"}, []string{"alert 5", "shop/web"}},
		{"coverage", with(func(r *store.Record) { r.Kind, r.Payload = store.Coverage, coverage }),
			map[string]any{"id": id, "kind": "Coverage", "node": "n"}, []string{"11 events", "lost 3", "5/6", "recorder"}},
		{"loss", with(func(r *store.Record) {
			r.Kind, r.To, r.LossReason, r.Reason = store.Loss, 9, pb.LossReason_LOSS_REASON_CRASH, "power"
		}),
			map[string]any{"id": id + "-9", "kind": "Loss", "from": "7", "to": "9", "lost": "3", "detail": "power"}, []string{"LOST", "7..9", "power"}},
		{"rejected", with(func(r *store.Record) { r.Kind, r.Reason, r.Payload = store.Rejected, "crc32c: wrong", []byte{0xff} }),
			map[string]any{"id": id, "kind": "Rejected", "time": "2026-01-02T03:04:05.000000000Z", "reason": "crc32c: wrong", "payload": "/w==", "seq": "7"}, []string{"03:04:05", "7 of n", "crc32c: wrong"}},
		{"damaged", with(func(r *store.Record) { r.Kind, r.Reason = store.Damaged, "checksum" }),
			map[string]any{"id": id, "kind": "Damaged", "reason": "checksum"}, []string{"checksum"}},
		{"an item without content", with(func(r *store.Record) { r.Kind = store.Coverage }),
			map[string]any{"id": id, "kind": "Damaged"}, []string{"cannot be read"}},
		{"an alert that cannot be read any more", with(func(r *store.Record) { r.Kind, r.Payload = store.Alert, []byte{0xff} }),
			map[string]any{"id": id, "kind": "Damaged"}, []string{"cannot be read"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := sink.AppendJSON([]byte("x"), "c", tt.rec)
			if b[0] != 'x' || strings.ContainsAny(string(b), "\n\x1b\x07") {
				t.Errorf("JSON %q", b)
			}
			var got map[string]any
			if err := json.Unmarshal(b[1:], &got); err != nil {
				t.Fatalf("%v in %q", err, b)
			}
			for k, want := range tt.json {
				if got[k] != want {
					t.Errorf("%s is %v, want %v", k, got[k], want)
				}
			}
			if got["id"] != tt.rec.ID("c") {
				t.Errorf("id %v in JSON, Record.ID says %s", got["id"], tt.rec.ID("c"))
			}
			line := string(sink.AppendLine(nil, present.Style{}, "c", tt.rec))
			for _, part := range tt.line {
				if !strings.Contains(line, part) {
					t.Errorf("line %q, want %q in it", line, part)
				}
			}
			if strings.ContainsAny(line, "\n\x1b\x07") {
				t.Errorf("line %q has control characters", line)
			}
		})
	}
}

// Trouble is told once when it begins and once when it is over, also by a sink
// that takes some records, or refuses one, while it lasts.
func TestTroubleIsLoggedOnce(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	var log bytes.Buffer // read after Run has ended
	c := &collect{}
	tries := 0
	c.do = func(recs []store.Record) error {
		switch tries++; {
		case tries == 1:
			return errors.New("away")
		case tries < 6:
			return &sink.DeliveryError{Done: 1, Err: errors.New("one was taken")}
		case tries == 6:
			return &sink.DeliveryError{Refused: true, Err: errors.New("no good")}
		}
		return nil
	}
	r := e.runner(t, "s", c, func(c *sink.Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	e.add(t, 20)
	stop := run(t, r)
	waitFor(t, r, 20)
	stop()
	if began, over := strings.Count(log.String(), "sink fails"), strings.Count(log.String(), "sink works again"); began != 1 || over != 1 {
		t.Errorf("trouble is said to begin %d times and to be over %d times, want 1 and 1:\n%s", began, over, log.String())
	}
}

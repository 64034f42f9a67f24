package sink_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

// collectOf takes a part of what it is offered, as its function says.
type collectOf struct {
	collect
	take func(recs []store.Record) (done int, err error)
}

func (c *collectOf) Deliver(_ context.Context, recs []store.Record) error {
	done, err := c.take(recs)
	if err == nil {
		done = len(recs)
	}
	c.keep(recs[:done])
	return err
}

// What a destination has of a group is not sent again, and what it refuses for
// good is kept as a dead letter and holds nothing up.
func TestRunnerDeadLetters(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	c := &collectOf{}
	c.take = func(recs []store.Record) (int, error) {
		for i, r := range recs {
			if r.Seq%10 == 4 {
				return i, &sink.DeliveryError{Done: i, Refused: true, Err: fmt.Errorf("no %d\x00\xff", r.Seq)}
			}
			if i == 3 {
				return i, &sink.DeliveryError{Done: i, Err: errors.New("enough for now")}
			}
		}
		return len(recs), nil
	}
	r := e.runner(t, "s", c, nil)
	stop := run(t, r)
	e.add(t, 40)
	waitFor(t, r, 40)
	stop()
	var want []string
	for n := uint64(1); n <= 40; n++ {
		if n%10 != 4 {
			want = append(want, ids(n, n)...)
		}
	}
	if d := cmp.Diff(want, c.got()); d != "" {
		t.Errorf("delivered (-want +got):\n%s", d)
	}
	dead, err := e.st.DeadLetters(t.Context(), "s", 0, 100)
	if err != nil || len(dead) != 4 || dead[0].Cursor != 4 || dead[3].Cursor != 34 {
		t.Errorf("dead letters %v, %v, want those of 4, 14, 24, 34", dead, err)
	}
	addsUp(t, e, "s", 40)
}

// addsUp: what a sink came past was delivered, passed by or refused.
func addsUp(t *testing.T, e *env, name string, want float64) {
	t.Helper()
	var sum float64
	for key, n := range storetest.Counters(t, e.reg, "procession_collector_sink_delivered_total") {
		if len(key) > len(name) && key[len(key)-len(name):] == name {
			sum += n
		}
	}
	sum += storetest.Counters(t, e.reg, "procession_collector_sink_filtered_total")[name]
	sum += storetest.Counters(t, e.reg, "procession_collector_sink_dead_total")[name]
	if sum != want {
		t.Errorf("delivered, filtered and dead of %s are %v together, want %v", name, sum, want)
	}
}

func TestRunnerFilters(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	coverage := storetest.Alert(4)
	coverage.Kind = store.Coverage
	high := storetest.Alert(5)
	high.Severity = pb.Severity_SEVERITY_HIGH
	if _, err := e.queue.Do(t.Context(), &store.Batch{Node: "n", Epoch: storetest.Epoch(1), Received: time.Now(), Records: []store.Record{
		storetest.Alert(1), storetest.Alert(2), {Seq: 3, To: 3, Kind: store.Loss}, coverage, high, {Seq: 6, To: 6, Kind: store.Rejected, Reason: "r", CRC32C: store.Checksum(nil)}}}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		filter sink.Filter
		want   []uint64
	}{
		{"all", sink.Filter{}, []uint64{1, 2, 3, 5, 6}},
		{"high", sink.Filter{MinSeverity: pb.Severity_SEVERITY_HIGH}, []uint64{3, 5, 6}},
		{"kinds", sink.Filter{Kinds: []store.Kind{store.Coverage, store.Alert}}, []uint64{1, 2, 4, 5}},
		{"rules", sink.Filter{Rules: []string{"x", "[rs]"}, MinSeverity: pb.Severity_SEVERITY_HIGH}, []uint64{3, 5, 6}},
		{"other-rules", sink.Filter{Kinds: []store.Kind{store.Alert}, Rules: []string{"x"}}, nil},
	} {
		c := &collect{}
		r := e.runner(t, tt.name, c, func(c *sink.Config) { c.Filter = tt.filter })
		stop := run(t, r)
		waitFor(t, r, 6)
		stop()
		var want []string
		for _, n := range tt.want {
			id := ids(n, n)[0]
			if n == 3 {
				id += "-3"
			}
			want = append(want, id)
		}
		if d := cmp.Diff(want, c.got()); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
		addsUp(t, e, tt.name, 6)
	}
}

func TestFilterNamespaces(t *testing.T) {
	rec := func(kind store.Kind, it *pb.Item) *store.Record {
		b, err := proto.Marshal(it)
		if err != nil {
			t.Fatal(err)
		}
		return &store.Record{Kind: kind, Payload: b}
	}
	in := func(ns string) *store.Record {
		return rec(store.Alert, &pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{Event: &pb.Event{Pod: &pb.Pod{Namespace: ns}}}}})
	}
	f := sink.Filter{Namespaces: []string{"shop", "team-*"}}
	for name, tt := range map[string]struct {
		r    *store.Record
		want bool
	}{
		"shop":       {in("shop"), true},
		"team":       {in("team-a"), true},
		"other":      {in("shops"), false},
		"no pod":     {in(""), false},
		"amendment":  {rec(store.Amendment, &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 1, Pod: &pb.Pod{Namespace: "shop"}}}}), true},
		"amended no": {rec(store.Amendment, &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 1, Pod: &pb.Pod{Namespace: "x"}}}}), false},
		"loss":       {&store.Record{Kind: store.Loss}, true},
		"unreadable": {&store.Record{Kind: store.Alert, Payload: []byte{0xff}}, true},
	} {
		if got := f.Match(tt.r); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}

// An amendment goes where its alert goes, and what is in dry run to who asks.
func TestFilterAmendmentsAndDryRuns(t *testing.T) {
	high, low := pb.Severity_SEVERITY_HIGH, pb.Severity_SEVERITY_LOW
	rec := func(kind store.Kind, it *pb.Item, rule string, s pb.Severity) store.Record {
		b, err := proto.Marshal(it)
		if err != nil {
			t.Fatal(err)
		}
		return store.Record{Kind: kind, Rule: rule, Severity: s, Payload: b}
	}
	pair := func(kind ...store.Kind) func(rule string, s pb.Severity) [2]store.Record {
		return func(rule string, s pb.Severity) [2]store.Record {
			pod := &pb.Pod{Namespace: "shop"}
			return [2]store.Record{
				rec(kind[0], &pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{Event: &pb.Event{Pod: pod}}}}, rule, s),
				rec(kind[1], &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 1, Pod: pod}}}, rule, s),
			}
		}
	}
	real, dry := pair(store.Alert, store.Amendment), pair(store.DryRun, store.DryRun)
	both, none := [2]bool{true, true}, [2]bool{}
	for name, tt := range map[string]struct {
		f    sink.Filter
		r    [2]store.Record
		want [2]bool
	}{
		"everything":             {sink.Filter{}, real("a/b/c/d", low), both},
		"severity":               {sink.Filter{MinSeverity: high}, real("a/b/c/d", high), both},
		"too little":             {sink.Filter{MinSeverity: high}, real("a/b/c/d", low), none},
		"rule":                   {sink.Filter{Rules: []string{"a/*/c/*"}}, real("a/b/c/d", low), both},
		"another rule":           {sink.Filter{Rules: []string{"a/*/x/*"}}, real("a/b/c/d", low), none},
		"of an older agent":      {sink.Filter{MinSeverity: low, Rules: []string{"a/*/c/*"}}, real("", 0), [2]bool{false, true}},
		"dry run, not asked for": {sink.Filter{}, dry("a/b/c/d", high), none},
		"dry run":                {sink.Filter{DryRun: true}, dry("a/b/c/d", high), both},
		"dry run, too little":    {sink.Filter{DryRun: true, MinSeverity: high}, dry("a/b/c/d", low), none},
		"dry run, alerts only":   {sink.Filter{DryRun: true, Kinds: []store.Kind{store.Alert}}, dry("a/b/c/d", high), [2]bool{true, false}},
		"dry run, losses only":   {sink.Filter{DryRun: true, Kinds: []store.Kind{store.Loss}}, dry("a/b/c/d", high), none},
		"dry run in a namespace": {sink.Filter{DryRun: true, Namespaces: []string{"shop"}}, dry("a/b/c/d", high), both},
		"dry run in another":     {sink.Filter{DryRun: true, Namespaces: []string{"x"}}, dry("a/b/c/d", high), none},
	} {
		if got := [2]bool{tt.f.Match(&tt.r[0]), tt.f.Match(&tt.r[1])}; got != tt.want {
			t.Errorf("%s: alert, amendment: %v, want %v", name, got, tt.want)
		}
	}
}

// A sink that is sent back while it is idle, or while it fails, delivers from
// there, with the same ids, and forgets nothing of what follows.
func TestRunnerReplay(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	c := &collect{}
	r := e.runner(t, "s", c, nil)
	stop := run(t, r)
	e.add(t, 10)
	waitFor(t, r, 10)
	replay := func(to int64) {
		t.Helper()
		if _, err := e.queue.Do(t.Context(), &store.SinkReplay{Sink: "s", Cursor: to}); err != nil {
			t.Fatal(err)
		}
	}
	replay(6)
	// What is added before it has noticed comes first, and then once more.
	testenv.Eventually(t, "14 are delivered", func() bool { return len(c.got()) == 14 }, func() string { return fmt.Sprint(c.got()) })
	e.add(t, 2)
	testenv.Eventually(t, "16 are delivered", func() bool { return len(c.got()) == 16 }, func() string { return fmt.Sprint(c.got()) })
	stop()
	want := append(ids(1, 10), ids(7, 12)...)
	if d := cmp.Diff(want, c.got()); d != "" {
		t.Errorf("delivered (-want +got):\n%s", d)
	}
	// Sent elsewhere between two runs.
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	replay(11)
	c2 := &collect{}
	e.m = sink.NewMetrics(nil)
	r2 := e.runner(t, "s", c2, nil)
	run(t, r2)
	waitFor(t, r2, 12)
	if d := cmp.Diff(ids(12, 12), c2.got()); d != "" {
		t.Errorf("second run delivered (-want +got):\n%s", d)
	}
}

// Of two processes with the same sink one delivers. When it stops, or can no
// longer reach the store, the other one goes on behind it.
func TestRunnerLease(t *testing.T) {
	e := newEnv(t, storetest.Dir(t))
	conf := func(owner string, lease time.Duration) func(*sink.Config) {
		return func(c *sink.Config) { c.Owner, c.LeaseFor, c.Poll = owner, lease, time.Millisecond }
	}
	a, b := &collect{}, &collect{}
	ra := e.runner(t, "s", a, conf("a", time.Minute))
	stopA := run(t, ra)
	e.add(t, 10)
	waitFor(t, ra, 10)
	e.m = sink.NewMetrics(nil)
	rb := e.runner(t, "s", b, conf("b", time.Minute))
	run(t, rb)
	e.add(t, 5)
	waitFor(t, ra, 15)
	if got := b.got(); len(got) != 0 || rb.Status().Running || !ra.Status().Running {
		t.Errorf("the one without the lease delivered %v, running %v and %v", got, ra.Status().Running, rb.Status().Running)
	}
	stopA()
	if err := ra.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.add(t, 5)
	waitFor(t, rb, 20)
	if d := cmp.Diff(ids(16, 20), b.got()); d != "" {
		t.Errorf("the second delivered (-want +got):\n%s", d)
	}
	// b hangs, its lease runs out, and c takes over; what b then says is stale.
	var once sync.Once
	hang, hanging := make(chan struct{}), make(chan struct{})
	e.m = sink.NewMetrics(nil)
	d := &collect{do: func([]store.Record) error { once.Do(func() { close(hanging); <-hang }); return nil }}
	rd := e.runner(t, "other", d, conf("b", 50*time.Millisecond))
	run(t, rd)
	<-hanging
	e.m = sink.NewMetrics(nil)
	c := &collect{}
	rc := e.runner(t, "other", c, conf("c", time.Minute))
	run(t, rc)
	waitFor(t, rc, 20)
	close(hang)
	e.add(t, 1)
	waitFor(t, rc, 21)
	if d := cmp.Diff(ids(1, 21), c.got()); d != "" {
		t.Errorf("the one that took over delivered (-want +got):\n%s", d)
	}
	testenv.Eventually(t, "the one that hung learns that it has no lease", func() bool { return !rd.Status().Running })
}

// A destination that is away for ten minutes, in virtual time: it gets
// everything, and is not hammered. Retry-After is kept to.
func TestRunnerDownForTenMinutes(t *testing.T) {
	dir := storetest.Dir(t)
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t, dir)
		begin := time.Now()
		tries, early := 0, 0
		var wait time.Time
		c := &collect{}
		c.do = func([]store.Record) error {
			now := time.Now()
			if now.Before(wait) {
				early++
			}
			switch tries++; {
			case now.Sub(begin) > 10*time.Minute:
				return nil
			case tries%5 == 0:
				wait = now.Add(45 * time.Second)
				return &sink.DeliveryError{RetryAfter: 45 * time.Second, Err: errors.New("429")}
			}
			return errors.New("down")
		}
		good := &collect{}
		r := e.runner(t, "down", c, func(c *sink.Config) { c.MinPause, c.MaxPause = 0, 0 })
		rg := e.runner(t, "good", good, nil)
		stop, stopGood := run(t, r), run(t, rg)
		for range 11 { // each commit is waited for, and the other sink has it at once
			before := time.Now()
			e.add(t, 10)
			synctest.Wait()
			if took := time.Since(before); took > time.Second {
				t.Errorf("a commit took %v while a sink was down", took)
			}
			time.Sleep(time.Minute)
			if n := len(good.got()); n != int(e.next-1) {
				t.Errorf("the other sink has %d of %d", n, e.next-1)
			}
		}
		time.Sleep(2 * time.Minute)
		stop()
		stopGood()
		if d := cmp.Diff(ids(1, 110), c.got()); d != "" {
			t.Errorf("delivered (-want +got):\n%s", d)
		}
		if tries > 200 || tries < 10 || early > 0 {
			t.Errorf("%d tries in ten minutes, %d of them before Retry-After was over", tries, early)
		}
	})
}

package policystatus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// cluster is an API server with policies, as somebody who watches it sees them.
type cluster struct {
	policies map[string]*Policy // by object
	synced   bool
	fail     error
	lag      bool // the watch does not show what is written
	writes   []string
}

func (c *cluster) Policies() (all []*Policy, ok bool) {
	for _, p := range c.policies {
		shown := *p
		all = append(all, &shown)
	}
	return all, c.synced
}

func (c *cluster) ApplyStatus(_ context.Context, p *Policy, s *v1alpha1.PolicyStatus) error {
	if c.fail != nil {
		return c.fail
	}
	is := c.policies[p.Object()]
	if is == nil || is.UID != p.UID {
		return fmt.Errorf("%w: 409", ErrGone)
	}
	c.writes = append(c.writes, p.Object()+": "+brief(s))
	if c.lag {
		return nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	is.Status = v1alpha1.PolicyStatus{}
	return json.Unmarshal(b, &is.Status)
}

type world struct {
	t         *testing.T
	st        store.Store
	queue     *store.Queue
	api       *cluster
	w         *Writer
	reg       *prometheus.Registry
	reporting map[string]bool
	up        time.Duration
	seq       map[string]uint64
}

func newWorld(t *testing.T) *world {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), storetest.Dir(t))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, st: st, queue: store.NewQueue(st, store.QueueConfig{}), seq: map[string]uint64{}, reporting: map[string]bool{},
		api: &cluster{policies: map[string]*Policy{}, synced: true}}
	ctx, cancel := context.WithCancel(context.Background())
	go w.queue.Run(ctx)
	t.Cleanup(func() { cancel(); <-w.queue.Stopped(); st.Close() })
	w.w = w.writer("")
	return w
}

func (w *world) writer(owner string) *Writer {
	w.reg = prometheus.NewRegistry()
	return New(Config{API: w.api, Store: w.st, Queue: w.queue, Owner: owner, Reporting: func() map[string]bool { return w.reporting }, Registerer: w.reg})
}

// report stores what a node says of the policies, by object.
func (w *world) report(node string, states ...*pb.PolicyState) {
	w.t.Helper()
	r := &pb.PolicyReport{Policies: states}
	c, err := proto.Marshal(&pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{Policies: r}}})
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := proto.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	w.seq[node]++
	rec := store.Record{Seq: w.seq[node], To: w.seq[node], Kind: store.Coverage, Payload: c, CRC32C: store.Checksum(c), Policies: b}
	if res, err := w.queue.Do(w.t.Context(), &store.Batch{Node: node, Epoch: storetest.Epoch(1), Received: noon, Records: []store.Record{rec}}); err != nil || res.Items != 1 {
		w.t.Fatalf("%+v, %v", res, err)
	}
	w.reporting[node] = true
}

func (w *world) policy(name string, generation int64) {
	p := shells(generation)
	p.Name, p.UID = name, "uid-of-"+name
	if old := w.api.policies[p.Object()]; old != nil {
		p.Status = old.Status
	}
	w.api.policies[p.Object()] = p
}

func state(name string, generation, inForce int64, matches uint64) *pb.PolicyState {
	s := &pb.PolicyState{Object: "ClusterDetectionPolicy/" + name, Generation: generation, InForce: inForce}
	if generation != inForce {
		s.Error = mistake
	}
	if matches > 0 {
		s.Rules = []*pb.RuleCount{{Name: "shell", Matches: matches}}
	}
	return s
}

// pass lets time pass, looks, and compares what was written.
func (w *world) pass(d time.Duration, step string, want ...string) {
	w.t.Helper()
	w.up += d
	w.api.writes = nil
	if err := w.w.look(w.t.Context(), noon.Add(w.up), w.up); err != nil {
		w.t.Errorf("%s: %v", step, err)
	}
	if d := cmp.Diff(want, w.api.writes); d != "" {
		w.t.Errorf("%s (-want +got):\n%s", step, d)
	}
}

func TestWriter(t *testing.T) {
	w := newWorld(t)
	const good = "ClusterDetectionPolicy/p: Accepted=True/Compiled@1 Programmed=True/InForce@1 Degraded=False/AsWritten@1 of 1: 1 loaded, 0 failed"
	w.policy("p", 1)
	w.report("a", state("p", 1, 1, 0))
	w.api.synced = false
	w.pass(0, "policies are not known yet")
	w.api.synced = true
	reporting := w.reporting
	w.reporting = nil
	w.pass(2*time.Second, "who reports is not known yet")
	w.reporting = reporting
	w.pass(2*time.Second, "first", good)
	for range 50 {
		w.pass(2*time.Second, "nothing new")
	}
	// A change is written at once, the next to the same policy five seconds later.
	w.policy("p", 2)
	w.pass(2*time.Second, "nodes are about to take it")
	w.pass(4*time.Second, "seen by nobody", "ClusterDetectionPolicy/p: Accepted=Unknown/Waiting@2 Programmed=False/Progressing@2 Degraded=False/AsWritten@2 of 1: 0 loaded, 0 failed")
	w.report("a", state("p", 2, 1, 0))
	w.pass(2*time.Second, "refused, and written a moment ago")
	w.pass(4*time.Second, "refused", "ClusterDetectionPolicy/p: Accepted=False/Refused@2 Programmed=True/LastGoodInForce@1 Degraded=False/AsWritten@2 of 1: 0 loaded, 1 failed")
	// A second node; then one falls silent, and comes back.
	w.report("b", state("p", 2, 1, 0))
	w.pass(10*time.Second, "two nodes", "ClusterDetectionPolicy/p: Accepted=False/Refused@2 Programmed=True/LastGoodInForce@1 Degraded=False/AsWritten@2 of 2: 0 loaded, 2 failed")
	w.reporting = map[string]bool{"a": true, "b": false}
	w.pass(time.Minute, "b is silent", "ClusterDetectionPolicy/p: Accepted=False/Refused@2 Programmed=True/LastGoodInForce@1 Degraded=False/AsWritten@2 of 1: 0 loaded, 1 failed")
	w.reporting = map[string]bool{"a": true}
	w.pass(time.Minute, "b is forgotten")
	w.report("c", state("p", 2, 1, 0))
	w.reporting = map[string]bool{"a": true} // it was looked at before c came
	w.pass(10*time.Second, "c is new", "ClusterDetectionPolicy/p: Accepted=False/Refused@2 Programmed=True/LastGoodInForce@1 Degraded=False/AsWritten@2 of 2: 0 loaded, 2 failed")
	w.reporting = map[string]bool{}
	w.pass(time.Minute, "nobody reports", "ClusterDetectionPolicy/p: Accepted=Unknown/NoNodes@2 Programmed=Unknown/NoNodes@2 Degraded=Unknown/NoNodes@2 of 0: 0 loaded, 0 failed")
	// What nodes take within the grace is written once.
	w.reporting = map[string]bool{"a": true}
	w.policy("p", 3)
	w.pass(time.Minute, "changed")
	w.report("a", state("p", 3, 3, 0))
	w.reporting = map[string]bool{"a": true}
	w.pass(2*time.Second, "taken", "ClusterDetectionPolicy/p: Accepted=True/Compiled@3 Programmed=True/InForce@3 Degraded=False/AsWritten@3 of 1: 1 loaded, 0 failed")
	// Gone, and another one of its name.
	delete(w.api.policies, "ClusterDetectionPolicy/p")
	w.pass(time.Minute, "gone")
	if n := storetest.Counters(t, w.reg, "procession_collector_policies")["all"]; n != 0 {
		t.Errorf("%v policies are shown", n)
	}
	if n := storetest.Counters(t, w.reg, "procession_collector_policy_status_writes_total")["ok"]; n != 8 {
		t.Errorf("%v writes are counted, want 8", n)
	}
}

// Counts alone are written seldom, and for all policies together as seldom.
func TestCounts(t *testing.T) {
	w := newWorld(t)
	const policies = 30
	matched := func(n uint64) {
		var states []*pb.PolicyState
		for i := range policies {
			states = append(states, state(fmt.Sprintf("p%02d", i), 1, 1, n))
		}
		w.report("a", states...)
	}
	for i := range policies {
		w.policy(fmt.Sprintf("p%02d", i), 1)
	}
	matched(0)
	counts := func(d time.Duration) int {
		w.up += d
		w.api.writes = nil
		if err := w.w.look(t.Context(), noon.Add(w.up), w.up); err != nil {
			t.Fatal(err)
		}
		return len(w.api.writes)
	}
	var first []int
	for range 4 {
		first = append(first, counts(2*time.Second))
	}
	if d := cmp.Diff([]int{10, 10, 10, 0}, first); d != "" {
		t.Errorf("writes of %d new policies in looks (-want +got):\n%s", policies, d)
	}
	writes := 0
	const looks = 150 // of two seconds: five minutes
	for i := range looks {
		matched(uint64(i + 1))
		n := counts(2 * time.Second)
		if writes += n; n > 1 {
			t.Fatalf("%d writes in one look", n)
		}
	}
	if writes < looks*2/6-policies || writes > looks*2/5+1 {
		t.Errorf("%d writes of counts in five minutes", writes)
	}
	for _, p := range w.api.policies {
		if p.Status.Matches == 0 {
			t.Errorf("%s never had its matches written", p.Object())
		}
	}
}

// What was written is not written again while the watch lags, what somebody else
// wrote is put right, and an object of the same name is another one.
func TestOthers(t *testing.T) {
	w := newWorld(t)
	w.policy("p", 1)
	w.report("a", state("p", 1, 1, 0))
	w.api.lag = true
	const good = "ClusterDetectionPolicy/p: Accepted=True/Compiled@1 Programmed=True/InForce@1 Degraded=False/AsWritten@1 of 1: 1 loaded, 0 failed"
	w.pass(0, "first", good)
	for range 10 {
		w.report("a", state("p", 1, 1, 0))
		w.pass(2*time.Second, "the watch lags")
	}
	w.api.lag = false
	w.pass(40*time.Second, "the watch never showed it", good)
	w.api.policies["ClusterDetectionPolicy/p"].Status.Conditions[1].Status = "False"
	w.pass(40*time.Second, "somebody wrote into it", good)
	w.api.policies["ClusterDetectionPolicy/p"].UID = "another"
	w.api.policies["ClusterDetectionPolicy/p"].Status = v1alpha1.PolicyStatus{}
	w.pass(2*time.Second, "another object of the name", good)

	// One that vanishes between the watch and the write is no failure.
	w.policy("q", 1)
	w.report("a", state("p", 1, 1, 0), state("q", 1, 1, 0))
	gone := &vanishing{w.api}
	w.w.cfg.API = gone
	w.pass(2*time.Second, "gone meanwhile")
	if n := storetest.Counters(t, w.reg, "procession_collector_policy_status_writes_total")["gone"]; n != 1 {
		t.Errorf("%v writes to what is gone", n)
	}
}

type vanishing struct{ *cluster }

func (v *vanishing) ApplyStatus(context.Context, *Policy, *v1alpha1.PolicyStatus) error {
	return ErrGone
}

// An API server that refuses is tried again, and counted.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	w.policy("p", 1)
	w.report("a", state("p", 1, 1, 0))
	w.api.fail = errors.New("forbidden")
	for i := range 3 {
		if err := w.w.look(t.Context(), noon, time.Duration(i)*time.Minute); !errors.Is(err, w.api.fail) {
			t.Errorf("look %d: %v", i, err)
		}
	}
	if n := storetest.Counters(t, w.reg, "procession_collector_policy_status_writes_total")["failed"]; n != 3 {
		t.Errorf("%v failures are counted", n)
	}
	w.api.fail = nil
	w.up = 4 * time.Minute
	w.pass(0, "well again", "ClusterDetectionPolicy/p: Accepted=True/Compiled@1 Programmed=True/InForce@1 Degraded=False/AsWritten@1 of 1: 1 loaded, 0 failed")
}

// Of several collectors one writes; another takes over when it is gone.
func TestOneWriter(t *testing.T) {
	w := newWorld(t)
	w.policy("p", 1)
	w.report("a", state("p", 1, 1, 0))
	one, two := w.writer("one"), w.writer("two")
	look := func(who *Writer, up time.Duration) int {
		t.Helper()
		w.api.writes = nil
		if err := who.look(t.Context(), noon, up); err != nil {
			t.Fatal(err)
		}
		return len(w.api.writes)
	}
	if n := look(one, 0); n != 1 {
		t.Errorf("the first writes %d", n)
	}
	w.policy("p", 2)
	w.report("a", state("p", 2, 2, 0))
	if n := look(two, 0); n != 0 {
		t.Errorf("the second writes %d", n)
	}
	if _, err := w.queue.Do(t.Context(), &store.Lease{Name: "policy-status", Owner: "one"}); err != nil { // it is gone
		t.Fatal(err)
	}
	if n := look(two, time.Minute); n != 1 {
		t.Errorf("the second, alone, writes %d", n)
	}
}

// Without an API server it ends, and the metrics are there all the same.
func TestOff(t *testing.T) {
	w := New(Config{})
	w.Run(t.Context())
}

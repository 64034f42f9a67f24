package fleet

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// world is a store with nodes whose clock the test moves.
type world struct {
	t     *testing.T
	st    store.Store
	queue *store.Queue
	m     *Monitor
	now   time.Time     // the wall clock
	up    time.Duration // the clock that does not jump
	seq   map[string]uint64
	seen  int // alerts that were looked at
}

func newWorld(t *testing.T) *world {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), storetest.Dir(t))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, st: st, queue: store.NewQueue(st, store.QueueConfig{}), now: time.Unix(1_800_000_000, 0), seq: map[string]uint64{}}
	ctx, cancel := context.WithCancel(context.Background())
	go w.queue.Run(ctx)
	t.Cleanup(func() { cancel(); <-w.queue.Stopped(); st.Close() })
	w.restart("")
	return w
}

func (w *world) restart(owner string) {
	w.m = New(Config{Store: w.st, Queue: w.queue, Owner: owner})
	w.up = 0
}

func (w *world) report(node string, c *pb.Coverage) {
	w.t.Helper()
	b, err := proto.Marshal(&pb.Item{Item: &pb.Item_Coverage{Coverage: c}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.seq[node]++
	r := store.Record{Seq: w.seq[node], To: w.seq[node], Kind: store.Coverage, Payload: b, CRC32C: store.Checksum(b)}
	if res, err := w.queue.Do(w.t.Context(), &store.Batch{Node: node, Epoch: storetest.Epoch(1), Received: w.now, Records: []store.Record{r}}); err != nil || res.Items != 1 {
		w.t.Fatalf("%+v, %v", res, err)
	}
}

func well() *pb.Coverage { return &pb.Coverage{Capture: "recorder", BeatsSent: 2, BeatsSeen: 2} }

// pass lets time pass on both clocks.
func (w *world) pass(d time.Duration) { w.now, w.up = w.now.Add(d), w.up+d }

// told looks at the nodes and returns what was newly told.
func (w *world) told() (out []string) {
	w.t.Helper()
	if err := w.m.look(w.t.Context(), w.now, w.up); err != nil {
		w.t.Fatal(err)
	}
	var mine []store.Record
	for _, r := range storetest.All(w.t, w.st) {
		if r.Node == Name {
			mine = append(mine, r)
		}
	}
	for _, r := range mine[w.seen:] {
		var it pb.Item
		if err := proto.Unmarshal(r.Payload, &it); err != nil {
			w.t.Fatal(err)
		}
		out = append(out, fmt.Sprintf("%s: %s", it.GetAlert().GetTitle(), it.GetAlert().GetEvidence()[0].GetValue()))
	}
	w.seen = len(mine)
	return out
}

func (w *world) expect(step string, want ...string) {
	w.t.Helper()
	if d := cmp.Diff(want, w.told()); d != "" {
		w.t.Errorf("%s (-want +got):\n%s", step, d)
	}
	if again := w.told(); again != nil {
		w.t.Errorf("%s: told again: %v", step, again)
	}
}

func TestConditions(t *testing.T) {
	w := newWorld(t)
	w.expect("nobody is there")
	w.report("a", well())
	w.report("b", well())
	w.expect("all is well")
	w.pass(2 * time.Minute)
	w.report("b", &pb.Coverage{Capture: "recorder", BeatsSent: 2})
	w.expect("b's heartbeats do not come back", "Node is blind: b")
	w.report("b", &pb.Coverage{Capture: "recorder"})
	w.expect("a record without a heartbeat knows no better")
	w.pass(2 * time.Minute)
	w.expect("a has been quiet for four minutes", "Node is silent: a")
	if d := cmp.Diff(map[string]bool{"a": false, "b": true}, w.m.Reporting()); d != "" {
		t.Errorf("reporting (-want +got):\n%s", d)
	}
	w.pass(time.Minute)
	w.report("a", &pb.Coverage{Capture: "recorder", BeatsSent: 2, BeatsSeen: 2, Lost: map[string]uint64{"ring": 7}})
	w.report("b", well())
	w.expect("a is back and losing, b sees", "Node is no longer silent: a", "Node is losing: a", "Node is no longer blind: b")
	for range 9 {
		w.pass(time.Minute)
		w.report("a", well())
		w.report("b", well())
		w.expect("calm, and not for long enough")
	}
	w.pass(2 * time.Minute)
	w.report("a", well())
	w.report("b", well())
	w.expect("calm", "Node is no longer losing: a")
	w.report("c", &pb.Coverage{Capture: "none", CaptureReason: "CAP_NET_ADMIN"})
	w.report("d", &pb.Coverage{Capture: "recorder", Evicted: 1})
	if got := w.told(); len(got) != 2 {
		t.Errorf("told %v, want that c is blind and d is losing", got)
	}
	// Nobody waits for ever for a node that is gone.
	w.pass(8 * 24 * time.Hour)
	w.expect("all are gone")
}

// A collector that starts anew tells nothing twice, gives nodes time to come
// back, and clears what an earlier run raised.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	w.report("a", well())
	w.report("b", &pb.Coverage{Capture: "recorder", Lost: map[string]uint64{"ring": 1}})
	w.expect("b is losing", "Node is losing: b")
	w.pass(5 * time.Minute)
	w.report("b", well())
	w.expect("a is silent", "Node is silent: a")
	w.restart("")
	w.expect("started anew")
	w.pass(2 * time.Minute)
	w.expect("b has time to come back")
	w.report("a", well())
	w.expect("a came back", "Node is no longer silent: a")
	w.pass(2 * time.Minute)
	w.expect("and b did not", "Node is silent: b")
	w.pass(9 * time.Minute)
	w.report("a", well())
	w.report("b", well())
	w.pass(2 * time.Minute)
	w.report("b", well())
	if got := w.told(); len(got) == 0 || got[0] != "Node is no longer silent: b" {
		t.Errorf("told %v, want that b is back", got)
	}
}

// A wall clock that is set calls nobody silent, and hides nobody's silence.
func TestClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{5 * time.Hour, -5 * time.Hour, 30 * 24 * time.Hour, -30 * 24 * time.Hour} {
		t.Run(jump.String(), func(t *testing.T) {
			w := newWorld(t)
			w.report("a", well())
			w.report("b", &pb.Coverage{Capture: "recorder", BeatsSent: 2, BeatsSeen: 2, Lost: map[string]uint64{"ring": 7}})
			w.expect("b is losing", "Node is losing: b")
			w.pass(time.Minute)
			w.now = w.now.Add(jump)
			w.expect("the clock is set; both have reported a minute ago")
			w.report("b", well())
			w.pass(time.Minute)
			w.expect("b has reported and is not calm yet")
			w.pass(2 * time.Minute)
			w.report("b", well())
			w.expect("a has reported nothing for four minutes", "Node is silent: a")
			w.report("a", well())
			w.pass(time.Minute)
			w.expect("a is back", "Node is no longer silent: a")
			w.now = w.now.Add(-jump)
			w.pass(time.Minute)
			w.expect("the clock is put right")
			for range 8 {
				w.pass(time.Minute)
				w.report("a", well())
				w.report("b", well())
				w.told()
			}
			if got := w.m.counts["reporting"]; got != 2 {
				t.Errorf("%d nodes report, want 2: %v", got, w.m.counts)
			}
		})
	}
}

// A collector that starts with a clock that is wrong waits for nodes all the
// same, and gives up none for good.
func TestStartWithAWrongClock(t *testing.T) {
	for _, jump := range []time.Duration{30 * 24 * time.Hour, -30 * 24 * time.Hour} {
		w := newWorld(t)
		w.report("a", well())
		w.now = w.now.Add(jump)
		w.restart("")
		w.expect("started")
		w.pass(4 * time.Minute)
		if jump < 0 {
			w.expect("its report lies ahead, and nothing came for four minutes", "Node is silent: a")
			continue
		}
		w.expect("its report is a month old, it seems: nobody waits")
		w.now = w.now.Add(-jump)
		w.expect("the clock is put right", "Node is silent: a")
	}
}

// Of two collectors on one store one tells.
func TestLease(t *testing.T) {
	w := newWorld(t)
	w.restart("x")
	other := New(Config{Store: w.st, Queue: w.queue, Owner: "y"})
	w.report("a", &pb.Coverage{Capture: "none"})
	w.expect("the first", "Node is blind: a")
	if err := other.look(t.Context(), w.now, w.up); err != nil {
		t.Fatal(err)
	}
	w.expect("the second is silent")
	// It counts all the same: its metrics are true.
	if other.counts[Blind] != 1 {
		t.Errorf("counts %v", other.counts)
	}
}

// What a node says of itself cannot make the monitor fail or name another one.
func TestHostileCoverage(t *testing.T) {
	w := newWorld(t)
	b := []byte("\xff\xff")
	if _, err := w.queue.Do(t.Context(), &store.Batch{Node: "a", Epoch: storetest.Epoch(1), Received: w.now,
		Records: []store.Record{{Seq: 1, To: 1, Kind: store.Coverage, Payload: b, CRC32C: store.Checksum(b)}}}); err != nil {
		t.Fatal(err)
	}
	w.report("b", &pb.Coverage{Capture: "none", CaptureReason: "\x1b[2J", Lost: map[string]uint64{"x": 1<<64 - 1, "y": 5}, Evicted: 1<<64 - 1})
	if got := w.told(); len(got) == 0 {
		t.Error("b is blind and losing, and nothing was told")
	}
}

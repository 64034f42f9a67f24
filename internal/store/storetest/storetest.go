// Package storetest says what every store.Store must do, as tests an engine
// runs against itself.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
)

// An Opener opens the store that lives in dir, a new one if there is none. Run
// closes it before it opens dir again.
type Opener func(t testing.TB, dir string) store.Store

// Run runs all tests.
func Run(t *testing.T, open Opener) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Opener)
	}{
		{"fields come back as stored", testFields},
		{"batches meet the mark", testFence},
		{"a refused batch leaves the others of its commit alone", testGapAlone},
		{"malformed changes change nothing", testMalformed},
		{"a lost tail is told once", testTail},
		{"an old process does not end its successor", testZombie},
		{"nodes do not share epochs", testNodes},
		{"sink cursors", testSinkCursors},
		{"dead letters", testDeadLetters},
		{"leases", testLeases},
		{"the cursor of a time", testCursorAt},
		{"nodes and their coverage", testNodeStates},
		{"what nodes say of policies", testPolicyReports},
		{"removing old records", testTrim},
		{"text no database likes", testHostileText},
		{"everything survives reopening", testReopen},
		{"reading pages through", testPaging},
		{"readers beside the writer", testConcurrent},
		{"random resends store each number once", testRandom},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open) })
	}
}

// Epoch is an epoch made of one byte.
func Epoch(b byte) store.Epoch {
	var e store.Epoch
	for i := range e {
		e[i] = b
	}
	return e
}

// Alert is the record n of an epoch, its payload made of n.
func Alert(n uint64) store.Record {
	p := fmt.Appendf(nil, "payload %d", n)
	return store.Record{Seq: n, To: n, Kind: store.Alert, Payload: p, CRC32C: store.Checksum(p),
		Rule: "r", Severity: pb.Severity_SEVERITY_LOW}
}

// Alerts are the records from..to.
func Alerts(from, to uint64) (rs []store.Record) {
	for n := from; n <= to; n++ {
		rs = append(rs, Alert(n))
	}
	return rs
}

func loss(from, to uint64) store.Record {
	return store.Record{Seq: from, To: to, Kind: store.Loss, LossReason: pb.LossReason_LOSS_REASON_SPOOL_FULL, Reason: "why"}
}

func batch(node string, e store.Epoch, rs ...store.Record) *store.Batch {
	return &store.Batch{Node: node, Epoch: e, Records: rs, Received: time.Unix(1700000000, 5).UTC()}
}

func openNew(t *testing.T, open Opener) store.Store {
	st := open(t, Dir(t))
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return st
}

func commit(t *testing.T, st store.Store, cs ...store.Change) []store.Result {
	t.Helper()
	rs, err := st.Commit(t.Context(), cs)
	if err != nil {
		t.Fatalf("Commit: %v", err)
	}
	if len(rs) != len(cs) {
		t.Fatalf("Commit gave %d results for %d changes", len(rs), len(cs))
	}
	return rs
}

// All reads everything in pages of an odd size.
func All(t testing.TB, st interface {
	Read(context.Context, []store.Record, int64, int) ([]store.Record, error)
}) (all []store.Record) {
	t.Helper()
	for after := int64(0); ; after = all[len(all)-1].Cursor {
		n := len(all)
		var err error
		if all, err = st.Read(context.Background(), all, after, 37); err != nil {
			t.Fatalf("Read after %d: %v", after, err)
		}
		if len(all) == n {
			return all
		}
		for i := n; i < len(all); i++ {
			if all[i].Cursor <= after {
				t.Fatalf("Read after %d gave cursor %d", after, all[i].Cursor)
			}
			after = all[i].Cursor
		}
	}
}

// what names records in short: kind letter, range.
func what(rs []store.Record) (out []string) {
	for _, r := range rs {
		s := fmt.Sprintf("%s/%x %s %d", r.Node, r.Epoch[0], r.Kind, r.Seq)
		if r.To != r.Seq {
			s += fmt.Sprintf("-%d", r.To)
		}
		out = append(out, s)
	}
	return out
}

func testFields(t *testing.T, open Opener) {
	st := openNew(t, open)
	b := batch("node-1", Epoch(7),
		store.Record{Seq: 1, To: 1, Kind: store.Alert, Payload: []byte{0, 0xff, 0x80}, CRC32C: store.Checksum([]byte{0, 0xff, 0x80}),
			Severity: pb.Severity_SEVERITY_CRITICAL, Rule: "a/b/c/d", EventTime: time.Unix(1600000000, 999999999).UTC()},
		store.Record{Seq: 2, To: 2, Kind: store.Rejected, Reason: "crc32c: wrong", Payload: []byte("x"), CRC32C: store.Checksum([]byte("x"))},
		store.Record{Seq: 3, To: store.MaxSeq, Kind: store.Loss, LossReason: pb.LossReason_LOSS_REASON_DISK, Reason: "full"},
	)
	before := time.Now()
	res := commit(t, st, b)[0]
	want := store.Result{UpTo: store.MaxSeq, Items: 1, Rejected: 1, Losses: 1, LostSeqs: store.MaxSeq - 2}
	if d := cmp.Diff(want, res); d != "" {
		t.Errorf("result (-want +got):\n%s", d)
	}
	got := All(t, st)
	if len(got) != 3 {
		t.Fatalf("%d records, want 3", len(got))
	}
	for i, r := range got {
		w := b.Records[i]
		w.Node, w.Epoch, w.Received = b.Node, b.Epoch, b.Received
		w.Cursor, w.Committed = r.Cursor, r.Committed
		if d := cmp.Diff(w, r, cmp.Comparer(bytes.Equal)); d != "" {
			t.Errorf("record %d (-want +got):\n%s", i, d)
		}
		if r.Committed.Before(before) || r.Committed.After(time.Now()) {
			t.Errorf("record %d committed at %v, it is %v", i, r.Committed, before)
		}
	}
	if head, err := st.Head(t.Context()); err != nil || head != got[2].Cursor {
		t.Errorf("Head = %d, %v, want %d", head, err, got[2].Cursor)
	}
}

func testFence(t *testing.T, open Opener) {
	tests := []struct {
		name string
		held []store.Record // committed first
		sent []store.Record
		want store.Result
		adds []string
	}{
		{"does not begin at 1", nil, Alerts(2, 3), store.Result{Err: &store.GapError{Want: 1, Got: 2}}, nil},
		{"gap", Alerts(1, 3), Alerts(5, 6), store.Result{Err: &store.GapError{Want: 4, Got: 5}, UpTo: 3}, nil},
		{"loss behind a gap", Alerts(1, 3), []store.Record{loss(5, 9)}, store.Result{Err: &store.GapError{Want: 4, Got: 5}, UpTo: 3}, nil},
		{"first", nil, Alerts(1, 2), store.Result{UpTo: 2, Items: 2}, []string{"n/1 alert 1", "n/1 alert 2"}},
		{"follows", Alerts(1, 3), Alerts(4, 4), store.Result{UpTo: 4, Items: 1}, []string{"n/1 alert 4"}},
		{"all there", Alerts(1, 3), Alerts(2, 3), store.Result{UpTo: 3, Duplicates: 2}, nil},
		{"overlaps", Alerts(1, 3), Alerts(2, 5), store.Result{UpTo: 5, Items: 2, Duplicates: 2}, []string{"n/1 alert 4", "n/1 alert 5"}},
		{"loss alone", nil, []store.Record{loss(1, 9)}, store.Result{UpTo: 9, Losses: 1, LostSeqs: 9}, []string{"n/1 loss 1-9"}},
		{"loss told before", []store.Record{loss(1, 9)}, []store.Record{loss(1, 9)}, store.Result{UpTo: 9}, nil},
		{"loss reaches behind the mark", Alerts(1, 3), []store.Record{loss(2, 9), Alert(10)},
			store.Result{UpTo: 10, Items: 1, Losses: 1, LostSeqs: 6}, []string{"n/1 loss 4-9", "n/1 alert 10"}},
		{"a record that was told as lost", []store.Record{loss(1, 9)}, Alerts(9, 10),
			store.Result{UpTo: 10, Items: 1, Duplicates: 1}, []string{"n/1 alert 10"}},
		{"loss between", nil, []store.Record{Alert(1), loss(2, 4), Alert(5)},
			store.Result{UpTo: 5, Items: 2, Losses: 1, LostSeqs: 3}, []string{"n/1 alert 1", "n/1 loss 2-4", "n/1 alert 5"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := openNew(t, open)
			if tt.held != nil {
				commit(t, st, batch("n", Epoch(1), tt.held...))
			}
			n := len(All(t, st))
			got := commit(t, st, batch("n", Epoch(1), tt.sent...))[0]
			if d := cmp.Diff(tt.want, got, cmp.Comparer(sameError)); d != "" {
				t.Errorf("result (-want +got):\n%s", d)
			}
			if d := cmp.Diff(tt.adds, what(All(t, st)[n:])); d != "" {
				t.Errorf("added (-want +got):\n%s", d)
			}
			// And the same again is never new.
			if again := commit(t, st, batch("n", Epoch(1), tt.sent...))[0]; again.Items+again.Rejected+again.Losses != 0 {
				t.Errorf("sent again: %+v, want nothing stored", again)
			}
		})
	}
}

func sameError(a, b error) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Error() == b.Error()
}

func testGapAlone(t *testing.T, open Opener) {
	st := openNew(t, open)
	rs := commit(t, st, batch("n", Epoch(1), Alerts(1, 2)...), batch("n", Epoch(1), Alerts(4, 5)...), batch("n", Epoch(1), Alerts(3, 4)...))
	var gap *store.GapError
	if rs[0].Err != nil || !errors.As(rs[1].Err, &gap) || rs[2].Err != nil {
		t.Errorf("errors %v, %v, %v, want only the second to be a gap", rs[0].Err, rs[1].Err, rs[2].Err)
	}
	if d := cmp.Diff([]string{"n/1 alert 1", "n/1 alert 2", "n/1 alert 3", "n/1 alert 4"}, what(All(t, st))); d != "" {
		t.Errorf("stored (-want +got):\n%s", d)
	}
}

func testMalformed(t *testing.T, open Opener) {
	st := openNew(t, open)
	for name, c := range map[string]store.Change{
		"no records":        batch("n", Epoch(1)),
		"number 0":          batch("n", Epoch(1), Alert(0)),
		"hole":              batch("n", Epoch(1), Alert(1), Alert(3)),
		"backwards":         batch("n", Epoch(1), Alert(2), Alert(1)),
		"range backwards":   batch("n", Epoch(1), loss(5, 4)),
		"too high":          batch("n", Epoch(1), loss(1, store.MaxSeq+1)),
		"alert of a range":  batch("n", Epoch(1), store.Record{Seq: 1, To: 2, Kind: store.Alert}),
		"unknown kind":      batch("n", Epoch(1), store.Record{Seq: 1, To: 1, Kind: 9}),
		"damaged":           batch("n", Epoch(1), store.Record{Seq: 1, To: 1, Kind: store.Damaged}),
		"no lanes":          &store.Hello{Node: "n"},
		"lane too high":     &store.Hello{Node: "n", Lanes: []store.Lane{{Epoch: Epoch(1), Made: store.MaxSeq + 1}}},
		"sink without name": &store.SinkMoved{Cursor: 1},
		"negative cursor":   &store.SinkReplay{Sink: "s", Cursor: -1},
		"lease of nobody":   &store.Lease{Name: "x", For: time.Second},
		"trim of nothing":   &store.Trim{UpTo: 5},
		"heard too high":    &store.Heard{Node: "n", Epoch: Epoch(1), Made: store.MaxSeq + 1},
	} {
		if _, err := st.Commit(t.Context(), []store.Change{batch("n", Epoch(2), Alert(1)), c}); err == nil {
			t.Errorf("%s: committed", name)
		}
	}
	if got := All(t, st); len(got) != 0 {
		t.Errorf("stored %v, want nothing", what(got))
	}
	// The store goes on.
	commit(t, st, batch("n", Epoch(1), Alert(1)))
}

func hello(node string, lanes ...store.Lane) *store.Hello {
	return &store.Hello{Node: node, Lanes: lanes, Whole: true, At: time.Now()}
}

func heard(node string, e store.Epoch, made uint64) *store.Heard {
	return &store.Heard{Node: node, Epoch: e, Made: made, At: time.Now()}
}

func testTail(t *testing.T, open Opener) {
	a, b := Epoch(1), Epoch(2)
	tests := []struct {
		name  string
		first []store.Change
		hello *store.Hello
		marks []uint64
		want  []string // losses
	}{
		{"nothing was heard", nil, hello("n", store.Lane{Epoch: a, Made: 5}, store.Lane{Epoch: b}), []uint64{0, 0}, nil},
		{"the spool has all that was heard of",
			[]store.Change{hello("n", store.Lane{Epoch: a}), heard("n", a, 7)},
			hello("n", store.Lane{Epoch: a, Made: 7}, store.Lane{Epoch: b}), []uint64{0, 0}, nil},
		{"the spool ends below",
			[]store.Change{hello("n", store.Lane{Epoch: a}), batch("n", a, Alerts(1, 2)...), heard("n", a, 9)},
			hello("n", store.Lane{Epoch: a, Made: 4}, store.Lane{Epoch: b}), []uint64{2, 0}, []string{"n/1 loss 5-9"}},
		{"the spool forgot the epoch, and all was stored",
			[]store.Change{hello("n", store.Lane{Epoch: a}), batch("n", a, Alerts(1, 3)...), heard("n", a, 3)},
			hello("n", store.Lane{Epoch: b}), []uint64{0}, nil},
		{"the spool forgot the epoch, and more was heard of",
			[]store.Change{hello("n", store.Lane{Epoch: a}), batch("n", a, Alerts(1, 3)...), heard("n", a, 5)},
			hello("n", store.Lane{Epoch: b}), []uint64{0}, []string{"n/1 loss 4-5"}},
		{"the store has more than the spool",
			[]store.Change{hello("n", store.Lane{Epoch: a}), batch("n", a, Alerts(1, 5)...), heard("n", a, 6)},
			hello("n", store.Lane{Epoch: a, Made: 2}, store.Lane{Epoch: b}), []uint64{5, 0}, []string{"n/1 loss 6"}},
		{"the same run comes again",
			[]store.Change{hello("n", store.Lane{Epoch: a}), heard("n", a, 5)},
			hello("n", store.Lane{Epoch: a, Made: 2}), []uint64{0}, nil},
		{"the hello does not name all epochs",
			[]store.Change{hello("n", store.Lane{Epoch: a}), heard("n", a, 5)},
			&store.Hello{Node: "n", Lanes: []store.Lane{{Epoch: Epoch(9)}}, At: time.Now()}, []uint64{0}, nil},
		{"another node's epoch is not touched",
			[]store.Change{hello("m", store.Lane{Epoch: a}), heard("m", a, 5)},
			hello("n", store.Lane{Epoch: b}), []uint64{0}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := openNew(t, open)
			if tt.first != nil {
				commit(t, st, tt.first...)
			}
			n := len(All(t, st))
			res := commit(t, st, tt.hello)[0]
			if d := cmp.Diff(tt.marks, res.Marks); d != "" {
				t.Errorf("marks (-want +got):\n%s", d)
			}
			added := All(t, st)[n:]
			if d := cmp.Diff(tt.want, what(added)); d != "" {
				t.Errorf("added (-want +got):\n%s", d)
			}
			var lost uint64
			for _, r := range added {
				lost += r.To - r.Seq + 1
				if r.LossReason != pb.LossReason_LOSS_REASON_CRASH {
					t.Errorf("reason %v, want CRASH", r.LossReason)
				}
			}
			if res.Losses != len(added) || res.LostSeqs != lost {
				t.Errorf("result says %d losses of %d, stored %d of %d", res.Losses, res.LostSeqs, len(added), lost)
			}
			// Once: neither the same Hello, nor a late heartbeat of the old run,
			// nor the next start tells it again.
			n += len(added)
			last := tt.hello.Lanes[len(tt.hello.Lanes)-1]
			if last.Epoch == b && (tt.first == nil || tt.first[0].(*store.Hello).Node == "n") {
				commit(t, st, heard("n", a, 100))
			}
			commit(t, st, tt.hello)
			commit(t, st, hello("n", store.Lane{Epoch: a, Made: 1}, store.Lane{Epoch: b}, store.Lane{Epoch: Epoch(3)}))
			if more := All(t, st)[n:]; last.Epoch == b && len(more) != 0 {
				t.Errorf("told again: %v", what(more))
			}
		})
	}
}

func testZombie(t *testing.T, open Opener) {
	a, b := Epoch(1), Epoch(2)
	st := openNew(t, open)
	commit(t, st, hello("n", store.Lane{Epoch: a}), batch("n", a, Alerts(1, 3)...))
	commit(t, st, hello("n", store.Lane{Epoch: b}), heard("n", b, 4))
	commit(t, st, hello("n", store.Lane{Epoch: a, Made: 3})) // the old process, late
	commit(t, st, batch("n", b, Alerts(1, 4)...), heard("n", b, 9))
	if got := commit(t, st, hello("n", store.Lane{Epoch: b, Made: 4}))[0]; got.Losses != 0 || got.Marks[0] != 4 {
		t.Errorf("the running epoch's hello: %+v, want mark 4 and no loss", got)
	}
	res := commit(t, st, hello("n", store.Lane{Epoch: b, Made: 4}, store.Lane{Epoch: Epoch(3)}))[0]
	if res.LostSeqs != 5 {
		t.Errorf("lost %d at the next start, want 5: the late hello ended its successor", res.LostSeqs)
	}
}

func testNodes(t *testing.T, open Opener) {
	st := openNew(t, open)
	rs := commit(t, st, batch("n", Epoch(1), Alerts(1, 3)...), batch("m", Epoch(1), Alerts(1, 1)...), batch("n", Epoch(2), Alerts(1, 2)...))
	for i, want := range []uint64{3, 1, 2} {
		if rs[i].UpTo != want || rs[i].Duplicates != 0 {
			t.Errorf("batch %d: %+v, want UpTo %d", i, rs[i], want)
		}
	}
	res := commit(t, st, hello("m", store.Lane{Epoch: Epoch(2)}, store.Lane{Epoch: Epoch(1)}))[0]
	if d := cmp.Diff([]uint64{0, 1}, res.Marks); d != "" {
		t.Errorf("marks of m (-want +got):\n%s", d)
	}
}

func testSinkCursors(t *testing.T, open Opener) {
	st := openNew(t, open)
	commit(t, st, &store.SinkMoved{Sink: "a", Cursor: 5}, &store.SinkMoved{Sink: "b", Cursor: 6}, &store.SinkMoved{Sink: "a", Cursor: 7})
	sinksAre(t, st, map[string]store.SinkState{"a": {Cursor: 7}, "b": {Cursor: 6}})
	// Sent back: what the runner says that does not know is refused.
	rs := commit(t, st, &store.SinkReplay{Sink: "a", Cursor: 2}, &store.SinkMoved{Sink: "a", Cursor: 8}, &store.SinkReplay{Sink: "new", Cursor: 4})
	if !rs[0].Replayed || !rs[1].Stale || !rs[2].Replayed {
		t.Errorf("results %+v, want replayed, stale, replayed", rs)
	}
	sinksAre(t, st, map[string]store.SinkState{"a": {Cursor: 2, Replay: 1}, "b": {Cursor: 6}, "new": {Cursor: 4, Replay: 1}})
	if rs := commit(t, st, &store.SinkMoved{Sink: "a", Cursor: 3, Replay: 1}); rs[0].Stale {
		t.Error("a move that knows of the replay is stale")
	}
	sinksAre(t, st, map[string]store.SinkState{"a": {Cursor: 3, Replay: 1}, "b": {Cursor: 6}, "new": {Cursor: 4, Replay: 1}})
}

func sinksAre(t *testing.T, st store.Store, want map[string]store.SinkState) {
	t.Helper()
	got, err := st.Sinks(t.Context())
	if err != nil {
		t.Fatalf("Sinks: %v", err)
	}
	for name, s := range got {
		if s.Moved.IsZero() || s.Moved.After(time.Now()) {
			t.Errorf("sink %s moved at %v", name, s.Moved)
		}
		s.Moved = time.Time{}
		got[name] = s
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("sinks (-want +got):\n%s", d)
	}
}

func testDeadLetters(t *testing.T, open Opener) {
	st := openNew(t, open)
	commit(t, st, batch("n", Epoch(1), Alerts(1, 9)...))
	commit(t, st, &store.SinkMoved{Sink: "a", Cursor: 5, Dead: []store.Dead{{Cursor: 3, Reason: "400"}, {Cursor: 5, Reason: "too large"}}},
		&store.SinkMoved{Sink: "a", Cursor: 6, Dead: []store.Dead{{Cursor: 5, Reason: "again"}}},
		&store.SinkMoved{Sink: "a", Cursor: 7, Replay: 4, Dead: []store.Dead{{Cursor: 7, Reason: "of a stale move"}}})
	want := []store.Dead{{Cursor: 3, Reason: "400"}, {Cursor: 5, Reason: "too large"}}
	got, err := st.DeadLetters(t.Context(), "a", 0, 10)
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("dead letters %v (-want +got):\n%s", err, d)
	}
	if got, err := st.DeadLetters(t.Context(), "a", 3, 10); err != nil || len(got) != 1 {
		t.Errorf("above 3: %v, %v, want one", got, err)
	}
	sinksAre(t, st, map[string]store.SinkState{"a": {Cursor: 6, Dead: 2}})
}

func testLeases(t *testing.T, open Opener) {
	st := openNew(t, open)
	take := func(owner string, d time.Duration) bool {
		t.Helper()
		return !commit(t, st, &store.Lease{Name: "sink/s", Owner: owner, For: d})[0].Stale
	}
	moved := func(owner string, cursor int64) bool {
		t.Helper()
		return !commit(t, st, &store.SinkMoved{Sink: "s", Cursor: cursor, Owner: owner})[0].Stale
	}
	if moved("a", 1) {
		t.Error("a sink was moved without a lease")
	}
	if !take("a", time.Hour) || take("b", time.Hour) || !take("a", time.Hour) {
		t.Error("want a to have the lease, to renew it, and b not to get it")
	}
	if !moved("a", 2) || moved("b", 3) || !moved("", 4) {
		t.Error("want a to move the sink, b not to, and nobody to be asked without an owner")
	}
	take("b", 0) // gives nothing back that is not its own
	if take("b", time.Hour) {
		t.Error("b took the lease of a")
	}
	take("a", 0)
	if !take("b", time.Nanosecond) {
		t.Error("want b to get what was given back")
	}
	if take("a", time.Hour) || !take("a", time.Hour) {
		t.Error("want a to get what has run out when it has seen that, and not before")
	}
	if moved("b", 9) {
		t.Error("b moved the sink after a took over")
	}
	for range 5 { // whoever renews in time keeps it, however short that is
		if !take("a", time.Nanosecond) || take("b", time.Hour) {
			t.Fatal("want a to renew, and b not to get what was renewed since it looked")
		}
	}
	if !take("b", time.Nanosecond) || take("a", time.Hour) {
		t.Error("want b to get what a no longer renews, and a to look first")
	}
	if !commitOK(t, st, &store.Lease{Name: "sink/other", Owner: "b", For: time.Hour}) {
		t.Error("another lease is not free")
	}
	sinksAre(t, st, map[string]store.SinkState{"s": {Cursor: 4}})
}

func commitOK(t *testing.T, st store.Store, c store.Change) bool {
	t.Helper()
	return !commit(t, st, c)[0].Stale
}

func testCursorAt(t *testing.T, open Opener) {
	st := openNew(t, open)
	at := func(when time.Time) int64 {
		t.Helper()
		n, err := st.CursorAt(t.Context(), when)
		if err != nil {
			t.Fatalf("CursorAt: %v", err)
		}
		return n
	}
	if n := at(time.Now()); n != 0 {
		t.Errorf("of an empty store: %d", n)
	}
	commit(t, st, batch("n", Epoch(1), Alerts(1, 3)...))
	first := All(t, st)
	time.Sleep(time.Millisecond) // the next commit has another time
	commit(t, st, batch("n", Epoch(1), Alerts(4, 6)...))
	rs := All(t, st)
	for _, tt := range []struct {
		name string
		when time.Time
		want int64
	}{
		{"long ago", time.Unix(1, 0), first[0].Cursor - 1},
		{"just before the second", rs[3].Committed, rs[2].Cursor},
		{"just after the first", rs[2].Committed.Add(1), rs[2].Cursor},
		{"tomorrow", time.Now().Add(24 * time.Hour), rs[5].Cursor},
	} {
		if n := at(tt.when); n != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, n, tt.want)
		}
	}
}

func coverage(n uint64, text string) store.Record {
	r := Alert(n)
	r.Kind, r.Payload, r.CRC32C, r.Rule, r.Severity = store.Coverage, []byte(text), store.Checksum([]byte(text)), "", 0
	return r
}

func testNodeStates(t *testing.T, open Opener) {
	st := openNew(t, open)
	one, two := time.Unix(1700000000, 0).UTC(), time.Unix(1700000060, 7).UTC()
	b := func(node string, at time.Time, rs ...store.Record) *store.Batch {
		return &store.Batch{Node: node, Epoch: Epoch(1), Records: rs, Received: at}
	}
	commit(t, st, b("quiet", one, Alert(1)))
	commit(t, st, b("n", one, coverage(1, "first"), Alert(2), coverage(3, "second")))
	commit(t, st, b("n", two, coverage(3, "sent again, another"), Alert(4)), b("m", two, coverage(1, "of m")))
	want := map[string]store.NodeState{
		"quiet": {Seen: one},
		"n":     {Seen: two, Coverage: []byte("second"), At: one},
		"m":     {Seen: two, Coverage: []byte("of m"), At: two},
	}
	commit(t, st, &store.Flagged{Node: "m", Flags: "silent"}, &store.Flagged{Node: "quiet", Flags: "has no coverage"})
	m := want["m"]
	m.Flags = "silent"
	want["m"] = m
	got, err := st.Nodes(t.Context())
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("nodes %v (-want +got):\n%s", err, d)
	}
}

// What each node said last about its policies is kept, and told once.
func testPolicyReports(t *testing.T, open Opener) {
	st := openNew(t, open)
	said := func(n uint64, text string) store.Record {
		r := coverage(n, "coverage")
		r.Policies = []byte(text)
		return r
	}
	commit(t, st, batch("n", Epoch(1), said(1, "old"), said(2, "n's")), batch("m", Epoch(1), said(1, "m's")))
	commit(t, st, batch("n", Epoch(1), coverage(3, "no word of policies")), batch("k", Epoch(1), Alert(1)))
	reports := func(after int64) map[string]string {
		t.Helper()
		all, err := st.PolicyReports(t.Context(), after)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, r := range all {
			if r.Version <= after {
				t.Errorf("version %d after %d", r.Version, after)
			}
			got[r.Node] = string(r.Payload)
		}
		return got
	}
	last := func() (v int64) {
		all, err := st.PolicyReports(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		return all[len(all)-1].Version
	}
	if d := cmp.Diff(map[string]string{"n": "n's", "m": "m's"}, reports(0)); d != "" {
		t.Errorf("reports (-want +got):\n%s", d)
	}
	seen := last()
	commit(t, st, batch("m", Epoch(1), said(1, "sent again, another"), said(2, "")))
	if d := cmp.Diff(map[string]string{"m": ""}, reports(seen)); d != "" {
		t.Errorf("news (-want +got):\n%s", d)
	}
	if d := cmp.Diff(map[string]string{}, reports(last())); d != "" {
		t.Errorf("when nothing is new (-want +got):\n%s", d)
	}
}

func testTrim(t *testing.T, open Opener) {
	st := openNew(t, open)
	commit(t, st, batch("n", Epoch(1), Alerts(1, 20)...), &store.SinkMoved{Sink: "s", Cursor: 4, Dead: []store.Dead{{Cursor: 2}, {Cursor: 19}}})
	all := All(t, st)
	for i, want := range []int{7, 5, 0} {
		if res := commit(t, st, &store.Trim{UpTo: all[11].Cursor, Limit: 7})[0]; res.Trimmed != want {
			t.Errorf("trim %d removed %d, want %d", i, res.Trimmed, want)
		}
	}
	if d := cmp.Diff(all[12:], All(t, st)); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	commit(t, st, &store.Trim{UpTo: 1 << 60, Limit: 100})
	if left := All(t, st); len(left) != 0 {
		t.Errorf("%d records left, want none", len(left))
	}
	// Cursors and marks go on as if nothing had happened.
	res := commit(t, st, batch("n", Epoch(1), Alerts(15, 21)...))[0]
	if rs := All(t, st); res.Duplicates != 6 || len(rs) != 1 || rs[0].Cursor <= all[19].Cursor {
		t.Errorf("after all was removed: %+v, %v; want 6 duplicates and one record above cursor %d", res, what(rs), all[19].Cursor)
	}
	if head, err := st.Head(t.Context()); err != nil || head <= all[19].Cursor {
		t.Errorf("head %d, %v", head, err)
	}
	if used, free, err := st.Size(t.Context()); err != nil || used <= 0 || free < 0 {
		t.Errorf("size %d, %d, %v", used, free, err)
	}
}

// What a hostile agent writes into fields that a database has rules for.
func testHostileText(t *testing.T, open Opener) {
	st := openNew(t, open)
	r := Alert(1)
	r.Rule, r.Severity = "a\x00b\xff\u202e", 1<<31-1
	bad := store.Record{Seq: 2, To: 2, Kind: store.Rejected, Reason: "x\x00\xc3", Payload: nil, CRC32C: store.Checksum(nil)}
	res := commit(t, st, batch("n", Epoch(1), r, bad, store.Record{Seq: 3, To: 3, Kind: store.Loss, LossReason: 1<<31 - 1, Reason: "\x00"}))[0]
	if got := All(t, st); res.Items != 1 || len(got) != 3 || got[0].Kind != store.Alert || got[0].Severity != r.Severity {
		t.Errorf("%+v, %v", res, what(got))
	}
}

func testReopen(t *testing.T, open Opener) {
	dir := Dir(t)
	st := open(t, dir)
	commit(t, st, hello("n", store.Lane{Epoch: Epoch(1)}), batch("n", Epoch(1), Alerts(1, 50)...), heard("n", Epoch(1), 60),
		&store.SinkMoved{Sink: "s", Cursor: 3})
	before := All(t, st)
	if err := st.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	st = open(t, dir)
	defer st.Close()
	if d := cmp.Diff(before, All(t, st)); d != "" {
		t.Errorf("records (-before +after):\n%s", d)
	}
	sinksAre(t, st, map[string]store.SinkState{"s": {Cursor: 3}})
	res := commit(t, st, hello("n", store.Lane{Epoch: Epoch(1), Made: 50}, store.Lane{Epoch: Epoch(2)}))[0]
	if d := cmp.Diff([]uint64{50, 0}, res.Marks); d != "" || res.LostSeqs != 10 {
		t.Errorf("lost %d, want 10; marks (-want +got):\n%s", res.LostSeqs, d)
	}
}

func testPaging(t *testing.T, open Opener) {
	st := openNew(t, open)
	big := bytes.Repeat([]byte("x"), 1<<20)
	for n := uint64(1); n <= 12; n++ {
		r := Alert(n)
		r.Payload, r.CRC32C = big, store.Checksum(big)
		commit(t, st, batch("n", Epoch(1), r))
	}
	rs, err := st.Read(t.Context(), nil, 0, 12)
	if err != nil || len(rs) == 0 || len(rs) == 12 {
		t.Errorf("Read of 12 MiB gave %d records at once, %v; want a part", len(rs), err)
	}
	if got := All(t, st); len(got) != 12 {
		t.Errorf("%d records in pages, want 12", len(got))
	}
	if rs, err := st.Read(t.Context(), nil, 1<<60, 5); len(rs) != 0 || err != nil {
		t.Errorf("Read behind the end: %d records, %v", len(rs), err)
	}
}

// A reader sees each commit whole, and in order, while more come.
func testConcurrent(t *testing.T, open Opener) {
	st := openNew(t, open)
	const batches, size = 100, 10
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			var after int64
			for seen := uint64(0); seen < batches*size; {
				rs, err := st.Read(t.Context(), nil, after, 1000)
				if err != nil {
					t.Errorf("Read: %v", err)
					return
				}
				for _, r := range rs {
					if r.Seq != seen+1 || r.Cursor <= after {
						t.Errorf("read number %d at cursor %d after number %d at %d", r.Seq, r.Cursor, seen, after)
						return
					}
					seen, after = r.Seq, r.Cursor
				}
				if seen%size != 0 {
					t.Errorf("a commit was seen in part: %d records", seen)
					return
				}
			}
		})
	}
	for i := range uint64(batches) {
		commit(t, st, batch("n", Epoch(1), Alerts(i*size+1, (i+1)*size)...))
	}
	wg.Wait()
}

// Agents that resend as they like never get a number stored twice, left out,
// or out of order.
func testRandom(t *testing.T, open Opener) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	st := openNew(t, open)
	const lanes, top = 3, 60
	var mark [lanes]uint64
	var want [lanes][]uint64 // 0 for a number within a loss
	done := func() bool { return mark[0] >= top && mark[1] >= top && mark[2] >= top }
	for round := 0; !done(); round++ {
		if round > 5000 {
			t.Fatal("no progress")
		}
		var cs []store.Change
		var of []int
		var first []uint64
		for range 1 + rnd.IntN(4) {
			l := rnd.IntN(lanes)
			from := uint64(max(1, int(mark[l])-5+rnd.IntN(8)))
			var rs []store.Record
			for next := from; next < from+uint64(1+rnd.IntN(6)); {
				r := Alert(next)
				switch rnd.IntN(8) {
				case 0:
					r = loss(next, next+uint64(rnd.IntN(4)))
				case 1:
					r.Kind, r.Reason = store.Rejected, "bad"
				}
				rs = append(rs, r)
				next = r.To + 1
			}
			cs, of, first = append(cs, batch(fmt.Sprint("n", l), Epoch(byte(l)), rs...)), append(of, l), append(first, from)
		}
		for i, res := range commit(t, st, cs...) {
			l, b := of[i], cs[i].(*store.Batch)
			if gap := first[i] > mark[l]+1; gap != (res.Err != nil) {
				t.Fatalf("batch from %d at mark %d: %v", first[i], mark[l], res.Err)
			}
			if res.Err == nil {
				n := 0
				for _, r := range b.Records {
					if r.Kind != store.Loss {
						n++
					}
					for s := max(r.Seq, mark[l]+1); s <= r.To; s++ {
						want[l] = append(want[l], s)
					}
					mark[l] = max(mark[l], r.To)
				}
				if got := res.Items + res.Rejected + res.Duplicates; got != n {
					t.Fatalf("batch of %d records: %+v does not add up", n, res)
				}
			}
			if res.UpTo != mark[l] {
				t.Fatalf("mark %d, want %d", res.UpTo, mark[l])
			}
		}
	}
	var got [lanes][]uint64
	for _, r := range All(t, st) {
		for s := r.Seq; s <= r.To; s++ {
			got[r.Epoch[0]] = append(got[r.Epoch[0]], s)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("numbers (-want +got):\n%s", d)
	}
}

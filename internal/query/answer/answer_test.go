package answer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/query"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

type refuser struct{}

func (refuser) Deliver(_ context.Context, recs []store.Record) error {
	for i := range recs {
		if recs[i].Seq == 3 {
			return &sink.DeliveryError{Done: i, Refused: true, Err: errors.New("no \x1b[2J good")}
		}
	}
	return nil
}

// world is a collector's store with a sink, answering on a real socket.
type world struct {
	t     *testing.T
	dir   string
	queue *store.Queue
	sink  *sink.Runner
	next  uint64
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: storetest.Dir(t), next: 1}
	st, err := store.OpenSQLite(t.Context(), w.dir)
	if err != nil {
		t.Fatal(err)
	}
	w.queue = store.NewQueue(st, store.QueueConfig{})
	if w.sink, err = sink.New(sink.Config{Name: "s", Sink: refuser{}, Store: st, Queue: w.queue}, sink.NewMetrics(nil)); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(w.dir)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(w.dir, query.Socket)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v, want mode 0600", fi, err)
	}
	srv := New(Config{Cluster: "c", Store: st, Queue: w.queue, Sinks: []*sink.Runner{w.sink}, Backup: st.Backup})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 3)
	go func() { done <- w.queue.Run(ctx) }()
	go func() { done <- w.sink.Run(ctx) }()
	go func() { srv.Serve(ctx, l); done <- nil }()
	t.Cleanup(func() {
		cancel()
		for range 3 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		st.Close()
	})
	return w
}

func (w *world) add(items ...*pb.Item) {
	w.t.Helper()
	b := &store.Batch{Node: "n", Epoch: storetest.Epoch(1), Received: time.Now()}
	for _, it := range items {
		p, err := proto.Marshal(it)
		if err != nil {
			w.t.Fatal(err)
		}
		r := store.Record{Seq: w.next, To: w.next, Kind: store.Alert, Payload: p, CRC32C: store.Checksum(p), Severity: it.GetAlert().GetSeverity(), Rule: it.GetAlert().GetRule()}
		switch {
		case it.GetCoverage() != nil:
			r.Kind = store.Coverage
		case it.GetAmendment() != nil:
			r.Kind = store.Amendment
		}
		if it.GetAlert().GetDryRun() || it.GetAmendment().GetDryRun() {
			r.Kind = store.DryRun
		}
		b.Records = append(b.Records, r)
		w.next++
	}
	if _, err := w.queue.Do(w.t.Context(), b); err != nil {
		w.t.Fatal(err)
	}
}

func alert(rule string, s pb.Severity) *pb.Item {
	return &pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{Rule: "k//p/" + rule, Severity: s, Event: &pb.Event{Process: &pb.Process{Pid: 1}}}}}
}

// run is a command as people give it.
func (w *world) run(args string) (string, error) {
	var out bytes.Buffer
	fields := strings.Fields(args)
	err := query.Command(w.t.Context(), fields[0], append(fields[1:], "--state", w.dir), &out)
	return out.String(), err
}

func (w *world) must(args string) string {
	w.t.Helper()
	out, err := w.run(args)
	if err != nil {
		w.t.Fatalf("%s: %v", args, err)
	}
	return out
}

func TestAlerts(t *testing.T) {
	w := newWorld(t)
	for n := range 30 {
		w.add(alert(fmt.Sprint("r", n), pb.Severity(1+n%5)), &pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{}}})
	}
	rules := func(out string) (rs []string) {
		for _, l := range strings.Split(strings.TrimSpace(out), "\n") {
			if f := strings.Fields(l); len(f) > 3 { // without a time
				rs = append(rs, f[2])
			}
		}
		return rs
	}
	for _, tt := range []struct {
		args string
		want []string
	}{
		{"alerts --last 3", []string{"r27", "r28", "r29"}},
		{"alerts --last 2 --min-severity critical", []string{"r24", "r29"}},
		{"alerts --since 1h --rule k/*/p/r[12]", []string{"r1", "r2"}},
		{"alerts --since 1h --node other", nil},
		{"alerts --last 5 --namespace shop", nil},
	} {
		if d := cmp.Diff(tt.want, rules(w.must(tt.args))); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.args, d)
		}
	}
	if got := w.must("alerts --last 1000 --kinds coverage --format json"); strings.Count(got, `"kind":"Coverage"`) != 30 {
		t.Errorf("coverage: %s", got)
	}
	for args, want := range map[string]string{
		"alerts --kinds alerts":          "kinds:",
		"alerts --rule [":                "rules[0]:",
		"alerts --since yesterday":       "--since:",
		"alerts --min-severity terrible": "--min-severity",
		"alerts --format xml":            "--format",
		"alerts --bogus":                 "bogus",
	} {
		if _, err := w.run(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}

// What comes is shown as it comes.
func TestFollow(t *testing.T) {
	w := newWorld(t)
	w.add(alert("before", 3))
	ctx, cancel := context.WithCancel(t.Context())
	r, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	done := make(chan error, 1)
	go func() {
		done <- query.Command(ctx, "alerts", []string{"--follow", "--since", "1h", "--state", w.dir}, out)
		out.Close()
	}()
	buf := make([]byte, 64<<10)
	read := func(want string) {
		t.Helper()
		n, err := r.Read(buf)
		if err != nil || !strings.Contains(string(buf[:n]), want) {
			t.Errorf("read %q, %v, want %s", buf[:n], err, want)
		}
	}
	read("before")
	w.add(alert("after", 3))
	read("after")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestSinksAndReplay(t *testing.T) {
	w := newWorld(t)
	for n := range 6 {
		w.add(alert(fmt.Sprint("r", n), 3))
	}
	if !w.sink.WaitFor(t.Context(), 6) {
		t.Fatal("the sink did not take them")
	}
	list := w.must("sink list")
	if f := strings.Fields(strings.Split(list, "\n")[1]); f[0] != "s" || f[1] != "ok" || f[2] != "0" || f[len(f)-1] != "1" {
		t.Errorf("sinks:\n%s", list)
	}
	if dead := w.must("sink dead s"); !strings.Contains(dead, "\\x1b[2J good") || strings.Contains(dead, "\x1b") || !strings.Contains(dead, `/3"`) {
		t.Errorf("dead letters:\n%q", dead)
	}
	if got := w.must("sink replay s --from 1h"); !strings.Contains(got, "6 records") {
		t.Errorf("replay: %s", got)
	}
	for args, want := range map[string]string{
		"sink replay t --from 1h": `no sink "t"; there are s`,
		"sink replay s":           "--from",
		"sink replay s --from x":  "--from",
		"sink dead":               "name is missing",
		"sink":                    "list, dead or replay",
		"sink bury s":             "bury",
		"backup":                  "backup FILE",
	} {
		if _, err := w.run(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
	file := filepath.Join(storetest.Dir(t), "b.db")
	if got := w.must("backup " + file); !strings.Contains(got, "bytes") {
		t.Errorf("backup: %s", got)
	}
	if _, err := w.run("backup " + file); err == nil {
		t.Error("a backup over a file that is there")
	}
}

func TestNodes(t *testing.T) {
	w := newWorld(t)
	w.add(&pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{Capture: "re\x1b[2Jcorder", Events: map[string]uint64{"Exec": 7}, Lost: map[string]uint64{"ring": 2}, BeatsSent: 2, BeatsSeen: 1, Rules: 31,
		Unwatched: &pb.Unwatched{From: timestamppb.New(time.Unix(100, 0)), Until: timestamppb.New(time.Unix(107, 0)), Reason: "st\x1bopped"}}}})
	if _, err := w.queue.Do(t.Context(), &store.Flagged{Node: "n", Flags: "losing"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.queue.Do(t.Context(), &store.Batch{Node: "@collector", Epoch: storetest.Epoch(2), Records: storetest.Alerts(1, 1), Received: time.Now()}); err != nil {
		t.Fatal(err)
	}
	got := w.must("nodes")
	rows := strings.Split(strings.TrimSpace(got), "\n")
	if len(rows) != 2 || strings.Contains(got, "\x1b") {
		t.Fatalf("nodes:\n%s", got)
	}
	for _, want := range []string{"n ", "losing", " 7 ", " 2 ", "1/2", "31", "7s st"} {
		if !strings.Contains(rows[1], want) {
			t.Errorf("%q is not in %q", want, rows[1])
		}
	}
}

// Who asks for an alert gets one, with what became known since, however far the
// amendment is behind it.
func TestAlertsAreAmended(t *testing.T) {
	w := newWorld(t)
	late := alert("late", pb.Severity_SEVERITY_HIGH)
	late.GetAlert().Event.Place, late.GetAlert().Event.PlaceReason = "container", "pod-not-listed"
	late.GetAlert().Event.Pod = &pb.Pod{Uid: "u"}
	w.add(late)
	for n := range 2 * pageRecords {
		w.add(alert(fmt.Sprint("r", n), pb.Severity_SEVERITY_LOW))
	}
	w.add(&pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 1, Place: "container", Pod: &pb.Pod{Uid: "u", Namespace: "shop", Name: "web"}}}})
	for _, args := range []string{
		"alerts --format json --since 1h --rule k/*/p/late",
		"alerts --format json --last 1000 --rule k/*/p/late",
		"alerts --format json --last 1000 --namespace shop",
		"alerts --format json --since 1h --namespace shop",
	} {
		out := w.must(args)
		if strings.Count(out, "\n") != 1 || !strings.Contains(out, `"namespace":"shop"`) || !strings.Contains(out, "/late") || strings.Contains(out, "pod-not-listed") {
			t.Errorf("%s:\n%.600s", args, out)
		}
	}
	if out := w.must("alerts --format json --kinds amendment"); strings.Count(out, "\n") != 1 || !strings.Contains(out, `"amends":"c/n/`) {
		t.Errorf("the amendment by itself:\n%s", out)
	}
	if out := w.must("alerts --format json --last 1000"); strings.Count(out, "\n") != 2*pageRecords+1 || strings.Contains(out, "Amendment") {
		t.Errorf("%d lines", strings.Count(out, "\n"))
	}
}

// What rules in dry run raise is told to those who ask, marked, and amended.
func TestDryRuns(t *testing.T) {
	w := newWorld(t)
	w.add(alert("loud", pb.Severity_SEVERITY_HIGH))
	dry := alert("tried", pb.Severity_SEVERITY_HIGH)
	dry.GetAlert().DryRun = true
	w.add(dry)
	w.add(&pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 2, DryRun: true, Pod: &pb.Pod{Uid: "u", Namespace: "shop", Name: "web"}}}})
	for _, args := range []string{"alerts --format json", "alerts --format json --since 1h", "alerts --format json --kinds amendment", "alerts"} {
		if out := w.must(args); strings.Contains(out, "tried") || strings.Contains(out, "dry") || strings.Contains(out, "Amendment") {
			t.Errorf("%s: nobody asked for a dry run:\n%s", args, out)
		}
	}
	for _, args := range []string{"alerts --format json --dry-run", "alerts --format json --dry-run --since 1h"} {
		out := w.must(args)
		if strings.Count(out, "\n") != 2 || strings.Count(out, `"dryRun":true`) != 1 || !strings.Contains(out, `"namespace":"shop"`) {
			t.Errorf("%s: want both alerts, the one marked and amended:\n%s", args, out)
		}
	}
	if out := w.must("alerts --dry-run"); strings.Count(out, " dry-run") != 1 {
		t.Errorf("lines:\n%s", out)
	}
}

package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/enrich"
	"github.com/procession-dev/procession/internal/event"
)

// A lateWorld knows as much as the test wants.
type lateWorld struct {
	late
	knows      map[*event.Workload]*event.Workload
	generation uint64
	heads      []alertHead
	sent       []string // SEQ NAMESPACE/POD/CONTAINER REASON
	judged     []string // what rules saw
}

var headSeven = alertHead{"k/n/p/r", pb.Severity_SEVERITY_HIGH, true}

func newLateWorld() *lateWorld {
	w := &lateWorld{knows: map[*event.Workload]*event.Workload{}}
	w.late = late{
		complete: func(x *event.Workload) *event.Workload {
			for w.knows[x] != nil {
				x = w.knows[x]
			}
			return x
		},
		generation: func() uint64 { return w.generation },
		build:      &alert.Builder{},
		send: func(it *pb.Item) {
			a := it.GetAmendment()
			w.heads = append(w.heads, alertHead{a.Rule, a.Severity, a.DryRun})
			w.sent = append(w.sent, fmt.Sprintf("%d %s/%s/%s %s", a.Seq, a.Pod.GetNamespace(), a.Pod.GetName(), a.Container.GetName(), a.PlaceReason))
		},
		reconsider: func(ev *event.Event, before *event.Workload) {
			w.judged = append(w.judged, fmt.Sprintf("%s then %s", before.Reason, ev.Process.Workload.Reason))
		},
	}
	return w
}

// steps are a workload as it becomes known: not at all, the pod, the container.
func steps(w *lateWorld) [3]*event.Workload {
	p := &event.Pod{UID: "u", Namespace: "shop", Name: "web"}
	s := [3]*event.Workload{
		{Place: event.PlaceContainer, ContainerID: "c", PodUID: "u", Reason: enrich.ReasonNotListed},
		{Place: event.PlaceContainer, ContainerID: "c", PodUID: "u", Pod: p, Reason: enrich.ReasonNoStatus},
		{Place: event.PlaceContainer, ContainerID: "c", PodUID: "u", Pod: p, Container: &event.Container{Name: "main"}, ContainerName: "main"},
	}
	return s
}

func (w *lateWorld) check(t *testing.T) {
	t.Helper()
	waiting, events, bytes := uint64(0), uint64(0), 0
	for _, it := range w.list {
		if it.seq != 0 {
			waiting++
		}
		if it.ev != nil {
			events++
			bytes += size(it.ev.Process)
		}
	}
	if bytes != w.kept {
		t.Errorf("%d bytes are kept, counted as %d", bytes, w.kept)
	}
	if a, sum := w.alerts.Load(), w.completed.Load()+w.expired.Load()+w.evicted.Load()+waiting; a != sum {
		t.Errorf("%d alerts were late, %d are accounted for", a, sum)
	}
	if e, sum := w.events.Load(), w.late.judged.Load()+w.dropped.Load()+events; e != sum {
		t.Errorf("%d events were kept, %d are accounted for", e, sum)
	}
	if w.waiting.Load() != int64(len(w.list)) {
		t.Errorf("%d wait, counted as %d", len(w.list), w.waiting.Load())
	}
	for _, h := range w.heads {
		if h != headSeven {
			t.Errorf("an amendment says of its alert %+v, want %+v", h, headSeven)
		}
	}
	if uint64(len(w.sent)) != w.amendments.Load() {
		t.Errorf("%d amendments, counted as %d", len(w.sent), w.amendments.Load())
	}
}

func joined(s ...string) string { return strings.Join(s, "\n") }

func TestAmendmentsFollowKnowledge(t *testing.T) {
	w := newLateWorld()
	s := steps(w)
	const sec = uint64(time.Second)
	w.alert(7, headSeven, s[0], sec)
	w.alert(0, headSeven, s[0], sec)                                    // was not spooled: nobody has it
	w.alert(8, headSeven, &event.Workload{Place: event.PlaceHost}, sec) // nothing is missing
	w.event(&event.Event{Kind: event.Exec, Process: &event.Process{Workload: s[0]}}, sec)
	w.look(2 * sec)
	w.generation++ // something else became known
	w.look(3 * sec)
	if len(w.sent) != 0 || len(w.judged) != 0 {
		t.Errorf("%v %v", w.sent, w.judged)
	}
	w.knows[s[0]] = s[1]
	w.look(3 * sec) // no new generation: not even looked at
	w.generation++
	w.look(4 * sec)
	w.check(t)
	w.knows[s[1]] = s[2]
	w.generation++
	w.look(5 * sec)
	w.check(t)
	if got, want := joined(w.sent...), joined("7 shop/web/ container-not-listed", "7 shop/web/main "); got != want {
		t.Errorf("amendments:\n%s\nwant:\n%s", got, want)
	}
	if got, want := joined(w.judged...), joined("pod-not-listed then container-not-listed", "container-not-listed then "); got != want {
		t.Errorf("judged again:\n%s\nwant:\n%s", got, want)
	}
	if w.completed.Load() != 1 || w.late.judged.Load() != 1 || len(w.list) != 0 {
		t.Errorf("%d completed, %d judged, %d wait", w.completed.Load(), w.late.judged.Load(), len(w.list))
	}
}

func TestLateIsGivenUp(t *testing.T) {
	w := newLateWorld()
	s := steps(w)
	w.alert(7, headSeven, s[0], 1000)
	w.event(&event.Event{Process: &event.Process{Workload: s[0]}}, 1000)
	w.look(1000 + uint64(latePatience))
	if len(w.sent) != 0 {
		t.Errorf("given up in time: %v", w.sent)
	}
	w.look(1001 + uint64(latePatience))
	w.check(t)
	if got := joined(w.sent...); got != "7 // gave-up pod-not-listed" || w.expired.Load() != 1 || w.dropped.Load() != 1 {
		t.Errorf("%q, %d expired, %d dropped", got, w.expired.Load(), w.dropped.Load())
	}
	w.alert(8, headSeven, s[0], 1000)
	w.end()
	w.check(t)
	if w.sent[1] != "8 // gave-up pod-not-listed" {
		t.Errorf("at the end: %v", w.sent)
	}
}

// However many alerts wait, and whatever their processes are called, they take
// little room.
func TestLateIsBounded(t *testing.T) {
	w := newLateWorld()
	s := steps(w)
	big := strings.Repeat("x", 128<<10)
	for i := range uint64(3 * maxLate) {
		w.alert(i+1, headSeven, s[0], i)
		w.event(&event.Event{Process: &event.Process{Workload: s[0], Cmdline: big}}, i)
		if len(w.list) > maxLate || w.kept > maxKept {
			t.Fatalf("%d wait, with %d bytes of events", len(w.list), w.kept)
		}
	}
	w.check(t)
	for _, it := range w.list {
		if it.ev != nil && len(it.ev.Process.Cmdline) > 32<<10 {
			t.Fatalf("%d bytes of arguments are kept", len(it.ev.Process.Cmdline))
		}
	}
	w.knows[s[0]] = s[2]
	w.generation++
	w.look(4 * maxLate)
	w.check(t)
	if len(w.list) != 0 || len(w.judged) < 100 || uint64(len(w.judged)) != w.late.judged.Load() {
		t.Errorf("%d wait, %d judged", len(w.list), len(w.judged))
	}
	if w.evicted.Load()+w.completed.Load() != 3*maxLate {
		t.Errorf("%d evicted, %d completed", w.evicted.Load(), w.completed.Load())
	}
}

// What is judged again may raise an alert that is late itself.
func TestLateAlertIsLateItself(t *testing.T) {
	w := newLateWorld()
	s := steps(w)
	w.reconsider = func(ev *event.Event, _ *event.Workload) {
		if ev.Process.Workload == s[1] {
			w.alert(99, headSeven, ev.Process.Workload, 5)
		}
	}
	w.event(&event.Event{Process: &event.Process{Workload: s[0]}}, 5)
	for i := range s[:2] {
		w.knows[s[i]] = s[i+1]
		w.generation++
		w.look(6)
		w.check(t)
	}
	if got := joined(w.sent...); got != "99 shop/web/main " {
		t.Errorf("%q", got)
	}
}

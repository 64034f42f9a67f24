package enrich

import (
	"context"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/enrich/kube"
	"github.com/procession-dev/procession/internal/event"
)

// Whatever the kubelet does, events flow on, what was known stays known, and the
// reason for what is not says whose fault it is.
func TestReasonsFollowTheKubelet(t *testing.T) {
	const pods = 3
	var answer atomic.Pointer[http.HandlerFunc]
	set := func(h http.HandlerFunc) { answer.Store(&h) }
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) }
	}
	code := func(n int) http.HandlerFunc { return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(n) } }
	set(text(podList(pods)))
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*answer.Load())(w, r) }))
	defer s.Close()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := kube.New(kube.Config{Kubelet: kube.Server{URL: s.URL, CAFile: ca, ServerName: "example.com"}, Interval: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	e := here(t, p)
	in := func(pod int) *event.Process {
		return process(event.SourceRecord, "/kubepods/pod"+nodeUID(pod)+"/"+nodeContainer(2*pod))
	}
	until := func(what string, q *event.Process, ok func(*event.Workload) bool) {
		t.Helper()
		deadline := time.After(60 * time.Second)
		for e.Resolve(q); !ok(q.Workload); e.Resolve(q) {
			select {
			case <-p.Changed():
			case <-time.After(20 * time.Millisecond):
			case <-deadline:
				t.Fatalf("%s: %+v, %+v", what, q.Workload, p.Status())
			}
		}
	}
	reason := func(r string) func(*event.Workload) bool {
		return func(w *event.Workload) bool { return w.Place == event.PlaceContainer && w.Reason == r }
	}
	known, unknown := in(0), in(pods) // the kubelet has no such pod
	until("known", known, reason(""))
	until("not listed", unknown, reason(ReasonNotListed))
	for _, c := range []struct {
		name, cause string
		answer      http.HandlerFunc
	}{
		{"forbidden", "forbidden", code(403)},
		{"expired token", "unauthorized", code(401)},
		{"garbage", "malformed", text("garbage")},
		{"50 MiB", "too-large", text(`{"kind":"PodList","x":"` + strings.Repeat("x", 50<<20))},
	} {
		before := p.Stats().Failures[c.cause]
		set(c.answer)
		until(c.name, unknown, reason(ReasonNoKubelet))
		if p.Stats().Failures[c.cause] == before {
			t.Errorf("%s is not counted as %s: %+v", c.name, c.cause, p.Stats())
		}
		if e.Resolve(known); known.Workload.ContainerName != "main" || known.Workload.Reason != "" {
			t.Errorf("%s: what was known is %+v", c.name, known.Workload)
		}
		set(text(podList(pods)))
		until("after "+c.name, unknown, reason(ReasonNotListed))
	}
	set(text(podList(pods + 1)))
	until("listed at last", unknown, reason(""))
	if w := unknown.Workload; w.Pod.UID != nodeUID(pods) || w.ContainerName != "main" {
		t.Errorf("%+v", w)
	}
}

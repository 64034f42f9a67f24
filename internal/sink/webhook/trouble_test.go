package webhook

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// A host is a receiver that remembers what it was sent, and answers as it is
// told, try by try.
type host struct {
	answer func(try int, w http.ResponseWriter, r *http.Request)
	srv    *http.Server
	done   sync.WaitGroup

	mu     sync.Mutex
	tries  int
	bodies map[string][]byte // by Idempotency-Key
	other  []string          // keys that came with two different bodies
}

func (h *host) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	key := r.Header.Get("Idempotency-Key")
	h.mu.Lock()
	h.tries++
	try := h.tries
	if was, ok := h.bodies[key]; ok && !bytes.Equal(was, b) {
		h.other = append(h.other, key)
	}
	h.bodies[key] = b
	h.mu.Unlock()
	if h.answer != nil {
		h.answer(try, w, r)
	}
}

func (h *host) tried() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tries
}

// listen begins to serve on an address, "127.0.0.1:0" for any.
func (h *host) listen(t *testing.T, addr string) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	h.srv = &http.Server{Handler: h}
	h.done.Go(func() { h.srv.Serve(l) })
	t.Cleanup(func() { h.srv.Close(); h.done.Wait() })
	return l.Addr().String()
}

// freeAddr is an address where nobody listens.
func freeAddr(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Receivers that are down, that say 200 and reset, that say 429 and that never
// answer get every record at least once with the same id and the same body.
// None of them delays a commit, which is what agents wait for, or one that is
// well: all records are committed and delivered there before any trouble ends.
func TestTroubles(t *testing.T) {
	const records = 40
	over := make(chan struct{}) // closed when troubles end
	trouble := func(answer func(w http.ResponseWriter, r *http.Request)) *host {
		return &host{bodies: map[string][]byte{}, answer: func(_ int, w http.ResponseWriter, r *http.Request) {
			select {
			case <-over:
			default:
				answer(w, r)
			}
		}}
	}
	hosts := map[string]*host{
		"well": {bodies: map[string][]byte{}},
		"down": {bodies: map[string][]byte{}},
		"reset": trouble(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("ok"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}),
		"busy": trouble(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
		}),
		"silent": trouble(func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-over:
			case <-r.Context().Done():
			}
		}),
	}
	st, err := store.OpenSQLite(t.Context(), storetest.Dir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	queue := store.NewQueue(st, store.QueueConfig{})
	running.Go(func() { queue.Run(ctx) })
	metrics := sink.NewMetrics(nil)
	runners := map[string]*sink.Runner{}
	down := freeAddr(t)
	for name, h := range hosts {
		addr := down
		if name != "down" {
			addr = h.listen(t, "127.0.0.1:0")
		}
		w := must(t, Config{Cluster: "c", Format: JSON, URL: "http://" + addr, Plain: true, Timeout: time.Second})
		r, err := sink.New(sink.Config{Name: name, Sink: w, Store: st, Queue: queue, Batch: 7, MinPause: time.Millisecond, MaxPause: 50 * time.Millisecond}, metrics)
		if err != nil {
			t.Fatal(err)
		}
		runners[name] = r
		running.Go(func() { r.Run(ctx) })
	}
	for n := uint64(1); n <= records; n++ { // each waits for its commit
		if _, err := queue.Do(t.Context(), &store.Batch{Node: "n", Epoch: storetest.Epoch(1), Received: testTime, Records: storetest.Alerts(n, n)}); err != nil {
			t.Fatal(err)
		}
	}
	limit, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if !runners["well"].WaitFor(limit, records) {
		t.Fatal("the one that is well did not get everything while others are in trouble")
	}
	for name, r := range runners { // each trouble was met, more than once where that is quick
		for name != "well" && (r.Status().Err == "" || hosts[name].tried() < map[string]int{"reset": 3, "busy": 1, "silent": 1}[name]) {
			select {
			case <-limit.Done():
				t.Fatalf("%s: no trouble: %+v after %d tries", name, r.Status(), hosts[name].tried())
			case <-time.After(time.Millisecond):
			}
		}
		if name != "well" && r.Cursor() != 0 {
			t.Errorf("%s: %d records are called delivered", name, r.Cursor())
		}
	}
	close(over)
	hosts["down"].listen(t, down)
	for name, r := range runners {
		if !r.WaitFor(limit, records) {
			t.Fatalf("%s: has %d of %d when its trouble is over: %+v", name, r.Cursor(), records, r.Status())
		}
	}
	for name, h := range hosts {
		h.mu.Lock()
		got := map[string]bool{}
		for key := range h.bodies {
			got[key] = true
		}
		want := map[string]bool{}
		for n := range records {
			want[fmt.Sprintf("c/n/%v/%d", storetest.Epoch(1), n+1)] = true
		}
		if d := cmp.Diff(want, got); d != "" || len(h.other) > 0 {
			t.Errorf("%s: came with two bodies: %v; ids (-want +got):\n%s", name, h.other, d)
		}
		h.mu.Unlock()
	}
}

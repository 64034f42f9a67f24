//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
)

// A soc receives what the collector's webhook delivers and keeps each record
// once: delivery to it is at least once, with the same id.
type soc struct {
	url string

	mu      sync.Mutex
	lines   bytes.Buffer // NDJSON, in the order of arrival
	seen    map[string]bool
	repeats int
}

// newSOC listens on the node's address.
func newSOC(t *testing.T, ip string) *soc {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		t.Fatal(err)
	}
	s := &soc{url: "http://" + l.Addr().String() + "/", seen: map[string]bool{}}
	srv := httptest.NewUnstartedServer(s)
	_ = srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	return s
}

func (s *soc) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(io.LimitReader(r.Body, 16<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var line bytes.Buffer
	if err := json.Compact(&line, b); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	key := r.Header.Get("Idempotency-Key")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[key] {
		s.repeats++
		return
	}
	s.seen[key] = true
	s.lines.Write(line.Bytes())
	s.lines.WriteByte('\n')
}

func (s *soc) read(context.Context) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.lines.Bytes()), nil
}

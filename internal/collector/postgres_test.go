package collector

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

// Two collectors on one database: an agent may change between them, and a sink
// runs in one of them, also after that one was killed.
func TestTwoCollectors(t *testing.T) {
	pg := storetest.StartPostgres(t)
	dir := t.TempDir()
	db := filepath.Join(dir, "database")
	if err := os.WriteFile(db, []byte(pg.Schema(t, t.Name())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, r.Header.Get("Idempotency-Key"))
	}))
	defer hook.Close()
	sinks := filepath.Join(dir, "sinks.yaml")
	if err := os.WriteFile(sinks, fmt.Appendf(nil, "sinks: [{name: hook, webhook: {url: %q, plain: true}}]", hook.URL), 0o600); err != nil {
		t.Fatal(err)
	}
	// One authority for both, as a Secret gives it.
	state := filepath.Join(dir, "state")
	creds := issueFor(t, state, "n")
	other := filepath.Join(dir, "other")
	if err := os.CopyFS(filepath.Join(other, "pki"), os.DirFS(filepath.Join(state, "pki"))); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{other, filepath.Join(other, "pki")} {
		if err := os.Chmod(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"--database", db, "--sinks", sinks}
	a := startProc(t, state, args...)
	b := startProc(t, other, args...)
	e := storetest.Epoch(7)
	sendAlerts(t, a.addr, creds, "n", e, 10)
	sendAlerts(t, b.addr, creds, "n", e, 30) // all of it once more, and 20 new ones
	sendAlerts(t, a.addr, creds, "n", e, 35)
	count := func(n int) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return len(unique(got)) >= n }
	}
	testenv.Eventually(t, "the webhook has 35", count(35))
	mu.Lock()
	if len(got) != 35 {
		t.Errorf("%d requests for 35 alerts: both collectors deliver", len(got))
	}
	mu.Unlock()
	a.kill()
	sendAlerts(t, b.addr, creds, "n", e, 40)
	testenv.Eventually(t, "the webhook has 40 after one collector was killed", count(40))
	var want []string
	for n := 1; n <= 40; n++ {
		want = append(want, fmt.Sprintf("local/n/%v/%d", e, n))
	}
	mu.Lock()
	defer mu.Unlock()
	slices.Sort(want)
	if d := cmp.Diff(want, unique(got)); d != "" {
		t.Errorf("delivered, first of each (-want +got):\n%s", d)
	}
	if code := b.term(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

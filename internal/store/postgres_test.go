package store_test

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

func openPostgres(t testing.TB, dsn string) *store.Postgres {
	t.Helper()
	st, err := store.OpenPostgres(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestPostgres(t *testing.T) {
	pg := storetest.StartPostgres(t)
	storetest.Run(t, func(t testing.TB, dir string) store.Store { return openPostgres(t, pg.Schema(t, dir)) })
	t.Run("several collectors", func(t *testing.T) { testReplicas(t, pg) })
	t.Run("the server goes away", func(t *testing.T) { testServerRestart(t, pg) })
	t.Run("clocks are set", func(t *testing.T) { testClocks(t, pg) })
}

// testClocks: what a clock that was ahead or behind has left in a lease neither
// ends it nor keeps it. That the server's clock is never asked all other tests
// show: there it cannot be.
func testClocks(t *testing.T, pg *storetest.Server) {
	dsn := pg.Schema(t, t.Name())
	a, b := openPostgres(t, dsn), openPostgres(t, dsn)
	defer a.Close()
	defer b.Close()
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), `SELECT clock_timestamp()`); err == nil || !strings.Contains(err.Error(), "the clock of the database was asked") {
		t.Fatalf("the server told its time here: %v", err)
	}
	take := func(st *store.Postgres, owner string, d time.Duration) bool {
		t.Helper()
		res, err := st.Commit(t.Context(), []store.Change{&store.Lease{Name: "x", Owner: owner, For: d}})
		if err != nil {
			t.Fatal(err)
		}
		return !res[0].Stale
	}
	set := func(by time.Duration) {
		t.Helper()
		if _, err := db.ExecContext(t.Context(), `UPDATE lease SET until=until+$1`, int64(by)); err != nil {
			t.Fatal(err)
		}
	}
	if !take(a, "a", time.Hour) {
		t.Fatal("a does not get a free lease")
	}
	set(-10 * time.Hour)
	for range 2 { // at the first look it may be new to b
		if take(b, "b", time.Hour) {
			t.Error("b got the lease of a, because a clock was 10 hours behind")
		}
	}
	if !take(a, "a", 20*time.Millisecond) {
		t.Error("a could not renew")
	}
	set(10 * time.Hour)
	testenv.Eventually(t, "b gets the lease of a, which is gone and had a clock 10 hours ahead", func() bool { return take(b, "b", time.Hour) })
}

// The words with which SQL asks for the time are in no statement. They are no
// functions, and would not fail in the other tests.
func TestNoStatementAsksForTheTime(t *testing.T) {
	words := regexp.MustCompile(`(?i)\b(current_(timestamp|time|date)|localtime(stamp)?|unixepoch|julianday|strftime)\b|'now'`)
	for _, bad := range []string{"DEFAULT CURRENT_TIMESTAMP", "select localtime"} {
		if !words.MatchString(bad) {
			t.Fatalf("%q is not found", bad)
		}
	}
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d source files, %v", len(files), err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if w := words.Find(b); w != nil {
			t.Errorf("%s has %q: times are this process's", f, w)
		}
	}
}

// Agents resend to several collectors at once, as when streams are cut and the
// next one lands elsewhere: each record is stored once, in order, and readers
// of any collector see cursors in order.
func testReplicas(t *testing.T, pg *storetest.Server) {
	dsn := pg.Schema(t, t.Name())
	const replicas, nodes, each = 3, 4, 120
	var sts []*store.Postgres
	var opening sync.WaitGroup
	var mu sync.Mutex
	for range replicas { // all at once: the tables are made once
		opening.Go(func() {
			st, err := store.OpenPostgres(context.Background(), dsn)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			sts = append(sts, st)
		})
	}
	opening.Wait()
	defer func() {
		for _, st := range sts {
			st.Close()
		}
	}()
	if t.Failed() {
		return
	}
	done := make(chan struct{})
	var readers, writers sync.WaitGroup
	readers.Go(func() { // never sees a lower cursor appear behind a higher one
		var seen []int64
		for after, last := int64(0), false; ; {
			rs, err := sts[0].Read(context.Background(), nil, after, 50)
			if err != nil {
				t.Error(err)
				return
			}
			for _, r := range rs {
				seen, after = append(seen, r.Cursor), r.Cursor
			}
			if len(rs) == 0 && last {
				break
			}
			select {
			case <-done:
				last = true
			default:
			}
		}
		if len(seen) != nodes*each {
			t.Errorf("a reader that followed saw %d records, want %d", len(seen), nodes*each)
		}
	})
	for r, st := range sts {
		writers.Go(func() {
			// Each collector gets everything of every node, each in its own pace.
			for from := uint64(1); from <= each; {
				to := min(each, from+uint64(3+2*r))
				var cs []store.Change
				for n := range nodes {
					rs := storetest.Alerts(max(1, from-min(from-1, 5)), to)
					cs = append(cs, &store.Batch{Node: fmt.Sprint("n", (n+r)%nodes), Epoch: storetest.Epoch(1), Records: rs, Received: time.Unix(1, 0)})
				}
				if _, err := st.Commit(context.Background(), cs); err != nil {
					t.Errorf("replica %d: %v", r, err)
					return
				}
				from = to + 1
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()
	next := map[string]uint64{}
	for _, r := range storetest.All(t, sts[1]) {
		if next[r.Node]++; r.Seq != next[r.Node] {
			t.Fatalf("node %s: number %d where %d belongs", r.Node, r.Seq, next[r.Node])
		}
	}
	for n, got := range next {
		if got != each {
			t.Errorf("node %s: %d records, want %d", n, got, each)
		}
	}
}

// A server that restarts costs failed commits, and nothing else: what was
// committed is there, and the same store works again.
func testServerRestart(t *testing.T, pg *storetest.Server) {
	st := openPostgres(t, pg.Schema(t, t.Name()))
	defer st.Close()
	if err := commitN(t, st, 1, 5); err != nil {
		t.Fatal(err)
	}
	pg.Stop()
	if err := commitN(t, st, 6, 9); err == nil {
		t.Error("committed without a server")
	}
	if _, err := st.Read(t.Context(), nil, 0, 1); err == nil {
		t.Error("read without a server")
	}
	if err := pg.Start(); err != nil {
		t.Fatal(err)
	}
	if err := commitN(t, st, 6, 9); err != nil {
		t.Fatalf("after the restart: %v", err)
	}
	if rs := storetest.All(t, st); len(rs) != 9 {
		t.Errorf("%d records, want 9", len(rs))
	}
}

func TestPostgresRefuses(t *testing.T) {
	for dsn, want := range map[string]string{
		"host=/nowhere user=x password=hidden":           "connect to the database",
		"postgres://x:hidden@127.0.0.1:1/y?sslmode=nope": "not a PostgreSQL connection string",
	} {
		if _, err := store.OpenPostgres(t.Context(), dsn); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func BenchmarkPostgresCommit(b *testing.B) {
	pg := storetest.StartPostgres(b)
	st := openPostgres(b, pg.Schema(b, b.Name()))
	defer st.Close()
	for i := uint64(0); b.Loop(); i++ {
		if err := commitN(b, st, i*64+1, (i+1)*64); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*64/b.Elapsed().Seconds(), "records/s")
}

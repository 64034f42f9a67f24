package collector

import (
	"context"
	"flag"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

var update = flag.Bool("update", false, "write the table of metrics")

// The table of the collector's metrics in docs/operations.md is what a running
// collector shows.
func TestMetricsPage(t *testing.T) {
	dir := storetest.Dir(t)
	c, err := New(t.Context(), Config{State: filepath.Join(dir, "state"), Listen: "127.0.0.1:0", NDJSON: filepath.Join(dir, "a.ndjson")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	<-c.Ready()
	c.sinks[0].WaitFor(ctx, 0)
	descs := make(chan *prometheus.Desc)
	go func() { c.reg.Describe(descs); close(descs) }()
	re := regexp.MustCompile(`^Desc\{fqName: "(procession_[^"]+)", help: "((?:[^"\\]|\\.)*)"`)
	var rows []string
	for d := range descs {
		if m := re.FindStringSubmatch(d.String()); m != nil { // the others are of Go and of the process
			rows = append(rows, fmt.Sprintf("| `%s` | %s |\n", m[1], strings.ReplaceAll(m[2], `\"`, `"`)))
		}
	}
	slices.Sort(rows)
	rows = slices.Compact(rows) // one for each sink
	if len(rows) < 25 {
		t.Fatalf("only %d metrics", len(rows))
	}
	testenv.DocSection(t, "../../docs/operations.md", "collector metrics", "| metric | meaning |\n|---|---|\n"+strings.Join(rows, ""), *update)
}

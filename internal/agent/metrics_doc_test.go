package agent

import (
	"flag"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/testenv"
)

var updateDocs = flag.Bool("update", false, "write the table of metrics")

// The table of the agent's metrics in docs/operations.md is what it has.
func TestMetricsPage(t *testing.T) {
	desc := regexp.MustCompile(`^Desc\{fqName: "([^"]+)", help: "((?:[^"\\]|\\.)*)"`)
	kinds := map[prometheus.ValueType]string{prometheus.CounterValue: "counter", prometheus.GaugeValue: "gauge"}
	var rows []string
	for _, m := range metrics {
		got := desc.FindStringSubmatch(m.desc.String())
		if got == nil {
			t.Fatalf("cannot read %v", m.desc)
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s |\n", got[1], kinds[m.kind], strings.ReplaceAll(got[2], `\"`, `"`)))
	}
	slices.Sort(rows)
	testenv.DocSection(t, "../../docs/operations.md", "agent metrics", "| metric | type | meaning |\n|---|---|---|\n"+strings.Join(rows, ""), *updateDocs)
}

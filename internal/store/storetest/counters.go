package storetest

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// Counters reads a metric: its values by label value (several are joined by a
// comma), "" for one without labels.
func Counters(t testing.TB, g prometheus.Gatherer, name string) map[string]float64 {
	t.Helper()
	fs, err := g.Gather()
	if err != nil {
		t.Fatalf("gather metrics: %v", err)
	}
	for _, f := range fs {
		if f.GetName() != name {
			continue
		}
		out := make(map[string]float64)
		for _, m := range f.GetMetric() {
			var ls []string
			for _, l := range m.GetLabel() {
				ls = append(ls, l.GetValue())
			}
			out[strings.Join(ls, ",")] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
		return out
	}
	t.Fatalf("no metric %s", name)
	return nil
}

// Sum adds up all values of a metric.
func Sum(t testing.TB, g prometheus.Gatherer, name string) (sum float64) {
	t.Helper()
	for _, v := range Counters(t, g, name) {
		sum += v
	}
	return sum
}

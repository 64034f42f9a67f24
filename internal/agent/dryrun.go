package agent

import (
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/policy"
)

// dryRunLimit is how many alerts of one rule in dry run go to the collector
// within dryRunWindow. A rule that is tried out may match everything: it takes
// no room from alerts, and its matches are counted all the same.
const (
	dryRunLimit  = 10
	dryRunWindow = time.Minute
)

// rehearsals bounds what rules in dry run send. It belongs to the pipeline's
// goroutine, but for the counts.
type rehearsals struct {
	since uint64         // ns, CLOCK_MONOTONIC
	of    map[string]int // by rule, since then

	sent, over atomic.Uint64
}

// allow takes one alert of a rule from its share.
func (r *rehearsals) allow(rule string, now uint64) bool {
	if r.of == nil || now-min(now, r.since) >= uint64(dryRunWindow) {
		r.since, r.of = now, make(map[string]int)
	}
	if r.of[rule] == dryRunLimit {
		r.over.Add(1)
		return false
	}
	r.of[rule]++
	r.sent.Add(1)
	return true
}

// rehearsed takes a match of a rule in dry run, on the pipeline's goroutine.
func (a *agent) rehearsed(m *policy.Match) {
	if a.dry.allow(m.Rule.ID, a.pipe.now.Mono) {
		a.alert(m)
	}
}

package agent

import (
	"testing"
	"time"
)

// Rules in dry run send a few alerts a minute each, and all are accounted for.
func TestRehearsalsAreBounded(t *testing.T) {
	var r rehearsals
	const second = uint64(time.Second)
	allowed := map[string]int{}
	asked := 0
	for now := 100 * second; now < 250*second; now += second {
		for _, rule := range []string{"often", "often", "often"} {
			asked++
			if r.allow(rule, now) {
				allowed[rule]++
			}
		}
		if (now/second)%40 == 0 {
			asked++
			if r.allow("seldom", now) {
				allowed["seldom"]++
			}
		}
	}
	if allowed["often"] != 3*dryRunLimit || allowed["seldom"] != 4 {
		t.Errorf("allowed %v in two and a half minutes, want %d of the one and all 4 of the other", allowed, 3*dryRunLimit)
	}
	if got := r.sent.Load() + r.over.Load(); got != uint64(asked) || r.sent.Load() != uint64(allowed["often"]+allowed["seldom"]) {
		t.Errorf("%d sent and %d over the limit of %d asked", r.sent.Load(), r.over.Load(), asked)
	}
}

package storm_test

import (
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/testenv/storm"
)

func TestMake(t *testing.T) {
	for _, k := range []storm.Kind{storm.Fork, storm.VFork, storm.Thread} {
		begin := time.Now()
		if n, err := storm.Make(k, 2, 500, time.Minute); n != 500 || err != nil {
			t.Errorf("%s: made %d, %v; want 500", k, n, err)
		}
		t.Logf("%s: 500 in %v", k, time.Since(begin))
	}
	if n, err := storm.Make("spoon", 1, 1, time.Second); n != 0 || err == nil {
		t.Errorf("spoon: made %d, %v; want an error", n, err)
	}
}

package storm_test

import (
	"os"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/testenv"
	"github.com/procession-dev/procession/internal/testenv/storm"
)

func TestMake(t *testing.T) {
	for _, k := range []storm.Kind{storm.Fork, storm.VFork, storm.Thread} {
		begin := time.Now()
		if n, err := storm.Make(k, 3, 5000, time.Minute); n != 5000 || err != nil {
			t.Errorf("%s: made %d, %v; want 5000", k, n, err)
		}
		t.Logf("%s: 5000 in %v", k, time.Since(begin))
	}
	if n, err := storm.Make("spoon", 1, 1, time.Second); n != 0 || err == nil {
		t.Errorf("spoon: made %d, %v; want an error", n, err)
	}
}

// TestMakeIDs: a task that may not do what it should is an error.
func TestMakeIDs(t *testing.T) {
	n, err := storm.Make(storm.ForkIDs, 1, 1000, time.Minute)
	if os.Getuid() != 0 {
		if err == nil {
			t.Errorf("made %d without the right to", n)
		}
		testenv.Root(t)
	}
	if n != 1000 || err != nil {
		t.Errorf("made %d, %v; want 1000", n, err)
	}
}

package procconn

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

// TestMerge: what several sockets heard is handed over by the time at which it
// happened, as soon as it is older than the hold-back. What comes later than
// that is handed over too, and counted.
func TestMerge(t *testing.T) {
	cfg, err := Config{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	w := newWitness()
	c := newConn(cfg)
	c.h = w
	f := &fallback{c: c}
	const ms = uint64(time.Millisecond)
	items := newStore(8, 64, 8, 4)
	hear := func(socket int, stamps ...uint64) {
		for _, s := range stamps {
			it := items.slot()
			it.rec = event.Record{Kind: event.Fork, CPU: uint32(socket), Stamp: s * ms}
			f.hold(it)
		}
	}
	told := func(horizon uint64) (stamps []uint64) {
		w.recs = nil
		n := f.tell(horizon * ms)
		for _, r := range w.recs {
			stamps = append(stamps, r.Stamp/ms)
		}
		if n != len(stamps) {
			t.Errorf("tell = %d, handed over %d", n, len(stamps))
		}
		return stamps
	}
	hear(0, 100, 103, 109)
	hear(1, 101, 110)
	hear(2, 99)
	for _, tt := range []struct {
		horizon uint64
		want    []uint64
		late    uint64
	}{
		{98, nil, 0},
		{103, []uint64{99, 100, 101, 103}, 0},
		{109, []uint64{102, 104, 109}, 1}, // 102 came after 103 was handed over
		{200, []uint64{110, 111}, 1},
	} {
		if tt.horizon == 109 {
			hear(1, 102, 104)
			hear(2, 111)
		}
		if d := cmp.Diff(tt.want, told(tt.horizon)); d != "" {
			t.Errorf("up to %d (-want +got):\n%s", tt.horizon, d)
		}
		if s := c.Stats(); s.Late != tt.late {
			t.Errorf("up to %d: %d late, want %d", tt.horizon, s.Late, tt.late)
		}
	}
	if s := c.Stats(); !f.idle() || s.Waiting != 0 || s.Delivered[event.Fork] != 9 {
		t.Errorf("at the end: idle %t, %+v", f.idle(), s)
	}
}

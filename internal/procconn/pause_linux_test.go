package procconn

import (
	"testing"
	"time"
)

// TestPause: few records are worth a longer sleep, but not one that the
// operator did not ask for and that alerts would feel.
func TestPause(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct{ drain, few, many time.Duration }{
		{1 * ms, 2 * ms, 1 * ms},
		{10 * ms, 20 * ms, 10 * ms},
		{15 * ms, 20 * ms, 15 * ms},
		{50 * ms, 50 * ms, 50 * ms},
	} {
		r := &recording{c: newConn(Config{DrainInterval: c.drain})}
		if got := r.pause(1); got != c.few {
			t.Errorf("%v: %v after one record, want %v", c.drain, got, c.few)
		}
		if got := r.pause(few); got != c.many {
			t.Errorf("%v: %v after many records, want %v", c.drain, got, c.many)
		}
	}
}

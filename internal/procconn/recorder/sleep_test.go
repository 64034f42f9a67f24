//go:build linux

package recorder

import (
	"os"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// TestNap: a record ends a Wait and no Nap, also between the two.
func TestNap(t *testing.T) {
	r := load(t, Config{Kinds: event.KindSet(event.SessionChange)})
	self := uint32(os.Getpid())
	record := message(whatSID, 0, 1, self, self)
	const naps, nap = 20, 10 * time.Millisecond
	full := 0
	for range naps {
		feed(t, r, record)
		if got, err := r.Wait(-1); !got || err != nil {
			t.Fatalf("Wait = %v, %v with a record there; want true", got, err)
		}
		if n, err := r.Drain(func(*event.Record) {}); n != 1 || err != nil {
			t.Fatalf("Drain = %d, %v; want 1", n, err)
		}
		fed := make(chan struct{})
		meanwhile := time.AfterFunc(nap/4, func() { defer close(fed); feed(t, r, record) })
		from := time.Now()
		if err := r.Nap(nap); err != nil {
			t.Fatal(err)
		}
		if time.Since(from) >= nap {
			full++
		}
		if meanwhile.Stop() {
			feed(t, r, record)
		} else {
			<-fed
		}
		if n, err := r.Drain(func(*event.Record) {}); n != 1 || err != nil {
			t.Fatalf("Drain = %d, %v after the nap; want 1", n, err)
		}
	}
	if full < naps*3/4 { // now and then one may end early
		t.Errorf("%d of %d naps lasted %v, though a record came", full, naps, nap)
	}
}

// TestWake: whoever sleeps is woken, and once.
func TestWake(t *testing.T) {
	r := load(t, Config{})
	for _, c := range []struct {
		name  string
		sleep func(time.Duration) error
	}{
		{"nap", r.Nap},
		{"wait", func(d time.Duration) error { _, err := r.Wait(d); return err }},
	} {
		for _, before := range []time.Duration{0, 20 * time.Millisecond} {
			woken := make(chan error, 1)
			timer := time.AfterFunc(before, func() { woken <- r.Wake() })
			if err := c.sleep(-1); err != nil { // for ever, but for that
				t.Fatal(err)
			}
			if timer.Stop() {
				t.Fatalf("%s: ended before it was woken", c.name)
			}
			if err := <-woken; err != nil {
				t.Fatal(err)
			}
		}
		const d = 20 * time.Millisecond
		slept := false
		for range 5 { // now and then one may end early
			from := time.Now()
			if err := c.sleep(d); err != nil {
				t.Fatal(err)
			}
			slept = slept || time.Since(from) >= d
		}
		if !slept {
			t.Errorf("%s: a wake-up ends more than one sleep", c.name)
		}
		if n := testing.AllocsPerRun(20, func() { c.sleep(time.Microsecond) }); n != 0 {
			t.Errorf("%s allocates %v times", c.name, n)
		}
	}
}

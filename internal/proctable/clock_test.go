package proctable

import (
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

func TestTimeline(t *testing.T) {
	c := &testClock{Instant{Mono: 100 * s, Boot: 105 * s, Wall: bootDay}}
	l := timeline{clock: c}
	l.measure()
	c.at(101 * s)
	l.measure()
	c.at(102 * s)
	c.now.Boot += 60 * s // a minute of sleep
	c.now.Wall = c.now.Wall.Add(time.Minute)
	l.measure()
	c.at(103 * s)
	c.now.Boot += 300_000 // reading two clocks takes time
	l.measure()
	for _, c := range []struct {
		name          string
		stamp, lo, hi uint64
	}{
		{"before all measurements", 50 * s, 55 * s, 55 * s},
		{"before the sleep", 101 * s, 106 * s, 106 * s},
		{"around the sleep", 101*s + 1, 106*s + 1, 166*s + 1},
		{"after the sleep", 102*s + 1, 167*s + 1, 167*s + 1},
		{"after all measurements", 200 * s, 265 * s, 265 * s},
	} {
		if lo, hi := l.boot(c.stamp); lo != c.lo || hi != c.hi {
			t.Errorf("%s: boot time of %d: [%d, %d], want [%d, %d]", c.name, c.stamp, lo, hi, c.lo, c.hi)
		}
	}
	if got, want := l.wall(104*s), bootDay.Add(64*time.Second); !got.Equal(want) {
		t.Errorf("wall time: %v, want %v", got, want)
	}
	// Many sleeps: the young ones are remembered.
	for i := range 20 {
		c.at(c.now.Mono + s)
		c.now.Boot += uint64(i+1) * s
		l.measure()
	}
	if lo, hi := l.boot(c.now.Mono + 1); lo != c.now.Boot+1 || hi != c.now.Boot+1 {
		t.Errorf("now: [%d, %d], want %d", lo, hi, c.now.Boot+1)
	}
}

// A process forked just before the machine slept is still the same when its
// exact start comes in after it, measured across the sleep.
func TestForkAroundSleep(t *testing.T) {
	for _, before := range []bool{true, false} {
		w := newWorld(t, Config{})
		w.exec(1, 0, "/sbin/init", "init")
		fork := w.forkRec(1, 50)
		if !before { // asleep between the last measurement and the fork
			w.start[50] += 3600 * s
		}
		w.clock.at(w.stamp)
		w.clock.now.Boot += 3600 * s
		w.clock.now.Wall = w.clock.now.Wall.Add(time.Hour)
		p := w.must(fork).Process
		q := w.exec(50, 1, "/bin/x", "x")
		if p != q || q.Start != w.start[50] || q.Parent == nil {
			t.Errorf("fork before the sleep %v: another process: %+v", before, q)
		}
	}
}

// Stamps order events; the wall clock only dates them.
func TestWallClockStepsBack(t *testing.T) {
	w := newWorld(t, Config{})
	a := *w.must(w.execRec(1, 0, "/sbin/init", "init"))
	w.wait(2 * time.Second)
	w.clock.at(w.stamp)
	w.clock.now.Wall = w.clock.now.Wall.Add(-time.Hour)
	b := *w.must(w.execRec(1, 0, "/sbin/init", "init"))
	if b.Stamp <= a.Stamp || b.Time.Sub(a.Time) > -59*time.Minute {
		t.Errorf("%v at %d, then %v at %d", a.Time, a.Stamp, b.Time, b.Stamp)
	}
	if ev := w.exit(1); ev.Duration < 0 || ev.Duration > 1100*time.Second {
		t.Errorf("duration %v", ev.Duration)
	}
}

func TestSystemClock(t *testing.T) {
	c := SystemClock()
	a, b := c.Now(), c.Now()
	if a.Mono == 0 || b.Mono < a.Mono || b.Boot < a.Boot || a.Boot < a.Mono {
		t.Errorf("%+v, then %+v", a, b)
	}
	if d := time.Since(b.Wall); d < -time.Second || d > time.Minute {
		t.Errorf("wall clock is %v off", d)
	}
	tab, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	var ev event.Event
	if !tab.Apply(&event.Record{Kind: event.CoreDump, PID: 5, TGID: 5, Stamp: b.Mono}, &ev) {
		t.Fatal("not reported")
	}
	if d := ev.Time.Sub(b.Wall); d < -time.Second || d > time.Second {
		t.Errorf("event is dated %v off", d)
	}
}

package proctable

import "time"

// An Instant is one moment on the three clocks that matter.
type Instant struct {
	Mono uint64 // ns, CLOCK_MONOTONIC: time stamps of events
	Boot uint64 // ns, CLOCK_BOOTTIME: start times of processes
	Wall time.Time
}

// A Clock reads all clocks at one moment.
type Clock interface{ Now() Instant }

// A FixedClock stands still: for replays, where the relation between the
// clocks comes from the recording.
type FixedClock Instant

// Now is always the same.
func (c FixedClock) Now() Instant { return Instant(c) }

// A timeline converts time stamps. It remembers the distance between boot and
// monotonic time, which grows only while the machine sleeps.
type timeline struct {
	clock Clock
	last  Instant
	spans [8]span // the youngest last; zero ones first
}

// A span is a stretch of monotonic time over which the distance was measured
// to be the same.
type span struct {
	from, to uint64 // first and last measurement
	off      uint64 // boot - mono
}

// offNoise is how much two measurements of the same distance may differ: the
// clocks are read one after the other.
const offNoise = uint64(time.Millisecond)

func (l *timeline) measure() {
	now := l.clock.Now()
	l.last = now
	off := now.Boot - now.Mono
	cur := &l.spans[len(l.spans)-1]
	if cur.off != 0 || cur.to != 0 {
		if diff := int64(off - cur.off); diff < int64(offNoise) && diff > -int64(offNoise) {
			cur.to = max(cur.to, now.Mono)
			return
		}
		copy(l.spans[:], l.spans[1:])
	}
	*cur = span{now.Mono, now.Mono, off}
}

// cover measures if the last measurement is older than stamp - slack.
func (l *timeline) cover(stamp, slack uint64) {
	if stamp > l.last.Mono+slack {
		l.measure()
	}
}

// boot is the range in which boot time lay at stamp. Both ends are the same
// unless the machine slept around that time.
func (l *timeline) boot(stamp uint64) (lo, hi uint64) {
	i := len(l.spans) - 1
	for i > 0 && stamp <= l.spans[i].from && l.spans[i-1] != (span{}) {
		i--
	}
	s := &l.spans[i]
	lo, hi = stamp+s.off, stamp+s.off
	if stamp > s.to && i+1 < len(l.spans) {
		hi = max(hi, stamp+l.spans[i+1].off)
	}
	return lo, hi
}

// wall is the wall time of stamp.
func (l *timeline) wall(stamp uint64) time.Time {
	return l.last.Wall.Add(time.Duration(int64(stamp - l.last.Mono)))
}

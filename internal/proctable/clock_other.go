//go:build !linux

package proctable

import "time"

// SystemClock counts from its own making: there are no kernel events here
// whose stamps it would have to fit.
func SystemClock() Clock { return systemClock{time.Now()} }

type systemClock struct{ start time.Time }

func (c systemClock) Now() Instant {
	now := time.Now()
	d := uint64(now.Sub(c.start)) + 1
	return Instant{Mono: d, Boot: d, Wall: now}
}

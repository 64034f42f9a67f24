package agent

import (
	"os"
	"runtime"
	"runtime/debug"
)

// beFrugal sets the Go runtime up for a program that mostly sleeps, where the
// operator (GOMAXPROCS, GOGC) has not.
//
// One processor: the event path is one thread that looks into the ring and
// sleeps, and whatever else there is to do can wait for it: some 10 ms at most,
// while the ring holds ten times that of a storm. With more, Go's scheduler
// spends as much as that thread: it looks some 15 times for system calls that
// are stuck while it sleeps 10 ms, and wakes idle threads to look for work. The
// fall-back's readers add a processor each for themselves.
//
// Garbage is collected when it is half as much as what is in use, not as much:
// the event path makes next to none (two collections in 10,000 execs), so this
// costs nothing and leaves a third less of the heap resident.
func beFrugal() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
}

package agent

import (
	"log/slog"
	"os"
	"runtime"
)

// beFrugal sets the Go runtime up for a program that mostly sleeps, where the
// operator (GOMAXPROCS, GOMEMLIMIT) has not.
//
// One processor: the event path is one goroutine that looks into the ring and
// sleeps, and whatever else there is to do can wait for it: some 10 ms at most,
// while the ring holds ten times that of a storm. With more, Go's scheduler
// wakes idle threads to look for work whenever there is some. The fall-back's
// readers add a processor each for themselves.
//
// What was used until now, before main, is given back. The caller goes on with
// the settler.
func beFrugal(log *slog.Logger) *settler {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	limitMemory(log)
	memory, err := newSettler()
	memory.log = log
	memory.say(err)
	memory.stage()
	return &memory
}

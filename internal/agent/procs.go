package agent

import (
	"os"
	"runtime"
)

// useOneProc lets Go code run on one CPU at a time, unless the operator says
// otherwise (GOMAXPROCS). The event path is one thread that looks into the ring
// and sleeps, and whatever else there is to do can wait for it: some 10 ms at
// most, while the ring holds ten times that of a storm. With more, Go's
// scheduler spends as much as that thread: it looks some 15 times for
// stuck system calls while it sleeps 10 ms, and wakes idle threads to look for work that
// is none. The fall-back's readers add a processor each for themselves.
func useOneProc() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
}

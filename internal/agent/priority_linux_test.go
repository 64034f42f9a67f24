package agent

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/testenv"
)

// TestRenice: every thread has the priority, also one that is made afterwards.
func TestRenice(t *testing.T) {
	testenv.Root(t)
	if err := renice(-1); err != nil {
		testenv.SkipOn(t, err, unix.EPERM, unix.EACCES)
	}
	defer func() {
		if err := renice(0); err != nil {
			t.Error(err)
		}
		if n := niceOf(t, os.Getpid()); n != 0 {
			t.Errorf("the main thread has nice %d after giving it back", n)
		}
	}()
	// Threads that are locked to goroutines: some of them must be new.
	tids, leave := make(chan int), make(chan struct{})
	defer close(leave)
	for range 8 {
		go func() {
			runtime.LockOSThread()
			tids <- unix.Gettid()
			<-leave
		}()
	}
	for range 8 {
		if tid := <-tids; niceOf(t, tid) != -1 {
			t.Errorf("thread %d has nice %d, want -1", tid, niceOf(t, tid))
		}
	}
}

// niceOf is a thread's nice value.
func niceOf(t *testing.T, tid int) int {
	t.Helper()
	n, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
	if err != nil {
		t.Fatalf("thread %d: %v", tid, err)
	}
	return 20 - n // the system call has no negative results
}

package storm

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Kind is a way to make a task.
type Kind string

// Kinds.
const (
	Fork   Kind = "fork"   // a process with a copy of its maker's memory; made by a child of the caller
	VFork  Kind = "vfork"  // a process in its maker's memory, which waits for its end
	Thread Kind = "thread" // a thread
)

// clone makes a task that ends at once by itself, and returns its id or a
// negative errno.
func clone(flags uintptr) int

// batch is how many tasks are made between two looks at the clock.
const batch = 64

// Make makes tasks by several makers at once, until time is up or limit are
// made (0: no limit), and returns how many it made. All processes have ended
// and been reaped when it returns; the last threads may be ending.
func Make(k Kind, makers int, limit int64, d time.Duration) (made int64, err error) {
	var one func(n int64) error
	switch k {
	case Fork:
	case VFork:
		one = makeVForks
	case Thread:
		one = makeThreads
	default:
		return 0, fmt.Errorf("storm: %.64q is none of fork, vfork, thread", string(k))
	}
	left := limit
	if limit <= 0 {
		left = 1 << 62
	}
	var total, room atomic.Int64
	room.Store(left)
	end := time.Now().Add(d)
	work := func(some func(int64) error) error {
		for time.Now().Before(end) {
			n := min(batch, room.Add(-batch)+batch)
			if n <= 0 {
				return nil
			}
			if err := some(n); err != nil {
				return err
			}
			total.Add(n)
		}
		return nil
	}
	var wg sync.WaitGroup
	errs := make([]error, makers)
	for i := range makers {
		wg.Go(func() {
			// Children are waited for by the thread that made them.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if k != Fork {
				errs[i] = work(one)
				return
			}
			f, err := startForker()
			if err == nil {
				err = errors.Join(work(f.make), f.end())
			}
			errs[i] = err
		})
	}
	wg.Wait()
	return total.Load(), errors.Join(errs...)
}

func makeVForks(n int64) error {
	for range n {
		id := clone(unix.CLONE_VM | unix.CLONE_VFORK | uintptr(unix.SIGCHLD))
		if id < 0 {
			return fmt.Errorf("storm: vfork: %w", unix.Errno(-id))
		}
		_, err := unix.Wait4(id, nil, unix.WALL|unix.WNOTHREAD, nil)
		for err == unix.EINTR {
			_, err = unix.Wait4(id, nil, unix.WALL|unix.WNOTHREAD, nil)
		}
		if err != nil {
			return fmt.Errorf("storm: wait: %w", err)
		}
	}
	return nil
}

func makeThreads(n int64) error {
	for n > 0 {
		const flags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM
		switch id := clone(flags); {
		case id > 0:
			n--
		case unix.Errno(-id) == unix.EAGAIN:
			runtime.Gosched() // too many at once: nobody can wait for a thread of this kind
		default:
			return fmt.Errorf("storm: thread: %w", unix.Errno(-id))
		}
	}
	return nil
}

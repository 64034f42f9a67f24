package storm

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Kind is a way to make a task.
type Kind string

// Kinds. Tasks are made by children of the caller.
const (
	Fork    Kind = "fork"     // a process with a copy of its maker's memory
	ForkIDs Kind = "fork-ids" // the same, which begins a session and changes its group and user before it ends; needs root
	VFork   Kind = "vfork"    // a process in its maker's memory, which waits until it is left
	Thread  Kind = "thread"   // a thread
)

// ways are the kinds as maker knows them.
var ways = map[Kind]struct{ flags, ids uint64 }{
	Fork:    {flags: uint64(unix.SIGCHLD)},
	ForkIDs: {flags: uint64(unix.SIGCHLD), ids: 1},
	VFork:   {flags: unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)},
	Thread:  {flags: unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM},
}

// Events is how many messages of the process connector tell of one task: its
// beginning and its end, and of ForkIDs the session, the group and the user.
func (k Kind) Events() int64 {
	if k == ForkIDs {
		return 5
	}
	return 2
}

// batch is how many tasks are made between two looks at the clock.
const batch = 256

// Make makes tasks by several makers at once, until time is up or limit are
// made (0: no limit), and returns how many it made. The makers have one CPU
// each, in turn, of those the caller may use. All tasks have ended when it
// returns without an error.
func Make(k Kind, makers int, limit int64, d time.Duration) (made int64, err error) {
	if _, ok := ways[k]; !ok {
		return 0, fmt.Errorf("storm: %.64q is none of fork, fork-ids, vfork, thread", string(k))
	}
	cpus, err := mayUse()
	if err != nil {
		return 0, err
	}
	left := limit
	if limit <= 0 {
		left = 1 << 62
	}
	var total, room atomic.Int64
	room.Store(left)
	end := time.Now().Add(d)
	work := func(m *maker) error {
		for time.Now().Before(end) {
			n := min(batch, room.Add(-batch)+batch)
			if n <= 0 {
				return nil
			}
			if err := m.make(n); err != nil {
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
			m, err := startMaker(k, cpus[i%len(cpus)])
			if err == nil {
				err = errors.Join(work(m), m.end())
			}
			errs[i] = err
		})
	}
	wg.Wait()
	return total.Load(), errors.Join(errs...)
}

// mayUse lists the CPUs this process may use.
func mayUse() (cpus []int, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("storm: which CPUs may be used: %w", err)
	}
	for cpu := 0; len(cpus) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

package recorder

import (
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A sleeper is how the reader sleeps: its goroutine parks in Go's network
// poller, which waits for one descriptor, an epoll that holds the ring and a
// timer.
//
// A thread that blocks in a system call of its own costs more than that call.
// Go takes the processor away from it and gives it back; what looks whether that
// is due, sysmon, is woken for it and looks some ten times a nap. It was a
// quarter of what a reader of few events costs. Go's timers wake sysmon too,
// hence a timer of the kernel's.
type sleeper struct {
	ring  *ring
	fd    int      // of the ring
	timer int      // timerfd
	file  *os.File // the epoll
	conn  syscall.RawConn
	try   func(fd uintptr) bool // is (*sleeper).parks: a method value made once, since making it allocates

	// The reader's.
	timeout    time.Duration
	forRecords bool
	listening  bool // the epoll looks at the ring
	parked     bool
	err        error

	woken atomic.Bool // by wake; the sleep that it ends takes it back
}

func newSleeper(r *ring, fd int) (*sleeper, error) {
	s := &sleeper{ring: r, fd: fd}
	s.try = s.parks
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if s.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		unix.Close(poll)
		return nil, fmt.Errorf("timerfd: %w", err)
	}
	err = unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, s.timer, &unix.EpollEvent{Events: unix.EPOLLIN})
	if err == nil {
		err = unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{})
	}
	if err == nil {
		err = unix.SetNonblock(poll, true) // or Go does not poll it
	}
	s.file = os.NewFile(uintptr(poll), "ring buffer")
	if err == nil {
		s.conn, err = s.file.SyscallConn()
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return s, nil
}

// sleep blocks until the timeout is over (negative: never), wake is called or,
// if asked for, a record is in the ring. It may end early.
func (s *sleeper) sleep(timeout time.Duration, forRecords bool) error {
	s.timeout, s.forRecords, s.parked, s.err = timeout, forRecords, false, nil
	if err := s.conn.Read(s.try); err != nil {
		return fmt.Errorf("wait for records: %w", err)
	}
	return s.err
}

// parks is called before the goroutine parks and after something came, and says
// whether the sleep is over. The poller misses nothing that comes after the
// first call has begun, so there is everything set up that may come.
func (s *sleeper) parks(poll uintptr) (over bool) {
	if s.parked {
		s.woken.Store(false)
		return true
	}
	s.parked = true
	s.err = s.arm(int(poll))
	// In this order: what comes after one of these looks ends the sleep, since
	// wake sets the timer after the flag and the kernel wakes for a record that
	// the reader has caught up with.
	return s.err != nil || s.woken.Swap(false) || s.forRecords && s.ring.waiting() > 0
}

// arm sets the timer, and has the epoll look at the ring or not: while the
// reader naps a record must not wake it.
func (s *sleeper) arm(poll int) error {
	if err := s.set(s.timeout); err != nil {
		return err
	}
	if s.forRecords == s.listening {
		return nil
	}
	var want uint32
	if s.forRecords {
		want = unix.EPOLLIN
	}
	if err := unix.EpollCtl(poll, unix.EPOLL_CTL_MOD, s.fd, &unix.EpollEvent{Events: want}); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	s.listening = s.forRecords
	return nil
}

// wake ends the sleep, or the next one. Anybody may call it.
func (s *sleeper) wake() error {
	s.woken.Store(true)
	return s.set(0)
}

// set has the timer ring after d; never if d is negative.
func (s *sleeper) set(d time.Duration) error {
	var t unix.ItimerSpec // all zero: never
	if d >= 0 {
		t.Value = unix.NsecToTimespec(int64(max(d, 1)))
	}
	if err := unix.TimerfdSettime(s.timer, 0, &t, nil); err != nil {
		return fmt.Errorf("timerfd: %w", err)
	}
	return nil
}

func (s *sleeper) close() {
	s.file.Close()
	unix.Close(s.timer)
}

package procconn

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/testenv"
	"golang.org/x/sys/unix"
)

// The test binary is also every process that the tests watch: PROCCONN_CHILD
// names what it does then.
const childVar = "PROCCONN_CHILD"

var children = map[string]func() error{
	"ids":      changeIDs,
	"tracer":   trace,
	"twice":    execTwice,
	"storm":    storm,
	"open":     openAndTell,
	"nothing":  func() error { return nil },
	"long":     func() error { select {} },
	"reexeced": func() error { return nil },
}

// Ids, names and traces are a thread's, and the children change their own: from
// here on TestMain stays on the first thread.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	name := os.Getenv(childVar)
	if name == "" {
		runtime.UnlockOSThread()
		os.Exit(m.Run())
	}
	f, ok := children[name]
	if !ok {
		f = func() error { return fmt.Errorf("no child %q", name) }
	}
	if err := f(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(7)
}

// child is the command that runs one of children. Arguments are for show.
func child(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), childVar+"="+name)
	return cmd
}

// runChild runs a child to its end and returns its pid.
func runChild(t *testing.T, cmd *exec.Cmd) int32 {
	t.Helper()
	return runChildWhile(t, cmd, func(int32) {})
}

// runChildWhile is runChild; the child's standard input ends when f returns.
func runChildWhile(t *testing.T, cmd *exec.Cmd, f func(pid int32)) int32 {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err = cmd.Start(); err == nil {
		f(int32(cmd.Process.Pid))
		in.Close()
		err = cmd.Wait()
	}
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() == 1 {
		t.Fatalf("child %q: %v: %s", cmd.Args, err, out.Bytes())
	}
	return int32(cmd.Process.Pid)
}

func setName(name string) error {
	var b [16]byte
	copy(b[:15], name)
	if _, _, e := syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0); e != 0 {
		return e
	}
	return nil
}

const oddName = ") R 1 (\n x"

// changeIDs changes everything that has a kind of its own. The raw calls change
// one thread, the main one.
func changeIDs() error {
	if _, err := unix.Setsid(); err != nil {
		return fmt.Errorf("setsid: %w", err)
	}
	if err := setName(oddName); err != nil {
		return err
	}
	if _, _, e := syscall.RawSyscall(unix.SYS_SETRESGID, 1001, 1002, 1003); e != 0 {
		return fmt.Errorf("setresgid: %w", e)
	}
	if _, _, e := syscall.RawSyscall(unix.SYS_SETRESUID, 1004, 1005, 1006); e != 0 {
		return fmt.Errorf("setresuid: %w", e)
	}
	// The fall-back reads the other ids later: until it has, we live.
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// trace attaches to a process of its own and detaches again.
func trace() error {
	cmd := child("long")
	if err := cmd.Start(); err != nil {
		return err
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pid := cmd.Process.Pid
	if err := syscall.PtraceAttach(pid); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if _, err := syscall.Wait4(pid, nil, syscall.WALL, nil); err != nil {
		return err
	}
	return syscall.PtraceDetach(pid)
}

// execTwice runs exec again as fast as it can.
func execTwice() error {
	return syscall.Exec("/proc/self/exe", []string{"second", "of", os.Args[1]}, []string{childVar + "=reexeced"})
}

// storm makes as many processes and threads as its arguments say. The
// processes are forked without exec and end at once.
func storm() error {
	var forks, threads int
	if _, err := fmt.Sscan(os.Args[1]+" "+os.Args[2], &forks, &threads); err != nil {
		return err
	}
	for range forks {
		pid, _, e := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if pid == 0 && e == 0 {
			syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		if e != 0 {
			return fmt.Errorf("fork: %w", e)
		}
		if _, err := unix.Wait4(int(pid), nil, 0, nil); err != nil {
			return err
		}
	}
	var wg sync.WaitGroup
	for i := range threads {
		wg.Add(1)
		go func() {
			runtime.LockOSThread() // the thread ends with the goroutine
			wg.Done()
		}()
		if i%8 == 7 {
			wg.Wait()
		}
	}
	wg.Wait()
	return nil
}

// A witness is a Handler that remembers.
type witness struct {
	mu      sync.Mutex
	changed chan struct{} // closed and replaced when something came
	recs    []event.Record
	lost    []Loss
	idles   int
	each    func(*event.Record)
	keep    func(*event.Record) bool
}

func newWitness() *witness { return &witness{changed: make(chan struct{})} }

func (w *witness) note(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *witness) Record(r *event.Record) {
	if w.each != nil {
		w.each(r)
	}
	if w.keep == nil || w.keep(r) {
		w.note(func() { w.recs = append(w.recs, cloneRecord(r)) })
	}
}
func (w *witness) Lost(l Loss) { w.note(func() { w.lost = append(w.lost, l) }) }
func (w *witness) Idle()       { w.note(func() { w.idles++ }) }

// await waits until f, called under the lock, says true.
func (w *witness) await(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		w.mu.Lock()
		ok, changed := f(), w.changed
		w.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("waited 20s in vain for %s", what)
		}
	}
}

// find waits for a record and returns it.
func (w *witness) find(t *testing.T, what string, f func(*event.Record) bool) event.Record {
	t.Helper()
	var found event.Record
	w.await(t, what, func() bool {
		i := slices.IndexFunc(w.recs, func(r event.Record) bool { return f(&r) })
		if i >= 0 {
			found = w.recs[i]
		}
		return i >= 0
	})
	return found
}

func (w *witness) totalLost() (n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.lost {
		n += l.Count
	}
	return n
}

// openHere opens a Conn or skips.
func openHere(t *testing.T, cfg Config) *Conn {
	t.Helper()
	testenv.Root(t)
	c, err := Open(t.Context(), cfg)
	if err != nil && cfg.Recorder == Require {
		testenv.Skip(t, err.Error())
	}
	testenv.SkipOn(t, err, ErrNotSupported, ErrPermission)
	return c
}

// watch opens a Conn and runs it until the test ends, or until stop is called,
// which returns what Run said. At the end the Stats must add up.
func watch(t *testing.T, cfg Config, w *witness) (c *Conn, stop func()) {
	t.Helper()
	c = openHere(t, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, w) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
			addsUp(t, c.Stats)
			if err := c.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return c, stop
}

// addsUp checks what the comment of Stats promises. What a reader thread of the
// fall-back is just looking at is in flight: it goes on until Close.
func addsUp(t *testing.T, stats func() Stats) {
	t.Helper()
	s := stats()
	for end := time.Now().Add(2 * time.Second); !accounted(s) && time.Now().Before(end); s = stats() {
		runtime.Gosched()
	}
	if sum := s.Delivered.Sum() + s.NotAsked + s.Own + s.Acks + s.Unknown + s.Malformed + s.Forged +
		s.Lost[LostQueue] + s.Waiting; sum != s.Received {
		t.Errorf("received %d, accounted for %d: %+v", s.Received, sum, s)
	}
	f := s.Facts
	if sum := f.Complete + f.Partial + f.Gone + f.Superseded + f.WrongProcess + f.Throttled; sum != f.Execs {
		t.Errorf("execs %d, accounted for %d: %+v", f.Execs, sum, f)
	}
	if f.Execs != 0 && f.Execs != s.Delivered[event.Exec] {
		t.Errorf("facts of %d execs, %d delivered", f.Execs, s.Delivered[event.Exec])
	}
	if s.BeatsSent != s.BeatsSeen+s.BeatsMissed {
		t.Errorf("heartbeats: %d sent, %d seen, %d missed", s.BeatsSent, s.BeatsSeen, s.BeatsMissed)
	}
}

func accounted(s Stats) bool {
	f := s.Facts
	return s.Received == s.Delivered.Sum()+s.NotAsked+s.Own+s.Acks+s.Unknown+s.Malformed+s.Forged+s.Lost[LostQueue]+s.Waiting &&
		f.Execs == f.Complete+f.Partial+f.Gone+f.Superseded+f.WrongProcess+f.Throttled
}

// bothWays runs a test with the recorder and with the fall-back.
func bothWays(t *testing.T, f func(t *testing.T, m Mode)) {
	t.Run("recorder", func(t *testing.T) { f(t, Require) })
	t.Run("fallback", func(t *testing.T) { f(t, Off) })
}

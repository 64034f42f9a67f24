package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/testenv"
)

// TestRunAndStop: the kernel reports the exec with its arguments, and not one
// instruction of the program has run.
func TestRunAndStop(t *testing.T) {
	testenv.Root(t)
	conn, err := procconn.Open(t.Context(), procconn.Config{Recorder: procconn.Require, Kinds: event.KindSet(event.Exec, event.Exit)})
	testenv.SkipOn(t, err, procconn.ErrNotSupported, procconn.ErrPermission)
	defer conn.Close()
	trace := filepath.Join(t.TempDir(), "was-here")
	script := "echo > " + trace
	began := time.Now()
	const n = 20
	for i := range n {
		if err := runAndStop("/bin/sh", "-c", script, fmt.Sprint("beat-", i)); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%v each", time.Since(began)/n)
	if _, err := os.Stat(trace); !os.IsNotExist(err) {
		t.Errorf("the program ran: %v", err)
	}
	var c runs
	over, cancel := context.WithCancel(t.Context())
	cancel() // what has arrived is still handed over
	if err := conn.Run(over, &c); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		want := fmt.Sprintf("/bin/sh\x00-c\x00%s\x00beat-%d\x00", script, i)
		if c.execs[want] != 1 {
			t.Errorf("%q was told %d times, want once", want, c.execs[want])
		}
	}
	if c.killed < n {
		t.Errorf("%d processes were killed, want %d", c.killed, n)
	}
	if err := runAndStop("/no/such/program"); err != syscall.ENOENT {
		t.Errorf("error %v, want %v", err, syscall.ENOENT)
	}
}

// runs counts programs by their arguments, and processes that were killed.
type runs struct {
	execs  map[string]int
	killed int
}

func (r *runs) Record(rec *event.Record) {
	switch {
	case rec.Kind == event.Exec:
		if r.execs == nil {
			r.execs = map[string]int{}
		}
		r.execs[string(rec.Cmdline)]++
	case rec.Kind == event.Exit && event.Signal(rec.Status) == int(syscall.SIGKILL):
		r.killed++
	}
}

func (*runs) Lost(procconn.Loss) {}
func (*runs) Idle()              {}

package procconn

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// TestSilencedByAnother: another program sends IGNORE without having listened.
// Kernels before 6.6 count listeners in one number that anybody privileged may
// lower, and send nothing to anybody when it is below 1. The heartbeat notices,
// and LISTEN is sent again until events come.
//
// It would silence everybody on the machine, so it is made for the guests of
// the kernel matrix.
func TestSilencedByAnother(t *testing.T) {
	vm := os.Getenv("PROCESSION_TEST_VM")
	if vm == "" {
		t.Skip("made for the guests of the kernel matrix: make vmtest")
	}
	bothWays(t, func(t *testing.T, m Mode) {
		w := newWitness()
		w.keep = func(r *event.Record) bool { return r.Kind == event.Exit }
		c, stop := watch(t, Config{Recorder: m, Heartbeat: 200 * time.Millisecond}, w)
		w.await(t, "heartbeats", func() bool { return c.Stats().BeatsSeen >= 2 })

		// How many it takes is not known: who listened before and ended without
		// a word is still counted.
		sent := 0
		for c.Stats().BeatsMissed == 0 && sent < 200 {
			for range 4 {
				ignoreFromElsewhere(t)
				sent++
			}
			awaitBeat(t, c, w)
		}
		silenced := c.Stats().BeatsMissed > 0
		seen := c.Stats().BeatsSeen
		t.Logf("FACT silenced_by_another's_IGNORE_(%s) %t", m, silenced)
		if old := vm == "5.10-amd64" || vm == "6.1-amd64"; old && !silenced {
			t.Error("this kernel is known to be silenced, and was not")
		}
		w.await(t, "heartbeats again", func() bool { return c.Stats().BeatsSeen >= seen+3 && c.Status().Alive })
		if s := c.Stats(); silenced && s.Relistens == 0 {
			t.Errorf("no LISTEN was sent again: %+v", s)
		}
		w.find(t, "exit of a process after the silence", is(event.Exit, runChild(t, child("nothing"))))
		stop()
	})
}

// ignoreFromElsewhere sends IGNORE from a new socket: since 6.6 the kernel
// remembers what a socket said last.
func ignoreFromElsewhere(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		t.Fatal(err)
	}
	other := &socket{fd: fd}
	defer other.close()
	if err := other.request(opIgnore, 0); err != nil {
		t.Fatal(err)
	}
}

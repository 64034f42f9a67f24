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
// and LISTEN is sent until the number is right again.
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

		const ignores = 4
		for range ignores {
			// A socket each: since 6.6 the kernel remembers what a socket said last.
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
		// Silence shows in the heartbeats alone: wait until one was missed, or
		// until more came than could be on their way.
		before := c.Stats().BeatsSeen
		w.await(t, "a heartbeat that comes or not", func() bool {
			s := c.Stats()
			return s.BeatsMissed > 0 || s.BeatsSeen >= before+3
		})
		silenced := c.Stats().BeatsMissed > 0
		t.Logf("FACT silenced_by_another's_IGNORE_(%s) %t", m, silenced)
		if old := vm == "5.10-amd64" || vm == "6.1-amd64"; old && !silenced {
			t.Error("this kernel is known to be silenced, and was not")
		}
		w.await(t, "heartbeats again", func() bool { return c.Stats().BeatsSeen >= before+3 && c.Status().Alive })
		if s := c.Stats(); silenced && s.Relistens < ignores {
			t.Errorf("LISTEN was sent again %d times, for %d of IGNORE", s.Relistens, ignores)
		}
		w.find(t, "exit of a process after the silence", is(event.Exit, runChild(t, child("nothing"))))
		stop()
	})
}

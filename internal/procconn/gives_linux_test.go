package procconn

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/event"
)

// TestWhatItGives: an exec's record has the facts that the Status promises, no
// more and no fewer. On the guests of the kernel matrix this is what the table
// in docs/capture.md says of each kernel.
func TestWhatItGives(t *testing.T) {
	bothWays(t, func(t *testing.T, m Mode) {
		w := newWitness()
		c, _ := watch(t, Config{Recorder: m, Cwd: true}, w)
		// It waits for its standard input: the fall-back has all the time it needs.
		var r event.Record
		runChildWhile(t, child("ids"), func(pid int32) { r = w.find(t, "exec", is(event.Exec, pid)) })
		s := c.Status()
		if r.Have != s.Facts {
			t.Errorf("an exec's record has %s; promised: %s", but(r.Have), but(s.Facts))
		}
		if m == Off {
			t.Logf("FACT fall-back %s, %s", s.Way, s.Scheduling)
			t.Logf("FACT fall-back:_facts %s", but(r.Have))
			return
		}
		f := c.src.(*recording).rec.Features()
		loads := "probe_read"
		if f.TypedLoads {
			loads = "typed loads"
		}
		t.Logf("FACT recorder %s, %d instructions", loads, f.Instructions)
		facts := but(r.Have)
		if !f.Overlay {
			facts += "; overlay layer unknown"
		}
		t.Logf("FACT recorder:_facts %s", facts)
		// The creator of a fork is the task that ran the filter.
		if fork := w.find(t, "fork", func(f *event.Record) bool { return f.Kind == event.Fork && f.PeerTGID == r.TGID }); fork.TGID != int32(os.Getpid()) || fork.PeerStart == 0 {
			t.Errorf("fork: creator %d, child started at %d", fork.TGID, fork.PeerStart)
		}
	})
}

// but says which facts are there, by what is missing.
func but(have event.Fields) string {
	var missing []string
	for f := range event.NumFields {
		if !have.Has(f) {
			missing = append(missing, f.String())
		}
	}
	if missing == nil {
		return fmt.Sprintf("all %d", event.NumFields)
	}
	return "all but " + strings.Join(missing, ", ")
}

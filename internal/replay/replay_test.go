package replay

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/recording"
)

const second = uint64(time.Second)

var header = recording.Header{
	Wall: 1_790_000_000 * int64(time.Second), Stamp: 100 * second, Boot: 160 * second, Kernel: "6.18.0", Mode: "recorder",
}

func facts(ppid int32, name, exe, cmdline string) event.Facts {
	return event.Facts{
		Have: event.FieldSet(event.FieldParent, event.FieldName, event.FieldExe, event.FieldArgs, event.FieldIDs, event.FieldCgroup),
		From: event.SourceRecord, PPID: ppid,
		Comm: []byte(name), Exe: []byte(exe), Cmdline: []byte(cmdline), CmdlineLen: uint32(len(cmdline)), Cgroup: []byte("/system.slice/x.service"),
	}
}

// write makes a recording of a shell that ran before, forks, and whose child
// runs ncat and ends; n times, a second apart.
func write(t testing.TB, n int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := recording.NewWriter(&b, header)
	if err != nil {
		t.Fatal(err)
	}
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(w.Process(&recording.Baseline{PID: 1, Facts: facts(0, "systemd", "/usr/lib/systemd/systemd", "/sbin/init\x00")}))
	check(w.Process(&recording.Baseline{PID: 50, Facts: facts(1, "bash", "/usr/bin/bash", "bash\x00")}))
	for i := range n {
		at, child := header.Stamp+uint64(i+1)*second, int32(100+i)
		check(w.Record(&event.Record{Kind: event.Fork, Stamp: at, PID: 50, TGID: 50, PeerPID: child, PeerTGID: child}))
		check(w.Record(&event.Record{Kind: event.Exec, Stamp: at + 1000, PID: child, TGID: child,
			Facts: facts(50, "ncat", "/usr/bin/ncat", "ncat\x00-e\x00/bin/sh\x00")}))
		check(w.Record(&event.Record{Kind: event.Exit, Stamp: at + 2000, PID: child, TGID: child}))
		check(w.Loss(recording.Loss{Events: 2}))
		if i == n/2 {
			check(w.Flush()) // what follows is another block
		}
	}
	check(w.Close())
	return b.Bytes()
}

func run(t *testing.T, data []byte) (events []string, r *Replay, err error) {
	t.Helper()
	if r, err = Open(bytes.NewReader(data), nil); err != nil {
		t.Fatal(err)
	}
	err = r.Run(func(ev *event.Event) {
		events = append(events, fmt.Sprintf("%s %s %d %s parent=%s %s", ev.Time.UTC().Format(time.TimeOnly), ev.Kind, ev.Process.PID,
			ev.Process.Name, ev.Process.Parent.Name, ev.Process.Workload.Place))
	})
	return events, r, err
}

func TestReplay(t *testing.T) {
	data := write(t, 2)
	events, r, err := run(t, data)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"14:13:21 Fork 100 bash parent=bash host", "14:13:21 Exec 100 ncat parent=bash host", "14:13:21 Exit 100 ncat parent=bash host",
		"14:13:22 Fork 101 bash parent=bash host", "14:13:22 Exec 101 ncat parent=bash host", "14:13:22 Exit 101 ncat parent=bash host",
	}
	if d := cmp.Diff(want, events); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if r.Processes != 2 || r.Records != 6 || r.Events != 6 || r.Lost != 4 || r.Cut {
		t.Errorf("counts are %+v", r)
	}
	again, _, _ := run(t, data)
	if d := cmp.Diff(events, again); d != "" {
		t.Errorf("the second replay differs: -first +second\n%s", d)
	}
	if got, want := r.Wall(header.Boot+second), time.Unix(0, header.Wall).Add(time.Second); !got.Equal(want) {
		t.Errorf("Wall is %v, want %v", got, want)
	}
}

// What was written before the end came counts, and the reader is told.
func TestCutAndDamaged(t *testing.T) {
	data := write(t, 4)
	whole, _, err := run(t, data)
	if err != nil {
		t.Fatal(err)
	}
	events, r, err := run(t, data[:len(data)-3])
	if !errors.Is(err, recording.ErrCut) || !r.Cut || len(events) == 0 || len(events) >= len(whole) {
		t.Errorf("cut: %d of %d events, Cut %v, err %v", len(events), len(whole), r.Cut, err)
	}
	bad := bytes.Clone(data)
	bad[len(bad)-3] ^= 0x40
	var damage *recording.DamageError
	events, r, err = run(t, bad)
	if !errors.As(err, &damage) || r.Cut || len(events) == 0 || len(events) >= len(whole) {
		t.Errorf("damaged: %d of %d events, Cut %v, err %v", len(events), len(whole), r.Cut, err)
	}
	if _, err := Open(bytes.NewReader([]byte("kind: Exec\n")), nil); err == nil {
		t.Error("a file that is no recording was opened")
	}
}

// A recording of days must not fill the memory: who ended is forgotten in the
// recording's time.
func TestForgetsTheEnded(t *testing.T) {
	_, r, err := run(t, write(t, 2000))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for range r.table.All() {
		n++
	}
	if n > 200 {
		t.Errorf("the table remembers %d processes after the replay", n)
	}
}

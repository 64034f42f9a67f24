package agent

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

const thisBoot, otherBoot = "0a0a0a0a-1111-2222-3333-444455556666", "0b0b0b0b-1111-2222-3333-444455556666"

func TestSign(t *testing.T) {
	want := sign{boot: thisBoot, up: 12345678901, wall: time.Unix(1700000000, 5).UTC(), stopped: true}
	file := filepath.Join(t.TempDir(), "alive")
	if _, err := readSign(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	good := want.encode()
	for name, tc := range map[string]struct {
		content []byte
		ok      bool
	}{
		"good":          {good, true},
		"empty":         {nil, false},
		"cut":           {good[:100], false},
		"longer":        {append(bytes.Clone(good), 'x'), false},
		"zeroed":        {make([]byte, signSize), false},
		"another digit": {bytes.Replace(good, []byte("12345678901"), []byte("12345678902"), 1), false},
		"another word":  {bytes.Replace(good, []byte("stopped"), []byte("running"), 1), false},
		"newer version": {bytes.Replace(good, []byte("alive 1"), []byte("alive 2"), 1), false},
	} {
		if err := os.WriteFile(file, tc.content, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readSign(file)
		if ok := err == nil; ok != tc.ok {
			t.Errorf("%s: %v", name, err)
		} else if ok && got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}

func FuzzSign(f *testing.F) {
	good := sign{boot: thisBoot, up: 1, wall: time.Unix(1, 1)}.encode()
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(" 1 "), []byte(" -1 "), 1))
	f.Add([]byte(strings.Repeat("x ", signSize/2)))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSign(b)
		if err == nil && !bytes.Equal(s.encode(), b) {
			t.Errorf("%q becomes %q", b, s.encode())
		}
	})
}

func TestSignNow(t *testing.T) {
	a, err := signNow()
	if err != nil {
		t.Skip(err) // no Linux
	}
	b, err := signNow()
	if err != nil || a.boot != b.boot || a.up <= 0 || b.up < a.up {
		t.Errorf("%+v, then %+v, %v", a, b, err)
	}
}

// The time without an agent, by what is known of it; and how bad it is.
func TestUnwatched(t *testing.T) {
	noon := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(noon.Add(d)) }
	now := sign{boot: thisBoot, up: time.Hour, wall: noon}
	for _, tc := range []struct {
		name     string
		last     sign
		want     *pb.Unwatched
		severity pb.Severity
		message  string
	}{
		{"an upgrade", sign{boot: thisBoot, up: time.Hour - 6*time.Second, wall: noon.Add(-6 * time.Second), stopped: true},
			&pb.Unwatched{From: at(-6 * time.Second), Until: at(0), Reason: "stopped"}, pb.Severity_SEVERITY_INFORMATIONAL, "(6s): the agent was stopped"},
		{"stopped for a while", sign{boot: thisBoot, up: 57 * time.Minute, wall: noon.Add(-3 * time.Minute), stopped: true},
			&pb.Unwatched{From: at(-3 * time.Minute), Until: at(0), Reason: "stopped"}, pb.Severity_SEVERITY_LOW, "(3m0s)"},
		{"stopped for long", sign{boot: thisBoot, up: 45 * time.Minute, wall: noon.Add(-15 * time.Minute), stopped: true},
			&pb.Unwatched{From: at(-15 * time.Minute), Until: at(0), Reason: "stopped"}, pb.Severity_SEVERITY_MEDIUM, "(15m0s)"},
		{"killed", sign{boot: thisBoot, up: time.Hour - 2*time.Second, wall: noon.Add(-2 * time.Second)},
			&pb.Unwatched{From: at(-2 * time.Second), Until: at(0), Reason: "died"}, pb.Severity_SEVERITY_LOW, "killed or failed"},
		{"killed, and the clock was set back since", sign{boot: thisBoot, up: time.Hour - 2*time.Second, wall: noon.Add(5 * time.Hour)},
			&pb.Unwatched{From: at(-2 * time.Second), Until: at(0), Reason: "died"}, pb.Severity_SEVERITY_LOW, "(2s)"},
		{"a sign of the future of this boot", sign{boot: thisBoot, up: 2 * time.Hour, wall: noon},
			&pb.Unwatched{From: at(0), Until: at(0), Reason: "died"}, pb.Severity_SEVERITY_LOW, "(0s)"},
		{"the node was down for a day", sign{boot: otherBoot, up: 90 * time.Hour, wall: noon.Add(-24 * time.Hour)},
			&pb.Unwatched{From: at(-24 * time.Hour), Until: at(0), Reason: "rebooted", Booted: at(-time.Hour)}, pb.Severity_SEVERITY_MEDIUM, "started anew at 2026-05-01T11:00:00Z, 1h0m0s before the agent"},
		{"stopped by a reboot", sign{boot: otherBoot, up: time.Hour, wall: noon.Add(-time.Hour), stopped: true},
			&pb.Unwatched{From: at(-time.Hour), Until: at(0), Reason: "rebooted", Booted: at(-time.Hour)}, pb.Severity_SEVERITY_MEDIUM, ""},
		{"rebooted, with a clock that was wrong before", sign{boot: otherBoot, up: time.Hour, wall: noon.Add(time.Hour)},
			&pb.Unwatched{From: at(0), Until: at(0), Reason: "rebooted", Booted: at(-time.Hour)}, pb.Severity_SEVERITY_MEDIUM, ""},
	} {
		got := unwatchedSince(tc.last, now, noon)
		if d := cmp.Diff(tc.want, got, protocmp.Transform()); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, d)
		}
		al := unwatchedAlert(got)
		if al.Severity != tc.severity || !strings.Contains(al.Message, tc.message) {
			t.Errorf("%s: %v, %q; want %v, %q", tc.name, al.Severity, al.Message, tc.severity, tc.message)
		}
	}
	fast := unwatchedSince(sign{boot: otherBoot, wall: noon.Add(-time.Hour)}, sign{boot: thisBoot, up: 40 * time.Second, wall: noon}, noon)
	if al := unwatchedAlert(fast); al.Severity != pb.Severity_SEVERITY_LOW {
		t.Errorf("an agent that starts with its node: %v", al.Severity)
	}
	if al := unwatchedAlert(&pb.Unwatched{Until: at(0), Reason: unwatchedUnknown}); al.Severity != pb.Severity_SEVERITY_MEDIUM || len(al.Evidence) != 2 {
		t.Errorf("a damaged sign: %v", al)
	}
}

// The sign of the last run stays until what was told of it is on the disk; an
// end that was asked for is another than one that was not.
func TestLife(t *testing.T) {
	if _, err := signNow(); err != nil {
		t.Skip(err) // no Linux
	}
	file := filepath.Join(t.TempDir(), "alive")
	open := func() *life { return newLife(file, slog.New(slog.DiscardHandler)) }
	at := func() sign {
		t.Helper()
		s, err := readSign(file)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	l := open()
	go l.run(nil)
	l.end(true)
	first := at()
	if !first.stopped {
		t.Errorf("a run that was stopped leaves %+v", first)
	}

	l = open()
	l.told = true
	go l.run(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }) // a disk that takes nothing
	l.end(true)
	if s := at(); s != first {
		t.Errorf("nothing was told, and the sign is %+v instead of %+v", s, first)
	}

	l = open()
	l.told = true
	synced := make(chan struct{})
	go l.run(func(context.Context) error { <-synced; return nil })
	close(synced)
	l.end(false)
	if s := at(); s.stopped || s.up < first.up {
		t.Errorf("a run that failed leaves %+v", s)
	}
}

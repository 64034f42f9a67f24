package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/recording"
	"github.com/procession-dev/procession/internal/testenv"
)

func TestWrongCommandLines(t *testing.T) {
	for name, tt := range map[string]struct {
		args string
		code int
		want string
	}{
		"nothing":                 {"", exitUsage, "agent run"},
		"unknown command":         {"start", exitUsage, `"start"`},
		"unknown flag":            {"events --kindz exec", exitUsage, "kindz"},
		"unknown kind":            {"events --kinds execs", exitUsage, `"execs"`},
		"pid no number":           {"events --pid init", exitUsage, `"init"`},
		"pid negative":            {"events --pid -4", exitUsage, `"-4"`},
		"uid no number":           {"events --uid root", exitUsage, `"root"`},
		"unknown format":          {"events --format xml", exitUsage, `"xml"`},
		"unknown colour":          {"events --color red", exitUsage, `"red"`},
		"unknown recorder":        {"events --recorder maybe", exitUsage, "--recorder"},
		"drain too long":          {"run --collector x:1 --tls /x --drain 1s", exitUsage, "--drain: 1s"},
		"drain too short":         {"events --drain 1us", exitUsage, "--drain: 1µs"},
		"events, negative time":   {"events --duration -1s", exitUsage, "--duration: -1s"},
		"record, negative time":   {"record --duration -1s /nonexistent/x.rec", exitUsage, "--duration: -1s"},
		"list of nothing":         {"events --kinds ,", exitUsage, "--kinds: \",\""},
		"record, no file":         {"record", exitUsage, "file is missing"},
		"record, no folder":       {"record /nonexistent/x.rec", exitFailure, "/nonexistent/x.rec"},
		"record, file exists":     {"record /etc/passwd", exitUsage, "exists already"},
		"stray argument":          {"events exec", exitUsage, `"exec"`},
		"run without a collector": {"run", exitUsage, "--collector"},
		"run without tls":         {"run --collector x:1", exitUsage, "--tls"},
		"run, namespace time":     {"run --collector x:1 --tls /x --namespace-time 2s", exitUsage, "--namespace-time: 2s; want"},
		"run, node labels":        {"run --node-labels pool", exitUsage, `"pool" is not of the form key=value`},
		"run, log level":          {"run --collector x:1 --tls /x --log-level loud", exitUsage, `"loud"`},
		"spool, what":             {"spool", exitUsage, "dump or verify"},
		"spool, no folder":        {"spool dump /nonexistent/spool", exitFailure, "/nonexistent/spool"},
		"replay, no file":         {"replay", exitUsage, "file is missing"},
		"replay, two files":       {"replay a.rec --format json b.rec", exitUsage, `"b.rec"`},
		"replay, file first":      {"replay /nonexistent.rec --format json", exitFailure, "/nonexistent.rec"},
		"replay, missing file":    {"replay /nonexistent.rec", exitFailure, "/nonexistent.rec"},
		"replay, no recording":    {"replay /etc/passwd", exitFailure, "no recording"},
		"help":                    {"--help", exitOK, "agent events"},
		"help of a command":       {"events --help", exitOK, "--kinds exec,uid"},
		"help of run":             {"run --help", exitOK, "--spool-bytes"},
		"version":                 {"version", exitOK, "agent test-version"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if code := Main(strings.Fields(tt.args), &out, &out, "test-version"); code != tt.code {
				t.Errorf("agent %s: exit code %d, want %d", tt.args, code, tt.code)
			}
			if !strings.Contains(out.String(), tt.want) {
				t.Errorf("agent %s does not say %q:\n%s", tt.args, tt.want, &out)
			}
		})
	}
}

// TestRunGroups: the groups of agent run --help name each flag, and no other.
func TestRunGroups(t *testing.T) {
	var out bytes.Buffer
	Main([]string{"run", "--help"}, &out, &out, "test-version")
	help := out.String()
	for _, g := range runGroups {
		for _, name := range g.Flags {
			if !strings.Contains(help, "  --"+name) {
				t.Errorf("%q names --%s, which agent run does not have", g.Title, name)
			}
		}
	}
	if strings.Contains(help, "\nFlags:\n") {
		t.Errorf("a flag is in no group:\n%s", help[strings.Index(help, "\nFlags:\n"):])
	}
}

func TestFilter(t *testing.T) {
	init1 := &event.Process{PID: 1, Name: "init"}
	shell := &event.Process{PID: 50, Parent: init1, Name: "sh", Exe: "/bin/dash", IDs: event.IDs{UID: 1000, EUID: 0},
		Workload: &event.Workload{Place: event.PlaceContainer, ContainerID: "4fa6b1"}}
	shell.Sources[event.FieldIDs] = event.SourceRecord
	child := &event.Process{PID: 51, Parent: shell, Name: "true", Workload: &event.Workload{Place: event.PlaceHost}}
	for _, tt := range []struct {
		name  string
		flags eventsFlags
		ev    event.Event
		want  bool
	}{
		{"no filter", eventsFlags{}, event.Event{Kind: event.Exit, Process: child}, true},
		{"renames only when asked for", eventsFlags{}, event.Event{Kind: event.CommChange, Process: child}, false},
		{"renames asked for", eventsFlags{kinds: "comm"}, event.Event{Kind: event.CommChange, Process: child}, true},
		{"kind, by policy name", eventsFlags{kinds: "UIDChange,exec"}, event.Event{Kind: event.UIDChange, Process: child}, true},
		{"other kind", eventsFlags{kinds: "exec"}, event.Event{Kind: event.Exit, Process: child}, false},
		{"ptrace means detach too", eventsFlags{kinds: "ptrace"}, event.Event{Kind: event.PtraceDetach, Process: child}, true},
		{"pid", eventsFlags{pids: "50"}, event.Event{Kind: event.Exec, Process: shell}, true},
		{"pid of an ancestor", eventsFlags{pids: "7,50"}, event.Event{Kind: event.Exec, Process: child}, true},
		{"another pid", eventsFlags{pids: "51"}, event.Event{Kind: event.Exec, Process: shell}, false},
		{"real uid", eventsFlags{uids: "1000"}, event.Event{Kind: event.Exec, Process: shell}, true},
		{"effective uid", eventsFlags{uids: "0"}, event.Event{Kind: event.Exec, Process: shell}, true},
		{"uid unknown is no uid", eventsFlags{uids: "0"}, event.Event{Kind: event.Exec, Process: child}, false},
		{"start of a container's id", eventsFlags{containers: "4fa6"}, event.Event{Kind: event.Exec, Process: shell}, true},
		{"container, on the host", eventsFlags{containers: "4fa6"}, event.Event{Kind: event.Exec, Process: child}, false},
		{"host", eventsFlags{containers: "host"}, event.Event{Kind: event.Exec, Process: child}, true},
		{"place unknown is not the host", eventsFlags{containers: "host"}, event.Event{Kind: event.Exec, Process: init1}, false},
		{"task name", eventsFlags{names: "sh"}, event.Event{Kind: event.Exec, Process: shell}, true},
		{"last part of the path", eventsFlags{names: "x,dash"}, event.Event{Kind: event.Exec, Process: shell}, true},
		{"another name", eventsFlags{names: "bash"}, event.Event{Kind: event.Exec, Process: shell}, false},
		{"all filters must hold", eventsFlags{names: "sh", uids: "7"}, event.Event{Kind: event.Exec, Process: shell}, false},
	} {
		f, err := newFilter(tt.flags)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := f.match(&tt.ev); got != tt.want {
			t.Errorf("%s: match is %v, want %v", tt.name, got, tt.want)
		}
	}
}

// A lossy pipeline says what it lost at most once per interval, and at the
// first time.
func TestLossesAreLoggedOncePerInterval(t *testing.T) {
	var said bytes.Buffer
	p, err := newPipeline(slog.New(slog.NewTextHandler(&said, nil)), func(*event.Event) {}, nil)
	if err != nil {
		testenv.Skip(t, err.Error())
	}
	for range 1000 {
		p.Lost(procconn.Loss{Cause: procconn.LostRing, Count: 3})
		p.Idle()
	}
	if n := strings.Count(said.String(), "dropped process events"); n != 1 || !strings.Contains(said.String(), "lost=3 ") {
		t.Errorf("1,000 losses made %d log lines:\n%s", n, &said)
	}
	if p.lost.Load() != 3000 {
		t.Errorf("%d events counted as lost, want 3000", p.lost.Load())
	}
	p.lastLoss = time.Time{} // the interval is over
	p.Idle()
	if !strings.Contains(said.String(), "lost=2997 lost_total=3000") {
		t.Errorf("the rest is not told:\n%s", &said)
	}
}

// What is recorded on the real kernel is told again by a replay, the same each
// time, with the alerts of the starter pack.
func TestRecordAndReplay(t *testing.T) {
	testenv.Root(t)
	file := filepath.Join(t.TempDir(), "test.rec")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	conn, err := procconn.Open(ctx, procconn.Config{Cwd: true})
	testenv.SkipOn(t, err, procconn.ErrNotSupported, procconn.ErrPermission)
	defer conn.Close()
	pipe, err := newPipeline(slog.New(slog.DiscardHandler), func(*event.Event) {}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pipe.table.Scan(); err != nil {
		t.Fatal(err)
	}
	rec := &recorder{stop: cancel}
	if rec.w, err = recording.NewWriter(f, header(pipe.now, "test")); err != nil {
		t.Fatal(err)
	}
	if err := rec.baseline(pipe.table); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- conn.Run(ctx, rec) }()
	for _, args := range [][]string{{"true", "replay-me"}, {"xmrig", "replay-me", "-o", "stratum+tcp://pool.example:3333"}} {
		if err := (&exec.Cmd{Path: "/bin/true", Args: args}).Run(); err != nil {
			t.Fatal(err)
		}
	}
	cancel() // Run drains what is left
	if err := <-done; err != nil || rec.err != nil {
		t.Fatal(err, rec.err)
	}
	if err := rec.w.Close(); err != nil {
		t.Fatal(err)
	}

	replay := func(args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if code := Main(append([]string{"replay"}, append(args, file)...), &out, &errs, ""); code != exitOK {
			t.Fatalf("replay: exit code %d: %s", code, &errs)
		}
		return out.String()
	}
	events := replay("--format", "json")
	if !strings.Contains(events, `"args":["true","replay-me"]`) {
		t.Errorf("the replay does not tell the exec:\n%.3000s", events)
	}
	if again := replay("--format", "json"); again != events {
		t.Error("two replays of one recording differ")
	}
	alerts := replay("--policies", "../../deploy/helm/procession/policies", "--format", "json")
	n := 0
	for line := range strings.Lines(alerts) {
		// Other tests on this machine have miners of their own.
		if !strings.Contains(line, `"rule":"ClusterDetectionPolicy//host/crypto-miner"`) || !strings.Contains(line, `"args":["xmrig","replay-me",`) {
			continue
		}
		if n++; !strings.Contains(line, `"pid":1,`) {
			t.Errorf("the replayed alert's ancestors do not reach pid 1: %s", line)
		}
	}
	if n != 1 {
		t.Errorf("the replay raises %d miner alerts, want 1:\n%.3000s", n, alerts)
	}
}

// Recordings keep the cause of a loss by its number.
func TestCausesInRecordings(t *testing.T) {
	var causes []string
	for c := range procconn.NumCauses {
		causes = append(causes, fmt.Sprintf("%d %s", c, c))
	}
	page, err := os.ReadFile("../../docs/recording-format.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := "The cause of a loss: " + strings.Join(causes, ", ") + "."; !strings.Contains(string(page), want) {
		t.Errorf("docs/recording-format.md does not say %q", want)
	}
}

// A recording that is no good, and policies that are none, are told with the
// file's name. What was before the damage is replayed.
func TestReplayOfBadFiles(t *testing.T) {
	var b bytes.Buffer
	w, err := recording.NewWriter(&b, recording.Header{Wall: 1_790_000_000e9, Stamp: 1e9, Boot: 1e9})
	if err != nil {
		t.Fatal(err)
	}
	for pid := range int32(2) {
		rec := &event.Record{Kind: event.Exec, Stamp: 2e9 + uint64(pid), PID: 100 + pid, TGID: 100 + pid,
			Facts: event.Facts{Have: event.FieldSet(event.FieldName), From: event.SourceRecord, Comm: []byte("prog")}}
		if err := errors.Join(w.Record(rec), w.Flush()); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	whole, dir := b.Bytes(), t.TempDir()
	damaged, newer := bytes.Clone(whole), bytes.Clone(whole)
	damaged[len(damaged)-1] ^= 1
	newer[15]++
	for _, tt := range []struct {
		name   string
		data   []byte
		flags  string
		events int
		want   string
	}{
		{"whole.rec", whole, "", 2, "whole.rec: recorded "},
		{"cut.rec", whole[:len(whole)-40], "", 1, "cut.rec: the recording is cut off"},
		{"damaged.rec", damaged, "", 2, "damaged.rec: recording: block at byte"},
		{"newer.rec", newer, "", 0, "newer.rec: the recording has format version 2, this program reads version 1"},
		{"empty.rec", nil, "", 0, "empty.rec: this is no recording"},
		{"no-rule.rec", whole, "--policies " + dir, 0, "--policies: no rule in " + dir},
		{"no-folder.rec", whole, "--policies /nonexistent", 0, "--policies: policy directory: open /nonexistent"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(dir, tt.name)
			if err := os.WriteFile(file, tt.data, 0o600); err != nil {
				t.Fatal(err)
			}
			want := exitFailure
			if tt.name == "whole.rec" {
				want = exitOK
			}
			var out, errs bytes.Buffer
			if code := Main(append(strings.Fields("replay "+tt.flags), file), &out, &errs, ""); code != want {
				t.Errorf("exit code %d, want %d", code, want)
			}
			if n := strings.Count(out.String(), "\n"); n != tt.events || !strings.Contains(errs.String(), tt.want) {
				t.Errorf("%d events, want %d; said %q, want %q", n, tt.events, &errs, tt.want)
			}
		})
	}
}

// A writer that fails ends the command instead of running on for nobody.
func TestEventsEndWhenNobodyReads(t *testing.T) {
	r, w := io.Pipe()
	r.Close()
	out, err := newEventWriter(eventsFlags{format: "json", color: "never"}, w)
	if err != nil {
		t.Fatal(err)
	}
	failed := 0
	out.failed = func() { failed++ }
	for range 3 {
		out.write(&event.Event{Kind: event.Exec, Process: &event.Process{PID: 1}})
		out.flush()
	}
	if failed != 1 || out.err == nil {
		t.Errorf("told %d times, error %v; want once", failed, out.err)
	}
}

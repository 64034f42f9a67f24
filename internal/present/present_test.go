package present

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	webContainer = "3f2a1b9c0d1e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8"
	webPodUID    = "1fc8cbb1-1d73-41f8-a9ba-825cb32d14b2"
)

var (
	testTime = time.Date(2026, 3, 4, 14, 2, 7, 123456789, time.UTC)
	testID   = Identity{
		Cluster: "prod", Node: "node-12", Seq: 412,
		Epoch:     [16]byte{0x9a, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xff},
		Committed: testTime.Add(7 * time.Millisecond),
	}
)

func argv(args ...string) []byte {
	return []byte(strings.Join(args, "\x00") + "\x00")
}

func at(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(testTime.Add(d)) }

// shell is `sh -c id` started by nginx in a pod, with everything known.
func shell() *pb.Event {
	return &pb.Event{
		Time: at(0), Kind: "Exec", Stamp: 9007199254740993,
		Process: &pb.Process{
			Pid: 123, Ppid: proto.Int32(77), Start: 9007199254740995, StartTime: at(-time.Millisecond),
			Exe: []byte("/usr/bin/dash"), File: []byte("/bin/sh"), Name: []byte("sh"),
			Cmdline: argv("sh", "-c", "id; echo done"), CmdlineLen: 20, Cwd: []byte("/var/www"),
			Ids:          &pb.IDs{Fsuid: 33, Fsgid: 33, Euid: 33, Egid: 33, Uid: 33, Gid: 33, Suid: 33, Sgid: 33},
			CapPermitted: proto.Uint64(1<<5 | 1<<10), CapEffective: proto.Uint64(1 << 10),
			Sid: proto.Int32(77), Tty: proto.Int32(0), LoginUid: proto.Uint32(4294967295), NoNewPrivs: proto.Bool(false),
			Ns:      &pb.Namespaces{Pid: 4026532001, Mnt: 4026532002, User: 4026531837, Net: 4026532003},
			ExeFile: &pb.ExeFile{Dev: 46, Ino: 1<<60 + 1, Mode: 0o100755, Nlink: 1, FsMagic: 0x794c7630},
			Cgroup:  []byte("/kubepods/besteffort/pod" + webPodUID + "/" + webContainer),
			Marks:   []string{"upperLayer"},
			Sources: map[string]string{"exe": "record", "args": "record", "cwd": "proc", "start": "message"},
			Ancestors: []*pb.Process{
				{Pid: 77, Ppid: proto.Int32(1), Start: 55, Name: []byte("nginx"), Exe: []byte("/usr/sbin/nginx"), Sources: map[string]string{"exe": "proc"}},
				{Pid: 1, Start: 1, Name: []byte("systemd")},
			},
			InnerPid: 8,
		},
		Container: &pb.Container{Id: webContainer, Runtime: "containerd", Name: "web", Image: "nginx:1.29"},
		Pod: &pb.Pod{
			Uid: webPodUID, Namespace: "default", Name: "web-7f", Labels: map[string]string{"app": "web", "tier": "front"},
			ServiceAccount: "web", OwnerKind: "Deployment", OwnerName: "web",
		},
		Place: "container",
	}
}

func shellAlert() *pb.Alert {
	return &pb.Alert{
		Event: shell(), Severity: pb.Severity_SEVERITY_CRITICAL, Rule: "ClusterDetectionPolicy//shells/shell-with-network",
		Title: "Shell in a web server", Message: "nginx started a shell",
		Mitre:            []*pb.Mitre{{Tactic: "execution", Technique: "T1059.004"}},
		Tags:             []string{"web", "shell"},
		Evidence:         []*pb.Evidence{{Field: "parent.name", Value: "nginx"}, {Field: "process.cwd", Missing: true}},
		PolicyGeneration: 3, PolicyDigest: "sha256:9c1185a5c5e9fc54612808977ee8f548b2258d31",
	}
}

// hostile is what an attacker would write to an analyst's terminal.
func hostile() *pb.Event {
	return &pb.Event{
		Time: at(time.Second), Kind: "Exec", Place: "host",
		Process: &pb.Process{
			Pid: 666, Name: []byte("x\x1b[2J\ny"), Exe: []byte("/tmp/\xff\u202egpj.exe"),
			Cmdline: argv("a b", "", "'", `\x41`, "\x1b]0;owned\a", "\u202etxt\u2066", "\xc3\x28", "ok→no…", "\u0301mark", "\u200bzero", "é日本"),
			Ids:     &pb.IDs{},
		},
	}
}

// events are the scenarios of the golden files.
func events() []struct {
	name string
	ev   *pb.Event
} {
	exit := func(e *pb.Exit) *pb.Event {
		ev := shell()
		ev.Kind, ev.Exit, ev.Time = "Exit", e, at(20*time.Microsecond)
		ev.Process.Ancestors = ev.Process.Ancestors[:1]
		return ev
	}
	return []struct {
		name string
		ev   *pb.Event
	}{
		{"exec in a pod", shell()},
		{"hostile exec", hostile()},
		{"cut arguments", &pb.Event{Time: at(0), Kind: "Exec", Process: &pb.Process{
			Pid: 9, Exe: []byte("/usr/bin/cat"), Cmdline: []byte("cat\x00-\x00/etc/pass"), CmdlineLen: 20000}}},
		{"no arguments at all", &pb.Event{Time: at(0), Kind: "Exec", Process: &pb.Process{
			Pid: 9, Name: []byte("-"), Cmdline: []byte{}}}},
		{"nothing known", &pb.Event{Time: at(0), Kind: "Exec", Place: "unknown", PlaceReason: "process-gone", Process: &pb.Process{Pid: 10}}},
		{"found by a scan", &pb.Event{Time: at(0), Kind: "Fork", Synthetic: true, Place: "host", Process: &pb.Process{Pid: 11, Name: []byte("cron"), Ppid: proto.Int32(1)}}},
		{"exit 1 after 20 us", exit(&pb.Exit{Code: 1, DurationNs: 20123, CpuNs: 9000})},
		{"exit by a signal", exit(&pb.Exit{Signal: 11, CoreDumped: true, DurationNs: 1234567891})},
		{"exit after 300 hours", exit(&pb.Exit{Signal: 37, DurationNs: 300*3600*1e9 + 59*60*1e9})},
		{"uid change", &pb.Event{Time: at(0), Kind: "UIDChange", Place: "host",
			Process: &pb.Process{Pid: 12, Name: []byte("su"), Ids: &pb.IDs{Uid: 1000}},
			Change:  &pb.Change{From: &pb.IDs{Uid: 1000, Euid: 1000}, To: &pb.IDs{Uid: 1000}}}},
		{"gid change from unknown", &pb.Event{Time: at(0), Kind: "GIDChange", Place: "host",
			Process: &pb.Process{Pid: 12, Name: []byte("su")}, Change: &pb.Change{To: &pb.IDs{Gid: 5, Egid: 5}}}},
		{"ptrace", &pb.Event{Time: at(0), Kind: "PtraceAttach", Place: "host",
			Process: &pb.Process{Pid: 13, Name: []byte("gdb"), Exe: []byte("/usr/bin/gdb")},
			Target:  &pb.Process{Pid: 14, Name: []byte("sshd"), Sources: map[string]string{"name": "record"}}}},
		{"renamed", &pb.Event{Time: at(0), Kind: "CommChange", Place: "host",
			Process: &pb.Process{Pid: 15, Name: []byte("[kworker/0:1]")},
			Change:  &pb.Change{FromName: []byte("miner"), ToName: []byte("[kworker/0:1]")}}},
		{"kind of a newer agent", &pb.Event{Kind: "Reboot now", Process: &pb.Process{Pid: 1}}},
		{"no process", &pb.Event{Time: at(0), Kind: "Exit"}},
	}
}

func alerts() []struct {
	name string
	a    *pb.Alert
} {
	undecided := &pb.Alert{Event: hostile(), Severity: pb.Severity_SEVERITY_LOW, Rule: "DetectionPolicy/shop/own/odd name", Undecided: true}
	uid := events()[9].ev
	return []struct {
		name string
		a    *pb.Alert
	}{
		{"shell", shellAlert()},
		{"hostile, undecided", undecided},
		{"uid change", &pb.Alert{Event: uid, Severity: pb.Severity_SEVERITY_HIGH, Rule: "x/y/z/unexplained-root"}},
		{"empty", &pb.Alert{}},
	}
}

func shopAmendment() *pb.Amendment {
	return &pb.Amendment{Seq: 411, Rule: shellAlert().GetRule(), Severity: shellAlert().GetSeverity(), Time: at(time.Second), Place: "container",
		Container: &pb.Container{Id: webContainer, Name: "web", Image: "nginx:1.29"},
		Pod:       &pb.Pod{Uid: webPodUID, Namespace: "default", Name: "web-7f", Labels: map[string]string{"app": "web"}}}
}

func minuteCoverage() *pb.Coverage {
	return &pb.Coverage{
		From: at(0), To: at(time.Minute), RecordingSince: at(-time.Hour), Capture: "recorder",
		Events: map[string]uint64{"Exec": 1200, "Fork": 2400, "Exit": 2390}, Lost: map[string]uint64{"ring": 3},
		Missed: map[string]uint64{"cwd": 7}, Unresolved: map[string]uint64{"pod-not-listed": 2},
		Undecided: 4, Suppressed: map[string]uint64{"exception": 9}, Alerts: 12, Spooled: 12, Acked: 10, SpoolBytes: 65536, Unacked: 2,
		BeatsSent: 6, BeatsSeen: 6, BeatMaxNs: 4_200_000, Rules: 31, PoliciesDigest: "sha256:9c11", Impaired: []string{"CAP_SYS_PTRACE: no cwd of other users"},
		Storms: []*pb.Storm{{ContainerId: webContainer, Events: 90000, Shed: 40000}},
	}
}

func items() []struct {
	name string
	it   *pb.Item
} {
	amendment := func(a *pb.Amendment) *pb.Item { return &pb.Item{Item: &pb.Item_Amendment{Amendment: a}} }
	coverage := func(c *pb.Coverage) *pb.Item { return &pb.Item{Item: &pb.Item_Coverage{Coverage: c}} }
	evil := "\x1b[2J\u202e"
	return []struct {
		name string
		it   *pb.Item
	}{
		{"amendment", amendment(shopAmendment())},
		{"amendment of an earlier epoch, given up", amendment(&pb.Amendment{Epoch: bytes.Repeat([]byte{0xab}, 16), Seq: 9, Time: at(0), PlaceReason: "gave-up pod-not-listed"})},
		{"hostile amendment", amendment(&pb.Amendment{Epoch: []byte("short"), Place: evil, PlaceReason: evil, Pod: &pb.Pod{Namespace: evil, Name: evil}, Container: &pb.Container{Id: evil, Name: evil}})},
		{"empty amendment", amendment(&pb.Amendment{})},
		{"coverage", coverage(minuteCoverage())},
		{"hostile coverage", coverage(&pb.Coverage{Capture: evil, CaptureReason: evil, Events: map[string]uint64{evil: 1<<64 - 1, "Exec": 5},
			Lost: map[string]uint64{evil: 1}, Impaired: []string{evil}, Storms: []*pb.Storm{{ContainerId: evil, PodUid: evil}}})},
		{"empty coverage", coverage(&pb.Coverage{})},
	}
}

func testLoss() *pb.Loss {
	return &pb.Loss{From: 412, To: 498, Reason: pb.LossReason_LOSS_REASON_SPOOL_FULL, Detail: "bound \x1b of 64 MiB"}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(string(got), "\n")); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestGoldenJSON(t *testing.T) {
	var b bytes.Buffer
	add := func(kind, name string, js []byte) {
		if !json.Valid(js) {
			t.Errorf("%s: not JSON: %s", name, js)
		}
		checkHarmless(t, js)
		fmt.Fprintf(&b, "# %s: %s\n%s\n", kind, name, js)
	}
	for _, c := range events() {
		add("event", c.name, AppendEventJSON(nil, c.ev))
	}
	for _, c := range alerts() {
		add("alert", c.name, AppendAlertJSON(nil, testID, c.a))
	}
	for _, c := range items() {
		js, ok := AppendItemJSON(nil, testID, c.it)
		if !ok {
			t.Errorf("%s: no JSON", c.name)
		}
		add("item", c.name, js)
	}
	add("loss", "spool full", AppendLossJSON(nil, testID, testTime, testLoss()))
	add("loss", "nonsense range", AppendLossJSON(nil, testID, testTime, &pb.Loss{From: 3, To: 2}))
	golden(t, "json.golden", b.Bytes())
}

func TestGoldenLines(t *testing.T) {
	zone := time.FixedZone("", 3600)
	for _, c := range []struct {
		file  string
		style Style
	}{
		{"lines.golden", Style{}},
		{"lines-80.golden", Style{Width: 80, Zone: zone}},
		{"lines-colour.golden", Style{Color: true, Layout: time.RFC3339}},
	} {
		var b bytes.Buffer
		line := func(l []byte) {
			if !c.style.Color {
				checkHarmless(t, l)
			}
			if w := cells(l); c.style.Width > 0 && w > c.style.Width {
				t.Errorf("%s: line of %d columns: %s", c.file, w, l)
			}
			b.Write(append(l, '\n'))
		}
		line(c.style.AppendEventHeader(nil))
		for _, e := range events() {
			line(c.style.AppendEventLine(nil, e.ev))
		}
		for _, a := range alerts() {
			line(c.style.AppendAlertLine(nil, testID, a.a))
		}
		for _, it := range items() {
			l, ok := c.style.AppendItemLine(nil, testID, it.it)
			if !ok {
				t.Errorf("%s: no line", it.name)
			}
			line(l)
		}
		line(c.style.AppendLossLine(nil, testID, testTime, testLoss()))
		golden(t, c.file, b.Bytes())
	}
}

// A process must not be able to say anything but its own words on an analyst's
// screen, whatever it is called and given, at any length.
func TestHostileArguments(t *testing.T) {
	var cmd []byte
	for len(cmd) < 128<<10 {
		cmd = append(cmd, "plain\x00sp ace\x00\x1b[31mred\x1b]52;c;eHg=\a\x00line\nfeed\r\x00\xff\xfe\xc0\x80\x00"+
			"\u202eevil\u2069\x00\u200d\ufeff\U000e0041\x00\x7f\u009b31m\x00\u2028\u2029\x00\ufffd\x00'\"\\\x00\x00\u0301\u0301\u0301\u0301\u0301\u0301\x00"...)
	}
	ev := hostile()
	ev.Process.Cmdline, ev.Process.CmdlineLen = cmd, uint32(len(cmd))
	ev.Process.Name, ev.Process.Cwd = []byte("\x1b[2J\xff"), []byte("/\u202e")
	a := &pb.Alert{Event: ev, Rule: "a/b/c/d\x1b[2J", Message: "\x1b[2J\u202e", Mitre: []*pb.Mitre{{Technique: "\n"}}}

	for _, style := range []Style{{}, {Width: 40}, {Width: 1}, {Width: 120}} {
		for _, line := range [][]byte{style.AppendEventLine(nil, ev), style.AppendAlertLine(nil, testID, a)} {
			checkHarmless(t, line)
			if w := cells(line); style.Width > 0 && w > style.Width {
				t.Errorf("width %d: line has %d columns", style.Width, w)
			}
			if style.Width == 0 && len(line) < len(cmd) {
				t.Errorf("a line without a width has %d bytes for a command line of %d", len(line), len(cmd))
			}
		}
	}

	js := AppendAlertJSON(nil, testID, a)
	checkHarmless(t, js)
	var got struct {
		Process struct {
			Args              []string
			ArgsRaw           []byte
			NameRaw           []byte
			Cwd, CwdRaw       string
			ArgsBytes         int
			ArgsTruncated     bool
			Name, Exe, ExeRaw string
		}
	}
	if err := json.Unmarshal(js, &got); err != nil {
		t.Fatal(err)
	}
	p := got.Process
	if !bytes.Equal(p.ArgsRaw, cmd) || p.ArgsBytes != len(cmd) || p.ArgsTruncated {
		t.Errorf("arguments are not complete: %d raw bytes, want %d", len(p.ArgsRaw), len(cmd))
	}
	if want := bytes.Count(cmd, []byte{0}); len(p.Args) != want {
		t.Errorf("%d arguments, want %d", len(p.Args), want)
	}
	if string(p.NameRaw) != "\x1b[2J\xff" || p.Name != "\x1b[2J\ufffd" || p.Cwd != "/\u202e" || p.CwdRaw != "" {
		t.Errorf("name or cwd came out wrong: %q %q %q %q", p.NameRaw, p.Name, p.Cwd, p.CwdRaw)
	}
}

func TestIdentity(t *testing.T) {
	const s = "prod/node-12/9a0102030405060708090a0b0c0d0eff/412"
	if testID.String() != s {
		t.Errorf("String: got %s, want %s", testID, s)
	}
}

func TestSignals(t *testing.T) {
	for sig, want := range map[int32]string{
		1: "SIGHUP", 9: "SIGKILL", 31: "SIGSYS", 32: "SIG32", 34: "SIGRTMIN", 37: "SIGRTMIN+3", 64: "SIGRTMAX", 65: "SIG65", 0: "SIG0", -1: "SIG-1",
	} {
		if got := string(AppendSignal(nil, sig)); got != want {
			t.Errorf("signal %d: got %s, want %s", sig, got, want)
		}
	}
}

func TestCapabilities(t *testing.T) {
	for bit, want := range map[int]string{0: "CAP_CHOWN", 21: "CAP_SYS_ADMIN", 40: "CAP_CHECKPOINT_RESTORE", 41: "CAP_41", -1: "CAP_-1"} {
		if got := string(AppendCapability(nil, bit)); got != want {
			t.Errorf("capability %d: got %s, want %s", bit, got, want)
		}
	}
}

func TestNothingAllocates(t *testing.T) {
	ev, a, host := shell(), shellAlert(), hostile()
	dst := make([]byte, 0, 64<<10)
	style := Style{Color: true, Width: 200}
	for name, f := range map[string]func(){
		"event JSON":   func() { AppendEventJSON(dst, ev) },
		"hostile JSON": func() { AppendEventJSON(dst, host) },
		"alert JSON":   func() { AppendAlertJSON(dst, testID, a) },
		"event line":   func() { style.AppendEventLine(dst, ev) },
		"hostile line": func() { style.AppendEventLine(dst, host) },
		"alert line":   func() { style.AppendAlertLine(dst, testID, a) },
	} {
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkEventJSON(b *testing.B) {
	ev := shell()
	dst := make([]byte, 0, 64<<10)
	b.ReportAllocs()
	for b.Loop() {
		dst = AppendEventJSON(dst[:0], ev)
	}
	b.SetBytes(int64(len(dst)))
}

func BenchmarkEventLine(b *testing.B) {
	ev := shell()
	dst := make([]byte, 0, 64<<10)
	b.ReportAllocs()
	for b.Loop() {
		dst = Style{Color: true, Width: 160}.AppendEventLine(dst[:0], ev)
	}
}

// rawBytes undoes what a text key and its Raw key say.
func rawBytes(t *testing.T, obj map[string]any, key string) []byte {
	t.Helper()
	if raw, ok := obj[key+"Raw"]; ok {
		b, err := base64.StdEncoding.DecodeString(raw.(string))
		if err != nil {
			t.Fatalf("%sRaw: %v", key, err)
		}
		return b
	}
	return []byte(obj[key].(string))
}

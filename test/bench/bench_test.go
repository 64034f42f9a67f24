package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/testenv"
	"github.com/procession-dev/procession/test/bench/host"
)

const tag = "pb0123456789ab"

func TestScore(t *testing.T) {
	plain := &expectation{tag: tag, execs: 3, load: load{prog: "/x/tiny"}, container: "c1"}
	double := &expectation{tag: tag, execs: 4, load: load{prog: "/x/stage", next: "/x/tiny"}, container: "c1"}
	ev := func(exe, container string, args ...string) string {
		return fmt.Sprintf(`{"kind":"exec","process":{"exe":%q,"args":["%s"]},"container":{"id":%q}}`+"\n", exe, strings.Join(args, `","`), container)
	}
	tests := []struct {
		name  string
		score scorer
		e     *expectation
		in    string
		want  score
	}{
		{"json: nothing", scoreJSON, plain, "", score{}},
		{"json: garbage", scoreJSON, plain, "{" + tag + "-0;\n" + tag, score{}},
		{"json: a number that was not run", scoreJSON, plain, ev("/x/tiny", "c1", "/x/tiny", tag+"-3;"), score{}},
		{"json: a number in another form", scoreJSON, plain, ev("/x/tiny", "c1", "/x/tiny", tag+"-01;") + ev("/x/tiny", "c1", "/x/tiny", tag+"-1"), score{}},
		{"json: the same twice", scoreJSON, plain, strings.Repeat(ev("/x/tiny", "c1", "/x/tiny", tag+"-1;"), 2), score{1, 1, 1}},
		{"json: wrong exe, other container", scoreJSON, plain, ev("/x/other", "c2", "/x/tiny", tag+"-1;"), score{1, 0, 0}},
		{"json: one argument too many", scoreJSON, plain, ev("/x/tiny", "c1", "/x/tiny", tag+"-1;", "z"), score{}},
		{"json: second exec told for the first", scoreJSON, double,
			ev("/x/stage", "c1", "/x/tiny", tag+"-1;") + ev("/x/tiny", "c1", "/x/tiny", tag+"-1;"), score{1, 1, 1}},
		{"json: both execs", scoreJSON, double,
			ev("/x/stage", "c1", "/x/stage", tag+"-2;", "/x/tiny") + ev("/x/tiny", "c1", "/x/tiny", tag+"-3;"), score{2, 2, 2}},
		{"text: several, one twice, one foreign", scoreText, plain,
			"10:00 exec 7 tiny " + tag + "-0; \n" + tag + "-2; " + tag + "-2;\npbffffffffffff-1;\n", score{Argv: 2}},
		{"audit: records in any order", scoreAudit, plain,
			`type=1309 audit(1.2:7): argc=2 a0="/x/tiny" a1="` + tag + `-0;"` + "\n" +
				`type=1300 audit(1.2:7): arch=c000003e syscall=59 exe="/x/tiny" key=(null)` + "\n" +
				`type=1300 audit(1.2:8): arch=c000003e exe="/x/other"` + "\n" +
				`type=1309 audit(1.2:8): argc=2 a0="/x/tiny" a1="` + tag + `-1;"` + "\n" +
				`type=1309 audit(1.2:9): argc=2 a0="/x/tiny" a1="` + tag + `-1` + "\n", score{Argv: 2, Exe: 1}},
	}
	for _, tt := range tests {
		got, err := tt.score(strings.NewReader(tt.in), tt.e)
		if err != nil || got != tt.want {
			t.Errorf("%s: %+v, %v; want %+v", tt.name, got, err, tt.want)
		}
	}
}

// made is where built builds, once for all tests.
var made = struct {
	sync.Mutex
	dir   string
	loads []load
	err   error
}{}

func TestMain(m *testing.M) {
	code := m.Run()
	if made.dir != "" {
		os.RemoveAll(made.dir)
	}
	os.Exit(code)
}

// built makes the load programs.
func built(t *testing.T) (dir string, loads []load) {
	t.Helper()
	made.Lock()
	defer made.Unlock()
	if made.dir != "" {
		if made.err != nil {
			t.Fatal(made.err)
		}
		return made.dir, made.loads
	}
	root, err := host.ModuleRoot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		for _, c := range []string{"gcc", "busybox"} {
			if _, err := exec.LookPath(c); err != nil {
				testenv.Skip(t, err.Error())
			}
		}
	}
	if made.dir, err = os.MkdirTemp("", "bench"); err != nil {
		t.Fatal(err)
	}
	if made.loads, made.err = programs(t.Context(), io.Discard, root, made.dir); made.err != nil {
		t.Fatal(made.err)
	}
	return made.dir, made.loads
}

// TestLoads has each load say how often it ran, and a pod's cgroup take it.
func TestLoads(t *testing.T) {
	dir, loads := built(t)
	tmp := t.TempDir()
	for _, l := range loads {
		times := filepath.Join(tmp, "times")
		got, err := l.run(t.Context(), dir, 5, tag, nil, 0, times)
		if err != nil {
			t.Errorf("%s: %v", l.name, err)
			continue
		}
		at, err := readTimes(times)
		if err != nil || len(at) != 5 || got.Runs != 5 || got.Execs != 5*l.execs() || got.Failed != 0 || got.MinNs <= 0 || got.P50Ns < got.MinNs {
			t.Errorf("%s: %+v, %d times, %v", l.name, got, len(at), err)
		}
	}
	if _, err := (load{prog: "/no/such/program"}).run(t.Context(), dir, 1, tag, nil, 0, ""); err == nil {
		t.Error("a program that is not there gives no error")
	}
	if _, err := (load{prog: "/bin/false"}).run(t.Context(), dir, 1, tag, nil, 0, ""); err == nil {
		t.Error("a program that fails gives no error")
	}
	testenv.Root(t)
	pod, err := newPodCgroup()
	if err != nil {
		testenv.Skip(t, err.Error())
	}
	defer func() {
		pod.remove()
		for _, d := range pod.made {
			if _, err := os.Stat(d); err == nil && strings.HasSuffix(d, pod.ID) {
				t.Errorf("%s is still there", d)
			}
		}
	}()
	// What runs in the cgroup says so itself.
	here := filepath.Join(tmp, "here")
	script := "#!/bin/sh\ncat /proc/self/cgroup > " + here + "\n"
	if err := os.WriteFile(filepath.Join(tmp, "say"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := (load{prog: filepath.Join(tmp, "say")}).run(t.Context(), dir, 1, tag, pod.dirs, 0, ""); err != nil {
		t.Fatal(err)
	}
	said, err := os.ReadFile(here)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(said)) {
		if !strings.HasSuffix(strings.TrimSpace(line), pod.ID) {
			t.Errorf("not in the pod's cgroup: %s", line)
		}
	}
}

// TestCPUTime checks the clock against what getrusage says of the same work.
func TestCPUTime(t *testing.T) {
	dir, _ := built(t)
	tmp := t.TempDir()
	d, err := startDaemon([]string{filepath.Join(dir, "burn"), "30"}, nil, filepath.Join(tmp, "o"), filepath.Join(tmp, "e"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.stop()
	// The burner's own work is none, its children's is all there is: the
	// clock must not be that of a group or a session.
	if err := waitFor(t.Context(), 10*time.Second, time.Millisecond, func() (bool, error) { return contains(d.out, "busy"), d.ended() }); err != nil {
		t.Fatal(err)
	}
	self0, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	var a, b unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &a)
	for x, end := 0, time.Now().Add(200*time.Millisecond); time.Now().Before(end); x++ {
		_ = x
	}
	unix.Getrusage(unix.RUSAGE_SELF, &b)
	self1, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	used := time.Duration(b.Utime.Nano() + b.Stime.Nano() - a.Utime.Nano() - a.Stime.Nano())
	if diff := self1 - self0 - used; diff < -30*time.Millisecond || diff > 30*time.Millisecond {
		t.Errorf("the clock says %v, getrusage %v", self1-self0, used)
	}
	if got, err := cpuTime(d.pid()); err != nil || got > 5*time.Second {
		t.Errorf("CPU time of the burner's parent: %v, %v; it only waits", got, err)
	}
	if _, err := cpuTime(1 << 22); err == nil {
		t.Error("a pid that cannot be gives no error")
	}
}

func TestDaemonThatEnds(t *testing.T) {
	dir := t.TempDir()
	d, err := startDaemon([]string{"/bin/sh", "-c", "echo no luck >&2; exit 3"}, nil, filepath.Join(dir, "o"), filepath.Join(dir, "e"))
	if err != nil {
		t.Fatal(err)
	}
	<-d.done
	if err := d.ended(); err == nil || !strings.Contains(err.Error(), "no luck") || !strings.Contains(err.Error(), "3") {
		t.Errorf("ended() = %v, want exit status and what it said", err)
	}
	d.stop()
	if _, err := startDaemon([]string{"/no/such/program"}, nil, filepath.Join(dir, "o"), filepath.Join(dir, "e")); err == nil {
		t.Error("a program that is not there gives no error")
	}
}

// TestAudit runs the bare audit client against the kernel, as a program of its
// own, and has it tell every exec of a load.
func TestAudit(t *testing.T) {
	testenv.Root(t)
	dir, loads := built(t)
	tmp := t.TempDir()
	self := filepath.Join(tmp, "bench")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", self, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	o := observer{name: "audit", command: func(*bench) ([]string, error) { return []string{self, auditWord}, nil }}
	b := &bench{work: tmp, programs: dir}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d, err := b.begin(ctx, &o)
	if err != nil {
		testenv.Skip(t, "no audit here, or another has it: "+err.Error())
	}
	defer d.stop()
	e := &expectation{tag: newTag(), execs: 100, load: loads[0]}
	if _, err := loads[0].run(ctx, dir, 100, e.tag, nil, 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := b.settle(ctx, d, &observer{score: scoreAudit}, e); err != nil {
		t.Fatal(err)
	}
	d.stop()
	got, err := scoreFile(d.out, scoreAudit, e)
	if want := (score{Argv: 100, Exe: 100}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	// It must leave the kernel as it was: a second one finds no daemon.
	d, err = b.begin(ctx, &o)
	if err != nil {
		t.Fatalf("the first one left something: %v", err)
	}
	d.stop()
}

func TestBPFRunTimes(t *testing.T) {
	testenv.Root(t)
	old, err := os.ReadFile(bpfStats)
	if err != nil {
		testenv.Skip(t, err.Error())
	}
	restore, err := enableBPFStats()
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(bpfStats); strings.TrimSpace(string(got)) != "1" {
		t.Errorf("%s = %q while enabled", bpfStats, got)
	}
	before := bpfRunTimes()
	// return 0, as the smallest program there is: r0 = 0; exit.
	insns := [2]uint64{0xb7, 0x95}
	license := [4]byte{'G', 'P', 'L'}
	fd, err := loadSocketFilter(insns[:], license[:])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	if err := unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_ATTACH_BPF, fd); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		unix.Write(pair[1], []byte("x")) // dropped by the filter
	}
	ran := false
	for id, ns := range bpfRunTimes() {
		if _, is := before[id]; !is && ns > 0 && ns < uint64(time.Second) {
			ran = true
		}
	}
	if !ran {
		t.Error("a program that ran 100 times has no run time")
	}
	restore()
	if got, _ := os.ReadFile(bpfStats); string(got) != string(old) {
		t.Errorf("%s = %q afterwards, was %q", bpfStats, got, old)
	}
}

func loadSocketFilter(insns []uint64, license []byte) (int, error) {
	// union bpf_attr of BPF_PROG_LOAD: type, count, instructions, license.
	attr := struct {
		typ, count     uint32
		insns, license unsafe.Pointer
		rest           [128]byte
	}{typ: unix.BPF_PROG_TYPE_SOCKET_FILTER, count: uint32(len(insns)), insns: unsafe.Pointer(&insns[0]), license: unsafe.Pointer(&license[0])}
	fd := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), 48)
	if fd < 0 {
		return 0, errors.New("the program does not load")
	}
	return fd, nil
}

func TestFollower(t *testing.T) {
	file := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(file, []byte(tag+"-9;\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := followFile(file, tag)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now().UnixNano()
	fmt.Fprintf(f, "a %s-0; b\npart %s-", tag, tag)
	fmt.Fprintf(f, "1;\npbffffffffffff-5;\n%s-2; without end", tag)
	f.Close()
	w.close()
	if w.err != nil || len(w.seen) != 2 || w.seen[tag+"-0;"] < start || w.seen[tag+"-1;"] < start {
		t.Errorf("seen %v, %v; want -0; and -1; after %d", w.seen, w.err, start)
	}
	l, err := latencies(&expectation{tag: tag, execs: 2}, []int64{start - 1000, start - 2000}, map[string]int64{tag + "-0;": start, tag + "-1;": start})
	if err != nil || l.Execs != 2 || l.P50Ns != 2000 {
		t.Errorf("latencies: %+v, %v", l, err)
	}
}

func TestReport(t *testing.T) {
	rep := &Report{Date: "2026-01-02", Machine: []string{"m"}, Cannot: map[string]string{"sick": "a | b"},
		Observers: []ObserverInfo{{Name: "none"}, {Name: "x", Argv: true}},
		Loads:     []LoadInfo{{Name: "tiny"}}}
	for i, p50 := range []int64{100, 200, 400} {
		base := Run{Repeat: i, Observer: "none", Load: "tiny", Timing: timing{Execs: 1000, P50Ns: 100_000}}
		x := Run{Repeat: i, Observer: "x", Load: "tiny", Timing: timing{Execs: 1000, P50Ns: p50 * 1000}, Score: score{Argv: 990 + i*5}, CPUNs: 5e6, BPFNs: 2e6}
		rep.Runs = append(rep.Runs, base, x)
	}
	rep.Runs = append(rep.Runs, Run{Repeat: 3, Observer: "x", Load: "tiny", Error: "gone"})
	if err := rep.checkComplete("x"); err == nil || !strings.Contains(err.Error(), "990 of 1000") {
		t.Errorf("-complete x: %v, want an error that says 990 of 1000", err)
	}
	if err := rep.checkComplete("none"); err == nil {
		t.Error("-complete none: no error, although it tells nothing")
	}
	if err := rep.checkComplete("y"); err == nil {
		t.Error("-complete y: no error, although there is no y")
	}
	got := rep.row(rep.Observers[1], "tiny", false)
	if d := cmp.Diff([]float64{1, 2, 4}, got.ratio); d != "" {
		t.Errorf("ratio (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]float64{99, 99.5, 100}, got.argv); d != "" {
		t.Errorf("argv (-want +got):\n%s", d)
	}
	var b strings.Builder
	if err := rep.writeMarkdown(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`a \| b`, "| x | 99.5 (99.0-100.0) | - | - | 5.0 | - | 2.0 | 200 (100-400) | 2.00 (1.00-4.00) |",
		"ms per 1,000 execs\n\n| observer | tiny |\n|---|---|\n| x | 7.0 |\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "every CPU busy") {
		t.Error("a table for a condition that was not run")
	}
	rep.Runs = append(rep.Runs, Run{Observer: "x", Load: "tiny", Saturated: true, Timing: timing{Execs: 250}, Score: score{Argv: 200}})
	b.Reset()
	if err := rep.writeMarkdown(&b); err != nil || !strings.Contains(b.String(), "right arguments, %\n\n| observer | tiny |\n|---|---|\n| x | 80.0 |\n") {
		t.Errorf("no share with every CPU busy (%v) in:\n%s", err, b.String())
	}
}

func TestBadCommandLine(t *testing.T) {
	for _, args := range []string{"-repeats 0", "-scale 0", "-scale 1000", "stray", "-no-such-flag"} {
		if _, err := parse(strings.Fields(args), io.Discard, io.Discard); err == nil {
			t.Errorf("parse(%q): no error", args)
		}
	}
	if _, err := choose("-loads", "tiny,nope", []string{"tiny"}, func(s string) string { return s }); err == nil || !strings.Contains(err.Error(), "nope") {
		t.Errorf("choose: %v, want an error that names nope", err)
	}
	if os.Geteuid() == 0 {
		return
	}
	if err := run(t.Context(), &options{}, io.Discard, io.Discard); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("not root: %v", err)
	}
}

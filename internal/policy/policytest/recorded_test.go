package policytest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/present"
)

// A prober reads every variable of the language, whatever there are.
type prober struct {
	act   *celenv.Activation
	exprs []*celenv.Expr
}

func newProber(t *testing.T) *prober {
	t.Helper()
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Env().NewScope(nil)
	if err != nil {
		t.Fatal(err)
	}
	p := &prober{act: c.Env().NewActivation("")}
	for _, v := range c.Env().Variables() {
		test := map[string]string{"string": " == ''", "int": " == 0", "bool": "", "timestamp": " == " + v.Name}[v.Type]
		if strings.HasPrefix(v.Type, "list(") || strings.HasPrefix(v.Type, "map(") {
			test = ".size() == 0"
		}
		x, err := s.Condition(v.Name + test)
		if err != nil {
			t.Fatalf("%s (%s): %v", v.Name, v.Type, err)
		}
		p.exprs = append(p.exprs, x)
	}
	return p
}

const gone = "(missing)"

func (p *prober) values(ev *event.Event) map[string]string {
	p.act.Reset(ev)
	out := map[string]string{}
	for _, x := range p.exprs {
		for _, v := range x.Values(p.act, 1<<20) {
			if out[v.Name] = v.Text; v.Missing {
				out[v.Name] = gone
			}
		}
	}
	return out
}

// brief are facts that an event's JSON does not tell of ancestors.
var brief = map[string]bool{"exeSetuid": true, "isInit": true, "innerPid": true}

func toldOfAncestors(name string) bool {
	relation, fact, _ := strings.Cut(name, ".")
	return relation != "parent" && relation != "grandparent" || !brief[fact]
}

// What the agent prints of an event is enough to judge it again: every
// variable has the value it had when it happened.
func TestRecordedRoundTrip(t *testing.T) {
	p := newProber(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	b := alert.Builder{Wall: func(boot uint64) time.Time { return epoch.Add(time.Duration(boot)) }}
	for n := range 2000 {
		ev := randomEvent(rnd)
		line := present.AppendEventJSON(nil, b.Event(ev, alert.MaxAncestors))
		got, err := ParseEvents(line)
		if err != nil {
			t.Fatalf("event %d: %v\n%s", n, err, line)
		}
		want, have := p.values(ev), p.values(got[0])
		for name, v := range want {
			if have[name] != v && (toldOfAncestors(name) || have[name] != gone) && name != "ancestors" {
				t.Errorf("event %d: %s was %q and is %q\n%s", n, name, v, have[name], line)
			}
		}
		if t.Failed() {
			return
		}
	}
}

var texts = []string{"", "sh", "/usr/bin/dash", "/tmp/a b", "x\xffy\xfe", "\u202egpj.exe", "😀", "[kworker/0:0]", "a\nb\x1b[2J", `back\slash "quoted"`}

func randomProcess(r *rand.Rand, depth int) *event.Process {
	text := func() string { return texts[r.IntN(len(texts))] }
	p := &event.Process{
		PID: r.Int32N(1<<22) + 1, Start: r.Uint64(), PPID: r.Int32N(5), InnerPID: r.Int32N(3) + 1, SID: r.Int32N(9), TTY: r.Int32N(2),
		LoginUID: r.Uint32(), NoNewPrivs: r.IntN(2) == 0, CapPermitted: r.Uint64(), CapEffective: r.Uint64(),
		IDs: event.IDs{UID: r.Uint32N(3), GID: r.Uint32N(3), SUID: r.Uint32N(3), EUID: r.Uint32(), EGID: r.Uint32()},
		NS:  event.NS{PID: 1, Mnt: r.Uint32(), User: 3, Net: 4}, ExeFile: event.ExeFile{Mode: uint16(r.Uint32())},
		Marks: event.Marks(r.Uint32N(uint32(event.MarkCwdCut) << 1)),
		Name:  text(), Exe: text(), File: text(), Cwd: text(), Cgroup: text(),
	}
	if !p.Marks.Has(event.MarkUpperKnown) {
		p.Marks &^= event.MarkUpper
	}
	for range r.IntN(4) {
		p.Cmdline += text() + "\x00"
	}
	if n := len(p.Cmdline); n > 1 && r.IntN(4) == 0 {
		p.Cmdline = p.Cmdline[:n-1]
	}
	p.CmdlineLen = uint32(len(p.Cmdline)) + r.Uint32N(2)*40
	for f := range p.Sources {
		p.Sources[f] = event.Source(r.IntN(5)) // SourceNone among them
	}
	if depth > 0 {
		p.Parent = randomProcess(r, depth-1)
		p.PPID, p.Sources[event.FieldParent] = p.Parent.PID, event.SourceRecord
	}
	return p
}

func randomEvent(r *rand.Rand) *event.Event {
	kinds := event.AllKinds()
	ev := &event.Event{
		Kind: kinds[r.IntN(len(kinds))], Time: epoch.Add(time.Duration(r.Int64N(1 << 50))), Stamp: r.Uint64N(1<<60) + 1,
		Process: randomProcess(r, r.IntN(4)), Synthetic: r.IntN(8) == 0,
	}
	switch ev.Kind {
	case event.PtraceAttach, event.PtraceDetach:
		ev.Target = randomProcess(r, 0)
	case event.UIDChange, event.GIDChange:
		ev.Before, ev.HasBefore = event.IDs{UID: 1000, EUID: r.Uint32(), SUID: r.Uint32()}, r.IntN(2) == 0
		ev.Cause = event.Cause(r.IntN(int(event.CauseUnexplained) + 1))
		if ev.Kind == event.GIDChange {
			ev.Cause = event.CauseUnknown
		} else if r.IntN(2) == 0 && ev.Process.Has(event.FieldIDs) { // the kernel's message has them always
			changedBy(ev, texts[r.IntN(len(texts))])
		}
	case event.CommChange:
		ev.PrevName, ev.HasPrev = texts[r.IntN(len(texts))], r.IntN(2) == 0
	case event.Exit:
		ev.Status, ev.Duration = r.Uint32N(1<<8)<<8, time.Duration(r.Int64N(1<<50))
		if r.IntN(2) == 0 {
			ev.Status = r.Uint32N(64) + 1 | r.Uint32N(2)<<7
		}
	}
	ev.Process.Workload = randomWorkload(r)
	place(r, ev.Process)
	return ev
}

func randomWorkload(r *rand.Rand) *event.Workload {
	w := &event.Workload{Place: event.Place(r.IntN(3))}
	if w.Place != event.PlaceContainer {
		return w
	}
	w.ContainerID, w.Runtime, w.Sandbox = "3f2a", "containerd", r.IntN(4) == 0
	if r.IntN(2) == 0 {
		w.PodUID = "1fc8"
	}
	if w.PodUID != "" && r.IntN(2) == 0 {
		w.Pod = &event.Pod{UID: w.PodUID, Namespace: "shop", Name: "web-0", Labels: map[string]string{"app": "wéb"}, ServiceAccount: "sa",
			OwnerKind: "Job", OwnerName: "web", Annotations: map[string]string{"a/b": "c"}, HostPID: r.IntN(2) == 0, HostNetwork: r.IntN(2) == 0, HostIPC: r.IntN(2) == 0}
		if r.IntN(2) == 0 && !w.Sandbox {
			w.ContainerName, w.Image = "web", "nginx:1.29"
			w.Container = &event.Container{Name: "web", Image: "nginx:1.29", Kind: event.ContainerKind(r.IntN(4)), ImageDigest: "sha256:1", Privileged: r.IntN(2) == 0}
		}
	}
	return w
}

// place says where a process and its ancestors run, and how they came there.
func place(r *rand.Rand, p *event.Process) {
	in := p.Workload.Place == event.PlaceContainer
	for a := p; a != nil; a = a.Parent {
		switch {
		case in:
			a.Workload, a.Origin = p.Workload, event.OriginChild
			if r.IntN(3) == 0 {
				a.Origin = event.OriginSetup + event.Origin(r.IntN(6))
				in = a.Origin == event.OriginChild
			}
		case p.Workload.Place != event.PlaceUnknown && a != p:
			a.Workload = &event.Workload{Place: event.PlaceHost}
		}
	}
}

// The forms a file of events may have all say the same.
func TestParseEventsForms(t *testing.T) {
	const line = `{"kind":"Exec","process":{"pid":7,"name":"a😀"},"place":"host","sources":{"name":"record"},"stamp":"5"}`
	for name, data := range map[string]string{
		"as printed":          line + "\n" + line + "\n",
		"between others":      `{"kind":"Loss","from":"1"}` + line + `{"kind":"Coverage"}{"kind":"Amendment"}` + line,
		"list":                "[" + line + "," + line + "]",
		"list in YAML":        "- " + line + "\n- " + line + "\n",
		"test file":           "policies: [p.yaml]\ncases:\n- events: [" + line + "]\n- events:\n  - " + line + "\n",
		"pretty":              strings.ReplaceAll(line, ",", ",\n  ") + line,
		"flow YAML, not JSON": "[{kind: Exec, process: {pid: 7, name: a😀}}, {kind: Exec, process: {pid: 7, name: a😀}}]",
	} {
		events, err := ParseEvents([]byte(data))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, ev := range events {
			got = append(got, fmt.Sprintf("%s %d %s", ev.Kind, ev.Process.PID, ev.Process.Name))
		}
		if d := cmp.Diff([]string{"Exec 7 a😀", "Exec 7 a😀"}, got); d != "" {
			t.Errorf("%s: -want +got:\n%s", name, d)
		}
	}
}

// A wrong event is refused by the name of what is wrong with it.
func TestParseEventsRefused(t *testing.T) {
	const rest = `,"place":"host","stamp":"1"}`
	for data, want := range map[string]string{
		"":     "there is no event in the file",
		"# x":  "there is no event in the file",
		"[]":   "there is no event in the file",
		"a: [": "this is neither JSON nor YAML",
		"7":    "event 1: ",
		`{"kind":"Exec","process":{"pid":1}` + rest + "}":                                     "after event 1: ",
		`{"kind":"Exce","process":{"pid":1}` + rest:                                           `event 1: kind: there is no kind "Exce"`,
		`{"kind":"Loss","from":"1"` + rest:                                                    "there is no event in the file",
		`{"kind":"Exec"` + rest:                                                               "event 1: process: is missing",
		`{"kind":"Exec","process":{"pid":"1"}` + rest:                                         "cannot unmarshal string",
		`{"kind":"Exec","process":{"start":"x"}` + rest:                                       `process: start: "x" is no number`,
		`{"kind":"Exec","process":{"exe":"a","exeRaw":"%"}` + rest:                            "process: exeRaw: ",
		`{"kind":"Exec","process":{"args":["a"],"argsRaw":"%"}` + rest:                        "process: argsRaw: ",
		`{"kind":"Exec","process":{"capabilities":["CAP_X"]}` + rest:                          `capabilities: there is no capability "CAP_X"`,
		`{"kind":"Exec","process":{"exeFile":{"mode":"9"}}` + rest:                            `exeFile.mode: "9" is no octal number`,
		`{"kind":"Exec","process":{},"target":{"start":"-"}` + rest:                           `target: start: "-" is no number`,
		`{"kind":"Exec","process":{"ancestors":[{"start":"-"}]}` + rest:                       `process.ancestors[0]: start: "-" is no number`,
		`{"kind":"Exit","process":{},"exit":{"signal":"SIGFOO"}` + rest:                       `exit.signal: there is no signal "SIGFOO"`,
		`{"kind":"Exit","process":{},"exit":{"code":256}` + rest:                              "exit.code: 256 is not between",
		`{"kind":"Exit","process":{},"exit":{"durationSeconds":1e400}` + rest:                 "exit.durationSeconds: ",
		`{"kind":"Exec","process":{},"place":"moon","stamp":"1"}`:                             `place: "moon" is none of`,
		`{"kind":"Exec","process":{},"place":"host","stamp":"x"}`:                             `stamp: "x" is no number`,
		`{"kind":"Exec","process":{},"place":"host","stamp":"1","at":"soon"}`:                 `at: "soon" is no length of time`,
		"[" + strings.Repeat(`{"a":1},`, maxEvents) + `{"a":1}]`:                              "there are more than 10000 events",
		`{"kind":"Exec","process":{"ancestors":[` + strings.Repeat("{},", 64) + `{}]}` + rest: "process.ancestors: there are 65",
		strings.Repeat(" ", MaxFileBytes+1):                                                   "at most 8388608 are allowed",
	} {
		if _, err := ParseEvents([]byte(data)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100q: got %v, want %q in it", data, err, want)
		}
	}
}

// Whatever a file of events holds, it is read or refused; and what was read
// is a process that every variable can be asked about.
func FuzzParseEvents(f *testing.F) {
	seeds, err := filepath.Glob("../../../deploy/helm/procession/policies/tests/*.test.yaml")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, s := range seeds {
		data, err := os.ReadFile(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	b := alert.Builder{}
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		f.Add(present.AppendEventJSON(nil, b.Event(randomEvent(rnd), 3)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		events, err := ParseEvents(data)
		if err != nil {
			return
		}
		for _, ev := range events {
			if ev == nil || ev.Process == nil || ev.Process.Workload == nil {
				t.Fatalf("half an event: %+v", ev)
			}
			// What is printed of it is read again, and says the same.
			line := present.AppendEventJSON(nil, b.Event(ev, alert.MaxAncestors))
			if _, err := ParseEvents(line); err != nil && ev.Stamp != 0 {
				t.Fatalf("its own print is refused: %v\n%s", err, line)
			}
		}
	})
}

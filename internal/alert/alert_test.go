package alert

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
)

// full is a process of which everything is known.
func full(pid int32, parent *event.Process) *event.Process {
	p := &event.Process{
		PID: pid, Start: 1e9, StartExact: true, PPID: 1, Parent: parent, Name: "sh", Exe: "/bin/dash", File: "/bin/sh",
		Cmdline: "sh\x00-c\x00true\x00", CmdlineLen: 11, Cwd: "/", Cgroup: "/kubepods/x",
		IDs: event.IDs{UID: 1, GID: 2, SUID: 3, SGID: 4, EUID: 5, EGID: 6, FSUID: 7, FSGID: 8},
	}
	for f := range event.NumFields {
		p.Sources[f] = event.SourceRecord
	}
	return p
}

func rule() *policy.Match {
	return &policy.Match{
		Rule: &policy.Rule{ID: "ClusterDetectionPolicy//p/r", Title: "T", Digest: "d", Spec: &v1alpha1.Rule{
			Severity: v1alpha1.SeverityHigh, Tags: []string{"a"}, Mitre: []v1alpha1.Mitre{{Technique: "T1059"}}}},
		Message:  "m",
		Evidence: []policy.Evidence{{Name: "process.exe", Text: "/bin/dash"}, {Name: "process.cwd", Missing: true}},
	}
}

func TestMissingIsNotEmpty(t *testing.T) {
	var b Builder
	unknown := &event.Process{PID: 7}
	known := full(7, nil)
	known.Exe, known.Cwd, known.Cmdline, known.CmdlineLen = "", "", "", 0

	m := b.Event(&event.Event{Kind: event.Exec, Process: unknown}, 0).Process
	if m.Exe != nil || m.Cwd != nil || m.Cmdline != nil || m.Ids != nil || m.Ppid != nil || m.CapEffective != nil {
		t.Errorf("unknown facts are there: %v", m)
	}
	m = b.Event(&event.Event{Kind: event.Exec, Process: known}, 0).Process
	if m.Exe == nil || m.Cwd == nil || m.Cmdline == nil || m.Ids == nil || m.Ppid == nil || m.CapEffective == nil {
		t.Errorf("known and empty facts are missing: %v", m)
	}
}

func TestAlertSaysWhatTheRuleSays(t *testing.T) {
	b := Builder{Wall: func(boot uint64) time.Time { return time.Unix(0, int64(boot)) }}
	root := full(1, nil)
	ev := &event.Event{Kind: event.UIDChange, Time: time.Unix(5, 6), Process: full(9, root), HasBefore: true, Before: event.IDs{UID: 1000}}
	ev.Process.Workload = &event.Workload{Place: event.PlaceContainer, ContainerID: "c", Runtime: "containerd", PodUID: "u", Reason: "pod-not-listed"}
	a := b.Alert(ev, rule())
	want := &pb.Alert{
		Severity: pb.Severity_SEVERITY_HIGH, Rule: "ClusterDetectionPolicy//p/r", Title: "T", Message: "m", Tags: []string{"a"},
		PolicyDigest: "d", Mitre: []*pb.Mitre{{Technique: "T1059"}},
		Evidence: []*pb.Evidence{{Field: "process.exe", Value: "/bin/dash"}, {Field: "process.cwd", Missing: true}},
	}
	got := proto.Clone(a).(*pb.Alert)
	got.Event = nil
	if !proto.Equal(got, want) {
		t.Errorf("alert\n got %v\nwant %v", got, want)
	}
	e := a.Event
	switch {
	case e.Place != "container" || e.PlaceReason != "pod-not-listed" || e.Container.Id != "c" || e.Pod.Uid != "u":
		t.Errorf("workload: %v", e)
	case e.Change.From.Uid != 1000 || e.Change.To.Uid != 1 || e.Change.To.Euid != 5:
		t.Errorf("change: %v", e.Change)
	case len(e.Process.Ancestors) != 1 || e.Process.Ancestors[0].Pid != 1:
		t.Errorf("ancestors: %v", e.Process.Ancestors)
	case !e.Process.StartTime.AsTime().Equal(time.Unix(1, 0)):
		t.Errorf("start time: %v", e.Process.StartTime)
	}
}

// Whoever builds the longest lineage of the longest names must not be able to
// make an alert that is too large to be delivered.
func TestNoProcessCanMakeAnAlertTooLarge(t *testing.T) {
	long := strings.Repeat("x", 300<<10)
	fat := func(pid int32, parent *event.Process) *event.Process {
		p := full(pid, parent)
		p.Name, p.Exe, p.File, p.Cwd, p.Cgroup, p.Cmdline, p.CmdlineLen = long, long, long, long, long, long, uint32(len(long))
		return p
	}
	var p *event.Process
	for i := range int32(MaxAncestors + 10) {
		p = fat(i+1, p)
	}
	m := rule()
	m.Message = strings.Repeat("m", policy.MaxMessage)
	m.Evidence = nil
	for range 100 {
		m.Evidence = append(m.Evidence, policy.Evidence{Name: "process.cmdline", Text: long[:policy.MaxEvidence]})
	}
	var b Builder
	a := b.Alert(&event.Event{Kind: event.PtraceAttach, Process: p, Target: fat(500, nil)}, m)
	out, err := proto.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	if len(out) > MaxBytes {
		t.Errorf("the largest alert has %d bytes, more than %d", len(out), MaxBytes)
	}
	if !a.Event.Process.AncestorsCut || len(a.Event.Process.Ancestors) != MaxAncestors {
		t.Errorf("%d ancestors, cut %v", len(a.Event.Process.Ancestors), a.Event.Process.AncestorsCut)
	}
	if anc := a.Event.Process.Ancestors[0]; anc.CmdlineLen != uint32(len(long)) || !strings.Contains(strings.Join(anc.Marks, " "), "exeCut") {
		t.Errorf("a cut ancestor does not say so: length %d, marks %v", anc.CmdlineLen, anc.Marks)
	}
}

func TestExitTellsCodeAndSignal(t *testing.T) {
	var b Builder
	for status, want := range map[uint32]*pb.Exit{
		0:        {},
		3 << 8:   {Code: 3},
		9:        {Signal: 9},
		11 | 128: {Signal: 11, CoreDumped: true},
	} {
		got := b.Event(&event.Event{Kind: event.Exit, Process: &event.Process{PID: 1}, Status: status}, 0).Exit
		if !proto.Equal(got, want) {
			t.Errorf("status %#x: %s", status, cmp.Diff(want.String(), got.String()))
		}
	}
}

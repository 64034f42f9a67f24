package enrich

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/proctable"
)

// cmd is a command line as the kernel has it.
func cmd(args ...string) string { return strings.Join(args, "\x00") + "\x00" }

// proc1 is a process of the host, as the table has it after its exec.
func proc1(parent *event.Process, args ...string) *event.Process {
	p := process(event.SourceRecord, "/system.slice/containerd.service")
	p.Parent, p.Cmdline, p.CmdlineLen, p.Execs = parent, cmd(args...), uint32(len(cmd(args...))), 1
	p.NS.PID = initPIDNS
	for _, f := range []event.Field{event.FieldArgs, event.FieldNS, event.FieldExe} {
		p.Sources[f] = event.SourceRecord
	}
	return p
}

// inside is a process in a container.
func inside(parent *event.Process, cgroup string, ns uint32, inner int32, args ...string) *event.Process {
	p := proc1(parent, args...)
	p.Cgroup, p.NS.PID, p.InnerPID = cgroup, ns, inner
	return p
}

// forked is a process that ran no program of its own yet.
func forked(parent *event.Process, cgroup string) *event.Process {
	p := *parent
	p.Parent, p.Execs, p.Cgroup = parent, 0, cgroup
	p.Sources[event.FieldCgroup] = event.SourceLineage
	p.Workload = nil
	return &p
}

// runc is a shim's runc, told to do something.
func runc(namespace, shimFor, verb string) *event.Process {
	shim := proc1(proc1(nil, "/sbin/init"), "/usr/bin/containerd-shim-runc-v2", "-namespace", namespace, "-id", shimFor, "-address", "/run/x.sock")
	return proc1(shim, "runc", "--root", "/run/containerd/runc/"+namespace, "--log-format", "json", verb, "--pid-file", "/run/p", webID)
}

const ctrNS = 4026532200

func withContainer(c *event.Container) *fakePods {
	return &fakePods{answers: true, pods: map[string]*event.Pod{podUID: {UID: podUID, Namespace: "shop", Name: "web"}},
		containers: map[string]fakeRun{webID: {podUID, c}}}
}

func TestOrigin(t *testing.T) {
	web := &event.Container{Name: "web",
		Probes: [][]string{{"/bin/check", "--fast"}, {"/opt/check.sh", "a"}},
		Hooks:  [][]string{{"/bin/stop"}}}
	exec := func() *event.Process { return runc("k8s.io", nodeID, "exec") }
	for _, c := range []struct {
		name string
		pods Pods
		p    *event.Process
		want event.Origin
	}{
		{"on the host", nil, proc1(nil, "sh"), event.OriginUnknown},
		{"first in its own pid namespace", nil, inside(runc("k8s.io", nodeID, "create"), webPod, ctrNS, 1, "nginx"), event.OriginEntry},
		{"first in the host's pid namespace", nil, inside(runc("k8s.io", nodeID, "create"), webPod, initPIDNS, 4711, "nginx"), event.OriginEntry},
		{"first in a pid namespace shared with the pod", nil, inside(runc("k8s.io", nodeID, "create"), webPod, ctrNS, 7, "nginx"), event.OriginEntry},
		{"pause", nil, inside(runc("k8s.io", webID, "create"), webPod, ctrNS, 1, "/pause"), event.OriginSetup},
		{"a shim for each container is no sandbox", nil, inside(runc("moby", webID, "create"), webPod, ctrNS, 1, "nginx"), event.OriginEntry},
		{"exec, container not listed yet", nil, inside(exec(), webPod, ctrNS, 9, "sh"), event.OriginEntered},
		{"exec, no pod", nil, inside(exec(), "/docker/"+webID, ctrNS, 9, "sh"), event.OriginSession},
		{"exec", withContainer(web), inside(exec(), webPod, ctrNS, 9, "sh"), event.OriginSession},
		{"exec into the host's pid namespace", withContainer(web), inside(exec(), webPod, initPIDNS, 99, "sh"), event.OriginSession},
		{"probe", withContainer(web), inside(exec(), webPod, ctrNS, 9, "/bin/check", "--fast"), event.OriginProbe},
		{"probe that is a script", withContainer(web), inside(exec(), webPod, ctrNS, 9, "/bin/sh", "/opt/check.sh", "a"), event.OriginProbe},
		{"probe that is a script with a flag", withContainer(web), inside(exec(), webPod, ctrNS, 9, "/bin/sh", "-e", "/opt/check.sh", "a"), event.OriginProbe},
		{"hook", withContainer(web), inside(exec(), webPod, ctrNS, 9, "/bin/stop"), event.OriginHook},
		{"nearly a probe", withContainer(web), inside(exec(), webPod, ctrNS, 9, "/bin/check", "--fast", "x"), event.OriginSession},
		{"probe's words as one argument", withContainer(web), inside(exec(), webPod, ctrNS, 9, "/bin/check --fast"), event.OriginSession},
		{"nsenter that joins the cgroup", withContainer(web), inside(proc1(nil, "nsenter", "-t", "1", "sh"), webPod, ctrNS, 9, "sh"), event.OriginSession},
		{"adopted by the shim, own pid namespace", withContainer(web), inside(runc("k8s.io", nodeID, "exec").Parent, webPod, ctrNS, 9, "sh"), event.OriginSession},
		{"adopted by the shim, shared pid namespace", withContainer(web), inside(runc("k8s.io", nodeID, "exec").Parent, webPod, initPIDNS, 99, "sh"), event.OriginUnknown},
		{"nobody knows who made it", nil, inside(nil, webPod, initPIDNS, 99, "sh"), event.OriginUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope"), Pods: c.pods})
			e.Event(&event.Event{Kind: event.Exec, Process: c.p})
			if c.p.Origin != c.want {
				t.Errorf("got %v, want %v", c.p.Origin, c.want)
			}
			// What it makes is the container's own, whatever it is called.
			child := forked(c.p, c.p.Cgroup)
			e.Event(&event.Event{Kind: event.Fork, Process: child})
			child.Cmdline, child.Execs = cmd("/bin/check", "--fast"), 1
			e.Event(&event.Event{Kind: event.Exec, Process: child})
			want := event.OriginChild
			if c.want == event.OriginUnknown && c.p.Workload.Place == event.PlaceHost {
				want = event.OriginUnknown
			}
			if c.want != event.OriginSetup && child.Origin != want {
				t.Errorf("its child: got %v, want %v", child.Origin, want)
			}
		})
	}
}

// The steps of runc on its way into a container, as the kernel tells them.
func TestRuncStepByStep(t *testing.T) {
	e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope")})
	outer := runc("k8s.io", nodeID, "exec")
	init0 := forked(outer, outer.Cgroup)
	e.Event(&event.Event{Kind: event.Fork, Process: init0})
	init0.Cmdline, init0.Execs, init0.Marks = cmd("runc", "init"), 1, event.MarkMemfd|event.MarkDeleted
	e.Event(&event.Event{Kind: event.Exec, Process: init0})
	if init0.Origin != event.OriginUnknown {
		t.Errorf("runc init on the host: %v", init0.Origin)
	}
	init0.Cgroup, init0.Workload = webPod, nil // moved into the container
	child := forked(init0, webPod)
	e.Event(&event.Event{Kind: event.Fork, Process: child})
	payload := forked(child, webPod)
	e.Event(&event.Event{Kind: event.Fork, Process: payload})
	if payload.Origin != event.OriginSetup && payload.Origin != event.OriginUnknown {
		t.Errorf("before the program: %v", payload.Origin)
	}
	payload.Cmdline, payload.Execs, payload.Marks = cmd("sh"), 1, 0
	payload.NS.PID, payload.InnerPID = ctrNS, 12
	e.Event(&event.Event{Kind: event.Exec, Process: payload})
	if payload.Origin != event.OriginEntered {
		t.Errorf("the program: got %v, want %v", payload.Origin, event.OriginEntered)
	}
	next := forked(payload, webPod)
	e.Event(&event.Event{Kind: event.Fork, Process: next})
	if next.Origin != event.OriginChild {
		t.Errorf("its child: %v", next.Origin)
	}
}

// The runtime's first step may be moved into the container before its exec is
// told, and has the name by which the runtime was called.
func TestSetupInTheContainer(t *testing.T) {
	for _, tt := range []struct {
		name  string
		args  []string
		marks event.Marks
		want  event.Origin
	}{
		{"by its name", []string{"runc", "init"}, event.MarkMemfd, event.OriginSetup},
		{"by its path", []string{"/usr/sbin/runc", "init"}, event.MarkDetached | event.MarkOutsideRoot, event.OriginSetup},
		{"a program of the image", []string{"/usr/sbin/runc", "init"}, 0, event.OriginEntry},
		{"another command", []string{"/usr/sbin/runc", "initial"}, event.MarkMemfd, event.OriginEntry},
		{"another program", []string{"/usr/sbin/crunc", "init"}, event.MarkMemfd, event.OriginEntry},
	} {
		e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope")})
		p := inside(runc("k8s.io", nodeID, "create"), webPod, ctrNS, 1, tt.args...)
		p.Marks = tt.marks
		e.Event(&event.Event{Kind: event.Exec, Process: p})
		if p.Origin != tt.want {
			t.Errorf("%s: %q with marks %b: got %v, want %v", tt.name, tt.args, tt.marks, p.Origin, tt.want)
		}
	}
}

// What entered before its container was listed is known by the time a child of
// it runs something.
func TestOriginIsFoundLater(t *testing.T) {
	pods := withContainer(nil)
	delete(pods.containers, webID)
	e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope"), Pods: pods})
	p := inside(runc("k8s.io", nodeID, "exec"), webPod, ctrNS, 9, "/bin/check")
	e.Event(&event.Event{Kind: event.Exec, Process: p})
	if p.Origin != event.OriginEntered {
		t.Fatalf("got %v", p.Origin)
	}
	pods.containers[webID] = fakeRun{podUID, &event.Container{Name: "web", Probes: [][]string{{"/bin/check"}}}}
	pods.generation++
	child := forked(p, webPod)
	e.Event(&event.Event{Kind: event.Fork, Process: child})
	child.Execs = 1
	e.Event(&event.Event{Kind: event.Exec, Process: child})
	if p.Origin != event.OriginProbe || child.Origin != event.OriginChild {
		t.Errorf("got %v and %v", p.Origin, child.Origin)
	}
}

// A workload that calls itself the runtime is still the workload.
func TestCallingItselfTheRuntime(t *testing.T) {
	e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope")})
	entry := inside(runc("k8s.io", nodeID, "create"), webPod, ctrNS, 1, "sh")
	e.Event(&event.Event{Kind: event.Exec, Process: entry})
	for _, args := range [][]string{{"runc", "init"}, {"runc", "create"}, {"/usr/bin/containerd-shim-runc-v2", "-namespace", "k8s.io", "-id", webID}} {
		p := forked(entry, webPod)
		e.Event(&event.Event{Kind: event.Fork, Process: p})
		p.Cmdline, p.Execs, p.Marks = cmd(args...), 1, event.MarkMemfd
		e.Event(&event.Event{Kind: event.Exec, Process: p})
		q := forked(p, webPod)
		e.Event(&event.Event{Kind: event.Fork, Process: q})
		q.Cmdline, q.Execs = cmd("sh"), 1
		e.Event(&event.Event{Kind: event.Exec, Process: q})
		if p.Origin != event.OriginChild || q.Origin != event.OriginChild {
			t.Errorf("%q: %v, its child %v", args, p.Origin, q.Origin)
		}
	}
}

func TestKnownFromTheStart(t *testing.T) {
	e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope")})
	shim := runc("k8s.io", nodeID, "exec").Parent
	first := inside(shim, webPod, ctrNS, 1, "nginx")
	worker := inside(first, webPod, ctrNS, 7, "nginx: worker")
	session := inside(shim, webPod, ctrNS, 9, "sh")
	for _, p := range []*event.Process{shim, first, worker, session} {
		p.Execs = 0
	}
	for _, p := range []*event.Process{worker, session, first, shim} { // children first
		e.Known(p)
	}
	if first.Origin != event.OriginEntry || worker.Origin != event.OriginChild || session.Origin != event.OriginEntered || shim.Origin != event.OriginUnknown {
		t.Errorf("first %v, worker %v, session %v, shim %v", first.Origin, worker.Origin, session.Origin, shim.Origin)
	}
}

func TestSandboxIsNotWanted(t *testing.T) {
	pods := withContainer(nil)
	delete(pods.containers, webID)
	e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope"), Pods: pods})
	p := inside(runc("k8s.io", webID, "create"), webPod, ctrNS, 1, "/pause")
	e.Event(&event.Event{Kind: event.Exec, Process: p})
	wants := pods.wants
	if want := []string{podUID + " " + webID}; wants != 1 || !slices.Equal(pods.unwanted, want) {
		t.Errorf("%d wants, taken back %q, want %q once", wants, pods.unwanted, want)
	}
	for range 3 {
		pods.generation++
		e.Event(&event.Event{Kind: event.Exit, Process: p})
	}
	if w := p.Workload; !w.Sandbox || w.Reason != "" || w.Pod == nil || pods.wants != wants || len(pods.unwanted) != 1 {
		t.Errorf("%+v, %d wants after the first %d, taken back %q", w, pods.wants, wants, pods.unwanted)
	}
}

func TestCause(t *testing.T) {
	ids := func(uid, euid, suid uint32) event.IDs { return event.IDs{UID: uid, EUID: euid, SUID: suid} }
	user := ids(1000, 1000, 1000)
	type in struct {
		before, after event.IDs
		caps          uint64
		file          event.ExeFile
		exe           string
		origin        event.Origin
		nnp, noCaps   bool
		noBefore      bool
		noFile        bool
		container     bool
		upper         bool
	}
	root := ids(0, 0, 0)
	suidRoot := event.ExeFile{Mode: 0o104755}
	plain := event.ExeFile{Mode: 0o100755}
	for _, c := range []struct {
		name string
		in   in
		want event.Cause
	}{
		{"not to 0", in{before: root, after: user, file: plain}, event.CauseUnknown},
		{"from 0", in{before: root, after: root, file: plain}, event.CauseUnknown},
		{"before is not known", in{before: user, after: root, noBefore: true, file: plain}, event.CauseUnknown},
		{"capabilities are not known", in{before: user, after: root, noCaps: true, file: plain}, event.CauseUnknown},
		{"the program is not known", in{before: user, after: root, noFile: true}, event.CauseUnknown},
		{"set-uid program", in{before: user, after: ids(1000, 0, 0), file: suidRoot, exe: "/usr/bin/passwd"}, event.CauseSetuid},
		{"set-uid program of another user's", in{before: user, after: ids(1000, 0, 0), file: event.ExeFile{Mode: 0o104755, UID: 33}, exe: "/x"}, event.CauseUnexplained},
		{"set-uid program that cannot have worked", in{before: user, after: ids(1000, 0, 0), file: suidRoot, exe: "/usr/bin/passwd", nnp: true}, event.CauseUnexplained},
		{"su", in{before: user, after: ids(1000, 0, 0), file: suidRoot, exe: "/usr/bin/su"}, event.CauseLogin},
		{"su, the second step", in{before: ids(1000, 0, 0), after: root, file: suidRoot, exe: "/usr/bin/su"}, event.CauseLogin},
		{"what calls itself su", in{before: user, after: root, file: plain, exe: "/usr/bin/su"}, event.CauseUnexplained},
		{"su of the workload's own", in{before: user, after: ids(1000, 0, 0), file: suidRoot, exe: "/tmp/su"}, event.CauseSetuid},
		{"su that is not from the image", in{before: user, after: ids(1000, 0, 0), file: suidRoot, exe: "/usr/bin/su", upper: true}, event.CauseSetuid},
		{"back to what was kept", in{before: ids(1000, 1000, 0), after: ids(1000, 0, 0), file: plain, exe: "/usr/sbin/x"}, event.CauseKept},
		{"capability", in{before: user, after: root, caps: capSetuid, file: plain, exe: "/usr/bin/x"}, event.CauseCapability},
		{"another capability", in{before: user, after: root, caps: ^uint64(capSetuid), file: plain, exe: "/usr/bin/x"}, event.CauseUnexplained},
		{"runtime's step", in{before: user, after: root, caps: capSetuid, file: plain, exe: "/", origin: event.OriginSetup, container: true}, event.CauseRuntime},
		{"runtime on the host", in{before: ids(1000, 0, 0), after: root, file: plain, exe: "/usr/bin/runc"}, event.CauseRuntime},
		{"what calls itself the runtime, in a container", in{before: user, after: root, caps: capSetuid, file: plain, exe: "/usr/bin/runc", container: true}, event.CauseCapability},
		{"unexplained", in{before: user, after: root, file: plain, exe: "/usr/bin/x"}, event.CauseUnexplained},
		{"unexplained, of the effective id alone", in{before: user, after: ids(1000, 0, 1000), file: plain, exe: "/usr/bin/x"}, event.CauseUnexplained},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := proc1(nil, "x")
			if c.in.container {
				p.Cgroup = webPod
			}
			p.IDs, p.Origin, p.NoNewPrivs = c.in.after, c.in.origin, c.in.nnp
			p.Sources[event.FieldIDs] = event.SourceRecord
			r := &event.Record{Kind: event.UIDChange, Facts: event.Facts{From: event.SourceRecord, ExeFile: c.in.file, Exe: []byte(c.in.exe)}}
			r.Have = event.FieldSet(event.FieldExe, event.FieldExeFile)
			if c.in.noFile {
				r.Have = 0
			}
			if c.in.upper {
				r.Marks = event.MarkUpper | event.MarkUpperKnown
			}
			ev := &event.Event{Kind: event.UIDChange, Process: p, Record: r, Before: c.in.before, HasBefore: !c.in.noBefore,
				CapsBefore: c.in.caps, HasCapsBefore: !c.in.noCaps}
			New(Config{Proc: proc(t, initCgroupNS, "/init.scope")}).Event(ev)
			if ev.Cause != c.want {
				t.Errorf("got %v, want %v", ev.Cause, c.want)
			}
		})
	}
}

// What an exploit of the kernel leaves, as records: an ordinary program of an
// ordinary user is root, without an exec and without a right to it. There is no
// honest way to have a sound kernel do this, so the records are made by hand.
func TestExploitIsUnexplained(t *testing.T) {
	table, err := proctable.New(proctable.Config{Clock: proctable.FixedClock{Mono: 1 << 40, Boot: 1 << 40, Wall: time.Unix(1e9, 0)}})
	if err != nil {
		t.Fatal(err)
	}
	e := New(Config{Proc: proc(t, initCgroupNS, "/init.scope")})
	facts := func(uid uint32, caps uint64) event.Facts {
		f := event.Facts{From: event.SourceRecord, Start: 1 << 39, PPID: 1, CapPermitted: caps, CapEffective: caps,
			Exe: []byte("/usr/bin/python3"), ExeFile: event.ExeFile{Mode: 0o100755}, Cmdline: []byte("python3\x00x.py\x00"), Cgroup: []byte(webPod),
			IDs: event.IDs{UID: uid, EUID: uid, SUID: uid, FSUID: uid}}
		f.Have = event.FieldSet(event.FieldStart, event.FieldExe, event.FieldExeFile, event.FieldArgs, event.FieldCgroup, event.FieldIDs, event.FieldCaps)
		return f
	}
	apply := func(r event.Record) *event.Event {
		t.Helper()
		r.PID, r.TGID = 42, 42
		ev := &event.Event{}
		if !table.Apply(&r, ev) {
			t.Fatalf("%v is not reported", r.Kind)
		}
		e.Event(ev)
		return ev
	}
	apply(event.Record{Kind: event.Exec, Stamp: 1 << 40, Facts: facts(1000, 0)})
	// After the change the task has every capability: what counts is before.
	ev := apply(event.Record{Kind: event.UIDChange, Stamp: 1<<40 + 1000, Facts: facts(0, 1<<41-1)})
	if ev.Cause != event.CauseUnexplained || !ev.HasCapsBefore || ev.CapsBefore != 0 || ev.Before.UID != 1000 {
		t.Errorf("cause %v, capabilities before %x (%v), ids before %+v", ev.Cause, ev.CapsBefore, ev.HasCapsBefore, ev.Before)
	}
	// The same of a program that may.
	apply(event.Record{Kind: event.UIDChange, Stamp: 1<<40 + 2000, Facts: facts(1000, capSetuid)})
	if ev := apply(event.Record{Kind: event.UIDChange, Stamp: 1<<40 + 3000, Facts: facts(0, 1<<41-1)}); ev.Cause != event.CauseCapability {
		t.Errorf("with CAP_SETUID before: %v", ev.Cause)
	}
}

package enrich

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

// fakePods says what the test wants said.
type fakePods struct {
	generation uint64
	answers    bool
	pods       map[string]*event.Pod
	containers map[string]fakeRun
	wants      int
	unwanted   []string
	last       string
}

type fakeRun struct {
	uid string
	c   *event.Container
}

func (f *fakePods) Generation() uint64 { return f.generation }
func (f *fakePods) Answers() bool      { return f.answers }
func (f *fakePods) Want(uid, id string) {
	f.wants++
	f.last = uid + " " + id
}

func (f *fakePods) Unwant(uid, id string) { f.unwanted = append(f.unwanted, uid+" "+id) }

func (f *fakePods) Find(uid, id string) (*event.Pod, *event.Container, bool) {
	r, ok := f.containers[id]
	if ok && r.uid != uid {
		return nil, nil, true
	}
	return f.pods[uid], r.c, false
}

func here(t *testing.T, pods Pods) *Enricher {
	return New(Config{Proc: proc(t, initCgroupNS, "/init.scope"), Pods: pods})
}

// Knowledge comes in steps, each a new Workload, and does not go again.
func TestLateKnowledge(t *testing.T) {
	pods := &fakePods{pods: map[string]*event.Pod{}, containers: map[string]fakeRun{}}
	e := here(t, pods)
	p := process(event.SourceRecord, webPod)
	var before []*event.Workload
	step := func(name string, want event.Workload, late bool) {
		t.Helper()
		e.Resolve(p)
		if diff := cmp.Diff(&want, p.Workload); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if Late(p.Workload) != late {
			t.Errorf("%s: late is %v", name, !late)
		}
		for _, w := range before {
			if got := e.Complete(w); cmp.Diff(&want, got) != "" {
				t.Errorf("%s: a Workload of before completes to %+v", name, got)
			}
		}
		before = append(before, p.Workload)
		if w := p.Workload; e.Complete(w) != w {
			t.Errorf("%s: what is complete became another", name)
		}
	}
	step("nobody answers", inPod(podUID), true)
	pods.answers = true
	pods.generation++
	w := inPod(podUID)
	w.Reason = ReasonNotListed
	step("not listed", w, true)
	if pods.last != podUID+" " {
		t.Errorf("wanted %q", pods.last)
	}
	pod := &event.Pod{UID: podUID, Namespace: "shop", Name: "web"}
	pods.pods[podUID] = pod
	pods.generation++
	w.Pod, w.Reason = pod, ReasonNoStatus
	step("pod listed", w, true)
	if pods.last != podUID+" "+webID {
		t.Errorf("wanted %q", pods.last)
	}
	c := &event.Container{Name: "web", Image: "web:1", Runtime: "containerd"}
	pods.containers[webID] = fakeRun{podUID, c}
	pods.generation++
	w.Container, w.ContainerName, w.Image, w.Runtime, w.Reason = c, "web", "web:1", "containerd", ""
	step("container listed", w, false)
	wants := pods.wants
	delete(pods.pods, podUID)
	delete(pods.containers, webID)
	pods.generation++
	before = nil
	e.Resolve(p)
	if p.Workload.Pod != pod || p.Workload.Container != c {
		t.Errorf("what was known is forgotten: %+v", p.Workload)
	}
	if pods.wants != wants {
		t.Error("a pod that is gone, and known, is wanted")
	}
	if s := e.Stats(); s.Incomplete[ReasonNoKubelet] != 1 || s.Incomplete[ReasonNotListed] != 1 || s.Incomplete[ReasonNoStatus] != 1 || s.Container != 5 {
		t.Errorf("%+v", s)
	}
}

// A path that names one pod and a container of another is believed in neither.
func TestConflict(t *testing.T) {
	pods := withContainer(&event.Container{Name: "web"})
	e := here(t, pods)
	p := process(event.SourceRecord, "/kubepods/besteffort/pod"+ownUID+"/"+webID)
	for range 3 {
		e.Resolve(p)
		pods.generation++
	}
	want := event.Workload{ContainerID: webID, PodUID: ownUID, Reason: ReasonConflict}
	if diff := cmp.Diff(&want, p.Workload); diff != "" {
		t.Error(diff)
	}
	if s := e.Stats(); s.Conflicts != 1 || s.Unknown[ReasonConflict] != 3 {
		t.Errorf("%+v", s)
	}
	delete(pods.containers, webID)
	pods.generation++
	if e.Resolve(p); p.Workload.Reason != ReasonConflict {
		t.Errorf("the conflict is forgotten: %+v", p.Workload)
	}
}

// A container's id without a pod in the path leads to no pod: anybody who may
// make cgroups could write it.
func TestContainerIDAloneIsNoPod(t *testing.T) {
	pods := withContainer(&event.Container{Name: "web"})
	e := here(t, pods)
	for _, path := range []string{"/docker/" + nodeID + "/docker/" + webID, "/" + webID, "/user.slice/user-1000.slice/user@1000.service/pod" + podUID + "/" + webID} {
		p := process(event.SourceRecord, path)
		e.Resolve(p)
		if p.Workload.Pod != nil || p.Workload.PodUID != "" {
			t.Errorf("%s: %+v", path, p.Workload)
		}
	}
}

func TestCompleteCgroupAllocatesNothing(t *testing.T) {
	e := here(t, withContainer(&event.Container{Name: "web"}))
	p := process(event.SourceRecord, webPod)
	ev := &event.Event{Kind: event.Exec, Process: p}
	p.Sources[event.FieldArgs] = event.SourceRecord
	p.Cmdline = cmd("sh", "-c", "true")
	if n := testing.AllocsPerRun(1000, func() { e.Event(ev) }); n != 0 {
		t.Errorf("Event allocates %v times", n)
	}
	if p.Workload.Pod == nil {
		t.Errorf("%+v", p.Workload)
	}
}

func BenchmarkEvent(b *testing.B) {
	e := New(Config{Pods: withContainer(&event.Container{Name: "web"})})
	entry := inside(runc("k8s.io", nodeID, "create"), webPod, ctrNS, 1, "sh")
	e.Event(&event.Event{Kind: event.Exec, Process: entry})
	child := forked(entry, webPod)
	e.Event(&event.Event{Kind: event.Fork, Process: child})
	for name, p := range map[string]*event.Process{"host": proc1(nil, "sh"), "entry": entry, "child": child} {
		b.Run(name, func(b *testing.B) {
			ev := &event.Event{Kind: event.Exec, Process: p}
			b.ReportAllocs()
			for b.Loop() {
				e.Event(ev)
			}
		})
	}
}

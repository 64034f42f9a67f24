package enrich

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

const (
	webID  = "a1b593bf9cc763afec7eb11e89f53d4d533b13fc883b230ddb4492b07cb2036f"
	nodeID = "86a0db48a16a49ceb6c786c3ecced740c086517738daca8229c892cf8ecfa824"
	podUID = "1fc8cbb1-1d73-41f8-a9ba-825cb32d14b2"
	ownUID = "fe541ac9-403b-452d-94df-674a9282d02d"
	webPod = "/kubepods/besteffort/pod" + podUID + "/" + webID
)

// proc makes a proc file system as far as New looks at it: the agent's cgroup
// namespace, and the cgroup of pid 1. "" leaves a file out.
func proc(t *testing.T, ns, pid1 string) string {
	t.Helper()
	root := t.TempDir()
	for _, d := range []string{"self/ns", "1"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if ns != "" {
		if err := os.Symlink(ns, filepath.Join(root, "self/ns/cgroup")); err != nil {
			t.Fatal(err)
		}
	}
	if pid1 != "" {
		if err := os.WriteFile(filepath.Join(root, "1/cgroup"), []byte("0::"+pid1+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const privateNS = "cgroup:[4026532399]"

func process(source event.Source, path string) *event.Process {
	p := &event.Process{PID: 4711, Cgroup: path}
	p.Sources[event.FieldCgroup] = source
	return p
}

func unknown(reason string) event.Workload { return event.Workload{Reason: reason} }

func inPod(uid string) event.Workload {
	return event.Workload{Place: event.PlaceContainer, ContainerID: webID, PodUID: uid, Reason: ReasonNoKubelet}
}

var (
	host = event.Workload{Place: event.PlaceHost}
	web  = inPod(podUID)
)

func TestResolve(t *testing.T) {
	here := Config{Proc: proc(t, initCgroupNS, "/init.scope")}
	private := Config{Proc: proc(t, privateNS, "/../../../../init.scope"), PodUID: ownUID}
	noPod := Config{Proc: proc(t, privateNS, "/../../../../init.scope")}
	shallow := Config{Proc: proc(t, privateNS, "")} // pid 1 cannot be read
	blind := Config{Proc: filepath.Join(t.TempDir(), "none")}
	old := Config{Proc: proc(t, "", "/init.scope")}

	guess := func(ns uint32, known bool) *event.Process {
		p := process(event.SourceRecord, "/shop/web")
		p.NS.PID = ns
		if known {
			p.Sources[event.FieldNS] = event.SourceRecord
		}
		return p
	}
	gone := &event.Process{Exited: true}
	cut := process(event.SourceRecord, webPod)
	cut.Marks = event.MarkCgroupCut

	for _, c := range []struct {
		name   string
		config Config
		p      *event.Process
		want   event.Workload
	}{
		{"gone before its cgroup was read", here, gone, unknown(ReasonProcessGone)},
		{"cgroup not read", here, &event.Process{}, unknown(ReasonCgroupMissing)},
		{"cut path, though it looks like a container", here, cut, unknown(ReasonCgroupCut)},
		{"empty path", here, process(event.SourceRecord, ""), unknown(ReasonNamespace)},
		{"in the pod's cgroup only", here, process(event.SourceRecord, "/kubepods/pod"+podUID), event.Workload{PodUID: podUID, Reason: ReasonNoContainer}},
		{"workload that calls itself a host's service", here, process(event.SourceRecord, webPod+"/system.slice/ssh.service"), web},
		{"workload that calls itself another pod", here, process(event.SourceRecord, webPod+"/pod"+ownUID+"/"+nodeID), web},

		{"record, root", here, process(event.SourceRecord, "/"), host},
		{"proc, root", here, process(event.SourceProc, "/"), host},
		{"record, pod", here, process(event.SourceRecord, webPod), web},
		{"lineage, pod", here, process(event.SourceLineage, webPod), web},
		{"conmon", here, process(event.SourceRecord, "/machine.slice/libpod-conmon-"+webID+".scope"), host},
		{"kubelet of a node in a container", here, process(event.SourceRecord, "/docker/"+nodeID+"/system.slice/kubelet.service"),
			event.Workload{Place: event.PlaceContainer, ContainerID: nodeID, Runtime: "docker"}},
		{"two names, own pid namespace", here, guess(4026532200, true), event.Workload{Place: event.PlaceContainer, ContainerID: "web", Runtime: "containerd"}},
		{"two names, the host's pid namespace", here, guess(initPIDNS, true), host},
		{"two names, pid namespace not known", here, guess(0, false), unknown(ReasonNamespace)},

		{"private, record is never relative", private, process(event.SourceRecord, "/"), host},
		{"private, the agent itself", private, process(event.SourceProc, "/"), event.Workload{Place: event.PlaceContainer, PodUID: ownUID, Reason: ReasonNoKubelet}},
		{"private, below the agent", private, process(event.SourceProc, "/system.slice/x.service"), event.Workload{Place: event.PlaceContainer, PodUID: ownUID, Reason: ReasonNoKubelet}},
		{"private, root taken from a parent", private, process(event.SourceLineage, "/"), unknown(ReasonNamespace)},
		{"private, path taken from a parent", private, process(event.SourceLineage, webPod), web},
		{"private, the agent's own pod", private, process(event.SourceProc, "/../"+webID), inPod(ownUID)},
		{"private, another pod", private, process(event.SourceProc, "/../../pod"+podUID+"/"+webID), web},
		{"private, kernel thread", private, process(event.SourceProc, "/../../../.."), host},
		{"private, host's service", private, process(event.SourceProc, "/../../../../system.slice/ssh.service"), host},
		{"private, host's cgroup nobody knows", private, process(event.SourceProc, "/../../../../a/b/c"), host},
		{"private, two names on the host", private, func() *event.Process { p := guess(initPIDNS, true); p.Cgroup = "/../../../../shop/web"; return p }(), host},
		{"private, something between", private, process(event.SourceProc, "/../../a/b/c"), unknown(ReasonNamespace)},
		{"private, higher than the root", private, process(event.SourceProc, "/../../../../.."), unknown(ReasonNamespace)},

		{"private without a pod, the agent itself", noPod, process(event.SourceProc, "/"), event.Workload{Place: event.PlaceContainer, Reason: ReasonNamespace}},
		{"private without a pod, a sibling", noPod, process(event.SourceProc, "/../"+webID),
			event.Workload{Place: event.PlaceContainer, ContainerID: webID, Reason: ReasonNamespace}},
		{"depth not known, perhaps the root", shallow, process(event.SourceProc, "/../../../.."), unknown(ReasonNamespace)},
		{"depth not known, host's service", shallow, process(event.SourceProc, "/../../../../system.slice/ssh.service"), host},
		{"namespace not known, root", blind, process(event.SourceProc, "/"), unknown(ReasonNamespace)},
		{"namespace not known, recorded root", blind, process(event.SourceRecord, "/"), host},
		{"kernel without cgroup namespaces", old, process(event.SourceProc, "/"), host},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := New(c.config)
			for range 2 { // the second time from the cache
				e.Resolve(c.p)
				if diff := cmp.Diff(&c.want, c.p.Workload); diff != "" {
					t.Errorf("%s (-want +got):\n%s", c.p.Cgroup, diff)
				}
			}
		})
	}
}

func path(i int) string { return fmt.Sprintf("/kubepods/besteffort/pod%s/%064x", podUID, i) }

func TestSharedPerCgroup(t *testing.T) {
	e := New(Config{})
	a, b := process(event.SourceRecord, webPod), process(event.SourceLineage, strings.Clone(webPod))
	e.Resolve(a)
	e.Resolve(b)
	if a.Workload != b.Workload {
		t.Error("two processes of one cgroup have two workloads")
	}
}

// The cache keeps what is used, forgets the rest, stays within its bound, and
// every count adds up.
func TestCacheIsBounded(t *testing.T) {
	const room = 100
	e := New(Config{CacheBytes: room * (entryBytes + len(path(0)))})
	calls := uint64(0)
	resolve := func(s string) *event.Workload {
		p := process(event.SourceRecord, s)
		e.Resolve(p)
		calls++
		return p.Workload
	}
	kept := resolve(path(0))
	first := resolve(path(1))
	for i := 2; i < 5000; i++ {
		resolve(path(i))
		if resolve(path(0)) != kept {
			t.Fatal("the cgroup in use was forgotten")
		}
		if len(e.known) > room {
			t.Fatalf("%d cgroups known, room for %d", len(e.known), room)
		}
	}
	if again := resolve(path(1)); again == first {
		t.Error("the first cgroup was never forgotten")
	} else if diff := cmp.Diff(first, again); diff != "" {
		t.Errorf("the first cgroup is another after it was forgotten (-want +got):\n%s", diff)
	}
	resolve("/")
	p := &event.Process{}
	e.Resolve(p)
	p.Exited = true
	e.Resolve(p)

	s := e.Stats()
	if s.Host != 1 || s.Container != calls-1 || s.Unknown[ReasonProcessGone] != 1 || s.Unknown[ReasonCgroupMissing] != 1 {
		t.Errorf("%d calls and two without a cgroup: %+v", calls, s)
	}
	if s.Hits+s.Misses != calls || s.Misses != s.Evicted+s.Cgroups || s.Cgroups != uint64(len(e.known)) {
		t.Errorf("counts do not add up: %+v", s)
	}
	n := 0
	for i := e.recent.next; i != &e.recent; i = i.next {
		n++
	}
	if n != len(e.known) {
		t.Errorf("%d cgroups in order of use, %d known", n, len(e.known))
	}
	// A path longer than all the room is still answered.
	small := New(Config{CacheBytes: 1})
	for range 2 {
		q := process(event.SourceRecord, webPod)
		small.Resolve(q)
		if diff := cmp.Diff(&web, q.Workload); diff != "" {
			t.Error(diff)
		}
	}
}

// Bytes is near the memory that cgroups really take.
func TestCacheBytes(t *testing.T) {
	const n = 8000
	e := New(Config{CacheBytes: 1 << 30})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range n {
		e.Resolve(process(event.SourceRecord, path(i)))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	got, want := float64(after.HeapAlloc)-float64(before.HeapAlloc), float64(e.Stats().Bytes)
	if got > 1.5*want || got < 0.5*want {
		t.Errorf("%d cgroups take %.0f bytes each, counted as %.0f", n, got/n, want/n)
	}
	runtime.KeepAlive(e)
}

func TestKnownCgroupAllocatesNothing(t *testing.T) {
	e := New(Config{})
	ps := []*event.Process{process(event.SourceRecord, webPod), process(event.SourceRecord, path(1)), process(event.SourceProc, "/"), {}, process(event.SourceRecord, "/shop/web")}
	if n := testing.AllocsPerRun(1000, func() {
		for _, p := range ps {
			e.Resolve(p)
		}
	}); n != 0 {
		t.Errorf("Resolve allocates %v times", n)
	}
}

func BenchmarkResolve(b *testing.B) {
	b.Run("known", func(b *testing.B) {
		e := New(Config{})
		ps := make([]*event.Process, 64)
		for i := range ps {
			ps[i] = process(event.SourceRecord, path(i))
		}
		i := 0
		b.ReportAllocs()
		for b.Loop() {
			e.Resolve(ps[i&63])
			i++
		}
	})
	b.Run("new", func(b *testing.B) {
		e := New(Config{CacheBytes: 1})
		ps := []*event.Process{process(event.SourceRecord, path(1)), process(event.SourceRecord, path(2))}
		i := 0
		b.ReportAllocs()
		for b.Loop() {
			e.Resolve(ps[i&1])
			i++
		}
	})
}

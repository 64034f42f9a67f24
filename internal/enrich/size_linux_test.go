package enrich

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/enrich/kube"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/proctable"
)

// A node is a busy one: pods that the kubelet told, and processes in them.
type node struct {
	pods  *kube.Pods
	table *proctable.Table
	who   *Enricher
}

func nodeUID(i int) string       { return fmt.Sprintf("1fc8cbb1-1d73-41f8-a9ba-%012x", i) }
func nodeContainer(i int) string { return fmt.Sprintf("%064x", i) }

// podList is what a kubelet writes of so many pods.
func podList(n int) string {
	var b strings.Builder
	b.WriteString(`{"kind":"PodList","apiVersion":"v1","items":[`)
	for i := range n {
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(&b, `{"metadata":{"name":"web-%d-7d9c6f8b5b-x%04d","namespace":"team-%d","uid":%q,"labels":{"app.kubernetes.io/name":"web-%d",
			"app.kubernetes.io/instance":"prod","team":"team-%d","pod-template-hash":"7d9c6f8b5b"},
			"ownerReferences":[{"kind":"ReplicaSet","name":"web-%d-7d9c6f8b5b","controller":true}],
			"managedFields":[{"manager":"kubelet","fieldsV1":{"f:status":%s}}]},
			"spec":{"serviceAccountName":"web","containers":[{"name":"main","image":"registry.example/web:%d","livenessProbe":{"exec":{"command":["/bin/check"]}}},{"name":"proxy","image":"proxy:1"}]},
			"status":{"containerStatuses":[{"name":"main","containerID":"containerd://%s","imageID":"registry.example/web@sha256:%064x"},{"name":"proxy","containerID":"containerd://%s"}]}}`,
			i%50, i, i%20, nodeUID(i), i%50, i%20, i%50, strings.Repeat(`{"f:x":`, 100)+"{}"+strings.Repeat("}", 100), i%50, nodeContainer(2*i), i%50, nodeContainer(2*i+1))
	}
	b.WriteString("]}")
	return b.String()
}

func newNode(t testing.TB, pods, processes int) *node {
	t.Helper()
	list := podList(pods)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, list) }))
	defer s.Close()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	n := &node{}
	var err error
	if n.pods, err = kube.New(kube.Config{Kubelet: kube.Server{URL: s.URL, CAFile: ca, ServerName: "example.com"}}); err != nil {
		t.Fatal(err)
	}
	runPods(t, n.pods)
	n.table, err = proctable.New(proctable.Config{Clock: proctable.FixedClock{Mono: 1 << 40, Boot: 1 << 40, Wall: time.Unix(1e9, 0)}})
	if err != nil {
		t.Fatal(err)
	}
	n.who = New(Config{Pods: n.pods})
	var ev event.Event
	for i := range processes {
		c := i % (2 * pods)
		args := fmt.Sprintf("/usr/bin/web\x00--config=/etc/web/%d.yaml\x00--listen=0.0.0.0:8080\x00", i)
		r := &event.Record{Kind: event.Exec, Stamp: 1<<40 + uint64(i), PID: int32(1000 + i), TGID: int32(1000 + i), Facts: event.Facts{
			From: event.SourceRecord, Start: uint64(1+i) << 20, PPID: 1, InnerPID: int32(i), NS: event.NS{PID: ctrNS},
			Comm: []byte("web"), Exe: []byte("/usr/bin/web"), File: []byte("/usr/bin/web"), Cwd: []byte("/srv"),
			Cmdline: []byte(args), CmdlineLen: uint32(len(args)),
			Cgroup: []byte("/kubepods/burstable/pod" + nodeUID(c/2) + "/" + nodeContainer(c)),
		}}
		r.Have = 1<<event.NumFields - 1
		ev.Reset()
		if n.table.Apply(r, &ev) {
			n.who.Event(&ev)
		}
	}
	return n
}

// runPods runs until the list is known.
func runPods(t testing.TB, pods *kube.Pods) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- pods.Run(ctx) }()
	deadline := time.After(60 * time.Second)
	for !pods.Answers() {
		select {
		case <-pods.Changed():
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			t.Fatalf("no list: %+v", pods.Status())
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A node of 500 pods and 5,000 processes costs less than 25 MiB above an agent
// that knows nothing yet.
func TestMemoryOfANode(t *testing.T) {
	newNode(t, 1, 10) // what is made once
	before := liveHeap()
	n := newNode(t, 500, 5000)
	cost := liveHeap() - before
	if p := n.table.Lookup(1000 + 4999); p == nil || p.Workload.ContainerName != "proxy" || p.Workload.Pod.OwnerKind != "Deployment" {
		t.Fatalf("the last process: %+v", p)
	}
	if s := n.who.Stats(); s.Container != 5000 || s.Cgroups != 1000 {
		t.Errorf("%+v", s)
	}
	t.Logf("500 pods and 5,000 processes: %.1f MiB", float64(cost)/(1<<20))
	if cost > 25<<20 {
		t.Errorf("%d bytes", cost)
	}
	runtime.KeepAlive(n)
}

// BenchmarkNode says what a node costs as it grows, and what one event in it does.
func BenchmarkNode(b *testing.B) {
	for _, size := range []struct{ pods, processes int }{{50, 500}, {110, 1100}, {500, 5000}, {1000, 20000}} {
		b.Run(fmt.Sprintf("pods=%d/processes=%d", size.pods, size.processes), func(b *testing.B) {
			before := liveHeap()
			n := newNode(b, size.pods, size.processes)
			cost := float64(liveHeap()-before) / (1 << 20)
			evs := make([]event.Event, 1024)
			for i := range evs {
				evs[i] = event.Event{Kind: event.Exec, Process: n.table.Lookup(int32(1000 + i*7919%size.processes))}
			}
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				n.who.Event(&evs[i&1023])
				i++
			}
			b.ReportMetric(cost, "MiB")
		})
	}
}

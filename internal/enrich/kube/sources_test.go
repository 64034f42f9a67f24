package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	podsv1 "k8s.io/kubelet/pkg/apis/pods/v1alpha1"
)

// A podsServer is the kubelet's end of the Pods API.
type podsServer struct {
	podsv1.UnimplementedPodsServer
	events chan *podsv1.WatchPodsEvent
	ends   chan struct{}
}

func (s *podsServer) WatchPods(_ *podsv1.WatchPodsRequest, out grpc.ServerStreamingServer[podsv1.WatchPodsEvent]) error {
	for {
		select {
		case <-out.Context().Done():
			return nil
		case <-s.ends:
			return fmt.Errorf("the kubelet ends")
		case ev := <-s.events:
			if err := out.Send(ev); err != nil {
				return err
			}
		}
	}
}

func (s *podsServer) send(t *testing.T, typ podsv1.EventType, p *corev1.Pod) {
	t.Helper()
	ev := &podsv1.WatchPodsEvent{Type: typ}
	if p != nil {
		b, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		ev.Pod = b
	}
	s.events <- ev
}

func servePods(t *testing.T) (s *podsServer, path string) {
	t.Helper()
	// A unix socket's path has at most 107 bytes: the test's own folder may be longer.
	dir, err := os.MkdirTemp("", "pods")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "pods-api.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s = &podsServer{events: make(chan *podsv1.WatchPodsEvent, 16), ends: make(chan struct{})}
	g := grpc.NewServer()
	podsv1.RegisterPodsServer(g, s)
	go g.Serve(l)
	t.Cleanup(g.Stop)
	return s, path
}

func TestPodsAPI(t *testing.T) {
	s, path := servePods(t)
	s.send(t, podsv1.EventType_ADDED, pod(1, "shop", "web"))
	s.send(t, podsv1.EventType_ADDED, pod(2, "test", "web"))
	p := start(t, Config{Socket: path})
	if found(p, uid(1), id(1)) != "" {
		t.Error("a list that is not complete is used")
	}
	s.send(t, podsv1.EventType_INITIAL_SYNC_COMPLETE, nil)
	until(t, p, "pods are known", p.Answers)
	if got := found(p, uid(1), id(1)) + " " + found(p, uid(2), id(2)); got != "shop/web/web test/web/web" {
		t.Errorf("got %q", got)
	}
	s.send(t, podsv1.EventType_ADDED, pod(3, "shop", "db"))
	until(t, p, "the new pod", func() bool { return found(p, uid(3), id(3)) == "shop/db/web" })
	restarted := pod(3, "shop", "db")
	restarted.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ContainerID: "containerd://" + id(3)}
	restarted.Status.ContainerStatuses[0].ContainerID = "containerd://" + id(33)
	s.send(t, podsv1.EventType_MODIFIED, restarted)
	until(t, p, "its new container", func() bool { return found(p, uid(3), id(33)) == "shop/db/web" })
	if found(p, uid(3), id(3)) != "shop/db/web" {
		t.Error("the container before the restart is not known any more")
	}
	gone := &corev1.Pod{ObjectMeta: pod(3, "shop", "db").ObjectMeta}
	s.send(t, podsv1.EventType_DELETED, gone)
	until(t, p, "the pod that is gone", func() bool { return found(p, uid(3), "") == "" })
	if st := p.Status(); st.Source != "pods-api" || st.Pods != 2 {
		t.Errorf("status %+v", st)
	}
	// Bytes that are no pod end the stream; what is known stays.
	s.events <- &podsv1.WatchPodsEvent{Type: podsv1.EventType_ADDED, Pod: []byte{0xff, 0xff}}
	until(t, p, "the failure is counted", func() bool { return p.Stats().Failures["malformed"] == 1 })
	if found(p, uid(1), id(1)) == "" {
		t.Error("what was known is lost")
	}
	until(t, p, "it is connected again", func() bool {
		select { // the end of the old stream may still take one
		case s.events <- &podsv1.WatchPodsEvent{Type: podsv1.EventType_INITIAL_SYNC_COMPLETE}:
		default:
		}
		return p.Answers()
	})
}

// The first that answers is used; when it fails the next is.
func TestSourcesAreTriedInOrder(t *testing.T) {
	ps, path := servePods(t)
	ps.send(t, podsv1.EventType_ADDED, pod(1, "shop", "from-socket"))
	ps.send(t, podsv1.EventType_INITIAL_SYNC_COMPLETE, nil)
	k := newServer(t)
	k.pods(t, pod(1, "shop", "from-kubelet"))
	p := start(t, Config{Socket: path, Kubelet: k.server()})
	until(t, p, "the socket is used", func() bool { return p.Status().Source == "pods-api" })
	if k.calls.Load() != 0 {
		t.Error("the kubelet was asked over HTTPS too")
	}
	os.Remove(path)
	close(ps.ends)
	until(t, p, "the kubelet is asked over HTTPS", func() bool { return p.Status().Source == "kubelet" })
	if got := found(p, uid(1), ""); got != "shop/from-kubelet" {
		t.Errorf("got %q", got)
	}
	if st := p.Status(); !strings.Contains(st.Failed["pods-api"], "pods api") {
		t.Errorf("the status does not say what the socket's failure was: %+v", st)
	}
}

// An apiServer lists and watches.
type apiServer struct {
	*server
	list   []byte
	events chan string // lines of the watch; "end" ends it
	asked  chan string // queries
}

func newAPIServer(t *testing.T, pods ...*corev1.Pod) *apiServer {
	t.Helper()
	a := &apiServer{server: newServer(t), events: make(chan string, 16), asked: make(chan string, 64)}
	b, err := json.Marshal(podList(pods...))
	if err != nil {
		t.Fatal(err)
	}
	a.list = b
	a.set(func(w http.ResponseWriter, r *http.Request) {
		a.asked <- r.URL.RawQuery
		if r.URL.Path != "/api/v1/pods" || r.URL.Query().Get("fieldSelector") != "spec.nodeName=node-1" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		if r.URL.Query().Get("watch") == "" {
			w.Write(a.list)
			return
		}
		w.(http.Flusher).Flush()
		for {
			select {
			case <-r.Context().Done():
				return
			case line := <-a.events:
				if line == "end" {
					return
				}
				fmt.Fprintln(w, line)
				w.(http.Flusher).Flush()
			}
		}
	})
	return a
}

func (a *apiServer) send(t *testing.T, typ string, object any) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"type": typ, "object": object})
	if err != nil {
		t.Fatal(err)
	}
	a.events <- string(b)
}

func (a *apiServer) wantAsked(t *testing.T, part string) {
	t.Helper()
	select {
	case q := <-a.asked:
		if !strings.Contains(q, part) {
			t.Errorf("asked for %q, want %q in it", q, part)
		}
	case <-time.After(60 * time.Second):
		t.Fatalf("not asked for %q", part)
	}
}

func TestAPIWatch(t *testing.T) {
	static := pod(4, "kube-system", "etcd-node") // the mirror of a static pod has a uid of its own
	static.Annotations["kubernetes.io/config.hash"] = "d3b9c81f816480f0c28eb564608ff695"
	a := newAPIServer(t, pod(1, "shop", "web"), static)
	p := start(t, Config{API: a.server.server(), Node: "node-1"})
	until(t, p, "pods are known", p.Answers)
	if got := found(p, "d3b9c81f816480f0c28eb564608ff695", id(4)); got != "kube-system/etcd-node/web" {
		t.Errorf("the static pod is %q", got)
	}
	a.wantAsked(t, "fieldSelector")
	a.wantAsked(t, "resourceVersion=5000")
	a.send(t, "ADDED", pod(2, "test", "web"))
	until(t, p, "the new pod", func() bool { return found(p, uid(2), id(2)) == "test/web/web" })
	a.send(t, "DELETED", pod(1, "shop", "web"))
	until(t, p, "the pod that is gone", func() bool { return found(p, uid(1), "") == "" })
	bookmark := map[string]any{"kind": "Pod", "metadata": map[string]any{"resourceVersion": "7000"}}
	a.send(t, "BOOKMARK", bookmark)
	a.events <- "end"
	a.wantAsked(t, "resourceVersion=7000") // it goes on where it ended
	// Too old to go on: list again.
	a.send(t, "ERROR", map[string]any{"kind": "Status", "code": 410, "message": "too old resource version"})
	a.wantAsked(t, "fieldSelector")
	until(t, p, "the list again", func() bool { return found(p, uid(1), "") == "shop/web" && found(p, uid(2), "") == "" })
	a.wantAsked(t, "resourceVersion=5000")
	if p.Status().Source != "api-watch" || !p.Answers() {
		t.Errorf("status %+v", p.Status())
	}
	// A line that is no event is a failure, and what is known stays.
	a.events <- "{garbage"
	until(t, p, "the failure is counted", func() bool { return p.Stats().Failures["malformed"] == 1 })
	if found(p, uid(1), "") != "shop/web" {
		t.Error("what was known is lost")
	}
	until(t, p, "it watches again", p.Answers)
}

func TestLastListIsKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pods")
	s := newServer(t)
	s.pods(t, pod(1, "shop", "web"), pod(2, "test", "web"))
	p, err := New(Config{Kubelet: s.server(), File: file})
	if err != nil {
		t.Fatal(err)
	}
	stop := p.runFor(t)
	until(t, p, "pods are known", p.Answers)
	before, _, _ := p.Find(uid(1), "")
	stop()
	s.Close()

	p, err = New(Config{Kubelet: s.server(), File: file})
	if err != nil {
		t.Fatal(err)
	}
	if st := p.Status(); st.Source != "disk" || st.Pods != 2 || p.Answers() {
		t.Errorf("status %+v", st)
	}
	p.runFor(t)
	until(t, p, "the kubelet is found to be away", func() bool { return p.Stats().Failures["unreachable"] > 0 })
	if got := found(p, uid(1), id(1)) + " " + found(p, uid(2), id(2)); got != "shop/web/web test/web/web" {
		t.Errorf("after a restart without a kubelet: %q", got)
	}
	after, _, _ := p.Find(uid(1), "")
	if fmt.Sprint(*before) != fmt.Sprint(*after) {
		t.Errorf("before %+v\nafter  %+v", *before, *after)
	}
}

func TestDamagedFileIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pods")
	if err := store(file, []*Pod{kept(t, pod(1, "shop", "web"))}); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := func(pods string) []byte { return sealed(pods) }
	for _, c := range []struct {
		name, says string
		content    []byte
	}{
		{"empty", "head", nil},
		{"cut in the head", "head", good[:10]},
		{"cut", "length", good[:len(good)-1]},
		{"longer", "length", append(append([]byte{}, good...), 'x')},
		{"a bit flipped", "checksum", flip(good, len(good)/2)},
		{"zeroed", "head", make([]byte, len(good))},
		{"another version", "head", []byte(strings.Replace(string(good), "pods 1", "pods 2", 1))},
		{"no list", "content", bad(`{"a":1}`)},
		{"a pod without a name", "pod 0", bad(`[{"UID":"x","Namespace":"y"}]`)},
		{"a null pod", "pod 0", bad(`[null]`)},
		{"an id of no container", "container 3", bad(`[{"UID":"x","Namespace":"y","Name":"z","IDs":[{"ID":"a","Container":3}]}]`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.WriteFile(file, c.content, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := load(file, 10); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want to read %q", err, c.says)
			}
			p, err := New(Config{File: file})
			if err != nil {
				t.Fatalf("a damaged file stops the start: %v", err)
			}
			if p.Stats().Failures["disk"] != 1 || p.Status().Source != "none" {
				t.Errorf("%+v %+v", p.Stats(), p.Status())
			}
		})
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if pods, err := load(file, 10); err != nil || len(pods) != 1 {
		t.Errorf("the undamaged file: %v, %v", pods, err)
	}
}

// A disk that refuses is counted and said, and nothing else suffers.
func TestDiskRefuses(t *testing.T) {
	s := newServer(t)
	s.pods(t, pod(1, "shop", "web"))
	p := start(t, Config{Kubelet: s.server(), File: filepath.Join(t.TempDir(), "none", "pods")})
	until(t, p, "pods are known", p.Answers)
	until(t, p, "the failure is counted", func() bool { return p.Stats().Failures["disk"] > 0 })
	if st := p.Status(); st.Failed["disk"] == "" || found(p, uid(1), id(1)) == "" {
		t.Errorf("status %+v", st)
	}
}

func flip(b []byte, at int) []byte {
	b = append([]byte{}, b...)
	b[at] ^= 1
	return b
}

func TestRunWithoutSources(t *testing.T) {
	p, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Run(ctx); err != nil || p.Answers() || p.Status().Source != "none" {
		t.Errorf("%v, %+v", err, p.Status())
	}
	p.Want(uid(1), "")
	if p.Stats().Wanted != 0 {
		t.Error("something is wanted of nobody")
	}
}

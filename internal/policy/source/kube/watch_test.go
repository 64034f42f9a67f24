package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
	"github.com/procession-dev/procession/internal/testenv"
)

// An apiServer lists and watches policies as the real one does: each change
// has a version, and a watch begins at one. With stream it sends lists as
// watches do, ended by a bookmark.
type apiServer struct {
	t      *testing.T
	stream bool

	mu       sync.Mutex
	version  int
	objects  map[string]map[string]any // by resource/namespace/name
	events   []watchEvent
	oldest   int // versions before it are gone
	away     bool
	missing  map[string]bool // resources the cluster does not have
	changed  chan struct{}
	requests map[string]int
}

type watchEvent struct {
	version  int
	resource string
	Type     string         `json:"type"`
	Object   map[string]any `json:"object"`
}

func newServer(t *testing.T, stream bool) (*apiServer, *Client) {
	s := &apiServer{t: t, stream: stream, version: 100, objects: map[string]map[string]any{}, missing: map[string]bool{},
		changed: make(chan struct{}), requests: map[string]int{}}
	h := httptest.NewServer(s)
	t.Cleanup(func() {
		h.CloseClientConnections()
		h.Close()
	})
	return s, newClient(&rest.Config{Host: h.URL, UserAgent: "test"})
}

func (s *apiServer) do(typ, resource, namespace, name, condition string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	kind := "ClusterDetectionPolicy"
	if namespace != "" {
		kind = "DetectionPolicy"
	}
	o := map[string]any{
		"apiVersion": "procession.dev/v1alpha1", "kind": kind,
		"metadata": map[string]any{"name": name, "namespace": namespace, "generation": s.version, "resourceVersion": fmt.Sprint(s.version),
			"uid": "u", "managedFields": []any{map[string]any{"manager": strings.Repeat("x", 1000)}}},
		"spec":   map[string]any{"rules": []any{map[string]any{"name": "r", "events": []any{"Exec"}, "severity": "Low", "condition": condition}}},
		"status": map[string]any{"observedGeneration": 1},
	}
	key := resource + "/" + namespace + "/" + name
	if s.objects[key] = o; typ == "DELETED" {
		delete(s.objects, key)
	}
	s.events = append(s.events, watchEvent{s.version, resource, typ, o})
	close(s.changed)
	s.changed = make(chan struct{})
}

// forget ends all watches, and makes what happened so far too old to watch from.
func (s *apiServer) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oldest, s.events = s.version, nil
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *apiServer) set(change func(*apiServer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
	close(s.changed)
	s.changed = make(chan struct{})
}

func fail(w http.ResponseWriter, code int, reason string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d,"message":%q}`, reason, code, reason)
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resource := filepath.Base(r.URL.Path)
	q := r.URL.Query()
	s.mu.Lock()
	what := "list"
	if q.Get("watch") != "" {
		what = "watch"
	}
	s.requests[what+" "+resource]++
	away, missing := s.away, s.missing[resource]
	s.mu.Unlock()
	switch {
	case strings.HasSuffix(r.URL.Path, "/configmaps/procession-ca"):
		fmt.Fprint(w, `{"data":{"ca.crt":"PEM"}}`)
	case away:
		fail(w, 503, "ServiceUnavailable")
	case missing || !strings.HasPrefix(r.URL.Path, "/apis/procession.dev/v1alpha1/"):
		fail(w, 404, "NotFound")
	case what == "watch" && q.Get("sendInitialEvents") == "true" && !s.stream:
		fail(w, 422, "Invalid")
	case what == "watch":
		s.watch(w, r, resource, q.Get("resourceVersion"), q.Get("sendInitialEvents") == "true")
	default:
		s.list(w, resource)
	}
}

func (s *apiServer) list(w http.ResponseWriter, resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	items := []any{}
	kind := "ClusterDetectionPolicyList"
	if resource == "detectionpolicies" {
		kind = "DetectionPolicyList"
	}
	for k, o := range s.objects {
		if strings.HasPrefix(k, resource+"/") {
			items = append(items, o)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"kind": kind, "apiVersion": "procession.dev/v1alpha1",
		"metadata": map[string]any{"resourceVersion": fmt.Sprint(s.version)}, "items": items})
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, resource, from string, initial bool) {
	after := 0
	fmt.Sscan(from, &after)
	s.mu.Lock()
	if !initial && after < s.oldest {
		s.mu.Unlock()
		fail(w, 410, "Expired")
		return
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	if initial {
		s.mu.Lock()
		for k, o := range s.objects {
			if strings.HasPrefix(k, resource+"/") {
				enc.Encode(watchEvent{Type: "ADDED", Object: o})
			}
		}
		after = s.version
		s.mu.Unlock()
		kind := "ClusterDetectionPolicy"
		if resource == "detectionpolicies" {
			kind = "DetectionPolicy"
		}
		enc.Encode(watchEvent{Type: "BOOKMARK", Object: map[string]any{"kind": kind, "apiVersion": "procession.dev/v1alpha1",
			"metadata": map[string]any{"resourceVersion": fmt.Sprint(after), "annotations": map[string]any{"k8s.io/initial-events-end": "true"}}}})
	}
	w.(http.Flusher).Flush()
	for {
		s.mu.Lock()
		if s.away || after < s.oldest {
			s.mu.Unlock()
			return
		}
		for _, e := range s.events {
			if e.version > after && e.resource == resource {
				enc.Encode(e)
				after = e.version
			}
		}
		changed := s.changed
		s.mu.Unlock()
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// agent is the watching side.
type agent struct {
	t *testing.T
	w *Watcher

	mu   sync.Mutex
	last source.Update
	took time.Time
}

func start(t *testing.T, c *Client, file string) *agent {
	t.Helper()
	compiler, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	objects := source.NewObjects(file, nil)
	a := &agent{t: t}
	update := func(u source.Update) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.last, a.took = u, time.Now()
	}
	if err := objects.Load(compiler, update); err != nil {
		t.Fatal(err)
	}
	if a.w, err = c.NewWatcher(objects, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.w.Run(ctx, update) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return a
}

// inForce is the rules in force, as "policy=condition".
func (a *agent) inForce() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []string
	if a.last.Set != nil {
		for _, r := range a.last.Set.Rules() {
			all = append(all, strings.TrimPrefix(r.Namespace+"/"+r.Policy, "/")+"="+strings.TrimPrefix(r.Spec.Condition, "process.uid == "))
		}
	}
	return strings.Join(all, " ")
}

func (a *agent) want(what, s string) {
	a.t.Helper()
	testenv.Eventually(a.t, what, func() bool { return a.inForce() == s }, func() string {
		return fmt.Sprintf("in force is %q, want %q; %+v", a.inForce(), s, a.w.Status())
	})
}

const (
	clusterwide = "clusterdetectionpolicies"
	namespaced  = "detectionpolicies"
)

// Policies come, change, break, and go, from API servers of either kind, over
// watches that end and versions that are too old.
func TestWatch(t *testing.T) {
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream=%v", stream), func(t *testing.T) {
			t.Parallel()
			s, c := newServer(t, stream)
			s.do("ADDED", clusterwide, "", "a", "process.uid == 1")
			s.do("ADDED", namespaced, "shop", "a", "process.uid == 2")
			a := start(t, c, "")
			a.want("listed", "a=1 shop/a=2")
			s.do("MODIFIED", clusterwide, "", "a", "process.uid == 3")
			a.want("changed", "a=3 shop/a=2")
			s.do("MODIFIED", clusterwide, "", "a", "process.uuid == 3")
			s.do("ADDED", namespaced, "bank", "b", "process.uid == 4")
			a.want("broken, the last good one stays", "a=3 bank/b=4 shop/a=2")
			s.forget()
			s.do("DELETED", namespaced, "shop", "a", "process.uid == 2")
			a.want("too old, listed again", "a=3 bank/b=4")
			if st := a.w.Status(); !st.Synced || st.Error != "" {
				t.Errorf("status %+v", st)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			for what, n := range s.requests {
				if n > 12 { // a loop would have made hundreds
					t.Errorf("%d times %s", n, what)
				}
			}
		})
	}
}

// A silent API server changes nothing; a restart meanwhile finds the rules on
// disk; what changed in between is found when it answers again.
func TestAway(t *testing.T) {
	s, c := newServer(t, true)
	file := filepath.Join(t.TempDir(), "policies.json")
	s.do("ADDED", clusterwide, "", "a", "process.uid == 1")
	t.Run("before", func(t *testing.T) {
		start(t, c, file).want("listed", "a=1")
	})
	s.set(func(s *apiServer) { s.away = true })
	a := start(t, c, file)
	a.want("from disk", "a=1")
	testenv.Eventually(t, "a failure is counted", func() bool { return a.w.Status().Failures > 0 })
	if st := a.w.Status(); st.Synced || !strings.Contains(st.Error, "policies") && !strings.Contains(st.Error, "Policy") {
		t.Errorf("status %+v", st)
	}
	s.do("MODIFIED", clusterwide, "", "a", "process.uid == 2")
	s.set(func(s *apiServer) { s.away = false })
	a.want("it answers again", "a=2")
}

// A cluster without one of the kinds has the other one.
func TestKindMissing(t *testing.T) {
	s, c := newServer(t, false)
	s.missing[namespaced] = true
	s.do("ADDED", clusterwide, "", "a", "process.uid == 1")
	a := start(t, c, "")
	a.want("the kind that is there", "a=1")
	s.do("MODIFIED", clusterwide, "", "a", "process.uid == 3")
	a.want("it goes on", "a=3")
	if st := a.w.Status(); st.Synced || !strings.HasPrefix(st.Error, "DetectionPolicy: ") {
		t.Errorf("status %+v does not say that the other one is missing", st)
	}
	s.do("ADDED", namespaced, "shop", "b", "process.uid == 2")
	s.set(func(s *apiServer) { s.missing[namespaced] = false })
	a.want("the other one came", "a=3 shop/b=2")
	if st := a.w.Status(); !st.Synced || st.Error != "" {
		t.Errorf("status %+v", st)
	}
}

// A field that this version does not know is refused, not dropped.
func TestUnknownField(t *testing.T) {
	s, c := newServer(t, true)
	s.do("ADDED", clusterwide, "", "a", "process.uid == 1")
	s.do("ADDED", clusterwide, "", "b", "process.uid == 1")
	s.mu.Lock()
	s.objects[clusterwide+"//b"]["spec"].(map[string]any)["onlyOnMondays"] = true
	s.mu.Unlock()
	a := start(t, c, "")
	a.want("the one that is understood", "a=1")
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, f := range a.last.Files {
		if f.Err != nil && strings.Contains(f.Err.Error(), "onlyOnMondays") {
			return
		}
	}
	t.Errorf("nothing names the unknown field: %+v", a.last.Files)
}

func TestConfigMapKey(t *testing.T) {
	_, c := newServer(t, false)
	if b, err := c.ConfigMapKey(t.Context(), "ns", "procession-ca", "ca.crt"); string(b) != "PEM" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := c.ConfigMapKey(t.Context(), "ns", "procession-ca", "other"); err == nil || !strings.Contains(err.Error(), "has no other yet") {
		t.Errorf("no such key: %v", err)
	}
	if _, err := c.ConfigMapKey(t.Context(), "ns", "gone", "ca.crt"); err == nil || !strings.Contains(err.Error(), "ns/gone") {
		t.Errorf("no such object: %v", err)
	}
}

// Labels of namespaces are told at the start and after each change.
func TestWatchNamespaces(t *testing.T) {
	next := make(chan string)
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/namespaces" || !strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata") {
			t.Errorf("asked for %s as %s", r.URL.Path, r.Header.Get("Accept"))
		}
		w.Header().Set("Content-Type", "application/json")
		switch q := r.URL.Query(); {
		case q.Get("sendInitialEvents") == "true":
			fail(w, 422, "Invalid")
		case q.Get("watch") == "":
			fmt.Fprint(w, `{"kind":"PartialObjectMetadataList","apiVersion":"meta.k8s.io/v1","metadata":{"resourceVersion":"5"},"items":[{"metadata":{"name":"shop","labels":{"team":"a"}}},{"metadata":{"name":"bank"}}]}`)
		default:
			w.(http.Flusher).Flush()
			for {
				select {
				case e := <-next:
					fmt.Fprintln(w, e)
					w.(http.Flusher).Flush()
				case <-r.Context().Done():
					return
				}
			}
		}
	}))
	defer h.Close()
	defer h.CloseClientConnections()
	told := make(chan map[string]map[string]string, 10)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go newClient(&rest.Config{Host: h.URL}).WatchNamespaces(ctx, slog.New(slog.DiscardHandler), func(l map[string]map[string]string) { told <- l })
	want := func(want map[string]map[string]string) {
		t.Helper()
		select {
		case got := <-told:
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		case <-time.After(60 * time.Second):
			t.Fatal("nothing was told")
		}
	}
	want(map[string]map[string]string{"shop": {"team": "a"}, "bank": {}})
	event := func(typ, name, labels string) {
		next <- fmt.Sprintf(`{"type":%q,"object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":%q,"resourceVersion":"6","labels":%s}}}`, typ, name, labels)
	}
	event("MODIFIED", "shop", `{"team":"b"}`)
	want(map[string]map[string]string{"shop": {"team": "b"}, "bank": {}})
	event("DELETED", "bank", `{}`)
	want(map[string]map[string]string{"shop": {"team": "b"}})
}

func TestNodeLabels(t *testing.T) {
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path != "/api/v1/nodes/node1" || !strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata") {
			fail(w, 404, "NotFound")
			return
		}
		fmt.Fprint(w, `{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"node1","labels":{"zone":"a"}}}`)
	}))
	defer h.Close()
	c := newClient(&rest.Config{Host: h.URL})
	got, err := c.NodeLabels(t.Context(), "node1")
	if d := cmp.Diff(map[string]string{"zone": "a"}, got); d != "" || err != nil {
		t.Errorf("%v %s", err, d)
	}
	if _, err := c.NodeLabels(t.Context(), "node2"); err == nil || !strings.Contains(err.Error(), "node2") {
		t.Errorf("another node: %v", err)
	}
}

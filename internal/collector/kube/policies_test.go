package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/collector/policystatus"
	"github.com/procession-dev/procession/internal/testenv"
)

// A policyServer lists and watches policies, and takes their status.
type policyServer struct {
	t *testing.T

	mu      sync.Mutex
	version int
	items   map[string][]any // by resource, for lists
	watches map[string][]chan any
	away    bool
	patches []string
	answer  int // to patches; 0 is 200
}

func newPolicyServer(t *testing.T) (*policyServer, *Policies) {
	s := &policyServer{t: t, version: 1, items: map[string][]any{}, watches: map[string][]chan any{}}
	h := httptest.NewServer(s)
	t.Cleanup(func() { h.CloseClientConnections(); h.Close() })
	c, err := newClient(&rest.Config{Host: h.URL})
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Policies(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s, p
}

func policyJSON(kind, namespace, name string, version int, spec any) map[string]any {
	return map[string]any{"apiVersion": v1alpha1.APIVersion, "kind": kind,
		"metadata": map[string]any{"name": name, "namespace": namespace, "uid": "uid-" + name, "generation": version, "resourceVersion": fmt.Sprint(version)},
		"spec":     spec, "status": map[string]any{"observedGeneration": 1, "nodes": map[string]any{"desired": 3}}}
}

// tell sends an event to everybody who watches.
func (s *policyServer) tell(resource, typ string, object map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.watches[resource] {
		w <- map[string]any{"type": typ, "object": object}
	}
}

func (s *policyServer) watching(resource string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.watches[resource]) > 0
}

func (s *policyServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	w.Header().Set("Content-Type", "application/json")
	fail := func(code int, reason string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d,"message":%q}`, reason, code, reason)
	}
	s.mu.Lock()
	away, answer := s.away, s.answer
	s.mu.Unlock()
	switch {
	case away:
		fail(http.StatusServiceUnavailable, "ServiceUnavailable")
	case r.Method == http.MethodPatch:
		body, _ := io.ReadAll(r.Body)
		s.mu.Lock()
		s.patches = append(s.patches, fmt.Sprint(r.URL.Path, " ", r.URL.RawQuery, " ", r.Header.Get("Content-Type"), " ", string(body)))
		s.mu.Unlock()
		if answer != 0 {
			fail(answer, map[int]string{404: "NotFound", 409: "Conflict", 403: "Forbidden"}[answer])
			return
		}
		fmt.Fprint(w, "{}")
	case r.URL.Query().Get("sendInitialEvents") != "":
		fail(http.StatusUnprocessableEntity, "Invalid") // an older server: it lists
	case r.URL.Query().Get("watch") != "":
		events := make(chan any, 10)
		s.mu.Lock()
		s.watches[resource] = append(s.watches[resource], events)
		s.mu.Unlock()
		w.(http.Flusher).Flush()
		for {
			select {
			case e := <-events:
				json.NewEncoder(w).Encode(e)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	default:
		s.mu.Lock()
		kind := map[string]string{"clusterdetectionpolicies": "ClusterDetectionPolicyList", "detectionpolicies": "DetectionPolicyList"}[resource]
		json.NewEncoder(w).Encode(map[string]any{"apiVersion": v1alpha1.APIVersion, "kind": kind, "metadata": map[string]any{"resourceVersion": "1"}, "items": append([]any{}, s.items[resource]...)})
		s.mu.Unlock()
	}
}

// Policies of both kinds are known as they are in the cluster, odd ones among
// them, and changes are told by the watch.
func TestPolicies(t *testing.T) {
	s, p := newPolicyServer(t)
	rules := map[string]any{"mode": "DryRun", "rules": []any{map[string]any{"name": "r", "mode": "Alert", "condition": "true"}}}
	s.items["clusterdetectionpolicies"] = []any{policyJSON("ClusterDetectionPolicy", "", "a", 1, rules),
		policyJSON("ClusterDetectionPolicy", "", "odd", 1, map[string]any{"rules": "of another version"})}
	s.away = true
	if _, ok := p.Policies(); ok {
		t.Error("policies are known before they were asked for")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { p.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	if _, ok := p.Policies(); ok {
		t.Error("policies are known of a server that is away")
	}
	s.mu.Lock()
	s.away = false
	s.mu.Unlock()
	objects := func() (out []string) {
		all, ok := p.Policies()
		if !ok {
			return nil
		}
		for _, o := range all {
			out = append(out, fmt.Sprintf("%s@%d", o.Object(), o.Generation))
		}
		slices.Sort(out)
		return out
	}
	expect := func(what string, want ...string) {
		t.Helper()
		testenv.Eventually(t, what, func() bool { return cmp.Equal(want, objects()) })
	}
	expect("the list", "ClusterDetectionPolicy/a@1", "ClusterDetectionPolicy/odd@1")
	all, _ := p.Policies()
	for _, o := range all {
		want := &policystatus.Policy{Kind: "ClusterDetectionPolicy", Name: o.Name, UID: "uid-" + o.Name, Generation: 1,
			Status: v1alpha1.PolicyStatus{ObservedGeneration: 1, Nodes: v1alpha1.NodeCounts{Desired: 3}}}
		if o.Name == "a" {
			want.Mode, want.Rules = "DryRun", []policystatus.Rule{{Name: "r", Mode: "Alert"}}
		}
		if d := cmp.Diff(want, o); d != "" {
			t.Errorf("policy (-want +got):\n%s", d)
		}
	}
	testenv.Eventually(t, "both are watched", func() bool { return s.watching("clusterdetectionpolicies") && s.watching("detectionpolicies") })
	s.tell("clusterdetectionpolicies", "MODIFIED", policyJSON("ClusterDetectionPolicy", "", "a", 2, rules))
	s.tell("clusterdetectionpolicies", "DELETED", policyJSON("ClusterDetectionPolicy", "", "odd", 3, rules))
	s.tell("detectionpolicies", "ADDED", policyJSON("DetectionPolicy", "shop", "a", 4, rules))
	expect("what was told", "ClusterDetectionPolicy/a@2", "DetectionPolicy/shop/a@4")
}

// The status alone is written, to this object and to no other of its name.
func TestApplyStatus(t *testing.T) {
	s, p := newPolicyServer(t)
	status := &v1alpha1.PolicyStatus{ObservedGeneration: 3}
	for _, tc := range []struct {
		policy policystatus.Policy
		path   string
	}{
		{policystatus.Policy{Kind: "ClusterDetectionPolicy", Name: "a", UID: "u1"}, "/apis/procession.dev/v1alpha1/clusterdetectionpolicies/a/status"},
		{policystatus.Policy{Kind: "DetectionPolicy", Namespace: "shop", Name: "a", UID: "u2"}, "/apis/procession.dev/v1alpha1/namespaces/shop/detectionpolicies/a/status"},
	} {
		s.patches = nil
		if err := p.ApplyStatus(t.Context(), &tc.policy, status); err != nil {
			t.Fatal(err)
		}
		namespace := ""
		if tc.policy.Namespace != "" {
			namespace = `"namespace":"shop",`
		}
		want := tc.path + " fieldManager=procession-collector&force=true&timeout=10s application/apply-patch+yaml " +
			`{"apiVersion":"procession.dev/v1alpha1","kind":"` + tc.policy.Kind + `","metadata":{"name":"a",` + namespace + `"uid":"` + tc.policy.UID + `"},"status":{"observedGeneration":3,"matches":0}}`
		if d := cmp.Diff([]string{want}, s.patches); d != "" {
			t.Errorf("request (-want +got):\n%s", d)
		}
	}
	for code, gone := range map[int]bool{404: true, 409: true, 403: false} {
		s.answer = code
		err := p.ApplyStatus(t.Context(), &policystatus.Policy{Kind: "ClusterDetectionPolicy", Name: "a"}, status)
		if err == nil || errors.Is(err, policystatus.ErrGone) != gone || !strings.Contains(err.Error(), "ClusterDetectionPolicy/a") {
			t.Errorf("%d: %v", code, err)
		}
	}
}

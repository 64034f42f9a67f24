package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/internal/ingest/token"
	"github.com/procession-dev/procession/internal/pki"
)

// An apiServer has objects, and answers in the API server's words. Patches are
// merged and refused on a version that is not the present one.
type apiServer struct {
	t       *testing.T
	mu      sync.Mutex
	objects map[string]map[string]any // by path
	version int
	review  func(*authv1.TokenReview)
	refuse  map[string]int // status by path
	seen    []string       // method and path
}

var (
	secret = Ref{"procession-system", "procession-ca-key"}
	bundle = Ref{"procession-system", "procession-ca"}
)

const (
	secretPath = "/api/v1/namespaces/procession-system/secrets/procession-ca-key"
	bundlePath = "/api/v1/namespaces/procession-system/configmaps/procession-ca"
)

func newServer(t *testing.T) (*apiServer, *Client) {
	s := &apiServer{t: t, objects: map[string]map[string]any{secretPath: {}, bundlePath: {}}, refuse: map[string]int{}}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	c, err := newClient(&rest.Config{Host: h.URL, BearerToken: "collector"})
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, r.Method+" "+r.URL.Path)
	body, _ := io.ReadAll(r.Body)
	if code := s.refuse[r.URL.Path]; code != 0 {
		s.status(w, code)
		return
	}
	if r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews" && r.Method == http.MethodPost {
		var tr authv1.TokenReview
		if err := json.Unmarshal(body, &tr); err != nil || r.Header.Get("Authorization") != "Bearer collector" {
			s.t.Errorf("review %s: %v", body, err)
		}
		s.review(&tr)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(tr)
		return
	}
	o, ok := s.objects[r.URL.Path]
	switch {
	case !ok:
		s.status(w, http.StatusNotFound)
		return
	case r.Method == http.MethodPatch:
		if ct := r.Header.Get("Content-Type"); ct == "application/apply-patch+yaml" {
			o = map[string]any{}
		} else if ct != "application/merge-patch+json" {
			s.t.Errorf("content type %s", ct)
		}
		var p map[string]any
		if err := json.Unmarshal(body, &p); err != nil {
			s.t.Errorf("patch %s: %v", body, err)
		}
		meta, _ := p["metadata"].(map[string]any)
		if v, ok := meta["resourceVersion"]; ok && v != s.versionOf(o) {
			s.status(w, http.StatusConflict)
			return
		}
		o = merge(o, p)
		s.version++
		o["metadata"] = map[string]any{"resourceVersion": fmt.Sprint(s.version)}
		s.objects[r.URL.Path] = o
	}
	if _, ok := o["metadata"]; !ok {
		s.version++
		o["metadata"] = map[string]any{"resourceVersion": fmt.Sprint(s.version)}
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(o)
}

func (s *apiServer) versionOf(o map[string]any) any {
	m, _ := o["metadata"].(map[string]any)
	return m["resourceVersion"]
}

// merge is RFC 7396.
func merge(have, patch map[string]any) map[string]any {
	out := maps.Clone(have)
	if out == nil {
		out = map[string]any{}
	}
	for k, v := range patch {
		switch v := v.(type) {
		case nil:
			delete(out, k)
		case map[string]any:
			sub, _ := out[k].(map[string]any)
			out[k] = merge(sub, v)
		default:
			out[k] = v
		}
	}
	return out
}

func (s *apiServer) status(w http.ResponseWriter, code int) {
	reasons := map[int]metav1.StatusReason{404: metav1.StatusReasonNotFound, 409: metav1.StatusReasonConflict, 403: metav1.StatusReasonForbidden}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reasons[code], Message: http.StatusText(code)})
}

func (s *apiServer) set(change func(*apiServer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *apiServer) data(path, key string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, _ := s.objects[path]["data"].(map[string]any)
	v, ok := d[key].(string)
	return v, ok
}

func TestReviewToken(t *testing.T) {
	s, c := newServer(t)
	s.review = func(r *authv1.TokenReview) {
		if r.Kind != "TokenReview" || r.APIVersion != "authentication.k8s.io/v1" || r.Spec.Token != "shown" || !cmp.Equal(r.Spec.Audiences, []string{"aud"}) {
			t.Errorf("asked %+v", r)
		}
		r.Status = authv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"aud"}, User: authv1.UserInfo{Username: "system:serviceaccount:a:b",
			Extra: map[string]authv1.ExtraValue{"authentication.kubernetes.io/node-name": {"node1"}}}}
	}
	got, err := c.ReviewToken(t.Context(), "shown", "aud")
	want := token.Review{Authenticated: true, Username: "system:serviceaccount:a:b", Audiences: []string{"aud"},
		Extra: map[string][]string{"authentication.kubernetes.io/node-name": {"node1"}}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
	s.set(func(s *apiServer) { s.refuse["/apis/authentication.k8s.io/v1/tokenreviews"] = 403 })
	if _, err := c.ReviewToken(t.Context(), "shown", "aud"); err == nil || !strings.Contains(err.Error(), "review a token") {
		t.Errorf("forbidden: %v", err)
	}
	for _, answer := range []string{"", "{", "[]", `{"status":{"authenticated":"yes"}}`} {
		h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, answer)
		}))
		c, err := newClient(&rest.Config{Host: h.URL})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := c.ReviewToken(t.Context(), "x", "y"); err == nil {
			t.Errorf("answer %q: %+v, want an error", answer, r)
		}
		h.Close()
		if _, err := c.ReviewToken(t.Context(), "x", "y"); err == nil {
			t.Error("no server: no error")
		}
	}
}

func TestPodNode(t *testing.T) {
	s, c := newServer(t)
	s.objects["/api/v1/namespaces/ns/pods/agent-x"] = map[string]any{
		"metadata": map[string]any{"uid": "u-1", "resourceVersion": "1"}, "spec": map[string]any{"nodeName": "node7"}}
	uid, node, ok, err := c.PodNode(t.Context(), "ns", "agent-x")
	if uid != "u-1" || node != "node7" || !ok || err != nil {
		t.Errorf("%q, %q, %v, %v", uid, node, ok, err)
	}
	if _, _, ok, err := c.PodNode(t.Context(), "ns", "gone"); ok || err != nil {
		t.Errorf("no such pod: %v, %v", ok, err)
	}
	s.set(func(s *apiServer) { s.refuse["/api/v1/namespaces/ns/pods/agent-x"] = 500 })
	if _, _, _, err := c.PodNode(t.Context(), "ns", "agent-x"); err == nil {
		t.Error("a failing API server: no error")
	}
}

// Collectors that start at once agree on one authority; its key is in the
// Secret and nowhere else, its bundle in the ConfigMap.
func TestStorage(t *testing.T) {
	s, c := newServer(t)
	var wg sync.WaitGroup
	bundles := make([]string, 5)
	for i := range bundles {
		wg.Go(func() {
			a, err := pki.OpenStorage(c.Storage(secret, bundle))
			if err != nil {
				t.Errorf("open: %v", err)
				return
			}
			b, err := a.Bundle()
			if err != nil {
				t.Errorf("bundle: %v", err)
			}
			bundles[i] = string(b)
		})
	}
	wg.Wait()
	published, _ := s.data(bundlePath, "ca.crt")
	for _, b := range bundles {
		if b == "" || b != published {
			t.Fatalf("a bundle that is not the published one:\n%s\n%s", b, published)
		}
	}
	if _, ok := s.data(secretPath, "ca.pem"); !ok {
		t.Error("no key in the Secret")
	}
	if _, ok := s.data(bundlePath, "ca.pem"); ok || strings.Contains(published, "PRIVATE") {
		t.Error("the key is published")
	}
	s.set(func(s *apiServer) { s.seen = nil })
	if _, err := pki.OpenStorage(c.Storage(secret, bundle)); err != nil {
		t.Error(err)
	}
	if d := cmp.Diff([]string{"GET " + secretPath, "GET " + bundlePath}, s.seen); d != "" {
		t.Errorf("requests when nothing is due (-want +got):\n%s", d)
	}
}

// What others do to the objects is put right, or named.
func TestStorageSpoilt(t *testing.T) {
	s, c := newServer(t)
	a, err := pki.OpenStorage(c.Storage(secret, bundle))
	if err != nil {
		t.Fatal(err)
	}
	first, _ := s.data(bundlePath, "ca.crt")

	s.set(func(s *apiServer) { s.objects[bundlePath] = map[string]any{} })
	if err := a.Refresh(); err != nil {
		t.Error(err)
	}
	if got, _ := s.data(bundlePath, "ca.crt"); got != first {
		t.Errorf("an emptied bundle became %q", got)
	}

	s.set(func(s *apiServer) { s.objects[secretPath] = map[string]any{} })
	if err := a.Refresh(); err != nil {
		t.Error(err)
	}
	second, _ := s.data(bundlePath, "ca.crt")
	if second == first {
		t.Error("an emptied Secret made no new authority")
	}
	if b, _ := a.Bundle(); string(b) != second {
		t.Error("the running authority did not follow")
	}

	for code, want := range map[int]string{404: "helm upgrade brings it back", 403: "the chart's Role allows it", 500: secret.String()} {
		s.set(func(s *apiServer) { s.refuse[secretPath] = code })
		if err := a.Refresh(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d: %v, want %q", code, err, want)
		}
	}
	if b, err := a.Bundle(); string(b) != second || err != nil {
		t.Errorf("after failures: %v", err)
	}
}

func TestApplyCRD(t *testing.T) {
	s, c := newServer(t)
	const p = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/x.procession.dev"
	s.objects[p] = map[string]any{"spec": map[string]any{"old": true}}
	if err := c.ApplyCRD(t.Context(), "x.procession.dev", []byte(`{"spec":{"new":true}}`)); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]any{"new": true}, s.objects[p]["spec"]); d != "" {
		t.Error(d)
	}
	if err := c.ApplyCRD(t.Context(), "gone", []byte(`{}`)); err == nil || !strings.Contains(err.Error(), "gone") {
		t.Errorf("no such definition: %v", err)
	}
}

// An API server that accepts and says nothing costs the request's time.
func TestSilent(t *testing.T) {
	hold := make(chan struct{})
	h := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hold }))
	defer h.Close()
	defer close(hold)
	cfg := &rest.Config{Host: h.URL}
	c, err := newClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Timeout != RequestTimeout {
		t.Errorf("timeout %v", cfg.Timeout)
	}
	done := make(chan error, 1)
	short, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	go func() {
		_, err := c.ReviewToken(short, "x", "y")
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil {
			t.Error("no error")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("a silent API server holds the caller")
	}
}

package ingest_test

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/ingest/token"
	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/store/storetest"
)

const (
	audience = "procession.test.collector"
	account  = "system:serviceaccount:test:agent"
)

// An apiServer confirms the tokens it has made, until they are revoked.
type apiServer struct {
	mu     sync.Mutex
	nodes  map[string]string // by token
	silent bool
	made   int
	asked  map[string]int // by token
}

// token makes one that is good for a node. "" makes one that is not genuine.
func (a *apiServer) token(node string, life time.Duration) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.made++
	body := fmt.Sprintf(`{"aud":[%q],"sub":%q,"exp":%d,"jti":"%d"}`, audience, account, time.Now().Add(life).Unix(), a.made)
	t := "e30." + base64.RawURLEncoding.EncodeToString([]byte(body)) + ".c2ln"
	if node != "" {
		a.nodes[t] = node
	}
	return t
}

func (a *apiServer) ReviewToken(_ context.Context, t, _ string) (token.Review, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked[t]++
	if a.silent {
		return token.Review{}, errors.New("connection refused")
	}
	node, ok := a.nodes[t]
	if !ok {
		return token.Review{Error: "invalid bearer token"}, nil
	}
	return token.Review{Authenticated: true, Username: account, Audiences: []string{audience},
		Extra: map[string][]string{"authentication.kubernetes.io/node-name": {node}}}, nil
}

func (a *apiServer) PodNode(context.Context, string, string) (string, string, bool, error) {
	return "", "", false, nil
}

func (a *apiServer) set(change func(*apiServer)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change(a)
}

func (a *apiServer) count(t string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[t]
}

// startTokens starts a collector end that takes tokens and certificates.
func startTokens(t *testing.T, fresh time.Duration) (*server, *apiServer) {
	t.Helper()
	api := &apiServer{nodes: map[string]string{}, asked: map[string]int{}}
	v, err := token.New(token.Config{API: api, Audience: audience, Accounts: []string{account}, CheckNode: pki.CheckNode, Fresh: fresh})
	if err != nil {
		t.Fatal(err)
	}
	s := startWith(t, storetest.Dir(t), nil, tls.VerifyClientCertIfGiven, func(c *ingest.Config) {
		c.Tokens, c.TokenRetry = v, 20*time.Millisecond
	})
	return s, api
}

// speak opens a stream with what stands in the authorization headers, and says
// hello.
func (s *server) speak(authorization ...string) ingesttest.Stream {
	s.t.Helper()
	st := s.open(authorization...)
	st.Send(ingesttest.Hello("claimed", lane(epoch, 1)))
	return st
}

func (s *server) open(authorization ...string) ingesttest.Stream {
	s.t.Helper()
	s.creds("any")
	creds := credentials.NewTLS(&tls.Config{RootCAs: ingesttest.Roots(s.t, filepath.Join(s.dir, "tls-any"))})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	s.t.Cleanup(cancel)
	for _, a := range authorization {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", a)
	}
	st, err := pb.NewIngestServiceClient(ingesttest.Dial(s.t, s.addr, creds)).Stream(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func TestTokensRefused(t *testing.T) {
	s, api := startTokens(t, 0)
	claims := func(c string) string {
		return "Bearer e30." + base64.RawURLEncoding.EncodeToString([]byte(c)) + ".c2ln"
	}
	ends := time.Now().Add(time.Hour).Unix()
	tests := []struct {
		name   string
		shown  []string
		reason string
		code   codes.Code
		text   string
	}{
		{"no token", nil, "no_token", codes.Unauthenticated, "no token was shown"},
		{"empty", []string{"Bearer "}, "no_token", codes.Unauthenticated, "no token was shown"},
		{"a password", []string{"Basic YTpi"}, "malformed", codes.Unauthenticated, "not a bearer token"},
		{"two", []string{"Bearer a", "Bearer b"}, "malformed", codes.Unauthenticated, "more than one"},
		{"nonsense", []string{"Bearer x"}, "malformed", codes.Unauthenticated, "not a service account's token"},
		{"wrong audience", []string{claims(fmt.Sprintf(`{"aud":["other"],"sub":%q,"exp":%d}`, account, ends))}, "wrong_audience", codes.Unauthenticated, `["other"]`},
		{"wrong account", []string{claims(fmt.Sprintf(`{"aud":[%q],"sub":"system:serviceaccount:kube-system:x","exp":%d}`, audience, ends))}, "wrong_account", codes.Unauthenticated, "kube-system:x"},
		{"expired", []string{claims(fmt.Sprintf(`{"aud":[%q],"sub":%q,"exp":1500000000}`, audience, account))}, "expired", codes.Unauthenticated, "2017-07-14"},
		{"not genuine", []string{"Bearer " + api.token("", time.Hour)}, "rejected", codes.Unauthenticated, "invalid bearer token"},
		{"a node that cannot be", []string{"Bearer " + api.token("a/b", time.Hour)}, "no_node", codes.Unauthenticated, "letters"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := s.counter("procession_collector_streams_refused_total", tt.reason)
			_, err := s.speak(tt.shown...).Recv()
			if status.Code(err) != tt.code || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("told %v, want %v with %q", err, tt.code, tt.text)
			}
			if n := s.counter("procession_collector_streams_refused_total", tt.reason) - before; n != 1 {
				t.Errorf("counted %v times as %s, want once", n, tt.reason)
			}
		})
	}
	api.set(func(a *apiServer) { a.silent = true })
	if _, err := s.speak("Bearer " + api.token("n", time.Hour)).Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("with a silent API server: %v, want Unavailable", err)
	}
}

// The token decides whose alerts these are. A certificate is taken as well,
// and has its own name.
func TestTokenIdentity(t *testing.T) {
	s, api := startTokens(t, 0)
	st := s.speak("bearer " + api.token("honest", time.Hour))
	if w := recv(t, st).GetWelcome(); !w.GetReauth() {
		t.Errorf("welcome %v does not ask for new tokens", w)
	}
	send(t, st, ingesttest.Batch(epoch, records(t, "victim", 1, 1)))
	recv(t, st)
	if rs := storetest.All(t, s.st); len(rs) != 1 || rs[0].Node != "honest" {
		t.Errorf("stored %+v, want it for node honest", rs)
	}
	if n := s.counter("procession_collector_identity_mismatches_total", ""); n != 1 {
		t.Errorf("identity_mismatches_total %v, want 1", n)
	}
	cert := s.stream("certified")
	send(t, cert, ingesttest.Hello("certified", lane(epoch, 1)))
	if w := recv(t, cert).GetWelcome(); w == nil || w.GetReauth() || w.GetResume()[0].GetAfter() != 0 {
		t.Errorf("welcome %v, want one without reauth and for another node", w)
	}
	send(t, cert, &pb.StreamRequest{Message: &pb.StreamRequest_Reauth{Reauth: &pb.Reauth{Token: "x"}}})
	if _, err := cert.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a reauth on a stream with a certificate: %v", err)
	}
}

func reauth(t string) *pb.StreamRequest {
	return &pb.StreamRequest{Message: &pb.StreamRequest_Reauth{Reauth: &pb.Reauth{Token: t}}}
}

// A stream outlives its token when a newer one is shown, and ends when that is
// refused or the pod is gone.
func TestReauth(t *testing.T) {
	s, api := startTokens(t, 50*time.Millisecond)
	first := api.token("n", time.Hour)
	looks := func(result string) float64 {
		return s.counter("procession_collector_token_rechecks_total", result)
	}
	st := s.speak("Bearer " + first)
	recv(t, st)
	eventually(t, "the first token is looked at again", func() bool { return looks("ok") >= 2 })
	second := api.token("n", time.Hour)
	send(t, st, reauth(second))
	eventually(t, "the second token is looked at", func() bool { return api.count(second) > 0 })
	api.set(func(a *apiServer) { delete(a.nodes, first) })
	n := api.count(second)
	eventually(t, "the stream lives on the second token", func() bool { return api.count(second) > n+2 })

	// Silence: it goes on, also with a third token that nobody can confirm.
	api.set(func(a *apiServer) { a.silent = true })
	eventually(t, "the API server is silent", func() bool { return looks("stale") >= 1 })
	third := api.token("n", time.Hour)
	send(t, st, reauth(third))
	eventually(t, "the third token is asked about", func() bool { return api.count(third) > 1 })
	send(t, st, ingesttest.Batch(epoch, records(t, "n", 1, 1)))
	if m := recv(t, st); m.GetAck().GetUpTo() != 1 {
		t.Errorf("%v during the silence, want an ack", m)
	}
	// A node that was let in before is let in again; another one is not.
	again := s.speak("Bearer " + second)
	if recv(t, again).GetWelcome() == nil {
		t.Error("a confirmed token was not let in during the silence")
	}
	if _, err := s.speak("Bearer " + api.token("other", time.Hour)).Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("an unconfirmed token during the silence: %v, want Unavailable", err)
	}
	api.set(func(a *apiServer) { a.silent = false })
	n = api.count(third)
	eventually(t, "the stream lives on the third token", func() bool { return api.count(third) > n+2 })
	api.set(func(a *apiServer) { delete(a.nodes, third) })
	if _, err := st.Recv(); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "rejected") {
		t.Errorf("after the pod is gone: %v, want Unauthenticated, rejected", err)
	}
	if looks("rejected") != 1 {
		t.Errorf("%v looks that were rejected, want 1", looks("rejected"))
	}
}

// A token of another node does not take a stream over.
func TestReauthOtherNode(t *testing.T) {
	s, api := startTokens(t, 0)
	st := s.speak("Bearer " + api.token("n", time.Hour))
	recv(t, st)
	send(t, st, reauth(api.token("victim", time.Hour)))
	if _, err := st.Recv(); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "other_node") {
		t.Errorf("%v, want PermissionDenied, other_node", err)
	}
	if n := s.counter("procession_collector_token_rechecks_total", "other_node"); n != 1 {
		t.Errorf("counted %v times, want once", n)
	}
}

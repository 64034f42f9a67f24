package token

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	audience = "procession.procession-system.collector"
	account  = "system:serviceaccount:procession-system:procession-agent"
)

type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) step(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// server answers as an API server does.
type server struct {
	mu      sync.Mutex
	review  Review
	err     error
	uid     string
	node    string
	asked   int
	looked  int
	hold    chan struct{} // when set, answers wait for it
	started chan struct{} // told when a question comes
}

func (s *server) ReviewToken(ctx context.Context, _, aud string) (Review, error) {
	s.mu.Lock()
	s.asked++
	hold := s.hold
	s.mu.Unlock()
	if s.started != nil {
		s.started <- struct{}{}
	}
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return Review{}, ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if aud != audience {
		return Review{}, fmt.Errorf("asked for audience %q", aud)
	}
	return s.review, s.err
}

func (s *server) PodNode(_ context.Context, namespace, name string) (uid, node string, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.looked++
	if namespace != "procession-system" || name != "agent-x" {
		return "", "", false, nil
	}
	return s.uid, s.node, true, s.err
}

func (s *server) set(change func(*server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func good() Review {
	return Review{Authenticated: true, Username: account, Audiences: []string{audience},
		Extra: map[string][]string{extraNode: {"node1"}, extraPod: {"agent-x"}, extraUID: {"uid-1"}}}
}

// made is a token that says so about itself.
func made(t testing.TB, claims map[string]any) string {
	t.Helper()
	b, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return "e30." + base64.RawURLEncoding.EncodeToString(b) + ".c2ln"
}

func start() *clock { return &clock{t: time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)} }

func agentToken(t testing.TB, c *clock, life time.Duration) string {
	return made(t, map[string]any{"aud": []string{audience}, "sub": account, "exp": c.now().Add(life).Unix(), "jti": fmt.Sprint(c.now().UnixNano(), life)})
}

func newVerifier(t testing.TB, s *server, c *clock, change func(*Config)) *Verifier {
	t.Helper()
	cfg := Config{API: s, Audience: audience, Accounts: []string{account}, PodLookup: true, PerSecond: 1e6, now: c.now,
		CheckNode: func(n string) error {
			if strings.Contains(n, "/") {
				return errors.New("a slash")
			}
			return nil
		}}
	if change != nil {
		change(&cfg)
	}
	v, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func reason(err error) Reason {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r.Reason
	}
	return ""
}

func TestVerify(t *testing.T) {
	c := start()
	claims := func(change func(m map[string]any)) string {
		m := map[string]any{"aud": []string{audience}, "sub": account, "exp": c.now().Add(10 * time.Minute).Unix()}
		change(m)
		return made(t, m)
	}
	answer := func(change func(r *Review)) func(*server) {
		return func(s *server) { change(&s.review) }
	}
	tests := []struct {
		name  string
		token string // "" is a good one
		set   func(*server)
		cfg   func(*Config)
		want  Reason // "" is accepted
		text  string // in the message, or the node
		asked int
	}{
		{name: "malformed: no dots", token: "abc", want: Malformed, text: "three parts"},
		{name: "malformed: not base64", token: "a.!.c", want: Malformed, text: "base64"},
		{name: "malformed: not JSON", token: "a.YQ.c", want: Malformed, text: "second part"},
		{name: "malformed: too long", token: strings.Repeat("a", maxToken+1), want: Malformed, text: "limit 16384"},
		{name: "malformed: no end", token: claims(func(m map[string]any) { delete(m, "exp") }), want: Malformed, text: "exp"},
		{name: "malformed: end in another age", token: claims(func(m map[string]any) { m["exp"] = 1e30 }), want: Malformed, text: "exp"},
		{name: "expired", token: claims(func(m map[string]any) { m["exp"] = c.now().Add(-2 * time.Minute).Unix() }), want: Expired, text: "ended at 2026-05-01T11:58:00Z"},
		{name: "expired a moment ago by this clock", token: claims(func(m map[string]any) { m["exp"] = c.now().Add(-30 * time.Second).Unix() }), text: "node1", asked: 1},
		{name: "another audience", token: claims(func(m map[string]any) { m["aud"] = "https://kubernetes.default.svc" }), want: WrongAudience, text: "https://kubernetes.default.svc"},
		{name: "no audience", token: claims(func(m map[string]any) { delete(m, "aud") }), want: WrongAudience, text: audience},
		{name: "audience as text", token: claims(func(m map[string]any) { m["aud"] = audience }), text: "node1", asked: 1},
		{name: "another account", token: claims(func(m map[string]any) { m["sub"] = "system:serviceaccount:default:default" }), want: WrongAccount, text: "default:default"},
		{name: "says it is ours, and is not genuine", set: answer(func(r *Review) {
			*r = Review{Error: "invalid bearer token"}
		}), want: Rejected, text: "invalid bearer token", asked: 1},
		{name: "says it is ours, and is another account's", set: answer(func(r *Review) { r.Username = "system:serviceaccount:default:default" }), want: WrongAccount, text: "default:default", asked: 1},
		{name: "an account whose name begins the same", set: answer(func(r *Review) { r.Username = account + "-x" }), want: WrongAccount, asked: 1},
		{name: "the answer has no audience", set: answer(func(r *Review) { r.Audiences = nil }), want: WrongAudience, asked: 1},
		{name: "the answer has another audience", set: answer(func(r *Review) { r.Audiences = []string{"x"} }), want: WrongAudience, text: `"x"`, asked: 1},
		{name: "no node, no pod", set: answer(func(r *Review) { r.Extra = nil }), want: NoNode, text: "bound to no pod", asked: 1},
		{name: "two nodes", set: answer(func(r *Review) { r.Extra = map[string][]string{extraNode: {"a", "b"}} }), want: NoNode, asked: 1},
		{name: "a node whose name cannot be", set: answer(func(r *Review) { r.Extra[extraNode] = []string{"a/b"} }), want: NoNode, text: "slash", asked: 1},
		{name: "old API server", set: func(s *server) {
			delete(s.review.Extra, extraNode)
			s.uid, s.node = "uid-1", "node7"
		}, text: "node7", asked: 1},
		{name: "old API server, the pod is another one by now", set: func(s *server) {
			delete(s.review.Extra, extraNode)
			s.uid, s.node = "uid-2", "node7"
		}, want: Rejected, text: "does not exist", asked: 1},
		{name: "old API server, the pod is gone", set: func(s *server) {
			s.review.Extra = map[string][]string{extraPod: {"other"}, extraUID: {"uid-1"}}
		}, want: Rejected, asked: 1},
		{name: "old API server, pods may not be looked up", set: answer(func(r *Review) { delete(r.Extra, extraNode) }),
			cfg: func(c *Config) { c.PodLookup = false }, want: NoNode, text: "1.30", asked: 1},
		{name: "no answer", set: func(s *server) { s.err = errors.New("connection refused") }, want: Unavailable, text: "does not answer", asked: 1},
		{name: "good", text: "node1", asked: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &server{review: good()}
			if tt.set != nil {
				tt.set(s)
			}
			v := newVerifier(t, s, c, tt.cfg)
			token := tt.token
			if token == "" {
				token = agentToken(t, c, 10*time.Minute)
			}
			id, err := v.Verify(t.Context(), token, "10.0.0.1:5", time.Hour)
			if got := reason(err); got != tt.want || (err == nil) != (tt.want == "") {
				t.Fatalf("%v, %q (%v), want %q", id, got, err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), tt.text) || err == nil && id.Node != tt.text {
				t.Errorf("%+v, %v: want %q in it", id, err, tt.text)
			}
			if s.asked != tt.asked {
				t.Errorf("the API server was asked %d times, want %d", s.asked, tt.asked)
			}
		})
	}
	v := newVerifier(t, &server{}, c, nil)
	if _, err := v.Verify(t.Context(), "", "10.0.0.1:5", time.Hour); reason(err) != None {
		t.Errorf("no token: %v", err)
	}
}

func TestConfig(t *testing.T) {
	ok := Config{API: &server{}, Audience: audience, Accounts: []string{account}}
	for name, change := range map[string]func(*Config){
		"api":      func(c *Config) { c.API = nil },
		"audience": func(c *Config) { c.Audience = "" },
		"accounts": func(c *Config) { c.Accounts = nil },
		"system:":  func(c *Config) { c.Accounts = []string{"procession-agent"} },
	} {
		cfg := ok
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if _, err := New(ok); err != nil {
		t.Error(err)
	}
}

// An answer counts for as long as the caller allows, and a no for a while.
func TestFresh(t *testing.T) {
	c := start()
	s := &server{review: good()}
	v := newVerifier(t, s, c, nil)
	token := agentToken(t, c, time.Hour)
	verify := func(maxAge time.Duration, want Reason, asked int) {
		t.Helper()
		if _, err := v.Verify(t.Context(), token, "a:1", maxAge); reason(err) != want {
			t.Errorf("%v, want %q", err, want)
		}
		if s.asked != asked {
			t.Errorf("asked %d times, want %d", s.asked, asked)
		}
	}
	verify(time.Hour, "", 1)
	c.step(4 * time.Minute)
	verify(time.Hour, "", 1)
	verify(time.Minute, "", 2)
	c.step(6 * time.Minute) // above Fresh
	verify(time.Hour, "", 3)
	s.set(func(s *server) { s.review = Review{Error: "the pod is gone"} })
	verify(0, Rejected, 4)
	verify(0, Rejected, 4)
	c.step(refusedFor)
	s.set(func(s *server) { s.review = good() })
	verify(0, "", 5)
}

// While the API server is silent, what it confirmed counts on until the
// token's end and the grace; what it never confirmed does not.
func TestSilence(t *testing.T) {
	c := start()
	s := &server{review: good()}
	v := newVerifier(t, s, c, func(c *Config) { c.Grace = 30 * time.Minute })
	token := agentToken(t, c, 10*time.Minute)
	if _, err := v.Verify(t.Context(), token, "a:1", time.Hour); err != nil {
		t.Fatal(err)
	}
	s.set(func(s *server) { s.err = errors.New("down") })
	for _, at := range []time.Duration{6 * time.Minute, 3 * time.Minute, 10 * time.Minute, 20 * time.Minute} { // 6, 9, 19, 39 of 40 minutes
		c.step(at)
		id, err := v.Verify(t.Context(), token, "a:1", time.Minute)
		if want := (Identity{Node: "node1", Pod: "agent-x", Expires: id.Expires, Stale: true}); err != nil || !cmp.Equal(id, want) {
			t.Errorf("at %v: %v, %s", c.now(), err, cmp.Diff(want, id))
		}
		if _, err := v.Verify(t.Context(), agentToken(t, c, 10*time.Minute), "a:1", time.Hour); reason(err) != Unavailable {
			t.Errorf("a token never seen: %v", err)
		}
	}
	// It answers again: now the end is the end.
	s.set(func(s *server) { s.err, s.review = nil, Review{Error: "token has expired"} })
	if _, err := v.Verify(t.Context(), token, "a:1", time.Hour); reason(err) != Rejected {
		t.Errorf("after the silence: %v", err)
	}
	s.set(func(s *server) { s.err = errors.New("down") })
	c.step(refusedFor)
	if _, err := v.Verify(t.Context(), token, "a:1", time.Hour); reason(err) != Expired {
		t.Errorf("refused once, then silence: %v", err)
	}
	if st := v.Stats(); st.Stale != 4 || st.Silent < 8 {
		t.Errorf("stats %+v, want 4 stale and at least 8 silent", st)
	}
}

func TestGraceEnds(t *testing.T) {
	c := start()
	s := &server{review: good()}
	v := newVerifier(t, s, c, func(c *Config) { c.Grace = 30 * time.Minute })
	token := agentToken(t, c, 10*time.Minute)
	if _, err := v.Verify(t.Context(), token, "a:1", time.Hour); err != nil {
		t.Fatal(err)
	}
	s.set(func(s *server) { s.err = errors.New("down") })
	c.step(41 * time.Minute)
	if _, err := v.Verify(t.Context(), token, "a:1", time.Hour); reason(err) != Expired {
		t.Errorf("after the grace: %v", err)
	}
}

// One token shown many times at once is one question.
func TestOneQuestion(t *testing.T) {
	c := start()
	s := &server{review: good(), hold: make(chan struct{}), started: make(chan struct{}, 100)}
	v := newVerifier(t, s, c, nil)
	token := agentToken(t, c, time.Hour)
	var wg sync.WaitGroup
	first := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := v.Verify(ctx, token, "a:1", 0)
		first <- err
	}()
	<-s.started
	for range 20 {
		wg.Go(func() {
			if id, err := v.Verify(t.Context(), token, "a:1", 0); err != nil || id.Node != "node1" {
				t.Errorf("%v, %v", id, err)
			}
		})
	}
	// Who asked goes away: another one takes over.
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
	<-s.started
	close(s.hold)
	wg.Wait()
}

// Somebody with made-up tokens is not asked about for ever, and others are not
// held up by him.
func TestThrottled(t *testing.T) {
	c := start()
	s := &server{review: Review{Error: "no"}}
	v := newVerifier(t, s, c, nil)
	bad := func() error {
		c.step(time.Millisecond)
		_, err := v.Verify(t.Context(), agentToken(t, c, time.Hour), "10.9.9.9:1", 0)
		return err
	}
	for range 50 {
		bad()
	}
	if got := reason(bad()); got != Throttled || s.asked > badBurst+2 {
		t.Errorf("%q after %d questions, want throttled after %d", got, s.asked, badBurst)
	}
	s.set(func(s *server) { s.review = good() })
	if _, err := v.Verify(t.Context(), agentToken(t, c, time.Hour), "10.9.9.8:1", 0); err != nil {
		t.Errorf("from another address: %v", err)
	}
	c.step(time.Minute)
	if err := bad(); err != nil {
		t.Errorf("after a minute: %v", err)
	}
}

// What is remembered is bounded, and is forgotten when it is over.
func TestBounds(t *testing.T) {
	c := start()
	s := &server{review: good()}
	v := newVerifier(t, s, c, nil)
	v.max = 500
	for i := range v.max + 10 {
		_, err := v.Verify(t.Context(), agentToken(t, c, time.Hour+time.Duration(i)), "a:1", time.Hour)
		if want := i >= v.max; (reason(err) == Unavailable) != want {
			t.Fatalf("token %d: %v", i, err)
		}
	}
	c.step(2*time.Hour + time.Minute)
	if _, err := v.Verify(t.Context(), agentToken(t, c, time.Hour), "a:1", time.Hour); err != nil {
		t.Error(err)
	}
	if n := v.Stats().Known; n != 1 {
		t.Errorf("%d tokens are remembered, want 1", n)
	}
	a := newAddresses(c.now)
	for i := range maxAddresses * 2 {
		a.failed(fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255))
	}
	if len(a.by) > maxAddresses {
		t.Errorf("%d addresses", len(a.by))
	}
}

// FuzzParse: no token makes parse panic, and what it accepts has an end that
// can be written down.
func FuzzParse(f *testing.F) {
	c := start()
	f.Add(agentToken(f, c, time.Hour))
	f.Add(made(f, map[string]any{"aud": audience, "exp": 1.5e9}))
	f.Add("a.YQ.c")
	f.Add("..")
	f.Add(made(f, map[string]any{"aud": []any{1}, "exp": -1}))
	f.Fuzz(func(t *testing.T, token string) {
		got, err := parse(token)
		if err == nil {
			if y := got.expires.Year(); y < 1970 || y > 9999 {
				t.Errorf("end %v", got.expires)
			}
			if r := got.check(audience, []string{account}, c.now(), leeway); r != nil && r.Msg == "" {
				t.Error("refused without a word")
			}
		}
	})
}

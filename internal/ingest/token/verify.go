package token

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// A Reason says why a token was refused. Metrics are labelled with it.
type Reason string

// Reasons.
const (
	None          Reason = "no_token"
	Malformed     Reason = "malformed"      // not a service account's token
	Expired       Reason = "expired"        // its time is over
	WrongAudience Reason = "wrong_audience" // meant for another service
	WrongAccount  Reason = "wrong_account"  // genuine perhaps, but not an agent's
	Rejected      Reason = "rejected"       // the API server says no: not genuine, or its pod is gone
	NoNode        Reason = "no_node"        // genuine, but bound to no node
	OtherNode     Reason = "other_node"     // genuine, but of another node than the stream's
	Throttled     Reason = "throttled"      // too many refused ones from this address
	Unavailable   Reason = "unavailable"    // the API server does not answer; not the agent's fault
)

// Reasons lists them all, for metrics.
func Reasons() []Reason {
	return []Reason{None, Malformed, Expired, WrongAudience, WrongAccount, Rejected, NoNode, OtherNode, Throttled, Unavailable}
}

// A Refusal is a token that was not accepted. Unavailable is the one reason
// that passes by itself.
type Refusal struct {
	Reason Reason
	Msg    string
}

func (r *Refusal) Error() string { return r.Msg }

func refuse(r Reason, format string, args ...any) *Refusal {
	return &Refusal{r, fmt.Sprintf(format, args...)}
}

// A Review is the API server's answer about a token.
type Review struct {
	Authenticated bool
	Error         string
	Username      string
	Audiences     []string
	Extra         map[string][]string
}

// An API is what a Verifier asks. An error means that there was no answer.
type API interface {
	// ReviewToken asks who a token belongs to, and whether it is meant for the
	// audience.
	ReviewToken(ctx context.Context, token, audience string) (Review, error)

	// PodNode is the uid of a pod and the node it runs on; ok is false when
	// there is no such pod.
	PodNode(ctx context.Context, namespace, name string) (uid, node string, ok bool, err error)
}

// Config configures a Verifier.
type Config struct {
	API      API
	Audience string   // what tokens must be meant for
	Accounts []string // whose they may be: system:serviceaccount:NAMESPACE:NAME

	// PodLookup asks for the pod's node when the answer names none, as API
	// servers before 1.30 do.
	PodLookup bool

	// CheckNode refuses node names that an alert's id cannot carry.
	CheckNode func(string) error

	Fresh time.Duration // how long an answer counts without asking again; 0 is 5 min
	Grace time.Duration // how long a confirmed token counts after its end while the API server is silent; 0 is 1 h, negative none
	Wait  time.Duration // how long an answer is waited for; 0 is 10 s

	PerSecond float64 // questions to the API server, at most; 0 is 100
	AtOnce    int     // the same, at a time; 0 is 16

	Log *slog.Logger

	now func() time.Time
}

func (c Config) withDefaults() (Config, error) {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.Fresh, 5*time.Minute)
	set(&c.Grace, time.Hour)
	set(&c.Wait, 10*time.Second)
	c.Grace = max(c.Grace, 0)
	if c.PerSecond == 0 {
		c.PerSecond = 100
	}
	if c.AtOnce == 0 {
		c.AtOnce = 16
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	if c.CheckNode == nil {
		c.CheckNode = func(string) error { return nil }
	}
	switch {
	case c.API == nil:
		return c, errors.New("token: api: not set")
	case c.Audience == "":
		return c, errors.New("token: audience: not set")
	case len(c.Accounts) == 0:
		return c, errors.New("token: accounts: none, so nobody could connect")
	}
	for _, a := range c.Accounts {
		if parts := strings.Split(a, ":"); len(parts) != 4 || parts[0] != "system" || parts[1] != "serviceaccount" || parts[2] == "" || parts[3] == "" {
			return c, fmt.Errorf("token: accounts: %.200q is not system:serviceaccount:NAMESPACE:NAME", a)
		}
	}
	return c, nil
}

// An Identity is what a confirmed token proves.
type Identity struct {
	Node    string
	Pod     string    // name of the agent's pod, "" if not told
	Expires time.Time // of the token
	Stale   bool      // the API server was silent; this is what it said before
}

// leeway is how much the clocks of the cluster may differ.
const leeway = time.Minute

// maxKnown bounds the answers that are remembered.
const maxKnown = 32 << 10

// A Verifier is safe for many goroutines.
type Verifier struct {
	cfg   Config
	slots chan struct{} // one for each question on its way
	rate  *rate.Limiter
	bad   *addresses
	max   int // of known

	mu    sync.Mutex
	known map[[sha256.Size]byte]*answer // guarded by mu
	swept time.Time                     // guarded by mu
	stats Stats                         // guarded by mu
}

// An answer is what is known of a token.
type answer struct {
	asking   *question // nil: nobody asks
	identity Identity  // of the last confirmation
	checked  time.Time // of the last confirmation; zero: never confirmed
	refusal  *Refusal  // the API server's no
	refused  time.Time
	until    time.Time // to be forgotten then
}

// A question is on its way to the API server. What it came to may be read when
// done is closed.
type question struct {
	done     chan struct{}
	identity Identity
	err      error
}

// Stats counts since New.
type Stats struct {
	Reviews uint64 // questions about tokens
	Lookups uint64 // questions about pods
	Silent  uint64 // of both, those without an answer
	Stale   uint64 // tokens accepted because of what was said before
	Known   int    // tokens remembered
}

// New checks cfg. It asks nothing.
func New(cfg Config) (*Verifier, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Verifier{cfg: cfg, slots: make(chan struct{}, cfg.AtOnce),
		max:  maxKnown,
		rate: rate.NewLimiter(rate.Limit(cfg.PerSecond), max(1, int(2*cfg.PerSecond))),
		bad:  newAddresses(cfg.now), known: make(map[[sha256.Size]byte]*answer)}, nil
}

// Stats takes a snapshot.
func (v *Verifier) Stats() Stats {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.stats
	s.Known = len(v.known)
	return s
}

// Grace is how long a confirmed token counts after its end while the API
// server is silent.
func (v *Verifier) Grace() time.Duration { return v.cfg.Grace }

// Fresh is how long an answer counts without asking again.
func (v *Verifier) Fresh() time.Duration { return v.cfg.Fresh }

// Verify says whom a token that came from addr speaks for. The API server's
// answer may be as old as maxAge, and Fresh at most. The error is a *Refusal,
// or ctx's.
func (v *Verifier) Verify(ctx context.Context, token, addr string, maxAge time.Duration) (Identity, error) {
	if token == "" {
		return Identity{}, refuse(None, "no token was shown")
	}
	c, err := parse(token)
	if err != nil {
		return Identity{}, refuse(Malformed, "this is not a service account's token: %v", err)
	}
	key := sha256.Sum256([]byte(token))
	now := v.cfg.now()
	if r := c.check(v.cfg.Audience, v.cfg.Accounts, now, leeway); r != nil {
		// Only a token that was confirmed can have a grace.
		if r.Reason != Expired || !v.inGrace(key, c, now) {
			return Identity{}, r
		}
	}
	for {
		a, mine := v.begin(key, c, now, min(maxAge, v.cfg.Fresh))
		switch {
		case a == nil:
			return Identity{}, refuse(Unavailable, "too many tokens at once")
		case mine:
			return v.ask(ctx, a, token, addr, c)
		case a.asking != nil:
			select {
			case <-a.asking.done:
				if r := (*Refusal)(nil); a.asking.err == nil || errors.As(a.asking.err, &r) {
					return a.asking.identity, a.asking.err
				}
				now = v.cfg.now() // who asked went away: ask again
			case <-ctx.Done():
				return Identity{}, ctx.Err()
			}
		case a.refusal != nil:
			return Identity{}, a.refusal
		default:
			return a.identity, nil
		}
	}
}

func (v *Verifier) inGrace(key [sha256.Size]byte, c claims, now time.Time) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	a := v.known[key]
	return a != nil && !a.checked.IsZero() && now.Before(c.expires.Add(v.cfg.Grace))
}

// begin returns what is known of a token (a copy), or makes the caller the one
// who asks. nil: too much is remembered already.
func (v *Verifier) begin(key [sha256.Size]byte, c claims, now time.Time, maxAge time.Duration) (a *answer, mine bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sweepLocked(now)
	a = v.known[key]
	if a == nil {
		if len(v.known) >= v.max {
			return nil, false
		}
		a = &answer{}
		v.known[key] = a
	}
	if a.asking == nil {
		fresh := !a.checked.IsZero() && now.Sub(a.checked) < maxAge && now.Before(c.expires.Add(leeway))
		if !fresh && (a.refusal == nil || now.Sub(a.refused) >= refusedFor) {
			a.asking = &question{done: make(chan struct{})}
			return a, true
		}
	}
	copied := *a
	return &copied, false
}

// refusedFor is how long a no counts without asking again.
const refusedFor = 10 * time.Second

// sweepLocked forgets what is over.
func (v *Verifier) sweepLocked(now time.Time) {
	if now.Sub(v.swept) < 30*time.Second && len(v.known) < v.max {
		return
	}
	v.swept = now
	for k, a := range v.known {
		if a.asking == nil && now.After(a.until) {
			delete(v.known, k)
		}
	}
}

// ask asks the API server, and keeps what it says.
func (v *Verifier) ask(ctx context.Context, a *answer, token, addr string, c claims) (Identity, error) {
	id, err := v.review(ctx, token, addr, c)
	v.mu.Lock()
	defer v.mu.Unlock()
	q := a.asking
	a.asking = nil
	q.identity, q.err = v.keepLocked(a, id, err, c.expires)
	close(q.done)
	return q.identity, q.err
}

func (v *Verifier) keepLocked(a *answer, id Identity, err error, expires time.Time) (Identity, error) {
	now := v.cfg.now()
	var r *Refusal
	switch {
	case err == nil:
		a.identity, a.checked, a.refusal = id, now, nil
		a.until = expires.Add(v.cfg.Grace)
		return id, nil
	case errors.As(err, &r) && r.Reason != Unavailable && r.Reason != Throttled:
		a.refusal, a.refused, a.checked = r, now, time.Time{}
		a.until = now.Add(refusedFor)
		return Identity{}, r
	}
	// No answer. What was said before counts on, within bounds.
	if !a.checked.IsZero() && now.Before(expires.Add(v.cfg.Grace)) {
		v.stats.Stale++
		id = a.identity
		id.Stale = true
		return id, nil
	}
	if a.checked.IsZero() && a.refusal == nil {
		a.until = now
	}
	return Identity{}, err
}

// review asks, within all limits. The error is a *Refusal or ctx's.
func (v *Verifier) review(ctx context.Context, token, addr string, c claims) (Identity, error) {
	if !v.bad.allowed(addr) {
		return Identity{}, refuse(Throttled, "too many refused tokens from this address")
	}
	ask, cancel := context.WithTimeout(ctx, v.cfg.Wait)
	defer cancel()
	select {
	case v.slots <- struct{}{}:
		defer func() { <-v.slots }()
	case <-ask.Done():
		return Identity{}, v.gone(ctx, "too many tokens at once")
	}
	if err := v.rate.Wait(ask); err != nil {
		return Identity{}, v.gone(ctx, "too many tokens at once")
	}
	v.count(func(s *Stats) { s.Reviews++ })
	r, err := v.cfg.API.ReviewToken(ask, token, v.cfg.Audience)
	if err != nil {
		v.count(func(s *Stats) { s.Silent++ })
		v.cfg.Log.Debug("no answer about a token", "err", err)
		return Identity{}, v.gone(ctx, "the Kubernetes API server does not answer")
	}
	node, pod, refusal := v.judge(ask, r)
	if refusal != nil {
		if refusal.Reason != Unavailable {
			v.bad.failed(addr)
		}
		return Identity{}, refusal
	}
	return Identity{Node: node, Pod: pod, Expires: c.expires}, nil
}

func (v *Verifier) gone(ctx context.Context, msg string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return refuse(Unavailable, "%s; try again", msg)
}

func (v *Verifier) count(change func(*Stats)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	change(&v.stats)
}

// Keys of what an API server says about a service account's token.
const (
	extraNode = "authentication.kubernetes.io/node-name" // since 1.30
	extraPod  = "authentication.kubernetes.io/pod-name"
	extraUID  = "authentication.kubernetes.io/pod-uid"
)

// judge reads an answer.
func (v *Verifier) judge(ctx context.Context, r Review) (node, pod string, refusal *Refusal) {
	if !r.Authenticated {
		return "", "", refuse(Rejected, "the Kubernetes API server does not accept the token: %.300s", r.Error)
	}
	// An API server that knows no audiences answers without them, and would
	// let any token pass.
	if !slices.Contains(r.Audiences, v.cfg.Audience) {
		return "", "", refuse(WrongAudience, "the Kubernetes API server confirms the token for %.200q, not for %q", r.Audiences, v.cfg.Audience)
	}
	if !slices.Contains(v.cfg.Accounts, r.Username) {
		return "", "", refuse(WrongAccount, "the token is of %.200q, which is not an agent's account", r.Username)
	}
	pod = only(r.Extra[extraPod])
	node = only(r.Extra[extraNode])
	if node == "" && v.cfg.PodLookup {
		if node, refusal = v.lookup(ctx, r, pod); refusal != nil {
			return "", "", refusal
		}
	}
	if node == "" {
		return "", "", refuse(NoNode, "the token is bound to no node: it must be projected into a pod, and the API server must be 1.30 or newer")
	}
	if err := v.cfg.CheckNode(node); err != nil {
		return "", "", refuse(NoNode, "the token's node: %v", err)
	}
	return node, pod, nil
}

// lookup finds the node by the pod that the token is bound to.
func (v *Verifier) lookup(ctx context.Context, r Review, pod string) (node string, _ *Refusal) {
	uid := only(r.Extra[extraUID])
	if pod == "" || uid == "" {
		return "", refuse(NoNode, "the token is bound to no pod")
	}
	namespace := strings.Split(r.Username, ":")[2] // checked: it is one of Accounts
	v.count(func(s *Stats) { s.Lookups++ })
	have, node, ok, err := v.cfg.API.PodNode(ctx, namespace, pod)
	switch {
	case err != nil:
		v.count(func(s *Stats) { s.Silent++ })
		v.cfg.Log.Debug("no answer about a pod", "err", err)
		return "", refuse(Unavailable, "the Kubernetes API server does not answer; try again")
	case !ok || have != uid:
		return "", refuse(Rejected, "the pod that the token is bound to does not exist")
	}
	return node, nil
}

// only is the value of a key that must have one.
func only(values []string) string {
	if len(values) != 1 {
		return ""
	}
	return values[0]
}

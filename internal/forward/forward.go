package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/procession-dev/procession/internal/spool"
)

// Config says what to send where. The zero value of each field that has a
// default means the default.
type Config struct {
	Spool  *spool.Spool
	Target string // gRPC name of the collector, host:port

	// How to reach it: one of TLS and Credentials. TLS is asked for each
	// connection, so that files may change. A connection without TLS must be
	// asked for: insecure.NewCredentials.
	TLS         func(context.Context) (*tls.Config, error)
	Credentials credentials.TransportCredentials

	// Token is the bearer token that says who we are, only ever sent over TLS;
	// nil: the connection's certificate does. It is asked for each stream, and
	// with each heartbeat whether there is a new one to show.
	Token func() (string, error)

	// Dial makes the connection under the TLS; nil: TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)

	// Hints for the collector, who believes the credentials only.
	Node, Version, BootID string

	HeartbeatInterval time.Duration                // default 15 s
	EventCounters     func() (events, lost uint64) // for heartbeats; nil: zeros
	DrainTimeout      time.Duration                // how long Run goes on delivering after its context ended; default 5 s, negative not at all
	AckTimeout        time.Duration                // a collector silent for so long while batches are in flight is left; default 60 s
	Log               *slog.Logger

	linger      time.Duration // how long a batch may wait for more while others are in flight
	backoffMin  time.Duration
	backoffMax  time.Duration
	welcomeWait time.Duration
	maxLanes    int
}

// Bounds on what a Welcome may ask for, and what is used where it is silent.
const (
	defaultWindow, maxWindow   = 2, 16
	defaultRecords, maxRecords = 256, 4096
	defaultBytes, maxBytes     = 256 << 10, 4 << 20
)

func (c Config) withDefaults() (Config, error) {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.HeartbeatInterval, 15*time.Second)
	set(&c.DrainTimeout, 5*time.Second)
	set(&c.AckTimeout, time.Minute)
	set(&c.linger, 20*time.Millisecond)
	set(&c.backoffMin, 500*time.Millisecond)
	set(&c.backoffMax, time.Minute)
	set(&c.welcomeWait, 20*time.Second)
	if c.maxLanes == 0 {
		c.maxLanes = 900 // with the acknowledged ones below the collector's limit of 1,024
	}
	if c.EventCounters == nil {
		c.EventCounters = func() (uint64, uint64) { return 0, 0 }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Spool == nil:
		return c, errors.New("spool: not set")
	case c.Target == "":
		return c, errors.New("target: not set")
	case c.Credentials == nil && c.TLS == nil:
		return c, errors.New("tls: not set")
	case c.HeartbeatInterval < 10*time.Millisecond:
		return c, fmt.Errorf("heartbeatInterval: %v is below the minimum of 10ms", c.HeartbeatInterval)
	case c.AckTimeout < 0:
		return c, fmt.Errorf("ackTimeout: %v is negative", c.AckTimeout)
	}
	return c, nil
}

// Status says how delivery stands. Counters are since New.
type Status struct {
	Connected   bool
	Since       time.Time // of the connection, or of its end
	LastError   string    // why the last connection ended or did not begin; "" if it never did
	LastErrorAt time.Time
	ClockSkew   time.Duration // the collector's clock minus ours, as of the last Welcome

	Unacked    uint64        // records and losses that the collector has not acknowledged
	OldestWait time.Duration // how long the oldest of them has been durable; 0 when there is none

	Connections uint64 // streams that were welcomed
	Failures    uint64 // streams that ended with an error, or did not begin
	Batches     uint64 // sent, repeated ones included
	Records     uint64 // the same
	LossRanges  uint64 // the same
	Acks        uint64
	Heartbeats  uint64
	Gaps        uint64 // FAILED_PRECONDITION: the collector missed a number
	Rewinds     uint64 // epochs of which a collector held less than it had acknowledged
	Impossible  uint64 // epochs of which a collector claimed more than was made
	ReadErrors  uint64 // of the spool
	Reauths     uint64 // new tokens shown on a running stream
}

// A Forwarder delivers one spool.
type Forwarder struct {
	cfg Config
	log *slog.Logger

	sent uint64 // highest number of the running epoch that was ever sent; the session's

	mu     sync.Mutex // guards status and what follows
	status Status
	quiet  map[string]quiet // by message: when it was last logged
}

type quiet struct {
	at      time.Time
	skipped int
}

// New checks cfg. It connects to nothing.
func New(cfg Config) (*Forwarder, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("forward: %w", err)
	}
	f := &Forwarder{cfg: cfg, log: cfg.Log, quiet: make(map[string]quiet)}
	f.status.Since = time.Now()
	// Says now what is wrong with the target's name.
	conn, err := grpc.NewClient(cfg.Target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableServiceConfig())
	if err != nil {
		return nil, fmt.Errorf("forward: target %q: %w", cfg.Target, err)
	}
	return f, conn.Close()
}

// Status takes a snapshot.
func (f *Forwarder) Status() Status {
	f.mu.Lock()
	st := f.status
	f.mu.Unlock()
	sp := f.cfg.Spool.Stats()
	st.Unacked = sp.Unacked
	if !sp.OldestUnacked.IsZero() {
		st.OldestWait = max(time.Since(sp.OldestUnacked), 0)
	}
	return st
}

func (f *Forwarder) count(change func(*Status)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.status)
}

// ErrEpochUsed reports that the collector holds records of the running epoch
// that were never made here. That happens when the node was brought back to an
// earlier state with its memory, and the collector would take new records for
// those it has. Only a new epoch helps: a restart of the agent.
var ErrEpochUsed = errors.New("the collector holds more of the running epoch than was made")

// Why a session ended that did not fail.
var (
	errDrained = errors.New("asked by the collector")
	errAgain   = errors.New("more epochs to deliver")
	errDone    = errors.New("everything is delivered")
	errStopped = errors.New("stopped")
)

func endsWell(err error) bool {
	return errors.Is(err, errDone) || errors.Is(err, errDrained) || errors.Is(err, errAgain)
}

// healthy is how long a stream must live to be a success without an acknowledgement.
const healthy = 10 * time.Second

// Run delivers until ctx ends, and then goes on, for DrainTimeout at most,
// until everything in the spool is acknowledged. The spool's own Run should
// have returned by then, or what it still commits is waited for. The error is
// nil or ErrEpochUsed.
func (f *Forwarder) Run(ctx context.Context) error {
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(f.cfg.DrainTimeout, cancel)
		context.AfterFunc(hard, func() { t.Stop() })
	})
	defer stop()
	for attempt := 0; ; attempt++ {
		if hard.Err() != nil || ctx.Err() != nil && f.cfg.Spool.Stats().Unacked == 0 {
			f.logLeft()
			return nil
		}
		s := &session{f: f, soft: ctx}
		start := time.Now()
		err := s.run(hard)
		if hard.Err() != nil {
			err = errStopped
		}
		f.ended(err)
		if errors.Is(err, ErrEpochUsed) {
			return fmt.Errorf("forward: %w", err)
		}
		if s.progress || s.welcomed && time.Since(start) > healthy {
			attempt = 0
		}
		// Asked once: an end in between must cut the pause short.
		stopping := ctx.Err() != nil
		early := ctx.Done()
		if stopping {
			early = nil
		}
		pause(f.delay(stopping, err, attempt, s.drainDelay), early, hard.Done())
	}
}

func (f *Forwarder) logLeft() {
	if n := f.cfg.Spool.Stats().Unacked; n > 0 {
		f.log.Info("stopped before everything was acknowledged: the spool keeps it", "unacked", n)
	}
}

// delay is how long to wait after a session ended: full jitter, so that a
// fleet does not come back at the same moment.
func (f *Forwarder) delay(stopping bool, err error, attempt int, drain time.Duration) time.Duration {
	limit := f.cfg.backoffMin << min(attempt, 20)
	if limit <= 0 || limit > f.cfg.backoffMax {
		limit = f.cfg.backoffMax
	}
	switch {
	case errors.Is(err, errDone):
		return 0
	case errors.Is(err, errDrained):
		limit = max(limit, drain)
	}
	if stopping { // little time left
		limit = min(limit, f.cfg.backoffMin)
	}
	return rand.N(limit)
}

func pause(d time.Duration, early, hard <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-early:
	case <-hard:
	}
}

// ended keeps the books at the end of a session.
func (f *Forwarder) ended(err error) {
	now := time.Now()
	f.count(func(st *Status) {
		if st.Connected {
			st.Connected, st.Since = false, now
		}
	})
	if endsWell(err) || errors.Is(err, errStopped) {
		f.log.Debug("stream ended", "why", err)
		return
	}
	f.count(func(st *Status) {
		st.Failures++
		st.LastError, st.LastErrorAt = err.Error(), now
	})
	if status.Code(err) == codes.FailedPrecondition {
		f.count(func(st *Status) { st.Gaps++ })
		f.logSeldom(slog.LevelError, "collector refuses the order of records", err)
		return
	}
	f.logSeldom(slog.LevelWarn, "no stream to the collector", err)
}

// logSeldom logs a message at most once a minute, with how often it was held back.
func (f *Forwarder) logSeldom(l slog.Level, msg string, err error) {
	f.mu.Lock()
	q := f.quiet[msg]
	if !q.at.IsZero() && time.Since(q.at) < time.Minute {
		q.skipped++
		f.quiet[msg] = q
		f.mu.Unlock()
		return
	}
	f.quiet[msg] = quiet{at: time.Now()}
	f.mu.Unlock()
	f.log.LogAttrs(context.Background(), l, msg, slog.String("target", f.cfg.Target), slog.Any("err", err), slog.Int("before", q.skipped))
}

// dial makes the connection for one session. A fresh one each time: its only
// back-off is ours, names are resolved and files are read anew.
func (f *Forwarder) dial(ctx context.Context, token string) (*grpc.ClientConn, error) {
	creds := f.cfg.Credentials
	if f.cfg.TLS != nil {
		conf, err := f.cfg.TLS(ctx)
		if err != nil {
			return nil, err
		}
		creds = credentials.NewTLS(conf)
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		// The answer to a dead peer without traffic; the server must allow it (MinTime 30 s).
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.WithDisableRetry(), // resuming is ours
		// No look-up of settings in DNS; several collectors share the agents.
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}`),
		grpc.WithReadBufferSize(4 << 10),
		grpc.WithWriteBufferSize(32 << 10),
		grpc.WithUserAgent("procession-agent/" + f.cfg.Version),
	}
	if f.cfg.Dial != nil {
		opts = append(opts, grpc.WithContextDialer(f.cfg.Dial))
	}
	if token != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(bearer(token)))
	}
	return grpc.NewClient(f.cfg.Target, opts...)
}

package ingest

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/procession-dev/procession/internal/ingest/token"
)

// PeerCertificate makes an Identify of a function that reads the node's name
// from the verified client certificate.
func PeerCertificate(name func(*x509.Certificate) (string, error)) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		c := peerCertificate(ctx)
		if c == nil {
			return "", errors.New("no verified client certificate")
		}
		return name(c)
	}
}

func peerCertificate(ctx context.Context) *x509.Certificate { return callerOf(ctx).cert }

func callerOf(ctx context.Context) (c caller) {
	if p, ok := peer.FromContext(ctx); ok {
		c, _ = p.AuthInfo.(caller)
	}
	return c
}

// identify says whose stream this is. A client certificate decides if one was
// shown and is a way to connect, else the token does, and end is called when it
// no longer counts.
func (s *Server) identify(ctx context.Context, remote string, end func(error)) (node string, l *lease, err error) {
	if s.cfg.Tokens == nil || s.cfg.Identify != nil && peerCertificate(ctx) != nil {
		node, err = s.cfg.Identify(ctx)
		if err != nil {
			return "", nil, s.refuseStream("identity", remote, codes.Unauthenticated, err)
		}
		return node, nil, nil
	}
	shown, r := bearer(ctx)
	if r == nil {
		var id token.Identity
		if id, err = s.cfg.Tokens.Verify(ctx, shown, remote, s.cfg.Tokens.Fresh()); err == nil {
			if id.Stale {
				s.log.log(slog.LevelWarn, "the Kubernetes API server is silent: an agent was let in by what it confirmed before",
					slog.String("node", id.Node), slog.String("remote", remote))
			}
			return id.Node, newLease(ctx, s, id, shown, remote, end), nil
		}
		if !errors.As(err, &r) {
			return "", nil, status.FromContextError(err).Err()
		}
	}
	return "", nil, s.refuseStream(string(r.Reason), remote, refusalCode(r), r)
}

func (s *Server) refuseStream(reason, remote string, code codes.Code, err error) error {
	s.m.refusedStreams.WithLabelValues(reason).Inc()
	s.log.log(slog.LevelWarn, "security: agent without a usable identity refused",
		slog.String("remote", remote), slog.String("reason", reason), slog.Any("err", err))
	return status.Errorf(code, "who is this node: %s: %v", reason, err)
}

func refusalCode(r *token.Refusal) codes.Code {
	switch r.Reason {
	case token.Unavailable:
		return codes.Unavailable
	case token.OtherNode:
		return codes.PermissionDenied
	}
	return codes.Unauthenticated
}

// bearer is the token in the call's metadata.
func bearer(ctx context.Context) (string, *token.Refusal) {
	md, _ := metadata.FromIncomingContext(ctx)
	switch v := md.Get("authorization"); {
	case len(v) == 0:
		return "", &token.Refusal{Reason: token.None, Msg: "no token was shown"}
	case len(v) > 1:
		return "", &token.Refusal{Reason: token.Malformed, Msg: "more than one authorization was shown"}
	default:
		const scheme = "bearer "
		if len(v[0]) < len(scheme) || !strings.EqualFold(v[0][:len(scheme)], scheme) {
			return "", &token.Refusal{Reason: token.Malformed, Msg: "the authorization is not a bearer token"}
		}
		return v[0][len(scheme):], nil
	}
}

// A lease is the proof of who speaks on a stream. It is looked at again while
// the stream lives: from time to time, because a token ends with its pod; when
// it expires; and when the agent shows a newer one. What is refused ends the stream.
type lease struct {
	s            *Server
	node, remote string
	ctx          context.Context // of the stream
	end          func(error)     // ends it

	mu      sync.Mutex  // guards what follows
	token   string      // accepted
	newer   string      // shown, and not accepted yet
	due     *time.Timer // of the next look
	busy    bool
	stopped bool
}

// looked is what became of a look at a token.
type looked struct {
	token    string
	identity token.Identity
	err      error
}

func newLease(ctx context.Context, s *Server, id token.Identity, shown, remote string, end func(error)) *lease {
	l := &lease{s: s, ctx: ctx, end: end, node: id.Node, remote: remote, token: shown}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.due = time.AfterFunc(l.pause(id), l.look)
	return l
}

// pause is how long an identity is believed: with a tenth of chance, so that
// the agents of a fleet are not all looked at together.
func (l *lease) pause(id token.Identity) time.Duration {
	if id.Stale {
		return l.s.cfg.TokenRetry + rand.N(l.s.cfg.TokenRetry)
	}
	d := l.s.cfg.Tokens.Fresh()
	d -= rand.N(d/10 + 1)
	return max(min(d, time.Until(id.Expires)), l.s.cfg.TokenRetry)
}

// show takes a newer token.
func (l *lease) show(newer string) {
	l.mu.Lock()
	l.newer = newer
	l.mu.Unlock()
	go l.look()
}

// look asks about the newest token. It takes as long as the verifier's
// patience; acks go on meanwhile.
func (l *lease) look() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy || l.stopped {
		return // who is busy comes back to what is new
	}
	l.busy = true
	held, newer := l.token, l.newer
	l.mu.Unlock()
	r := l.ask(held, newer)
	l.mu.Lock()
	l.busy = false
	if l.stopped {
		return
	}
	if err := l.tookLocked(r); err != nil {
		l.end(err)
	}
}

func (l *lease) ask(held, newer string) looked {
	v := l.s.cfg.Tokens
	r := looked{token: held}
	if newer != "" {
		r = looked{token: newer}
		r.identity, r.err = v.Verify(l.ctx, newer, l.remote, v.Fresh())
		if ref, ok := errors.AsType[*token.Refusal](r.err); !ok || ref.Reason != token.Unavailable {
			return r
		}
		r.token = held // the API server is silent: the one before may still count
	}
	r.identity, r.err = v.Verify(l.ctx, held, l.remote, 0)
	return r
}

// tookLocked draws the conclusion. An error ends the stream.
func (l *lease) tookLocked(r looked) error {
	if l.ctx.Err() != nil {
		return status.FromContextError(l.ctx.Err()).Err()
	}
	if r.err == nil && r.identity.Node != l.node {
		r.err = &token.Refusal{Reason: token.OtherNode, Msg: "the token is of another node than the stream's"}
	}
	if ref, ok := errors.AsType[*token.Refusal](r.err); ok {
		l.s.m.tokenLooks.WithLabelValues(string(ref.Reason)).Inc()
		if ref.Reason == token.Unavailable {
			// Neither yes nor no: not even about what was confirmed at the start,
			// because that is no longer remembered. It goes on until the grace ends.
			l.due.Reset(l.s.cfg.TokenRetry)
			return nil
		}
		l.s.log.log(slog.LevelWarn, "security: a stream's token is no longer accepted", slog.String("node", l.node),
			slog.String("remote", l.remote), slog.String("reason", string(ref.Reason)), slog.Any("err", ref))
		return status.Errorf(refusalCode(ref), "who is this node: %s: %v", ref.Reason, ref)
	} else if r.err != nil {
		return status.FromContextError(r.err).Err()
	}
	result := "ok"
	if r.identity.Stale {
		result = "stale"
	}
	l.s.m.tokenLooks.WithLabelValues(result).Inc()
	l.token = r.token
	if l.newer == "" || l.newer == r.token {
		l.newer = ""
		l.due.Reset(l.pause(r.identity))
	} else { // shown meanwhile, or the API server was silent about it
		l.due.Reset(l.s.cfg.TokenRetry)
	}
	return nil
}

// stop ends a lease. There may be none.
func (l *lease) stop() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.due.Stop()
}

package ingest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/token"
	"github.com/procession-dev/procession/internal/store"
)

// Config configures a Server.
type Config struct {
	Queue *store.Queue

	// TLS of the listener, with the protocol h2. It verifies client certificates.
	TLS *tls.Config

	// Identify says which node a stream belongs to, from the connection's
	// credentials alone. nil: only Tokens does.
	Identify func(ctx context.Context) (node string, err error)

	// Tokens says the same of a bearer token, for peers that showed no client
	// certificate. nil: only Identify does.
	Tokens *token.Verifier

	// TokenRetry is when a silent API server is asked again about a stream's
	// token, and the least time between two looks at it; 0 is 15 s.
	TokenRetry time.Duration

	// Window is how many batches of a stream may wait for the disk, 1 to 64;
	// 0 is 4.
	Window int

	// Rate is how many records a second one agent may bring in the long run,
	// and Burst how many at once beyond that; what is more is not read before
	// its time. 0 is 1,000 and 20,000, a negative Rate is without limit.
	Rate, Burst int

	// Strangers is how many connections may be open that have not shown who
	// they are; an eighth of them from one address. 0 is 1,024. They are closed
	// after MeetWait; 0 is 30 s.
	Strangers int
	MeetWait  time.Duration
	// Conns is how many connections may be open in all; 0 is 16,384.
	Conns int

	// HelloWait is how long a stream may stay silent before its Hello; 0 is 10 s.
	HelloWait time.Duration

	// DrainWait is how long streams have to take their last acks when the
	// server stops; 0 is 5 s.
	DrainWait time.Duration

	Log        *slog.Logger
	Registerer prometheus.Registerer // nil: metrics are kept and not shown
}

func (c Config) withDefaults() (Config, error) {
	if c.Queue == nil || c.TLS == nil || c.Identify == nil && c.Tokens == nil {
		return c, errors.New("queue, TLS and one of identify and tokens must be set")
	}
	if c.TokenRetry == 0 {
		c.TokenRetry = 15 * time.Second
	}
	if c.Window == 0 {
		c.Window = 4
	}
	if c.Window < 1 || c.Window > 64 {
		return c, fmt.Errorf("window: %d batches, want 1 to 64", c.Window)
	}
	for _, d := range []struct {
		v *int
		n int
	}{{&c.Rate, 1000}, {&c.Burst, 20_000}, {&c.Strangers, 1024}, {&c.Conns, 16_384}} {
		if *d.v == 0 {
			*d.v = d.n
		}
	}
	if c.Burst < 0 || c.Strangers < 0 || c.Conns < 0 {
		return c, fmt.Errorf("burst %d, strangers %d, conns %d: negative", c.Burst, c.Strangers, c.Conns)
	}
	if c.MeetWait == 0 {
		c.MeetWait = 30 * time.Second
	}
	if c.HelloWait == 0 {
		c.HelloWait = 10 * time.Second
	}
	if c.DrainWait == 0 {
		c.DrainWait = 5 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// A Server serves IngestService and the gRPC health service.
type Server struct {
	pb.UnimplementedIngestServiceServer

	cfg    Config
	grpc   *grpc.Server
	health *health.Server
	m      *metrics
	log    *limitedLog // of what agents do wrong

	records atomic.Uint64

	mu       sync.Mutex
	nodes    map[string][]*stream // live streams, oldest first; guarded by mu
	stopping bool                 // no stream may enter; guarded by mu
}

// streamsPerNode: a cut stream may live on for a while beside its successor.
const streamsPerNode = 2

// New returns a server; it does nothing before Serve.
func New(cfg Config) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, health: health.NewServer(), nodes: make(map[string][]*stream)}
	s.m = newMetrics(cfg.Registerer, cfg.Tokens)
	s.log = &limitedLog{l: cfg.Log}
	// Buffers: thousands of mostly silent connections. TLS has one for reading of
	// its own, those for writing are shared (grpc's default), and headers come once
	// in a connection, so nothing remembers them; windows bound what may lie
	// unread. MaxConnectionAge lets agents show fresh certificates and find other
	// replicas; grpc spreads it by 10 % itself.
	s.grpc = grpc.NewServer(
		grpc.Creds(&transport{conf: cfg.TLS, m: s.m, log: &limitedLog{l: cfg.Log}}),
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.MaxConcurrentStreams(4),
		grpc.ReadBufferSize(0), grpc.WriteBufferSize(4<<10),
		grpc.HeaderTableSize(0),
		grpc.StaticStreamWindowSize(256<<10), grpc.StaticConnWindowSize(512<<10),
		grpc.ConnectionTimeout(20*time.Second),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 60 * time.Second, Timeout: 20 * time.Second,
			MaxConnectionIdle: 5 * time.Minute, // without a stream
			MaxConnectionAge:  30 * time.Minute, MaxConnectionAgeGrace: 30 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second, PermitWithoutStream: true}),
	)
	pb.RegisterIngestServiceServer(s.grpc, s)
	healthpb.RegisterHealthServer(s.grpc, s.health)
	s.setServing(false)
	return s, nil
}

func (s *Server) setServing(yes bool) {
	st := healthpb.HealthCheckResponse_NOT_SERVING
	if yes {
		st = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", st)
	s.health.SetServingStatus(pb.IngestService_ServiceDesc.ServiceName, st)
}

// Serve accepts on l until ctx ends. Then it asks agents to connect again
// later, takes no more batches, sends the acks of those it has, and returns
// when all streams have ended or DrainWait is over. The queue must run until
// then.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	failed := make(chan error, 1)
	l = &gate{Listener: l, m: s.m, byAddr: make(map[string]int), meetWait: s.cfg.MeetWait, conns: s.cfg.Conns, strangers: s.cfg.Strangers, perAddress: max(1, s.cfg.Strangers/8)}
	go func() { failed <- s.grpc.Serve(l) }()
	s.setServing(true)
	select {
	case err := <-failed:
		return fmt.Errorf("serve agents: %w", err)
	case <-ctx.Done():
	}
	s.setServing(false)
	s.drain()
	force := time.AfterFunc(s.cfg.DrainWait, s.grpc.Stop)
	s.grpc.GracefulStop()
	force.Stop()
	<-failed
	return nil
}

// Nodes is how many nodes have a stream.
func (s *Server) Nodes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.nodes)
}

// Records is how many records were read from streams so far.
func (s *Server) Records() uint64 { return s.records.Load() }

// drain asks all streams to end, and lets no other begin.
func (s *Server) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = true
	for _, live := range s.nodes {
		for _, st := range live {
			go st.drain() // one that does not read holds up itself alone
		}
	}
}

// enter adds a stream to its node's, unless the server stops; beyond the limit
// the oldest has to go.
func (s *Server) enter(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	live := append(s.nodes[st.node], st)
	if len(live) > streamsPerNode {
		live[0].supersede()
		live = live[1:]
	}
	s.nodes[st.node] = live
	s.m.streams.Inc()
	return true
}

func (s *Server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	live := s.nodes[st.node]
	for i := range live {
		if live[i] == st {
			live = append(live[:i:i], live[i+1:]...)
			break
		}
	}
	if len(live) == 0 {
		delete(s.nodes, st.node)
	} else {
		s.nodes[st.node] = live
	}
	s.m.streams.Dec()
}

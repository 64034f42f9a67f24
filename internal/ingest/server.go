package ingest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
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

	// Credentials of the listener. They must authenticate the peer.
	Credentials credentials.TransportCredentials

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

	// HelloWait is how long a stream may stay silent before its Hello; 0 is 10 s.
	HelloWait time.Duration

	// DrainWait is how long streams have to take their last acks when the
	// server stops; 0 is 5 s.
	DrainWait time.Duration

	Log        *slog.Logger
	Registerer prometheus.Registerer // nil: metrics are kept and not shown
}

func (c Config) withDefaults() (Config, error) {
	if c.Queue == nil || c.Credentials == nil || c.Identify == nil && c.Tokens == nil {
		return c, errors.New("queue, credentials and one of identify and tokens must be set")
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

	draining chan struct{} // closed when streams shall end

	mu    sync.Mutex
	nodes map[string][]*stream // live streams, oldest first; guarded by mu
}

// streamsPerNode: a cut stream may live on for a while beside its successor.
const streamsPerNode = 2

// New returns a server; it does nothing before Serve.
func New(cfg Config) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, health: health.NewServer(), draining: make(chan struct{}), nodes: make(map[string][]*stream)}
	s.m = newMetrics(cfg.Registerer, cfg.Tokens)
	s.log = &limitedLog{l: cfg.Log}
	// Buffers: thousands of mostly silent connections; windows bound what may
	// lie unread. MaxConnectionAge lets agents show fresh certificates and find
	// other replicas; grpc spreads it by 10 % itself.
	s.grpc = grpc.NewServer(
		grpc.Creds(&countingCreds{TransportCredentials: cfg.Credentials, m: s.m, log: &limitedLog{l: cfg.Log}}),
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.MaxConcurrentStreams(4),
		grpc.ReadBufferSize(4<<10), grpc.WriteBufferSize(4<<10),
		grpc.StaticStreamWindowSize(256<<10), grpc.StaticConnWindowSize(512<<10),
		grpc.ConnectionTimeout(20*time.Second),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 60 * time.Second, Timeout: 20 * time.Second,
			MaxConnectionAge: 30 * time.Minute, MaxConnectionAgeGrace: 30 * time.Second}),
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
	go func() { failed <- s.grpc.Serve(l) }()
	s.setServing(true)
	select {
	case err := <-failed:
		return fmt.Errorf("serve agents: %w", err)
	case <-ctx.Done():
	}
	s.setServing(false)
	close(s.draining)
	force := time.AfterFunc(s.cfg.DrainWait, s.grpc.Stop)
	s.grpc.GracefulStop()
	force.Stop()
	<-failed
	return nil
}

// enter adds a stream to its node's; beyond the limit the oldest has to go.
func (s *Server) enter(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	live := append(s.nodes[st.node], st)
	if len(live) > streamsPerNode {
		live[0].supersede()
		live = live[1:]
	}
	s.nodes[st.node] = live
	s.m.streams.Inc()
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

package ingest

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
)

// drainDelay is what agents are asked to spread their return over: a second for
// each 200 of them, which is what handshakes cost.
func (s *Server) drainDelay() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(2*time.Second, time.Duration(len(s.nodes))*time.Second/200)
}

type grpcStream = grpc.BidiStreamingServer[pb.StreamRequest, pb.StreamResponse]

// A stream is one agent's. Two goroutines: one reads, one does the rest.
type stream struct {
	s      *Server
	g      grpcStream
	node   string
	remote string
	lease  *lease // nil when a certificate says who it is

	in   chan *pb.StreamRequest
	read error // why reading ended; written before in is closed

	superseded chan struct{}
	once       sync.Once

	epochs  map[store.Epoch]bool // those of the Hello; no others are taken
	pace    pace                 // of its records
	pending []pending            // batches on their way to the disk, oldest first
}

type pending struct {
	epoch  []byte
	ticket *store.Ticket
}

func (st *stream) supersede() { st.once.Do(func() { close(st.superseded) }) }

// Stream implements IngestService.
func (s *Server) Stream(g grpcStream) error {
	ctx := g.Context()
	remote := ""
	if p, ok := peer.FromContext(ctx); ok {
		remote = p.Addr.String()
	}
	node, lease, err := s.identify(ctx, remote)
	if err != nil {
		return err
	}
	defer lease.stop()
	st := &stream{s: s, pace: pace{rate: float64(s.cfg.Rate), burst: float64(s.cfg.Burst)}, g: g, node: node, lease: lease, in: make(chan *pb.StreamRequest), superseded: make(chan struct{}), remote: remote}
	s.enter(st)
	defer s.leave(st)
	go st.receive(ctx)
	err = st.run(ctx)
	if c := status.Code(err); err != nil && c != codes.Canceled {
		s.m.endedStreams.WithLabelValues(c.String()).Inc()
		level := slog.LevelWarn
		if c == codes.Unavailable { // the queue has said what is wrong, once for all streams
			level = slog.LevelDebug
		}
		s.log.log(level, "stream ended", slog.String("node", node), slog.String("remote", remote),
			slog.String("code", c.String()), slog.Any("err", err))
	}
	return err
}

// receive hands over what the agent sends. It ends with the stream: Recv fails
// as soon as the handler has returned.
func (st *stream) receive(ctx context.Context) {
	defer close(st.in)
	for {
		m, err := st.g.Recv()
		if err != nil {
			if st.read = err; status.Code(err) == codes.ResourceExhausted {
				st.s.m.refusedMessages.WithLabelValues("too_large").Inc()
			}
			return
		}
		n := len(m.GetBatch().GetRecords())
		st.s.m.received.Add(float64(n))
		select {
		case st.in <- m:
		case <-ctx.Done():
			st.s.m.refused.WithLabelValues("stream_ended").Add(float64(n))
			st.read = ctx.Err()
			return
		}
	}
}

func (st *stream) run(ctx context.Context) error {
	if err := st.hello(ctx); err != nil {
		return err
	}
	draining := st.s.draining
	drain := false
	for {
		// Nothing is read while the window is full: that is the whole
		// back-pressure, the agent's spool keeps the rest.
		var in <-chan *pb.StreamRequest
		var first pending
		var done, stopped <-chan struct{}
		if len(st.pending) > 0 {
			first = st.pending[0]
			done, stopped = first.ticket.Done(), first.ticket.Stopped()
		} else if drain {
			return nil
		}
		var later <-chan time.Time
		if !drain && len(st.pending) < st.s.cfg.Window {
			if wait := st.pace.wait(time.Now()); wait <= 0 {
				in = st.in
			} else {
				later = time.After(wait)
			}
		}
		select {
		case <-later:
		case m, ok := <-in:
			if !ok {
				return st.ended()
			}
			if err := st.take(ctx, m); err != nil {
				return err
			}
		case <-done:
			if err := st.ack(first); err != nil {
				return err
			}
		case <-stopped:
			return status.Error(codes.Unavailable, store.ErrClosed.Error())
		case <-draining:
			drain, draining = true, nil
			if err := st.g.Send(&pb.StreamResponse{Message: &pb.StreamResponse_Drain{
				Drain: &pb.Drain{DelayMs: uint32(st.s.drainDelay().Milliseconds())}}}); err != nil {
				return err
			}
		case <-st.lease.timer():
			st.lease.look(ctx)
		case r := <-st.lease.results():
			if err := st.lease.took(ctx, r); err != nil {
				return err
			}
		case <-st.superseded:
			return status.Error(codes.Aborted, "the node has newer streams")
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// ended: the agent closed its side, or the connection is gone. In the first
// case it still wants its acks.
func (st *stream) ended() error {
	if !errors.Is(st.read, io.EOF) {
		return st.read
	}
	for _, p := range st.pending {
		select {
		case <-p.ticket.Done():
		case <-p.ticket.Stopped():
		}
		if err := st.ack(p); err != nil {
			return err
		}
	}
	return nil
}

// hello waits for the first message and answers it.
func (st *stream) hello(ctx context.Context) error {
	late := time.NewTimer(st.s.cfg.HelloWait)
	defer late.Stop()
	var m *pb.StreamRequest
	select {
	case got, ok := <-st.in:
		if !ok {
			if errors.Is(st.read, io.EOF) {
				return status.Error(codes.InvalidArgument, "the stream ended without a hello")
			}
			return st.read
		}
		m = got
	case <-late.C:
		return status.Errorf(codes.DeadlineExceeded, "no hello within %v", st.s.cfg.HelloWait)
	case <-st.s.draining:
		return status.Error(codes.Unavailable, "the collector is stopping")
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	h := m.GetHello()
	if h == nil {
		return st.refuse(m, "order", errors.New("the first message must be a hello"))
	}
	ask, err := checkHello(h, st.node, time.Now())
	if err != nil {
		return st.refuse(m, "invalid", err)
	}
	if claimed := h.GetNode(); claimed != "" && claimed != st.node {
		st.s.m.mismatches.Inc()
		st.s.log.log(slog.LevelWarn, "security: agent claims to be another node than its credentials say; the credentials decide",
			slog.String("node", st.node), slog.String("claimed", claimed), slog.String("remote", st.remote))
	}
	res, err := st.s.cfg.Queue.Do(ctx, ask)
	if err != nil {
		return storeStatus(err)
	}
	if res.LostSeqs > 0 {
		st.s.cfg.Log.Warn("an earlier run of the agent lost alerts it had not yet on disk",
			slog.String("node", st.node), slog.Uint64("lost", res.LostSeqs))
	}
	st.epochs = make(map[store.Epoch]bool, len(ask.Lanes))
	for _, l := range ask.Lanes {
		st.epochs[l.Epoch] = true
	}
	w := &pb.Welcome{Window: uint32(st.s.cfg.Window), MaxBatchRecords: MaxBatchRecords,
		MaxBatchBytes: PreferBatchBytes, ServerTime: timestamppb.Now(), Reauth: st.lease != nil}
	for i, l := range h.GetLanes() {
		w.Resume = append(w.Resume, &pb.Resume{Epoch: l.GetEpoch(), After: res.Marks[i]})
	}
	st.s.cfg.Log.Debug("agent connected", slog.String("node", st.node), slog.String("version", h.GetAgentVersion()), slog.Int("lanes", len(ask.Lanes)))
	return st.g.Send(&pb.StreamResponse{Message: &pb.StreamResponse_Welcome{Welcome: w}})
}

// take checks one message and passes it on.
func (st *stream) take(ctx context.Context, m *pb.StreamRequest) error {
	switch {
	case m.GetBatch() != nil:
		b, err := checkBatch(m.GetBatch(), st.node, time.Now())
		if err == nil && !st.epochs[b.Epoch] {
			err = fieldErr("batch.epoch", "%v was not in the hello", b.Epoch)
		}
		if err != nil {
			return st.refuse(m, "invalid", err)
		}
		t, err := st.s.cfg.Queue.Submit(ctx, b)
		if err != nil {
			st.s.m.refused.WithLabelValues("stream_ended").Add(float64(len(m.GetBatch().GetRecords())))
			return storeStatus(err)
		}
		st.pending = append(st.pending, pending{m.GetBatch().GetEpoch(), t})
		now := time.Now()
		st.pace.take(len(m.GetBatch().GetRecords()), now)
		if wait := st.pace.wait(now); wait > 0 {
			st.s.m.slowed.Inc()
			st.s.m.slowedSeconds.Add(wait.Seconds())
		}
		return nil
	case m.GetHeartbeat() != nil:
		hb := m.GetHeartbeat()
		e, err := store.ParseEpoch(hb.GetEpoch())
		if err != nil {
			return st.refuse(m, "invalid", fieldErr("heartbeat.epoch", "%v", err))
		}
		if !st.epochs[e] {
			return st.refuse(m, "invalid", fieldErr("heartbeat.epoch", "%v was not in the hello", e))
		}
		if hb.GetMade() > store.MaxSeq {
			return st.refuse(m, "invalid", fieldErr("heartbeat.made", "%d, limit %d", hb.GetMade(), uint64(store.MaxSeq)))
		}
		st.s.m.heartbeats.Inc()
		// Not waited for: it answers nothing.
		if _, err := st.s.cfg.Queue.Submit(ctx, &store.Heard{Node: st.node, Epoch: e, Made: hb.GetMade(), At: time.Now()}); err != nil {
			return storeStatus(err)
		}
		return nil
	case m.GetReauth() != nil:
		if st.lease == nil {
			return st.refuse(m, "order", errors.New("a reauth on a stream without a token"))
		}
		st.lease.show(ctx, m.GetReauth().GetToken())
		return nil
	case m.GetHello() != nil:
		return st.refuse(m, "order", errors.New("a second hello"))
	}
	return st.refuse(m, "invalid", errors.New("a message of no known kind"))
}

func (st *stream) refuse(m *pb.StreamRequest, reason string, err error) error {
	st.s.m.refusedMessages.WithLabelValues(reason).Inc()
	st.s.m.refused.WithLabelValues(reason).Add(float64(len(m.GetBatch().GetRecords())))
	return status.Error(codes.InvalidArgument, err.Error())
}

// ack answers the oldest batch, whose commit has ended.
func (st *stream) ack(p pending) error {
	res, err := p.ticket.Result()
	if err != nil {
		if _, gap := errors.AsType[*store.GapError](err); gap {
			st.s.m.gaps.Inc()
		}
		return storeStatus(err)
	}
	if len(st.pending) > 0 {
		st.pending = st.pending[1:]
	}
	return st.g.Send(&pb.StreamResponse{Message: &pb.StreamResponse_Ack{Ack: &pb.Ack{Epoch: p.epoch, UpTo: res.UpTo}}})
}

// storeStatus tells an agent why the store did not take something.
func storeStatus(err error) error {
	if _, gap := errors.AsType[*store.GapError](err); gap {
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	// The details (paths) are for the collector's own log, which has them.
	switch {
	case errors.Is(err, store.ErrFull):
		return status.Error(codes.Unavailable, "the collector's disk is full")
	case errors.Is(err, store.ErrClosed):
		return status.Error(codes.Unavailable, "the collector is stopping")
	}
	return status.Error(codes.Unavailable, "the collector's store refuses commits; its log says why")
}

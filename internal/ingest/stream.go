package ingest

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
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

// A stream is one agent's. gRPC's goroutine for it reads; a second one sends
// acks, and is there only while batches are on their way to the disk: thousands
// of streams are silent most of the time.
type stream struct {
	s      *Server
	g      grpcStream
	node   string
	remote string
	lease  *lease // nil when a certificate says who it is

	out  statusWriter
	once sync.Once
	why  error // why it ended: who has been in end may read it

	epochs []store.Epoch // those of the Hello; no others are taken. The reader's
	pace   pace          // of its records. The reader's

	sending sync.Mutex // held for a Send, and guards greeted
	greeted bool       // the welcome was sent

	mu      sync.Mutex
	pending []pending     // batches on their way to the disk, oldest first; guarded by mu
	last    bool          // the stream ends when none is; guarded by mu
	room    chan struct{} // the window has room again; capacity 1, nil until it was full; guarded by mu
}

type pending struct {
	epoch  []byte
	ticket *store.Ticket
}

// A statusWriter is gRPC's end of a stream.
type statusWriter interface {
	WriteStatus(*status.Status) error
}

// end ends the stream with err, unless it has ended before; nil is one that
// ended well. gRPC is told here and not by the handler's return, because that
// is in Recv, which answers with a status of its own when it is woken. A
// goroutine to wait in its place would be a tenth of what an idle agent costs.
func (st *stream) end(err error) {
	st.once.Do(func() {
		st.why = err
		st.out.WriteStatus(status.Convert(err)) // fails when the agent is gone
	})
}

func (st *stream) supersede() { st.end(status.Error(codes.Aborted, "the node has newer streams")) }

// drain asks the agent to come back later, and ends the stream when the acks of
// what was read are sent.
func (st *stream) drain() {
	st.sending.Lock()
	greeted := st.greeted
	st.sending.Unlock()
	if !greeted {
		st.end(errStopping)
		return
	}
	if st.send(&pb.StreamResponse{Message: &pb.StreamResponse_Drain{Drain: &pb.Drain{DelayMs: uint32(st.s.drainDelay().Milliseconds())}}}) == nil {
		st.finish()
	}
}

var errStopping = status.Error(codes.Unavailable, "the collector is stopping")

// finish ends the stream well when nothing is on its way to the disk.
func (st *stream) finish() {
	st.mu.Lock()
	st.last = true
	left := len(st.pending)
	st.mu.Unlock()
	if left == 0 {
		st.end(nil)
	}
}

func (st *stream) send(m *pb.StreamResponse) error {
	st.sending.Lock()
	defer st.sending.Unlock()
	st.greeted = st.greeted || m.GetWelcome() != nil
	return st.g.Send(m)
}

// Stream implements IngestService. What it calls while it waits for a message
// is kept shallow: the stack is there for as long as the stream.
func (s *Server) Stream(g grpcStream) error {
	ctx := g.Context()
	out, ok := grpc.ServerTransportStreamFromContext(ctx).(statusWriter)
	if !ok {
		return status.Error(codes.Internal, "gRPC has no way to end a stream")
	}
	st := &stream{s: s, g: g, out: out, pace: pace{rate: float64(s.cfg.Rate), burst: float64(s.cfg.Burst)}}
	if err := st.enter(ctx); err != nil {
		return err
	}
	defer st.leave()
	err := st.run(ctx)
	if errors.Is(err, io.EOF) {
		st.finish() // the agent closed its side, and still wants its acks
		<-ctx.Done()
		err = status.FromContextError(ctx.Err()).Err()
	}
	st.end(err)
	st.tell()
	return st.why
}

// enter finds out whose stream this is, and makes it one of its node's.
func (st *stream) enter(ctx context.Context) (err error) {
	if p, ok := peer.FromContext(ctx); ok {
		st.remote = p.Addr.String()
	}
	if st.node, st.lease, err = st.s.identify(ctx, st.remote, st.end); err != nil {
		return err
	}
	callerOf(ctx).met()
	if !st.s.enter(st) {
		st.lease.stop()
		return errStopping
	}
	return nil
}

func (st *stream) leave() {
	st.s.leave(st)
	st.lease.stop()
}

// tell counts and logs a stream that did not end well.
func (st *stream) tell() {
	c := status.Code(st.why)
	if c == codes.OK || c == codes.Canceled {
		return
	}
	st.s.m.endedStreams.WithLabelValues(c.String()).Inc()
	level := slog.LevelWarn
	if c == codes.Unavailable { // the queue has said what is wrong, once for all streams
		level = slog.LevelDebug
	}
	st.s.log.log(level, "stream ended", slog.String("node", st.node), slog.String("remote", st.remote),
		slog.String("code", c.String()), slog.Any("err", st.why))
}

func (st *stream) run(ctx context.Context) error {
	if err := st.hello(ctx); err != nil {
		return err
	}
	for {
		if err := st.readable(ctx); err != nil {
			return err
		}
		m, err := st.recv()
		if err != nil {
			return err
		}
		if err := st.take(ctx, m); err != nil {
			return err
		}
	}
}

// readable returns when it is time to read a message. Nothing is read while the
// window is full: that is the whole back-pressure, the agent's spool keeps the rest.
func (st *stream) readable(ctx context.Context) error {
	if wait := st.pace.wait(time.Now()); wait > 0 {
		later := time.NewTimer(wait)
		defer later.Stop()
		select {
		case <-later.C:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	for {
		st.mu.Lock()
		full := len(st.pending) >= st.s.cfg.Window
		if full && st.room == nil {
			st.room = make(chan struct{}, 1)
		}
		room := st.room
		st.mu.Unlock()
		if !full {
			return nil
		}
		select {
		case <-room:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func (st *stream) recv() (*pb.StreamRequest, error) {
	m, err := st.g.Recv()
	if err != nil {
		if status.Code(err) == codes.ResourceExhausted {
			st.s.m.refusedMessages.WithLabelValues("too_large").Inc()
		}
		return nil, err
	}
	n := len(m.GetBatch().GetRecords())
	st.s.m.received.Add(float64(n))
	st.s.records.Add(uint64(n))
	return m, nil
}

// expect has a batch acknowledged when it is on the disk.
func (st *stream) expect(ctx context.Context, p pending) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.pending = append(st.pending, p)
	if len(st.pending) == 1 {
		go st.acks(ctx, p)
	}
}

// acks answers what is pending, from p on, and ends when that is nothing.
func (st *stream) acks(ctx context.Context, p pending) {
	for {
		select {
		case <-p.ticket.Done():
		case <-p.ticket.Stopped():
		case <-ctx.Done():
			return
		}
		if err := st.ack(p); err != nil {
			st.end(err)
			return // and the rest stays: no other one begins
		}
		st.mu.Lock()
		st.pending = st.pending[1:]
		left, last := len(st.pending), st.last
		if left > 0 {
			p = st.pending[0]
		} else {
			st.pending = nil
		}
		room := st.room
		st.mu.Unlock()
		select {
		case room <- struct{}{}:
		default:
		}
		if left == 0 {
			if last {
				st.end(nil)
			}
			return
		}
	}
}

// hello waits for the first message and answers it.
func (st *stream) hello(ctx context.Context) error {
	late := time.AfterFunc(st.s.cfg.HelloWait, func() {
		st.end(status.Errorf(codes.DeadlineExceeded, "no hello within %v", st.s.cfg.HelloWait))
	})
	m, err := st.recv()
	late.Stop()
	if errors.Is(err, io.EOF) {
		return status.Error(codes.InvalidArgument, "the stream ended without a hello")
	}
	if err != nil {
		return err
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
	st.epochs = make([]store.Epoch, len(ask.Lanes))
	for i, l := range ask.Lanes {
		st.epochs[i] = l.Epoch
	}
	w := &pb.Welcome{Window: uint32(st.s.cfg.Window), MaxBatchRecords: MaxBatchRecords,
		MaxBatchBytes: PreferBatchBytes, ServerTime: timestamppb.Now(), Reauth: st.lease != nil}
	for i, l := range h.GetLanes() {
		w.Resume = append(w.Resume, &pb.Resume{Epoch: l.GetEpoch(), After: res.Marks[i]})
	}
	st.s.cfg.Log.Debug("agent connected", slog.String("node", st.node), slog.String("version", h.GetAgentVersion()), slog.Int("lanes", len(ask.Lanes)))
	return st.send(&pb.StreamResponse{Message: &pb.StreamResponse_Welcome{Welcome: w}})
}

// take checks one message and passes it on.
func (st *stream) take(ctx context.Context, m *pb.StreamRequest) error {
	switch {
	case m.GetBatch() != nil:
		b, err := checkBatch(m.GetBatch(), st.node, time.Now())
		if err == nil && !slices.Contains(st.epochs, b.Epoch) {
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
		st.expect(ctx, pending{m.GetBatch().GetEpoch(), t})
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
		if !slices.Contains(st.epochs, e) {
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
		st.lease.show(m.GetReauth().GetToken())
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
	return st.send(&pb.StreamResponse{Message: &pb.StreamResponse_Ack{Ack: &pb.Ack{Epoch: p.epoch, UpTo: res.UpTo}}})
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

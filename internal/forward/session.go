package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/spool"
)

const protocol = 1

// A session is one stream, from Hello to its end.
type session struct {
	f      *Forwarder
	soft   context.Context // ended: deliver what is there, then stop
	ctx    context.Context // of the stream
	cancel context.CancelCauseFunc
	stream grpc.BidiStreamingClient[pb.StreamRequest, pb.StreamResponse]
	kick   chan struct{} // an ack or a drain came; capacity 1

	token  string // the last one shown
	reauth bool   // the collector takes new ones

	window, maxRecords, maxBytes int

	lanes    []sending // of the Hello; the last is the running epoch
	at       int       // lane being sent
	more     bool      // the spool has epochs that did not fit the hello
	chunk    spool.Chunk
	batch    pb.Batch
	lastSend time.Time
	welcomed bool // read after run

	mu         sync.Mutex // guards what the receiver shares
	inFlight   []mark
	ackTimer   *time.Timer
	most       map[spool.Epoch]uint64 // highest number that can be acknowledged
	draining   bool
	drainUntil time.Time
	drainDelay time.Duration // read after run
	progress   bool          // something was acknowledged; read after run
}

// sending is an epoch and up to where it was sent.
type sending struct {
	spool.Lane
	after uint64
}

// A mark is the end of a batch in flight.
type mark struct {
	epoch spool.Epoch
	last  uint64
}

var (
	errSilent    = errors.New("no acknowledgement in time")
	errNoWelcome = errors.New("no welcome in time")
)

// protocolError reports that the collector does not keep to the protocol.
type protocolError string

func (e protocolError) Error() string { return "protocol: " + string(e) }

// run makes a stream, delivers over it, and says why it ended; never nil.
func (s *session) run(hard context.Context) error {
	if s.f.cfg.Token != nil {
		var err error
		if s.token, err = s.f.cfg.Token(); err != nil {
			return err
		}
	}
	conn, err := s.f.dial(hard, s.token)
	if err != nil {
		return err
	}
	defer conn.Close()
	s.ctx, s.cancel = context.WithCancelCause(hard)
	defer s.cancel(nil)
	s.kick = make(chan struct{}, 1)
	if err := s.greet(conn); err != nil {
		return s.why(err)
	}
	s.welcomed = true
	now := time.Now()
	s.f.count(func(st *Status) { st.Connected, st.Since, st.Connections = true, now, st.Connections+1 })
	s.f.log.Info("connected to the collector", "target", s.f.cfg.Target)

	s.ackTimer = time.AfterFunc(s.f.cfg.AckTimeout, func() { s.cancel(errSilent) })
	s.ackTimer.Stop()
	defer s.ackTimer.Stop()
	go s.watch(conn)
	received := make(chan error, 1)
	go func() {
		err := s.receive()
		received <- err
		s.cancel(err)
	}()
	err = s.send()
	if endsWell(err) {
		// Tell the collector that this is the end, and let it answer.
		s.stream.CloseSend()
		select {
		case <-received:
		case <-time.After(time.Second):
			s.cancel(err)
			<-received
		case <-hard.Done():
			<-received
		}
		return err
	}
	if errors.Is(err, io.EOF) { // Send knows only that it is over; Recv knows why
		select {
		case err = <-received:
			return s.why(err)
		case <-time.After(time.Second):
		}
	}
	s.cancel(err)
	<-received
	return s.why(err)
}

// why is the reason behind err: when we ended the stream ourselves, ours.
func (s *session) why(err error) error {
	if cause := context.Cause(s.ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// greet says hello and takes the collector's word on where to go on.
func (s *session) greet(conn *grpc.ClientConn) error {
	timer := time.AfterFunc(s.f.cfg.welcomeWait, func() { s.cancel(errNoWelcome) })
	defer timer.Stop()
	var err error
	if s.stream, err = pb.NewIngestServiceClient(conn).Stream(s.ctx); err != nil {
		return err
	}
	if err := s.stream.Send(&pb.StreamRequest{Message: &pb.StreamRequest_Hello{Hello: s.hello()}}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	m, err := s.stream.Recv()
	if errors.Is(err, io.EOF) {
		return protocolError("the stream ended before the welcome")
	}
	if err != nil {
		return err
	}
	w := m.GetWelcome()
	if w == nil {
		return protocolError(fmt.Sprintf("%T came before the welcome", m.GetMessage()))
	}
	return s.welcome(w)
}

func (s *session) hello() *pb.Hello {
	left := s.f.cfg.maxLanes
	var lanes []spool.Lane
	all := s.f.cfg.Spool.Lanes()
	for i, l := range all {
		// Acknowledged epochs are few, and the collector may have lost them. Of
		// the others the oldest go first, the rest in the next stream.
		if i < len(all)-1 && l.Acked < l.Made {
			if left--; left < 0 {
				s.more = true
				continue
			}
		}
		lanes = append(lanes, l)
	}
	h := &pb.Hello{Protocol: protocol, AgentVersion: s.f.cfg.Version, Node: s.f.cfg.Node, BootId: s.f.cfg.BootID}
	for _, l := range lanes {
		s.lanes = append(s.lanes, sending{Lane: l})
		h.Lanes = append(h.Lanes, &pb.Lane{Epoch: slices.Clone(l.Epoch[:]), FirstSeq: l.First, Made: l.Made})
	}
	return h
}

func (s *session) welcome(w *pb.Welcome) error {
	if len(w.GetResume()) != len(s.lanes) {
		return protocolError(fmt.Sprintf("welcome resumes %d epochs, hello had %d", len(w.GetResume()), len(s.lanes)))
	}
	s.most = make(map[spool.Epoch]uint64, len(s.lanes))
	for i, r := range w.GetResume() {
		l := &s.lanes[i]
		if string(r.GetEpoch()) != string(l.Epoch[:]) {
			return protocolError(fmt.Sprintf("welcome resumes epoch %.40x where hello had %s", r.GetEpoch(), l.Epoch))
		}
		if err := s.resume(l, r.GetAfter(), i == len(s.lanes)-1); err != nil {
			return err
		}
		// What an earlier stream sent may be committed only now, and its number
		// comes back in an ack of ours. What an earlier run sent, nobody here knows.
		s.most[l.Epoch] = l.Made
	}
	running := s.lanes[len(s.lanes)-1]
	s.most[running.Epoch] = max(running.after, s.f.sent)
	s.reauth = w.GetReauth()
	s.window = bounded(w.GetWindow(), defaultWindow, maxWindow)
	s.maxRecords = bounded(w.GetMaxBatchRecords(), defaultRecords, maxRecords)
	s.maxBytes = bounded(w.GetMaxBatchBytes(), defaultBytes, maxBytes)
	if t := w.GetServerTime(); t.IsValid() {
		skew := time.Until(t.AsTime())
		s.f.count(func(st *Status) { st.ClockSkew = skew })
	}
	return nil
}

func bounded(v uint32, silent, most int) int {
	if v == 0 {
		return silent
	}
	return int(min(v, uint32(most)))
}

// resume sets where an epoch goes on.
func (s *session) resume(l *sending, after uint64, running bool) error {
	log := s.f.log.With("epoch", l.Epoch.String(), "after", after, "made", l.Made, "acked", l.Acked)
	if after > l.Made {
		s.f.count(func(st *Status) { st.Impossible++ })
		if running {
			log.Error("the collector holds more of the running epoch than was made: the agent must begin a new one")
			return fmt.Errorf("%w: it resumes epoch %s after %d, made are %d", ErrEpochUsed, l.Epoch, after, l.Made)
		}
		// After a power cut the count of an earlier epoch may be behind what was
		// sent from memory. There is nothing more to send of it either way.
		log.Warn("the collector holds more of an earlier epoch than is known to have been made")
	}
	if after < l.Acked {
		s.f.count(func(st *Status) { st.Rewinds++ })
		log.Warn("the collector holds less than it had acknowledged: sending again what the spool still has")
	}
	l.after = after
	if err := s.f.cfg.Spool.Resume(l.Epoch, after); err != nil && !errors.Is(err, spool.ErrEpoch) {
		return err
	}
	return nil
}

// receive handles what the collector says, until the stream ends.
func (s *session) receive() error {
	for {
		m, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.draining { // it need not wait for our end
				return errDrained
			}
			return errors.New("the collector ended the stream")
		}
		if err != nil {
			return err
		}
		switch m := m.GetMessage().(type) {
		case *pb.StreamResponse_Ack:
			err = s.ack(m.Ack)
		case *pb.StreamResponse_Drain:
			s.drain(m.Drain)
		case *pb.StreamResponse_Welcome:
			err = protocolError("a second welcome")
		default: // of a later protocol: says nothing to us
		}
		if err != nil {
			return err
		}
		s.wake()
	}
}

func (s *session) ack(a *pb.Ack) error {
	if len(a.GetEpoch()) != len(spool.Epoch{}) {
		return protocolError(fmt.Sprintf("acknowledgement with an epoch of %d bytes", len(a.GetEpoch())))
	}
	e, upTo := spool.Epoch(a.GetEpoch()), a.GetUpTo()
	s.mu.Lock()
	defer s.mu.Unlock()
	most, ok := s.most[e]
	if !ok || upTo > most {
		// Believing it would drop records that were never sent.
		return protocolError(fmt.Sprintf("acknowledgement of %d in epoch %s, sent are %d", upTo, e, most))
	}
	if err := s.f.cfg.Spool.Ack(e, upTo); err != nil && !errors.Is(err, spool.ErrEpoch) {
		return err
	}
	n := len(s.inFlight)
	s.inFlight = slices.DeleteFunc(s.inFlight, func(m mark) bool { return m.epoch == e && m.last <= upTo })
	if len(s.inFlight) < n {
		s.progress = true
		s.ackTimer.Stop()
		if len(s.inFlight) > 0 {
			s.ackTimer.Reset(s.f.cfg.AckTimeout)
		}
	}
	s.f.count(func(st *Status) { st.Acks++ })
	return nil
}

// watch drains the stream when the connection is to go away (GOAWAY), as
// connections do after half an hour: a new one is made before this one is cut.
func (s *session) watch(conn *grpc.ClientConn) {
	// A stream can be there a moment before its connection is called ready.
	for conn.GetState() == connectivity.Connecting {
		if !conn.WaitForStateChange(s.ctx, connectivity.Connecting) {
			return
		}
	}
	if !conn.WaitForStateChange(s.ctx, connectivity.Ready) {
		return
	}
	select {
	case <-time.After(200 * time.Millisecond): // when it broke, the stream's own error comes first
	case <-s.ctx.Done():
		return
	}
	s.drain(&pb.Drain{})
	s.wake()
}

func (s *session) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// drainTime is how long batches in flight are waited for after a Drain.
const drainTime = 5 * time.Second

func (s *session) drain(d *pb.Drain) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return
	}
	s.draining, s.drainUntil = true, time.Now().Add(drainTime)
	s.drainDelay = min(time.Duration(d.GetDelayMs())*time.Millisecond, 10*time.Minute)
}

// send delivers until there is a reason to stop.
func (s *session) send() error {
	sp := s.f.cfg.Spool
	beat := time.NewTicker(s.f.cfg.HeartbeatInterval)
	defer beat.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	if err := s.heartbeat(); err != nil {
		return err
	}
	soft := s.soft.Done()
	for {
		select {
		case <-beat.C: // also when there is always something to send
			if err := s.heartbeat(); err != nil {
				return err
			}
		default:
		}
		changed := sp.Changed()
		sent, wait, err := s.next()
		if err != nil {
			return err
		}
		if sent {
			continue
		}
		if s.soft.Err() != nil && sp.Stats().Unacked == 0 {
			return errDone
		}
		timer.Reset(wait)
		select {
		case <-changed:
		case <-s.kick:
		case <-timer.C:
		case <-beat.C:
			err = s.heartbeat()
		case <-soft:
			soft = nil
		case <-s.ctx.Done():
			err = context.Cause(s.ctx)
		}
		if err != nil {
			return err
		}
	}
}

// next sends a batch if one is due; else wait is when to look again, if
// nothing happens before.
func (s *session) next() (sent bool, wait time.Duration, err error) {
	const long = time.Minute
	s.mu.Lock()
	flying, draining, left := len(s.inFlight), s.draining, time.Until(s.drainUntil)
	s.mu.Unlock()
	switch {
	case draining && (flying == 0 || left <= 0):
		return false, 0, errDrained
	case draining:
		return false, left, nil
	case flying >= s.window:
		return false, long, nil
	}
	l := &s.lanes[s.at]
	last := s.at == len(s.lanes)-1
	if last && s.more && flying == 0 {
		return false, 0, errAgain
	}
	err = s.f.cfg.Spool.Read(l.Epoch, l.after, s.maxRecords, s.maxBytes, &s.chunk)
	switch {
	case err == nil:
	case last && errors.Is(err, io.EOF):
		return false, long, nil
	case errors.Is(err, io.EOF) || errors.Is(err, spool.ErrEpoch):
		s.at = min(s.at+1, len(s.lanes)-1)
		return true, 0, nil // look at the next epoch at once
	default:
		s.f.count(func(st *Status) { st.ReadErrors++ })
		s.f.logSeldom(slog.LevelError, "cannot read the spool", err)
		return false, time.Second, nil
	}
	// Full batches go at once, and so does anything when nothing is in flight.
	if flying > 0 && !s.fullChunk() {
		if wait := time.Until(s.lastSend.Add(s.f.cfg.linger)); wait > 0 {
			return false, wait, nil
		}
	}
	l.after = s.chunk.Last
	return true, 0, s.sendBatch()
}

func (s *session) fullChunk() bool {
	return len(s.chunk.Records)+len(s.chunk.Losses) >= s.maxRecords || s.chunk.Bytes() >= s.maxBytes*3/4
}

// sendBatch sends s.chunk.
func (s *session) sendBatch() error {
	c, b := &s.chunk, &s.batch
	b.Epoch, b.FirstSeq = append(b.Epoch[:0], c.Epoch[:]...), c.First
	b.Records, b.Losses = b.Records[:0], b.Losses[:0]
	for i := range c.Records {
		r := &c.Records[i]
		b.Records = append(b.Records, &pb.Record{Seq: r.Seq, Payload: r.Payload, Crc32C: r.CRC})
	}
	for i := range c.Losses {
		l := &c.Losses[i]
		b.Losses = append(b.Losses, &pb.Loss{From: l.From, To: l.To, Reason: reason(l.Reason), Detail: l.Detail})
	}
	s.mu.Lock()
	if len(s.inFlight) == 0 {
		s.ackTimer.Reset(s.f.cfg.AckTimeout)
	}
	s.inFlight = append(s.inFlight, mark{c.Epoch, c.Last})
	s.most[c.Epoch] = max(s.most[c.Epoch], c.Last) // before it goes: the ack may overtake us
	if s.at == len(s.lanes)-1 {
		s.f.sent = max(s.f.sent, c.Last)
	}
	s.mu.Unlock()
	// Send has encoded the message when it returns, so the chunk is free again:
	// no stats handler or retry policy, which may look later, is set.
	if err := s.stream.Send(&pb.StreamRequest{Message: &pb.StreamRequest_Batch{Batch: b}}); err != nil {
		return err
	}
	s.lastSend = time.Now()
	s.f.count(func(st *Status) {
		st.Batches++
		st.Records += uint64(len(c.Records))
		st.LossRanges += uint64(len(c.Losses))
	})
	return nil
}

func reason(r spool.Reason) pb.LossReason {
	switch r {
	case spool.SpoolFull:
		return pb.LossReason_LOSS_REASON_SPOOL_FULL
	case spool.Corrupt:
		return pb.LossReason_LOSS_REASON_CORRUPT
	case spool.Disk:
		return pb.LossReason_LOSS_REASON_DISK
	case spool.Crash:
		return pb.LossReason_LOSS_REASON_CRASH
	case spool.QueueFull:
		return pb.LossReason_LOSS_REASON_QUEUE_FULL
	case spool.TooLarge:
		return pb.LossReason_LOSS_REASON_TOO_LARGE
	}
	return pb.LossReason_LOSS_REASON_UNSPECIFIED
}

// showToken shows the token when it is not the one that was shown last. One
// that cannot be read is tried again with the next heartbeat: the one shown
// lasts a while.
func (s *session) showToken() error {
	if !s.reauth || s.f.cfg.Token == nil {
		return nil
	}
	token, err := s.f.cfg.Token()
	if err != nil {
		s.f.logSeldom(slog.LevelWarn, "no new token to show to the collector", err)
		return nil
	}
	if token == s.token {
		return nil
	}
	s.token = token
	s.f.count(func(st *Status) { st.Reauths++ })
	return s.stream.Send(&pb.StreamRequest{Message: &pb.StreamRequest_Reauth{Reauth: &pb.Reauth{Token: token}}})
}

func (s *session) heartbeat() error {
	if err := s.showToken(); err != nil {
		return err
	}
	st := s.f.cfg.Spool.Stats()
	events, lost := s.f.cfg.EventCounters()
	e := s.lanes[len(s.lanes)-1].Epoch
	err := s.stream.Send(&pb.StreamRequest{Message: &pb.StreamRequest_Heartbeat{Heartbeat: &pb.Heartbeat{
		Epoch: e[:], Made: st.Made, SpoolBytes: uint64(st.Bytes), Events: events, EventsLost: lost, AgentTime: timestamppb.Now(),
	}}})
	if err == nil {
		s.f.count(func(st *Status) { st.Heartbeats++ })
	}
	return err
}

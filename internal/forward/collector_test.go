package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/spool"
	"github.com/procession-dev/procession/internal/testenv/receiver"
)

type store = receiver.Store

var (
	newStore = receiver.NewStore
	errEnd   = errors.New("the collector ends streams")
)

// collector is a small ingest side with one committer.
type collector struct {
	pb.UnimplementedIngestServiceServer
	store *store
	work  chan func()

	mu      sync.Mutex // guards what tests change while it runs
	window  uint32
	before  func()                // before each commit
	reply   func(*pb.Welcome)     // changes a welcome
	onAck   func(*pb.Ack) *pb.Ack // changes an ack; nil: keep it back
	onBatch func(*pb.Batch) bool  // false: the batch gets no further
	hellos  []*pb.Hello
	tokens  []string                                            // shown at the start of a stream, or by a reauth
	drain   map[chan *pb.StreamResponse]context.CancelCauseFunc // the live streams
}

func newCollector(st *store) *collector {
	c := &collector{store: st, work: make(chan func(), 64), window: 3, drain: map[chan *pb.StreamResponse]context.CancelCauseFunc{}}
	go func() {
		for f := range c.work {
			f()
		}
	}()
	return c
}

func (c *collector) set(f func(*collector)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c)
}

func (c *collector) Stream(st grpc.BidiStreamingServer[pb.StreamRequest, pb.StreamResponse]) error {
	m, err := st.Recv()
	if err != nil {
		return err
	}
	h := m.GetHello()
	if h == nil || h.GetProtocol() != 1 {
		return status.Error(codes.InvalidArgument, "no hello")
	}
	out := make(chan *pb.StreamResponse, 1024)
	ctx, cancel := context.WithCancelCause(st.Context())
	defer cancel(nil)
	var sender sync.WaitGroup // one sends at a time
	sender.Go(func() {
		for {
			select {
			case m := <-out:
				if st.Send(m) != nil {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	})
	md, _ := metadata.FromIncomingContext(st.Context())
	c.mu.Lock()
	c.tokens = append(c.tokens, md.Get("authorization")...)
	c.hellos = append(c.hellos, h)
	c.drain[out] = cancel
	reply := c.reply
	w := &pb.Welcome{Window: c.window, MaxBatchRecords: 64, MaxBatchBytes: 64 << 10, ServerTime: timestamppb.Now()}
	c.mu.Unlock()
	defer c.set(func(c *collector) { delete(c.drain, out) })
	c.work <- func() { // through the queue: behind what an earlier stream still has in it
		for _, l := range h.Lanes {
			w.Resume = append(w.Resume, &pb.Resume{Epoch: l.Epoch, After: c.store.Mark(spool.Epoch(l.Epoch))})
		}
		if reply != nil {
			reply(w)
		}
		out <- &pb.StreamResponse{Message: &pb.StreamResponse_Welcome{Welcome: w}}
	}
	go func() {
		for {
			m, err := st.Recv()
			if err != nil {
				cancel(err)
				return
			}
			c.handle(m, out, cancel)
		}
	}()
	<-ctx.Done()
	sender.Wait()
	if err := context.Cause(ctx); errors.Is(err, errEnd) {
		for len(out) > 0 {
			st.Send(<-out)
		}
		return nil
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	// What was received is acknowledged before the end.
	done := make(chan struct{})
	c.work <- func() { close(done) }
	<-done
	for {
		select {
		case m := <-out:
			st.Send(m)
		default:
			return nil
		}
	}
}

func (c *collector) handle(m *pb.StreamRequest, out chan *pb.StreamResponse, fail func(error)) {
	if hb := m.GetHeartbeat(); hb != nil {
		c.store.Beat(hb)
		return
	}
	if r := m.GetReauth(); r != nil {
		c.set(func(c *collector) { c.tokens = append(c.tokens, r.GetToken()) })
		return
	}
	b := proto.Clone(m.GetBatch()).(*pb.Batch)
	c.work <- func() {
		c.mu.Lock()
		before, onAck, onBatch := c.before, c.onAck, c.onBatch
		c.mu.Unlock()
		if onBatch != nil && !onBatch(b) {
			return
		}
		if before != nil {
			before()
		}
		upTo, err := c.store.Commit(b)
		if err != nil {
			fail(status.Error(codes.FailedPrecondition, err.Error()))
			return
		}
		a := &pb.Ack{Epoch: b.Epoch, UpTo: upTo}
		if onAck != nil {
			a = onAck(a)
		}
		if a != nil {
			out <- &pb.StreamResponse{Message: &pb.StreamResponse_Ack{Ack: a}}
		}
	}
}

// sendDrain asks all agents to come back.
func (c *collector) sendDrain(delay time.Duration) {
	c.set(func(c *collector) {
		for out := range c.drain {
			out <- &pb.StreamResponse{Message: &pb.StreamResponse_Drain{Drain: &pb.Drain{DelayMs: uint32(delay.Milliseconds())}}}
		}
	})
}

// pki is a server certificate for 127.0.0.1 and the client's view of it.
var pki = sync.OnceValues(func() (server, client *tls.Config) {
	server, ca := makePKI()
	client, err := TrustOnly(ca, "")
	if err != nil {
		panic(err)
	}
	return server, client
})

func makePKI() (server *tls.Config, ca []byte) {
	server, ca, err := receiver.PKI()
	if err != nil {
		panic(err)
	}
	return server, ca
}

// always is a TLS configuration that does not change.
func always(c *tls.Config) func(context.Context) (*tls.Config, error) {
	return func(context.Context) (*tls.Config, error) { return c, nil }
}

// server runs collectors one after the other at one address.
type server struct {
	t    testing.TB
	addr string
	srv  *grpc.Server
	done chan struct{}
	age  time.Duration // of a connection; 0: any
	tls  *tls.Config   // nil: pki's
}

func serve(t testing.TB, c *collector) *server {
	s := &server{t: t, addr: "127.0.0.1:0"}
	s.start(c)
	t.Cleanup(s.kill)
	return s
}

func (s *server) start(c *collector) {
	s.t.Helper()
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = l.Addr().String()
	conf, _ := pki()
	if s.tls != nil {
		conf = s.tls
	}
	age := keepalive.ServerParameters{MaxConnectionAge: s.age, MaxConnectionAgeGrace: 10 * time.Second}
	s.srv = grpc.NewServer(grpc.Creds(credentials.NewTLS(conf)), grpc.KeepaliveParams(age),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second, PermitWithoutStream: true}))
	pb.RegisterIngestServiceServer(s.srv, c)
	s.done = make(chan struct{})
	go func(srv *grpc.Server, done chan struct{}) {
		srv.Serve(l)
		close(done)
	}(s.srv, s.done)
}

// kill ends the server at once: connections break.
func (s *server) kill() {
	s.srv.Stop()
	<-s.done
}

// proxy passes TCP on, until told otherwise.
type proxy struct {
	t      testing.TB
	l      net.Listener
	target string

	mu    sync.Mutex // guards all below
	conns map[net.Conn]bool
	after int           // cut each connection after so many bytes to the server; 0: do not
	hold  chan struct{} // closed when traffic may flow; nil: it flows
	pause time.Duration // between pieces of 1 KiB
}

func newProxy(t testing.TB, target string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, l: l, target: target, conns: map[net.Conn]bool{}}
	t.Cleanup(func() {
		l.Close()
		p.flow()
		p.cut()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.pass(c)
		}
	}()
	return p
}

func (p *proxy) addr() string { return p.l.Addr().String() }

func (p *proxy) pass(in net.Conn) {
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		in.Close()
		return
	}
	p.mu.Lock()
	p.conns[in], p.conns[out] = true, true
	after := p.after
	p.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { p.copy(out, in, after) })
	wg.Go(func() { p.copy(in, out, 0) })
	wg.Wait()
	p.mu.Lock()
	delete(p.conns, in)
	delete(p.conns, out)
	p.mu.Unlock()
}

func (p *proxy) copy(to, from net.Conn, after int) {
	defer to.Close()
	defer from.Close()
	b := make([]byte, 1024)
	for total := 0; ; {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		p.mu.Lock()
		hold, pause := p.hold, p.pause
		p.mu.Unlock()
		if hold != nil {
			<-hold
		}
		if pause > 0 {
			time.Sleep(pause) // the slow link itself, not a wait for something
		}
		if total += n; after > 0 && total > after {
			return
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

// cut breaks every connection.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.(*net.TCPConn).SetLinger(0) // a reset, not an end
		c.Close()
	}
}

// stall keeps bytes back until flow.
func (p *proxy) stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold == nil {
		p.hold = make(chan struct{})
	}
}

func (p *proxy) flow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold != nil {
		close(p.hold)
		p.hold = nil
	}
}

func (p *proxy) cutAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.after = n
}

// endStreams ends them at once, with OK.
func (c *collector) endStreams() {
	c.set(func(c *collector) {
		for _, cancel := range c.drain {
			cancel(errEnd)
		}
	})
}

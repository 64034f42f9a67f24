package ingest_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/procession-dev/procession/internal/ingest"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// An agent that brings a hundred times its share is slowed and loses nothing;
// another one does not notice.
func TestRateOfOneAgent(t *testing.T) {
	s := startWith(t, storetest.Dir(t), nil, tls.RequireAndVerifyClientCert, func(c *ingest.Config) { c.Rate, c.Burst = 200, 100 })
	const many = 500
	mad := &ingesttest.Agent{Node: "mad", Epoch: epoch, Records: records(t, "mad", 1, many)}
	good := &ingesttest.Agent{Node: "good", Epoch: epoch, Records: records(t, "good", 1, 10)}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	begin := time.Now()
	done := make(chan error, 1)
	go func() { done <- mad.RunOn(ctx, ingesttest.Dial(t, s.addr, s.creds("mad"))) }()
	eventually(t, "the mad agent is slowed", func() bool { return s.counter("procession_collector_batches_slowed_total", "") > 0 })
	if err := good.RunOn(ctx, ingesttest.Dial(t, s.addr, s.creds("good"))); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		t.Errorf("the mad agent was through before the other one: %v", err)
	default:
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < (many-100)*time.Second/200-500*time.Millisecond {
		t.Errorf("%d records at 200/s with a burst of 100 took only %v", many, took)
	}
	checkOnce(t, s.st, "mad", epoch, many)
	checkOnce(t, s.st, "good", epoch, 10)
	if s.counter("procession_collector_slowed_seconds_total", "") < 1 {
		t.Error("the time it was slowed is not counted")
	}
	s.addsUp()
}

// Thousands of connections that never say who they are, from one address, are
// closed at once but for a few; they are counted, and an agent elsewhere is
// served as ever.
func TestFloodOfStrangers(t *testing.T) {
	s := startWith(t, storetest.Dir(t), nil, tls.RequireAndVerifyClientCert, func(c *ingest.Config) { c.Strangers = 80 })
	const flood = 3000
	var open []net.Conn
	t.Cleanup(func() {
		for _, c := range open {
			c.Close()
		}
	})
	for range flood {
		c, err := net.DialTimeout("tcp", s.addr, 5*time.Second)
		if err != nil {
			continue // its reset came first
		}
		open = append(open, c)
	}
	eventually(t, "all but ten were refused", func() bool {
		return s.counter("procession_collector_connections_refused_total", "address") == flood-10
	})
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	cc, err := grpc.NewClient("passthrough:///"+s.addr, grpc.WithTransportCredentials(s.creds("n")),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return from.DialContext(ctx, "tcp", addr) }))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	a := &ingesttest.Agent{Node: "n", Epoch: epoch, Records: records(t, "n", 1, 20)}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := a.RunOn(ctx, cc); err != nil {
		t.Errorf("an agent of another address: %v", err)
	}
	// When they are gone their address is as welcome as any.
	for _, c := range open {
		c.Close()
	}
	open = nil
	b := &ingesttest.Agent{Node: "m", Epoch: epoch, Records: records(t, "m", 1, 20)}
	if err := b.Run(ctx, func() (*grpc.ClientConn, error) { return s.dial(s.creds("m")) }); err != nil {
		t.Errorf("an agent of the address the flood came from: %v", err)
	}
}

// A stream that is drip-fed holds nobody up, and ends when it never gets to its
// hello.
func TestSlowStreams(t *testing.T) {
	s := start(t, nil)
	var slow []ingesttest.Stream
	for range 2 {
		st := s.stream("slow")
		slow = append(slow, st)
	}
	a := &ingesttest.Agent{Node: "n", Epoch: epoch, Records: records(t, "n", 1, 50)}
	if err := a.RunOn(t.Context(), ingesttest.Dial(t, s.addr, s.creds("n"))); err != nil {
		t.Fatal(err)
	}
	for _, st := range slow {
		if _, err := st.Recv(); err == nil {
			t.Error("a stream without a hello was answered")
		}
	}
	eventually(t, "they are gone", func() bool { return s.counter("procession_collector_streams", "") == 0 })
}

// Where tokens say who agents are, a handshake tells nothing about its peer: it
// stays a stranger until a stream has shown a token, and is closed in time.
func TestStrangersAfterTheHandshake(t *testing.T) {
	s := startWith(t, storetest.Dir(t), nil, tls.VerifyClientCertIfGiven, func(c *ingest.Config) {
		c.Strangers, c.MeetWait = 16, 5*time.Second
	})
	s.creds("any")
	conf := &tls.Config{RootCAs: ingesttest.Roots(t, filepath.Join(s.dir, "tls-any")), NextProtos: []string{"h2"}, ServerName: "localhost"}
	refused := func(why string) float64 {
		return s.counter("procession_collector_connections_refused_total", why)
	}
	var silent []*tls.Conn
	for range 2 {
		c, err := tls.Dial("tcp", s.addr, conf)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	if c, err := tls.Dial("tcp", s.addr, conf); err == nil {
		c.Close()
		t.Error("a third stranger of an address that may have two was let in")
	}
	eventually(t, "the third was refused", func() bool { return refused("address") == 1 })
	for _, c := range silent {
		io.Copy(io.Discard, c) // ends with the connection
	}
	if n := refused("late"); n != 2 {
		t.Errorf("%v connections were closed late, want 2", n)
	}
	a := &ingesttest.Agent{Node: "n", Epoch: epoch, Records: records(t, "n", 1, 5)}
	if err := a.RunOn(t.Context(), ingesttest.Dial(t, s.addr, s.creds("n"))); err != nil {
		t.Errorf("an agent afterwards: %v", err)
	}
}

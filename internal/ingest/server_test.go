package ingest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// A collector end with a real store, a real authority and a real listener.
type server struct {
	t     testing.TB
	addr  string
	ca    *pki.Authority
	st    store.Store
	reg   *prometheus.Registry
	stop  func() // Serve has returned after it
	dir   string
	queue *store.Queue
}

func start(t testing.TB, wrap func(store.Store) store.Store) *server {
	t.Helper()
	return startDir(t, storetest.Dir(t), wrap)
}

func startDir(t testing.TB, dir string, wrap func(store.Store) store.Store) *server {
	t.Helper()
	return startWith(t, dir, wrap, tls.RequireAndVerifyClientCert, func(*ingest.Config) {})
}

func startWith(t testing.TB, dir string, wrap func(store.Store) store.Store, clients tls.ClientAuthType, change func(*ingest.Config)) *server {
	t.Helper()
	s := &server{t: t, dir: dir, reg: prometheus.NewRegistry()}
	st, err := store.OpenSQLite(t.Context(), filepath.Join(s.dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	s.st = st
	if wrap != nil {
		s.st = wrap(st)
	}
	if s.ca, err = pki.Open(filepath.Join(s.dir, "pki")); err != nil {
		t.Fatal(err)
	}
	conf, err := s.ca.ServerConfig(nil, clients, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.queue = store.NewQueue(s.st, store.QueueConfig{Registerer: s.reg})
	cfg := ingest.Config{Queue: s.queue, TLS: conf, Registerer: s.reg,
		Identify: ingest.PeerCertificate(pki.NodeName), HelloWait: 500 * time.Millisecond, DrainWait: 3 * time.Second}
	change(&cfg)
	srv, err := ingest.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	queueCtx, stopQueue := context.WithCancel(context.Background())
	serveCtx, stopServe := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go s.queue.Run(queueCtx)
	go func() { served <- srv.Serve(serveCtx, l) }()
	s.stop = sync.OnceFunc(func() {
		stopServe()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		stopQueue()
		<-s.queue.Stopped()
	})
	t.Cleanup(func() {
		s.stop()
		if err := st.Close(); err != nil {
			t.Errorf("close the store: %v", err)
		}
	})
	return s
}

func (s *server) creds(node string) credentials.TransportCredentials {
	s.t.Helper()
	dir := filepath.Join(s.dir, "tls-"+node)
	if _, err := s.ca.Issue(node, time.Hour, dir); err != nil {
		s.t.Fatal(err)
	}
	return ingesttest.Credentials(s.t, dir)
}

func (s *server) dial(creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+s.addr, grpc.WithTransportCredentials(creds))
}

func (s *server) stream(node string) ingesttest.Stream {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	s.t.Cleanup(cancel)
	st, err := pb.NewIngestServiceClient(ingesttest.Dial(s.t, s.addr, s.creds(node))).Stream(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func send(t testing.TB, st ingesttest.Stream, ms ...*pb.StreamRequest) {
	t.Helper()
	for _, m := range ms {
		if err := st.Send(m); err != nil {
			_, err := st.Recv()
			t.Fatalf("send: the stream ended: %v", err)
		}
	}
}

func recv(t testing.TB, st ingesttest.Stream) *pb.StreamResponse {
	t.Helper()
	m, err := st.Recv()
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	return m
}

func records(t testing.TB, node string, from, to uint64) (rs []*pb.Record) {
	for n := from; n <= to; n++ {
		rs = append(rs, ingesttest.Record(t, node, n))
	}
	return rs
}

func lane(e store.Epoch, made uint64) *pb.Lane {
	return &pb.Lane{Epoch: e[:], FirstSeq: 1, Made: made}
}

func (s *server) counter(name, label string) float64 {
	s.t.Helper()
	return storetest.Counters(s.t, s.reg, name)[label]
}

// eventually waits for what another goroutine does.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s: still not so after 10 s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// addsUp checks that every record that was read is counted once.
func (s *server) addsUp() {
	s.t.Helper()
	var got, want float64
	ok := func() bool {
		want = storetest.Sum(s.t, s.reg, "procession_collector_records_received_total")
		got = storetest.Sum(s.t, s.reg, "procession_collector_records_total") + storetest.Sum(s.t, s.reg, "procession_collector_records_refused_total")
		return got == want
	}
	for deadline := time.Now().Add(5 * time.Second); !ok() && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if got != want {
		s.t.Errorf("%v records received, %v counted as stored, rejected, duplicate or refused", want, got)
	}
}

var epoch = storetest.Epoch(0xe1)

func TestStream(t *testing.T) {
	s := start(t, nil)
	st := s.stream("node-1")
	send(t, st, ingesttest.Hello("node-1", lane(epoch, 0)))
	w := recv(t, st).GetWelcome()
	if len(w.GetResume()) != 1 || w.GetResume()[0].GetAfter() != 0 || w.GetWindow() != 4 || w.GetMaxBatchRecords() != 256 ||
		w.GetMaxBatchBytes() != 256<<10 || time.Since(w.GetServerTime().AsTime()).Abs() > time.Minute {
		t.Errorf("welcome %v", w)
	}
	send(t, st, ingesttest.Batch(epoch, records(t, "node-1", 1, 3)))
	if a := recv(t, st).GetAck(); a.GetUpTo() != 3 || !slices.Equal(a.GetEpoch(), epoch[:]) {
		t.Errorf("ack %v, want up to 3", a)
	}
	// Acknowledged means there, now.
	rs := storetest.All(t, s.st)
	if len(rs) != 3 || rs[2].Seq != 3 || rs[2].Node != "node-1" || rs[2].Rule == "" || rs[2].EventTime.Unix() != 1_700_000_003 || rs[2].Severity != pb.Severity_SEVERITY_HIGH {
		t.Errorf("store has %+v", rs)
	}
	send(t, st, ingesttest.Heartbeat(epoch, 9),
		ingesttest.Batch(epoch, records(t, "node-1", 6, 6), &pb.Loss{From: 4, To: 5, Reason: pb.LossReason_LOSS_REASON_SPOOL_FULL, Detail: "d"}))
	if a := recv(t, st).GetAck(); a.GetUpTo() != 6 {
		t.Errorf("ack %v, want up to 6", a)
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after both sides were done: %v, want EOF", err)
	}
	// The next start: the tail that was heard of, 7 to 9, is told as lost.
	st = s.stream("node-1")
	send(t, st, ingesttest.Hello("node-1", lane(epoch, 6), lane(storetest.Epoch(2), 0)))
	if w := recv(t, st).GetWelcome(); w.GetResume()[0].GetAfter() != 6 || w.GetResume()[1].GetAfter() != 0 {
		t.Errorf("welcome %v, want to go on after 6 and 0", w)
	}
	rs = storetest.All(t, s.st)
	if l := rs[len(rs)-1]; l.Kind != store.Loss || l.Seq != 7 || l.To != 9 || l.LossReason != pb.LossReason_LOSS_REASON_CRASH {
		t.Errorf("last record %+v, want a loss of 7 to 9", l)
	}
	if n := s.counter("procession_collector_lost_alerts_total", ""); n != 5 {
		t.Errorf("lost_alerts_total %v, want 5", n)
	}
	s.addsUp()
}

// What is wrong with a message ends the stream with a reason that names the
// field; nothing is stored, and every record is counted.
func TestStreamRefuses(t *testing.T) {
	good := ingesttest.Hello("n", lane(epoch, 0))
	rec := func(n uint64) *pb.Record { return ingesttest.Record(t, "n", n) }
	batch := func(b *pb.Batch) *pb.StreamRequest {
		return &pb.StreamRequest{Message: &pb.StreamRequest_Batch{Batch: b}}
	}
	many := make([]*pb.Record, ingest.MaxBatchRecords+1)
	for i := range many {
		many[i] = &pb.Record{Seq: uint64(i + 1)}
	}
	manyLanes := make([]*pb.Lane, ingest.MaxLanes+1)
	for i := range manyLanes {
		manyLanes[i] = lane(store.Epoch{byte(i), byte(i >> 8)}, 0)
	}
	tests := []struct {
		name string
		send []*pb.StreamRequest
		code codes.Code
		want string
	}{
		{"batch before hello", []*pb.StreamRequest{ingesttest.Batch(epoch, records(t, "n", 1, 2))}, codes.InvalidArgument, "first message must be a hello"},
		{"nothing", []*pb.StreamRequest{{}}, codes.InvalidArgument, "must be a hello"},
		{"silence", nil, codes.DeadlineExceeded, "no hello within"},
		{"hello without lanes", []*pb.StreamRequest{ingesttest.Hello("n")}, codes.InvalidArgument, "hello.lanes"},
		{"hello with too many lanes", []*pb.StreamRequest{ingesttest.Hello("n", manyLanes...)}, codes.InvalidArgument, "hello.lanes: 1025, limit 1024"},
		{"hello of another protocol", []*pb.StreamRequest{{Message: &pb.StreamRequest_Hello{Hello: &pb.Hello{Protocol: 2}}}}, codes.InvalidArgument, "hello.protocol: 2"},
		{"short epoch", []*pb.StreamRequest{ingesttest.Hello("n", &pb.Lane{Epoch: []byte("abc")})}, codes.InvalidArgument, "hello.lanes[0].epoch: 3 bytes, want 16"},
		{"epoch twice", []*pb.StreamRequest{ingesttest.Hello("n", lane(epoch, 0), lane(epoch, 1))}, codes.InvalidArgument, "hello.lanes[1].epoch"},
		{"made too high", []*pb.StreamRequest{ingesttest.Hello("n", lane(epoch, 1<<63))}, codes.InvalidArgument, "hello.lanes[0].made"},
		{"first above made", []*pb.StreamRequest{ingesttest.Hello("n", &pb.Lane{Epoch: epoch[:], FirstSeq: 7, Made: 5})}, codes.InvalidArgument, "hello.lanes[0].first_seq"},
		{"long node", []*pb.StreamRequest{ingesttest.Hello(strings.Repeat("n", 300), lane(epoch, 0))}, codes.InvalidArgument, "hello.node: 300 bytes"},
		{"second hello", []*pb.StreamRequest{good, good}, codes.InvalidArgument, "second hello"},
		{"empty message", []*pb.StreamRequest{good, {}}, codes.InvalidArgument, "no known kind"},
		{"batch without epoch", []*pb.StreamRequest{good, batch(&pb.Batch{FirstSeq: 1, Records: []*pb.Record{rec(1)}})}, codes.InvalidArgument, "batch.epoch: 0 bytes, want 16"},
		{"empty batch", []*pb.StreamRequest{good, batch(&pb.Batch{Epoch: epoch[:], FirstSeq: 1})}, codes.InvalidArgument, "neither records nor losses"},
		{"too many records", []*pb.StreamRequest{good, ingesttest.Batch(epoch, many)}, codes.InvalidArgument, "batch.records: 257, limit 256"},
		{"number 0", []*pb.StreamRequest{good, ingesttest.Batch(epoch, []*pb.Record{{Seq: 0}})}, codes.InvalidArgument, "batch.first_seq: 0"},
		{"first_seq wrong", []*pb.StreamRequest{good, batch(&pb.Batch{Epoch: epoch[:], FirstSeq: 2, Records: []*pb.Record{rec(1)}})}, codes.InvalidArgument, "batch.records[0].seq: 1, want 2"},
		{"hole in the batch", []*pb.StreamRequest{good, ingesttest.Batch(epoch, []*pb.Record{rec(1), rec(2), rec(4)})}, codes.InvalidArgument, "batch.records[2].seq: 4, want 3"},
		{"number twice", []*pb.StreamRequest{good, ingesttest.Batch(epoch, []*pb.Record{rec(1), rec(1)})}, codes.InvalidArgument, "batch.records[1].seq: 1, want 2"},
		{"loss over a record", []*pb.StreamRequest{good, ingesttest.Batch(epoch, []*pb.Record{rec(1)}, &pb.Loss{From: 1, To: 3})}, codes.InvalidArgument, "batch.losses[0].from: 1, want 2"},
		{"loss backwards", []*pb.StreamRequest{good, ingesttest.Batch(epoch, nil, &pb.Loss{From: 4, To: 3})}, codes.InvalidArgument, "batch.losses[0].to: 3"},
		{"loss without end", []*pb.StreamRequest{good, ingesttest.Batch(epoch, nil, &pb.Loss{From: 1, To: 1<<64 - 1})}, codes.InvalidArgument, "batch.losses[0].to"},
		{"heartbeat without epoch", []*pb.StreamRequest{good, {Message: &pb.StreamRequest_Heartbeat{Heartbeat: &pb.Heartbeat{}}}}, codes.InvalidArgument, "heartbeat.epoch"},
		{"batch of an epoch nobody named", []*pb.StreamRequest{good, ingesttest.Batch(storetest.Epoch(0x99), records(t, "n", 1, 1))}, codes.InvalidArgument, "batch.epoch: 99999999999999999999999999999999 was not in the hello"},
		{"heartbeat of an epoch nobody named", []*pb.StreamRequest{good, ingesttest.Heartbeat(storetest.Epoch(0x99), 1)}, codes.InvalidArgument, "heartbeat.epoch: 9999"},
		{"heartbeat too high", []*pb.StreamRequest{good, ingesttest.Heartbeat(epoch, 1<<63)}, codes.InvalidArgument, "heartbeat.made"},
		{"message too large", []*pb.StreamRequest{good, ingesttest.Batch(epoch, []*pb.Record{{Seq: 1, Payload: make([]byte, 5<<20)}})}, codes.ResourceExhausted, "larger than max"},
		{"gap", []*pb.StreamRequest{good, ingesttest.Batch(epoch, records(t, "n", 5, 6))}, codes.FailedPrecondition, "waits for sequence number 1, the batch begins at 5"},
	}
	s := start(t, nil)
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := s.stream(fmt.Sprint("n", i))
			for _, m := range tt.send {
				if st.Send(m) != nil {
					break // the stream has ended; Recv says why
				}
			}
			var err error
			for err == nil {
				_, err = st.Recv()
			}
			if status.Code(err) != tt.code || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v\nwant %v with %q", err, tt.code, tt.want)
			}
		})
	}
	if rs := storetest.All(t, s.st); len(rs) != 0 {
		t.Errorf("stored %+v, want nothing", rs)
	}
	if n := s.counter("procession_collector_gaps_total", ""); n != 1 {
		t.Errorf("gaps_total %v, want 1", n)
	}
	if n := storetest.Sum(t, s.reg, "procession_collector_messages_refused_total"); int(n) != len(tests)-2 {
		t.Errorf("messages_refused_total %v, want %d: all rows but silence and the gap", n, len(tests)-2)
	}
	s.addsUp()
}

// A record that is not an alert is stored with the reason, and the lane goes on.
func TestStreamRejectedRecords(t *testing.T) {
	s := start(t, nil)
	good := ingesttest.Record(t, "n", 1)
	bad := func(seq uint64, p []byte, crc uint32) *pb.Record {
		return &pb.Record{Seq: seq, Payload: p, Crc32C: crc}
	}
	large := make([]byte, ingest.MaxRecordBytes+1)
	// An item of kind 1023, which a newer agent may have: 90,000 bytes.
	newer := append([]byte{0xfa, 0x3f, 0x90, 0xbf, 0x05}, make([]byte, 90000)...)
	recs := []*pb.Record{
		good,
		bad(2, good.GetPayload(), good.GetCrc32C()+1),
		bad(3, []byte("\xff\xff\xff"), store.Checksum([]byte("\xff\xff\xff"))),
		bad(4, nil, 0),
		bad(5, large, store.Checksum(large)),
		// Text that is not UTF-8 where the protocol has a string: alert.rule.
		bad(6, []byte("\x0a\x04\x1a\x02\xff\xfe"), store.Checksum([]byte("\x0a\x04\x1a\x02\xff\xfe"))),
		ingesttest.Record(t, "n", 7),
		ingesttest.ItemRecord(t, 8, &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 7, Place: "container"}}}),
		ingesttest.ItemRecord(t, 9, &pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{Capture: "recorder"}}}),
		ingesttest.ItemRecord(t, 10, &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Place: "container"}}}),
		ingesttest.ItemRecord(t, 11, &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 7, Epoch: []byte("short")}}}),
		bad(12, newer, store.Checksum(newer)),
	}
	st := s.stream("n")
	send(t, st, ingesttest.Hello("n", lane(epoch, 12)))
	recv(t, st)
	send(t, st, ingesttest.Batch(epoch, recs))
	if a := recv(t, st).GetAck(); a.GetUpTo() != 12 {
		t.Fatalf("ack %v, want up to 12", a)
	}
	const noItem = "payload: not an item"
	unknown := "payload: an item of a kind this collector does not know"
	want := []string{"", "crc32c: the payload's is", noItem, unknown, "payload: 1048577 bytes, limit 1048576", noItem, "",
		"", "", "payload: amendment.seq: 0", "payload: amendment.epoch: 5 bytes", unknown}
	kinds := map[int]store.Kind{1: store.Alert, 7: store.Alert, 8: store.Amendment, 9: store.Coverage}
	rs := storetest.All(t, s.st)
	if len(rs) != len(want) {
		t.Fatalf("%d records, want %d", len(rs), len(want))
	}
	for i, r := range rs {
		wantKind := kinds[i+1]
		if wantKind == 0 {
			wantKind = store.Rejected
		}
		if r.Kind != wantKind || !strings.Contains(r.Reason, want[i]) {
			t.Errorf("record %d: %v, reason %q, want %v, %q", i+1, r.Kind, r.Reason, wantKind, want[i])
		}
		if len(r.Payload) > 64<<10 && i+1 != 12 {
			t.Errorf("record %d keeps %d bytes of what was rejected", i+1, len(r.Payload))
		}
	}
	if !bytes.Equal(rs[11].Payload, newer) {
		t.Errorf("%d bytes of a newer agent's item are kept, want all %d", len(rs[11].Payload), len(newer))
	}
	if d := cmp.Diff(map[string]float64{"stored": 4, "rejected": 8, "duplicate": 0, "gap": 0, "failed": 0},
		storetest.Counters(t, s.reg, "procession_collector_records_total")); d != "" {
		t.Errorf("records_total (-want +got):\n%s", d)
	}
	s.addsUp()
}

// Who an agent is does not depend on what it says.
func TestIdentity(t *testing.T) {
	s := start(t, nil)
	st := s.stream("honest")
	send(t, st, ingesttest.Hello("victim", lane(epoch, 1)))
	recv(t, st)
	send(t, st, ingesttest.Batch(epoch, records(t, "victim", 1, 1)))
	recv(t, st)
	if rs := storetest.All(t, s.st); len(rs) != 1 || rs[0].Node != "honest" {
		t.Errorf("stored %+v, want it for node honest", rs)
	}
	if n := s.counter("procession_collector_identity_mismatches_total", ""); n != 1 {
		t.Errorf("identity_mismatches_total %v, want 1", n)
	}
}

func TestCertificates(t *testing.T) {
	s := start(t, nil)
	s.creds("n")
	roots := ingesttest.Roots(t, filepath.Join(s.dir, "tls-n"))
	foreign, err := pki.Open(filepath.Join(s.dir, "foreign"))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.dir, "foreign-tls")
	if _, err := foreign.Issue("n", time.Hour, dir); err != nil {
		t.Fatal(err)
	}
	foreignCert, err := tls.LoadX509KeyPair(filepath.Join(dir, "agent.crt"), filepath.Join(dir, "agent.key"))
	if err != nil {
		t.Fatal(err)
	}
	ownCert, err := tls.LoadX509KeyPair(filepath.Join(s.dir, "tls-n", "agent.crt"), filepath.Join(s.dir, "tls-n", "agent.key"))
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name    string
		creds   credentials.TransportCredentials
		counted string // reason of handshakes_failed_total
		client  string // what the agent is told
	}{
		{"no certificate", credentials.NewTLS(&tls.Config{RootCAs: roots}), "no_certificate", "certificate required"},
		{"a foreign certificate", credentials.NewTLS(&tls.Config{RootCAs: roots, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &foreignCert, nil
		}}), "unknown_authority", "unknown certificate authority"},
		{"plain text", insecure.NewCredentials(), "not_tls", ""},
		{"an old version of TLS", credentials.NewTLS(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{ownCert}, MaxVersion: tls.VersionTLS12}), "old_tls", "protocol version"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := s.counter("procession_collector_handshakes_failed_total", tt.counted)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			st, err := pb.NewIngestServiceClient(ingesttest.Dial(t, s.addr, tt.creds)).Stream(ctx)
			if err == nil {
				st.Send(ingesttest.Hello("n", lane(epoch, 0)))
				_, err = st.Recv()
			}
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), tt.client) {
				t.Errorf("the agent is told %v, want Unavailable with %q", err, tt.client)
			}
			eventually(t, "counted as "+tt.counted, func() bool {
				return s.counter("procession_collector_handshakes_failed_total", tt.counted) > before
			})
		})
	}
	if n := s.counter("procession_collector_streams", ""); n != 0 {
		t.Errorf("%v live streams, want none", n)
	}
}

// gate holds commits up.
type gate struct {
	store.Store
	mu   sync.Mutex
	hold chan struct{} // commits wait for it while not nil
	fail error
}

func (g *gate) Commit(ctx context.Context, cs []store.Change) ([]store.Result, error) {
	g.mu.Lock()
	hold, fail := g.hold, g.fail
	g.mu.Unlock()
	if hold != nil {
		<-hold
	}
	if fail != nil {
		return nil, fail
	}
	return g.Store.Commit(ctx, cs)
}

func (g *gate) set(hold chan struct{}, fail error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hold, g.fail = hold, fail
}

// While the disk is slow at most a window of batches is read from a stream.
func TestWindow(t *testing.T) {
	var g *gate
	s := start(t, func(st store.Store) store.Store { g = &gate{Store: st}; return g })
	st := s.stream("n")
	send(t, st, ingesttest.Hello("n", lane(epoch, 20)))
	recv(t, st)
	hold := make(chan struct{})
	g.set(hold, nil)
	for n := uint64(1); n <= 20; n++ { // an agent that does not care about the window
		send(t, st, ingesttest.Batch(epoch, records(t, "n", n, n)))
	}
	received := func() float64 { return s.counter("procession_collector_records_received_total", "") }
	eventually(t, "a window read", func() bool { return received() == 4 })
	runtime.Gosched()
	if n := received(); n != 4 {
		t.Errorf("%v batches read while none was committed, want 4", n)
	}
	g.set(nil, nil)
	close(hold)
	for up := uint64(0); up < 20; {
		a := recv(t, st).GetAck()
		if a.GetUpTo() != up+1 {
			t.Fatalf("ack up to %d after %d", a.GetUpTo(), up)
		}
		up = a.GetUpTo()
	}
	s.addsUp()
}

// A store that refuses gives no acks, and everything goes on when it is back.
func TestStoreRefuses(t *testing.T) {
	var g *gate
	s := start(t, func(st store.Store) store.Store { g = &gate{Store: st}; return g })
	creds := s.creds("n")
	a := &ingesttest.Agent{Node: "n", Epoch: epoch, Records: records(t, "n", 1, 200)}
	a.OnAck = func(up uint64) {
		if up == 64 {
			g.set(nil, fmt.Errorf("commit: %w", store.ErrFull))
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, func() (*grpc.ClientConn, error) { return s.dial(creds) }) }()
	eventually(t, "commits fail", func() bool { return s.counter("procession_collector_commit_failures_total", "full") > 3 })
	select {
	case err := <-done:
		t.Fatalf("the agent is done: %v", err)
	default:
	}
	g.set(nil, nil)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	checkOnce(t, s.st, "n", epoch, 200)
	if n := s.counter("procession_collector_gaps_total", ""); n != 0 {
		t.Errorf("gaps_total %v, want 0: what follows a failed batch is no gap of the agent's", n)
	}
	s.addsUp()
}

// checkOnce wants the numbers 1..n of an epoch, each once, in order.
func checkOnce(t testing.TB, st store.Store, node string, e store.Epoch, n uint64) {
	t.Helper()
	next := uint64(1)
	for _, r := range storetest.All(t, st) {
		if r.Node != node || r.Epoch != e {
			continue
		}
		if r.Seq != next || r.Kind != store.Alert {
			t.Fatalf("node %s: %v number %d, want alert number %d", node, r.Kind, r.Seq, next)
		}
		next++
	}
	if next != n+1 {
		t.Fatalf("node %s: numbers up to %d, want %d", node, next-1, n)
	}
}

// slowStore spreads what happens within a commit over time, so that a cut
// stream's batches are still waiting when its successor says hello.
type slowStore struct {
	store.Store
	rnd *rand.Rand
}

func (s *slowStore) Commit(ctx context.Context, cs []store.Change) ([]store.Result, error) {
	time.Sleep(time.Duration(s.rnd.IntN(2000)) * time.Microsecond)
	return s.Store.Commit(ctx, cs)
}

// Two live streams of one agent, both resending from where each was told,
// many times: each number once.
func TestTwoStreamsOfOneAgent(t *testing.T) {
	s := start(t, func(st store.Store) store.Store { return &slowStore{st, rand.New(rand.NewPCG(1, 2))} })
	creds := s.creds("n")
	const rounds = 25
	for round := range rounds {
		e := storetest.Epoch(byte(round))
		recs := records(t, "n", 1, 60)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				a := &ingesttest.Agent{Node: "n", Epoch: e, Records: recs, PerSend: 5}
				if err := a.Run(ctx, func() (*grpc.ClientConn, error) { return s.dial(creds) }); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
	}
	all := storetest.All(t, s.st)
	if len(all) != rounds*60 {
		t.Errorf("%d records, want %d", len(all), rounds*60)
	}
	last := make(map[store.Epoch]uint64)
	for _, r := range all {
		if r.Seq != last[r.Epoch]+1 {
			t.Fatalf("epoch %v: number %d after %d", r.Epoch, r.Seq, last[r.Epoch])
		}
		last[r.Epoch] = r.Seq
	}
	dup := s.counter("procession_collector_records_total", "duplicate")
	if dup == 0 {
		t.Error("nothing was ever sent twice: the test proves nothing")
	}
	s.addsUp()
}

// An agent that is cut off at random, with batches in flight, and goes on.
func TestCutStreams(t *testing.T) {
	s := start(t, func(st store.Store) store.Store { return &slowStore{st, rand.New(rand.NewPCG(3, 4))} })
	creds := s.creds("n")
	rnd := rand.New(rand.NewPCG(rand.Uint64(), 5))
	recs := records(t, "n", 1, 800)
	var mu sync.Mutex
	var live []net.Conn
	dial := func() (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///"+s.addr, grpc.WithTransportCredentials(creds),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
				if err == nil {
					mu.Lock()
					live = append(live, c)
					mu.Unlock()
				}
				return c, err
			}))
	}
	a := &ingesttest.Agent{Node: "n", Epoch: epoch, Records: recs, PerSend: 4}
	cut := uint64(20)
	a.OnAck = func(up uint64) {
		if up > cut {
			cut = up + uint64(1+rnd.IntN(40))
			mu.Lock()
			live[len(live)-1].Close() // what was sent is still on its way in
			mu.Unlock()
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := a.Run(ctx, dial); err != nil {
		t.Fatal(err)
	}
	if a.Connect < 10 {
		t.Errorf("only %d streams: nothing was cut", a.Connect)
	}
	checkOnce(t, s.st, "n", epoch, 800)
	s.addsUp()
}

// A third stream of a node ends the oldest: a node cannot hold more memory by
// opening streams.
func TestThirdStreamEndsTheOldest(t *testing.T) {
	s := start(t, nil)
	var sts []ingesttest.Stream
	for range 3 {
		st := s.stream("n")
		send(t, st, ingesttest.Hello("n", lane(epoch, 0)))
		recv(t, st)
		sts = append(sts, st)
	}
	if _, err := sts[0].Recv(); status.Code(err) != codes.Aborted {
		t.Errorf("the oldest stream: %v, want Aborted", err)
	}
	for i, st := range sts[1:] {
		send(t, st, ingesttest.Batch(epoch, records(t, "n", uint64(i+1), uint64(i+1))))
		if a := recv(t, st).GetAck(); a.GetUpTo() != uint64(i+1) {
			t.Errorf("stream %d: ack %v", i+1, a)
		}
	}
}

// On stop agents are told, what they sent is committed and acknowledged.
func TestDrain(t *testing.T) {
	var g *gate
	s := start(t, func(st store.Store) store.Store { g = &gate{Store: st}; return g })
	hc := healthpb.NewHealthClient(ingesttest.Dial(t, s.addr, s.creds("probe")))
	check := func() healthpb.HealthCheckResponse_ServingStatus {
		r, err := hc.Check(t.Context(), &healthpb.HealthCheckRequest{Service: pb.IngestService_ServiceDesc.ServiceName})
		if err != nil {
			t.Fatalf("health: %v", err)
		}
		return r.GetStatus()
	}
	if st := check(); st != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health %v, want SERVING", st)
	}
	st := s.stream("n")
	idle := s.stream("idle")
	for _, x := range []ingesttest.Stream{st, idle} {
		send(t, x, ingesttest.Hello("", lane(epoch, 0)))
		recv(t, x)
	}
	hold := make(chan struct{})
	g.set(hold, nil)
	send(t, st, ingesttest.Batch(epoch, records(t, "n", 1, 2)), ingesttest.Batch(epoch, records(t, "n", 3, 4)))
	eventually(t, "both batches read", func() bool { return s.counter("procession_collector_records_received_total", "") == 4 })
	stopped := make(chan struct{})
	go func() { s.stop(); close(stopped) }()
	for _, x := range []ingesttest.Stream{st, idle} {
		if d := recv(t, x).GetDrain(); d == nil || d.GetDelayMs() == 0 {
			t.Errorf("got %v, want to be asked to drain", d)
		}
	}
	if _, err := idle.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("idle stream: %v, want EOF", err)
	}
	close(hold)
	for _, want := range []uint64{2, 4} {
		if a := recv(t, st).GetAck(); a.GetUpTo() != want {
			t.Errorf("ack %v, want up to %d", a, want)
		}
	}
	if _, err := st.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last ack: %v, want EOF", err)
	}
	<-stopped
	checkOnce(t, s.st, "n", epoch, 4)
	s.addsUp()
}

// An agent that reads no acks cannot keep the server from stopping.
func TestDrainIsBounded(t *testing.T) {
	s := start(t, nil)
	st := s.stream("n")
	send(t, st, ingesttest.Hello("n", lane(epoch, 0)))
	begin := time.Now()
	s.stop() // the client never receives and never closes
	if d := time.Since(begin); d > 8*time.Second {
		t.Errorf("stopping took %v", d)
	}
}

// Streams leave no goroutine behind.
func TestNoLeak(t *testing.T) {
	s := start(t, nil)
	creds := s.creds("n")
	before := runtime.NumGoroutine()
	for i := range 20 {
		cc, err := s.dial(creds)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		st, err := pb.NewIngestServiceClient(cc).Stream(ctx)
		if err != nil {
			t.Fatal(err)
		}
		send(t, st, ingesttest.Hello("n", lane(storetest.Epoch(byte(i)), 0)))
		recv(t, st)
		send(t, st, ingesttest.Batch(storetest.Epoch(byte(i)), records(t, "n", 1, 1)))
		cancel()
		cc.Close()
	}
	eventually(t, "goroutines are gone", func() bool { return runtime.NumGoroutine() <= before+2 })
	if n := s.counter("procession_collector_streams", ""); n != 0 {
		t.Errorf("%v live streams counted, want 0", n)
	}
}

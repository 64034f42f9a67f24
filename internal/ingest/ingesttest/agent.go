// Package ingesttest has an agent for tests: it speaks the protocol as the
// agents' forwarder does, with a spool in memory that never forgets.
package ingesttest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
)

// Stream is the agent's end of a stream.
type Stream = grpc.BidiStreamingClient[pb.StreamRequest, pb.StreamResponse]

// Credentials reads agent.crt, agent.key and ca.crt from dir.
func Credentials(t testing.TB, dir string) credentials.TransportCredentials {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "agent.crt"), filepath.Join(dir, "agent.key"))
	if err != nil {
		t.Fatal(err)
	}
	return credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: Roots(t, dir), MinVersion: tls.VersionTLS13})
}

// Roots reads ca.crt from dir.
func Roots(t testing.TB, dir string) *x509.CertPool {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		t.Fatal("ca.crt has no certificate")
	}
	return pool
}

// Dial connects to a collector, lazily as gRPC does.
func Dial(t testing.TB, addr string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 5 * time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

// Alert is the alert with number seq of a node: an exec with some arguments.
func Alert(node string, seq uint64) *pb.Alert {
	pid := int32(1000 + seq%30000)
	return &pb.Alert{
		Severity: pb.Severity_SEVERITY_HIGH,
		Rule:     "ClusterDetectionPolicy//shells/shell-in-container",
		Title:    "Shell in a container",
		Message:  fmt.Sprintf("sh was started by nginx on %s for the %dth time", node, seq),
		Event: &pb.Event{Time: timestamppb.New(time.Unix(1_700_000_000+int64(seq), 0)), Kind: "Exec", Place: "container",
			Process: &pb.Process{Pid: pid, Start: seq, Exe: []byte("/bin/sh"), Name: []byte("sh"),
				Cmdline: []byte("sh\x00-c\x00id; \x1b[31mcat /etc/shadow\x00"), CmdlineLen: 34,
				Ids:       &pb.IDs{Uid: 33, Euid: 33},
				Ancestors: []*pb.Process{{Pid: 77, Name: []byte("nginx"), Exe: []byte("/usr/sbin/nginx")}, {Pid: 1, Name: []byte("init")}}},
			Container: &pb.Container{Id: "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},
			Pod:       &pb.Pod{Namespace: "default", Name: "web-7f", Uid: "8a5e"}},
		Mitre: []*pb.Mitre{{Tactic: "TA0002", Technique: "T1059.004"}},
	}
}

// Record is Alert in a record.
func Record(t testing.TB, node string, seq uint64) *pb.Record {
	return ItemRecord(t, seq, &pb.Item{Item: &pb.Item_Alert{Alert: Alert(node, seq)}})
}

// ItemRecord is an item in a record.
func ItemRecord(t testing.TB, seq uint64, it *pb.Item) *pb.Record {
	b, err := proto.Marshal(it)
	if err != nil {
		t.Fatal(err)
	}
	return &pb.Record{Seq: seq, Payload: b, Crc32C: store.Checksum(b)}
}

// Hello is the message that begins a stream.
func Hello(node string, lanes ...*pb.Lane) *pb.StreamRequest {
	return &pb.StreamRequest{Message: &pb.StreamRequest_Hello{Hello: &pb.Hello{Protocol: 1, AgentVersion: "test", Node: node, Lanes: lanes}}}
}

// Batch is a message with consecutive records.
func Batch(epoch store.Epoch, recs []*pb.Record, losses ...*pb.Loss) *pb.StreamRequest {
	b := &pb.Batch{Epoch: epoch[:], Records: recs, Losses: losses}
	if len(recs) > 0 {
		b.FirstSeq = recs[0].GetSeq()
	}
	if len(losses) > 0 && (len(recs) == 0 || losses[0].GetFrom() < b.FirstSeq) {
		b.FirstSeq = losses[0].GetFrom()
	}
	return &pb.StreamRequest{Message: &pb.StreamRequest_Batch{Batch: b}}
}

// Heartbeat is a message that says how many numbers were given out.
func Heartbeat(epoch store.Epoch, made uint64) *pb.StreamRequest {
	return &pb.StreamRequest{Message: &pb.StreamRequest_Heartbeat{Heartbeat: &pb.Heartbeat{Epoch: epoch[:], Made: made}}}
}

// An Agent has records of one epoch and wants them acknowledged.
type Agent struct {
	Node    string
	Epoch   store.Epoch
	Records []*pb.Record // Records[i].Seq is i+1
	PerSend int          // records of one batch; 0 is 16

	Acked   uint64
	Connect int          // streams that got a Welcome
	OnAck   func(uint64) // after each
}

// Run connects again and again until everything is acknowledged.
func (a *Agent) Run(ctx context.Context, dial func() (*grpc.ClientConn, error)) error {
	for {
		err := a.once(ctx, dial)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%d of %d acknowledged: %w; last: %w", a.Acked, len(a.Records), ctx.Err(), err)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (a *Agent) once(ctx context.Context, dial func() (*grpc.ClientConn, error)) error {
	cc, err := dial()
	if err != nil {
		return err
	}
	defer cc.Close()
	return a.RunOn(ctx, cc)
}

// RunOn is one stream: it ends when everything is acknowledged, or at the
// first error.
func (a *Agent) RunOn(ctx context.Context, cc *grpc.ClientConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := pb.NewIngestServiceClient(cc).Stream(ctx)
	if err != nil {
		return err
	}
	made := uint64(len(a.Records))
	if err := st.Send(Hello(a.Node, &pb.Lane{Epoch: a.Epoch[:], FirstSeq: 1, Made: made})); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	m, err := st.Recv()
	if err != nil {
		return err
	}
	w := m.GetWelcome()
	if w == nil || len(w.GetResume()) != 1 {
		return fmt.Errorf("first answer is %v, want a welcome", m)
	}
	a.Connect++
	per := a.PerSend
	if per == 0 {
		per = 16
	}
	next := w.GetResume()[0].GetAfter() + 1
	if next <= a.Acked {
		return fmt.Errorf("acknowledged %d, and told to go on at %d", a.Acked, next)
	}
	for inFlight := 0; ; {
		for inFlight < int(w.GetWindow()) && next <= made {
			end := min(next-1+uint64(per), made)
			if err := st.Send(Batch(a.Epoch, a.Records[next-1:end])); err != nil {
				for err = nil; err == nil; { // why is behind the last acks
					_, err = st.Recv()
				}
				return err
			}
			next, inFlight = end+1, inFlight+1
		}
		if inFlight == 0 {
			a.Acked = made
			return nil
		}
		m, err := st.Recv()
		if err != nil {
			return err
		}
		if ack := m.GetAck(); ack != nil {
			inFlight--
			a.Acked = ack.GetUpTo()
			if a.OnAck != nil {
				a.OnAck(a.Acked)
			}
		}
	}
}

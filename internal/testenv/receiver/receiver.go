// Package receiver is the least that a collector is: the other side of what
// agents send, in memory, for tests of the agent's side. A Store holds each
// number of an epoch once, in order, and refuses a gap, as a collector's store
// does; a Server acknowledges what is in it.
package receiver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// PKI makes a server's certificate for 127.0.0.1 and for the name collector,
// and the bundle to trust.
func PKI() (server *tls.Config, ca []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "collector"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"collector"}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &key.PublicKey, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a certificate: %w", err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// A Server takes everything at once and asks nobody who they are.
type Server struct {
	pb.UnimplementedIngestServiceServer
	Store *Store

	// Arrived is called with each batch as soon as it is received, by the
	// goroutine of its stream; nil: not.
	Arrived func(*pb.Batch)
}

// Serve accepts on l until that is closed.
func (s *Server) Serve(l net.Listener, conf *tls.Config) error {
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(conf)))
	pb.RegisterIngestServiceServer(g, s)
	defer g.Stop()
	if err := g.Serve(l); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Stream is of the gRPC service.
func (s *Server) Stream(st grpc.BidiStreamingServer[pb.StreamRequest, pb.StreamResponse]) error {
	m, err := st.Recv()
	if err != nil {
		return err
	}
	if m.GetHello().GetProtocol() != 1 {
		return status.Error(codes.InvalidArgument, "no hello")
	}
	w := &pb.Welcome{Window: 4, ServerTime: timestamppb.Now()}
	for _, l := range m.GetHello().Lanes {
		w.Resume = append(w.Resume, &pb.Resume{Epoch: l.Epoch, After: s.Store.Mark(Epoch(l.Epoch))})
	}
	answer := &pb.StreamResponse{Message: &pb.StreamResponse_Welcome{Welcome: w}}
	for {
		if answer != nil {
			if err := st.Send(answer); err != nil {
				return err
			}
		}
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if answer, err = s.take(m); err != nil {
			return status.Error(codes.FailedPrecondition, err.Error())
		}
	}
}

// take handles a message and says what to answer, nil nothing.
func (s *Server) take(m *pb.StreamRequest) (*pb.StreamResponse, error) {
	if hb := m.GetHeartbeat(); hb != nil {
		s.Store.Beat(hb)
	}
	b := m.GetBatch()
	if b == nil {
		return nil, nil
	}
	if s.Arrived != nil {
		s.Arrived(b)
	}
	upTo, err := s.Store.Commit(b)
	if err != nil {
		return nil, err
	}
	return &pb.StreamResponse{Message: &pb.StreamResponse_Ack{Ack: &pb.Ack{Epoch: b.Epoch, UpTo: upTo}}}, nil
}

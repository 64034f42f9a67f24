package spine

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/ingest/token"
	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/store"
)

var record = flag.String("record", "", "`file` to record a session into: api/proto/procession/v1/testdata/session-N.bin, once, and never again")

// What replays need to know of the tokens: package ingest's tests.
const (
	recordAudience = "procession.test.collector"
	recordAccount  = "system:serviceaccount:test:agent"
	recordNode     = "node-1"
)

// TestRecord records what the agent, as built, and today's ingest say to each
// other: alerts whose pods become known later, with their amendments; a token
// that is shown anew; a drain, the stream after it, and the agent after that,
// which was killed. A session that was recorded stays as it is for ever: package
// ingest plays the agent's part to each later server.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record says where to")
	}
	k := newKubelet(t)
	r := newRecorder(t)
	k.list(kubeletPod(otherUID, "other", "web", containerID(2)))
	agent := r.agent(k)
	web := container(t, webUID, containerID(1))
	runIn(t, web, "spine-tag-1")
	r.until("the alert is sent before its pod is known", func(s *said) bool { return s.items["Alert"] >= 1 })
	k.list(kubeletPod(webUID, "shop", "web", ""))
	r.until("its pod is known, and a rule decided late", func(s *said) bool { return s.items["Alert"] >= 2 && s.items["Amendment"] >= 1 })
	k.list(kubeletPod(webUID, "shop", "web", containerID(1)))
	r.until("its container is known", func(s *said) bool { return s.items["Amendment"] >= 3 })
	r.showToken(2)
	r.until("the new token is shown", func(s *said) bool { return s.agent["Reauth"] == 1 })
	r.serve(t) // the one before is drained
	runIn(t, web, "spine-tag-2")
	r.until("the second stream", func(s *said) bool { return s.agent["Hello"] == 2 && s.items["Alert"] >= 4 })
	agent.cmd.Process.Kill()
	<-agent.done
	agent = r.agent(k)
	runIn(t, web, "spine-tag-3")
	r.until("the next agent", func(s *said) bool { return s.agent["Hello"] == 3 && s.items["Alert"] >= 7 })
	if err := agent.stop(syscall.SIGTERM, 60*time.Second); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := os.WriteFile(*record, r.out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("recorded: %+v", r.said)
}

// said counts messages and items by kind.
type said struct{ agent, collector, items map[string]int }

// A recorder stands between the agent and the collector.
type recorder struct {
	pb.UnimplementedIngestServiceServer
	t         *testing.T
	dir, addr string
	ca        *pki.Authority
	queue     *store.Queue
	stop      func() // the ingest that serves

	mu   sync.Mutex
	up   string // where it does; guarded by mu
	out  bytes.Buffer
	said said
}

func newRecorder(t *testing.T) *recorder {
	r := &recorder{t: t, dir: t.TempDir(), stop: func() {}, said: said{map[string]int{}, map[string]int{}, map[string]int{}}}
	st, err := store.OpenSQLite(t.Context(), filepath.Join(r.dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	if r.ca, err = pki.Open(filepath.Join(r.dir, "pki")); err != nil {
		t.Fatal(err)
	}
	if _, err = r.ca.Issue("any", time.Hour, filepath.Join(r.dir, "tls")); err != nil { // for its ca.crt
		t.Fatal(err)
	}
	r.queue = store.NewQueue(st, store.QueueConfig{})
	ctx, stop := context.WithCancel(context.Background())
	go r.queue.Run(ctx)
	t.Cleanup(func() { r.stop(); stop(); <-r.queue.Stopped() })
	r.serve(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr().String()
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(r.tls())))
	pb.RegisterIngestServiceServer(srv, r)
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	return r
}

func (r *recorder) tls() *tls.Config {
	conf, err := r.ca.ServerConfig(nil, tls.VerifyClientCertIfGiven, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return conf
}

// serve starts the collector's end, after the one before has ended.
func (r *recorder) serve(t *testing.T) {
	v, err := token.New(token.Config{API: believes{}, Audience: recordAudience, Accounts: []string{recordAccount}, CheckNode: pki.CheckNode})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ingest.New(ingest.Config{Queue: r.queue, TLS: r.tls(), Tokens: v})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	before := r.stop
	r.mu.Lock()
	r.up = l.Addr().String()
	r.mu.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { srv.Serve(ctx, l); close(done) }()
	r.stop = func() { stop(); <-done }
	before()
}

// believes confirms every token: it is the recorder's own.
type believes struct{}

func (believes) ReviewToken(context.Context, string, string) (token.Review, error) {
	return token.Review{Authenticated: true, Username: recordAccount, Audiences: []string{recordAudience},
		Extra: map[string][]string{"authentication.kubernetes.io/node-name": {recordNode}}}, nil
}

func (believes) PodNode(context.Context, string, string) (string, string, bool, error) {
	return "", "", false, errors.New("not asked")
}

// showToken writes the token file. What it has ends in the year 2100.
func (r *recorder) showToken(n int) {
	r.t.Helper()
	body := fmt.Sprintf(`{"aud":[%q],"sub":%q,"exp":4102444800,"jti":"%d"}`, recordAudience, recordAccount, n)
	file := filepath.Join(r.dir, "token")
	if err := os.WriteFile(file+".new", []byte("e30."+base64.RawURLEncoding.EncodeToString([]byte(body))+".c2ln"), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		r.t.Fatal(err)
	}
}

func (r *recorder) agent(k *fakeKubelet) *proc {
	r.t.Helper()
	policies := filepath.Join(r.dir, "policies")
	if err := errors.Join(os.MkdirAll(policies, 0o755), os.WriteFile(filepath.Join(policies, "spine.yaml"), []byte(identityPolicy), 0o644)); err != nil {
		r.t.Fatal(err)
	}
	r.showToken(1)
	p := start(r.t, "agent", exec.Command(filepath.Join(built(r.t), "bin", "agent"), append([]string{"run",
		"--state", filepath.Join(r.dir, "agent"), "--policies", policies, "--node", recordNode, "--collector", r.addr,
		"--token", filepath.Join(r.dir, "token"), "--collector-ca", filepath.Join(r.dir, "tls", "ca.crt")}, k.flags()...)...))
	p.waitFor("listening", 60*time.Second)
	return p
}

func (r *recorder) until(what string, ok func(*said) bool) {
	r.t.Helper()
	eventually(r.t, what, time.Minute, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return ok(&r.said)
	})
}

// Stream implements IngestService: it hands everything on, and keeps it.
func (r *recorder) Stream(agent grpc.BidiStreamingServer[pb.StreamRequest, pb.StreamResponse]) error {
	md, _ := metadata.FromIncomingContext(agent.Context())
	ctx := metadata.AppendToOutgoingContext(agent.Context(), "authorization", md.Get("authorization")[0])
	r.mu.Lock()
	up := r.up
	r.mu.Unlock()
	cc, err := grpc.NewClient("passthrough:///"+up, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: ingesttest.Roots(r.t, filepath.Join(r.dir, "tls"))})))
	if err != nil {
		return err
	}
	defer cc.Close()
	collector, err := pb.NewIngestServiceClient(cc).Stream(ctx)
	if err != nil {
		return err
	}
	r.keep('s', nil)
	go func() {
		for {
			m, err := agent.Recv()
			if err != nil {
				collector.CloseSend()
				return
			}
			r.keep('a', clean(m))
			collector.Send(m)
		}
	}()
	for {
		m, err := collector.Recv()
		if err != nil {
			return err
		}
		r.keep('c', m)
		agent.Send(m)
	}
}

// keep appends a message: who ('s' begins a stream, 'a' the agent, 'c' the
// collector), length, message.
func (r *recorder) keep(who byte, m proto.Message) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b []byte
	if m != nil {
		var err error
		if b, err = (proto.MarshalOptions{Deterministic: true}).Marshal(m); err != nil {
			r.t.Error(err)
		}
	}
	r.out.WriteByte(who)
	r.out.Write(binary.AppendUvarint(nil, uint64(len(b))))
	r.out.Write(b)
	kind := func(v any) string { s := fmt.Sprintf("%T", v); return s[strings.LastIndexByte(s, '_')+1:] }
	switch m := m.(type) {
	case *pb.StreamRequest:
		r.said.agent[kind(m.Message)]++
		for _, rec := range m.GetBatch().GetRecords() {
			var it pb.Item
			if err := proto.Unmarshal(rec.GetPayload(), &it); err != nil {
				r.t.Error(err)
			}
			r.said.items[kind(it.Item)]++
		}
	case *pb.StreamResponse:
		r.said.collector[kind(m.Message)]++
	}
}

// clean is what the agent said without what only this machine has: its boot
// and where what was run came from.
func clean(m *pb.StreamRequest) *pb.StreamRequest {
	m = proto.Clone(m).(*pb.StreamRequest)
	if h := m.GetHello(); h != nil {
		h.BootId, h.AgentVersion = "11111111-2222-4333-8444-555555555555", "recorded"
	}
	for _, rec := range m.GetBatch().GetRecords() {
		var it pb.Item
		if proto.Unmarshal(rec.GetPayload(), &it) != nil {
			continue
		}
		if p := it.GetAlert().GetEvent().GetProcess(); p != nil {
			p.Ancestors, p.Cwd = nil, []byte("/")
		}
		rec.Payload, _ = proto.MarshalOptions{Deterministic: true}.Marshal(&it)
		rec.Crc32C = store.Checksum(rec.Payload)
	}
	return m
}

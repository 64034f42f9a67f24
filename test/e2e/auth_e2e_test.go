//go:build e2e

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/test/e2e/cluster"
)

// A door is where agents knock.
type door struct {
	address, serverName string
	roots               *x509.CertPool
	metrics             string // URL of the collector's
}

func openDoor(t *testing.T, c *cluster.Cluster, p *product) *door {
	t.Helper()
	ip := strings.TrimSpace(c.Do(t, "get", "service", "-n", p.namespace, "procession-collector", "-o", "jsonpath={.spec.clusterIP}"))
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.Do(t, "get", "configmap", "-n", p.namespace, "procession-ca", "-o", `jsonpath={.data.ca\.crt}`))) {
		t.Fatal("the bundle has no certificate")
	}
	pod := strings.TrimSpace(c.Do(t, "get", "pod", "-n", p.namespace, "-l", p.collector, "-o", "jsonpath={.items[0].status.podIP}"))
	return &door{
		address: net.JoinHostPort(ip, "7443"), serverName: "procession-collector." + p.namespace + ".svc", roots: roots,
		metrics: "http://" + net.JoinHostPort(pod, "9464") + "/metrics",
	}
}

// knock says hello as an agent of a node and gives the collector's answer.
func (d *door) knock(t *testing.T, token, node string) error {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+d.address, grpc.WithTransportCredentials(
		credentials.NewTLS(&tls.Config{RootCAs: d.roots, ServerName: d.serverName, MinVersion: tls.VersionTLS13})))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	stream, err := pb.NewIngestServiceClient(cc).Stream(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	epoch := make([]byte, 16)
	if _, err := rand.Read(epoch); err != nil {
		t.Fatal(err)
	}
	hello := &pb.Hello{Protocol: 1, AgentVersion: "e2e", Node: node, Lanes: []*pb.Lane{{Epoch: epoch, FirstSeq: 1}}}
	if err := stream.Send(&pb.StreamRequest{Message: &pb.StreamRequest_Hello{Hello: hello}}); err != nil && err != io.EOF {
		return err
	}
	_, err = stream.Recv()
	return err
}

func (d *door) counter(t *testing.T, name, label string) float64 {
	t.Helper()
	return counter(t, d.metrics, name, label)
}

// counter is the sum of a metric's series whose labels hold a text.
func counter(t *testing.T, url, name, label string) float64 {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for line := range strings.Lines(string(b)) {
		series, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || !strings.HasPrefix(series, name) || !strings.Contains(series, label) {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Fatalf("metric %q: %v", line, err)
		}
		sum += v
	}
	return sum
}

// resign makes a genuine token of another one, with other claims.
func resign(t *testing.T, keyFile, token string, change func(claims map[string]any)) string {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("a token with %d parts", len(parts))
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{}
	if err := json.Unmarshal(raw, &claims); err != nil {
		t.Fatal(err)
	}
	change(claims)
	if raw, err = json.Marshal(claims); err != nil {
		t.Fatal(err)
	}
	pemBytes, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(pemBytes)
	if block == nil {
		t.Fatalf("%s is not PEM", keyFile)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	signed := parts[0] + "." + base64.RawURLEncoding.EncodeToString(raw)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, parsed.(*ecdsa.PrivateKey), sum[:])
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64) // ES256: r and s, 32 bytes each
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(sig)
}

// otherKey is a key that the API server does not know.
func otherKey(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// testAuthentication knocks with everything that must not open, on a collector
// that asks the real API server, and looks at reason and counter.
func testAuthentication(t *testing.T, p *product) {
	c := p.c
	d := openDoor(t, c, p)
	agent := p.pod(t, p.agents)
	create := func(args ...string) string {
		return strings.TrimSpace(c.Do(t, append([]string{"create", "token", "-n", p.namespace}, args...)...))
	}
	const audience = "procession.procession-system.collector"
	bound := []string{"--bound-object-kind", "Pod", "--bound-object-name", agent.Name}
	good := create(append([]string{"procession-agent", "--audience", audience}, bound...)...)
	if err := d.knock(t, good, c.Node); err != nil {
		t.Fatalf("an agent's own token is refused: %v", err)
	}
	over := time.Now().Add(-time.Hour).Unix()
	for _, tc := range []struct {
		name, token, reason string
		code                codes.Code
	}{
		{"no token", "", "no_token", codes.Unauthenticated},
		{"not a token", "letmein", "malformed", codes.Unauthenticated},
		{"wrong audience", create(append([]string{"procession-agent", "--audience", "somebody-else"}, bound...)...), "wrong_audience", codes.Unauthenticated},
		{"the API server's audience", create(append([]string{"procession-agent"}, bound...)...), "wrong_audience", codes.Unauthenticated},
		{"wrong service account", create("default", "--audience", audience), "wrong_account", codes.Unauthenticated},
		{"bound to no pod, so to no node", create("procession-agent", "--audience", audience), "no_node", codes.Unauthenticated},
		{"expired", resign(t, c.SigningKeyFile(), good, func(claims map[string]any) {
			claims["exp"], claims["iat"], claims["nbf"] = over, over-600, over-600
		}), "expired", codes.Unauthenticated},
		{"of a pod that is gone", resign(t, c.SigningKeyFile(), good, func(claims map[string]any) {
			k := claims["kubernetes.io"].(map[string]any)
			k["pod"] = map[string]any{"name": "procession-agent-gone", "uid": "00000000-1111-2222-3333-444444444444"}
		}), "rejected", codes.Unauthenticated},
		{"another node's name written in, by somebody else", resign(t, otherKey(t), good, func(claims map[string]any) {
			claims["kubernetes.io"].(map[string]any)["node"].(map[string]any)["name"] = "another-node"
		}), "rejected", codes.Unauthenticated},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const metric = "procession_collector_streams_refused_total"
			before := d.counter(t, metric, tc.reason)
			err := d.knock(t, tc.token, c.Node)
			if status.Code(err) != tc.code || !strings.Contains(fmt.Sprint(err), tc.reason) {
				t.Errorf("answer: %v, want %v with %q", err, tc.code, tc.reason)
			}
			if got := d.counter(t, metric, tc.reason) - before; got != 1 {
				t.Errorf("%s{%q} rose by %v, want 1", metric, tc.reason, got)
			}
		})
	}
	t.Run("another node's name claimed", func(t *testing.T) {
		const metric = "procession_collector_identity_mismatches_total"
		before := d.counter(t, metric, "")
		if err := d.knock(t, good, "another-node"); err != nil {
			t.Errorf("refused: %v; the claim is to be ignored and told", err)
		}
		if got := d.counter(t, metric, "") - before; got != 1 {
			t.Errorf("%s rose by %v, want 1", metric, got)
		}
	})
	t.Run("connections", func(t *testing.T) { testHandshakes(t, d) })
}

// testHandshakes connects in ways that are refused before any message.
func testHandshakes(t *testing.T, d *door) {
	const metric = "procession_collector_handshakes_failed_total"
	dial := func(t *testing.T) net.Conn {
		conn, err := (&net.Dialer{Timeout: 30 * time.Second}).DialContext(t.Context(), "tcp", d.address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	for _, tc := range []struct {
		name, reason string
		try          func(*testing.T, net.Conn) error
	}{
		{"plain HTTP", "not_tls", func(t *testing.T, conn net.Conn) error {
			if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: collector\r\n\r\n"); err != nil {
				return err
			}
			b, err := io.ReadAll(conn)
			if strings.HasPrefix(string(b), "HTTP/1.1 200") {
				t.Errorf("answered: %.100s", b)
			}
			return cmpErr(err, "closed")
		}},
		{"TLS 1.2", "old_tls", func(t *testing.T, conn net.Conn) error {
			return tls.Client(conn, &tls.Config{RootCAs: d.roots, ServerName: d.serverName, MaxVersion: tls.VersionTLS12}).HandshakeContext(t.Context())
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := d.counter(t, metric, tc.reason)
			if err := tc.try(t, dial(t)); err == nil {
				t.Error("no error")
			} else {
				t.Log(err)
			}
			if got := d.counter(t, metric, tc.reason) - before; got != 1 {
				t.Errorf("%s{%q} rose by %v, want 1", metric, tc.reason, got)
			}
		})
	}
}

// cmpErr is err, or one with a text if there is none: the end of a connection
// is as good a refusal as its reset.
func cmpErr(err error, text string) error {
	if err == nil {
		err = fmt.Errorf("%s", text)
	}
	return err
}

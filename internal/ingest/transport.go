package ingest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"
)

// transport is TLS for gRPC's server, instead of gRPC's own: that one keeps a
// copy of the configuration for each connection, and cannot tell what failed.
// It counts and logs handshakes that fail: nobody else sees them.
type transport struct {
	conf *tls.Config
	m    *metrics
	log  *limitedLog
}

// A caller is what a handshake found out.
type caller struct {
	credentials.CommonAuthInfo
	cert *x509.Certificate // verified; nil when none was shown
	conn *gatedConn        // nil when there is no gate
}

// AuthType implements credentials.AuthInfo.
func (caller) AuthType() string { return "tls" }

// met: it is known who this is.
func (c caller) met() {
	if c.conn != nil {
		c.conn.met()
	}
}

// ServerHandshake implements credentials.TransportCredentials.
func (t *transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	held := &heldConn{}
	if gated, ok := conn.(*gatedConn); ok {
		held.gatedConn, held.hold = gated, true
		conn = held
	}
	c := tls.Server(conn, t.conf)
	err := c.Handshake() // gRPC has set a deadline
	held.hold = false
	if err == nil && c.ConnectionState().NegotiatedProtocol != "h2" {
		err = errNotHTTP2
	}
	if err == nil {
		who := caller{conn: held.gatedConn}
		who.SecurityLevel = credentials.PrivacyAndIntegrity
		if chains := c.ConnectionState().VerifiedChains; len(chains) > 0 && len(chains[0]) > 0 {
			who.cert = chains[0][0]
			who.met()
		}
		return c, who, nil
	}
	reason := handshakeReason(err)
	t.m.handshakes.WithLabelValues(reason).Inc()
	level := slog.LevelWarn
	if reason == "closed" { // a port check, not an agent
		level = slog.LevelDebug
	}
	t.log.log(level, "connection refused", slog.String("remote", conn.RemoteAddr().String()),
		slog.String("reason", reason), slog.Any("err", err))
	if held.gatedConn != nil {
		held.linger()
	}
	conn.Close()
	return nil, nil, err
}

var errNotHTTP2 = errors.New("the client does not offer HTTP/2 (ALPN h2)")

// ClientHandshake implements credentials.TransportCredentials.
func (t *transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a server's")
}

// Info implements credentials.TransportCredentials.
func (t *transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials. Nothing in it changes.
func (t *transport) Clone() credentials.TransportCredentials { return t }

// OverrideServerName implements credentials.TransportCredentials.
func (t *transport) OverrideServerName(string) error {
	return errors.New("these credentials are a server's")
}

// A heldConn is not closed during its handshake, so that the peer can be told
// why it failed. Only the handshake's goroutine has it until hold is false.
type heldConn struct {
	*gatedConn
	hold bool
}

func (c *heldConn) Close() error {
	if c.hold {
		return nil
	}
	return c.gatedConn.Close()
}

// linger lets the peer read the alert that says why it was refused. In TLS 1.3
// it is already sending by then, and closing with its bytes unread would make
// the kernel answer with a reset, which throws the alert away.
func (c *heldConn) linger() {
	if c.CloseWrite() != nil {
		return
	}
	c.SetReadDeadline(time.Now().Add(time.Second))
	io.CopyN(io.Discard, c.TCPConn, 64<<10)
}

func handshakeReason(err error) string {
	if inv, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		if inv.Reason == x509.Expired {
			return "expired"
		}
		return "other"
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "unknown_authority"
	}
	switch msg := err.Error(); {
	case errors.Is(err, io.EOF), strings.Contains(msg, "connection reset"):
		return "closed"
	case strings.Contains(msg, "client didn't provide a certificate"):
		return "no_certificate"
	case strings.Contains(msg, "client offered only unsupported versions"):
		return "old_tls"
	case strings.Contains(msg, "first record does not look like a TLS handshake"):
		return "not_tls"
	}
	return "other"
}

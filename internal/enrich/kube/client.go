package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/procession-dev/procession/internal/wholefile"
)

// A Server is whom to ask over HTTPS.
type Server struct {
	// URL is https://host:port; "" is none.
	URL string
	// CAFile holds the certificates to trust, PEM; "" the system's. For a kubelet
	// that made its own certificate this is the file it made
	// (/var/lib/kubelet/pki/kubelet.crt). It is read for each connection, so a
	// renewed one is found.
	CAFile string
	// ServerName is what the server's certificate must be for; "" the host in URL.
	ServerName string
	// TokenFile holds the bearer token. It is read for each request, as it is
	// replaced long before it expires.
	TokenFile string
}

func (s *Server) check() error {
	if s.URL == "" {
		return nil
	}
	u, err := url.Parse(s.URL)
	switch {
	case err != nil:
		return fmt.Errorf("url: %w", err)
	case u.Scheme != "https":
		return fmt.Errorf("url: %q is not https: a token would be readable on the way", s.URL)
	case u.Host == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil:
		return fmt.Errorf("url: %q is not https://host:port", s.URL)
	}
	s.URL = strings.TrimSuffix(s.URL, "/")
	return nil
}

// A StatusError is an answer other than 200.
type StatusError struct {
	Code int
	Text string // the beginning of the body
}

func (e *StatusError) Error() string {
	hint := ""
	switch e.Code {
	case http.StatusUnauthorized:
		hint = ": the token is not accepted (expired, for another audience, or of a service account that is gone)"
	case http.StatusForbidden:
		hint = ": the service account may not (the kubelet wants get on nodes/pods, the API server list and watch on pods)"
	}
	return fmt.Sprintf("status %d%s: %.200q", e.Code, hint, e.Text)
}

// A CredentialError says that what is shown or trusted could not be read.
type CredentialError struct{ Err error }

func (e *CredentialError) Error() string { return e.Err.Error() }

func (e *CredentialError) Unwrap() error { return e.Err }

type client struct {
	server Server
	http   *http.Client
}

func newClient(s Server) *client {
	c := &client{server: s}
	c.http = &http.Client{
		// A redirect would take the token elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialTLSContext: c.dial, Proxy: nil, ForceAttemptHTTP2: false,
			ResponseHeaderTimeout: 20 * time.Second, MaxIdleConns: 1, IdleConnTimeout: 2 * time.Minute,
			MaxResponseHeaderBytes: 64 << 10,
		},
	}
	return c
}

// dial connects with the certificates that are trusted now.
func (c *client) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.server.ServerName, NextProtos: []string{"http/1.1"}}
	if cfg.ServerName == "" {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		cfg.ServerName = host
	}
	if c.server.CAFile != "" {
		pem, err := wholefile.Read(c.server.CAFile, maxCredential)
		if err != nil {
			return nil, &CredentialError{fmt.Errorf("certificates to trust: %w", err)}
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, &CredentialError{fmt.Errorf("certificates to trust: %s holds none", c.server.CAFile)}
		}
	}
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: cfg}
	return d.DialContext(ctx, network, addr)
}

// get asks for a path and returns the body of a 200.
func (c *client) get(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.server.URL+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "procession-agent")
	if c.server.TokenFile != "" {
		token, err := wholefile.Read(c.server.TokenFile, maxCredential)
		if err != nil {
			return nil, &CredentialError{fmt.Errorf("token: %w", err)}
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, &StatusError{resp.StatusCode, string(b)}
	}
	return resp.Body, nil
}

// maxCredential bounds a file that is a token or a few certificates.
const maxCredential = 1 << 20

// causeOf sorts a failure into one of Causes.
func causeOf(err error) string {
	var (
		code      *StatusError
		malformed *MalformedError
		cred      *CredentialError
		invalid   x509.CertificateInvalidError
		unknown   x509.UnknownAuthorityError
		host      x509.HostnameError
		verify    *tls.CertificateVerificationError
		timeout   interface{ Timeout() bool }
		op        *net.OpError
	)
	switch {
	case errors.As(err, &code) && code.Code == http.StatusUnauthorized:
		return "unauthorized"
	case errors.As(err, &code) && code.Code == http.StatusForbidden:
		return "forbidden"
	case errors.As(err, &cred):
		return "unauthorized"
	case errors.As(err, &invalid), errors.As(err, &unknown), errors.As(err, &host), errors.As(err, &verify):
		return "certificate"
	case errors.Is(err, errTooLarge):
		return "too-large"
	case errors.As(err, &malformed):
		return "malformed"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	case errors.As(err, &op), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, os.ErrNotExist):
		return "unreachable"
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.Unimplemented:
		return "unreachable"
	case codes.DeadlineExceeded:
		return "timeout"
	case codes.PermissionDenied:
		return "forbidden"
	case codes.ResourceExhausted:
		return "too-large"
	}
	return "other"
}

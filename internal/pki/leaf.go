package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/wholefile"
)

// How long certificates are good for.
const (
	serverLife  = 24 * time.Hour
	MinNodeLife = time.Hour
	MaxNodeLife = 30 * 24 * time.Hour
)

const (
	trustDomain = "procession"
	nodePrefix  = "/node/"
	maxNode     = 253 // as Kubernetes limits names
)

// CheckNode refuses names that a certificate or an alert's id cannot carry.
func CheckNode(name string) error {
	if name == "" {
		return errors.New("empty node name")
	}
	if len(name) > maxNode {
		return fmt.Errorf("node name has %d bytes, limit %d", len(name), maxNode)
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case (c == '.' || c == '-' || c == '_') && i > 0:
		default:
			return fmt.Errorf("node name %.64q: want letters, digits, dots, hyphens, underscores, and a letter or digit first", name)
		}
	}
	return nil
}

// NodeName is the node a verified client certificate was issued to: the one
// URI spiffe://procession/node/<name>, or the common name if the certificate
// has no URI at all.
func NodeName(c *x509.Certificate) (string, error) {
	if len(c.URIs) == 0 {
		name := c.Subject.CommonName
		if err := CheckNode(name); err != nil {
			return "", fmt.Errorf("certificate without a URI: common name: %w", err)
		}
		return name, nil
	}
	if len(c.URIs) > 1 {
		return "", fmt.Errorf("certificate has %d URIs, want one", len(c.URIs))
	}
	u := c.URIs[0]
	name, ok := strings.CutPrefix(u.Path, nodePrefix)
	if u.Scheme != "spiffe" || u.Host != trustDomain || !ok || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return "", fmt.Errorf("certificate URI %.128q is not spiffe://%s%s<name>", u.String(), trustDomain, nodePrefix)
	}
	if err := CheckNode(name); err != nil {
		return "", fmt.Errorf("certificate URI: %w", err)
	}
	return name, nil
}

// Issue writes agent.key, agent.crt and ca.crt for a node's agent into out,
// which is made if missing (mode 0700). Files there are replaced.
func (a *Authority) Issue(node string, life time.Duration, out string) (expires time.Time, err error) {
	if err := CheckNode(node); err != nil {
		return time.Time{}, err
	}
	if life < MinNodeLife || life > MaxNodeLife {
		return time.Time{}, fmt.Errorf("certificate life %v: want %v to %v", life, MinNodeLife, MaxNodeLife)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	if err := a.refreshLocked(now); err != nil {
		return time.Time{}, err
	}
	cert, key, err := a.leafLocked(node, now, life, func(t *x509.Certificate) {
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		t.URIs = []*url.URL{{Scheme: "spiffe", Host: trustDomain, Path: nodePrefix + node}}
	})
	if err != nil {
		return time.Time{}, err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return time.Time{}, err
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return time.Time{}, fmt.Errorf("make the output directory: %w", err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	return cert.NotAfter, errors.Join(
		wholefile.Replace(filepath.Join(out, bundleFile), a.bundleLocked(), 0o644),
		wholefile.Replace(filepath.Join(out, "agent.key"), keyPEM, 0o600),
		wholefile.Replace(filepath.Join(out, "agent.crt"), certPEM, 0o644))
}

// leafLocked signs a certificate, at most as long as its authority lasts.
func (a *Authority) leafLocked(name string, now time.Time, life time.Duration, fill func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	tmpl, err := template(name, now, life)
	if err != nil {
		return nil, nil, err
	}
	if len(name) > 64 { // the limit of a common name
		tmpl.Subject.CommonName = ""
	}
	if tmpl.NotAfter.After(a.ca.cert.NotAfter) {
		tmpl.NotAfter = a.ca.cert.NotAfter
	}
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	fill(tmpl)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.ca.cert, key.Public(), a.ca.key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign a certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("sign a certificate: %w", err)
	}
	return cert, key, nil
}

// A serverCert is the certificate in use and whom clients may be signed by.
type serverCert struct {
	config *tls.Config
	issuer *x509.Certificate
	trust  int // number of trusted certificates it was made with
	from   time.Time
	until  time.Time // to be replaced then
}

// CheckServerName refuses what a server's certificate cannot carry.
func CheckServerName(n string) error {
	if net.ParseIP(n) == nil && CheckNode(n) != nil {
		return fmt.Errorf("server name %.64q is neither an address nor a host name", n)
	}
	return nil
}

// ServerConfig is for a listener that agents reach by the given names and
// addresses; loopback and the host's name are always among them. TLS 1.3, with
// client certificates of this authority as clients says: required, verified if
// one is shown, or not asked for. failed, if set, is told why a certificate
// could not be renewed while the present one still holds.
func (a *Authority) ServerConfig(names []string, clients tls.ClientAuthType, failed func(error)) (*tls.Config, error) {
	for _, n := range names {
		if err := CheckServerName(n); err != nil {
			return nil, err
		}
	}
	if host, err := os.Hostname(); err == nil && CheckNode(host) == nil {
		names = append([]string{host}, names...)
	}
	names = append([]string{"localhost", "127.0.0.1", "::1"}, names...)
	first, err := a.serverConfig(names, clients, failed)
	if err != nil {
		return nil, err
	}
	c := first.Clone()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return a.serverConfig(names, clients, failed) }
	return c, nil
}

func (a *Authority) serverConfig(names []string, clients tls.ClientAuthType, failed func(error)) (*tls.Config, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	if err := a.freshLocked(now); err != nil {
		if a.server == nil {
			return nil, err
		}
		if failed != nil {
			failed(err)
		}
	}
	s := a.server
	if s != nil && s.issuer.Equal(a.ca.cert) && s.trust == len(a.trusted) && now.Before(s.until) && !now.Before(s.from) {
		return s.config, nil
	}
	cert, key, err := a.leafLocked("procession collector", now, serverLife, func(t *x509.Certificate) {
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		for _, n := range names {
			if ip := net.ParseIP(n); ip != nil {
				t.IPAddresses = append(t.IPAddresses, ip)
			} else {
				t.DNSNames = append(t.DNSNames, n)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range a.trusted {
		pool.AddCert(c)
	}
	a.server = &serverCert{
		issuer: a.ca.cert, trust: len(a.trusted),
		from: cert.NotBefore, until: now.Add(cert.NotAfter.Sub(now) * 2 / 3),
		config: &tls.Config{
			MinVersion:   tls.VersionTLS13,
			Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}},
			ClientAuth:   clients,
			ClientCAs:    pool,
			Time:         a.now,
			NextProtos:   []string{"h2"},
			// A ticket would let a client come back without its certificate
			// being looked at again.
			SessionTicketsDisabled: true,
		},
	}
	return a.server.config, nil
}

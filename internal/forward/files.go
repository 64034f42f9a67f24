package forward

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/procession-dev/procession/internal/wholefile"
)

// Files names what says who the collector is, and perhaps who we are. They are
// read anew for each connection, so whoever replaces them needs no restart.
type Files struct {
	CA         string // certificates to trust, PEM
	Cert, Key  string // our own, PEM; "" is none
	ServerName string // what the collector's certificate must name; "": the host in the target
}

// Bounds of the files, in bytes.
const (
	maxCA    = 1 << 20
	maxToken = 16 << 10
)

// TLS is for Config.TLS.
func (f Files) TLS(context.Context) (*tls.Config, error) {
	ca, err := wholefile.Read(f.CA, maxCA)
	if err != nil {
		return nil, fmt.Errorf("certificates of the collector's authority: %w", err)
	}
	conf, err := TrustOnly(ca, f.ServerName)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.CA, err)
	}
	if f.Cert != "" {
		cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, fmt.Errorf("our certificate: %w", err)
		}
		conf.Certificates = []tls.Certificate{cert}
	}
	return conf, nil
}

// TrustOnly makes a client's configuration that trusts the authorities in ca
// (PEM) and no others.
func TrustOnly(ca []byte, serverName string) (*tls.Config, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, errors.New("holds no PEM certificate")
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: serverName}, nil
}

// TokenFile makes a Config.Token that reads a file, as the kubelet writes it.
func TokenFile(path string) func() (string, error) {
	return func() (string, error) {
		b, err := wholefile.Read(path, maxToken)
		if err != nil {
			return "", fmt.Errorf("token: %w", err)
		}
		b = bytes.TrimSpace(b)
		if len(b) == 0 {
			return "", fmt.Errorf("token: %s is empty", path)
		}
		for _, c := range b {
			if c <= ' ' || c > '~' { // a header could not carry it
				return "", fmt.Errorf("token: %s holds something else than a token", path)
			}
		}
		return string(b), nil
	}
}

// bearer is a token in a call's metadata.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/forward"
)

// connectFlags say where the collector is and how both sides know each other:
// by certificates in a folder, or, in a cluster, by a service account's token
// here and the collector's own authority there.
type connectFlags struct {
	collector       string
	tls             string
	ca, name, token string

	// fetchCA gets the bundle from elsewhere while the file is not there; nil:
	// it is waited for.
	fetchCA func(context.Context) ([]byte, error)
}

func (c *connectFlags) register(fs *flag.FlagSet) {
	fs.StringVar(&c.collector, "collector", "", "`host:port` of the collector (required)")
	fs.StringVar(&c.tls, "tls", "", "`folder` with agent.crt, agent.key and ca.crt; this or --token is required")
	fs.StringVar(&c.token, "token", "", "`file` with the service account token that says which node this is; read again for each connection and when it changes")
	fs.StringVar(&c.ca, "collector-ca", "", "`file` with the certificates to trust, with --token; it may appear later and is read for each connection")
	fs.StringVar(&c.name, "collector-name", "", "`name` that the collector's certificate must have (default: the host in --collector)")
}

// check finds mistakes before anything is started.
func (c *connectFlags) check(node string) error {
	if c.collector == "" {
		return usagef("--collector is missing: the host:port of the collector")
	}
	var err error
	if c.collector, err = target(c.collector); err != nil {
		return usagef("--collector: %w", err)
	}
	switch {
	case c.tls == "" && c.token == "":
		return usagef("--tls is missing: the folder with agent.crt, agent.key and ca.crt (made by: collector issue --node %s --out FOLDER); in a cluster, --token and --collector-ca instead", node)
	case c.tls != "" && (c.token != "" || c.ca != ""):
		return usagef("--tls and --token, --collector-ca: one way to connect is enough")
	case c.token != "" && c.ca == "":
		return usagef("--collector-ca is missing: the file with the certificates of the collector's authority")
	}
	if c.tls != "" {
		if _, err := c.files().TLS(context.Background()); err != nil {
			return fmt.Errorf("--tls: %w; make the files with: collector issue", err)
		}
	}
	return nil
}

func (c *connectFlags) files() forward.Files {
	if c.tls != "" {
		in := func(name string) string { return filepath.Join(c.tls, name) }
		return forward.Files{CA: in("ca.crt"), Cert: in("agent.crt"), Key: in("agent.key"), ServerName: c.name}
	}
	return forward.Files{CA: c.ca, ServerName: c.name}
}

// apply says to the forwarder what the flags say.
func (c *connectFlags) apply(cfg *forward.Config) {
	cfg.Target = c.collector
	files := c.files()
	cfg.TLS = files.TLS
	if c.token == "" {
		return
	}
	cfg.Token = forward.TokenFile(c.token)
	fetch := seldom(fetchEvery, c.fetchCA)
	cfg.TLS = func(ctx context.Context) (*tls.Config, error) {
		conf, err := files.TLS(ctx)
		if c.fetchCA == nil || !errors.Is(err, fs.ErrNotExist) {
			return conf, err
		}
		// A new cluster: the kubelet writes the file a minute after the
		// collector has published it.
		ca, err := fetch(ctx)
		if err != nil {
			return nil, err
		}
		return forward.TrustOnly(ca, c.name)
	}
}

// target makes a gRPC target of host:port as an operator or a pod's template
// writes it, where an IPv6 address may stand without brackets.
func target(s string) (string, error) {
	if strings.Contains(s, "$(") {
		return "", fmt.Errorf("%s: the variable in it is not set. Its Service is younger than this container, which has to be started again", s)
	}
	if host, port, err := net.SplitHostPort(s); err == nil {
		if host == "" || port == "" {
			return "", fmt.Errorf("%q is not host:port", s)
		}
		return s, nil
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 || net.ParseIP(s[:i]) == nil {
		return "", fmt.Errorf("%q is not host:port", s)
	}
	return net.JoinHostPort(s[:i], s[i+1:]), nil
}

// fetchEvery is how often the bundle is asked for: an agent that is about to
// stop tries to connect several times a second.
const fetchEvery = 2 * time.Second

// seldom makes a function that calls f no more often than every so often, and
// gives its last answer in between. Calls come one at a time.
func seldom(every time.Duration, f func(context.Context) ([]byte, error)) func(context.Context) ([]byte, error) {
	var last time.Time
	var b []byte
	var err error
	return func(ctx context.Context) ([]byte, error) {
		if now := time.Now(); last.IsZero() || now.Sub(last) >= every {
			last = now
			b, err = f(ctx)
		}
		return b, err
	}
}

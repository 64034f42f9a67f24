package collector

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/collector/kube"
	"github.com/procession-dev/procession/internal/ingest"
	"github.com/procession-dev/procession/internal/ingest/token"
	"github.com/procession-dev/procession/internal/kubeapi"
	"github.com/procession-dev/procession/internal/pki"
)

// AuthConfig says by what agents prove which node they are, and where the
// collector's own authority lives.
type AuthConfig struct {
	Certificates bool // client certificates of the collector's own authority
	Tokens       bool // service account tokens, confirmed by the Kubernetes API server

	Audience  string        // tokens must be meant for it
	Accounts  []string      // whose tokens are taken: NAMESPACE/NAME
	PodLookup bool          // ask for the pod's node where the token names none (API servers before 1.30)
	Grace     time.Duration // how long a confirmed token counts after its end while the API server is silent; 0 is 1 h

	// Where the authority's keys and its bundle are; "" is the state directory.
	Secret, ConfigMap string // NAMESPACE/NAME
}

func (c AuthConfig) withDefaults() (AuthConfig, error) {
	if !c.Certificates && !c.Tokens {
		c.Certificates = true
	}
	if (c.Secret == "") != (c.ConfigMap == "") {
		return c, usagef("--ca-secret", "and --ca-configmap go together")
	}
	for flag, v := range map[string]string{"--ca-secret": c.Secret, "--ca-configmap": c.ConfigMap} {
		if _, err := parseRef(v); v != "" && err != nil {
			return c, usagef(flag, "%v", err)
		}
	}
	if !c.Tokens {
		if c.Audience != "" || len(c.Accounts) > 0 || c.PodLookup {
			return c, usagef("--auth", "--token-audience, --agent-account and --pod-lookup are for --auth tokens")
		}
		return c, nil
	}
	switch {
	case c.Audience == "":
		return c, usagef("--token-audience", "is required with --auth tokens: what the agents' tokens are meant for")
	case len(c.Accounts) == 0:
		return c, usagef("--agent-account", "is required with --auth tokens: the agents' service account, NAMESPACE/NAME")
	}
	for _, a := range c.Accounts {
		if _, err := parseRef(a); err != nil {
			return c, usagef("--agent-account", "%v", err)
		}
	}
	return c, nil
}

// parseRef reads NAMESPACE/NAME.
func parseRef(s string) (kube.Ref, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok || ns == "" || name == "" || strings.ContainsAny(name, "/:") || strings.Contains(ns, ":") {
		return kube.Ref{}, fmt.Errorf("%.200q is not NAMESPACE/NAME", s)
	}
	return kube.Ref{Namespace: ns, Name: name}, nil
}

// register declares the flags of AuthConfig.
func (c *AuthConfig) register(fs *flag.FlagSet) {
	fs.Func("auth", "", func(s string) error {
		c.Certificates, c.Tokens = false, false
		for way := range strings.SplitSeq(s, ",") {
			switch way {
			case "certificates":
				c.Certificates = true
			case "tokens":
				c.Tokens = true
			default:
				return errors.New("want certificates, tokens, or both with a comma between")
			}
		}
		return nil
	})
	fs.StringVar(&c.Audience, "token-audience", "", "")
	fs.Func("agent-account", "", func(s string) error { c.Accounts = append(c.Accounts, s); return nil })
	fs.BoolVar(&c.PodLookup, "pod-lookup", false, "")
	fs.DurationVar(&c.Grace, "token-grace", 0, "")
	fs.StringVar(&c.Secret, "ca-secret", "", "")
	fs.StringVar(&c.ConfigMap, "ca-configmap", "", "")
}

const authHelp = `
  --auth WAYS          how agents prove which node they are: certificates (of this
                       collector's authority, see collector issue), tokens (service
                       account tokens, in a cluster), or both: certificates,tokens
  --token-audience A   what tokens must be meant for
  --agent-account NAMESPACE/NAME
                       service account of the agents; may be repeated
  --token-grace TIME   how long a token that was confirmed counts after its end while
                       the Kubernetes API server is silent (1h)
  --pod-lookup         find the node by the agent's pod where its token names none:
                       Kubernetes before 1.30
  --ca-secret, --ca-configmap NAMESPACE/NAME
                       keep the authority's keys and its bundle there instead of in
                       DIR; both must exist
`

// authority opens the certificate authority, and says what runs in the
// background while it is in use; nil: nothing.
func (c *Collector) authority(api *kube.Client) (ca *pki.Authority, run func(context.Context), err error) {
	a := c.cfg.Auth
	if a.Secret == "" {
		if ca, err = pki.Open(filepath.Join(c.cfg.State, "pki")); err != nil {
			return nil, nil, stateError(c.cfg.State, err)
		}
		return ca, nil, nil
	}
	secret, _ := parseRef(a.Secret) // checked
	bundle, _ := parseRef(a.ConfigMap)
	if ca, err = pki.OpenStorage(api.Storage(secret, bundle)); err != nil {
		return nil, nil, err
	}
	failures := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "procession_collector_authority_failures_total",
		Help: "Looks at the certificate authority's Secret and ConfigMap that failed; what was read before stays in use. Agents that have the bundle go on."})
	c.reg.MustRegister(failures)
	return ca, func(ctx context.Context) {
		failing := false
		ca.Run(ctx, authorityEvery, func(err error) {
			failures.Inc()
			if !failing {
				c.cfg.Log.Warn("the certificate authority cannot be looked at; what was read before stays in use", slog.Any("err", err))
			}
			failing = true
		})
	}, nil
}

// authorityEvery is how soon what others did to the bundle is put right.
const authorityEvery = 5 * time.Minute

// transport makes the listener's TLS, with certificates that renew themselves.
func (c *Collector) transport(ca *pki.Authority) (*tls.Config, error) {
	clients := tls.NoClientCert
	switch a := c.cfg.Auth; {
	case a.Certificates && a.Tokens:
		clients = tls.VerifyClientCertIfGiven
	case a.Certificates:
		clients = tls.RequireAndVerifyClientCert
	}
	renew := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "procession_collector_certificate_renewal_failures_total",
		Help: "Times the server's certificate could not be made anew; the log says why. It holds for 24 hours."})
	c.reg.MustRegister(renew)
	told := false
	conf, err := ca.ServerConfig(c.cfg.Names, clients, func(err error) { // one call at a time
		renew.Inc()
		if !told {
			c.cfg.Log.Error("the server's certificate cannot be renewed", slog.Any("err", err))
		}
		told = true
	})
	if err != nil {
		return nil, fmt.Errorf("make the server's certificate: %w", err)
	}
	return conf, nil
}

// identify sets by what agents say who they are.
func (c *Collector) identify(cfg *ingest.Config, api *kube.Client) error {
	a := c.cfg.Auth
	if a.Certificates {
		cfg.Identify = ingest.PeerCertificate(pki.NodeName)
	}
	if !a.Tokens {
		return nil
	}
	var accounts []string
	for _, ref := range a.Accounts {
		r, _ := parseRef(ref) // checked
		accounts = append(accounts, "system:serviceaccount:"+r.Namespace+":"+r.Name)
	}
	var err error
	cfg.Tokens, err = token.New(token.Config{API: api, Audience: a.Audience, Accounts: accounts,
		PodLookup: a.PodLookup, CheckNode: pki.CheckNode, Grace: a.Grace, Log: c.cfg.Log})
	return err
}

// cluster makes the client that tokens, the authority and the status of policies
// need; nil when none of them is in the cluster.
func (c *Collector) cluster() (*kube.Client, error) {
	if a := c.cfg.Auth; !a.Tokens && a.Secret == "" && !c.cfg.PolicyStatus {
		return nil, nil
	}
	api, err := kube.New("procession-collector/" + c.cfg.Version)
	if errors.Is(err, kubeapi.ErrNotInCluster) {
		return nil, fmt.Errorf("--auth tokens, --ca-secret and --policy-status work in a Kubernetes cluster only: %w", err)
	}
	return api, err
}

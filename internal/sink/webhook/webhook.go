// Package webhook posts each record to an HTTPS address, in one of the forms
// that others understand: our own JSON, Falco's (falcosidekick takes it),
// Slack's, Alertmanager's.
//
// Promises:
//
//   - One request per record, in order. The Idempotency-Key is the record's id,
//     the same in every try: a receiver that keeps keys has each record once.
//   - A record is delivered when the whole answer was read and its status is
//     2xx. An answer that breaks off, a redirect, a time-out and every other
//     status are tried again, not before Retry-After if the answer has one.
//   - A record that is answered 400, 413 or 422 some times in a row is refused:
//     the runner keeps it as a dead letter and goes on.
//   - With a secret, X-Procession-Signature is "t=SECONDS,v1=HEX": HMAC-SHA256,
//     with the secret, of SECONDS, a dot and the body.
//   - The address and what is read from files, which may be secrets, are in no
//     error and no log.
package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/wholefile"
)

// Config configures a Webhook.
type Config struct {
	Cluster string // first part of ids
	Format  Format

	URL     string // https, or http if Plain; one of URL and URLFile
	URLFile string // file that has it; read for each delivery, as all files
	Plain   bool   // http is allowed: anybody on the way can read and change alerts

	SecretFile string            // key of the signature; "" is no signature
	TokenFile  string            // sent as "Authorization: Bearer"; "" is none
	Headers    map[string]string // further ones
	CAFile     string            // roots in PEM; "" is the system's

	Timeout time.Duration // of one request; 0 is 10 s

	Transport http.RoundTripper // nil is HTTP over TCP
}

// Limits of what an answer may make us read.
const (
	maxAnswer    = 64 << 10
	maxRefusals  = 5 // answers in a row that say a record is no good
	defaultLimit = 10 * time.Second
)

// A Webhook is a sink.Sink.
type Webhook struct {
	cfg    Config
	client *http.Client
	body   []byte

	refused  string // id of the record that was refused last
	refusals int    // how often in a row
}

var _ sink.Sink = (*Webhook)(nil)

// New checks cfg. It connects to nothing. Errors begin with the name of the
// field, in lower case.
func New(cfg Config) (*Webhook, error) {
	if !cfg.Format.known() {
		return nil, fmt.Errorf("format: %.32q is none of %s", cfg.Format, strings.Join(Formats(), ", "))
	}
	if (cfg.URL == "") == (cfg.URLFile == "") {
		return nil, errors.New("url: exactly one of url and urlFile must be set")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultLimit
	}
	if cfg.Timeout < time.Second || cfg.Timeout > 5*time.Minute {
		return nil, fmt.Errorf("timeout: %v, want 1s to 5m", cfg.Timeout)
	}
	for k, v := range cfg.Headers {
		if k == "" || strings.ContainsAny(k, " :\r\n") || strings.ContainsAny(v, "\r\n") {
			return nil, fmt.Errorf("headers: %.64q cannot be sent", k)
		}
		switch name := http.CanonicalHeaderKey(k); name {
		case "Host", "Content-Length", "Content-Type", "Idempotency-Key", signatureHeader:
			return nil, fmt.Errorf("headers: %s is set by the sink itself", name)
		}
	}
	w := &Webhook{cfg: cfg}
	if _, err := w.target(); err != nil {
		return nil, err
	}
	for field, file := range map[string]string{"secretFile": cfg.SecretFile, "tokenFile": cfg.TokenFile} {
		if file == "" {
			continue
		}
		if _, err := wholefile.Secret(file); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	transport := cfg.Transport
	if transport == nil {
		var err error
		if transport, err = overTCP(cfg.CAFile); err != nil {
			return nil, fmt.Errorf("caFile: %w", err)
		}
	}
	w.client = &http.Client{Transport: transport, Timeout: cfg.Timeout,
		// A redirect could carry alerts, and what proves us, to somewhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return w, nil
}

func overTCP(caFile string) (http.RoundTripper, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, err
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no PEM certificate", caFile)
		}
	}
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSClientConfig:     conf,
		TLSHandshakeTimeout: 10 * time.Second,
		MaxIdleConnsPerHost: 1, IdleConnTimeout: 90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		ForceAttemptHTTP2:      true,
	}, nil
}

// target is the address, read anew if it is in a file.
func (w *Webhook) target() (*url.URL, error) {
	text := w.cfg.URL
	if w.cfg.URLFile != "" {
		b, err := wholefile.Secret(w.cfg.URLFile)
		if err != nil {
			return nil, fmt.Errorf("urlFile: %w", err)
		}
		text = string(b)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil: // the text, which may be a secret, is in err
		return nil, errors.New("url: not a URL")
	case u.Scheme == "http" && !w.cfg.Plain:
		return nil, errors.New("url: http is not encrypted; use https, or say plain: true")
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("url: scheme %.16q, want https", u.Scheme)
	case u.Host == "":
		return nil, errors.New("url: no host")
	}
	return u, nil
}

// Deliver implements sink.Sink.
func (w *Webhook) Deliver(ctx context.Context, recs []store.Record) error {
	for i := range recs {
		if err := w.post(ctx, &recs[i]); err != nil {
			err.Done = i
			return err
		}
	}
	return nil
}

const signatureHeader = "X-Procession-Signature"

func (w *Webhook) post(ctx context.Context, r *store.Record) *sink.DeliveryError {
	fail := func(err error) *sink.DeliveryError { return &sink.DeliveryError{Err: err} }
	u, err := w.target()
	if err != nil {
		return fail(err)
	}
	w.body = w.cfg.Format.Append(w.body[:0], w.cfg.Cluster, r)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(w.body))
	if err != nil {
		return fail(errors.New("make the request"))
	}
	for k, v := range w.cfg.Headers {
		req.Header.Set(k, v)
	}
	id := r.ID(w.cfg.Cluster)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "procession-collector")
	req.Header.Set("Idempotency-Key", id)
	if err := w.prove(req); err != nil {
		return fail(err)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok { // has the address in it
			err = ue.Err
		}
		return fail(fmt.Errorf("post: %w", err))
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	resp.Body.Close()
	if err != nil {
		return fail(fmt.Errorf("status %d, and the answer broke off: %w", resp.StatusCode, err))
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		w.refused, w.refusals = "", 0
		return nil
	}
	return w.judge(id, resp, answer)
}

// prove adds what shows the receiver who we are.
func (w *Webhook) prove(req *http.Request) error {
	if w.cfg.TokenFile != "" {
		token, err := wholefile.Secret(w.cfg.TokenFile)
		if err != nil {
			return fmt.Errorf("tokenFile: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+string(token))
	}
	if w.cfg.SecretFile != "" {
		key, err := wholefile.Secret(w.cfg.SecretFile)
		if err != nil {
			return fmt.Errorf("secretFile: %w", err)
		}
		req.Header.Set(signatureHeader, Sign(key, time.Now(), w.body))
	}
	return nil
}

// Sign is the value of X-Procession-Signature.
func Sign(key []byte, at time.Time, body []byte) string {
	t := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}

// judge says what an answer other than 2xx means for the record.
func (w *Webhook) judge(id string, resp *http.Response, answer []byte) *sink.DeliveryError {
	said := strings.ToValidUTF8(string(answer[:min(len(answer), 200)]), "?")
	e := &sink.DeliveryError{Err: fmt.Errorf("status %d: %q", resp.StatusCode, said)}
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		if w.refused != id {
			w.refused, w.refusals = id, 0
		}
		if w.refusals++; w.refusals >= maxRefusals {
			w.refused, w.refusals = "", 0
			e.Refused = true
		}
	default:
		e.RetryAfter = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	}
	return e
}

// retryAfter reads the header's two forms; 0 for none.
func retryAfter(v string, now time.Time) time.Duration {
	if s, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(s) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(0, t.Sub(now))
	}
	return 0
}

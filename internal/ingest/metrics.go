package ingest

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/procession-dev/procession/internal/ingest/token"
)

type metrics struct {
	received        prometheus.Counter
	refused         *prometheus.CounterVec
	refusedMessages *prometheus.CounterVec
	refusedStreams  *prometheus.CounterVec
	endedStreams    *prometheus.CounterVec
	tokenLooks      *prometheus.CounterVec
	handshakes      *prometheus.CounterVec
	gaps            prometheus.Counter
	mismatches      prometheus.Counter
	heartbeats      prometheus.Counter
	streams         prometheus.Gauge
	refusedConns    *prometheus.CounterVec
	slowed          prometheus.Counter
	slowedSeconds   prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, tokens *token.Verifier) *metrics {
	m := &metrics{
		received: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_records_received_total",
			Help: "Records read from streams, resent ones each time. Equals procession_collector_records_total and procession_collector_records_refused_total together, but for those on their way."}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_records_refused_total",
			Help: "Records that were not handed to the store; agents send them again. invalid, order: in a message that broke the protocol. stream_ended: the stream or the collector ended first."},
			[]string{"reason"}),
		refusedMessages: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_messages_refused_total",
			Help: "Messages that broke the protocol; each ended its stream. Not zero: an agent of another version, or not an agent."},
			[]string{"reason"}),
		refusedStreams: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_streams_refused_total",
			Help: "Streams refused before a Hello. identity: the certificate names no node. All others are about tokens: no_token, malformed, expired, wrong_audience (meant for another service), wrong_account (not an agent's service account), rejected (the Kubernetes API server says no), no_node (bound to no node), throttled (too many refused ones from the address), unavailable (the Kubernetes API server is silent; agents come back)."},
			[]string{"reason"}),
		tokenLooks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_token_rechecks_total",
			Help: "Tokens of live streams looked at again. ok; stale: the Kubernetes API server was silent and what it confirmed before counts on; unavailable: it was silent, asked again soon; any other reason ended the stream."},
			[]string{"result"}),
		endedStreams: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_streams_failed_total",
			Help: "Streams ended by an error, by gRPC code. Unavailable: the store took nothing. FailedPrecondition: a gap. Aborted: a newer stream of the node took over."},
			[]string{"code"}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_handshakes_failed_total",
			Help: "Connections refused before any message: no_certificate, unknown_authority, expired, not_tls, old_tls, closed, other."},
			[]string{"reason"}),
		gaps: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_gaps_total",
			Help: "Streams ended because a batch did not follow what is stored, and no loss told why. Never in good order: an agent lost records without noticing."}),
		mismatches: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_identity_mismatches_total",
			Help: "Agents that claimed to be another node than their credentials say. The credentials decided."}),
		heartbeats: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_heartbeats_total", Help: "Heartbeats of agents."}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "procession_collector_streams", Help: "Live streams of agents."}),
		refusedConns: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_connections_refused_total",
			Help: "Connections closed. address: too many of one address that had not shown who they are; strangers: of all addresses; connections: of all kinds; late: had not shown it in 30 s."},
			[]string{"reason"}),
		slowed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_batches_slowed_total",
			Help: "Batches after which an agent was not read for a while, because it brought more records than its share. Nothing is lost: it keeps them. Not zero: a node makes very many alerts."}),
		slowedSeconds: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "procession_collector_slowed_seconds_total",
			Help: "Time agents were not read for that reason, all added up."}),
	}
	for _, r := range []string{"address", "strangers", "connections", "late"} {
		m.refusedConns.WithLabelValues(r)
	}
	for _, r := range []string{"invalid", "order", "stream_ended"} {
		m.refused.WithLabelValues(r)
	}
	for _, r := range []string{"invalid", "order", "too_large"} {
		m.refusedMessages.WithLabelValues(r)
	}
	m.refusedStreams.WithLabelValues("identity")
	for _, r := range []string{"no_certificate", "unknown_authority", "expired", "not_tls", "old_tls", "closed", "other"} {
		m.handshakes.WithLabelValues(r)
	}
	if tokens != nil {
		m.initTokens(reg, tokens)
	}
	if reg != nil {
		reg.MustRegister(m.received, m.refused, m.refusedMessages, m.refusedStreams, m.endedStreams, m.handshakes,
			m.gaps, m.mismatches, m.heartbeats, m.streams, m.refusedConns, m.slowed, m.slowedSeconds)
	}
	return m
}

func (m *metrics) initTokens(reg prometheus.Registerer, tokens *token.Verifier) {
	for _, r := range token.Reasons() {
		m.refusedStreams.WithLabelValues(string(r))
		m.tokenLooks.WithLabelValues(string(r))
	}
	m.tokenLooks.WithLabelValues("ok")
	m.tokenLooks.WithLabelValues("stale")
	if reg == nil {
		return
	}
	of := func(name, help string, value func(token.Stats) uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help},
			func() float64 { return float64(value(tokens.Stats())) })
	}
	reg.MustRegister(m.tokenLooks,
		of("procession_collector_token_reviews_total", "Questions to the Kubernetes API server about tokens.",
			func(s token.Stats) uint64 { return s.Reviews }),
		of("procession_collector_pod_lookups_total", "Questions to the Kubernetes API server about the node of an agent's pod; only API servers before 1.30 make them necessary.",
			func(s token.Stats) uint64 { return s.Lookups }),
		of("procession_collector_api_silent_total", "Questions to the Kubernetes API server without an answer.",
			func(s token.Stats) uint64 { return s.Silent }))
}

// A limitedLog logs once a second at most, and says how much it left out: what
// agents do wrong they do all at once, and all is counted in metrics.
type limitedLog struct {
	l    *slog.Logger
	mu   sync.Mutex
	last time.Time // guarded by mu
	left int       // guarded by mu
}

func (l *limitedLog) log(level slog.Level, msg string, attrs ...slog.Attr) {
	ctx := context.Background()
	if !l.l.Enabled(ctx, level) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); now.Sub(l.last) < time.Second {
		l.left++
		return
	} else {
		l.last = now
	}
	if l.left > 0 {
		attrs = append(attrs, slog.Int("not_logged", l.left))
		l.left = 0
	}
	l.l.LogAttrs(ctx, level, msg, attrs...)
}

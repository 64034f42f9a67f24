package collector

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/collector/kube"
	"github.com/procession-dev/procession/internal/collector/policystatus"
	"github.com/procession-dev/procession/internal/debughttp"
	"github.com/procession-dev/procession/internal/fleet"
	"github.com/procession-dev/procession/internal/ingest"
	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/query/answer"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/sink/ndjson"
	"github.com/procession-dev/procession/internal/sink/terminal"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/wholefile"
)

// Config of a collector, checked by New.
type Config struct {
	State   string   // directory of the database and of the certificate authority
	Listen  string   // host:port for agents; "" is 127.0.0.1:7443
	Names   []string // further names or addresses agents use, for the certificate
	Cluster string   // first part of every alert's id; "" is local

	NDJSON string // file, "" is none
	Sinks  string // file of sinks in YAML, "" is none

	// Database is a file with the connection string of a PostgreSQL database,
	// which several collectors may share; "" is SQLite in State.
	Database string
	Metrics  string // host:port of /metrics, /healthz, /readyz; "" is none

	Auth AuthConfig // how agents prove which node they are

	// Ephemeral says that State goes with the pod, which is told in the log and
	// in a metric.
	Ephemeral bool

	// PolicyStatus says to write the status of the cluster's policy objects.
	PolicyStatus bool

	Version string // for the Kubernetes API server's log

	Terminal io.Writer     // nil is none
	Style    present.Style // of the terminal

	Keep      time.Duration // how long records are kept; 0 is for ever
	KeepBytes int64         // how large the store may grow, about; 0 is without bound

	ReadyFile string // made when agents can connect, removed at the end

	// DrainWait is how long agents have to take their last acks, and then
	// again how long sinks have to catch up; 0 is 5 s.
	DrainWait time.Duration

	Log *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if c.State == "" {
		return c, usagef("--state", "must name a directory")
	}
	if c.Listen == "" {
		c.Listen = "127.0.0.1:7443"
	}
	if c.Cluster == "" {
		c.Cluster = "local"
	}
	if err := pki.CheckNode(c.Cluster); err != nil { // same rule: part of an id, no slash
		return c, usagef("--cluster", "%.64q: want letters, digits, dots, hyphens and underscores", c.Cluster)
	}
	for flag, addr := range map[string]string{"--listen": c.Listen, "--metrics": c.Metrics} {
		if addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return c, usagef(flag, "%v", err)
		}
	}
	for _, n := range c.Names {
		if err := pki.CheckServerName(n); err != nil {
			return c, usagef("--name", "%v", err)
		}
	}
	if c.Keep < 0 || c.Keep > 0 && c.Keep < time.Hour {
		return c, usagef("--keep", "%v, want at least 1h, or 0 for ever", c.Keep)
	}
	if c.KeepBytes < 0 || c.KeepBytes > 0 && c.KeepBytes < 16<<20 {
		return c, usagef("--keep-bytes", "%d, want at least 16777216 (16 MiB), or 0 for no bound", c.KeepBytes)
	}
	if c.DrainWait == 0 {
		c.DrainWait = 5 * time.Second
	}
	auth, err := c.Auth.withDefaults()
	if err != nil {
		return c, err
	}
	c.Auth = auth
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// A UsageError is a mistake in the command line.
type UsageError struct{ Flag, Msg string }

func (e *UsageError) Error() string { return e.Flag + ": " + e.Msg }

func usagef(flag, format string, args ...any) error {
	return &UsageError{flag, fmt.Sprintf(format, args...)}
}

// A Collector is built by New and runs once.
type Collector struct {
	cfg   Config
	st    store.Store
	owner string // of leases; "" when nobody shares the store
	host  string // this machine, when somebody does
	queue *store.Queue
	srv   *ingest.Server
	agent net.Listener // for agents
	http  net.Listener // metrics; may be nil
	reg   *prometheus.Registry
	sinks []*sink.Runner

	watchCA  func(context.Context) // nil: the authority is looked at when it is used
	policies *kube.Policies        // nil: nobody writes their status
	file     *ndjson.File
	query    net.Listener  // for people on this machine; nil when it could not be had
	ready    chan struct{} // closed when agents can connect
}

// New opens everything a collector needs, or says what is missing and holds
// nothing. Who built it must call Run.
func New(ctx context.Context, cfg Config) (_ *Collector, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &Collector{cfg: cfg, reg: prometheus.NewRegistry(), ready: make(chan struct{})}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.openStore(ctx); err != nil {
		return nil, err
	}
	if cfg.ReadyFile != "" { // of a collector that was killed
		os.Remove(cfg.ReadyFile)
	}
	api, err := c.cluster()
	if err != nil {
		return nil, err
	}
	if cfg.PolicyStatus {
		if c.policies, err = api.Policies(cfg.Log); err != nil {
			return nil, err
		}
	}
	ca, watchCA, err := c.authority(api)
	if err != nil {
		return nil, err
	}
	c.watchCA = watchCA
	conf, err := c.transport(ca)
	if err != nil {
		return nil, err
	}
	ephemeral := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "procession_collector_store_ephemeral",
		Help: "1: stored alerts are lost with the collector's pod, because it was given no volume that outlives it."})
	c.reg.MustRegister(ephemeral)
	if cfg.Ephemeral {
		ephemeral.Set(1)
	}
	c.queue = store.NewQueue(c.st, store.QueueConfig{Log: cfg.Log, Registerer: c.reg})
	if err := c.openSinks(); err != nil {
		return nil, err
	}
	in := ingest.Config{Queue: c.queue, TLS: conf, DrainWait: cfg.DrainWait, Log: cfg.Log, Registerer: c.reg}
	if err := c.identify(&in, api); err != nil {
		return nil, err
	}
	if c.srv, err = ingest.New(in); err != nil {
		return nil, err
	}
	if c.query, err = answer.Listen(cfg.State); err != nil {
		// As when the path is too long for a socket: nothing is lost by it.
		cfg.Log.Warn("nobody can ask questions: the socket in the state directory cannot be made", slog.Any("err", err))
		c.query = nil
	}
	if c.agent, err = net.Listen("tcp", cfg.Listen); err != nil {
		return nil, listenError("--listen", cfg.Listen, err)
	}
	if cfg.Metrics != "" {
		if c.http, err = net.Listen("tcp", cfg.Metrics); err != nil {
			return nil, listenError("--metrics", cfg.Metrics, err)
		}
	}
	return c, nil
}

func (c *Collector) openStore(ctx context.Context) error {
	if c.cfg.Database == "" {
		st, err := store.OpenSQLite(ctx, c.cfg.State)
		if err != nil {
			return stateError(c.cfg.State, err)
		}
		c.st = st
		return nil
	}
	dsn, err := wholefile.Secret(c.cfg.Database)
	if err != nil {
		return fmt.Errorf("--database: %w", err)
	}
	st, err := store.OpenPostgres(ctx, string(dsn))
	if err != nil {
		return fmt.Errorf("--database: %w", err)
	}
	c.st = st
	host, err := os.Hostname()
	if err != nil {
		host = "collector"
	}
	c.host, c.owner = host, host+"-"+rand.Text()
	return nil
}

func (c *Collector) openSinks() (err error) {
	m := sink.NewMetrics(c.reg)
	add := func(name, owner string, s sink.Sink, fromNow bool, filter sink.Filter) error {
		r, err := sink.New(sink.Config{Name: name, Sink: s, Filter: filter, Store: c.st, Queue: c.queue, Owner: owner, FromNow: fromNow, Log: c.cfg.Log}, m)
		if err != nil {
			return err
		}
		c.sinks = append(c.sinks, r)
		return nil
	}
	if c.cfg.NDJSON != "" {
		if c.file, err = ndjson.Open(c.cfg.NDJSON, c.cfg.Cluster); err != nil {
			return fmt.Errorf("--ndjson: %w", err)
		}
		if err := add(c.local("ndjson"), "", c.file, false, sink.Filter{}); err != nil {
			return err
		}
	}
	if c.cfg.Terminal != nil {
		if err := add(c.local("terminal"), "", terminal.New(c.cfg.Terminal, c.cfg.Style, c.cfg.Cluster), true, sink.Filter{}); err != nil {
			return err
		}
	}
	if c.cfg.Sinks == "" {
		return nil
	}
	configs, err := ReadSinks(c.cfg.Sinks)
	if err != nil {
		return usagef("--sinks", "%v", err)
	}
	for i := range configs {
		s := &configs[i]
		out, err := s.open(c.cfg.Cluster)
		if err != nil {
			return usagef("--sinks", "%s: sinks[%d].%v", c.cfg.Sinks, i, err)
		}
		if err := add(s.Name, c.owner, out, s.From == "now", s.filter); err != nil {
			return err
		}
	}
	return nil
}

// local is the name of a sink that writes to this machine's own files or
// terminal: it runs here whatever others do, with a place of its own.
func (c *Collector) local(sink string) string {
	if c.owner == "" {
		return sink
	}
	return sink + "/" + c.host
}

// stateError says what to do about a state directory that cannot be used.
func stateError(dir string, err error) error {
	var do string
	switch {
	case errors.Is(err, store.ErrInUse):
		do = "stop that one, or give this one a directory of its own (--state)"
	case errors.Is(err, store.ErrFull), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		do = "make room on its file system"
	case errors.Is(err, store.ErrDamaged):
		do = "restore " + dir + " from a backup, or move alerts.db* away: agents send again what they still have"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		do = "give this user write access to " + dir + ", or choose another directory (--state)"
	default:
		return fmt.Errorf("--state: %w", err)
	}
	return fmt.Errorf("--state: %w; %s", err, do)
}

func listenError(flag, addr string, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%s: %s is taken by another process; stop it, or choose another port", flag, addr)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%s: %s is not an address of this machine", flag, addr)
	}
	return fmt.Errorf("%s: %w", flag, err)
}

// Addr is where agents connect; Config.Listen may have port 0.
func (c *Collector) Addr() net.Addr { return c.agent.Addr() }

// Ready is closed when agents can connect.
func (c *Collector) Ready() <-chan struct{} { return c.ready }

// Run serves until ctx ends, then stops in the order of the flow. It returns
// an error when a part failed, nil when it was asked to stop.
func (c *Collector) Run(ctx context.Context) error {
	defer c.close()
	// Each stage has its own stop. When one fails, ctx ends, and all stop in
	// the same order as if they had been asked to.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var failure atomic.Pointer[error]
	fail := func(err error) {
		if err != nil {
			failure.CompareAndSwap(nil, &err)
			cancel(err)
		}
	}
	background := context.WithoutCancel(ctx)
	queueCtx, stopQueue := context.WithCancel(background)
	sinkCtx, stopSinks := context.WithCancel(background)
	defer stopQueue()
	defer stopSinks()
	var sinks, rest sync.WaitGroup
	rest.Go(func() { fail(c.queue.Run(queueCtx)) })
	if c.watchCA != nil {
		rest.Go(func() { c.watchCA(queueCtx) })
	}
	rest.Go(func() { c.tuneMemory(queueCtx) })
	c.watch(queueCtx, &rest)
	for _, r := range c.sinks {
		sinks.Go(func() { fail(r.Run(sinkCtx)) })
	}
	c.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	hs := &http.Server{Handler: debughttp.Handler(c.reg, func() error { return c.fit(ctx) }),
		ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	if c.http != nil {
		rest.Go(func() {
			if err := hs.Serve(c.http); !errors.Is(err, http.ErrServerClosed) {
				fail(fmt.Errorf("serve metrics: %w", err))
			}
		})
	}
	fail(c.announce())
	fail(c.srv.Serve(ctx, c.agent))
	c.cfg.Log.Info("collector stopping: agents were asked to go, sinks catch up")
	c.catchUp()
	stopSinks()
	c.waitSinks(&sinks)
	stopQueue()
	hs.Close()
	rest.Wait()
	if err := failure.Load(); err != nil {
		return *err
	}
	return nil
}

// watch starts what looks after the store and answers people.
func (c *Collector) watch(ctx context.Context, g *sync.WaitGroup) {
	j := newJanitor(c)
	g.Go(func() { j.run(ctx) })
	f := fleet.New(fleet.Config{Store: c.st, Queue: c.queue, Owner: c.owner, Log: c.cfg.Log, Registerer: c.reg})
	g.Go(func() { f.Run(ctx) })
	c.writeStatus(ctx, g, f)
	if c.query == nil {
		return
	}
	conf := answer.Config{Cluster: c.cfg.Cluster, Store: c.st, Queue: c.queue, Sinks: c.sinks}
	if st, ok := c.st.(*store.SQLite); ok {
		conf.Backup = st.Backup
	}
	q := answer.New(conf)
	g.Go(func() {
		if err := q.Serve(ctx, c.query); err != nil && ctx.Err() == nil {
			c.cfg.Log.Warn("questions can no longer be asked", slog.Any("err", err))
		}
	})
}

// writeStatus starts what tells the cluster's policies how they stand.
func (c *Collector) writeStatus(ctx context.Context, g *sync.WaitGroup, f *fleet.Monitor) {
	conf := policystatus.Config{Store: c.st, Queue: c.queue, Owner: c.owner, Reporting: f.Reporting, Log: c.cfg.Log, Registerer: c.reg}
	if c.policies != nil {
		conf.API = c.policies
		g.Go(func() { c.policies.Run(ctx) })
	}
	w := policystatus.New(conf)
	g.Go(func() { w.Run(ctx) })
}

// fit is what /readyz says: the store takes commits, and nobody has asked to stop.
func (c *Collector) fit(ctx context.Context) error {
	if ctx.Err() != nil {
		return errors.New("stopping")
	}
	if err := c.queue.Healthy(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// announce tells scripts and people that agents can connect. The listener has
// been there since New, so whoever reads this can.
func (c *Collector) announce() error {
	if f := c.cfg.ReadyFile; f != "" {
		// Renamed into place: who sees the file can read the address in it.
		tmp := f + ".tmp"
		if err := os.WriteFile(tmp, []byte(c.Addr().String()+"\n"), 0o644); err != nil {
			return fmt.Errorf("--ready-file: %w", err)
		}
		if err := os.Rename(tmp, f); err != nil {
			return fmt.Errorf("--ready-file: %w", err)
		}
	}
	attrs := []any{slog.String("listen", c.Addr().String()), slog.String("cluster", c.cfg.Cluster), slog.String("state", c.cfg.State),
		slog.Bool("policy_status", c.policies != nil)}
	if c.http != nil {
		attrs = append(attrs, slog.String("metrics", c.http.Addr().String()))
	}
	c.cfg.Log.Info("collector ready", attrs...)
	if c.cfg.Ephemeral {
		c.cfg.Log.Warn("stored alerts are lost with this pod: its state directory is not on a volume that outlives it", slog.String("state", c.cfg.State))
	}
	close(c.ready)
	return nil
}

// catchUp waits, for a bounded time, until sinks have what the store has.
func (c *Collector) catchUp() {
	ctx, cancel := context.WithTimeout(context.Background(), c.cfg.DrainWait)
	defer cancel()
	head, err := c.st.Head(ctx)
	if err != nil {
		c.cfg.Log.Warn("sinks may be behind at the next start", slog.Any("err", err))
		return
	}
	for _, r := range c.sinks {
		if !r.WaitFor(ctx, head) {
			c.cfg.Log.Warn("sink did not catch up; it goes on at the next start",
				slog.String("sink", r.Name()), slog.Int64("behind", head-r.Cursor()))
		}
	}
}

// waitSinks ends sinks and stores their cursors. A write that hangs, as to a
// terminal nobody reads, cannot be ended; it is left behind.
func (c *Collector) waitSinks(g *sync.WaitGroup) {
	ended := make(chan struct{})
	go func() { g.Wait(); close(ended) }()
	ctx, cancel := context.WithTimeout(context.Background(), c.cfg.DrainWait)
	defer cancel()
	select {
	case <-ended:
	case <-ctx.Done():
		c.cfg.Log.Warn("a sink hangs and is left behind")
		c.file = nil // it may be the one
	}
	for _, r := range c.sinks {
		if err := r.Flush(ctx); err != nil {
			c.cfg.Log.Warn("records may be delivered twice at the next start", slog.Any("err", err))
		}
	}
}

// close gives back what New opened. The listener for agents is closed by its
// server, if that ran.
func (c *Collector) close() {
	if c.cfg.ReadyFile != "" && c.st != nil { // without the state it is another collector's
		os.Remove(c.cfg.ReadyFile)
	}
	for _, l := range []net.Listener{c.agent, c.http, c.query} {
		if l != nil {
			l.Close()
		}
	}
	if c.file != nil {
		c.file.Close()
	}
	if c.st != nil {
		if err := c.st.Close(); err != nil {
			c.cfg.Log.Warn("close the store", slog.Any("err", err))
		}
	}
}

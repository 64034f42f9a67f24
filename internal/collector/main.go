package collector

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/query"
	"github.com/procession-dev/procession/internal/store"
)

// Exit codes.
const (
	exitOK    = 0
	exitFail  = 1
	exitUsage = 2
)

const help = `collector: receives alerts from agents, keeps them on disk, and brings them to sinks.

Usage:
  collector [serve] --state DIR [flags]        run the collector
  collector issue   --state DIR --node NAME --out DIR
                                               make the certificate of an agent
  collector crds    --dir DIR                  bring a cluster's policy objects up to date
  collector restore --state DIR --from FILE    put a backup in the place of the database
  collector version                            print the version

Ask the collector that runs on this machine (--state DIR):
` + query.Help + `
Start here:
  collector serve --state ./state --terminal   in one terminal
  collector issue --state ./state --node web-1 --out ./agent-tls
  agent run --tls ./agent-tls ...              in another

An alert that was acknowledged to an agent is on disk in DIR (SQLite, synced),
exactly once, and reaches every sink at least once with the same id. An agent's
node name comes from its certificate or token and from nothing else.

"collector COMMAND --help" lists the flags of a command.
Exit codes: 0 stopped as asked, 1 failed, 2 wrong usage.
`

const serveHelp = `collector serve: run the collector until SIGINT or SIGTERM (a second one kills).

  --state DIR          database and certificate authority; made if missing. A local
                       disk or a block volume, not NFS or the like. Required.
  --database FILE      keep alerts in PostgreSQL, which several collectors may share; FILE
                       has the connection string (SQLite in --state)
  --listen ADDR        where agents connect (127.0.0.1:7443). 0.0.0.0:7443 for all.
  --name NAME          further host name or address agents use, for the server's
                       certificate; may be repeated. Known: localhost, 127.0.0.1,
                       ::1 and this host's name.
  --cluster NAME       first part of every alert's id (local). Do not change it later.

  --keep TIME          how long records are kept (720h); 0 is for ever
  --keep-bytes BYTES   how large the database may grow (8 GiB); 0 is without bound. The
                       oldest go first, what a sink does not have yet last

  --ndjson FILE        append every alert to FILE, one JSON object per line, each
                       exactly once. Move it away at any time: a new one is begun.
  --sinks FILE         webhooks and what goes to them, in YAML (docs/operations.md)
  --terminal[=COLOUR]  a line for each alert on stdout; colours auto, always or never
  --metrics ADDR       Prometheus metrics at /metrics, also /healthz and /readyz (off).
                       They are not protected: 127.0.0.1:9090, or a private network.

  --policy-status      write into the status of the cluster's policies how they stand on
                       the nodes (kubectl get cdp,dp -A); without it nobody does

  --ephemeral          say in the log and in a metric that DIR does not outlive this pod

  --ready-file FILE    made when agents can connect, removed at the end
  --log-format FORMAT  text or json, on stderr (text)
  --log-level LEVEL    debug, info, warn or error (info)
`

const issueHelp = `collector issue: make agent.crt, agent.key and ca.crt for the agent of one node.

  --state DIR   the collector's state directory; it may be running. Required.
  --node NAME   the name the agent's alerts will carry. Required.
  --out DIR     where the files go; made if missing (mode 0700). Required.
  --ttl TIME    how long the certificate is good, 1h to 720h (720h)

Whoever has agent.key can speak for the node. Run it again to renew: agents read
the files anew for each connection.
`

// Main is the collector's command line. It returns the exit code.
func Main(version string, args []string, stdout, stderr *os.File) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, help)
		return exitUsage
	}
	cmd := "serve"
	switch first := args[0]; {
	case first == "--help", first == "-help", first == "-h", first == "help":
		fmt.Fprint(stdout, help)
		return exitOK
	case !strings.HasPrefix(first, "-"):
		cmd, args = first, args[1:]
	}
	var err error
	switch cmd {
	case "serve":
		err = serve(version, args, stdout, stderr)
	case "issue":
		err = issue(args, stdout)
	case "crds":
		err = crds(version, args, stdout)
	case "restore":
		err = restore(args, stdout)
	case "version":
		fmt.Fprintln(stdout, "collector", version)
	default:
		if !slices.Contains(query.Commands(), cmd) {
			fmt.Fprintf(stderr, "collector: no command %.64q; collector --help lists them\n", cmd)
			return exitUsage
		}
		ctx, stop := stopOnSignal()
		defer stop()
		if err = query.Command(ctx, cmd, args, stdout); errors.Is(err, query.ErrUsage) {
			err = &UsageError{"flags", err.Error()}
		}
	}
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return exitOK
	case isUsage(err):
		fmt.Fprintf(stderr, "collector %s: %v\n", cmd, err)
		return exitUsage
	}
	fmt.Fprintf(stderr, "collector %s: %v\n", cmd, err)
	return exitFail
}

func isUsage(err error) bool {
	_, ok := errors.AsType[*UsageError](err)
	return ok
}

// parse reads flags; its errors are UsageErrors, help goes to stdout.
func parse(fs *flag.FlagSet, help string, args []string, stdout io.Writer) error {
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	err := fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, help)
		return err
	}
	if err != nil {
		return &UsageError{"flags", err.Error() + " (--help lists them)"}
	}
	if fs.NArg() > 0 {
		return &UsageError{"flags", fmt.Sprintf("unexpected argument %.64q (--help lists the flags)", fs.Arg(0))}
	}
	return nil
}

func serve(version string, args []string, stdout, stderr *os.File) error {
	var cfg Config
	var colour colourFlag
	var names namesFlag
	var format, level string
	fs := flag.NewFlagSet("serve", flag.ContinueOnError)
	fs.StringVar(&cfg.State, "state", "", "")
	fs.StringVar(&cfg.Listen, "listen", "127.0.0.1:7443", "")
	fs.Var(&names, "name", "")
	fs.StringVar(&cfg.Cluster, "cluster", "local", "")
	fs.DurationVar(&cfg.Keep, "keep", 30*24*time.Hour, "")
	fs.Int64Var(&cfg.KeepBytes, "keep-bytes", 8<<30, "")
	fs.StringVar(&cfg.Database, "database", "", "")
	fs.StringVar(&cfg.NDJSON, "ndjson", "", "")
	fs.StringVar(&cfg.Sinks, "sinks", "", "")
	fs.Var(&colour, "terminal", "")
	fs.StringVar(&cfg.Metrics, "metrics", "", "")
	fs.StringVar(&cfg.ReadyFile, "ready-file", "", "")
	fs.BoolVar(&cfg.PolicyStatus, "policy-status", false, "")
	fs.BoolVar(&cfg.Ephemeral, "ephemeral", false, "")
	cfg.Auth.register(fs)
	cfg.Version = version
	fs.StringVar(&format, "log-format", "text", "")
	fs.StringVar(&level, "log-level", "info", "")
	if err := parse(fs, serveHelp+authHelp, args, stdout); err != nil {
		return err
	}
	var err error
	if cfg.Log, err = logger(stderr, format, level); err != nil {
		return err
	}
	cfg.Names = names
	if colour != "" {
		cfg.Terminal = stdout
		if cfg.Style, _, err = present.StyleFor(stdout, string(colour)); err != nil {
			return usagef("--terminal", "%v", err)
		}
	}
	// Writing to a terminal that is gone is the sink's trouble, not the
	// collector's end.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := stopOnSignal()
	defer stop()
	c, err := New(ctx, cfg)
	if err != nil {
		return err
	}
	if err := c.Run(ctx); err != nil {
		return err
	}
	cfg.Log.Info("collector stopped")
	return nil
}

// stopOnSignal returns a context that ends at the first signal. Then the default
// is back, so a second signal kills.
func stopOnSignal() (ctx context.Context, stop func()) {
	ctx, stop = signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

func logger(w io.Writer, format, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usagef("--log-level", "%.32q, want debug, info, warn or error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, usagef("--log-format", "%.32q, want text or json", format)
}

func issue(args []string, stdout io.Writer) error {
	var state, node, out string
	var ttl time.Duration
	fs := flag.NewFlagSet("issue", flag.ContinueOnError)
	fs.StringVar(&state, "state", "", "")
	fs.StringVar(&node, "node", "", "")
	fs.StringVar(&out, "out", "", "")
	fs.DurationVar(&ttl, "ttl", pki.MaxNodeLife, "")
	if err := parse(fs, issueHelp, args, stdout); err != nil {
		return err
	}
	for name, v := range map[string]string{"--state": state, "--node": node, "--out": out} {
		if v == "" {
			return usagef(name, "is required (collector issue --help)")
		}
	}
	if err := pki.CheckNode(node); err != nil {
		return usagef("--node", "%v", err)
	}
	if ttl < pki.MinNodeLife || ttl > pki.MaxNodeLife {
		return usagef("--ttl", "%v, want %v to %v", ttl, pki.MinNodeLife, pki.MaxNodeLife)
	}
	ca, err := pki.Open(filepath.Join(state, "pki"))
	if err != nil {
		return stateError(state, err)
	}
	until, err := ca.Issue(node, ttl, out)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "agent.crt, agent.key and ca.crt of node %s are in %s, good until %s\n", node, out, until.UTC().Format(time.RFC3339))
	return nil
}

const restoreHelp = `collector restore: put a backup in the place of the database.

  --state DIR   the collector's state directory; it must not be running. Required.
  --from FILE   made by collector backup. Required.

The database that was there is kept beside it, as alerts.db.before-restore. Agents
send again what they still have of what came after the backup; sinks go on where the
backup has them, so they are offered some records twice, with the same ids.
`

func restore(args []string, stdout io.Writer) error {
	var state, from string
	fs := flag.NewFlagSet("restore", flag.ContinueOnError)
	fs.StringVar(&state, "state", "", "")
	fs.StringVar(&from, "from", "", "")
	if err := parse(fs, restoreHelp, args, stdout); err != nil {
		return err
	}
	for name, v := range map[string]string{"--state": state, "--from": from} {
		if v == "" {
			return usagef(name, "is required (collector restore --help)")
		}
	}
	n, err := store.RestoreSQLite(context.Background(), state, from)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	fmt.Fprintf(stdout, "%s: restored, its newest record is number %d\n", state, n)
	return nil
}

// colourFlag is --terminal or --terminal=auto|always|never.
type colourFlag string

func (f *colourFlag) String() string   { return string(*f) }
func (f *colourFlag) IsBoolFlag() bool { return true }
func (f *colourFlag) Set(s string) error {
	switch s { // as the flag package says a flag without a value
	case "true":
		s = "auto"
	case "false":
		s = ""
	case "":
		return errors.New("want auto, always or never")
	}
	*f = colourFlag(s)
	return nil
}

type namesFlag []string

func (f *namesFlag) String() string     { return strings.Join(*f, ",") }
func (f *namesFlag) Set(s string) error { *f = append(*f, s); return nil }

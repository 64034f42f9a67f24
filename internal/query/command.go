// Package query lets people ask a collector: what is stored, how nodes and
// sinks stand; and lets them send a sink back, and make a backup. It builds
// wherever people are; package answer has the collector's side.
package query

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
)

// Help is what the commands are, one a line, for the program that has them.
const Help = `  nodes  [--watch]                             how each node stands
  alerts [--since TIME|--last N] [--follow]    what is stored
  sink   list | dead NAME | replay NAME --from TIME
  backup FILE                                  copy the database while it is in use
`

// about explains each command. The collector has them under its own name, too.
var about = map[string]string{
	"nodes": `
Usage: procession nodes [--watch] [--state DIR]

How each node stands. STATE is ok, or what the collector alerts about: silent
(no report for three minutes), blind (reports, and cannot see events), losing
(events or alerts were lost), or new (connected, and has not reported yet). The
counts are those of its last report: events seen and lost, places of processes
that could not be told, rules undecided for want of a fact, alerts made, alerts
that wait for an acknowledgement, heartbeats that came back of those sent, rules
in force.
`,
	"alerts": `
Usage: procession alerts [--since TIME | --last N] [--follow] [flags]

What is stored, oldest first, as lines or as JSON (docs/events.md). Patterns may
have *, ? and [a-z], which do not match a slash.

  procession alerts --since 2h --min-severity High --namespace 'team-*'
  procession alerts --rule '*/*/privilege/*' --follow
  procession alerts --kinds loss,rejected,damaged --last 100 --format json
`,
	"sink": `
Usage: procession sink list [--state DIR]
       procession sink dead NAME [--state DIR]
       procession sink replay NAME --from TIME [--state DIR]

list says of each sink whether it works, how many records it is behind, since
when, and how many its destination refused for good; dead shows those; replay
sends the sink back in time: what its filter wants since then is delivered
again, with the same ids.

  procession sink replay siem --from 2h
`,
	"backup": `
Usage: procession backup FILE [--state DIR]

Copies the database to FILE while the collector uses it. "collector restore" puts
it back. A collector with PostgreSQL has none: use the database's own tools.
`,
}

// Socket is the name of the socket in the collector's state directory.
const Socket = "query.sock"

// MaxLast bounds how many of the newest records can be asked for.
const MaxLast = 1000

// ErrUsage is a wrong command line.
var ErrUsage = errors.New("usage")

func usagef(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrUsage}, args...)...)
}

// Commands are the names that Command knows.
func Commands() []string { return []string{"nodes", "alerts", "sink", "backup"} }

// DefaultState is where the collector of a cluster has its state.
const DefaultState = "/var/lib/procession-collector"

type command struct {
	ctx context.Context
	out io.Writer
	fs  *flag.FlagSet
	pb.QueryServiceClient
}

// Command runs one of Commands against the collector whose state directory is
// named by --state, on the same machine.
func Command(ctx context.Context, name string, args []string, out io.Writer) error {
	c := &command{ctx: ctx, out: out, fs: flag.NewFlagSet(name, flag.ContinueOnError)}
	c.fs.SetOutput(io.Discard)
	state := c.fs.String("state", DefaultState, "the collector's state `directory`, on this machine")
	run := map[string]func([]string, func([]string) error) error{"nodes": c.nodes, "alerts": c.alerts, "sink": c.sink, "backup": c.backup}[name]
	return run(args, func(args []string) error {
		if err := c.parse(args); err != nil {
			return err
		}
		path, err := filepath.Abs(filepath.Join(*state, Socket))
		if err != nil {
			return err
		}
		cc, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { cc.Close() })
		c.QueryServiceClient = pb.NewQueryServiceClient(cc)
		return nil
	})
}

func (c *command) parse(args []string) error {
	err := c.fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(c.out, "%s\n", strings.TrimLeft(about[c.fs.Name()], "\n"))
		return cmp.Or(present.WriteFlags(c.out, c.fs), err)
	case err != nil:
		return usagef("%v; --help explains the flags", err)
	case c.fs.NArg() > 0:
		return usagef("unexpected argument %.64q; --help explains", c.fs.Arg(0))
	}
	return nil
}

// failed makes an error of the connection readable.
func failed(err error) error {
	if status.Code(err) == codes.Unavailable {
		return fmt.Errorf("no collector answers at its socket (is it running here, and is --state its directory?): %s", status.Convert(err).Message())
	}
	return errors.New(status.Convert(err).Message())
}

func (c *command) nodes(args []string, connect func([]string) error) error {
	watch := c.fs.Bool("watch", false, "show it again every two seconds")
	if err := connect(args); err != nil {
		return err
	}
	for {
		resp, err := c.Nodes(c.ctx, &pb.NodesRequest{})
		if err != nil {
			return failed(err)
		}
		if *watch {
			fmt.Fprint(c.out, "\x1b[H\x1b[2J")
		}
		writeNodes(c.out, resp.GetNodes(), time.Now())
		if !*watch {
			return nil
		}
		select {
		case <-time.After(2 * time.Second):
		case <-c.ctx.Done():
			return nil
		}
	}
}

// writeNodes is the table of nodes. What nodes say of themselves is escaped.
func writeNodes(out io.Writer, nodes []*pb.Node, now time.Time) {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tSTATE\tREPORTED\tCAPTURE\tEVENTS\tLOST\tUNRESOLVED\tUNDECIDED\tALERTS\tUNACKED\tBEATS\tRULES\tNOT WATCHED BEFORE")
	for _, n := range nodes {
		state := "ok"
		if cs := n.GetConditions(); len(cs) > 0 {
			state = strings.Join(cs, ",")
		}
		c := n.GetCoverage()
		if c == nil {
			if state == "ok" {
				state = "new" // nobody knows yet
			}
			fmt.Fprintf(w, "%s\t%s\tnever\t\t\t\t\t\t\t\t\t\t\n", safe(n.GetName()), state)
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d/%d\t%d\t%s\n", safe(n.GetName()), state, ago(now, n.GetCoverageReceived().AsTime()),
			safe(c.GetCapture()), present.Total(c.GetEvents()), present.Total(c.GetLost()), present.Total(c.GetUnresolved()), c.GetUndecided(),
			c.GetAlerts(), c.GetUnacked(), c.GetBeatsSeen(), c.GetBeatsSent(), c.GetRules(), gap(c.GetUnwatched()))
	}
	w.Flush()
}

// gap is how long nobody watched before the node's present agent did, and why.
func gap(u *pb.Unwatched) string {
	switch {
	case u == nil:
		return "-"
	case u.GetFrom() == nil:
		return safe(u.GetReason())
	}
	return u.GetUntil().AsTime().Sub(u.GetFrom().AsTime()).Round(time.Second).String() + " " + safe(u.GetReason())
}

func safe(s string) string { return string(present.AppendSafe(nil, []byte(s))) }

func ago(now, t time.Time) string { return now.Sub(t).Round(time.Second).String() + " ago" }

func (c *command) alerts(args []string, connect func([]string) error) error {
	since := c.fs.String("since", "", "`time` (2006-01-02T15:04:05Z) or age (2h) of the oldest")
	last := c.fs.Uint("last", 20, "the newest so many, when --since is not given; at most 1000")
	follow := c.fs.Bool("follow", false, "go on with what comes")
	format := c.fs.String("format", "text", "text or json (one object a line)")
	kinds := c.fs.String("kinds", "", "alert, amendment, loss, coverage, rejected, damaged; several with commas")
	severity := c.fs.String("min-severity", "", "Informational, Low, Medium, High or Critical")
	rule := c.fs.String("rule", "", "pattern of kind/namespace/policy/rule")
	namespace := c.fs.String("namespace", "", "pattern of the pod's namespace")
	node := c.fs.String("node", "", "only of this node")
	dryRun := c.fs.Bool("dry-run", false, "those of rules in dry run as well; they are marked")
	if err := connect(args); err != nil {
		return err
	}
	if *format != "text" && *format != "json" {
		return usagef("--format: %q, want text or json", *format)
	}
	req := &pb.RecordsRequest{Follow: *follow, Node: *node, DryRun: *dryRun}
	if *since != "" {
		t, err := when(*since, time.Now())
		if err != nil {
			return usagef("--since: %v", err)
		}
		req.Since = timestamppb.New(t)
	} else {
		req.Last = uint32(min(*last, MaxLast))
	}
	if *kinds != "" {
		req.Kinds = strings.Split(*kinds, ",")
	}
	if *severity != "" {
		n, ok := pb.Severity_value["SEVERITY_"+strings.ToUpper(*severity)]
		if !ok {
			return usagef("--min-severity: %.32q is none of Informational, Low, Medium, High, Critical", *severity)
		}
		req.MinSeverity = pb.Severity(n)
	}
	if *rule != "" {
		req.Rules = []string{*rule}
	}
	if *namespace != "" {
		req.Namespaces = []string{*namespace}
	}
	st, err := c.Records(c.ctx, req)
	if err != nil {
		return failed(err)
	}
	out := bufio.NewWriter(c.out)
	defer out.Flush()
	for {
		r, err := st.Recv()
		switch {
		case errors.Is(err, io.EOF) || c.ctx.Err() != nil:
			return nil
		case err != nil:
			return failed(err)
		}
		b := r.GetLine()
		if *format == "json" {
			b = r.GetJson()
		}
		if _, err := out.Write(append(b, '\n')); err != nil {
			return err
		}
		if *follow {
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
}

// when reads a time or an age.
func when(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, fmt.Errorf("%.64q is neither a time (2006-01-02T15:04:05Z) nor an age (2h)", s)
	}
	return t, nil
}

func (c *command) sink(args []string, connect func([]string) error) error {
	from := c.fs.String("from", "", "replay: `time` (2006-01-02T15:04:05Z) or age (2h) from which on to deliver again")
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		if err := connect(args); err != nil {
			return err
		}
		return usagef("list, dead or replay is missing")
	}
	what, args := args[0], args[1:]
	name := ""
	if what != "list" && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		name, args = args[0], args[1:]
	}
	if err := connect(args); err != nil {
		return err
	}
	switch what {
	case "list":
		return c.listSinks()
	case "dead":
		if name == "" {
			return usagef("sink dead: the sink's name is missing")
		}
		return c.dead(name)
	case "replay":
		if name == "" || *from == "" {
			return usagef("sink replay NAME --from TIME")
		}
		t, err := when(*from, time.Now())
		if err != nil {
			return usagef("--from: %v", err)
		}
		resp, err := c.ReplaySink(c.ctx, &pb.ReplaySinkRequest{Sink: name, From: timestamppb.New(t)})
		if err != nil {
			return failed(err)
		}
		fmt.Fprintf(c.out, "sink %s was sent back by %d records; what its filter wants of them is delivered again, with the same ids\n", name, resp.GetRecords())
		return nil
	}
	return usagef("sink %.32q; there are list, dead and replay", what)
}

func (c *command) listSinks() error {
	resp, err := c.Sinks(c.ctx, &pb.SinksRequest{})
	if err != nil {
		return failed(err)
	}
	w := tabwriter.NewWriter(c.out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "SINK\tSTATE\tBEHIND\tSINCE\tDEAD\tERROR")
	for _, s := range resp.GetSinks() {
		state, since := "elsewhere", ""
		switch {
		case s.GetError() != "":
			state = "failing"
		case s.GetRunning():
			state = "ok"
		case !s.GetConfigured():
			state = "unknown here"
		}
		if s.GetBehindSince() != nil {
			since = ago(time.Now(), s.GetBehindSince().AsTime())
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%d\t%s\n", safe(s.GetName()), state, s.GetBehind(), since, s.GetDead(), present.AppendPhrase(nil, []byte(s.GetError())))
	}
	return w.Flush()
}

func (c *command) dead(name string) error {
	resp, err := c.DeadLetters(c.ctx, &pb.DeadLettersRequest{Sink: name, Limit: MaxLast})
	if err != nil {
		return failed(err)
	}
	for _, l := range resp.GetLetters() {
		fmt.Fprintf(c.out, "# %s\n", present.AppendPhrase(nil, []byte(l.GetReason())))
		if len(l.GetJson()) > 0 {
			fmt.Fprintf(c.out, "%s\n", l.GetJson())
		}
	}
	return nil
}

func (c *command) backup(args []string, connect func([]string) error) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		if err := connect(args); err != nil {
			return err
		}
		return usagef("backup FILE")
	}
	file, err := filepath.Abs(args[0])
	if err != nil {
		return err
	}
	if err := connect(args[1:]); err != nil {
		return err
	}
	resp, err := c.Backup(c.ctx, &pb.BackupRequest{File: file})
	if err != nil {
		return failed(err)
	}
	fmt.Fprintf(c.out, "%s: %d bytes\n", file, resp.GetBytes())
	return nil
}

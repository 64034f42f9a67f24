package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/debughttp"
	"github.com/procession-dev/procession/internal/enrich"
	"github.com/procession-dev/procession/internal/enrich/cgroup"
	"github.com/procession-dev/procession/internal/enrich/kube"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/forward"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
	policykube "github.com/procession-dev/procession/internal/policy/source/kube"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/spool"
)

const runHelp = `
Usage: agent run --collector HOST:PORT --tls FOLDER [flags]
       agent run --collector HOST:PORT --token FILE --collector-ca FILE [flags]

Hears process events, judges them against policies, keeps each alert on disk
until the collector has it, and sends it there.

"listening" appears on stderr once events are proven to arrive. SIGTERM or
Ctrl-C stops: what was alerted is spooled, and offered to the collector for
--drain-timeout; what it did not take is sent at the next start.

The folder given with --tls holds agent.crt, agent.key and ca.crt, as made by
"collector issue". In a cluster --token and --collector-ca take its place.
`

// runGroups is the order in which --help explains the flags of agent run.
var runGroups = []present.FlagGroup{
	{Title: "The collector, and how both sides know each other", Flags: []string{"collector", "tls", "token", "collector-ca",
		"collector-ca-configmap", "collector-name", "drain-timeout"}},
	{Title: "Policies", Flags: []string{"policies", "policies-from", "node-labels", "node-labels-from-api", "namespace-labels",
		"namespace-rules", "namespace-time"}},
	{Title: "This node", Flags: []string{"node", "state", "spool-bytes", "recorder", "drain", "coverage"}},
	{Title: "Whose pods run here (in a cluster)", Flags: []string{"pods-socket", "kubelet", "kubelet-ca", "kubelet-server-name",
		"kubelet-token", "pods-api-watch", "api-server", "pod-annotations", "pod-uid"}},
	{Title: "Looking in", Flags: []string{"metrics", "log-format", "log-level"}},
}

type runFlags struct {
	state, policies, node string
	nodeLabels            map[string]string // nil: not known
	budget                policy.Budget
	connect               connectFlags
	cluster               clusterFlags
	pods                  podFlags
	recorder              string
	drain, drainTimeout   time.Duration
	spoolBytes            int64
	metrics               string
	coverage              time.Duration
	logFormat, logLevel   string
}

func runCommand(args []string, stdout, stderr io.Writer, version string) error {
	var f runFlags
	fs := newFlags("run")
	host, _ := os.Hostname()
	fs.StringVar(&f.state, "state", "/var/lib/procession", "`folder` for the alerts that wait to be sent; made if missing")
	fs.StringVar(&f.policies, "policies", "/etc/procession/policies", "`folder` of policy files (*.yaml)")
	fs.Func("node-labels", "labels of this node, `key=value,...`, for policies with a nodeSelector; without it their rules are undecided", f.setNodeLabels)
	fs.IntVar(&f.budget.Rules, "namespace-rules", 256, "`number` of rules that the policies of one namespace may have in force; the log says which are not")
	fs.DurationVar(&f.budget.Time, "namespace-time", 20*time.Millisecond, "time of each second that the rules of one namespace may take; beyond it they are not asked, and that is counted")
	fs.StringVar(&f.node, "node", host, "this node's `name`, for the logs; the collector takes it from the certificate")
	f.connect.register(fs)
	f.cluster.register(fs)
	f.pods.register(fs)
	fs.StringVar(&f.recorder, "recorder", "auto", "use of the eBPF recorder: auto, off, require")
	fs.DurationVar(&f.drain, "drain", 0, "how often events are taken from the kernel while many come, half as often while few do, 1ms to 50ms (default 10ms)")
	fs.DurationVar(&f.drainTimeout, "drain-timeout", 5*time.Second, "how long to offer alerts to the collector when stopping")
	fs.Int64Var(&f.spoolBytes, "spool-bytes", 64<<20, "bound of the alerts on disk, in `bytes`; the oldest give way and are reported as lost")
	fs.StringVar(&f.metrics, "metrics", "", "serve Prometheus metrics, /healthz and /readyz on this loopback `host:port`; empty is off")
	fs.DurationVar(&f.coverage, "coverage", time.Minute, "how often to report what was seen and what was not, 1s to 10m; the collector calls a node silent after 3m")
	fs.StringVar(&f.logFormat, "log-format", "text", "text or json")
	fs.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn, error")
	if err := parse(fs, runHelp, args, stdout, runGroups...); err != nil {
		return err
	}
	log, err := newLog(stderr, f.logFormat, f.logLevel)
	if err != nil {
		return err
	}
	if f.budget.Rules < 1 || f.budget.Time < time.Millisecond || f.budget.Time > time.Second {
		return usagef("--namespace-rules: %d, --namespace-time: %v; want at least 1, and 1ms to 1s", f.budget.Rules, f.budget.Time)
	}
	if err := checkCapture(f.recorder, f.drain, 0); err != nil {
		return err
	}
	if err := f.connect.check(f.node); err != nil {
		return err
	}
	if err := f.cluster.check(); err != nil {
		return err
	}
	if f.coverage < time.Second || f.coverage > 10*time.Minute {
		return usagef("--coverage: %v, want 1s to 10m", f.coverage)
	}
	memory := beFrugal(log)
	ctx, stop := untilSignal(context.Background())
	defer stop()
	a := &agent{flags: f, version: version, log: log, stderr: stderr, memory: memory, prompt: newPrompter()}
	return a.run(ctx)
}

// setNodeLabels takes --node-labels.
func (f *runFlags) setNodeLabels(text string) error {
	f.nodeLabels = map[string]string{}
	if text == "" {
		return nil // known, and none
	}
	for l := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(strings.TrimSpace(l), "=")
		if !ok || key == "" {
			return fmt.Errorf("%.64q is not of the form key=value", l)
		}
		f.nodeLabels[key] = value
	}
	return nil
}

// An agent is the running composition.
type agent struct {
	flags   runFlags
	version string
	log     *slog.Logger
	stderr  io.Writer

	pipe   *pipeline
	conn   *procconn.Conn
	engine *policy.Engine
	prompt prompter
	memory *settler

	watcher      *policykube.Watcher // nil: rules come from a directory
	policyStates atomic.Pointer[map[source.State]int]
	policies     atomic.Pointer[source.Update] // in force

	watchNamespaces func(context.Context) error // nil: nothing comes from the cluster

	cover  *coverer
	life   *life
	pods   *kube.Pods // nil: nobody knows any
	users  *enrich.Users
	late   late
	dry    rehearsals
	build  alert.Builder
	spool  *spool.Spool
	sender *forward.Forwarder
	buf    []byte
	emit   func(*policy.Match) // alert, made once: a method value is an allocation
	kinds  event.Kinds         // asked of the kernel; 0 before

	unwatched *pb.Unwatched // before this run; nil: nothing is known of one

	unspooled atomic.Uint64 // alerts that could not be spooled; the spool names them as lost
}

// run starts the parts in the order of the flow, and stops them in it: the
// source when ctx ends, the spool when the source has ended, the sender when
// the spool has. A part that fails ends all.
func (a *agent) run(ctx context.Context) error {
	rules, err := a.rules()
	if err != nil {
		return err
	}
	a.prompt.start(time.Now())
	if err := a.assemble(ctx, rules); err != nil {
		return err
	}
	defer a.conn.Close()

	parts, failed := errgroup.WithContext(context.WithoutCancel(ctx)) // failed: a part has
	sourceCtx, stopSource := context.WithCancel(failed)
	defer context.AfterFunc(ctx, stopSource)()
	spoolCtx, stopSpool := context.WithCancel(failed)
	sendCtx, stopSend := context.WithCancel(failed)
	parts.Go(func() error {
		defer stopSpool()
		err := a.conn.Run(sourceCtx, a.pipe)
		a.life.end(err == nil && ctx.Err() != nil)
		a.engine.Flush(a.emit) // no event comes any more
		a.late.end()
		a.cover.write(time.Now())
		return err
	})
	if a.pods != nil {
		parts.Go(func() error { return a.pods.Run(sourceCtx) })
		parts.Go(func() error { return a.watchPods(sourceCtx) })
	}
	parts.Go(func() error { a.cover.run(sourceCtx); return nil })
	parts.Go(func() error { a.life.run(a.spool.Sync); return nil })
	parts.Go(func() error { return rules.Run(sourceCtx, a.loadRules) })
	if a.watchNamespaces != nil {
		parts.Go(func() error { return a.watchNamespaces(sourceCtx) })
	}
	parts.Go(func() error { a.memory.run(sourceCtx); return nil })
	parts.Go(func() error {
		defer stopSend()
		return a.spool.Run(spoolCtx)
	})
	parts.Go(func() error { return a.sender.Run(sendCtx) })
	if a.flags.metrics != "" {
		parts.Go(func() error { return debughttp.Serve(sendCtx, a.flags.metrics, a.registry(), a.ready) })
	}
	err = errors.Join(parts.Wait(), a.spool.Close())
	a.sayGoodbye()
	return err
}

// assemble makes the parts, in an order that finds mistakes of the
// configuration before anything is started, and returns when events are
// proven to arrive.
func (a *agent) assemble(ctx context.Context, rules ruleSource) error {
	compiler, err := policy.NewCompiler()
	if err != nil {
		return err
	}
	a.engine = policy.NewEngine(compiler, policy.Config{Node: a.flags.node, NodeLabels: a.flags.nodeLabels, Budget: a.flags.budget, Log: a.log, DryRun: a.rehearsed})
	if a.cover, err = newCoverer(a, compiler); err != nil {
		return fmt.Errorf("the agent's own rule: %w", err)
	}
	if err := rules.Load(compiler, a.loadRules); err != nil {
		return fmt.Errorf("--policies: %w", err)
	}
	if a.spool, err = spool.Open(spool.Config{Dir: filepath.Join(a.flags.state, "spool"), MaxBytes: a.flags.spoolBytes, Log: a.log}); err != nil {
		return fmt.Errorf("--state: %w", err)
	}
	if err := a.openPods(); err != nil {
		return err
	}
	if a.pipe, err = newPipeline(a.log, a.judge, a.idle); err != nil {
		return err
	}
	a.pipe.who = enrich.New(a.enrichment())
	if a.users, err = enrich.NewUsers(""); err != nil {
		return err
	}
	a.build.Wall, a.build.User, a.emit = a.pipe.wall, a.users.Name, a.alert
	a.waitForNames()
	a.pipe.fair.report, a.pipe.fair.over = a.stormAlert, a.stormOver
	send := forward.Config{
		Spool: a.spool, Node: a.flags.node, Version: a.version, BootID: bootID(),
		EventCounters: func() (uint64, uint64) { return a.pipe.events.Load(), a.pipe.lost.Load() },
		DrainTimeout:  a.flags.drainTimeout, Log: a.log,
	}
	a.flags.connect.apply(&send)
	if a.sender, err = forward.New(send); err != nil {
		return err
	}
	// Renames come by the thousand, and few rules want them.
	a.kinds = event.KindSet(event.AllKinds()...)&^event.KindSet(event.CommChange) | a.engine.Set().Kinds()
	a.memory.stage()
	a.conn, err = procconn.Open(ctx, procconn.Config{
		Recorder: procconn.Mode(a.flags.recorder), DrainInterval: a.flags.drain, Log: a.log, Cwd: true, Kinds: a.kinds,
	})
	if err != nil {
		return err
	}
	a.memory.started()
	a.pipe.fair.full = a.conn.Full
	n, err := a.pipe.scan()
	if err != nil {
		return fmt.Errorf("read the processes that run already: %w", err)
	}
	a.life = a.openLife(filepath.Join(a.flags.state, signFile))
	a.sayListening(n)
	return nil
}

func (a *agent) sayListening(processes int) {
	st := a.conn.Status()
	for _, l := range st.Limits {
		a.log.Warn("not everything that could be used is allowed here", "missing", l.Missing, "cost", l.Cost)
	}
	if st.Reason != "" {
		a.log.Warn("process events are read without the recorder: a process that lives for microseconds may lose its arguments", "way", st.Way, "reason", st.Reason)
	}
	if len(a.engine.Set().Rules()) == 0 {
		if a.watcher != nil {
			a.log.Info("no rule is in force yet: the policies of the cluster are being asked for")
		} else {
			a.log.Warn("no rule is in force: nothing will be alerted until the policy directory holds one that compiles", "dir", a.flags.policies)
		}
	}
	a.log.Info("listening", "way", st.Way, "since", st.Since, "cgroups", cgroup.Layout(), "memory_limit", memoryLimit(), "processes", processes, "rules", len(a.engine.Set().Rules()), "version", a.version)
}

// sayGoodbye sums up, so that the log's last line answers what was delivered.
func (a *agent) sayGoodbye() {
	s := a.spool.Stats()
	a.log.Info("stopped", "events", a.pipe.events.Load(), "events_lost", a.pipe.lost.Load(),
		"alerts", s.Made, "undelivered", s.Unacked)
}

// judge is the end of the event path: it runs in the reader's goroutine.
func (a *agent) judge(ev *event.Event) {
	if a.cover.own(ev) {
		return
	}
	ev.User = a.build.User
	if open := a.engine.Evaluate(ev, a.emit); open {
		a.late.event(ev, ev.Stamp)
	}
}

// idle does what time, or new knowledge, demands.
func (a *agent) idle() {
	a.prompt.look(time.Now())
	a.late.look(a.pipe.now.Mono)
	a.engine.Tick(a.pipe.now.Mono, a.emit)
}

// alert takes a match, on the same goroutine.
func (a *agent) alert(m *policy.Match) {
	p := m.Event.Process
	if p.Workload != nil { // the event may be a copy of some time ago
		p.Workload = a.pipe.who.Complete(p.Workload)
	}
	al := a.build.Alert(m.Event, m)
	m.Seq = a.send(al)
	a.late.alert(m.Seq, alertHead{al.Rule, al.Severity, al.DryRun}, p.Workload, a.pipe.now.Mono)
}

// send puts an alert into the spool and returns its number there, 0 when it
// could not.
func (a *agent) send(al *pb.Alert) (seq uint64) {
	return a.put(&pb.Item{Item: &pb.Item_Alert{Alert: al}}, al.Rule)
}

// put puts an item into the spool; about says what it is, for the log.
func (a *agent) put(it *pb.Item, about string) (seq uint64) {
	var err error
	a.buf, err = proto.MarshalOptions{}.MarshalAppend(a.buf[:0], it)
	if err == nil {
		seq, err = a.spool.Append(a.buf)
	}
	if err != nil && a.unspooled.Add(1) == 1 {
		a.log.Error("an alert could not be spooled; it and any later one are counted and reported as lost",
			"rule", about, "err", err)
	}
	return seq
}

// loadRules puts a new set of rules in force.
func (a *agent) loadRules(u source.Update) {
	if err := a.engine.Swap(u.Set); err != nil {
		a.log.Error("the rules in force stay", "err", err)
		return
	}
	states := u.States()
	a.policyStates.Store(&states)
	a.policies.Store(&u)
	a.cover.policiesChanged()
	if more := u.Set.Kinds() &^ a.kinds; a.kinds != 0 && more != 0 {
		for _, k := range event.AllKinds() {
			if more.Has(k) {
				a.log.Warn("a rule wants a kind of event that was not asked of the kernel at the start; restart the agent to have it judged", "kind", k.String())
			}
		}
	}
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Command bench compares Procession's agent with others that watch programs
// start: forkstat, execsnoop, bpftrace, audit. It runs the same loads beside
// each of them in turn, and reports which share of the execs each told
// rightly, what it used, and how much it slowed the load.
//
//	go run ./test/bench                     everything, 5 repeats (half an hour)
//	go run ./test/bench -quick              a few minutes
//	go run ./test/bench -observers none,agent-events,forkstat -loads tiny -repeats 10
//	go run ./test/bench -quick -observers none,agent-events -complete agent-events
//	go run ./test/bench -proof              what is promised: 20,000 of 20,000, five times, and so on
//
// How it is made fair: the ground truth is the load generator's own count.
// Every argument list is different, so an exec that was reported with
// another's arguments counts as missed. In a repeat every load runs beside
// every observer before the next load, starting with another observer each
// time, so that slow changes of the machine hit all alike; slowdown is the
// ratio to the run without observer in the same repeat. An observer is started
// anew for each run and gets as long as it needs until it sees a probe's exec,
// and the first 50 runs of a load are not counted.
// All write to files in memory.
//
// It needs root and a quiet machine; "foreignForks" in the JSON shows how
// quiet it was. Peers come from Debian and are installed when missing. What
// cannot run here is named, with the reason. The agent must have been built.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/test/bench/host"
)

// auditWord makes this program the bare audit client.
const auditWord = "audit-client"

// inNamespace says that this program has its own mount namespace already.
const inNamespace = "PROCESSION_BENCH_NAMESPACE"

// options are the command line.
type options struct {
	observers, loads   string
	repeats            int
	scale              float64
	quick              bool
	saturated, latency bool
	agent, collector   string
	policies           string
	collectorAddr      string
	eventsArgs         string
	runArgs            string
	json, markdown     string
	bpfStats           bool
	complete           string
	proof              bool
}

func parse(args []string, out, stderr io.Writer) (*options, error) {
	o := new(options)
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	list := fs.Bool("list", false, "list observers and loads, and exit")
	fs.StringVar(&o.observers, "observers", "", "observers, by comma (default: all)")
	fs.StringVar(&o.loads, "loads", "", "loads, by comma (default: all)")
	fs.IntVar(&o.repeats, "repeats", 5, "how often everything is run")
	fs.Float64Var(&o.scale, "scale", 1, "factor to the size of each load")
	fs.BoolVar(&o.quick, "quick", false, "two repeats of two smaller loads: -repeats 2 -scale 0.5 -loads tiny,true")
	fs.BoolVar(&o.saturated, "saturated", true, "also run each load with every CPU kept busy")
	fs.BoolVar(&o.latency, "latency", true, "also measure how long until an exec is told")
	fs.StringVar(&o.agent, "agent", "bin/agent", "the agent, below the module")
	fs.StringVar(&o.collector, "collector", "bin/collector", "the collector that agent run needs, below the module")
	fs.StringVar(&o.policies, "policies", "deploy/helm/procession/policies", "policies of agent run, below the module")
	fs.StringVar(&o.collectorAddr, "collector-addr", "127.0.0.1:17443", "loopback address for the collector")
	fs.StringVar(&o.eventsArgs, "agent-events-args", "--format json --kinds exec", "arguments of agent events")
	fs.StringVar(&o.runArgs, "agent-run-args", "", "more arguments of agent run")
	fs.BoolVar(&o.bpfStats, "bpf-stats", true, "have the kernel count the run time of BPF programs (some 30 ns a run)")
	fs.StringVar(&o.complete, "complete", "", "observers that must tell every exec rightly, by comma: else this fails")
	fs.BoolVar(&o.proof, "proof", false, "instead of comparing, check what is promised of the agent, and print that table")
	fs.StringVar(&o.json, "json", "", "write everything measured to this file (default: bench.json in the cache directory)")
	fs.StringVar(&o.markdown, "markdown", "", "write the tables to this file too")
	fs.Usage = func() {
		fmt.Fprintf(stderr, "usage: bench [flags]\n\nCompares the agent with other observers of program starts, on the same loads.\nNeeds root.\n\n")
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("%q is not a flag (-help says more)", fs.Arg(0))
	}
	if *list {
		fmt.Fprintln(out, "observers:")
		for _, ob := range observers() {
			fmt.Fprintf(out, "  %-21s %s\n", ob.name, ob.about)
		}
		fmt.Fprintln(out, "loads: tiny, busybox, true, go, double, thread")
		return nil, flag.ErrHelp
	}
	if o.proof {
		o.observers, o.loads = "agent-events,agent-events-classic,agent-run", ""
	}
	if o.quick {
		o.repeats, o.scale = min(o.repeats, 2), min(o.scale, 0.5)
		if o.loads == "" {
			o.loads = "tiny,true"
		}
	}
	if o.repeats < 1 || o.repeats > 1000 {
		return nil, fmt.Errorf("-repeats: %d is not in 1..1000", o.repeats)
	}
	if o.scale <= 0 || o.scale > 100 {
		return nil, fmt.Errorf("-scale: %v is not in 0..100", o.scale)
	}
	return o, nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	if len(os.Args) == 2 && os.Args[1] == auditWord {
		if err := auditClient(ctx, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "audit client:", err)
			os.Exit(1)
		}
		return
	}
	o, err := parse(os.Args[1:], os.Stdout, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = run(ctx, o, os.Stdout, os.Stderr)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o *options, out, log io.Writer) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: process events, tracing and audit are for root only")
	}
	if os.Getenv(inNamespace) == "" {
		return ownNamespace()
	}
	root, err := host.ModuleRoot(ctx)
	if err != nil {
		return err
	}
	cache, err := host.Cache("bench")
	if err != nil {
		return err
	}
	lock, err := host.Lock(ctx, log, cache)
	if err != nil {
		return err
	}
	defer lock.Close()
	b := &bench{work: filepath.Join(cache, "work"), programs: filepath.Join(cache, "programs"), scale: o.scale,
		agent: below(root, o.agent), collector: below(root, o.collector), policies: below(root, o.policies),
		collectorAddr: o.collectorAddr, eventsArgs: strings.Fields(o.eventsArgs), runArgs: strings.Fields(o.runArgs)}
	if err := b.mounts(log); err != nil {
		return err
	}
	all, err := programs(ctx, log, root, b.programs)
	if err != nil {
		return err
	}
	loads, err := choose("-loads", o.loads, all, func(l load) string { return l.name })
	if err != nil {
		return err
	}
	wanted, err := choose("-observers", o.observers, observers(), func(ob observer) string { return ob.name })
	if err != nil {
		return err
	}
	if b.pod, err = newPodCgroup(); err != nil {
		fmt.Fprintf(log, "no container is scored: cannot make a cgroup: %v\n", err)
	} else {
		defer b.pod.remove()
	}
	if o.bpfStats {
		restore, err := enableBPFStats()
		if err != nil {
			fmt.Fprintf(log, "no BPF run times: %v\n", err)
		} else {
			defer restore()
		}
	}
	defer func() {
		if b.service != nil {
			b.service.stop()
		}
	}()
	can, cannot, err := b.prepare(ctx, log, wanted)
	if err != nil {
		return err
	}
	if o.proof {
		return b.proveTo(ctx, o, all, can, out, log)
	}
	rep := &Report{Date: time.Now().UTC().Format("2006-01-02"), Machine: machineLines(), Cannot: cannot}
	for _, ob := range can {
		rep.Observers = append(rep.Observers, ObserverInfo{ob.name, ob.about, versions(ctx, ob), ob.score != nil, ob.tells.exe, ob.tells.container && b.pod != nil})
	}
	for _, l := range loads {
		rep.Loads = append(rep.Loads, LoadInfo{l.name, l.about, max(1, int(float64(l.runs)*o.scale))})
	}
	b.series(ctx, log, o, rep, can, loads)
	return b.finish(ctx, o, rep, cache, out, log)
}

// finish writes the report, also of a series that was cut short.
func (b *bench) finish(ctx context.Context, o *options, rep *Report, cache string, out, log io.Writer) error {
	if err := rep.writeMarkdown(out); err != nil {
		return err
	}
	if o.markdown != "" {
		if err := host.WriteFile(o.markdown, rep.writeMarkdown); err != nil {
			return err
		}
	}
	if o.json == "" {
		o.json = filepath.Join(cache, "bench.json")
	}
	if err := host.WriteJSON(o.json, rep); err != nil {
		return err
	}
	fmt.Fprintf(log, "everything measured: %s\n", o.json)
	if ctx.Err() != nil {
		return errors.New("stopped before the end: the tables show what was done until then")
	}
	failed := 0
	for _, r := range rep.Runs {
		if r.Error != "" {
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d runs failed, see the tables", failed, len(rep.Runs))
	}
	return rep.checkComplete(o.complete)
}

// checkComplete is the gate of -complete.
func (rep *Report) checkComplete(names string) error {
	if names == "" {
		return nil
	}
	told, err := choose("-complete", names, rep.Observers, func(o ObserverInfo) string { return o.Name })
	if err != nil {
		return err
	}
	for _, o := range told {
		for _, r := range rep.Runs {
			if r.Observer != o.Name || r.Latency != nil {
				continue
			}
			want := r.Timing.Execs
			if !o.Argv || r.Score.Argv != want || o.Exe && r.Score.Exe != want || o.Contain && r.Score.Container != want {
				return fmt.Errorf("-complete: %s told %d of %d execs of %s with the right arguments, %d with the right executable, %d with the right container",
					o.Name, r.Score.Argv, want, r.Load, r.Score.Exe, r.Score.Container)
			}
		}
	}
	return nil
}

// series runs everything, interleaved.
func (b *bench) series(ctx context.Context, log io.Writer, o *options, rep *Report, can []observer, loads []load) {
	conditions := []bool{false}
	if o.saturated {
		conditions = append(conditions, true)
	}
	total := o.repeats * len(conditions) * len(loads) * len(can)
	began := time.Now()
	for repeat := range o.repeats {
		for _, saturated := range conditions {
			for i, l := range loads {
				for j := range can {
					ob := &can[(j+repeat*3+i)%len(can)]
					if ctx.Err() != nil {
						return
					}
					r := b.measure(ctx, ob, l, saturated)
					r.Repeat = repeat
					rep.Runs = append(rep.Runs, r)
					progress(log, &r, len(rep.Runs), total, time.Since(began))
				}
			}
		}
	}
	if !o.latency {
		return
	}
	i := slices.IndexFunc(loads, func(l load) bool { return l.next == "" })
	if i < 0 {
		return
	}
	for repeat := range o.repeats {
		for j := range can {
			ob := &can[(j+repeat)%len(can)]
			if ob.score == nil || ctx.Err() != nil {
				continue
			}
			r := b.measureLatency(ctx, ob, loads[i])
			r.Repeat = repeat
			rep.Runs = append(rep.Runs, r)
			if r.Error != "" {
				fmt.Fprintf(log, "latency of %s: %s\n", ob.name, r.Error)
			}
		}
	}
}

func progress(log io.Writer, r *Run, n, total int, took time.Duration) {
	how := ""
	if r.Saturated {
		how = " (busy)"
	}
	left := (took / time.Duration(n) * time.Duration(total-n)).Round(time.Second)
	if r.Error != "" {
		fmt.Fprintf(log, "%d/%d %s%s %s: %s (%s left)\n", n, total, r.Load, how, r.Observer, r.Error, left)
		return
	}
	fmt.Fprintf(log, "%d/%d %s%s %s: argv %d of %d, p50 %.0f us, CPU %.1f ms (%s left)\n", n, total, r.Load, how, r.Observer,
		r.Score.Argv, r.Timing.Execs, float64(r.Timing.P50Ns)/1e3, float64(r.CPUNs)/1e6, left)
}

func below(root, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(root, path)
}

// choose picks by name, in the order given.
func choose[T any](flag, names string, all []T, name func(T) string) ([]T, error) {
	if names == "" {
		return all, nil
	}
	var picked []T
	for _, n := range strings.Split(names, ",") {
		i := slices.IndexFunc(all, func(t T) bool { return name(t) == strings.TrimSpace(n) })
		if i < 0 {
			return nil, fmt.Errorf("%s: there is no %q; -list shows them", flag, n)
		}
		picked = append(picked, all[i])
	}
	return picked, nil
}

// versions are those of an observer's Debian packages.
func versions(ctx context.Context, o observer) string {
	var vs []string
	for _, t := range o.tools {
		if t.Package == "coreutils" {
			continue
		}
		out, err := host.Output(exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Version}", t.Package))
		if err == nil {
			vs = append(vs, "Debian's "+t.Package+" "+string(out))
		}
	}
	return strings.Join(vs, ", ")
}

// ownNamespace starts this program again in a mount namespace of its own, so
// that what it mounts is gone with it, however it ends.
func ownNamespace() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("own mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("own mount namespace: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return unix.Exec(self, os.Args, append(os.Environ(), inNamespace+"=1"))
}

// mounts makes the working directory in memory, and gives the tracing tools
// their file system.
func (b *bench) mounts(log io.Writer) error {
	if err := os.MkdirAll(b.work, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", b.work, "tmpfs", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount %s: %w", b.work, err)
	}
	const tracing = "/sys/kernel/tracing"
	if _, err := os.Stat(tracing + "/events"); err != nil {
		if err := unix.Mount("tracefs", tracing, "tracefs", 0, ""); err != nil {
			fmt.Fprintf(log, "no tracefs, which bpftrace and execsnoop need: %v\n", err)
		}
	}
	return nil
}

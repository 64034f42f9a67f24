package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/procession-dev/procession/test/bench/host"
)

// An observer is a program that tells of execs.
type observer struct {
	name    string
	about   string
	tools   []host.Tool
	command func(b *bench) ([]string, error)
	env     []string
	score   scorer // nil: it does not tell each exec
	tells   tells
	ready   string // this on its standard error; "": it tells of a probe's exec
	helper  string // kernel thread that works for it
	bpf     bool   // it may have BPF programs
	service bool   // needs a collector
}

// tells is what an observer's output has, beside argv.
type tells struct{ exe, container bool }

// observers are all that can be compared, in the order of the table.
func observers() []observer {
	agent := func(words func(*bench) []string) func(*bench) ([]string, error) {
		return func(b *bench) ([]string, error) {
			if _, err := os.Stat(b.agent); err != nil {
				return nil, fmt.Errorf("%w: build it first", err)
			}
			return append([]string{b.agent}, words(b)...), nil
		}
	}
	words := func(ws ...string) func(*bench) ([]string, error) {
		return func(*bench) ([]string, error) { return ws, nil }
	}
	stdbuf := host.Tool{Command: "stdbuf", Package: "coreutils"}
	return []observer{
		{name: "none", about: "nobody watches"},
		{name: "agent-events", about: "agent events --format json --kinds exec",
			command: agent(func(b *bench) []string { return append([]string{"events"}, b.eventsArgs...) }),
			score:   scoreJSON, tells: tells{true, true}, bpf: true},
		{name: "agent-events-classic", about: "the same with --recorder=off: /proc instead of the eBPF recorder",
			command: agent(func(b *bench) []string {
				return append(append([]string{"events"}, b.eventsArgs...), "--recorder=off")
			}),
			score: scoreJSON, tells: tells{true, true}, bpf: true},
		{name: "agent-run", about: "agent run with the starter policies and a collector: everything, alerts only",
			command: agent(func(b *bench) []string { return b.runWords() }), ready: "listening", bpf: true, service: true},
		{name: "agent-run-classic", about: "the same with --recorder=off",
			command: agent(func(b *bench) []string { return append(b.runWords(), "--recorder=off") }), ready: "listening", bpf: true, service: true},
		{name: "forkstat", about: "forkstat -e exec -l -r: the proc connector, real-time priority",
			tools:   []host.Tool{{Command: "forkstat", Package: "forkstat"}, stdbuf},
			command: words("stdbuf", "-oL", "forkstat", "-e", "exec", "-l", "-r"), score: scoreText},
		{name: "execsnoop", about: "execsnoop of libbpf-tools: eBPF on the execve tracepoints",
			tools:   []host.Tool{{Command: "execsnoop", Package: "libbpf-tools"}, stdbuf},
			command: words("stdbuf", "-oL", "execsnoop"), score: scoreText, bpf: true},
		{name: "bpftrace", about: "bpftrace, one line on the execve tracepoint",
			tools: []host.Tool{{Command: "bpftrace", Package: "bpftrace"}}, env: []string{"BPFTRACE_STRLEN=128"},
			command: words("bpftrace", "-B", "line", "-e", `tracepoint:syscalls:sys_enter_execve { printf("%d ", pid); join(args->argv); }`),
			score:   scoreText, bpf: true},
		{name: "audit", about: "a bare audit client with one execve rule, in the place of auditd",
			command: func(*bench) ([]string, error) { self, err := os.Executable(); return []string{self, auditWord}, err },
			score:   scoreAudit, tells: tells{exe: true}, helper: "kauditd"},
	}
}

// runWords is the command line of agent run.
func (b *bench) runWords() []string {
	state := filepath.Join(b.work, "agent-state")
	w := []string{"run", "--state", state, "--policies", b.policies, "--node", "bench",
		"--collector", b.collectorAddr, "--tls", filepath.Join(b.work, "agent-tls")}
	return append(w, b.runArgs...)
}

// startCollector starts what agent run sends its alerts to.
func (b *bench) startCollector(ctx context.Context) (*daemon, error) {
	for _, f := range []string{b.collector, b.policies} {
		if _, err := os.Stat(f); err != nil {
			return nil, err
		}
	}
	state, ready := filepath.Join(b.work, "collector-state"), filepath.Join(b.work, "collector-ready")
	d, err := startDaemon([]string{b.collector, "serve", "--state", state, "--listen", b.collectorAddr, "--cluster", "bench",
		"--ndjson", filepath.Join(b.work, "alerts.ndjson"), "--ready-file", ready},
		nil, filepath.Join(b.work, "collector.out"), filepath.Join(b.work, "collector.err"))
	if err != nil {
		return nil, err
	}
	err = waitFor(ctx, 20*time.Second, 50*time.Millisecond, func() (bool, error) {
		_, err := os.Stat(ready)
		return err == nil, d.ended()
	})
	if err == nil {
		_, err = host.Output(exec.CommandContext(ctx, b.collector, "issue", "--state", state, "--node", "bench",
			"--out", filepath.Join(b.work, "agent-tls")))
	}
	if err != nil {
		d.stop()
		return nil, fmt.Errorf("collector: %w", err)
	}
	return d, nil
}

// begin starts an observer and returns when it sees execs.
func (b *bench) begin(ctx context.Context, o *observer) (*daemon, error) {
	args, err := o.command(b)
	if err != nil {
		return nil, err
	}
	d, err := startDaemon(args, o.env, filepath.Join(b.work, "out"), filepath.Join(b.work, "err"))
	if err != nil {
		return nil, err
	}
	probe := newTag()
	n := 0
	err = waitFor(ctx, 30*time.Second, 50*time.Millisecond, func() (bool, error) {
		if err := d.ended(); err != nil {
			return false, err
		}
		if o.ready != "" {
			return contains(d.err, o.ready), nil
		}
		n++
		arg := fmt.Sprintf("%s-%d;", probe, n)
		if err := exec.CommandContext(ctx, filepath.Join(b.programs, "stage"), arg, filepath.Join(b.programs, "tiny")).Run(); err != nil {
			return false, err
		}
		return contains(d.out, probe), nil
	})
	if err != nil {
		said := lastLines(d.err, d.out)
		d.stop()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("%w: %s", err, said)
	}
	return d, b.calm(ctx, d)
}

// calm waits until an observer has done what it does once, at its start: it
// uses less than a twentieth of a CPU for a while. On a machine with other work
// to see it may never be calm; then it is taken as it is.
func (b *bench) calm(ctx context.Context, d *daemon) error {
	const every = 100 * time.Millisecond
	last, err := cpuTime(d.pid())
	if err != nil {
		return errors.Join(err, d.ended())
	}
	quiet := 0
	at := time.Now()
	err = waitFor(ctx, 3*time.Second, every, func() (bool, error) {
		used, err := cpuTime(d.pid())
		if err != nil {
			return false, errors.Join(err, d.ended())
		}
		now := time.Now()
		if passed := now.Sub(at); passed >= every {
			if used-last < passed/20 {
				quiet++
			} else {
				quiet = 0
			}
			last, at = used, now
		}
		return quiet >= 3, nil
	})
	if errors.Is(err, errLate) {
		return nil
	}
	return err
}

// prepare finds out which of the wanted observers can run here at all: each
// is installed if need be, started once and stopped. The others are told with
// the reason.
func (b *bench) prepare(ctx context.Context, log io.Writer, wanted []observer) (can []observer, cannot map[string]string, err error) {
	cannot = map[string]string{}
	for _, o := range wanted {
		if o.command == nil {
			can = append(can, o)
			continue
		}
		err := host.Install(ctx, log, o.tools...)
		if err == nil {
			if o.service && b.service == nil && b.serviceErr == nil {
				b.service, b.serviceErr = b.startCollector(ctx)
			}
			if o.service {
				err = b.serviceErr
			}
		}
		var d *daemon
		if err == nil {
			if d, err = b.begin(ctx, &o); err == nil {
				d.stop()
			}
		}
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		if err != nil {
			cannot[o.name] = strings.Join(strings.Fields(err.Error()), " ")
			fmt.Fprintf(log, "%s cannot run here: %v\n", o.name, err)
			continue
		}
		can = append(can, o)
	}
	if len(can) == 0 {
		return nil, nil, errors.New("no observer can run here")
	}
	return can, cannot, nil
}

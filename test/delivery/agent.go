package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// policy alerts on what this program starts, and on nothing else.
const policy = `
apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: delivery}
spec:
  rules:
    - name: act
      events: [Exec]
      condition: process.args[0] == '%s'
      severity: Low
      message: an act of the measurement
`

// agentSpool measures a real agent whose collector is away until its spool is full
// and gives up old alerts, and how it delivers what it kept.
func (b *bench) agentSpool(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: a real agent hears of real processes")
	}
	dir, err := b.folder("agent")
	if err != nil {
		return err
	}
	c := &collector{b: b, dir: dir}
	if c.addr, err = freeAddr(); err != nil { // nobody is there yet
		return err
	}
	act := "delivery-" + filepath.Base(b.work)
	policies := filepath.Join(dir, "policies")
	if err := errors.Join(issue(c.state(), dir, 1), os.Mkdir(policies, 0o755),
		os.WriteFile(filepath.Join(policies, "act.yaml"), fmt.Appendf(nil, policy, act), 0o644)); err != nil {
		return err
	}
	a := &counted{}
	if a.metrics, err = freeAddr(); err != nil {
		return err
	}
	a.proc, err = launch(nil, b.agentPath, "run", "--state", filepath.Join(dir, "agent-state"), "--policies", policies, "--node", nodeName(0),
		"--collector", c.addr, "--tls", filepath.Join(dir, "tls", nodeName(0)), "--spool-bytes", fmt.Sprint(b.spool<<20), "--metrics", a.metrics)
	if err != nil {
		return err
	}
	defer func() { a.stop(syscall.SIGKILL) }()
	for !strings.Contains(a.tail.String(), "msg=listening") {
		if err := errors.Join(a.ended(), pause(ctx, 20*time.Millisecond)); err != nil {
			return err
		}
	}
	idle, err := a.rss()
	if err != nil {
		return err
	}
	most, err := b.fill(ctx, a, act)
	if err != nil {
		return err
	}
	made, err := a.counter("procession_agent_alerts_durable_total")
	if err != nil {
		return err
	}
	_, full, settled, err := b.watchMemory(ctx, a.proc)
	if err != nil {
		return err
	}
	waiting, err := a.counter("procession_agent_alerts_unacked")
	if err != nil {
		return err
	}
	if err := c.start(ctx); err != nil {
		return err
	}
	defer func() { c.stop(syscall.SIGTERM) }()
	begin := time.Now()
	for left := waiting; left > 0; {
		m, err := a.rss()
		if err == nil {
			left, err = a.counter("procession_agent_alerts_unacked")
		}
		if err := errors.Join(err, pause(ctx, 50*time.Millisecond)); err != nil {
			return err
		}
		most = max(most, m, settled)
	}
	took := time.Since(begin)
	b.rows.add(fmt.Sprintf("agent whose collector is away and whose spool of %d MiB is full (%s alerts made, %s kept)", b.spool, thousands(made), thousands(waiting)),
		fmt.Sprintf("%.0f MiB, at most %.0f while it fills and empties (%.0f MiB at the start)", full, most, idle), "bounded")
	b.rows.add("until the collector has all of it, once it is there", fmt.Sprintf("%.1f s, with the agent's pause before it tries again", took.Seconds()), "")
	fmt.Fprintf(b.log, "agent: %.0f MiB at the start, %.0f full, %.0f at most; %.0f alerts made, %.0f kept, delivered in %.1f s\n", idle, full, most, made, waiting, took.Seconds())
	return nil
}

// fill starts programs until the agent's spool gives up the oldest alerts, and
// returns the most memory it had meanwhile.
func (b *bench) fill(ctx context.Context, a *counted, act string) (most float64, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	args := []string{act}
	for range 24 {
		args = append(args, strings.Repeat("argument ", 15))
	}
	var acting sync.WaitGroup
	defer acting.Wait()
	defer stop(nil)
	var acts atomic.Int64
	for range 2 {
		acting.Go(func() {
			for ctx.Err() == nil {
				cmd := &exec.Cmd{Path: "/bin/true", Args: args}
				if err := cmd.Run(); err != nil {
					stop(err)
				}
				acts.Add(1)
			}
		})
	}
	for {
		m, err := a.rss()
		if err != nil {
			return 0, errors.Join(err, a.ended())
		}
		most = max(most, m)
		lost, err := a.counter("procession_agent_alerts_lost_total", `reason="spool-full"`)
		if err != nil {
			return 0, err
		}
		if lost > 0 {
			return most, nil
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return 0, fmt.Errorf("after %d programs: %w", acts.Load(), err)
		}
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/procession-dev/procession/internal/spool"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/testenv/postgres"
)

// A proc is a program that is killed and started again.
type proc struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func launch(log io.Writer, c *clock, path string, args ...string) (*proc, error) {
	p := &proc{cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), c.env())
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	return p, nil
}

func (p *proc) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop sends a signal and waits; SIGKILL follows after a while.
func (p *proc) stop(sig syscall.Signal) {
	p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
}

// An agent is one node.
type agent struct {
	node  string
	disk  *disk
	size  string // --spool-bytes
	clock *clock
	*proc
}

func (a *agent) state() string { return filepath.Join(a.disk.dir, "agent") }

// A world is all that is broken.
type world struct {
	opt    options
	rnd    *rand.Rand
	work   string
	log    *os.File
	agents []*agent
	cdisk  *disk            // of the collector
	pg     *postgres.Server // nil: SQLite
	coll   *proc
	clock  *clock // the collector's
	relay  *relay
	owed   ledger

	hook   *httptest.Server
	mu     sync.Mutex
	hooked map[string]int // ids the webhook took; guarded by mu
	sick   bool           // the webhook fails; guarded by mu
}

// policy alerts on the acts of this run: others may be under way.
const policy = `
apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: chaos}
spec:
  rules:
    - name: act
      events: [Exec]
      condition: process.args[0] == 'chaos-act' && process.args[1] == '%s'
      severity: Low
      message: an act
`

func (w *world) database() string { return filepath.Join(w.work, "database") }

func (w *world) state() string { return filepath.Join(w.cdisk.dir, "state") }
func (w *world) file() string  { return filepath.Join(w.cdisk.dir, "alerts.ndjson") }

func newWorld(opt options) (w *world, err error) {
	w = &world{opt: opt, rnd: rand.New(rand.NewPCG(opt.seed, 1)), owed: ledger{}, hooked: map[string]int{}}
	if w.work, err = os.MkdirTemp("", "procession-chaos-"); err != nil {
		return nil, err
	}
	if w.log, err = os.Create(filepath.Join(w.work, "log")); err != nil {
		return w, err
	}
	if w.relay, err = newRelay(); err != nil {
		return w, err
	}
	w.hook = httptest.NewServer(http.HandlerFunc(w.takeHook))
	policies := filepath.Join(w.work, "policies")
	if err := errors.Join(os.Mkdir(policies, 0o755), os.WriteFile(filepath.Join(policies, "chaos.yaml"), fmt.Appendf(nil, policy, filepath.Base(w.work)), 0o644),
		os.WriteFile(filepath.Join(w.work, "sinks.yaml"), fmt.Appendf(nil, "sinks: [{name: hook, webhook: {url: %q, plain: true, timeout: 2s}}]", w.hook.URL), 0o600)); err != nil {
		return w, err
	}
	if w.cdisk, err = newDisk(w.work, "collector", 16<<10); err != nil {
		return w, err
	}
	if w.clock, err = newClock(filepath.Join(w.work, "clock")); err != nil {
		return w, err
	}
	for i, size := range []string{"67108864", "1048576"} { // one of them has little room
		a := &agent{node: fmt.Sprint("node-", i+1), size: size}
		if a.disk, err = newDisk(w.work, a.node, 160); err != nil {
			return w, err
		}
		w.agents = append(w.agents, a)
		if a.clock, err = newClock(filepath.Join(w.work, "clock-"+a.node)); err != nil {
			return w, err
		}
		if err := w.issue(a); err != nil {
			return w, err
		}
	}
	if opt.store == "postgres" {
		dir := filepath.Join(w.work, "pg")
		if err := errors.Join(os.Chmod(w.work, 0o711), os.Mkdir(dir, 0o700)); err != nil {
			return w, err
		}
		if w.pg, err = postgres.New(dir); err != nil {
			return w, err
		}
		if err := os.WriteFile(w.database(), []byte(w.pg.DSN("public")), 0o600); err != nil {
			return w, err
		}
	}
	syscall.Sync() // the authority is not what is tested
	if err := w.startCollector(); err != nil {
		return w, err
	}
	for _, a := range w.agents {
		if err := w.startAgent(a); err != nil {
			return w, err
		}
	}
	if err := w.agentsListen(); err != nil {
		return w, err
	}
	if !opt.has("agent-clock") && !opt.has("collector-clock") {
		return w, nil
	}
	for c, p := range map[*clock]*proc{w.clock: w.coll, w.agents[0].clock: w.agents[0].proc} {
		if yes, err := c.follows(p.cmd.Process.Pid); err != nil || !yes {
			return w, fmt.Errorf("%s has a clock that cannot be broken (%v): leave out -bin, or the faults agent-clock and collector-clock", p.cmd.Path, err)
		}
	}
	return w, nil
}

// issue makes an agent's certificate, and before the first the authority, as
// if that had been half a day ago: clocks are set back by less.
func (w *world) issue(a *agent) error {
	if err := a.clock.set(-12 * time.Hour); err != nil {
		return err
	}
	cmd := exec.Command(w.bin("collector"), "issue", "--state", w.state(), "--node", a.node, "--out", w.tls(a))
	cmd.Env = append(os.Environ(), a.clock.env())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("issue: %w: %s", err, out)
	}
	return a.clock.set(0)
}

func (w *world) bin(name string) string { return filepath.Join(w.opt.bin, name) }
func (w *world) tls(a *agent) string    { return filepath.Join(w.work, "tls-"+a.node) }

// agentsListen waits until the agents hear the kernel.
func (w *world) agentsListen() error {
	for range 300 {
		b, err := os.ReadFile(w.log.Name())
		if err != nil {
			return err
		}
		if strings.Count(string(b), "msg=listening") >= len(w.agents) {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("agents do not listen; see %s", w.log.Name())
}

func (w *world) startAgent(a *agent) (err error) {
	a.proc, err = launch(w.log, a.clock, w.bin("agent"), "run", "--state", a.state(), "--policies", filepath.Join(w.work, "policies"),
		"--node", a.node, "--collector", w.relay.addr(), "--tls", w.tls(a), "--spool-bytes", a.size, "--coverage", "5s")
	return err
}

func (w *world) startCollector() (err error) {
	ready := filepath.Join(w.work, "ready")
	os.Remove(ready)
	args := []string{"serve", "--state", w.state(), "--listen", "127.0.0.1:0", "--ready-file", ready, "--ndjson", w.file(), "--sinks", filepath.Join(w.work, "sinks.yaml")}
	if w.pg != nil {
		args = append(args, "--database", w.database())
	}
	if w.coll, err = launch(w.log, w.clock, w.bin("collector"), args...); err != nil {
		return err
	}
	for range 600 {
		if b, err := os.ReadFile(ready); err == nil {
			w.relay.set(func() { w.relay.target = strings.TrimSpace(string(b)) })
			return nil
		}
		if w.coll.ended() {
			return fmt.Errorf("collector ended; see %s", w.log.Name())
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("collector is not ready; see %s", w.log.Name())
}

// takeHook is a receiver that is not always well.
func (w *world) takeHook(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sick {
		rw.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	w.hooked[r.Header.Get("Idempotency-Key")]++
}

// act makes what agents alert on, until ctx ends.
func (w *world) act(ctx context.Context) (acts int) {
	tick := time.NewTicker(time.Second / time.Duration(w.opt.rate))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return acts
		case <-tick.C:
			cmd := exec.Command("/bin/true")
			cmd.Args = []string{"chaos-act", filepath.Base(w.work), fmt.Sprint(acts), strings.Repeat("x", 300)}
			if cmd.Run() == nil {
				acts++
			}
		}
	}
}

// settle waits until agents owe nothing and sinks have everything.
func (w *world) settle() error {
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		why := w.unsettled()
		if why == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after three minutes without a fault: %s", why)
		}
	}
}

func (w *world) unsettled() string {
	for _, a := range w.agents {
		rep, err := spool.Inspect(filepath.Join(a.state(), "spool"), func(*spool.Item) error { return nil })
		if err != nil {
			return err.Error()
		}
		for _, e := range rep.Epochs {
			if e.Highest > e.Acked {
				return fmt.Sprintf("%s: epoch %v is acknowledged up to %d of %d", a.node, e.Epoch, e.Acked, e.Highest)
			}
		}
	}
	out, err := exec.Command(w.bin("collector"), "sink", "list", "--state", w.state()).CombinedOutput()
	if err != nil {
		return string(out)
	}
	for _, line := range strings.Split(string(out), "\n")[1:] {
		if f := strings.Fields(line); len(f) > 2 && f[2] != "0" {
			return "sink " + line
		}
	}
	return ""
}

// verdict stops everything and compares.
func (w *world) verdict() (*verdict, error) {
	for _, a := range w.agents {
		a.stop(syscall.SIGTERM)
		if err := w.owed.add(a.node, a.state(), true); err != nil {
			return nil, err
		}
	}
	w.coll.stop(syscall.SIGTERM)
	var st store.Store
	var err error
	if w.pg == nil {
		st, err = store.OpenSQLite(context.Background(), w.state())
	} else {
		st, err = store.OpenPostgres(context.Background(), w.pg.DSN("public"))
	}
	if err != nil {
		return nil, err
	}
	defer st.Close()
	var all []store.Record
	for after := int64(0); ; after = all[len(all)-1].Cursor {
		n := len(all)
		for i := max(0, n-1000); i < n; i++ {
			all[i].Payload = nil // of a long run it is too much to remember
		}
		if all, err = st.Read(context.Background(), all, after, 1000); err != nil {
			return nil, err
		}
		if len(all) == n {
			break
		}
	}
	var mine []store.Record // without the collector's own
	for _, r := range all {
		if !strings.HasPrefix(r.Node, "@") {
			mine = append(mine, r)
		}
	}
	v := judge(w.owed, mine)
	w.mu.Lock()
	defer w.mu.Unlock()
	v.offered("webhook", "local", all, w.hooked)
	got, err := lines(w.file())
	if err != nil {
		return nil, err
	}
	v.offered("ndjson", "local", all, got)
	if !w.opt.has("restore") { // after which the file has what the store forgot
		for id, n := range got {
			if n > 1 {
				v.repeats["ndjson"]++
				v.note("ndjson has %s %d times", id, n)
			}
		}
	}
	return v, nil
}

func (w *world) close() {
	for _, a := range w.agents {
		if a.proc != nil {
			a.stop(syscall.SIGKILL)
		}
		if a.disk != nil {
			a.disk.remove()
		}
	}
	if w.coll != nil {
		w.coll.stop(syscall.SIGKILL)
	}
	if w.cdisk != nil {
		w.cdisk.remove()
	}
	if w.pg != nil {
		w.pg.Stop()
	}
	if w.hook != nil {
		w.hook.Close()
	}
	if w.relay != nil {
		w.relay.l.Close()
	}
	if w.log != nil {
		w.log.Close()
	}
}

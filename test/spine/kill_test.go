package spine

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const tagPolicy = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata:
  name: spine
spec:
  rules:
    - name: tagged
      events: [Exec]
      condition: process.cmdline.contains('spine-tag-')
      severity: High
      messageExpression: "'saw ' + process.cmdline"
`

// A pair is a collector and an agent with state of their own, each of which
// can be killed and started again.
type pair struct {
	t              *testing.T
	dir, state     string
	listen, alerts string
	agent          *proc
	collector      *proc
	starts         int
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := newCollector(t, tagPolicy)
	p.startAgent()
	return p
}

// newCollector is a pair whose agent waits to be started, with these policies.
func newCollector(t *testing.T, policies string) *pair {
	t.Helper()
	p := &pair{t: t, dir: built(t), state: t.TempDir(), listen: freePort(t)}
	p.alerts = filepath.Join(p.state, "alerts.ndjson")
	if err := os.MkdirAll(filepath.Join(p.state, "policies"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.state, "policies", "spine.yaml"), []byte(policies), 0o644); err != nil {
		t.Fatal(err)
	}
	issue(t, p.dir, filepath.Join(p.state, "collector"), filepath.Join(p.state, "tls"))
	p.startCollector()
	return p
}

func (p *pair) startCollector() {
	p.t.Helper()
	p.starts++
	ready := filepath.Join(p.state, "ready-"+strconv.Itoa(p.starts))
	p.collector = start(p.t, "collector", exec.Command(filepath.Join(p.dir, "bin", "collector"), "serve",
		"--state", filepath.Join(p.state, "collector"), "--listen", p.listen, "--ndjson", p.alerts, "--ready-file", ready))
	eventually(p.t, "the collector is ready", 20*time.Second, func() bool {
		select {
		case <-p.collector.done:
			p.t.Fatalf("the collector ended: %v", p.collector.err)
		default:
		}
		_, err := os.Stat(ready)
		return err == nil
	})
}

func (p *pair) spool() string { return filepath.Join(p.state, "agent", "spool") }

func (p *pair) startAgent(more ...string) {
	p.t.Helper()
	p.agent = start(p.t, "agent", exec.Command(filepath.Join(p.dir, "bin", "agent"), append([]string{"run",
		"--state", filepath.Join(p.state, "agent"), "--policies", filepath.Join(p.state, "policies"),
		"--node", "node-under-test", "--collector", p.listen, "--tls", filepath.Join(p.state, "tls")}, more...)...))
	p.agent.waitFor("listening", 60*time.Second)
}

// act runs true once for each number in [from, to), tagged with it.
func (p *pair) act(from, to int) {
	p.t.Helper()
	for i := from; i < to; i++ {
		if err := exec.Command("/bin/true", fmt.Sprintf("spine-tag-%d;", i)).Run(); err != nil {
			p.t.Fatal(err)
		}
	}
}

// tags counts how often each tag was alerted, and returns the losses.
func (p *pair) tags() (map[string]int, []alertLine) {
	p.t.Helper()
	got := map[string]int{}
	ids := map[string]bool{}
	var losses []alertLine
	for _, a := range lines(p.t, p.alerts) {
		if ids[a.ID] {
			p.t.Fatalf("%s is in the file twice", a.ID)
		}
		ids[a.ID] = true
		if a.Kind == "Loss" {
			losses = append(losses, a)
			continue
		}
		for _, arg := range a.Process.Args {
			if strings.HasPrefix(arg, "spine-tag-") {
				got[arg]++
			}
		}
	}
	return got, losses
}

// TestCollectorKilled kills the collector in the middle of 1,000 alerts.
func TestCollectorKilled(t *testing.T) {
	p := newPair(t)
	p.act(0, 400)
	p.collector.stop(syscall.SIGKILL, 5*time.Second)
	p.act(400, 700)
	p.startCollector()
	p.act(700, 1000)
	eventually(t, "all 1,000 alerts are in the file", 60*time.Second, func() bool {
		got, _ := p.tags()
		return len(got) == 1000
	})
	p.stopBoth()
	got, losses := p.tags()
	for i := range 1000 {
		if n := got[fmt.Sprintf("spine-tag-%d;", i)]; n != 1 {
			t.Errorf("tag %d is there %d times, want once", i, n)
		}
	}
	if len(losses) > 0 {
		t.Errorf("a killed collector made losses: %s", losses[0].raw)
	}
}

func (p *pair) stopBoth() {
	p.t.Helper()
	if err := p.agent.stop(syscall.SIGTERM, 20*time.Second); err != nil {
		p.t.Errorf("agent after SIGTERM: %v", err)
	}
	if err := p.collector.stop(syscall.SIGTERM, 20*time.Second); err != nil {
		p.t.Errorf("collector after SIGTERM: %v", err)
	}
}

// TestAgentKilled kills the agent in the middle of 1,000 alerts: what was
// spooled arrives once, what was made and not spooled is named as lost.
func TestAgentKilled(t *testing.T) {
	p := newPair(t)
	p.act(0, 300)

	// Kill it while alerts are being made: those of the last acts are not on its
	// disk yet, and more follow.
	p.act(300, 500)
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		p.agent.cmd.Process.Kill()
		<-p.agent.done
	}()
	p.act(500, 700)
	<-killed
	made, onDisk, durable := p.inspect()
	p.startAgent()
	p.act(700, 1000)
	eventually(t, "the last alert is in the file", 60*time.Second, func() bool {
		got, _ := p.tags()
		return got["spine-tag-999;"] > 0
	})
	p.stopBoth()

	got, losses := p.tags()
	for tag, n := range got {
		if n != 1 {
			t.Errorf("%s is there %d times, want once", tag, n)
		}
	}
	for _, from := range []int{0, 700} {
		for i := from; i < from+300; i++ {
			if got[fmt.Sprintf("spine-tag-%d;", i)] != 1 {
				t.Errorf("tag %d, made while the agent ran undisturbed, is missing", i)
			}
		}
	}
	for _, tag := range durable {
		if got[tag] != 1 {
			t.Errorf("%s was on the spool's disk and is there %d times, want once", tag, got[tag])
		}
	}
	lost := uint64(lostIn(t, losses))
	if want := made - onDisk; lost != want {
		t.Errorf("the losses name %d records; %d were made and %d of them were on disk", lost, made, onDisk)
	}
	t.Logf("killed after %d records were made, %d on disk, %d of them alerts of acts; %d named as lost; %d acts fell into the agent's absence",
		made, onDisk, len(durable), lost, 1000-len(got)-int(lost))
}

// inspect reads the dead agent's spool: how many records were made, how many
// are on disk, and the tags of those that are alerts.
func (p *pair) inspect() (made, onDisk uint64, durable []string) {
	p.t.Helper()
	out, err := exec.Command(filepath.Join(p.dir, "bin", "agent"), "spool", "dump", "--format", "json", p.spool()).Output()
	if err != nil {
		p.t.Fatalf("agent spool dump: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		var l struct {
			Type    string   `json:"type"`
			Made    uint64   `json:"made"`
			Records uint64   `json:"records"`
			Process procLine `json:"process"`
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			p.t.Fatalf("agent spool dump: %v: %s", err, line)
		}
		if l.Type == "epoch" {
			made, onDisk = made+l.Made, onDisk+l.Records
		}
		for _, arg := range l.Process.Args {
			if strings.HasPrefix(arg, "spine-tag-") {
				durable = append(durable, arg)
			}
		}
	}
	return made, onDisk, durable
}

// lostIn is how many alerts the losses name.
func lostIn(t *testing.T, losses []alertLine) (n int) {
	t.Helper()
	for _, l := range losses {
		var r struct {
			Lost int `json:"lost,string"`
		}
		if err := json.Unmarshal([]byte(l.raw), &r); err != nil || r.Lost == 0 {
			t.Fatalf("a loss without a number: %v: %s", err, l.raw)
		}
		n += r.Lost
	}
	return n
}

package spine

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ask runs a command of the collector that asks the running one.
func (p *pair) ask(args ...string) string {
	p.t.Helper()
	cmd := exec.Command(filepath.Join(p.dir, "bin", "collector"), append(args, "--state", filepath.Join(p.state, "collector"))...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Fatalf("collector %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// What a node saw reaches the collector as surely as an alert, with heartbeats
// that went through kernel and rules; it adds up, and people can ask for it.
func TestCoverage(t *testing.T) {
	p := newPair(t)
	if err := p.agent.stop(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	p.agent = start(t, "agent", exec.Command(filepath.Join(p.dir, "bin", "agent"), "run",
		"--state", filepath.Join(p.state, "agent"), "--policies", filepath.Join(p.state, "policies"),
		"--node", "node-under-test", "--collector", p.listen, "--tls", filepath.Join(p.state, "tls"), "--coverage", "1s"))
	p.agent.waitFor("listening", 30*time.Second)
	const acts = 20
	p.act(0, acts)
	type coverage struct {
		Node     string
		Coverage struct {
			Capture                                             string
			Events, Lost                                        map[string]float64
			Alerts, Spooled, Acked, BeatsSent, BeatsSeen, Rules float64
		}
	}
	var sum coverage
	read := func() (n int) {
		sum = coverage{}
		dec := json.NewDecoder(strings.NewReader(p.ask("alerts", "--kinds", "coverage", "--format", "json", "--last", "1000")))
		for dec.More() {
			var c coverage
			if err := dec.Decode(&c); err != nil {
				t.Fatal(err)
			}
			n++
			sum.Node, sum.Coverage.Capture, sum.Coverage.Rules = c.Node, c.Coverage.Capture, c.Coverage.Rules
			sum.Coverage.Alerts += c.Coverage.Alerts
			sum.Coverage.Spooled += c.Coverage.Spooled
			sum.Coverage.BeatsSent += c.Coverage.BeatsSent
			sum.Coverage.BeatsSeen += c.Coverage.BeatsSeen
			for k, v := range c.Coverage.Events {
				if sum.Coverage.Events == nil {
					sum.Coverage.Events = map[string]float64{}
				}
				sum.Coverage.Events[k] += v
			}
			for k, v := range c.Coverage.Lost {
				t.Errorf("lost %v for %s", v, k)
			}
		}
		return n
	}
	eventually(t, "coverage of the acts is stored, with heartbeats that came back", 60*time.Second, func() bool {
		n := read()
		return n >= 3 && sum.Coverage.Spooled >= acts && sum.Coverage.BeatsSeen >= 2
	})
	if sum.Node != "node-under-test" || sum.Coverage.Capture != "recorder" || sum.Coverage.Rules != 1 ||
		sum.Coverage.Events["Exec"] < acts || sum.Coverage.BeatsSeen > sum.Coverage.BeatsSent {
		t.Errorf("together: %+v", sum)
	}
	if table := p.ask("nodes"); !strings.Contains(table, "node-under-test") || !strings.Contains(table, " ok ") || !strings.Contains(table, "recorder") {
		t.Errorf("nodes:\n%s", table)
	}
	if got := p.ask("alerts", "--last", "3"); strings.Count(got, "\n") != 3 || !strings.Contains(got, "spine-tag-19") {
		t.Errorf("alerts:\n%s", got)
	}
	if got := p.ask("sink", "list"); !strings.Contains(got, "ndjson") {
		t.Errorf("sinks:\n%s", got)
	}
	// Nothing of it is in the file, which is of alerts; and no alert is of a
	// heartbeat.
	for _, a := range lines(t, p.alerts) {
		if a.Kind == "Coverage" {
			t.Error("coverage is in the file of alerts")
		}
	}
	// The end of an agent is told, not left to be guessed.
	before := read()
	if err := p.agent.stop(syscall.SIGTERM, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	if after := read(); after <= before {
		t.Errorf("%d coverage records, %d before the agent ended", after, before)
	}
	// A backup is a database, and asking needs a collector.
	file := filepath.Join(p.state, "backup.db")
	p.ask("backup", file)
	if out, err := exec.Command(filepath.Join(p.dir, "bin", "collector"), "nodes", "--state", t.TempDir()).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("no collector answers")) {
		t.Errorf("without a collector: %v: %s", err, out)
	}
}

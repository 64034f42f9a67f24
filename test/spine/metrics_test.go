package spine

import (
	"bufio"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// scrape reads a metrics page and sums each metric over its labels.
func scrape(t *testing.T, addr string) map[string]float64 {
	t.Helper()
	resp, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	sums := map[string]float64{}
	sc := bufio.NewScanner(resp.Body)
	for sc.Scan() {
		if strings.HasPrefix(sc.Text(), "#") {
			continue
		}
		name, value, _ := strings.Cut(sc.Text(), " ")
		if i := strings.LastIndexByte(sc.Text(), ' '); i > 0 {
			name, value = sc.Text()[:i], sc.Text()[i+1:]
		}
		name, _, _ = strings.Cut(name, "{")
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Fatalf("metrics: %q: %v", sc.Text(), err)
		}
		sums[name] += v
	}
	return sums
}

// TestAgentSaysHowItIs reads the agent's own account and holds it to add up.
func TestAgentSaysHowItIs(t *testing.T) {
	p := newPair(t)
	if err := p.agent.stop(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	addr := freePort(t)
	p.agent = start(t, "agent", exec.Command(filepath.Join(p.dir, "bin", "agent"), "run",
		"--state", filepath.Join(p.state, "agent"), "--policies", filepath.Join(p.state, "policies"),
		"--node", "node-under-test", "--collector", p.listen, "--tls", filepath.Join(p.state, "tls"), "--metrics", addr))
	p.agent.waitFor("listening", 30*time.Second)
	p.act(0, 50)
	eventually(t, "50 alerts are acknowledged", 20*time.Second, func() bool {
		m := scrape(t, addr)
		return m["procession_agent_alerts_made_total"] >= 50 && m["procession_agent_alerts_unacked"] == 0
	})
	m := scrape(t, addr)
	if made, sum := m["procession_agent_alerts_made_total"], m["procession_agent_alerts_durable_total"]+m["procession_agent_alerts_queued"]+m["procession_agent_alerts_lost_total"]; made != sum {
		t.Errorf("made %v alerts; durable, queued and lost are %v", made, sum)
	}
	for name, want := range map[string]float64{
		"procession_agent_alive": 1, "procession_agent_recorder": 1, "procession_agent_collector_connected": 1,
		"procession_agent_rules": 1, "procession_agent_events_lost_total": 0, "procession_agent_spool_failing": 0,
	} {
		if m[name] != want {
			t.Errorf("%s is %v, want %v", name, m[name], want)
		}
	}
	if m["procession_agent_events_judged_total"] < 100 { // 50 execs and their forks and exits
		t.Errorf("judged only %v events", m["procession_agent_events_judged_total"])
	}
	for _, page := range []string{"/healthz", "/readyz"} {
		resp, err := http.Get("http://" + addr + page)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK || string(b) != "ok\n" {
			t.Errorf("%s: %s %q", page, resp.Status, b)
		}
	}
	p.stopBoth()
}

package spine

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A gapLine is what an agent says of the time before it ran.
type gapLine struct {
	ID, Rule, Severity, Kind, Message string
	Evidence                          []struct{ Field, Value string }
}

func (g gapLine) at(t *testing.T, field string) time.Time {
	t.Helper()
	for _, e := range g.Evidence {
		if e.Field == field {
			at, err := time.Parse(time.RFC3339Nano, e.Value)
			if err != nil {
				t.Fatal(err)
			}
			return at
		}
	}
	t.Fatalf("no %s in %+v", field, g)
	return time.Time{}
}

// What happens while no agent runs is in a time that the next agent names, once,
// with the reason: whether the one before was stopped or killed.
func TestUnwatched(t *testing.T) {
	p := newPair(t)
	gaps := func() (found []gapLine) {
		for _, l := range decodeLines[gapLine](t, p.alerts) {
			if l.Rule == "Procession//agent/not-watching" {
				found = append(found, l)
			}
		}
		return found
	}
	expect := func(n int, reason, severity string, from, to time.Time) {
		t.Helper()
		eventually(t, "the time without an agent is named", 30*time.Second, func() bool { return len(gaps()) >= n })
		g := gaps()[n-1]
		if !slices.Contains(g.Evidence, struct{ Field, Value string }{"unwatched.reason", reason}) || g.Severity != severity || g.Kind != "NodeState" {
			t.Errorf("%+v, want reason %s and severity %s", g, reason, severity)
		}
		// The kernel's uptime is exact to 10 ms.
		begin, end := g.at(t, "unwatched.from").Add(-10*time.Millisecond), g.at(t, "unwatched.until")
		if begin.After(from) || end.Before(to) {
			t.Errorf("named as not watched: %v to %v; acted from %v to %v", begin, end, from, to)
		}
	}
	absent := func(from, to int) (first, last time.Time) {
		first = time.Now()
		p.act(from, to)
		return first, time.Now()
	}
	p.act(0, 10)
	eventually(t, "the alerts of the first agent, which has nothing to name", 30*time.Second, func() bool {
		got, _ := p.tags()
		return len(got) == 10
	})
	if g := gaps(); len(g) != 0 {
		t.Fatalf("the first agent on a node names %+v", g)
	}

	p.agent.cmd.Process.Kill()
	<-p.agent.done
	first, last := absent(10, 20)
	p.startAgent()
	expect(1, "died", "Low", first, last)

	if err := p.agent.stop(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	first, last = absent(20, 30)
	p.startAgent()
	expect(2, "stopped", "Informational", first, last)

	// Killed again and again, as fast as it starts: a run that has nothing on its
	// disk leaves the next one to name all of it.
	first = time.Now()
	for range 3 {
		p.agent.cmd.Process.Kill()
		<-p.agent.done
		p.agent = start(t, "agent", exec.Command(filepath.Join(p.dir, "bin", "agent"), "run",
			"--state", filepath.Join(p.state, "agent"), "--policies", filepath.Join(p.state, "policies"),
			"--node", "node-under-test", "--collector", "127.0.0.1:1", "--tls", filepath.Join(p.state, "tls")))
	}
	p.agent.cmd.Process.Kill()
	<-p.agent.done
	_, last = absent(30, 40)
	p.startAgent()
	p.act(40, 50)
	eventually(t, "the last alert", 30*time.Second, func() bool {
		got, _ := p.tags()
		return got["spine-tag-49;"] == 1
	})
	all := gaps()[2:]
	if len(all) == 0 || all[0].at(t, "unwatched.from").After(first) || all[len(all)-1].at(t, "unwatched.until").Before(last) {
		t.Errorf("killed at %v, acted until %v: %+v", first, last, all)
	}
	p.stopBoth()

	// Each act that has no alert is in a time that was named.
	got, losses := p.tags()
	if len(losses) > 0 {
		t.Errorf("losses: %s", losses[0].raw)
	}
	for i := range 50 {
		if tag := fmt.Sprintf("spine-tag-%d;", i); (got[tag] == 1) != (i < 10 || i >= 40) {
			t.Errorf("%s is there %d times", tag, got[tag])
		}
	}
	if n := len(gaps()); n < 3 || n > 6 {
		t.Errorf("%d times were named", n)
	}
	if g := gaps()[1]; !strings.Contains(g.Message, "the agent was stopped") {
		t.Errorf("message %q", g.Message)
	}
}

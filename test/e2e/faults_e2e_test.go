//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"regexp"
	"testing"
	"time"

	"github.com/procession-dev/procession/test/e2e/cluster"
)

// breakThings breaks one thing after the other while a pod makes ten alerts a
// second, and each time checks that every one of them arrived exactly once or
// was named as lost.
func breakThings(t *testing.T, p *product) {
	c := p.c
	c.Apply(t, tickerPod)
	c.WaitReady(t, "e2e-shop", "app=ticker", 1)
	moreTicks(t, c, 20)
	checkTicks(t, p)

	t.Run("collector's pod deleted", func(t *testing.T) {
		before := p.pod(t, p.collector)
		c.Do(t, "delete", "pod", "--namespace", p.namespace, before.Name)
		p.waitReplaced(t, p.collector, before)
		moreTicks(t, c, 20)
		checkTicks(t, p)
	})
	t.Run("collector killed", func(t *testing.T) {
		before := p.pod(t, p.collector)
		kill(t, c, before)
		p.waitReplaced(t, p.collector, before)
		moreTicks(t, c, 20)
		checkTicks(t, p)
	})
	t.Run("API server stopped", func(t *testing.T) {
		c.StopProgram(t, cluster.APIServer)
		moreTicks(t, c, 50)
		c.StartProgram(t, cluster.APIServer)
		checkTicks(t, p)
	})
	t.Run("kubelet stopped", func(t *testing.T) {
		c.StopProgram(t, cluster.Kubelet)
		moreTicks(t, c, 50)
		c.StartProgram(t, cluster.Kubelet)
		checkTicks(t, p)
	})
	t.Run("agent killed", func(t *testing.T) {
		before := p.pod(t, p.agents)
		from := time.Now()
		kill(t, c, before)
		p.waitReplaced(t, p.agents, before)
		p.blindSince(t, from)
		moreTicks(t, c, 20)
		checkTicks(t, p)
	})
	t.Run("agent killed while the API server is down", func(t *testing.T) {
		before := p.pod(t, p.agents)
		c.StopProgram(t, cluster.APIServer)
		from := time.Now()
		kill(t, c, before)
		moreTicks(t, c, 20)
		c.Eventually(t, "the agent listens again", func() error { return p.listensSince(from) })
		moreTicks(t, c, 20)
		c.StartProgram(t, cluster.APIServer)
		p.waitReplaced(t, p.agents, before)
		p.blindSince(t, from)
		checkTicks(t, p)
	})
}

// kill ends the container of a pod with one as kill -9 does.
func kill(t *testing.T, c *cluster.Cluster, pod cluster.Pod) {
	t.Helper()
	for name := range pod.ContainerIDs {
		if err := c.KillContainer(t.Context(), pod, name); err != nil {
			t.Fatal(err)
		}
	}
}

// listening is what the agent says once events are proven to arrive, and since
// when they do; as text or as JSON.
var listening = regexp.MustCompile(`msg"?[=:]"?listening"?.*since"?[=:]"?([0-9TZ:.+-]+)`)

// lastListened is since when the node's agent, in its present life, hears events.
func (p *product) lastListened() (time.Time, error) {
	out, err := p.c.LogOnNode(p.namespace, p.agentName, "")
	if err != nil {
		return time.Time{}, err
	}
	said := listening.FindAllStringSubmatch(out, -1)
	if len(said) == 0 {
		return time.Time{}, errors.New("it never said that it listens")
	}
	return time.Parse(time.RFC3339Nano, said[len(said)-1][1])
}

// unwatched is the time that an agent names as not watched.
func (r *record) unwatched() (s span, ok bool) {
	if r.Rule != "Procession//agent/not-watching" {
		return span{}, false
	}
	for _, e := range r.Evidence {
		at, err := time.Parse(time.RFC3339Nano, e.Value)
		switch {
		case err != nil:
		case e.Field == "unwatched.from":
			s.from = at
		case e.Field == "unwatched.until":
			s.to = at
		}
	}
	return s, !s.from.IsZero() && !s.to.IsZero()
}

func (p *product) listensSince(from time.Time) error {
	at, err := p.lastListened()
	if err == nil && at.Before(from) {
		err = fmt.Errorf("last listening since %v", at)
	}
	return err
}

// blindSince notes that the agent was killed then, and hears events again. A
// tick's stamp is a little older than its exec, so the time is taken a little
// longer.
func (p *product) blindSince(t *testing.T, from time.Time) {
	t.Helper()
	to, err := p.lastListened()
	if err != nil {
		t.Fatal(err)
	}
	if to.Before(from) {
		t.Fatalf("the agent was killed at %v and says it listens since %v", from, to)
	}
	// That time is not hidden: the agent names it, and nothing else excuses a tick.
	p.c.Eventually(t, "the time in which nobody watched is named", func() error {
		all, err := p.alerts(t.Context())
		if err != nil {
			return err
		}
		for _, r := range all {
			if s, ok := r.unwatched(); ok && s.to.Sub(to).Abs() < 100*time.Millisecond {
				if to.Sub(s.from) > to.Sub(from)+10*time.Second {
					return fmt.Errorf("killed at %v, it names %v to %v", from, s.from, s.to)
				}
				t.Logf("%s: %s", r.Severity, r.Message)
				p.blind = append(p.blind, span{from: s.from.Add(-time.Second), to: s.to})
				return nil
			}
		}
		return errors.New("not yet")
	})
	t.Logf("the agent heard nothing for %v at most", to.Sub(from).Round(time.Millisecond))
}

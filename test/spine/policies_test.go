package spine

import (
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const heldPolicies = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: held}
spec:
  scope: {podSelector: {matchLabels: {app: web}}}
  rules:
    - name: repeated
      events: [Exec]
      condition: process.exe.endsWith('/true') && process.cmdline.contains('spine-tag-')
      severity: High
      aggregate: {window: 3s}
    - name: thrice
      events: [Exec]
      condition: process.exe.endsWith('/true') && process.cmdline.contains('spine-tag-')
      severity: Low
      threshold: {by: [pod.namespace], count: 3, window: 1h}
---
apiVersion: procession.dev/v1alpha1
kind: DetectionPolicy
metadata: {name: held, namespace: shop}
spec:
  rules:
    - name: mine
      events: [Exec]
      condition: process.exe.endsWith('/true')
      severity: Low
      exceptions: [{name: second, condition: process.cmdline.contains('spine-tag-2'), reason: to see that it is ours alone}]
---
apiVersion: procession.dev/v1alpha1
kind: DetectionPolicy
metadata: {name: held, namespace: other}
spec:
  mode: DryRun
  rules:
    - {name: mine, events: [Exec], condition: process.exe.endsWith('/true'), severity: Low}
`

// A heldLine has what matters of alerts for several matches.
type heldLine struct {
	ID, Rule   string
	Process    procLine
	Parent     *procLine
	Pod        struct{ Namespace string }
	Aggregated *struct {
		Count      int
		First, Why string
		Samples    []struct{ Cmdline string }
	}
	Evidence []struct{ Field, Value, Term, Truth, Exception string }
}

// TestHeldBackAndTenants: on the real kernel a repeat is summed up, thresholds
// count, and policies of a namespace see their own pods.
func TestHeldBackAndTenants(t *testing.T) {
	k := newKubelet(t)
	p := newCollector(t, heldPolicies)
	k.list(kubeletPod(webUID, "shop", "web", containerID(1)), kubeletPod(otherUID, "other", "web", containerID(2)))
	p.startAgent(k.flags()...)
	eventually(t, "the kubelet is asked", 30*time.Second, func() bool { return k.calls.Load() > 0 })

	shop, other := container(t, webUID, containerID(1)), container(t, otherUID, containerID(2))
	for _, tag := range []string{"spine-tag-1", "spine-tag-2", "spine-tag-3", "spine-tag-4"} {
		runIn(t, shop, tag)
	}
	runIn(t, other, "spine-tag-5")
	if err := exec.Command("/bin/true", "spine-tag-6").Run(); err != nil { // the host
		t.Fatal(err)
	}
	count := func(rule string, is func(heldLine) bool) (found []heldLine) {
		for _, l := range decodeLines[heldLine](t, p.alerts) {
			if l.Rule == rule && is(l) {
				found = append(found, l)
			}
		}
		return found
	}
	const repeated, mine = "ClusterDetectionPolicy//held/repeated", "DetectionPolicy/shop/held/mine"
	summary := func(l heldLine) bool { return l.Aggregated != nil && l.Aggregated.Why == "window" }
	eventually(t, "the window is over and its repeats are summed up", 60*time.Second, func() bool {
		n := 0
		for _, l := range count(repeated, func(heldLine) bool { return true }) {
			if n++; l.Aggregated != nil {
				n += l.Aggregated.Count - 1
			}
		}
		return n == 5 && len(count(mine, func(heldLine) bool { return true })) == 3
	})
	if err := p.agent.stop(syscall.SIGTERM, 60*time.Second); err != nil {
		t.Fatal(err)
	}
	firsts := count(repeated, func(l heldLine) bool { return l.Aggregated == nil })
	for _, s := range count(repeated, summary) {
		if !slices.ContainsFunc(firsts, func(l heldLine) bool { return l.ID == s.Aggregated.First && l.Pod.Namespace == s.Pod.Namespace }) ||
			len(s.Aggregated.Samples) == 0 || !strings.Contains(s.Aggregated.Samples[0].Cmdline, "spine-tag-") {
			t.Errorf("a summary of nothing: %+v", s)
		}
	}
	if len(firsts) < 2 {
		t.Errorf("%d first alerts, want one for each container", len(firsts))
	}
	thrice := count("ClusterDetectionPolicy//held/thrice", func(heldLine) bool { return true })
	if len(thrice) != 1 || thrice[0].Aggregated == nil || thrice[0].Aggregated.Count != 3 || thrice[0].Aggregated.Why != "threshold" {
		t.Errorf("threshold: %+v", thrice)
	}
	if got := p.ask("alerts", "--format", "json", "--last", "1000"); strings.Contains(got, "dryRun") || strings.Contains(got, "DetectionPolicy/other/") {
		t.Errorf("a dry run is told to who did not ask:\n%s", got)
	}
	dry := p.ask("alerts", "--format", "json", "--last", "1000", "--dry-run", "--rule", "DetectionPolicy/other/*/*")
	if strings.Count(dry, "\n") != 1 || !strings.Contains(dry, `"dryRun":true`) || !strings.Contains(dry, "spine-tag-5") {
		t.Errorf("the dry run, for who asks:\n%s", dry)
	}
	for _, l := range decodeLines[heldLine](t, p.alerts) {
		if strings.HasPrefix(l.Rule, "DetectionPolicy/other/") {
			t.Errorf("a dry run raised %+v", l)
		}
		if l.Rule != mine {
			continue
		}
		if l.Pod.Namespace != "shop" || slices.Contains(l.Process.Args, "spine-tag-2") {
			t.Errorf("the namespace's rule raised %+v", l)
		}
		if l.Parent != nil || len(l.Process.Ancestors) > 0 || l.Process.PPID == nil || *l.Process.PPID != 0 {
			t.Errorf("the namespace sees its container's parents: %+v", l)
		}
		if len(l.Evidence) != 2 || l.Evidence[0].Term != "process.exe.endsWith('/true')" || l.Evidence[0].Truth != "true" ||
			l.Evidence[1].Exception != "second" || l.Evidence[1].Truth != "false" {
			t.Errorf("evidence: %+v", l.Evidence)
		}
	}
}

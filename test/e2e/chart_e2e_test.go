//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/testenv"
	"github.com/procession-dev/procession/test/e2e/cluster"
)

const chartNamespace = "procession-system"

// A release is an installed chart.
type release struct {
	c      *cluster.Cluster
	images map[string]string
	values []string // files
	shared bool     // another release is on the cluster, and needs the definitions too
}

func (r *release) helm(ctx context.Context, verb string, more ...string) (string, error) {
	args := []string{verb, "procession", filepath.Join(r.c.Root, "deploy", "helm", "procession"), "--namespace", chartNamespace, "--wait", "--timeout", "5m"}
	for _, program := range []string{"agent", "collector"} {
		name := r.images[program]
		args = append(args, "--set-string", program+".image.tag="+name[strings.LastIndexByte(name, ':')+1:])
	}
	for _, v := range r.values {
		args = append(args, "--values", v)
	}
	return r.c.Helm(ctx, append(args, more...)...)
}

// stateDir is the agents' on the node, as the chart has it by default.
const stateDir = "/var/lib/procession"

// prepare makes sure that nothing of another installation is there.
//
// An agent's state outlives it on purpose: whatever its spool still holds goes to
// the next collector that does not have it. So a test begins and ends without.
func (r *release) prepare(t *testing.T) {
	t.Helper()
	if others := strings.TrimSpace(r.c.Do(t, "get", "daemonset", "--all-namespaces", "--selector", "app.kubernetes.io/name=procession", "--output", "name")); others != "" {
		t.Logf("another release is installed (helm list -A names it); the definitions are left alone: %s", others)
		r.shared = true
	}
	if err := r.removeCRDs(t.Context()); err != nil { // left over from an installation by hand
		t.Fatal(err)
	}
	if _, err := os.Stat(stateDir); err == nil {
		t.Fatalf("%s is there: the state of an earlier agent, whose alerts would be told again; remove it", stateDir)
	}
}

// install installs the chart, and takes it away when the test is over.
func (r *release) install(t *testing.T, more ...string) (notes string) {
	t.Helper()
	r.prepare(t)
	t.Cleanup(func() {
		r.c.KeepEvidence(t)
		ctx := context.WithoutCancel(t.Context())
		if err := errors.Join(r.uninstall(ctx), r.removeCRDs(ctx), os.RemoveAll(stateDir)); err != nil {
			t.Error(err)
		}
	})
	notes, err := r.helm(t.Context(), "install", append(more, "--create-namespace")...)
	if err != nil {
		t.Fatal(err)
	}
	return notes
}

func (r *release) uninstall(ctx context.Context) error {
	_, err := r.c.Helm(ctx, "uninstall", "procession", "--namespace", chartNamespace, "--wait", "--ignore-not-found", "--timeout", "3m")
	return err
}

// removeCRDs removes what an uninstall leaves, unless somebody else needs it.
func (r *release) removeCRDs(ctx context.Context) error {
	if r.shared {
		return nil
	}
	_, err := r.c.Kubectl(ctx, "delete", "crd", "--ignore-not-found", "clusterdetectionpolicies.procession.dev", "detectionpolicies.procession.dev")
	return err
}

func (r *release) product(t *testing.T) *product {
	const selector = "app.kubernetes.io/instance=procession,app.kubernetes.io/component="
	p := &product{c: r.c, namespace: chartNamespace, agents: selector + "agent", collector: selector + "collector", metrics: "http://127.0.0.1:9465/metrics"}
	p.agentName = p.pod(t, p.agents).Name
	p.pod(t, p.collector)
	return p
}

// objects are the names of everything in the cluster that somebody made on
// purpose, and would have to remove.
func objects(t *testing.T, c *cluster.Cluster) []string {
	t.Helper()
	kinds := strings.Fields(c.Do(t, "api-resources", "--verbs=list", "--output=name"))
	kinds = slices.DeleteFunc(kinds, func(k string) bool {
		return slices.Contains([]string{"events", "events.events.k8s.io", "leases.coordination.k8s.io", "componentstatuses", "ipaddresses.networking.k8s.io", "apiservices.apiregistration.k8s.io"}, k)
	})
	slices.Sort(kinds)
	out := c.Do(t, "get", strings.Join(kinds, ","), "--all-namespaces", "--ignore-not-found",
		"--output", `jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{"\n"}{end}`)
	found := strings.Split(strings.TrimSpace(out), "\n")
	slices.Sort(found)
	return slices.Compact(found)
}

// TestChartDefaults is the first five minutes of a user on a cluster without a
// storage class: install with default values, see the first alert as the chart's
// notes say, uninstall, and nothing is left but what is said to stay.
func TestChartDefaults(t *testing.T) {
	testenv.Root(t)
	c := cluster.Up(t)
	r := &release{c: c, images: loadImages(t, c)}
	startTargets(t, c)
	c.Apply(t, "{apiVersion: v1, kind: Namespace, metadata: {name: "+chartNamespace+"}}")
	r.prepare(t)
	before := objects(t, c)

	notes := r.install(t)
	if !strings.Contains(notes, "WARNING: the collector stores alerts in an emptyDir") {
		t.Errorf("the notes do not warn about the emptyDir:\n%s", notes)
	}
	p := r.product(t)
	for _, g := range targets {
		_, _ = c.ExecErr(t.Context(), g.namespace, g.pod, g.container, "nc", "-e", "/bin/sh", "127.0.0.1", "1") // nobody listens there
	}
	c.Eventually(t, "an alert for each container in the collector's log", func() error {
		out, err := c.Logs(t.Context(), p.namespace, "statefulset/procession-collector", "")
		if err != nil {
			return err
		}
		lines := map[string]int{} // by pod, of which each has two containers among the targets
		for line := range strings.Lines(out) {
			for _, g := range targets {
				if f := strings.Fields(line); len(f) > 3 && f[2] == "netcat-program" && f[3] == g.namespace+"/"+g.pod && g.container == "main" {
					lines[f[3]]++
				}
			}
		}
		if want := map[string]int{"e2e-shop/web": 2, "e2e-bank/web": 2}; !maps.Equal(lines, want) {
			return fmt.Errorf("lines by pod: %v, want %v", lines, want)
		}
		return nil
	})
	checkPrivileges(t, p)

	if err := r.uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	var left []string
	c.Eventually(t, "the namespace is empty", func() error {
		left = slices.DeleteFunc(objects(t, c), func(o string) bool { return slices.Contains(before, o) })
		// Pods and what they had end a moment after the release.
		if slices.ContainsFunc(left, func(o string) bool {
			return strings.HasPrefix(o, "Pod ") || strings.HasPrefix(o, "EndpointSlice ") || strings.HasPrefix(o, "Endpoints ") ||
				strings.HasPrefix(o, "ControllerRevision ") || strings.HasPrefix(o, "PodMetrics ")
		}) {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	// Helm never removes what is in crds/, and with them would go the policies that
	// people have written.
	want := []string{
		"CustomResourceDefinition /clusterdetectionpolicies.procession.dev",
		"CustomResourceDefinition /detectionpolicies.procession.dev",
	}
	if r.shared {
		want = []string{}
	}
	if d := cmp.Diff(want, left); d != "" {
		t.Errorf("what the uninstalled chart leaves (-want +got):\n%s", d)
	}
}

// checkPrivileges looks at the processes themselves: what the kernel lets them do.
func checkPrivileges(t *testing.T, p *product) {
	t.Helper()
	for _, tc := range []struct {
		selector, uid, caps string
	}{
		// NET_ADMIN (12), SYS_PTRACE (19), DAC_READ_SEARCH (2), SYS_NICE (23),
		// PERFMON (38), BPF (39).
		{p.agents, "0", fmt.Sprintf("%016x", 1<<12|1<<19|1<<2|1<<23|1<<38|1<<39)},
		{p.collector, "65532", "0000000000000000"},
	} {
		pod := p.pod(t, tc.selector)
		for name := range pod.ContainerIDs {
			pid, err := p.c.ContainerPID(t.Context(), pod, name)
			if err != nil {
				t.Fatal(err)
			}
			got := procStatus(t, pid)
			for key, want := range map[string]string{"CapEff": tc.caps, "CapBnd": tc.caps, "Seccomp": "2", "NoNewPrivs": "1", "Uid": tc.uid} {
				if first, _, _ := strings.Cut(got[key], "\t"); first != want {
					t.Errorf("%s: %s is %s, want %s", name, key, first, want)
				}
			}
		}
	}
}

// procStatus is /proc/PID/status.
func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			m[k] = strings.TrimSpace(v)
		}
	}
	return m
}

const storage = `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: e2e-local
  annotations: {storageclass.kubernetes.io/is-default-class: "true"}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: e2e-collector}
spec:
  capacity: {storage: 10Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: e2e-local
  local: {path: %s}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}]}}
`

const sinks = `
clusterName: e2e
collector:
  sinks:
  - name: soc
    webhook: {url: %q, plain: true}
`

// TestChart is the product in production: a default storage class, a SOC that
// receives by webhook, policies as objects, tokens; attacked, broken, measured and
// upgraded.
func TestChart(t *testing.T) {
	testenv.Root(t)
	c := cluster.Up(t)
	r := &release{c: c, images: loadImages(t, c)}
	startTargets(t, c)
	s := newSOC(t, c.NodeIP)

	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) { // the test's own directories are this user's alone
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	volume, values := filepath.Join(dir, "volume"), filepath.Join(dir, "values.yaml")
	if err := os.Mkdir(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(values, fmt.Appendf(nil, sinks, s.url), 0o644); err != nil {
		t.Fatal(err)
	}
	r.values = []string{values}
	c.Apply(t, fmt.Sprintf(storage, volume, c.Node))
	t.Cleanup(func() { // the claim stays when the release goes: it is the evidence
		if _, err := c.Kubectl(context.WithoutCancel(t.Context()), "delete", "namespace", chartNamespace, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	if notes := r.install(t); strings.Contains(notes, "WARNING") {
		t.Errorf("the notes warn:\n%s", notes)
	}
	p := r.product(t)
	p.read = s.read
	attackAll(t, p)
	c.Apply(t, tickPolicy)
	t.Run("policies", func(t *testing.T) { testPolicies(t, p) })
	t.Run("authentication", func(t *testing.T) { testAuthentication(t, p) })
	t.Run("measured", func(t *testing.T) { measure(t, p) })
	t.Run("faults", func(t *testing.T) {
		breakThings(t, p)
		t.Run("chart upgraded under load", func(t *testing.T) {
			upgrade(t, r, p, "--set-string", "agent.podAnnotations.e2e=two", "--set-string", "collector.podAnnotations.e2e=two")
		})
		t.Run("agents given a network of their own", func(t *testing.T) {
			upgrade(t, r, p, "--set", "agent.hostNetwork=false", "--set-string", "collector.podAnnotations.e2e=three")
		})
		t.Run("pods watched at the API server", func(t *testing.T) {
			upgrade(t, r, p, "--set", "agent.pods.kubeletPort=0", "--set", "agent.pods.apiWatch=true", "--set-string", "collector.podAnnotations.e2e=four")
			watchPods(t, p)
		})
	})
	t.Logf("the webhook delivered %d records again", s.repeats)
}

// A policyObject is what kubectl shows of a policy.
type policyObject struct {
	Metadata struct{ Generation int64 }
	Status   struct {
		ObservedGeneration int64
		Nodes              struct{ Desired, Loaded, Failed int }
		Conditions         []policyCondition
	}
}

type policyCondition struct {
	Type, Status, Reason, Message string
	ObservedGeneration            int64
}

func (o *policyObject) condition(typ string) policyCondition {
	for _, c := range o.Status.Conditions {
		if c.Type == typ {
			return c
		}
	}
	return policyCondition{}
}

// inForce is how a good policy stands.
func inForce(o *policyObject) error {
	if o.Status.ObservedGeneration != o.Metadata.Generation || o.Status.Nodes.Desired != 1 || o.Status.Nodes.Loaded != 1 || o.Status.Nodes.Failed != 0 {
		return fmt.Errorf("generation %d: %+v", o.Metadata.Generation, o.Status)
	}
	for typ, want := range map[string]string{"Accepted": "True", "Programmed": "True", "Degraded": "False"} {
		if c := o.condition(typ); c.Status != want || c.ObservedGeneration != o.Metadata.Generation {
			return fmt.Errorf("generation %d: %+v", o.Metadata.Generation, c)
		}
	}
	return nil
}

// waitStatus waits until the status of a policy is as it should be.
func waitStatus(t *testing.T, c *cluster.Cluster, object string, is func(*policyObject) error) {
	t.Helper()
	began := time.Now()
	c.Eventually(t, "the status of "+object, func() error {
		out, err := c.Kubectl(t.Context(), append([]string{"get", "--output", "json"}, strings.Fields(object)...)...)
		if err != nil {
			return err
		}
		var o policyObject
		if err := json.Unmarshal([]byte(out), &o); err != nil {
			return err
		}
		return is(&o)
	})
	t.Logf("its status says so after at most %v", time.Since(began).Round(time.Millisecond))
}

// upgrade changes both pod templates while alerts come.
func upgrade(t *testing.T, r *release, p *product, values ...string) {
	t.Helper()
	agent, collector := p.pod(t, p.agents), p.pod(t, p.collector)
	from := time.Now()
	if _, err := r.helm(t.Context(), "upgrade", values...); err != nil {
		t.Fatal(err)
	}
	p.waitReplaced(t, p.agents, agent)
	p.waitReplaced(t, p.collector, collector)
	p.agentName = p.pod(t, p.agents).Name
	p.blindSince(t, from)
	moreTicks(t, p.c, 20)
	checkTicks(t, p)
}

const trialPolicy = `
apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: e2e-trial}
spec:
  rules:
  - name: trial
    title: A trial
    events: [Exec]
    condition: %s
    severity: High
    messageExpression: process.cmdline
`

// testPolicies applies, breaks, mends and deletes a policy, as people do.
func testPolicies(t *testing.T, p *product) {
	c, n := p.c, 0
	// try runs a program with a word and a fresh number until the alert is there, or
	// makes sure that none comes.
	try := func(t *testing.T, word string, want bool) {
		t.Helper()
		seen := func(arg string) error {
			all, err := p.alerts(t.Context())
			if err != nil {
				return err
			}
			for _, r := range all {
				if r.rule() == "e2e-trial/trial" && r.Process != nil && slices.Contains(r.Process.Args, arg) {
					return nil
				}
			}
			return errors.New("no alert")
		}
		run := func(word string) string {
			n++
			arg := word + "=" + strconv.Itoa(n)
			c.Exec(t, targets[0].namespace, targets[0].pod, targets[0].container, "miner", arg)
			return arg
		}
		if want {
			began := time.Now()
			c.Eventually(t, "an alert of the trial's policy for "+word, func() error { return seen(run(word)) })
			t.Logf("in force after at most %v", time.Since(began).Round(time.Millisecond))
			return
		}
		// What is judged after it and comes proves that it was judged.
		arg := run(word)
		c.Exec(t, targets[0].namespace, targets[0].pod, targets[0].container, "miner", "--donate-level", arg)
		c.Eventually(t, "the alert that follows", func() error {
			all, err := p.alerts(t.Context())
			if err != nil {
				return err
			}
			for _, r := range all {
				if r.rule() == "host/crypto-miner" && r.Process != nil && slices.Contains(r.Process.Args, arg) {
					return nil
				}
			}
			return errors.New("not yet")
		})
		if seen(arg) == nil {
			t.Errorf("an alert for %s", arg)
		}
	}
	t.Run("applied", func(t *testing.T) {
		if err := c.ApplyErr(t.Context(), fmt.Sprintf(trialPolicy, "process.cmdline.contains('trial-one')")); err != nil {
			t.Fatal(err)
		}
		waitStatus(t, c, "clusterdetectionpolicy/e2e-trial", inForce)
		try(t, "trial-one", true)
	})
	t.Run("changed", func(t *testing.T) {
		if err := c.ApplyErr(t.Context(), fmt.Sprintf(trialPolicy, "process.cmdline.contains('trial-two')")); err != nil {
			t.Fatal(err)
		}
		try(t, "trial-two", true)
		try(t, "trial-one", false)
		waitStatus(t, c, "clusterdetectionpolicy/e2e-trial", inForce)
	})
	t.Run("broken keeps its last good generation, and says so", func(t *testing.T) {
		if err := c.ApplyErr(t.Context(), fmt.Sprintf(trialPolicy, "process.nothing.of.the.kind == 1")); err != nil {
			t.Fatal(err)
		}
		c.Eventually(t, "the agent's word about it", func() error {
			out, err := c.LogOnNode(p.namespace, p.agentName, "")
			if err == nil && !strings.Contains(out, "process.nothing") {
				err = errors.New("nothing about process.nothing in its log")
			}
			return err
		})
		waitStatus(t, c, "clusterdetectionpolicy/e2e-trial", func(o *policyObject) error {
			accepted, programmed := o.condition("Accepted"), o.condition("Programmed")
			if accepted.Status != "False" || accepted.ObservedGeneration != o.Metadata.Generation ||
				!strings.HasPrefix(accepted.Message, "rule trial: spec.rules[0].condition: 1:") || !strings.Contains(accepted.Message, "process.nothing") {
				return fmt.Errorf("Accepted: %+v", accepted)
			}
			if programmed.Status != "True" || programmed.ObservedGeneration != o.Metadata.Generation-1 || o.Status.Nodes.Failed != 1 || o.Status.Nodes.Loaded != 0 {
				return fmt.Errorf("Programmed: %+v, nodes %+v", programmed, o.Status.Nodes)
			}
			return nil
		})
		t.Logf("kubectl get --output wide:\n%s", c.Do(t, "get", "clusterdetectionpolicy", "e2e-trial", "--output", "wide"))
		// What is waited for is the version that was applied, not the one before.
		if _, err := c.Kubectl(t.Context(), "wait", "--for=condition=Programmed", "--timeout=1s", "clusterdetectionpolicy/e2e-trial"); err == nil {
			t.Error("kubectl wait takes the last good version for the one that was applied")
		}
		try(t, "trial-two", true)
	})
	t.Run("mended", func(t *testing.T) {
		if err := c.ApplyErr(t.Context(), fmt.Sprintf(trialPolicy, "process.cmdline.contains('trial-three')")); err != nil {
			t.Fatal(err)
		}
		try(t, "trial-three", true)
		c.Do(t, "wait", "--for=condition=Programmed", "--timeout=60s", "clusterdetectionpolicy/e2e-trial")
		waitStatus(t, c, "clusterdetectionpolicy/e2e-trial", inForce)
		try(t, "trial-two", false)
	})
	t.Run("a typing error is refused by the API server", func(t *testing.T) {
		bad := strings.Replace(fmt.Sprintf(trialPolicy, "true"), "severity: High", "severity: Hihg", 1)
		if err := c.ApplyErr(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "severity") {
			t.Errorf("answer: %v", err)
		}
	})
	t.Run("a policy of a namespace", func(t *testing.T) {
		own := strings.NewReplacer("kind: Cluster", "kind: ", "{name: e2e-trial", "{namespace: "+targets[0].namespace+", name: e2e-trial").Replace(fmt.Sprintf(trialPolicy, "process.nome == 'x'"))
		c.Apply(t, own)
		object := "--namespace=" + targets[0].namespace + " detectionpolicy/e2e-trial"
		waitStatus(t, c, object, func(o *policyObject) error {
			if a, p := o.condition("Accepted"), o.condition("Programmed"); a.Status != "False" || p.Status != "False" || p.Reason != "Refused" {
				return fmt.Errorf("Accepted %+v, Programmed %+v", a, p)
			}
			return nil
		})
		c.Apply(t, strings.Replace(own, "process.nome", "process.name", 1))
		waitStatus(t, c, object, inForce)
		c.Do(t, "delete", "detectionpolicy", "e2e-trial", "--namespace", targets[0].namespace)
	})
	t.Run("deleted", func(t *testing.T) {
		c.Do(t, "delete", "clusterdetectionpolicy", "e2e-trial")
		c.Eventually(t, "no alert any more", func() error {
			before := n
			arg := "trial-three=" + strconv.Itoa(before+1)
			n++
			c.Exec(t, targets[0].namespace, targets[0].pod, targets[0].container, "miner", "--donate-level", arg)
			return notFollowed(t, p, arg)
		})
	})
}

// notFollowed says whether an exec that the miner's rule alerts on made no alert of
// the trial's.
func notFollowed(t *testing.T, p *product, arg string) error {
	p.c.Eventually(t, "the alert that follows", func() error {
		all, err := p.alerts(t.Context())
		if err != nil {
			return err
		}
		for _, r := range all {
			if r.rule() == "host/crypto-miner" && r.Process != nil && slices.Contains(r.Process.Args, arg) {
				return nil
			}
		}
		return errors.New("not yet")
	})
	all, err := p.alerts(t.Context())
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.rule() == "e2e-trial/trial" && r.Process != nil && slices.Contains(r.Process.Args, arg) {
			return errors.New("still in force")
		}
	}
	return nil
}

//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/test/e2e/cluster"
)

// A record is a line of the collector's NDJSON: what the tests need of it.
type record struct {
	ID        string    `json:"id"`
	Time      time.Time `json:"time"`
	Kind      string    `json:"kind"`
	Alert     string    `json:"amends"` // of an amendment: the alert's id
	Severity  string    `json:"severity"`
	Rule      string    `json:"rule"`
	Message   string    `json:"message"`
	Node      string    `json:"node"`
	Lost      string    `json:"lost"`   // of a loss
	Reason    string    `json:"reason"` // of a loss
	Process   *process  `json:"process"`
	Evidence  []struct{ Field, Value string }
	Container struct {
		ID   string `json:"id"`
		Name string `json:"name"`
	} `json:"container"`
	Pod struct {
		UID       string `json:"uid"`
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"pod"`
	raw string
}

type process struct {
	PID       int      `json:"pid"`
	Args      []string `json:"args"`
	Ancestors []struct {
		PID int `json:"pid"`
	} `json:"ancestors"`
}

// severe says whether somebody would be woken: above Low. The sinks of these
// tests did not ask for dry runs, so there are none.
func (r *record) severe() bool {
	return r.Severity == "Medium" || r.Severity == "High" || r.Severity == "Critical"
}

// where is the place that a record names: node, namespace, pod and container.
func (p *product) where(r *record, pods []cluster.Pod) string {
	if !p.ids {
		return r.Node + " " + target{r.Pod.Namespace, r.Pod.Name, r.Container.Name}.String()
	}
	for _, pod := range pods {
		for name, id := range pod.ContainerIDs {
			if id == r.Container.ID && pod.UID == r.Pod.UID {
				return r.Node + " " + target{pod.Namespace, pod.Name, name}.String()
			}
		}
	}
	return r.Node + " container " + r.Container.ID + " of pod " + r.Pod.UID
}

// rule is POLICY/RULE of a cluster-wide rule, and the whole name of any other.
func (r *record) rule() string { return strings.TrimPrefix(r.Rule, "ClusterDetectionPolicy//") }

// A product is an installed Procession.
type product struct {
	c         *cluster.Cluster
	namespace string
	agents    string // selector of the agent's pods
	agentName string // of the agent's pod at the moment
	collector string // selector of the collector's pod
	// ids says that alerts name container and pod by id alone, because the agent
	// may not ask the kubelet.
	ids     bool
	metrics string // where the agent's metrics are
	// blind are the times in which the agent was killed and not yet up again.
	blind []span
	// read gives the collector's alerts so far, as NDJSON.
	read func(ctx context.Context) ([]byte, error)
}

// alerts are the collector's records so far, with amendments put into what they
// amend.
func (p *product) alerts(ctx context.Context) ([]*record, error) {
	b, err := p.read(ctx)
	if err != nil {
		return nil, err
	}
	var all []*record
	byID := map[string]*record{}
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		line := sc.Bytes()
		if len(line) == 0 || line[0] != '{' {
			continue
		}
		r := new(record)
		if err := json.Unmarshal(line, r); err != nil {
			return nil, fmt.Errorf("%w in %.200s", err, line)
		}
		r.raw = string(line)
		if r.Kind == "Amendment" {
			if amended := byID[cmp.Or(r.Alert, r.ID)]; amended != nil {
				if err := json.Unmarshal(line, &struct {
					Container, Pod any
				}{&amended.Container, &amended.Pod}); err != nil {
					return nil, err
				}
			}
			continue
		}
		if byID[r.ID] != nil {
			return nil, fmt.Errorf("two records have the id %s", r.ID)
		}
		byID[r.ID] = r
		all = append(all, r)
	}
	return all, sc.Err()
}

// loadImages builds the images of this checkout and loads them into the node:
// "agent" and "collector" to what pods call them. PROCESSION_IMAGES names a
// directory that holds the archives already.
func loadImages(t *testing.T, c *cluster.Cluster) map[string]string {
	t.Helper()
	dir := os.Getenv("PROCESSION_IMAGES")
	if dir == "" {
		dir = filepath.Join(c.Root, "dist")
		cmd := exec.CommandContext(t.Context(), "make", "-s", "-C", c.Root, "image", "ARCHES="+runtime.GOARCH)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make image: %v\n%s", err, out)
		}
	}
	names := map[string]string{}
	for _, program := range []string{"agent", "collector"} {
		loaded, err := c.LoadImage(t.Context(), filepath.Join(dir, program+"-linux-"+runtime.GOARCH+".oci.tar"))
		if err != nil {
			t.Fatal(err)
		}
		names[program] = loaded[0]
	}
	return names
}

const attackedImage = "e2e.local/attacked:1"

// buildAttacked makes the image of the attacked pods: busybox and the actor under
// its names.
func buildAttacked(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "actor")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "./test/e2e/actor")
	cmd.Dir, cmd.Env = c.Root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the actor: %v\n%s", err, out)
	}
	im := cluster.Image{Name: attackedImage, Busybox: true, Files: []cluster.File{{Path: "/usr/bin/actor", From: bin}}}
	for _, name := range []string{"nginx", "postgres", "miner", "python3", "curl"} {
		im.Files = append(im.Files, cluster.File{Path: "/usr/bin/" + name, Link: "/usr/bin/actor"})
	}
	if err := c.BuildImage(t.Context(), im); err != nil {
		t.Fatal(err)
	}
}

// A target is a container that is attacked.
type target struct{ namespace, pod, container string }

func (g target) String() string { return g.namespace + "/" + g.pod + "/" + g.container }

// targets: the same pod name in two namespaces, and two containers in a pod, so
// that each part of a place is told apart from the others.
var targets = []target{
	{"e2e-shop", "web", "main"}, {"e2e-shop", "web", "sidecar"}, {"e2e-bank", "web", "main"}, {"e2e-bank", "web", "sidecar"},
}

const attackedPod = `
apiVersion: v1
kind: Namespace
metadata: {name: %[1]s}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: %[1]s, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "%[2]s", imagePullPolicy: Never, command: [sleep, "1000000"]}
  - {name: sidecar, image: "%[2]s", imagePullPolicy: Never, command: [sleep, "1000000"]}
  - {name: user, image: "%[2]s", imagePullPolicy: Never, command: [sleep, "1000000"], securityContext: {runAsUser: 1000, runAsGroup: 1000}}
`

func startTargets(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	buildAttacked(t, c)
	for _, ns := range []string{"e2e-shop", "e2e-bank"} {
		c.Apply(t, fmt.Sprintf(attackedPod, ns, attackedImage))
		c.WaitReady(t, ns, "app=web", 1)
	}
}

// attackAll does each attack in one of the targets, in turn, and checks that
// exactly the expected alerts came, each once, with the right place, and that
// nothing else above Low happened in the cluster's pods or among its programs.
func attackAll(t *testing.T, p *product) {
	t.Helper()
	before, err := p.alerts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pods, err := p.c.Pods(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	// What people do all day raises nothing above Low, whoever the container runs as.
	for _, argv := range everyday {
		for _, container := range []string{"main", "user"} {
			if _, err := p.c.ExecErr(t.Context(), targets[0].namespace, targets[0].pod, container, argv...); err != nil {
				t.Error(err)
			}
		}
	}
	want := map[string]int{}
	for i, a := range attacks {
		g := targets[i%len(targets)]
		// A deed may well fail; that it was tried is what counts.
		out, err := p.c.ExecErr(t.Context(), g.namespace, g.pod, g.container, a.argv...)
		if strings.Contains(out, "actor:") || err != nil && strings.Contains(err.Error(), "actor:") {
			t.Errorf("%s in %s: %s %v", a.name, g, out, err)
		}
		for _, r := range a.rules {
			want[r+" in "+p.c.Node+" "+g.String()]++
		}
	}
	known := map[string]bool{}
	for _, r := range before {
		known[r.ID] = true
	}
	var got map[string]int
	p.c.Eventually(t, "the alerts of all attacks", func() error {
		all, err := p.alerts(t.Context())
		if err != nil {
			return err
		}
		got = map[string]int{}
		for _, r := range all {
			if !known[r.ID] && r.severe() && p.ours(r) && r.rule() != tickRule {
				got[r.rule()+" in "+p.where(r, pods)]++
			}
		}
		var missing []string
		for w, n := range want {
			if got[w] < n {
				missing = append(missing, w)
			}
		}
		slices.Sort(missing)
		if len(missing) > 0 {
			return fmt.Errorf("missing:\n  %s\nlost by the agent: %s\ngot:\n  %s", strings.Join(missing, "\n  "), p.losses(t.Context()), strings.Join(slices.Sorted(maps.Keys(got)), "\n  "))
		}
		return nil
	})
	for g, n := range got {
		if n != want[g] {
			t.Errorf("%d alerts %s, want %d", n, g, want[g])
		}
	}
	t.Logf("%d attacks in %d containers: %d alerts, each once and in its place", len(attacks), len(targets), len(want))
}

// losses are the agent's counters of what it could not see or keep, those that
// are not zero.
func (p *product) losses(ctx context.Context) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.metrics, nil)
	if err != nil {
		return err.Error()
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	var found []string
	sc := bufio.NewScanner(resp.Body)
	for sc.Scan() {
		if name, _, _ := strings.Cut(sc.Text(), " "); lossMetric.MatchString(name) && !strings.HasSuffix(sc.Text(), " 0") {
			found = append(found, sc.Text())
		}
	}
	return strings.Join(found, "; ")
}

var lossMetric = regexp.MustCompile(`^procession_.*(lost|dropped|missed|shed|undecided|suppressed)`)

// ours says whether an alert is about a pod or a program of the cluster. Other
// things may happen on this machine meanwhile.
func (p *product) ours(r *record) bool {
	if r.Container.ID != "" || r.Pod.UID != "" {
		return true
	}
	if r.Process == nil {
		return false
	}
	pids := p.c.PIDs()
	for _, a := range r.Process.Ancestors {
		if slices.Contains(pids, a.PID) {
			return true
		}
	}
	return false
}

// tickRule is the tests' own: each tick is an alert, and none stands for several.
const tickRule = "e2e-ticks/tick"

const tickPolicy = `
apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: e2e-ticks}
spec:
  rules:
  - name: tick
    title: A tick of the test's clock
    events: [Exec]
    condition: process.exe == '/usr/bin/actor' && process.cmdline.startsWith('tick ')
    severity: Medium
    messageExpression: process.cmdline
`

const tickerPod = `
apiVersion: v1
kind: Pod
metadata: {name: ticker, namespace: e2e-shop, labels: {app: ticker}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "` + attackedImage + `", imagePullPolicy: Never, command: [actor, tick, "1", 100ms]}
`

// ticks are the numbers that the ticker says it ran, and when.
func ticks(t *testing.T, c *cluster.Cluster) map[int]time.Time {
	t.Helper()
	out, err := c.LogOnNode("e2e-shop", "ticker", "main")
	if err != nil {
		t.Fatal(err)
	}
	ran := map[int]time.Time{}
	for line := range strings.Lines(out) {
		var n int
		var stamp string
		if _, err := fmt.Sscan(line, &n, &stamp); err != nil {
			t.Fatalf("ticker: %v in %q", err, line)
		}
		at, err := time.Parse(time.RFC3339Nano, stamp)
		if err != nil {
			t.Fatal(err)
		}
		ran[n] = at
	}
	return ran
}

// moreTicks waits until the ticker has run n more.
func moreTicks(t *testing.T, c *cluster.Cluster, n int) {
	t.Helper()
	before := len(ticks(t, c))
	c.Eventually(t, fmt.Sprintf("%d more ticks", n), func() error {
		if now := len(ticks(t, c)); now < before+n {
			return fmt.Errorf("%d so far", now-before)
		}
		return nil
	})
}

var tickArg = regexp.MustCompile(`^tick=([0-9]+)$`)

// arrived are the numbers that came as alerts, with how often, and how many
// alerts were named as lost.
func (p *product) arrived(ctx context.Context) (came map[int]int, lost int, err error) {
	all, err := p.alerts(ctx)
	if err != nil {
		return nil, 0, err
	}
	came = map[int]int{}
	for _, r := range all {
		if r.Kind == "Loss" {
			n, err := strconv.Atoi(r.Lost)
			if err != nil {
				return nil, 0, fmt.Errorf("loss: %w in %.200s", err, r.raw)
			}
			lost += n
		}
		if r.rule() != tickRule || r.Process == nil {
			continue
		}
		for _, a := range r.Process.Args {
			if m := tickArg.FindStringSubmatch(a); m != nil {
				n, err := strconv.Atoi(m[1])
				if err != nil {
					return nil, 0, err
				}
				came[n]++
			}
		}
	}
	return came, lost, nil
}

// A span is a time in which the agent did not run: what happened then was not
// seen, which is known, not hidden.
type span struct{ from, to time.Time }

// checkTicks waits until each of the ticker's numbers so far came exactly once,
// but for as many as were named as lost and for those of the blind times.
func checkTicks(t *testing.T, p *product) {
	t.Helper()
	ran := ticks(t, p.c)
	if len(ran) == 0 {
		t.Fatal("the ticker did nothing")
	}
	excused := func(at time.Time) bool {
		return slices.ContainsFunc(p.blind, func(s span) bool { return !at.Before(s.from) && !at.After(s.to) })
	}
	p.c.Eventually(t, "an alert for each tick", func() error {
		came, lost, err := p.arrived(t.Context())
		if err != nil {
			return err
		}
		var missing []int
		for n, at := range ran {
			if came[n] == 0 && !excused(at) {
				missing = append(missing, n)
			}
		}
		if len(missing) > lost {
			slices.Sort(missing)
			return fmt.Errorf("%d of %d ticks have no alert, and %d were named as lost: %v", len(missing), len(ran), lost, missing)
		}
		return nil
	})
	came, lost, err := p.arrived(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for n, times := range came {
		if times != 1 {
			t.Errorf("tick %d came %d times", n, times)
		}
	}
	unseen := 0
	for n := range ran {
		if came[n] == 0 {
			unseen++
		}
	}
	for _, s := range p.blind {
		checkGap(t, s, ran, came, lost)
	}
	t.Logf("%d ticks ran; %d have no alert; %d alerts were named as lost", len(ran), unseen, lost)
}

// checkGap looks at the ticks that were not seen in a blind time: an agent that is
// dead misses what comes one after the other, and nothing before or after.
func checkGap(t *testing.T, s span, ran map[int]time.Time, came map[int]int, lost int) {
	t.Helper()
	var missing []int
	for n, at := range ran {
		if came[n] == 0 && !at.Before(s.from) && !at.After(s.to) {
			missing = append(missing, n)
		}
	}
	slices.Sort(missing)
	if len(missing) == 0 {
		return
	}
	if holes := missing[len(missing)-1] - missing[0] + 1 - len(missing); holes > lost {
		t.Errorf("the agent was dead once between %v and %v, and the ticks that were not seen have %d others between them: %v", s.from, s.to, holes, missing)
	}
}

// pod is the one ready pod of a selector.
func (p *product) pod(t *testing.T, selector string) cluster.Pod {
	t.Helper()
	return p.c.WaitReady(t, p.namespace, selector, 1)[0]
}

// waitReplaced waits until the pods of a selector are another generation than
// before, and ready.
func (p *product) waitReplaced(t *testing.T, selector string, before cluster.Pod) {
	t.Helper()
	p.c.Eventually(t, "a new pod "+selector, func() error {
		pods, err := p.c.Pods(t.Context(), p.namespace, selector)
		if err != nil {
			return err
		}
		if len(pods) != 1 || !pods[0].Ready || pods[0].UID == before.UID && pods[0].Restarts == before.Restarts {
			return errors.New("not yet")
		}
		return nil
	})
}

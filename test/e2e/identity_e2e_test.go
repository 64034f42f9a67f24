//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/testenv"
	"github.com/procession-dev/procession/test/e2e/cluster"
)

// In this test every program says itself, in its argument, where it runs:
//
//	id-proof-RUN|NAMESPACE|POD|CONTAINER|UID|WHAT
//
// as Kubernetes told the container by its environment. Whatever Procession says
// must be the same.
var (
	proofMark   = fmt.Sprintf("id-proof-%d|", os.Getpid())
	proofPolicy = strings.ReplaceAll(`apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: proof}
spec:
  rules:
    - name: any
      events: [Exec]
      condition: process.args.size() == 2 && process.args[1].startsWith('id-proof|')
      severity: High
      message: proof
    - name: in-a
      events: [Exec]
      condition: process.args.size() == 2 && process.args[1].startsWith('id-proof|') && pod.namespace == 'id-a'
      severity: Low
      message: proof in a
`, "id-proof|", proofMark)
)

const proofAccess = `
apiVersion: v1
kind: Namespace
metadata: {name: id-a}
---
apiVersion: v1
kind: Namespace
metadata: {name: id-b}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader, namespace: id-a}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: id-proof-pods}
rules: [{apiGroups: [""], resources: [nodes/pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: id-proof-pods}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: id-proof-pods}
subjects: [{kind: ServiceAccount, name: reader, namespace: id-a}]
`

// proofContainer is a container that runs so many programs at once, two more
// after a while, and then ends or waits.
func proofContainer(name string, n int, waits bool, more string) string {
	end := ""
	if waits {
		end = "; exec sleep 100000"
	}
	script := fmt.Sprintf(`i=0; while [ $i -lt %d ]; do [ $i -ne %d ] || sleep 3; /bin/true "%s$NS|$POD|%s|$PUID|$i"; i=$((i+1)); done%s`, n, n-2, proofMark, name, end)
	return fmt.Sprintf(`  - name: %s
    image: e2e.local/proof:1
    imagePullPolicy: Never
    command: [sh, -c, %q]
    env:
    - {name: NS, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: PUID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
%s`, name, script, more)
}

func proofPod(namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s, labels: {proof: pod}}\nspec:\n  terminationGracePeriodSeconds: 1\n%s---\n", name, namespace, spec)
}

// proofPods are fifty pods, and how many programs they run in all.
func proofPods() (manifests, static string, execs int) {
	var b strings.Builder
	for _, ns := range []string{"id-a", "id-b"} { // the same names in both
		for i := range 10 {
			more := ""
			name := fmt.Sprintf("web-%d", i)
			if i < 3 {
				tag := func(what string) string { return fmt.Sprintf("[/bin/true, %q]", proofMark+ns+"|"+name+"|main|-|"+what) }
				more = fmt.Sprintf("    readinessProbe: {exec: {command: %s}, periodSeconds: 1}\n    lifecycle: {postStart: {exec: {command: %s}}}\n",
					tag("probe"), tag("hook"))
			}
			b.WriteString(proofPod(ns, name, "  containers:\n"+proofContainer("main", 12, true, more)))
			execs += 12
		}
	}
	for i := range 10 {
		b.WriteString(proofPod("id-a", fmt.Sprintf("init-%d", i), "  initContainers:\n"+proofContainer("setup", 3, false, "")+"  containers:\n"+proofContainer("main", 6, true, "")))
		execs += 9
	}
	for i := range 5 {
		b.WriteString(proofPod("id-b", fmt.Sprintf("sidecar-%d", i), "  initContainers:\n"+proofContainer("proxy", 5, true, "    restartPolicy: Always\n")+"  containers:\n"+proofContainer("main", 5, true, "")))
		execs += 10
	}
	for i := range 5 {
		fmt.Fprintf(&b, "apiVersion: batch/v1\nkind: Job\nmetadata: {name: job-%d, namespace: id-a}\nspec:\n  template:\n    metadata: {labels: {proof: job}}\n    spec:\n      restartPolicy: Never\n      containers:\n%s---\n",
			i, indent(proofContainer("main", 8, false, ""), "    "))
		execs += 8
	}
	fmt.Fprintf(&b, "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: shop, namespace: id-b}\nspec:\n  replicas: 8\n  selector: {matchLabels: {proof: deployment}}\n  template:\n    metadata: {labels: {proof: deployment}}\n    spec:\n      terminationGracePeriodSeconds: 1\n      containers:\n%s---\n",
		indent(proofContainer("main", 8, true, ""), "    "))
	b.WriteString(proofPod("id-a", "on-host", "  hostPID: true\n  hostNetwork: true\n  containers:\n"+proofContainer("main", 8, true, "")))
	static = strings.TrimSuffix(proofPod("id-a", fmt.Sprintf("static-%d", os.Getpid()), "  containers:\n"+proofContainer("main", 8, true, "")), "---\n")
	return b.String(), static, execs + 64 + 8 + 8
}

func indent(s, by string) string {
	return by + strings.ReplaceAll(strings.TrimSuffix(s, "\n"), "\n", "\n"+by) + "\n"
}

// A proofLine is what alerts and amendments say.
type proofLine struct {
	ID, Kind, Rule, Amends, PlaceReason string
	Time                                time.Time
	Late                                bool
	Process                             struct {
		Args   []string
		Origin string
	}
	Container struct{ ID, Name string }
	Pod       struct{ UID, Namespace, Name, OwnerKind, OwnerName string }
	Coverage  json.RawMessage
}

// proofAgent runs a collector and an agent on this machine, which asks the
// cluster's kubelet, and returns how to read what was alerted.
func proofAgent(t *testing.T, c *cluster.Cluster) (read func() []proofLine) {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir+"/", "./cmd/agent", "./cmd/collector")
	build.Dir, build.Env = c.Root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	token := strings.TrimSpace(c.Do(t, "create", "token", "reader", "-n", "id-a", "--duration=1h"))
	for name, text := range map[string]string{"token": token, "policies/proof.yaml": proofPolicy} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(dir, name), args...)
		cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd
	}
	file, ready := filepath.Join(dir, "alerts.ndjson"), filepath.Join(dir, "ready")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := free.Addr().String()
	free.Close()
	begin := func(cmd *exec.Cmd) {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			if err := cmd.Wait(); err != nil {
				t.Errorf("%s: %v", cmd.Path, err)
			}
		})
	}
	begin(run("collector", "serve", "--state", filepath.Join(dir, "c"), "--listen", listen, "--ndjson", file, "--ready-file", ready))
	c.Eventually(t, "the collector is ready", func() error { _, err := os.Stat(ready); return err })
	if err := run("collector", "issue", "--state", filepath.Join(dir, "c"), "--node", c.Node, "--out", filepath.Join(dir, "tls")).Run(); err != nil {
		t.Fatal(err)
	}
	agent := run("agent", "run", "--state", filepath.Join(dir, "a"), "--policies", filepath.Join(dir, "policies"), "--node", c.Node,
		"--collector", listen, "--tls", filepath.Join(dir, "tls"), "--kubelet", "https://"+c.NodeIP+":10250",
		"--coverage", "10s", "--kubelet-ca", filepath.Join(c.Dir, "pki", "ca.crt"), "--kubelet-token", filepath.Join(dir, "token"))
	said, err := os.Create(filepath.Join(dir, "agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	agent.Stderr = said
	t.Cleanup(func() {
		b, _ := os.ReadFile(said.Name())
		t.Logf("the agent said:\n%s", b)
		said.Close()
	})
	begin(agent)
	c.Eventually(t, "the agent hears", func() error {
		if b, err := os.ReadFile(said.Name()); err != nil || !bytes.Contains(b, []byte("msg=listening")) {
			return fmt.Errorf("not listening yet (%v)", err)
		}
		return nil
	})
	return func() (lines []proofLine) {
		b, err := os.ReadFile(file)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		sc := bufio.NewScanner(bytes.NewReader(b[:bytes.LastIndexByte(b, '\n')+1]))
		sc.Buffer(nil, 16<<20)
		for sc.Scan() {
			var l proofLine
			if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
				t.Fatalf("%v in %.200s", err, sc.Bytes())
			}
			lines = append(lines, l)
		}
		return lines
	}
}

// watchKubelet notes when the kubelet's own list first has each container's id:
// nobody who asks the kubelet can know its name before.
func watchKubelet(t *testing.T, c *cluster.Cluster) (listed func() map[string]time.Time) {
	t.Helper()
	ca, err := os.ReadFile(filepath.Join(c.Dir, "pki", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, Timeout: 10 * time.Second}
	token := strings.TrimSpace(c.Do(t, "create", "token", "reader", "-n", "id-a", "--duration=1h"))
	first := map[string]time.Time{}
	look := func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.NodeIP+":10250/pods", nil)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		type status struct{ ContainerID string }
		var list struct {
			Items []struct {
				Status struct{ ContainerStatuses, InitContainerStatuses []status }
			}
		}
		if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
			return err
		}
		now := time.Now()
		for _, p := range list.Items {
			for _, s := range append(p.Status.ContainerStatuses, p.Status.InitContainerStatuses...) {
				_, id, _ := strings.Cut(s.ContainerID, "://")
				if _, known := first[id]; !known && id != "" {
					first[id] = now
				}
			}
		}
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := look(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	stop := func() { cancel(); <-done }
	t.Cleanup(stop)
	return func() map[string]time.Time { stop(); return first }
}

// A claim is one program: what it said of itself, and what Procession said.
type claim struct {
	namespace, pod, container, uid, what string

	alert        proofLine
	podAfter     time.Duration // 0: at once
	nameAfter    time.Duration
	podKnown     bool
	nameKnown    bool
	wrong        string
	amendedTimes int
}

// claims takes together each alert of the rule and its amendments.
func claims(lines []proofLine, rule string) map[string]*claim {
	byID := map[string]*claim{}
	for _, l := range lines {
		switch {
		case l.Kind == "Exec" && strings.HasSuffix(l.Rule, "/"+rule) && len(l.Process.Args) == 2:
			f := strings.Split(l.Process.Args[1], "|")
			if len(f) != 6 || f[0]+"|" != proofMark {
				continue
			}
			cl := &claim{namespace: f[1], pod: f[2], container: f[3], uid: f[4], what: f[5], alert: l}
			cl.take(l, 0)
			byID[l.ID] = cl
		case l.Kind == "Amendment" && byID[l.Amends] != nil:
			cl := byID[l.Amends]
			cl.amendedTimes++
			cl.take(l, l.Time.Sub(cl.alert.Time))
		}
	}
	return byID
}

// take compares what a line says with the claim.
func (cl *claim) take(l proofLine, after time.Duration) {
	if l.Pod.Name != "" {
		if got, want := l.Pod.Namespace+"/"+l.Pod.Name, cl.namespace+"/"+cl.pod; got != want {
			cl.wrong = fmt.Sprintf("pod %s, is %s", got, want)
		}
		if !cl.podKnown {
			cl.podKnown, cl.podAfter = true, after
		}
	}
	if l.Pod.UID != "" && cl.uid != "-" && l.Pod.UID != cl.uid {
		cl.wrong = fmt.Sprintf("uid %s, is %s", l.Pod.UID, cl.uid)
	}
	if l.Container.Name != "" {
		if l.Container.Name != cl.container {
			cl.wrong = fmt.Sprintf("container %s, is %s", l.Container.Name, cl.container)
		}
		if !cl.nameKnown {
			cl.nameKnown, cl.nameAfter = true, after
		}
	}
}

// TestIdentity: of hundreds of programs in fifty pods that start meanwhile, each
// is put into the right pod and container, at once or soon after.
func TestIdentity(t *testing.T) {
	testenv.Root(t)
	c := cluster.Up(t)
	if err := c.BuildImage(t.Context(), cluster.Image{Name: "e2e.local/proof:1", Busybox: true}); err != nil {
		t.Fatal(err)
	}
	c.Apply(t, proofAccess)
	read := proofAgent(t, c)
	listed := watchKubelet(t, c)
	manifests, static, execs := proofPods()
	staticFile := filepath.Join(c.Dir, "etc", "static", "id-proof.yaml")
	if err := os.WriteFile(staticFile, []byte(static), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(staticFile) })
	c.Apply(t, manifests)
	for _, ns := range []string{"id-a", "id-b"} {
		c.WaitReady(t, ns, "proof=pod", map[string]int{"id-a": 22, "id-b": 15}[ns])
	}
	c.WaitReady(t, "id-b", "proof=deployment", 8)
	for i := range 5 {
		for _, ns := range []string{"id-a", "id-b"} {
			pod := fmt.Sprintf("web-%d", i)
			c.Exec(t, ns, pod, "main", "/bin/true", proofMark+ns+"|"+pod+"|main|-|exec")
		}
	}
	execs += 10
	var got map[string]*claim
	c.Eventually(t, "every program is alerted, and its pod and container are known", func() error {
		got = claims(read(), "any")
		numbered, open := 0, 0
		for _, cl := range got {
			if cl.what != "probe" && cl.what != "hook" {
				numbered++
			}
			if !cl.podKnown || !cl.nameKnown {
				open++
			}
		}
		if numbered < execs || open > 0 {
			return fmt.Errorf("%d of %d programs alerted, %d without a name; not alerted: %v; coverage: %s", numbered, execs, open, gaps(got), coverage(read()))
		}
		return nil
	})
	checkClaims(t, got, listed())
	late := 0
	for _, cl := range claims(read(), "in-a") {
		if cl.namespace != "id-a" {
			t.Errorf("a rule of id-a alerted of %s/%s", cl.namespace, cl.pod)
		}
		if cl.alert.Late {
			late++
		}
	}
	t.Logf("alerts of the rule for one namespace that came late: %d", late)
}

// gaps are the programs that should be there, for others of the same container
// are, with higher numbers.
func gaps(got map[string]*claim) (missing []string) {
	highest := map[string]int{}
	seen := map[string]bool{}
	for _, cl := range got {
		n, err := strconv.Atoi(cl.what)
		if err != nil {
			continue
		}
		where := strings.Join([]string{cl.namespace, cl.pod, cl.container}, "/")
		highest[where] = max(highest[where], n)
		seen[where+"/"+cl.what] = true
	}
	for where, n := range highest {
		for i := range n {
			if tag := fmt.Sprintf("%s/%d", where, i); !seen[tag] {
				missing = append(missing, tag)
			}
		}
	}
	return missing
}

// coverage is what the agent says it saw and did not.
func coverage(lines []proofLine) string {
	var b strings.Builder
	for _, l := range lines {
		if l.Kind == "Coverage" {
			fmt.Fprintf(&b, "%s\n", l.Coverage)
		}
	}
	return b.String()
}

func checkClaims(t *testing.T, got map[string]*claim, listed map[string]time.Time) {
	t.Helper()
	var pod, name, kubelet, ours []time.Duration
	origins := map[string]string{"probe": "probe", "hook": "lifecycleHook", "exec": "execSession"}
	seen := map[string]map[string]int{}
	pods := map[string]bool{}
	for id, cl := range got {
		if cl.wrong != "" {
			t.Errorf("%s: %s", id, cl.wrong)
		}
		pods[cl.namespace+"/"+cl.pod] = true
		pod, name = append(pod, cl.podAfter), append(name, cl.nameAfter)
		if at, ok := listed[cl.alert.Container.ID]; ok && cl.nameAfter > 0 {
			behind := max(0, at.Sub(cl.alert.Time))
			kubelet, ours = append(kubelet, behind), append(ours, max(0, cl.nameAfter-behind))
		}
		want := origins[cl.what]
		if want == "" {
			want = "child"
		}
		if seen[want] == nil {
			seen[want] = map[string]int{}
		}
		seen[want][cl.alert.Process.Origin]++
		if o := cl.alert.Process.Origin; o != want && !(o == "entered" && want != "child") {
			t.Errorf("%s (%s in %s/%s): origin %q, want %q", id, cl.what, cl.namespace, cl.pod, o, want)
		}
		if cl.alert.Pod.OwnerKind == "ReplicaSet" || strings.HasPrefix(cl.pod, "shop-") && cl.alert.Pod.OwnerKind != "" && cl.alert.Pod.OwnerName != "shop" {
			t.Errorf("%s: owner %s %s", id, cl.alert.Pod.OwnerKind, cl.alert.Pod.OwnerName)
		}
	}
	if len(pods) != 50 {
		t.Errorf("%d pods, want 50", len(pods))
	}
	row := func(what string, ds []time.Duration) {
		slices.Sort(ds)
		atOnce, in2 := 0, 0
		var later []time.Duration
		for _, d := range ds {
			if d == 0 {
				atOnce++
			} else {
				later = append(later, d)
			}
			if d <= 2*time.Second {
				in2++
			}
		}
		p := func(q int) time.Duration {
			if len(later) == 0 {
				return 0
			}
			return later[min(len(later)-1, len(later)*q/100)].Round(time.Millisecond)
		}
		n := float64(len(ds))
		t.Logf("%-15s of %d: at once %.1f %%, amended %.1f %% (p50 %v, p99 %v, max %v), within 2 s %.1f %%",
			what, len(ds), 100*float64(atOnce)/n, 100*float64(len(later))/n, p(50), p(99), p(100), 100*float64(in2)/n)
	}
	row("pod", pod)
	row("container name", name)
	row("  kubelet", kubelet)
	row("  and we", ours)
	for _, want := range slices.Sorted(maps.Keys(seen)) {
		t.Logf("origin %s: told at once as %v", want, seen[want])
	}
}

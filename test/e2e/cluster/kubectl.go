package cluster

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Env is the environment in which kubectl and helm speak to this cluster.
func (c *Cluster) Env() []string {
	return append(os.Environ(), "KUBECONFIG="+c.Kubeconfig, "PATH="+c.Bin+":"+os.Getenv("PATH"),
		"KUBECACHEDIR="+filepath.Join(c.Dir, "kubectl"), "HELM_CACHE_HOME="+filepath.Join(c.Dir, "helm"),
		"HELM_CONFIG_HOME="+filepath.Join(c.Dir, "helm"), "HELM_DATA_HOME="+filepath.Join(c.Dir, "helm"),
		"CONTAINERD_ADDRESS="+c.socket(), "CONTAINERD_NAMESPACE=k8s.io")
}

// Command is a program with the cluster's environment.
func (c *Cluster) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if p := filepath.Join(c.Bin, name); name == filepath.Base(name) {
		if _, err := os.Stat(p); err == nil {
			name = p
		}
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = c.Env()
	return cmd
}

// Output runs a command and gives its standard output; the error has what it
// wrote to its standard error.
func Output(cmd *exec.Cmd) (string, error) {
	var diag bytes.Buffer
	cmd.Stderr = &diag
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", filepath.Base(cmd.Path), strings.Join(cmd.Args[1:], " "), err, tail(diag.Bytes(), 2000))
	}
	return string(out), nil
}

// Kubectl runs kubectl as the cluster's administrator.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return Output(c.Command(ctx, "kubectl", args...))
}

// Helm runs helm 3 as the cluster's administrator.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return Output(c.Command(ctx, "helm", args...))
}

// Do is Kubectl for tests: the test ends if it fails.
func (c *Cluster) Do(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Apply applies manifests, and takes the objects away when the test is over.
func (c *Cluster) Apply(t testing.TB, manifests string) {
	t.Helper()
	if err := c.ApplyErr(t.Context(), manifests); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.KeepEvidence(t)
		cmd := c.Command(context.WithoutCancel(t.Context()), "kubectl", "delete", "--ignore-not-found", "--wait=true", "--grace-period=1", "-f", "-")
		cmd.Stdin = strings.NewReader(manifests)
		if _, err := Output(cmd); err != nil {
			t.Errorf("take the objects away: %v", err)
		}
	})
}

// ApplyErr applies manifests; they stay.
func (c *Cluster) ApplyErr(ctx context.Context, manifests string) error {
	cmd := c.Command(ctx, "kubectl", "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifests)
	_, err := Output(cmd)
	return err
}

// Eventually asks until the answer is nil. The test ends with the last answer
// if that takes longer than some minutes, which is for a loaded machine.
func (c *Cluster) Eventually(t testing.TB, what string, ask func() error) {
	t.Helper()
	if err := poll(t.Context(), patience, ask); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// A Pod is what the API server says of one.
type Pod struct {
	Namespace, Name, UID, Node string
	Ready                      bool
	Restarts                   int
	// ContainerIDs by container name, without the runtime's prefix.
	ContainerIDs map[string]string
}

// Pods lists the pods of a namespace that have the labels of a selector; an
// empty namespace means all, an empty selector any.
func (c *Cluster) Pods(ctx context.Context, namespace, selector string) ([]Pod, error) {
	args := []string{"get", "pods", "-o", "json"}
	if namespace == "" {
		args = append(args, "--all-namespaces")
	} else {
		args = append(args, "--namespace", namespace)
	}
	if selector != "" {
		args = append(args, "--selector", selector)
	}
	out, err := c.Kubectl(ctx, args...)
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct{ Namespace, Name, UID, DeletionTimestamp string }
			Spec     struct{ NodeName string }
			Status   struct {
				Conditions        []struct{ Type, Status string }
				ContainerStatuses []struct {
					Name, ContainerID string
					RestartCount      int
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("pods: %w", err)
	}
	pods := make([]Pod, 0, len(list.Items))
	for _, it := range list.Items {
		p := Pod{Namespace: it.Metadata.Namespace, Name: it.Metadata.Name, UID: it.Metadata.UID, Node: it.Spec.NodeName, ContainerIDs: map[string]string{}}
		for _, cond := range it.Status.Conditions {
			p.Ready = p.Ready || cond.Type == "Ready" && cond.Status == "True" && it.Metadata.DeletionTimestamp == ""
		}
		for _, cs := range it.Status.ContainerStatuses {
			_, id, _ := strings.Cut(cs.ContainerID, "://")
			p.ContainerIDs[cs.Name] = id
			p.Restarts += cs.RestartCount
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// WaitReady waits until exactly n pods match and all are ready, and gives them.
func (c *Cluster) WaitReady(t testing.TB, namespace, selector string, n int) []Pod {
	t.Helper()
	var pods []Pod
	c.Eventually(t, fmt.Sprintf("%d ready pods %s %s", n, namespace, selector), func() (err error) {
		if pods, err = c.Pods(t.Context(), namespace, selector); err != nil {
			return err
		}
		ready := 0
		for _, p := range pods {
			if p.Ready {
				ready++
			}
		}
		if ready != n || len(pods) != n {
			return fmt.Errorf("%d of %d pods are ready", ready, len(pods))
		}
		return nil
	})
	return pods
}

// Exec runs a command in a container (the first one if it is named "") and
// gives its output.
func (c *Cluster) Exec(t testing.TB, namespace, pod, container string, argv ...string) string {
	t.Helper()
	out, err := c.ExecErr(t.Context(), namespace, pod, container, argv...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// ExecErr is Exec for commands that may fail.
func (c *Cluster) ExecErr(ctx context.Context, namespace, pod, container string, argv ...string) (string, error) {
	args := []string{"exec", "--namespace", namespace, pod}
	if container != "" {
		args = append(args, "--container", container)
	}
	return c.Kubectl(ctx, append(append(args, "--"), argv...)...)
}

// Logs is what a container wrote, with what its predecessor wrote before it.
func (c *Cluster) Logs(ctx context.Context, namespace, pod, container string) (string, error) {
	args := []string{"logs", "--namespace", namespace, pod}
	if container != "" {
		args = append(args, "--container", container)
	}
	before, _ := c.Kubectl(ctx, append(args, "--previous")...) // fails if there was none
	now, err := c.Kubectl(ctx, args...)
	return before + now, err
}

func (c *Cluster) ready(ctx context.Context) error {
	out, err := c.Kubectl(ctx, "get", "node", c.Node, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
	if err == nil && out != "True" {
		err = fmt.Errorf("node is not ready: %q", out)
	}
	return err
}

// StopProgram ends one program of the cluster, as a crash or an upgrade would;
// the pods go on. StartProgram, or the end of the test, starts it again.
func (c *Cluster) StopProgram(t testing.TB, program string) {
	t.Helper()
	if err := c.stop(t.Context(), stopGrace, program); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, ok := c.running(program); ok {
			return
		}
		if err := c.Start(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("start %s again: %v", program, err)
		}
	})
}

// StartProgram starts a stopped program and waits until the node is ready.
func (c *Cluster) StartProgram(t testing.TB, program string) {
	t.Helper()
	if err := c.Run(program); err != nil {
		t.Fatal(err)
	}
	if err := c.waitFor(t.Context(), program, func() error { return c.ready(t.Context()) }); err != nil {
		t.Fatal(err)
	}
}

// keptFailures is of how many failed tests the evidence stays.
const keptFailures = 5

// KeepEvidence writes, if the test has failed, what the API server knows and the
// pods' logs beside the programs' logs, and says where; once, before anything is
// taken away.
func (c *Cluster) KeepEvidence(t testing.TB) {
	if !t.Failed() || c.evidence != "" {
		return
	}
	all := filepath.Join(c.Dir, "failures")
	c.evidence = filepath.Join(all, time.Now().Format("20060102-150405-")+strings.ReplaceAll(t.Name(), "/", "_"))
	if old, err := os.ReadDir(all); err == nil {
		for i := 0; i <= len(old)-keptFailures; i++ { // sorted by name, so by time
			_ = os.RemoveAll(filepath.Join(all, old[i].Name()))
		}
	}
	if err := os.MkdirAll(c.evidence, 0o755); err != nil {
		t.Log(err)
		return
	}
	t.Logf("what the cluster looked like: %s", c.evidence)
	c.writeEvidence(context.WithoutCancel(t.Context()), c.evidence)
}

func (c *Cluster) writeEvidence(ctx context.Context, dir string) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	keep := func(name, out string, err error) {
		if err != nil {
			out += "\n" + err.Error() + "\n"
		}
		_ = os.WriteFile(filepath.Join(dir, name), []byte(out), 0o644)
	}
	for name, args := range map[string][]string{
		"pods.txt":     {"get", "pods", "-A", "-o", "wide"},
		"describe.txt": {"describe", "pods", "-A"},
		"events.txt":   {"get", "events", "-A", "--sort-by=.lastTimestamp"},
	} {
		out, err := c.Kubectl(ctx, append(args, "--request-timeout=10s")...)
		keep(name, out, err)
	}
	pods, err := c.Pods(ctx, "", "")
	if err != nil {
		keep("pods.json.txt", "", err)
	}
	for _, p := range pods {
		for container := range p.ContainerIDs {
			out, err := c.Logs(ctx, p.Namespace, p.Name, container)
			keep(p.Namespace+"_"+p.Name+"_"+container+".log", out, err)
		}
	}
	logs, _ := filepath.Glob(filepath.Join(c.Dir, "log", "*.log"))
	for _, l := range logs {
		if err := os.Link(l, filepath.Join(dir, filepath.Base(l))); err != nil && !errors.Is(err, os.ErrExist) {
			keep(filepath.Base(l)+".txt", "", err)
		}
	}
}

// nodeClient trusts what the cluster's authority signed, as a pod does that has
// the cluster's ca.crt.
func (c *Cluster) nodeClient() (*http.Client, error) {
	b, err := os.ReadFile(filepath.Join(c.Dir, "pki", "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(b) {
		return nil, errors.New("ca.crt holds no certificate")
	}
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}, nil
}

// PIDs are the processes of the cluster's programs.
func (c *Cluster) PIDs() []int {
	var pids []int
	for _, n := range c.Running() {
		if id, ok := c.running(n); ok {
			pids = append(pids, id.pid)
		}
	}
	return pids
}

// LogOnNode is what a container of a pod wrote, all its lives in turn, from the
// kubelet's files: also while API server and kubelet are stopped. A pod with one
// container needs no name of it; of pods with the same name, which came one after
// the other, the kubelet keeps the latest.
func (c *Cluster) LogOnNode(namespace, pod, container string) (string, error) {
	if container == "" {
		container = "*"
	}
	files, err := filepath.Glob(filepath.Join(c.Dir, "podlogs", namespace+"_"+pod+"_*", container, "*.log"))
	if err != nil {
		return "", err
	}
	if len(files) == 0 {
		return "", fmt.Errorf("the node has no log of %s/%s %s", namespace, pod, container)
	}
	// N.log of the N-th life.
	slices.SortFunc(files, func(a, b string) int {
		return cmp.Or(cmp.Compare(filepath.Dir(a), filepath.Dir(b)), cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	var all strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		appendCRILog(&all, string(b))
	}
	return all.String(), nil
}

// appendCRILog takes the text out of lines "TIME STREAM P|F TEXT", of which P
// marks one that goes on. A last line that is not whole yet is left out.
func appendCRILog(dst *strings.Builder, log string) {
	for line := range strings.Lines(log) {
		f := strings.SplitN(line, " ", 4)
		if len(f) < 4 || !strings.HasSuffix(line, "\n") {
			continue
		}
		text := f[3]
		if f[2] == "P" {
			text = strings.TrimSuffix(text, "\n")
		}
		dst.WriteString(text)
	}
}

// KillContainer ends a container's processes with SIGKILL, as running out of
// memory would. The kubelet starts it again.
func (c *Cluster) KillContainer(ctx context.Context, pod Pod, container string) error {
	id := pod.ContainerIDs[container]
	if id == "" {
		return fmt.Errorf("pod %s/%s has no container %q that runs", pod.Namespace, pod.Name, container)
	}
	if out, err := c.ctr(ctx, "tasks", "kill", "--signal", "SIGKILL", id); err != nil {
		return fmt.Errorf("kill container %s: %w: %s", container, err, out)
	}
	return nil
}

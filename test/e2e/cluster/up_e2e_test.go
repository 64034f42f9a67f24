//go:build e2e

package cluster

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/testenv"
)

// footprint is what a cluster might leave on a machine.
func footprint(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, k := range keptSysctls {
		b, err := os.ReadFile("/proc/sys/" + k)
		if err == nil {
			found = append(found, k+" = "+strings.TrimSpace(string(b)))
		}
	}
	for _, m := range mounts() {
		// Other tests of this machine mount as well; a cluster's mounts are these.
		if strings.Contains(m.at, "/cluster/") || strings.Contains(m.at, "/netns/") {
			found = append(found, m.kind+" at "+m.at)
		}
	}
	for _, root := range cgroupRoots() {
		for _, top := range []string{"kubepods", "k8s.io"} {
			if _, err := os.Stat(filepath.Join(root, top)); err == nil {
				found = append(found, filepath.Join(root, top))
			}
		}
	}
	for _, d := range append(slices.Clone(strayDirs), "/var/run/kubernetes", "/var/log/pods", "/etc/cni") {
		if es, err := os.ReadDir(d); err == nil {
			found = append(found, fmt.Sprintf("%s with %d entries", d, len(es)))
		}
	}
	for _, args := range [][]string{{"nft", "list", "tables"}, {"ip", "-o", "address"}, {"ip", "-o", "link"}, {"ip", "route", "show", "table", "all"}, {"ip", "rule"}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		found = append(found, strings.Join(args, " ")+"\n"+string(out))
	}
	return found
}

const shellPod = `
apiVersion: v1
kind: Pod
metadata: {name: shell, namespace: default, labels: {app: shell}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "e2e.local/shell:1", imagePullPolicy: Never, command: [sleep, "100000"]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "e2e.local/shell:1", imagePullPolicy: Never, command: [httpd, -f, -p, "8080", -h, /etc], ports: [{containerPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`

// TestCluster is the harness at work: pods run and reach each other, the
// kubelet asks who may what, the API server may go and come back, and when it is
// over the machine is as it was.
func TestCluster(t *testing.T) {
	testenv.Root(t)
	before := footprint(t)
	fresh := false
	t.Run("up", func(t *testing.T) {
		c, err := Open(t.Context(), t.Output())
		if err != nil {
			t.Fatal(err)
		}
		fresh = len(c.Running()) == 0
		c = Up(t)
		if err := c.BuildImage(t.Context(), Image{Name: "e2e.local/shell:1", Busybox: true}); err != nil {
			t.Fatal(err)
		}
		c.Apply(t, shellPod)
		shell := c.WaitReady(t, "default", "app=shell", 1)[0]
		c.WaitReady(t, "default", "app=web", 1)

		t.Run("a pod has its identity", func(t *testing.T) {
			if shell.Node != c.Node || shell.UID == "" || len(shell.ContainerIDs["main"]) != 64 {
				t.Errorf("pod: %+v", shell)
			}
			if out := c.Exec(t, "default", "shell", "main", "hostname"); out != "shell\n" {
				t.Errorf("hostname in the pod: %q", out)
			}
			if _, err := c.ExecErr(t.Context(), "default", "shell", "", "false"); err == nil {
				t.Error("a failing command gives no error")
			}
		})
		t.Run("pods reach services and the API server, and nothing outside", func(t *testing.T) {
			ip := strings.TrimSpace(c.Do(t, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"))
			c.Eventually(t, "the service's answer", func() error {
				// Not wget: Debian's static busybox crashes when it looks up a service's name.
				out, err := c.ExecErr(t.Context(), "default", "shell", "", "sh", "-c", `printf 'GET /passwd HTTP/1.0\r\n\r\n' | nc -w 3 `+ip+` 80`)
				if err == nil && !strings.Contains(out, "root:") {
					err = fmt.Errorf("got %q", out)
				}
				return err
			})
			out := c.Exec(t, "default", "shell", "", "sh", "-c", "nc -w 3 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT </dev/null && echo connected")
			if out != "connected\n" {
				t.Errorf("the API server's service: %q", out)
			}
			if out, err := c.ExecErr(t.Context(), "default", "shell", "", "nc", "-w", "2", "192.0.2.99", "80"); err == nil {
				t.Errorf("a pod reached the outside: %q", out)
			}
		})
		t.Run("the kubelet asks the API server who may what", func(t *testing.T) { testKubeletAuthorization(t, c) })
		t.Run("the API server goes and comes back", func(t *testing.T) {
			c.StopProgram(t, APIServer)
			if _, err := c.Kubectl(t.Context(), "get", "nodes", "--request-timeout=2s"); err == nil {
				t.Error("a stopped API server answers")
			}
			c.StartProgram(t, APIServer)
			again := c.WaitReady(t, "default", "app=shell", 1)[0]
			if d := cmp.Diff(shell, again); d != "" {
				t.Errorf("the pod changed:\n%s", d)
			}
		})
		t.Run("a second start changes nothing", func(t *testing.T) {
			var ids []identity
			for _, p := range c.Running() {
				id, _ := c.running(p)
				ids = append(ids, id)
			}
			if err := c.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			for i, p := range c.Running() {
				if id, _ := c.running(p); id != ids[i] {
					t.Errorf("%s was started anew", p)
				}
			}
		})
	})
	if !fresh || os.Getenv("PROCESSION_KEEP_CLUSTER") != "" {
		t.Log("the cluster is not this test's: not looking at what it leaves behind")
		return
	}
	if d := cmp.Diff(before, footprint(t)); d != "" {
		t.Errorf("the machine is not as it was (-before +after):\n%s", d)
	}
}

// testKubeletAuthorization asks the kubelet for its pods as three callers.
func testKubeletAuthorization(t *testing.T, c *Cluster) {
	c.Apply(t, `
apiVersion: v1
kind: ServiceAccount
metadata: {name: may, namespace: default}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: maynot, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: e2e-pods-of-node}
rules: [{apiGroups: [""], resources: [nodes/pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-pods-of-node}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: e2e-pods-of-node}
subjects: [{kind: ServiceAccount, name: may, namespace: default}]
`)
	client, err := c.nodeClient()
	if err != nil {
		t.Fatal(err)
	}
	ask := func(path, token string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+c.NodeIP+":10250"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(io.LimitReader(resp.Body, 10<<20))
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	token := func(args ...string) string {
		return strings.TrimSpace(c.Do(t, append([]string{"create", "token"}, args...)...))
	}
	for _, tc := range []struct {
		name, path, token string
		want              int
	}{
		{"nobody", "/pods", "", http.StatusUnauthorized},
		{"a token for somebody else", "/pods", token("may", "--audience", "somebody-else"), http.StatusUnauthorized},
		{"without the permission", "/pods", token("maynot"), http.StatusForbidden},
		{"nodes/pods is not the rest", "/configz", token("may"), http.StatusForbidden},
		{"nodes/pods", "/pods", token("may"), http.StatusOK},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var code int
			var body string
			// The role reaches the API server's authorizer a moment after it is made.
			c.Eventually(t, "the kubelet's answer", func() error {
				if code, body = ask(tc.path, tc.token); code != tc.want {
					return errors.New(http.StatusText(code) + ": " + tail([]byte(body), 200))
				}
				return nil
			})
			if code == http.StatusOK && !strings.Contains(body, `"name":"shell"`) {
				t.Errorf("no pod in %.300s", body)
			}
		})
	}
}

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/testenv"
	"github.com/procession-dev/procession/test/e2e/cluster"
)

// The product without the chart: manifests as small as they can be, and
// certificates from files instead of tokens.
const plainCollector = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-plain}
---
apiVersion: v1
kind: Service
metadata: {name: collector, namespace: e2e-plain}
spec: {clusterIP: 10.96.77.43, selector: {app: collector}, ports: [{port: 7443}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: collector, namespace: e2e-plain}
spec:
  strategy: {type: Recreate} # one at a time has the state
  selector: {matchLabels: {app: collector}}
  template:
    metadata: {labels: {app: collector}}
    spec:
      terminationGracePeriodSeconds: 10
      securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: collector
        image: %[1]s
        imagePullPolicy: Never
        args: [serve, --state, /state/db, --listen, "0.0.0.0:7443", --name, 10.96.77.43, --cluster, e2e, --ndjson, /state/alerts.ndjson, --metrics, "0.0.0.0:9090"]
        securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        readinessProbe: {httpGet: {path: /readyz, port: 9090}, periodSeconds: 1}
        volumeMounts: [{name: state, mountPath: /state}]
      volumes: [{name: state, hostPath: {path: %[2]s}}]
`

const plainAgent = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: e2e-plain}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      hostPID: true
      hostNetwork: true
      terminationGracePeriodSeconds: 10
      securityContext: {seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: agent
        image: %[1]s
        imagePullPolicy: Never
        args: [run, --state, /state, --policies, /policies, --node, $(NODE), --collector, "10.96.77.43:7443", --tls, /tls, --metrics, "127.0.0.1:19099"]
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities: {drop: [ALL], add: [NET_ADMIN, BPF, PERFMON, SYS_PTRACE, DAC_READ_SEARCH]}
        readinessProbe: {httpGet: {host: 127.0.0.1, path: /readyz, port: 19099}, periodSeconds: 1}
        volumeMounts:
        - {name: state, mountPath: /state}
        - {name: tls, mountPath: /tls, readOnly: true}
        - {name: policies, mountPath: /policies, readOnly: true}
      volumes:
      - {name: state, hostPath: {path: %[2]s/agent}}
      - {name: tls, hostPath: {path: %[2]s/collector/tls}}
      - {name: policies, hostPath: {path: %[3]s}}
`

// installPlain installs the product by hand.
func installPlain(t *testing.T, c *cluster.Cluster) *product {
	t.Helper()
	images := loadImages(t, c)
	dir := t.TempDir()
	for _, d := range []string{"collector", "agent"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The test's own directories are this user's alone.
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(dir, "collector"), 65532, 65532); err != nil {
		t.Fatal(err)
	}
	policies := filepath.Join(dir, "policies")
	pack := filepath.Join(c.Root, "deploy", "helm", "procession", "policies")
	if err := os.CopyFS(policies, os.DirFS(pack)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(policies, "e2e-ticks.yaml"), []byte(tickPolicy), 0o644); err != nil {
		t.Fatal(err)
	}
	c.Apply(t, fmt.Sprintf(plainCollector, images["collector"], filepath.Join(dir, "collector")))
	c.WaitReady(t, "e2e-plain", "app=collector", 1)
	c.Exec(t, "e2e-plain", "deploy/collector", "", "/collector", "issue", "--state", "/state/db", "--node", c.Node, "--out", "/state/tls")
	c.Apply(t, fmt.Sprintf(plainAgent, images["agent"], dir, policies))
	c.WaitReady(t, "e2e-plain", "app=agent", 1)
	return &product{
		c: c, namespace: "e2e-plain", agents: "app=agent", collector: "app=collector", ids: true, metrics: "http://127.0.0.1:19099/metrics",
		read: func(context.Context) ([]byte, error) {
			b, err := os.ReadFile(filepath.Join(dir, "collector", "alerts.ndjson"))
			if os.IsNotExist(err) {
				return nil, nil
			}
			// The last line may be half written.
			return b[:bytes.LastIndexByte(b, '\n')+1], err
		},
	}
}

// TestPlain is the shortest way through everything that is real: images, pods
// without privileges, attacks from inside, alerts outside.
func TestPlain(t *testing.T) {
	testenv.Root(t)
	c := cluster.Up(t)
	p := installPlain(t, c)
	agent := p.pod(t, p.agents)
	p.agentName = agent.Name
	log, err := c.Logs(t.Context(), p.namespace, agent.Name, "")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log, "listening") {
		t.Errorf("a ready agent's log does not say that it listens:\n%s", log)
	}
	t.Logf("agent:\n%s", log)
	startTargets(t, c)
	attackAll(t, p)
	t.Run("faults", func(t *testing.T) { breakThings(t, p) })
}

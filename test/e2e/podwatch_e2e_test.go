//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/test/e2e/cluster"
)

const newcomerPod = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: e2e-bank, labels: {app: %[1]s}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: worker, image: "` + attackedImage + `", imagePullPolicy: Never, command: [sh, -c, "miner -o stratum+tcp://pool.example/%[1]s; exec sleep 1000000"]}]
`

// newcomer starts a pod whose first program is an alert, and waits until that is
// there with its pod's and its container's name.
func newcomer(t *testing.T, p *product, name string) {
	t.Helper()
	p.c.Apply(t, fmt.Sprintf(newcomerPod, name))
	p.c.WaitReady(t, "e2e-bank", "app="+name, 1)
	want := target{"e2e-bank", name, "worker"}
	p.c.Eventually(t, "an alert of "+want.String(), func() error {
		all, err := p.alerts(t.Context())
		if err != nil {
			return err
		}
		for _, r := range all {
			if r.rule() != "host/crypto-miner" || r.Process == nil || !slices.ContainsFunc(r.Process.Args, func(a string) bool { return strings.HasSuffix(a, "/"+name) }) {
				continue
			}
			if got := (target{r.Pod.Namespace, r.Pod.Name, r.Container.Name}); got != want {
				return fmt.Errorf("it is of %s so far: %s", got, r.raw)
			}
			return nil
		}
		return errors.New("no alert of it")
	})
}

// watchPods checks the agent that may not ask the kubelet and watches the node's
// pods at the API server: names while it runs, while it is away, and of pods that
// begin when it is back; and that it never asks for the pods of other nodes.
func watchPods(t *testing.T, p *product) {
	c := p.c
	from := time.Now()
	told := func(by string) {
		t.Helper()
		c.Eventually(t, "pods are told by "+by, func() error {
			if counter(t, p.metrics, "procession_agent_pods_source", `source="`+by+`"`) != 1 {
				return errors.New("not yet")
			}
			return nil
		})
	}
	told("api-watch")
	newcomer(t, p, "before")

	c.StopProgram(t, cluster.APIServer)
	told("none")
	moreTicks(t, c, 20)
	c.StartProgram(t, cluster.APIServer)
	told("api-watch")
	newcomer(t, p, "after")
	checkTicks(t, p)

	// The ticker is older than the outage, and was known all the time.
	all, err := p.alerts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ticks, want := 0, target{"e2e-shop", "ticker", "main"}
	for _, r := range all {
		if r.rule() != tickRule || !r.Time.After(from) {
			continue
		}
		ticks++
		if got := (target{r.Pod.Namespace, r.Pod.Name, r.Container.Name}); got != want {
			t.Errorf("a tick is told as one of %s: %s", got, r.raw)
		}
	}
	if ticks == 0 {
		t.Error("no tick since the agent watches pods")
	}
	checkSelector(t, p, from)
}

// checkSelector makes sure that each list and watch of pods is of this node's.
func checkSelector(t *testing.T, p *product, from time.Time) {
	t.Helper()
	requests, err := p.c.Requests(from)
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	for _, q := range requests {
		if q.User != "system:serviceaccount:"+p.namespace+":procession-agent" || q.Resource != "pods" {
			continue
		}
		asked++
		u, err := url.Parse(q.URI)
		if err != nil {
			t.Fatal(err)
		}
		if got := u.Query().Get("fieldSelector"); got != "spec.nodeName="+p.c.Node {
			t.Errorf("%s %s: the selector is %q", q.Verb, q.URI, got)
		}
	}
	if asked == 0 {
		t.Error("the audit log has no request for pods since the API server is back")
	}
}

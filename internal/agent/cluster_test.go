package agent

import (
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestClusterFlags(t *testing.T) {
	for args, want := range map[string]string{
		"":                                 "",
		"--policies-from kubernetes":       "",
		"--policies-from elsewhere":        "--policies-from",
		"--collector-ca-configmap ns/name": "",
		"--collector-ca-configmap name":    "--collector-ca-configmap",
		"--collector-ca-configmap ns/a/b":  "--collector-ca-configmap",
		"--collector-ca-configmap /name":   "--collector-ca-configmap",
		"--namespace-labels":               "",
		"--node-labels-from-api=perhaps":   "node-labels-from-api",
	} {
		var f clusterFlags
		fs := flag.NewFlagSet("run", flag.ContinueOnError)
		fs.SetOutput(io.Discard)
		f.register(fs)
		err := fs.Parse(strings.Fields(args))
		if err == nil {
			err = f.check()
		}
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
}

// What needs a cluster is refused outside of one, and nothing else asks for it.
func TestOutsideACluster(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	a := &agent{log: slog.New(slog.DiscardHandler)}
	a.flags.cluster.policiesFrom = fromDirectory
	if _, err := a.rules(); err != nil || a.watcher != nil || a.watchNamespaces != nil {
		t.Errorf("a directory: %v, %v", err, a.watcher)
	}
	a.flags.cluster.policiesFrom = fromKubernetes
	if _, err := a.rules(); err == nil || !strings.Contains(err.Error(), "in a Kubernetes cluster only") {
		t.Errorf("no cluster: %v", err)
	}
}

// The labels of the node are those of the API server, or of the last start.
func TestAskNodeLabels(t *testing.T) {
	a := &agent{log: slog.New(slog.DiscardHandler)}
	a.flags.state, a.flags.node = filepath.Join(t.TempDir(), "state"), "node1"
	down := func(context.Context, string) (map[string]string, error) { return nil, errors.New("down") }
	if got := a.askNodeLabels(down); got != nil {
		t.Errorf("nobody answers: %v, want unknown", got)
	}
	want := map[string]string{"zone": "a"}
	for _, ask := range []func(context.Context, string) (map[string]string, error){
		func(_ context.Context, node string) (map[string]string, error) {
			return map[string]string{"zone": "a"}, nil
		}, down,
	} {
		if d := cmp.Diff(want, a.askNodeLabels(ask)); d != "" {
			t.Error(d)
		}
	}
	if err := os.WriteFile(filepath.Join(a.flags.state, "node-labels.json"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := a.askNodeLabels(down); got != nil {
		t.Errorf("a damaged file: %v, want unknown", got)
	}
}

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/procession-dev/procession/internal/kubeapi"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
	policykube "github.com/procession-dev/procession/internal/policy/source/kube"
	"github.com/procession-dev/procession/internal/wholefile"
)

// clusterFlags say what comes from the cluster's API server. Nothing of its
// client is made when nothing does.
type clusterFlags struct {
	policiesFrom string
	caConfigMap  string
	namespaces   bool
	nodeLabels   bool
}

// Where policies come from.
const (
	fromDirectory  = "directory"
	fromKubernetes = "kubernetes"
)

func (f *clusterFlags) register(fs *flag.FlagSet) {
	fs.StringVar(&f.policiesFrom, "policies-from", fromDirectory, "where policies come from: directory (that of --policies), or kubernetes (objects of the cluster; the last good ones are kept in --state)")
	fs.StringVar(&f.caConfigMap, "collector-ca-configmap", "", "`namespace/name` of the ConfigMap that --collector-ca is the file of: asked at the API server while the file is not there")
	fs.BoolVar(&f.namespaces, "namespace-labels", false, "watch the labels of namespaces at the API server, for policies with a namespaceSelector; without it such a selector is undecided")
	fs.BoolVar(&f.nodeLabels, "node-labels-from-api", false, "ask the API server for the labels of this node, once at the start, instead of --node-labels; the last answer is kept in --state")
}

func (f *clusterFlags) any() bool {
	return f.policiesFrom == fromKubernetes || f.caConfigMap != "" || f.namespaces || f.nodeLabels
}

func (f *clusterFlags) check() error {
	if f.policiesFrom != fromDirectory && f.policiesFrom != fromKubernetes {
		return usagef("--policies-from: %q is neither directory nor kubernetes", f.policiesFrom)
	}
	if f.caConfigMap != "" {
		if ns, name, ok := strings.Cut(f.caConfigMap, "/"); !ok || ns == "" || name == "" || strings.Contains(name, "/") {
			return usagef("--collector-ca-configmap: %q is not namespace/name", f.caConfigMap)
		}
	}
	return nil
}

// ruleSource is where rules come from: Load puts in force what there is, Run
// keeps them as they are there.
type ruleSource interface {
	Load(c *policy.Compiler, update func(source.Update)) error
	Run(ctx context.Context, update func(source.Update)) error
}

// clusterRules are the policies of a cluster.
type clusterRules struct {
	*source.Objects
	*policykube.Watcher
}

// rules makes the source of the rules, and has the forwarder ask the API server
// for the collector's bundle as long as there is no file.
func (a *agent) rules() (ruleSource, error) {
	f := a.flags.cluster
	if !f.any() {
		return source.NewDir(a.flags.policies, a.log), nil
	}
	client, err := policykube.NewClient("procession-agent/" + a.version)
	if errors.Is(err, kubeapi.ErrNotInCluster) {
		return nil, fmt.Errorf("--policies-from kubernetes, --collector-ca-configmap, --namespace-labels and --node-labels-from-api work in a Kubernetes cluster only: %w", err)
	}
	if err != nil {
		return nil, err
	}
	if f.nodeLabels {
		a.flags.nodeLabels = a.askNodeLabels(client.NodeLabels)
	}
	a.watchNamespaces = func(ctx context.Context) error {
		if !f.namespaces || a.pods == nil {
			return nil
		}
		return client.WatchNamespaces(ctx, a.log, a.pods.SetNamespaces)
	}
	if ns, name, ok := strings.Cut(f.caConfigMap, "/"); ok {
		a.flags.connect.fetchCA = func(ctx context.Context) ([]byte, error) {
			return client.ConfigMapKey(ctx, ns, name, "ca.crt")
		}
	}
	if f.policiesFrom == fromDirectory {
		return source.NewDir(a.flags.policies, a.log), nil
	}
	log := a.log.With(slog.String("from", fromKubernetes))
	objects := source.NewObjects(filepath.Join(a.flags.state, "policies.json"), log)
	if a.watcher, err = client.NewWatcher(objects, log); err != nil {
		return nil, err
	}
	return clusterRules{objects, a.watcher}, nil
}

// maxNodeLabels bounds the file of a node's labels; the API server takes no
// object that is larger.
const maxNodeLabels = 2 << 20

// askNodeLabels asks for the labels of this node, and keeps them for a start
// without an API server. nil: not known.
func (a *agent) askNodeLabels(ask func(context.Context, string) (map[string]string, error)) map[string]string {
	file := filepath.Join(a.flags.state, "node-labels.json")
	labels, err := ask(context.Background(), a.flags.node)
	if err == nil {
		b, err := json.Marshal(labels)
		if err == nil {
			err = errors.Join(os.MkdirAll(a.flags.state, 0o700), wholefile.Replace(file, b, 0o600))
		}
		if err != nil {
			a.log.Warn("the labels of this node cannot be kept for the next start", "err", err)
		}
		return labels
	}
	b, rerr := wholefile.Read(file, maxNodeLabels)
	if rerr == nil {
		rerr = json.Unmarshal(b, &labels)
	}
	if rerr != nil {
		a.log.Warn("the labels of this node are not known: rules with a nodeSelector are undecided until the agent is started again", "err", err)
		return nil
	}
	a.log.Warn("the labels of this node are those of an earlier start", "err", err)
	return labels
}

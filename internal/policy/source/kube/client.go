// Package kube watches policies as objects of a Kubernetes cluster, for
// source.Objects.
//
// It promises:
//
//   - Two watches and no polling: one of ClusterDetectionPolicy, one of
//     DetectionPolicy, by client-go's reflector: lists streamed where the API
//     server can, bookmarks, back-off with jitter, and a new list when a watch
//     is too old. A change is told within a second.
//   - While the API server is silent nothing changes: an answer that fails is no
//     answer, and a kind that the cluster does not have takes nothing from the
//     other one.
//   - Each object is handed over as it was written, not as this version's types
//     would have it: a field this version does not know is refused by name,
//     where a decoder would leave it out and change what the policy means.
//
// Of an object's metadata only what says who it is is kept.
package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/kubeapi"
)

// A Client talks to the API server of the cluster this runs in.
type Client struct {
	cfg *rest.Config
}

// NewClient makes a client by the pod's service account, or says
// kubeapi.ErrNotInCluster. agent names the program to the API server. It
// connects to nothing.
func NewClient(agent string) (*Client, error) {
	cfg, err := kubeapi.InCluster(agent)
	if err != nil {
		return nil, err
	}
	return newClient(cfg), nil
}

func newClient(cfg *rest.Config) *Client {
	cfg.QPS, cfg.Burst = 2, 10 // even a broken loop would ask little
	return &Client{cfg}
}

// ConfigMapKey reads one key of one ConfigMap, as the bundle of certificates
// before the kubelet has written it to a file.
func (c *Client) ConfigMapKey(ctx context.Context, namespace, name, key string) ([]byte, error) {
	r, err := kubeapi.Plain(c.cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var m struct {
		Data map[string]string `json:"data"`
	}
	if err := kubeapi.Read(ctx, r.Get().AbsPath(kubeapi.Path(namespace, "configmaps", name)), &m); err != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s: %w", namespace, name, err)
	}
	v, ok := m.Data[key]
	if !ok {
		return nil, fmt.Errorf("ConfigMap %s/%s has no %s yet", namespace, name, key)
	}
	return []byte(v), nil
}

// NodeLabels are the labels of a node. Only its metadata is asked for.
func (c *Client) NodeLabels(ctx context.Context, name string) (map[string]string, error) {
	client, err := metadata.NewForConfig(c.cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	o, err := client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "nodes"}).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	return labelsOf(o), nil
}

// text is a policy as a file would have it: who it is and its spec.
func text(kind string, o *kubeapi.Policy) ([]byte, error) {
	type meta struct {
		Name       string `json:"name"`
		Namespace  string `json:"namespace,omitempty"`
		Generation int64  `json:"generation,omitempty"`
	}
	return json.Marshal(struct {
		APIVersion string          `json:"apiVersion"`
		Kind       string          `json:"kind"`
		Metadata   meta            `json:"metadata"`
		Spec       json.RawMessage `json:"spec,omitempty"`
	}{v1alpha1.APIVersion, kind, meta{o.Name, o.Namespace, o.Generation}, o.Spec})
}

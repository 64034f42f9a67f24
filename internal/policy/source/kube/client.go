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
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/api/v1alpha1"
)

// A Client talks to the API server of the cluster this runs in.
type Client struct {
	cfg *rest.Config
}

// ErrNotInCluster reports that there is no service account here.
var ErrNotInCluster = errors.New("this is no pod with a service account")

// NewClient makes a client by the pod's service account. agent names the
// program to the API server. It connects to nothing.
func NewClient(agent string) (*Client, error) {
	cfg, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) || errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotInCluster
	}
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	cfg.UserAgent = agent
	return &Client{cfg}, nil
}

// Limits of a client, by which even a broken loop would ask little.
const (
	requestsPerSecond = 2
	requestsAtOnce    = 10
)

// restClient makes a client for one group and version, or for plain paths.
func (c *Client) restClient(gv schema.GroupVersion, scheme *runtime.Scheme) (rest.Interface, error) {
	cfg := rest.CopyConfig(c.cfg)
	cfg.APIPath, cfg.GroupVersion = "/apis", &gv
	if gv.Group == "" {
		cfg.APIPath = "/api"
	}
	cfg.QPS, cfg.Burst = requestsPerSecond, requestsAtOnce
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeJSON
	r, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	return r, nil
}

// ConfigMapKey reads one key of one ConfigMap, as the bundle of certificates
// before the kubelet has written it to a file.
func (c *Client) ConfigMapKey(ctx context.Context, namespace, name, key string) ([]byte, error) {
	r, err := c.restClient(schema.GroupVersion{Version: "v1"}, runtime.NewScheme())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	b, err := r.Get().AbsPath("/api/v1/namespaces/"+url.PathEscape(namespace)+"/configmaps/"+url.PathEscape(name)).SetHeader("Accept", "application/json").Do(ctx).Raw()
	if err != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s: %w", namespace, name, err)
	}
	var m struct {
		Data map[string]string `json:"data"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
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
	cfg := rest.CopyConfig(c.cfg)
	cfg.QPS, cfg.Burst = requestsPerSecond, requestsAtOnce
	client, err := metadata.NewForConfig(cfg)
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

// object is a policy of either kind, with its spec as it was written.
type object struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              json.RawMessage `json:"spec"`
}

func (o *object) DeepCopyObject() runtime.Object {
	c := &object{TypeMeta: o.TypeMeta, Spec: append(json.RawMessage(nil), o.Spec...)}
	o.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	return c
}

type objectList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []object `json:"items"`
}

func (l *objectList) DeepCopyObject() runtime.Object {
	c := &objectList{TypeMeta: l.TypeMeta, Items: make([]object, len(l.Items))}
	l.ListMeta.DeepCopyInto(&c.ListMeta)
	for i := range l.Items {
		c.Items[i] = *l.Items[i].DeepCopyObject().(*object)
	}
	return c
}

// text is the object as a file would have it: who it is and its spec.
func (o *object) text(kind string) ([]byte, error) {
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

func policyScheme() (*runtime.Scheme, schema.GroupVersion) {
	gv := schema.GroupVersion{Group: v1alpha1.Group, Version: v1alpha1.Version}
	s := runtime.NewScheme()
	for _, k := range kinds {
		s.AddKnownTypeWithName(gv.WithKind(k.kind), &object{})
		s.AddKnownTypeWithName(gv.WithKind(k.kind+"List"), &objectList{})
	}
	metav1.AddToGroupVersion(s, gv)
	return s, gv
}

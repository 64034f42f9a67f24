// Package kubeapi is what agent and collector both need to talk to a Kubernetes
// API server: the account of the pod they run in, requests in JSON, policies as
// objects, and a watch that goes on. What they ask for is their own affair.
//
// A client connects to nothing until it is asked something. Policies are handed
// over as they were written: a decoder into this version's types would leave out
// what it does not know, and change what a policy means.
package kubeapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/api/v1alpha1"
)

// ErrNotInCluster reports that there is no service account here.
var ErrNotInCluster = errors.New("this is no pod with a service account")

// InCluster is how to reach the API server by the service account of the pod
// this runs in. agent names the program to it.
func InCluster(agent string) (*rest.Config, error) {
	cfg, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) || errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotInCluster
	}
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	cfg.UserAgent = agent
	return cfg, nil
}

// Plain makes a client for whole paths, for use with Read.
func Plain(cfg *rest.Config) (rest.Interface, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(runtime.NewScheme()).WithoutConversion()
	c, err := rest.UnversionedRESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	return c, nil
}

// Path is where an object of the core group is, for Plain.
func Path(namespace, resource, name string) string {
	return "/api/v1/namespaces/" + url.PathEscape(namespace) + "/" + resource + "/" + url.PathEscape(name)
}

// Read sends a request and reads the answer's JSON.
func Read(ctx context.Context, req *rest.Request, into any) error {
	b, err := req.SetHeader("Accept", "application/json").Do(ctx).Raw()
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

// PolicyResources are what policies are called in addresses, by kind.
var PolicyResources = map[string]string{
	v1alpha1.KindClusterDetectionPolicy: "clusterdetectionpolicies",
	v1alpha1.KindDetectionPolicy:        "detectionpolicies",
}

// Policies makes a client for lists and watches of Policy objects. Its requests
// have no time limit: a watch lasts.
func Policies(cfg *rest.Config) (rest.Interface, error) {
	gv := schema.GroupVersion{Group: v1alpha1.Group, Version: v1alpha1.Version}
	scheme := runtime.NewScheme()
	for kind := range PolicyResources {
		scheme.AddKnownTypeWithName(gv.WithKind(kind), &Policy{})
		scheme.AddKnownTypeWithName(gv.WithKind(kind+"List"), &policyList{})
	}
	metav1.AddToGroupVersion(scheme, gv)
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath, cfg.GroupVersion, cfg.Timeout = "/apis", &gv, 0
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeJSON
	c, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	return c, nil
}

// A Policy is one of either kind, with spec and status as they stand there: a
// list in which one object is odd is a list all the same.
type Policy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              json.RawMessage `json:"spec"`
	Status            json.RawMessage `json:"status"`
}

// DeepCopyObject implements runtime.Object.
func (p *Policy) DeepCopyObject() runtime.Object {
	c := &Policy{TypeMeta: p.TypeMeta, Spec: slices.Clone(p.Spec), Status: slices.Clone(p.Status)}
	p.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	return c
}

type policyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Policy `json:"items"`
}

// DeepCopyObject implements runtime.Object.
func (l *policyList) DeepCopyObject() runtime.Object {
	c := &policyList{TypeMeta: l.TypeMeta, Items: make([]Policy, len(l.Items))}
	l.ListMeta.DeepCopyInto(&c.ListMeta)
	for i := range l.Items {
		c.Items[i] = *l.Items[i].DeepCopyObject().(*Policy)
	}
	return c
}

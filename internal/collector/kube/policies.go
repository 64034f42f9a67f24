package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/collector/policystatus"
)

// resources are what policies are called in addresses, by kind.
var resources = map[string]string{
	v1alpha1.KindClusterDetectionPolicy: "clusterdetectionpolicies",
	v1alpha1.KindDetectionPolicy:        "detectionpolicies",
}

// statusManager owns the status of policies, to the API server.
const statusManager = "procession-collector"

// Between two tries at an API server that fails.
const (
	watchBackoffMin = 500 * time.Millisecond
	watchBackoffMax = 30 * time.Second
)

// Policies watches the policy objects, by two watches and no polling, and writes
// their status. It implements policystatus.API.
type Policies struct {
	c     *Client
	log   *slog.Logger
	kinds []*policyStore
}

// Policies makes a Policies. It connects to nothing.
func (c *Client) Policies(log *slog.Logger) (*Policies, error) {
	gv := schema.GroupVersion{Group: v1alpha1.Group, Version: v1alpha1.Version}
	scheme := runtime.NewScheme()
	for kind := range resources {
		scheme.AddKnownTypeWithName(gv.WithKind(kind), &policyObject{})
		scheme.AddKnownTypeWithName(gv.WithKind(kind+"List"), &policyObjectList{})
	}
	metav1.AddToGroupVersion(scheme, gv)
	cfg := rest.CopyConfig(c.cfg)
	cfg.APIPath, cfg.GroupVersion = "/apis", &gv
	cfg.Timeout = 0 // a watch lasts
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeJSON
	r, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	p := &Policies{c: c, log: log}
	for kind, resource := range resources {
		p.kinds = append(p.kinds, &policyStore{kind: kind, resource: resource, rest: r, objects: map[string]*policystatus.Policy{}})
	}
	return p, nil
}

// Run watches until ctx ends.
func (p *Policies) Run(ctx context.Context) {
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range p.kinds {
		g.Go(func() error { s.run(ctx, p.log); return nil })
	}
	g.Wait()
}

// Policies implements policystatus.API.
func (p *Policies) Policies() (all []*policystatus.Policy, ok bool) {
	for _, s := range p.kinds {
		s.mu.Lock()
		synced := s.synced
		for _, o := range s.objects {
			all = append(all, o)
		}
		s.mu.Unlock()
		if !synced {
			return nil, false
		}
	}
	return all, true
}

// ApplyStatus implements policystatus.API, by server-side apply to the status
// alone. The UID in it keeps a new object of the same name apart.
func (p *Policies) ApplyStatus(ctx context.Context, o *policystatus.Policy, status *v1alpha1.PolicyStatus) error {
	at := "/apis/" + v1alpha1.APIVersion
	name := map[string]string{"name": o.Name, "uid": o.UID}
	if o.Namespace != "" {
		at += "/namespaces/" + url.PathEscape(o.Namespace)
		name["namespace"] = o.Namespace
	}
	at += "/" + resources[o.Kind] + "/" + url.PathEscape(o.Name) + "/status"
	body, err := json.Marshal(map[string]any{"apiVersion": v1alpha1.APIVersion, "kind": o.Kind, "metadata": name, "status": status})
	if err != nil {
		return fmt.Errorf("status of %s: %w", o.Object(), err)
	}
	err = p.c.rest.Patch(types.ApplyPatchType).AbsPath(at).Param("fieldManager", statusManager).Param("force", "true").Body(body).Do(ctx).Error()
	switch {
	case apierrors.IsNotFound(err), apierrors.IsConflict(err):
		return fmt.Errorf("status of %s: %w: %w", o.Object(), policystatus.ErrGone, err)
	case err != nil:
		return fmt.Errorf("status of %s: %w", o.Object(), err)
	}
	return nil
}

// A policyStore is what the reflector fills with one kind's objects.
type policyStore struct {
	kind, resource string
	rest           rest.Interface

	mu      sync.Mutex // guards what follows
	objects map[string]*policystatus.Policy
	synced  bool
}

// run lists and watches, again and again, until ctx ends.
func (s *policyStore) run(ctx context.Context, log *slog.Logger) {
	quiet := klog.Logger{} // what the reflector has to say is said below, in this program's words
	lw := cache.NewListWatchFromClient(s.rest, s.resource, metav1.NamespaceAll, fields.Everything())
	r := cache.NewReflectorWithOptions(lw, &policyObject{}, s, cache.ReflectorOptions{Name: s.kind, TypeDescription: s.kind, Logger: &quiet})
	backoff, failing := watchBackoffMin, false
	for {
		began := time.Now()
		err := r.ListAndWatchWithContext(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > watchBackoffMax {
			backoff, failing = watchBackoffMin, false
		}
		if err != nil && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) && !errors.Is(err, context.Canceled) {
			if !failing {
				log.Warn("policies cannot be watched; their status is not written meanwhile, and detection goes on", slog.String("kind", s.kind), slog.Any("err", err))
			}
			failing = true
		}
		select {
		case <-time.After(backoff/2 + rand.N(backoff)):
		case <-ctx.Done():
			return
		}
		backoff = min(2*backoff, watchBackoffMax)
	}
}

// The methods of a cache.ReflectorStore.

// Add implements cache.ReflectorStore.
func (s *policyStore) Add(obj any) error {
	p, err := s.policy(obj)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[p.Object()] = p
	return nil
}

// Update implements cache.ReflectorStore.
func (s *policyStore) Update(obj any) error { return s.Add(obj) }

// Delete implements cache.ReflectorStore.
func (s *policyStore) Delete(obj any) error {
	p, err := s.policy(obj)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, p.Object())
	return nil
}

// Replace implements cache.ReflectorStore.
func (s *policyStore) Replace(list []any, _ string) error {
	next := make(map[string]*policystatus.Policy, len(list))
	for _, obj := range list {
		p, err := s.policy(obj)
		if err != nil {
			return err
		}
		next[p.Object()] = p
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects, s.synced = next, true
	return nil
}

// Resync implements cache.ReflectorStore.
func (s *policyStore) Resync() error { return nil }

// policy takes from an object what its status is about.
func (s *policyStore) policy(obj any) (*policystatus.Policy, error) {
	o, ok := obj.(*policyObject)
	if !ok {
		return nil, fmt.Errorf("the API server sent a %T for a %s", obj, s.kind)
	}
	p := &policystatus.Policy{Kind: s.kind, Namespace: o.Namespace, Name: o.Name, UID: string(o.UID), Generation: o.Generation}
	// A spec or status of another version is as good as none: agents say what is
	// wrong with it, and the status is written anew.
	var spec struct {
		Mode  v1alpha1.Mode
		Rules []policystatus.Rule
	}
	if json.Unmarshal(o.Spec, &spec) == nil {
		p.Mode, p.Rules = spec.Mode, spec.Rules[:min(len(spec.Rules), v1alpha1.MaxRules)]
	}
	var status v1alpha1.PolicyStatus
	if json.Unmarshal(o.Status, &status) == nil {
		p.Status = status
	}
	return p, nil
}

// policyObject is a policy of either kind, with spec and status as they stand
// there: a list in which one object is odd is a list all the same.
type policyObject struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              json.RawMessage `json:"spec"`
	Status            json.RawMessage `json:"status"`
}

// DeepCopyObject implements runtime.Object.
func (o *policyObject) DeepCopyObject() runtime.Object {
	c := &policyObject{TypeMeta: o.TypeMeta, Spec: slices.Clone(o.Spec), Status: slices.Clone(o.Status)}
	o.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	return c
}

type policyObjectList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []policyObject `json:"items"`
}

// DeepCopyObject implements runtime.Object.
func (l *policyObjectList) DeepCopyObject() runtime.Object {
	c := &policyObjectList{TypeMeta: l.TypeMeta, Items: make([]policyObject, len(l.Items))}
	l.ListMeta.DeepCopyInto(&c.ListMeta)
	for i := range l.Items {
		c.Items[i] = *l.Items[i].DeepCopyObject().(*policyObject)
	}
	return c
}

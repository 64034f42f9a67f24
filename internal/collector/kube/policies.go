package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"sync"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/collector/policystatus"
	"github.com/procession-dev/procession/internal/kubeapi"
)

// statusManager owns the status of policies, to the API server.
const statusManager = "procession-collector"

// Policies watches the policy objects, by two watches and no polling, and writes
// their status. It implements policystatus.API.
type Policies struct {
	c     *Client
	log   *slog.Logger
	kinds []*policyStore
}

// Policies makes a Policies. It connects to nothing.
func (c *Client) Policies(log *slog.Logger) (*Policies, error) {
	r, err := kubeapi.Policies(c.cfg)
	if err != nil {
		return nil, err
	}
	p := &Policies{c: c, log: log}
	for kind := range kubeapi.PolicyResources {
		p.kinds = append(p.kinds, &policyStore{kind: kind, rest: r, objects: map[string]*policystatus.Policy{}})
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
	at += "/" + kubeapi.PolicyResources[o.Kind] + "/" + url.PathEscape(o.Name) + "/status"
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
	kind string
	rest rest.Interface

	mu      sync.Mutex // guards what follows
	objects map[string]*policystatus.Policy
	synced  bool
}

// run keeps the store until ctx ends.
func (s *policyStore) run(ctx context.Context, log *slog.Logger) {
	kubeapi.WatchPolicies(ctx, s.rest, s.kind, s, func(err error, again bool) {
		if !again {
			log.Warn("policies cannot be watched; their status is not written meanwhile, and detection goes on", slog.String("kind", s.kind), slog.Any("err", err))
		}
	})
}

// Put implements kubeapi.Store.
func (s *policyStore) Put(o *kubeapi.Policy) error {
	p := s.policy(o)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[p.Object()] = p
	return nil
}

// Delete implements kubeapi.Store.
func (s *policyStore) Delete(o *kubeapi.Policy) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, s.policy(o).Object())
	return nil
}

// Replace implements kubeapi.Store.
func (s *policyStore) Replace(all []*kubeapi.Policy) error {
	next := make(map[string]*policystatus.Policy, len(all))
	for _, o := range all {
		p := s.policy(o)
		next[p.Object()] = p
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects, s.synced = next, true
	return nil
}

// policy takes from an object what its status is about.
func (s *policyStore) policy(o *kubeapi.Policy) *policystatus.Policy {
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
	return p
}

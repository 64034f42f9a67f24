package kube

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// WatchNamespaces tells the labels of all namespaces after each change, until
// ctx ends. What it tells is not changed afterwards. While the API server is
// silent nothing is told. Only the metadata of namespaces is asked for.
func (c *Client) WatchNamespaces(ctx context.Context, log *slog.Logger, changed func(labels map[string]map[string]string)) error {
	cfg := rest.CopyConfig(c.cfg)
	cfg.QPS, cfg.Burst = requestsPerSecond, requestsAtOnce
	client, err := metadata.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("kubernetes client: %w", err)
	}
	namespaces := client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"})
	lw := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return namespaces.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return namespaces.Watch(ctx, o)
		},
	}, client)
	quiet := klog.Logger{}
	s := &namespaceStore{tell: changed, all: map[string]map[string]string{}}
	r := cache.NewReflectorWithOptions(lw, &metav1.PartialObjectMetadata{}, s, cache.ReflectorOptions{Name: "Namespace", TypeDescription: "Namespace", Logger: &quiet})
	backoff, told := backoffMin, false
	for {
		began := time.Now()
		if err := r.ListAndWatchWithContext(ctx); err != nil && ctx.Err() == nil && !told {
			told = true // the watch of policies says the same, and when it is over
			log.Warn("namespaces cannot be watched; what is known of their labels stays, and it is tried again", "err", err)
		}
		if time.Since(began) > backoffMax {
			backoff, told = backoffMin, false
		}
		select {
		case <-time.After(backoff/2 + rand.N(backoff)):
		case <-ctx.Done():
			return nil
		}
		backoff = min(2*backoff, backoffMax)
	}
}

// A namespaceStore is what the reflector fills.
type namespaceStore struct {
	tell func(map[string]map[string]string)

	mu     sync.Mutex // guards all
	all    map[string]map[string]string
	listed bool
}

func (s *namespaceStore) change(f func(map[string]map[string]string)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := maps.Clone(s.all)
	f(next)
	if s.listed && maps.EqualFunc(next, s.all, maps.Equal[map[string]string, map[string]string]) {
		return nil
	}
	s.all, s.listed = next, true
	s.tell(next)
	return nil
}

func (s *namespaceStore) Add(obj any) error {
	o, ok := obj.(*metav1.PartialObjectMetadata)
	if !ok {
		return fmt.Errorf("the API server sent a %T for a Namespace", obj)
	}
	return s.change(func(m map[string]map[string]string) { m[o.Name] = labelsOf(o) })
}

func (s *namespaceStore) Update(obj any) error { return s.Add(obj) }

func (s *namespaceStore) Delete(obj any) error {
	o, ok := obj.(*metav1.PartialObjectMetadata)
	if !ok {
		return fmt.Errorf("the API server sent a %T for a Namespace", obj)
	}
	return s.change(func(m map[string]map[string]string) { delete(m, o.Name) })
}

func (s *namespaceStore) Replace(list []any, _ string) error {
	return s.change(func(m map[string]map[string]string) {
		clear(m)
		for _, obj := range list {
			if o, ok := obj.(*metav1.PartialObjectMetadata); ok {
				m[o.Name] = labelsOf(o)
			}
		}
	})
}

func (s *namespaceStore) Resync() error { return nil }

// labelsOf is never nil: a namespace that is known has labels, or none.
func labelsOf(o *metav1.PartialObjectMetadata) map[string]string {
	if o.Labels == nil {
		return map[string]string{}
	}
	return o.Labels
}

package kube

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"

	"github.com/procession-dev/procession/internal/kubeapi"
)

// WatchNamespaces tells the labels of all namespaces after each change, until
// ctx ends. What it tells is not changed afterwards. While the API server is
// silent nothing is told. Only the metadata of namespaces is asked for.
func (c *Client) WatchNamespaces(ctx context.Context, log *slog.Logger, changed func(labels map[string]map[string]string)) error {
	client, err := metadata.NewForConfig(c.cfg)
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
	s := &namespaceStore{tell: changed, all: map[string]map[string]string{}}
	kubeapi.Watch(ctx, lw, "Namespace", s, func(err error, again bool) {
		if !again { // the watch of policies says the same, and when it is over
			log.Warn("namespaces cannot be watched; what is known of their labels stays, and it is tried again", "err", err)
		}
	})
	return nil
}

// A namespaceStore is what the watch fills.
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

// Put implements kubeapi.Store.
func (s *namespaceStore) Put(o *metav1.PartialObjectMetadata) error {
	return s.change(func(m map[string]map[string]string) { m[o.Name] = labelsOf(o) })
}

// Delete implements kubeapi.Store.
func (s *namespaceStore) Delete(o *metav1.PartialObjectMetadata) error {
	return s.change(func(m map[string]map[string]string) { delete(m, o.Name) })
}

// Replace implements kubeapi.Store.
func (s *namespaceStore) Replace(all []*metav1.PartialObjectMetadata) error {
	return s.change(func(m map[string]map[string]string) {
		clear(m)
		for _, o := range all {
			m[o.Name] = labelsOf(o)
		}
	})
}

// labelsOf is never nil: a namespace that is known has labels, or none.
func labelsOf(o *metav1.PartialObjectMetadata) map[string]string {
	if o.Labels == nil {
		return map[string]string{}
	}
	return o.Labels
}

package kubeapi

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// Between two tries at an API server that fails.
const (
	backoffMin = 500 * time.Millisecond
	backoffMax = 30 * time.Second
)

// A Store is what Watch keeps as the cluster is, from one goroutine. An error
// ends the list or watch that brought the object.
type Store[T runtime.Object] interface {
	Put(o T) error
	Delete(o T) error
	Replace(all []T) error
}

// WatchPolicies keeps a store as the cluster's policies of one kind are, as
// Watch does. c is a client of Policies.
func WatchPolicies(ctx context.Context, c rest.Interface, kind string, into Store[*Policy], failed func(err error, again bool)) {
	lw := cache.NewListWatchFromClient(c, PolicyResources[kind], metav1.NamespaceAll, fields.Everything())
	Watch(ctx, lw, kind, into, failed)
}

// Watch keeps a store as the cluster is, until ctx ends: by client-go's
// reflector, which streams lists where the API server can, takes bookmarks, and
// lists anew when a watch is too old. kind is what the objects are called in
// errors. failed is told each error that ended a list or a watch; again says
// that the one before is not half a minute of watching away.
func Watch[T runtime.Object](ctx context.Context, lw cache.ListerWatcher, kind string, into Store[T], failed func(err error, again bool)) {
	quiet := klog.Logger{} // what the reflector has to say is said by failed, in its program's words
	var sample T
	r := cache.NewReflectorWithOptions(lw, sample, reflected[T]{kind, into}, cache.ReflectorOptions{Name: kind, TypeDescription: kind, Logger: &quiet})
	backoff, failing := backoffMin, false
	for {
		began := time.Now()
		err := r.ListAndWatchWithContext(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > backoffMax {
			backoff, failing = backoffMin, false
		}
		// A watch that is too old, and one that the server ended, are its usual life.
		if err != nil && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) && !errors.Is(err, context.Canceled) {
			failed(err, failing)
			failing = true
		}
		select {
		case <-time.After(backoff/2 + rand.N(backoff)): // a fleet does not come back at once
		case <-ctx.Done():
			return
		}
		backoff = min(2*backoff, backoffMax)
	}
}

// reflected makes a cache.ReflectorStore of a Store.
type reflected[T runtime.Object] struct {
	kind string
	into Store[T]
}

func (r reflected[T]) typed(obj any) (T, error) {
	o, ok := obj.(T)
	if !ok {
		return o, fmt.Errorf("the API server sent a %T for a %s", obj, r.kind)
	}
	return o, nil
}

// Add implements cache.ReflectorStore.
func (r reflected[T]) Add(obj any) error {
	o, err := r.typed(obj)
	if err != nil {
		return err
	}
	return r.into.Put(o)
}

// Update implements cache.ReflectorStore.
func (r reflected[T]) Update(obj any) error { return r.Add(obj) }

// Delete implements cache.ReflectorStore.
func (r reflected[T]) Delete(obj any) error {
	o, err := r.typed(obj)
	if err != nil {
		return err
	}
	return r.into.Delete(o)
}

// Replace implements cache.ReflectorStore.
func (r reflected[T]) Replace(list []any, _ string) error {
	all := make([]T, len(list))
	for i, obj := range list {
		var err error
		if all[i], err = r.typed(obj); err != nil {
			return err
		}
	}
	return r.into.Replace(all)
}

// Resync implements cache.ReflectorStore.
func (r reflected[T]) Resync() error { return nil }

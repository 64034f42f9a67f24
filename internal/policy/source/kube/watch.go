package kube

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"

	"github.com/procession-dev/procession/internal/kubeapi"
	"github.com/procession-dev/procession/internal/policy/source"
)

const (
	// settle is how long changes are collected: an upgrade changes many objects
	// one after the other.
	settle = 100 * time.Millisecond

	// breather is the least time between two sets of rules: somebody who changes
	// a policy all the time does not keep the agent busy with it.
	breather = 500 * time.Millisecond
)

// A Watcher keeps a source.Objects as the cluster is.
type Watcher struct {
	log     *slog.Logger
	objects *source.Objects
	stores  []*store
	changed chan struct{} // capacity 1

	mu      sync.Mutex // guards what follows
	status  Status
	failing map[string]string // by kind: why its last list or watch ended
}

// Status says how the watch stands. Counters are since New.
type Status struct {
	Synced   bool      // each kind was listed once
	Changes  uint64    // sets of objects handed over
	Failures uint64    // lists and watches that ended with an error
	Error    string    // why a kind is not watched at present; "" when all are
	ErrorAt  time.Time // of the last failure
}

// NewWatcher makes a watcher. It connects to nothing.
func (c *Client) NewWatcher(objects *source.Objects, log *slog.Logger) (*Watcher, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	w := &Watcher{log: log, objects: objects, changed: make(chan struct{}, 1), failing: map[string]string{}}
	r, err := kubeapi.Policies(c.cfg)
	if err != nil {
		return nil, err
	}
	for _, kind := range slices.Sorted(maps.Keys(kubeapi.PolicyResources)) {
		w.stores = append(w.stores, &store{w: w, kind: kind, rest: r, objects: map[string]source.Object{}})
	}
	return w, nil
}

// Status takes a snapshot.
func (w *Watcher) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.status
	for _, kind := range slices.Sorted(maps.Keys(w.failing)) {
		s.Error = kind + ": " + w.failing[kind]
	}
	s.Synced = true
	for _, st := range w.stores {
		s.Synced = s.Synced && st.isSynced()
	}
	return s
}

// Run watches until ctx ends, and calls update after each change that matters.
func (w *Watcher) Run(ctx context.Context, update func(source.Update)) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, st := range w.stores {
		g.Go(func() error {
			kubeapi.WatchPolicies(ctx, st.rest, st.kind, st, func(err error, _ bool) { w.failed(st.kind, err) })
			return nil
		})
	}
	g.Go(func() error { return w.deliver(ctx, update) })
	return g.Wait()
}

// deliver hands over what has changed, not too often.
func (w *Watcher) deliver(ctx context.Context, update func(source.Update)) error {
	pause := time.NewTimer(0)
	defer pause.Stop()
	<-pause.C
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.changed:
		}
		pause.Reset(settle)
		select {
		case <-ctx.Done():
			return nil
		case <-pause.C:
		}
		for _, st := range w.stores {
			objects, ok := st.take()
			if !ok {
				continue
			}
			if err := w.objects.Set(st.kind, objects, update); err != nil {
				w.log.Error("policies cannot be put in force; the rules in force stay", "kind", st.kind, "err", err)
			}
			w.mu.Lock()
			w.status.Changes++
			w.mu.Unlock()
		}
		pause.Reset(breather)
		select {
		case <-ctx.Done():
			return nil
		case <-pause.C:
		}
	}
}

func (w *Watcher) wake() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// failed is told when a list or a watch ended with an error.
func (w *Watcher) failed(kind string, err error) {
	w.mu.Lock()
	_, again := w.failing[kind]
	w.failing[kind] = err.Error()
	w.status.Failures++
	w.status.ErrorAt = time.Now()
	w.mu.Unlock()
	if !again {
		w.log.Warn("policies cannot be watched; the rules in force stay, and it is tried again", "kind", kind, "err", err)
	}
}

func (w *Watcher) succeeded(kind string) {
	w.mu.Lock()
	_, again := w.failing[kind]
	delete(w.failing, kind)
	w.mu.Unlock()
	if again {
		w.log.Info("policies are watched again", "kind", kind)
	}
}

// A store is what the watch fills with one kind's objects.
type store struct {
	w    *Watcher
	kind string
	rest rest.Interface

	mu      sync.Mutex // guards what follows
	objects map[string]source.Object
	synced  bool
	dirty   bool
}

func (s *store) isSynced() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.synced
}

// take gives all objects if something has changed since the last time.
func (s *store) take() ([]source.Object, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.dirty {
		return nil, false
	}
	s.dirty = false
	all := make([]source.Object, 0, len(s.objects))
	for _, o := range s.objects {
		all = append(all, o)
	}
	return all, true
}

func (s *store) change(f func(map[string]source.Object) error) error {
	s.mu.Lock()
	err := f(s.objects)
	s.dirty = true
	s.mu.Unlock()
	s.w.succeeded(s.kind)
	s.w.wake()
	return err
}

func (s *store) put(to map[string]source.Object, o *kubeapi.Policy) error {
	b, err := text(s.kind, o)
	if err != nil {
		return fmt.Errorf("%s %s/%s: %w", s.kind, o.Namespace, o.Name, err)
	}
	to[o.Namespace+"/"+o.Name] = source.Object{Namespace: o.Namespace, Name: o.Name, Text: b}
	return nil
}

// Put implements kubeapi.Store.
func (s *store) Put(o *kubeapi.Policy) error {
	return s.change(func(m map[string]source.Object) error { return s.put(m, o) })
}

// Delete implements kubeapi.Store.
func (s *store) Delete(o *kubeapi.Policy) error {
	return s.change(func(m map[string]source.Object) error {
		delete(m, o.Namespace+"/"+o.Name)
		return nil
	})
}

// Replace implements kubeapi.Store.
func (s *store) Replace(all []*kubeapi.Policy) error {
	next := make(map[string]source.Object, len(all))
	for _, o := range all {
		if err := s.put(next, o); err != nil {
			return err
		}
	}
	return s.change(func(m map[string]source.Object) error {
		clear(m)
		maps.Copy(m, next)
		s.synced = true
		return nil
	})
}

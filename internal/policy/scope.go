package policy

import (
	"slices"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A scope says which processes a policy's rules look at. It is asked once for
// a workload, not for each event.
type scope struct {
	places     [numPlaces]bool
	tenant     string    // the namespace of a DetectionPolicy; empty: any, or none
	nodes      *selector // nil: all
	namespaces *selector // nil: all
	pods       *selector // nil: all
	containers []string  // empty: all
}

const numPlaces = int(event.PlaceContainer) + 1

func newScope(p v1alpha1.Policy) *scope {
	w := p.Where()
	s := &scope{nodes: newSelector(w.NodeSelector), namespaces: newSelector(w.NamespaceSelector), pods: newSelector(w.PodSelector),
		containers: slices.Clone(w.Containers), tenant: p.GetNamespace()}
	// Where it is not known where a process runs it may be on either side.
	s.places[event.PlaceUnknown] = true
	s.places[event.PlaceHost], s.places[event.PlaceContainer] = len(w.Targets) == 0, len(w.Targets) == 0
	for _, t := range w.Targets {
		switch t {
		case v1alpha1.TargetHost:
			s.places[event.PlaceHost] = true
		case v1alpha1.TargetContainers:
			s.places[event.PlaceContainer] = true
		}
	}
	return s
}

// covers says whether a process that runs in w, on a node with these labels,
// is in scope: True, False, or Undecided when that is not known (yet). Labels
// that are nil are not known.
func (s *scope) covers(w *event.Workload, node map[string]string) celenv.Truth {
	place := placeOf(w)
	if !s.places[place] {
		return celenv.False
	}
	onNode := s.nodes.selects(labels(node))
	if onNode == celenv.False || s.tenant == "" && s.namespaces == nil && s.pods == nil && len(s.containers) == 0 {
		return onNode
	}
	switch place {
	case event.PlaceHost:
		return celenv.False
	case event.PlaceUnknown:
		return celenv.Undecided
	}
	switch {
	case w.Pod != nil:
		return and(onNode, s.coversPod(w))
	case w.PodUID == "": // a container that no pod has
		return celenv.False
	}
	return celenv.Undecided
}

// coversPod is for a container of a pod that is known.
func (s *scope) coversPod(w *event.Workload) celenv.Truth {
	if s.tenant != "" && w.Pod.Namespace != s.tenant {
		return celenv.False
	}
	in := s.namespaces.selects(func(key string) (string, bool, bool) {
		if key == namespaceName {
			return w.Pod.Namespace, true, true
		}
		return labels(w.Pod.NamespaceLabels)(key)
	})
	pod := w.Pod.Labels
	if pod == nil {
		pod = map[string]string{} // known, and none
	}
	in = and(in, s.pods.selects(labels(pod)))
	switch {
	case len(s.containers) == 0 || slices.Contains(s.containers, w.ContainerName):
		return in
	case w.ContainerName == "" && !w.Sandbox:
		return and(in, celenv.Undecided)
	}
	return celenv.False
}

// namespaceName is the label that the API server gives every namespace.
const namespaceName = "kubernetes.io/metadata.name"

// placeOf is w's place; what cannot be told is unknown.
func placeOf(w *event.Workload) event.Place {
	if w == nil || int(w.Place) >= numPlaces {
		return event.PlaceUnknown
	}
	return w.Place
}

// and is Kleene's.
func and(a, b celenv.Truth) celenv.Truth {
	switch {
	case a == celenv.False || b == celenv.False:
		return celenv.False
	case a == celenv.True && b == celenv.True:
		return celenv.True
	}
	return celenv.Undecided
}

// A selector selects by labels.
type selector struct{ reqs []requirement }

type requirement struct {
	key    string
	op     v1alpha1.Operator
	values []string
}

func newSelector(s *v1alpha1.Selector) *selector {
	if s == nil {
		return nil
	}
	out := new(selector)
	for k, v := range s.MatchLabels {
		out.reqs = append(out.reqs, requirement{k, v1alpha1.OpIn, []string{string(v)}})
	}
	for _, r := range s.MatchExpressions {
		q := requirement{key: r.Key, op: r.Operator}
		for _, v := range r.Values {
			q.values = append(q.values, string(v))
		}
		out.reqs = append(out.reqs, q)
	}
	return out
}

// selects says whether labels fulfil all requirements. get gives a label's
// value, whether it is there, and whether that is known at all.
func (s *selector) selects(get func(key string) (value string, is, known bool)) celenv.Truth {
	t := celenv.True
	if s == nil {
		return t
	}
	for i := range s.reqs {
		r := &s.reqs[i]
		value, is, known := get(r.key)
		if !known {
			t = and(t, celenv.Undecided)
			continue
		}
		ok := false
		switch r.op {
		case v1alpha1.OpIn:
			ok = is && slices.Contains(r.values, value)
		case v1alpha1.OpNotIn:
			ok = !is || !slices.Contains(r.values, value)
		case v1alpha1.OpExists:
			ok = is
		case v1alpha1.OpDoesNotExist:
			ok = !is
		}
		if !ok {
			return celenv.False
		}
	}
	return t
}

// labels looks up in a map; nil is one that is not known.
func labels(m map[string]string) func(string) (string, bool, bool) {
	return func(key string) (string, bool, bool) {
		v, is := m[key]
		return v, is, m != nil
	}
}

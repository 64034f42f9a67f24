package kube

import "maps"

// SetNamespaces says what labels namespaces have, by name, from somebody who
// watches them; nil says that nobody does. Pods of a namespace that is not
// among them have unknown ones. The maps may not be changed afterwards.
func (p *Pods) SetNamespaces(labels map[string]map[string]string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.namespaces = labels
	old := p.now.Load()
	l := &list{pods: make(map[string]*Pod, len(old.pods)), containers: make(map[string]run, len(old.containers)), answers: old.answers}
	changed := false
	for _, pod := range old.all() {
		if !sameKnown(pod.NamespaceLabels, labels[pod.Namespace]) {
			relabelled := *pod // workloads that were found before have the old one
			relabelled.NamespaceLabels = labels[pod.Namespace]
			pod, changed = &relabelled, true
		}
		l.add(pod)
	}
	if changed {
		p.putLocked(l)
	}
}

// sameKnown tells unknown labels, which are nil, from none.
func sameKnown(a, b map[string]string) bool {
	return (a == nil) == (b == nil) && maps.Equal(a, b)
}

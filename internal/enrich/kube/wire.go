package kube

import (
	"slices"
	"strings"
	"unique"

	"github.com/procession-dev/procession/internal/event"
)

// A wirePod is what is read of a v1.Pod.
type wirePod struct {
	Metadata wireMeta   `json:"metadata"`
	Spec     wireSpec   `json:"spec"`
	Status   wireStatus `json:"status"`
}

type wireMeta struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	UID             string            `json:"uid"`
	ResourceVersion string            `json:"resourceVersion"`
	Labels          map[string]string `json:"labels"`
	Annotations     map[string]string `json:"annotations"`
	Owners          []wireOwner       `json:"ownerReferences"`
}

type wireOwner struct {
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	Controller bool   `json:"controller"`
}

type wireSpec struct {
	ServiceAccount string          `json:"serviceAccountName"`
	HostPID        bool            `json:"hostPID"`
	HostNetwork    bool            `json:"hostNetwork"`
	HostIPC        bool            `json:"hostIPC"`
	Containers     []wireContainer `json:"containers"`
	Init           []wireContainer `json:"initContainers"`
	Ephemeral      []wireContainer `json:"ephemeralContainers"`
}

type wireContainer struct {
	Name          string `json:"name"`
	Image         string `json:"image"`
	RestartPolicy string `json:"restartPolicy"`
	Security      struct {
		Privileged bool `json:"privileged"`
	} `json:"securityContext"`
	Liveness  wireHandler `json:"livenessProbe"`
	Readiness wireHandler `json:"readinessProbe"`
	Startup   wireHandler `json:"startupProbe"`
	Lifecycle struct {
		PostStart wireHandler `json:"postStart"`
		PreStop   wireHandler `json:"preStop"`
	} `json:"lifecycle"`
}

type wireHandler struct {
	Exec struct {
		Command []string `json:"command"`
	} `json:"exec"`
}

type wireStatus struct {
	Containers []wireRun `json:"containerStatuses"`
	Init       []wireRun `json:"initContainerStatuses"`
	Ephemeral  []wireRun `json:"ephemeralContainerStatuses"`
}

// A wireRun is the status of one container.
type wireRun struct {
	Name        string    `json:"name"`
	ImageID     string    `json:"imageID"`
	ContainerID string    `json:"containerID"`
	State       wireState `json:"state"`
	LastState   wireState `json:"lastState"`
}

type wireState struct {
	Terminated struct {
		ContainerID string `json:"containerID"`
	} `json:"terminated"`
}

// A Pod is what is kept of one pod. It is never changed.
type Pod struct {
	event.Pod
	Containers []event.Container
	IDs        []ContainerID
	// The uid in the cgroups of a static pod, which the API server calls by
	// another one; "" if it is no other.
	ConfigHash string
}

// A ContainerID says which container an id is one run of.
type ContainerID struct {
	ID        string // without the runtime's prefix
	Container int    // index
}

// Bounds of what is kept of one pod. Kubernetes allows less of most.
const (
	maxName       = 253
	maxLabels     = 128
	maxLabel      = 320 // key or value of a label
	maxAnnotation = 1 << 10
	maxContainers = 128
	maxCommands   = 8       // probes, and hooks, of one container
	maxCommand    = 4 << 10 // bytes of one of them
	maxImage      = 1 << 10
)

// Annotations that the kubelet sets.
const annotationHash = "kubernetes.io/config.hash"

// keep makes a Pod of what was read. ok is false for what is no pod: without a
// uid, namespace or name.
func (w *wirePod) keep(annotations []string) (p *Pod, ok bool) {
	m := &w.Metadata
	for _, s := range []string{m.Name, m.Namespace, m.UID} {
		if s == "" || len(s) > maxName {
			return nil, false
		}
	}
	p = &Pod{Pod: event.Pod{
		UID: strings.Clone(m.UID), Namespace: shared(m.Namespace), Name: strings.Clone(m.Name),
		Labels:         labels(m.Labels),
		ServiceAccount: shared(clip(w.Spec.ServiceAccount, maxName)),
		HostPID:        w.Spec.HostPID, HostNetwork: w.Spec.HostNetwork, HostIPC: w.Spec.HostIPC,
	}}
	if hash := m.Annotations[annotationHash]; hash != m.UID && len(hash) <= maxName {
		p.ConfigHash = strings.Clone(hash)
	}
	for _, key := range annotations {
		if v, ok := m.Annotations[key]; ok {
			if p.Annotations == nil {
				p.Annotations = make(map[string]string)
			}
			p.Annotations[key] = strings.Clone(clip(v, maxAnnotation))
		}
	}
	p.OwnerKind, p.OwnerName = owner(m)
	p.addContainers(w.Spec.Init, w.Status.Init, event.ContainerInit)
	p.addContainers(w.Spec.Containers, w.Status.Containers, event.ContainerRegular)
	p.addContainers(w.Spec.Ephemeral, w.Status.Ephemeral, event.ContainerEphemeral)
	p.Containers = slices.Clip(p.Containers)
	p.IDs = slices.Clip(p.IDs)
	return p, true
}

// owner is the pod's controller. A Deployment's pods belong to ReplicaSets
// called NAME-HASH, and carry the hash as a label, which the Deployment's
// controller set: a ReplicaSet somebody made by hand has none.
func owner(m *wireMeta) (kind, name string) {
	for _, o := range m.Owners {
		if !o.Controller || len(o.Name) > maxName || len(o.Kind) > maxName {
			continue
		}
		if hash := m.Labels["pod-template-hash"]; o.Kind == "ReplicaSet" && hash != "" {
			if d, ok := strings.CutSuffix(o.Name, "-"+hash); ok && d != "" {
				return "Deployment", shared(d)
			}
		}
		return shared(o.Kind), shared(o.Name)
	}
	return "", ""
}

func labels(in map[string]string) map[string]string {
	if len(in) == 0 {
		return map[string]string{} // known to be none
	}
	out := make(map[string]string, min(len(in), maxLabels))
	for k, v := range in {
		if len(out) == maxLabels {
			break
		}
		if len(k) <= maxLabel && len(v) <= maxLabel {
			out[shared(k)] = shared(v)
		}
	}
	return out
}

func (p *Pod) addContainers(spec []wireContainer, runs []wireRun, kind event.ContainerKind) {
	for i := range spec {
		if len(p.Containers) == maxContainers {
			return
		}
		s := &spec[i]
		c := event.Container{
			Name: shared(clip(s.Name, maxName)), Kind: kind, Image: shared(clip(s.Image, maxImage)),
			Privileged: s.Security.Privileged,
			Probes:     commands(s.Liveness, s.Readiness, s.Startup),
			Hooks:      commands(s.Lifecycle.PostStart, s.Lifecycle.PreStop),
		}
		if kind == event.ContainerInit && s.RestartPolicy == "Always" {
			c.Kind = event.ContainerSidecar
		}
		for j := range runs {
			if r := &runs[j]; r.Name == s.Name {
				c.ImageDigest, c.Runtime = digest(r.ImageID), runtimeOf(r.ContainerID)
				for _, id := range []string{r.ContainerID, r.State.Terminated.ContainerID, r.LastState.Terminated.ContainerID} {
					p.addID(id, len(p.Containers))
				}
			}
		}
		p.Containers = append(p.Containers, c)
	}
}

// addID takes an id as the kubelet writes it: containerd://a1b2...
func (p *Pod) addID(s string, container int) {
	if i := strings.Index(s, "://"); i >= 0 {
		s = s[i+len("://"):]
	}
	if s == "" || len(s) > maxName || slices.ContainsFunc(p.IDs, func(id ContainerID) bool { return id.ID == s }) {
		return
	}
	p.IDs = append(p.IDs, ContainerID{strings.Clone(s), container})
}

// runtimeOf is the runtime of an id as the kubelet writes it.
func runtimeOf(id string) string {
	name, _, ok := strings.Cut(id, "://")
	if !ok || len(name) > maxName {
		return ""
	}
	return shared(name)
}

// digest is that of the image's manifest, as it is signed and pinned. An image
// that came from no registry has only the id of its configuration, which is
// another thing.
func digest(imageID string) string {
	i := strings.LastIndexByte(imageID, '@')
	if i < 0 || len(imageID)-i > maxName {
		return ""
	}
	return shared(imageID[i+1:])
}

func commands(hs ...wireHandler) [][]string {
	var out [][]string
	for _, h := range hs {
		n := 0
		for _, s := range h.Exec.Command {
			n += len(s) + 1
		}
		if n == 0 || n > maxCommand || len(out) == maxCommands ||
			slices.ContainsFunc(out, func(c []string) bool { return slices.Equal(c, h.Exec.Command) }) {
			continue
		}
		c := make([]string, len(h.Exec.Command))
		for i, s := range h.Exec.Command {
			c[i] = shared(s)
		}
		out = append(out, c)
	}
	return out
}

// shared is s, in memory that all equal strings share: the pods of a node have
// most of their namespaces, labels and images in common.
func shared(s string) string {
	if s == "" {
		return ""
	}
	return unique.Make(strings.Clone(s)).Value()
}

func clip(s string, n int) string { return s[:min(len(s), n)] }

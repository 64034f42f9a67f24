// Package enrich tells of each process in which container and pod it runs.
//
// The cgroup at exec decides: a runtime moves the child into its container
// after fork, so what a process took over from its parent is only good until
// then. The path comes from the kernel's record or from /proc; both are the
// kernel's words, and package cgroup says which parts of a path a workload
// could have written itself. mountinfo, which a workload can arrange as it
// likes, is never asked.
//
// A process is on the host, in a container, or unknown, and unknown has a
// reason: it is never turned into "host". Processes of one cgroup share one
// Workload, which is never changed. Resolve does nothing but a look-up for a
// cgroup it knows: no system call, no lock, no allocation.
//
// The path gives a pod's uid; its name and its containers' come from whoever
// knows the node's pods (Config.Pods). What he does not know yet leaves the
// Workload with a Reason, and he is asked to look; as soon as he knows, the next
// Resolve gives another Workload, and Complete gives it at any time. What was
// once known of a cgroup is not forgotten when the pod is gone. When the path
// and the pods contradict each other nobody is believed: the place is unknown.
//
// Event also says how a process came to be in its container (event.Origin), and
// why a uid became 0 (event.Cause). Both are concluded from what the kernel
// recorded of the process and its ancestors; next to each conclusion stands who
// could lead it astray.
package enrich

import (
	"strings"
	"sync/atomic"

	"github.com/procession-dev/procession/internal/enrich/cgroup"
	"github.com/procession-dev/procession/internal/event"
)

// Reasons why something is unknown (event.Workload.Reason).
const (
	ReasonProcessGone   = "process-gone"         // it had ended before its cgroup could be read
	ReasonCgroupMissing = "cgroup-missing"       // its cgroup could not be read
	ReasonCgroupCut     = "cgroup-cut"           // the path is too deep to be recorded whole
	ReasonNamespace     = "namespace-ambiguous"  // the path does not say enough, seen from the agent's cgroup namespace or without the process's own namespaces
	ReasonNoContainer   = "no-container"         // in a pod's cgroup, but in none of its containers
	ReasonConflict      = "conflict"             // the cgroup says one pod, the kubelet another
	ReasonRuntime       = "runtime-unknown"      // a container of which the path says no more than an id, and no pod: nobody can be asked for its name
	ReasonNoKubelet     = "no-kubelet"           // the pod's uid is known, but nobody answers who could say its name
	ReasonNotListed     = "pod-not-listed"       // the kubelet does not list the pod, or not yet
	ReasonNoStatus      = "container-not-listed" // it lists the pod, but no container with this id, or not yet
)

// unknowns are the reasons that leave the place unknown.
var unknowns = [...]string{ReasonProcessGone, ReasonCgroupMissing, ReasonCgroupCut, ReasonNamespace, ReasonNoContainer, ReasonConflict}

// Config configures an Enricher. The zero value works.
type Config struct {
	// Bytes of memory the known cgroups may take, about 500 for each. The least
	// recently used give way. Default 4 MiB, at least one cgroup.
	CacheBytes int
	// The proc file system from which New learns how the agent sees cgroups.
	// Default /proc.
	Proc string
	// The uid of the agent's own pod (downward API), for paths that are
	// relative to it. "" if it runs in no pod, or does not know.
	PodUID string
	// Pods knows the pods of this node. Nil: nobody does.
	Pods Pods
}

// Pods knows the pods of this node (kube.Pods). All methods may be called from
// any goroutine, return at once, and do not allocate.
type Pods interface {
	// Generation changes whenever an answer of Find or Answers may have.
	Generation() uint64
	// Answers says whether somebody can be asked at present.
	Answers() bool
	// Find finds a pod by the uid that cgroups have, and the container of it
	// with an id; nil for what is not known. conflict: the id is another pod's.
	Find(uid, containerID string) (pod *event.Pod, c *event.Container, conflict bool)
	// Want asks to look for a pod, or for a container of a pod that is known.
	Want(uid, containerID string)
	// Unwant takes back a Want of what no list will ever have.
	Unwant(uid, containerID string)
}

// An Enricher finds workloads. Resolve and Event belong to one goroutine, that
// of the process table; Complete and Stats may be called from any.
type Enricher struct {
	view   view
	podUID string
	pods   Pods
	max    int

	known  map[string]*entry
	recent entry // ring: recent.next is the cgroup used last, recent.prev the one to go
	bytes  int

	host    *event.Workload
	own     *entry
	unknown [len(unknowns)]*event.Workload

	counts counts
}

// An entry is one known cgroup.
type entry struct {
	next, prev *entry
	path       string
	w          *event.Workload
	guess      bool   // only for processes with a pid namespace of their own
	pod        bool   // there is a pod to be asked for
	generation uint64 // of the pods, when w was made
}

// incompletes are the reasons that leave the pod or the container's name
// unknown. A missing runtime costs nothing else.
var incompletes = [...]string{ReasonNoKubelet, ReasonNotListed, ReasonNoStatus, ReasonNamespace, ReasonRuntime}

// counts are written by Resolve and read by Stats.
type counts struct {
	hits, misses, evicted, cgroups, bytes atomic.Uint64
	host, container                       atomic.Uint64
	conflicts                             atomic.Uint64
	incomplete                            [len(incompletes)]atomic.Uint64
	unknown                               [len(unknowns)]atomic.Uint64
}

// Stats counts since the start. Each call of Resolve is in exactly one of
// Host, Container and Unknown.
type Stats struct {
	Host      uint64
	Container uint64
	Unknown   map[string]uint64 // by reason
	// Incomplete are those of Container with a reason: the pod, or the
	// container's name, is not known.
	Incomplete map[string]uint64
	Conflicts  uint64 // cgroups whose path and pod contradict each other

	Hits    uint64 // look-ups of a known cgroup
	Misses  uint64 // paths that were parsed
	Evicted uint64 // cgroups forgotten for want of room
	Cgroups uint64 // known now
	Bytes   uint64 // they take now, about
}

const (
	defaultCacheBytes = 4 << 20
	// entryBytes is what an entry takes besides its path: itself, its place in
	// the map, the Workload, and strings that are not parts of the path.
	entryBytes = 400
)

// New makes an Enricher.
func New(c Config) *Enricher {
	if c.CacheBytes <= 0 {
		c.CacheBytes = defaultCacheBytes
	}
	if c.Proc == "" {
		c.Proc = "/proc"
	}
	e := &Enricher{
		view:   detect(c.Proc),
		podUID: c.PodUID,
		pods:   c.Pods,
		max:    c.CacheBytes,
		known:  make(map[string]*entry),
		host:   &event.Workload{Place: event.PlaceHost},
		own:    &entry{pod: c.PodUID != ""},
	}
	// Which of the pod's containers the agent's own is, its path does not say.
	e.own.w = &event.Workload{Place: event.PlaceContainer, PodUID: c.PodUID, Reason: ReasonNamespace}
	if c.PodUID != "" {
		e.own.w = &event.Workload{Place: event.PlaceContainer, PodUID: c.PodUID, Reason: ReasonNoKubelet}
	}
	e.recent.next, e.recent.prev = &e.recent, &e.recent
	for i, reason := range unknowns {
		e.unknown[i] = &event.Workload{Reason: reason}
	}
	return e
}

// Resolve sets p.Workload from p's cgroup. It is to be called again when the
// cgroup may have changed, at the latest at exec.
func (e *Enricher) Resolve(p *event.Process) {
	w := e.workload(p)
	p.Workload = w
	switch w.Place {
	case event.PlaceHost:
		e.counts.host.Add(1)
	case event.PlaceContainer:
		e.counts.container.Add(1)
		if w.Reason != "" {
			for i := range incompletes {
				if incompletes[i] == w.Reason {
					e.counts.incomplete[i].Add(1)
				}
			}
		}
	default:
		for i := range unknowns {
			if unknowns[i] == w.Reason {
				e.counts.unknown[i].Add(1)
			}
		}
	}
}

func (e *Enricher) workload(p *event.Process) *event.Workload {
	source := p.Sources[event.FieldCgroup]
	switch {
	case source == event.SourceNone && p.Exited:
		return e.because(ReasonProcessGone)
	case source == event.SourceNone:
		return e.because(ReasonCgroupMissing)
	case p.Marks.Has(event.MarkCgroupCut):
		// What is missing is the part next to the root, which decides.
		return e.because(ReasonCgroupCut)
	}
	// A record has the path from the host's root. What was read from /proc is
	// relative to the agent's cgroup namespace; what a child took over from its
	// parent may be either.
	if source != event.SourceRecord && e.view != hostView && !strings.HasPrefix(p.Cgroup, "/..") {
		switch {
		case source == event.SourceProc && e.view.private:
			return e.current(e.own) // at or below the agent's own cgroup
		case p.Cgroup == "/":
			return e.because(ReasonNamespace)
		}
	}
	n := e.lookup(p.Cgroup)
	if !n.guess {
		return e.current(n)
	}
	switch {
	case !p.Has(event.FieldNS) || p.NS.PID == 0:
		return e.because(ReasonNamespace)
	case p.NS.PID == initPIDNS:
		return e.host
	}
	return n.w
}

// current is an entry's Workload, with what the pods say by now.
func (e *Enricher) current(n *entry) *event.Workload {
	if !n.pod || e.pods == nil {
		return n.w
	}
	if g := e.pods.Generation(); g != n.generation {
		n.generation = g
		n.w = e.complete(n.w, true)
	}
	return n.w
}

// Complete is w with what is known by now: w itself if that is no more. What is
// still missing is asked for.
func (e *Enricher) Complete(w *event.Workload) *event.Workload {
	if e.pods == nil || w.PodUID == "" {
		return w
	}
	return e.complete(w, false)
}

// complete makes the Workload that the pods say, and asks for what is missing.
// A conflict is counted if count is set, by one look-up of the cgroup. Only a pod's uid that came from the cgroup leads to a pod: a
// container id alone could be the name of a cgroup that somebody made in a
// container of no pod.
func (e *Enricher) complete(w *event.Workload, count bool) *event.Workload {
	pod, c, conflict := e.pods.Find(w.PodUID, w.ContainerID)
	next := *w
	switch {
	case conflict:
		if w.Reason != ReasonConflict && count {
			e.counts.conflicts.Add(1)
		}
		next = event.Workload{ContainerID: w.ContainerID, Runtime: w.Runtime, PodUID: w.PodUID, Reason: ReasonConflict}
		if *w == next {
			return w
		}
		return &next
	case w.Reason == ReasonConflict:
		return w // who contradicted himself once is not believed later
	case pod != nil:
		next.Pod = pod
		next.Reason = ""
	case w.Pod == nil && e.pods.Answers():
		next.Reason = ReasonNotListed
	case w.Pod == nil:
		next.Reason = ReasonNoKubelet
	}
	if c != nil {
		next.Container, next.ContainerName, next.Image = c, c.Name, c.Image
		if next.Runtime == "" {
			next.Runtime = c.Runtime
		}
	}
	switch {
	case next.Pod == nil:
		e.pods.Want(w.PodUID, "")
	case w.ContainerID == "" && w.Place == event.PlaceUnknown:
		next.Reason = ReasonNoContainer
	case w.ContainerID == "":
		next.Reason = ReasonNamespace
	case next.Container == nil && !w.Sandbox:
		next.Reason = ReasonNoStatus
		e.pods.Want(w.PodUID, w.ContainerID)
	}
	if *w == next {
		return w
	}
	return &next
}

// Late says whether what w lacks may become known.
func Late(w *event.Workload) bool {
	switch w.Reason {
	case ReasonNoKubelet, ReasonNotListed, ReasonNoStatus:
		return w.PodUID != ""
	}
	return false
}

func (e *Enricher) because(reason string) *event.Workload {
	for i, r := range unknowns {
		if r == reason {
			return e.unknown[i]
		}
	}
	panic("enrich: reason without a place: " + reason)
}

// lookup finds a cgroup by its path, parses the path if it is new, and makes
// room.
func (e *Enricher) lookup(path string) *entry {
	if n, ok := e.known[path]; ok {
		e.counts.hits.Add(1)
		if e.recent.next != n {
			n.prev.next, n.next.prev = n.next, n.prev
			e.push(n)
		}
		return n
	}
	e.counts.misses.Add(1)
	path = strings.Clone(path) // it may be a part of something large
	n := &entry{path: path}
	n.w, n.guess = e.parse(path)
	n.pod = n.w.PodUID != ""
	if n.pod && e.pods != nil {
		n.generation = e.pods.Generation()
		n.w = e.complete(n.w, true)
	}
	e.known[path] = n
	e.push(n)
	e.bytes += len(path) + entryBytes
	for e.bytes > e.max && e.recent.prev != n {
		old := e.recent.prev
		old.prev.next, old.next.prev = old.next, old.prev
		delete(e.known, old.path)
		e.bytes -= len(old.path) + entryBytes
		e.counts.evicted.Add(1)
	}
	e.counts.cgroups.Store(uint64(len(e.known)))
	e.counts.bytes.Store(uint64(e.bytes))
	return n
}

func (e *Enricher) push(n *entry) {
	n.prev, n.next = &e.recent, e.recent.next
	n.prev.next, n.next.prev = n, n
}

// parse makes the Workload of a path. guess says that it only holds for
// processes that have left the host's pid namespace.
func (e *Enricher) parse(path string) (w *event.Workload, guess bool) {
	info := cgroup.Parse(e.view.absolute(path))
	switch info.Kind {
	case cgroup.Root, cgroup.Host, cgroup.Monitor:
		return e.host, false
	case cgroup.Pod:
		return &event.Workload{PodUID: info.PodUID, Reason: ReasonNoContainer}, false
	case cgroup.Node:
		// Seen from the host a node in a container is a container. Calling its
		// daemons "host" would let any container with cgroups of its own be
		// called so.
		return &event.Workload{Place: event.PlaceContainer, ContainerID: info.Of, Runtime: info.Runtime}, false
	case cgroup.Container:
		w := &event.Workload{
			Place: event.PlaceContainer, ContainerID: info.ContainerID, Runtime: info.Runtime, PodUID: info.PodUID,
		}
		switch {
		case w.PodUID != "":
			w.Reason = ReasonNoKubelet
		case info.Up == 1 && e.podUID != "": // a sibling of the agent's own container
			w.PodUID, w.Reason = e.podUID, ReasonNoKubelet
		case info.Up > 0:
			w.Reason = ReasonNamespace
		case w.Runtime == "":
			w.Reason = ReasonRuntime
		}
		return w, info.Guess
	}
	return e.because(ReasonNamespace), false
}

// Stats may be called from any goroutine.
func (e *Enricher) Stats() Stats {
	c := &e.counts
	s := Stats{
		Host: c.host.Load(), Container: c.container.Load(), Unknown: make(map[string]uint64, len(unknowns)),
		Incomplete: make(map[string]uint64, len(incompletes)), Conflicts: c.conflicts.Load(),
		Hits: c.hits.Load(), Misses: c.misses.Load(), Evicted: c.evicted.Load(),
		Cgroups: c.cgroups.Load(), Bytes: c.bytes.Load(),
	}
	for i, reason := range unknowns {
		s.Unknown[reason] = c.unknown[i].Load()
	}
	for i, reason := range incompletes {
		s.Incomplete[reason] = c.incomplete[i].Load()
	}
	return s
}

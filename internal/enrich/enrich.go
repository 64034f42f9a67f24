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
package enrich

import (
	"strings"
	"sync/atomic"

	"github.com/procession-dev/procession/internal/enrich/cgroup"
	"github.com/procession-dev/procession/internal/event"
)

// Reasons why something is unknown (event.Workload.Reason).
const (
	ReasonProcessGone   = "process-gone"        // it had ended before its cgroup could be read
	ReasonCgroupMissing = "cgroup-missing"      // its cgroup could not be read
	ReasonCgroupCut     = "cgroup-cut"          // the path is too deep to be recorded whole
	ReasonNamespace     = "namespace-ambiguous" // the path does not say enough, seen from the agent's cgroup namespace or without the process's own namespaces
	ReasonNoContainer   = "no-container"        // in a pod's cgroup, but in none of its containers
	ReasonNoKubelet     = "no-kubelet"          // the pod's uid is known, but there is nobody to ask for its name
)

// unknowns are the reasons that leave the place unknown.
var unknowns = [...]string{ReasonProcessGone, ReasonCgroupMissing, ReasonCgroupCut, ReasonNamespace, ReasonNoContainer}

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
}

// An Enricher finds workloads. Resolve belongs to one goroutine, that of the
// process table; Stats may be called from any.
type Enricher struct {
	view   view
	podUID string
	max    int

	known  map[string]*entry
	recent entry // ring: recent.next is the cgroup used last, recent.prev the one to go
	bytes  int

	host, own *event.Workload
	unknown   [len(unknowns)]*event.Workload

	counts counts
}

// An entry is one known cgroup.
type entry struct {
	next, prev *entry
	path       string
	w          *event.Workload
	guess      bool // only for processes with a pid namespace of their own
}

// counts are written by Resolve and read by Stats.
type counts struct {
	hits, misses, evicted, cgroups, bytes atomic.Uint64
	host, container                       atomic.Uint64
	unknown                               [len(unknowns)]atomic.Uint64
}

// Stats counts since the start. Each call of Resolve is in exactly one of
// Host, Container and Unknown.
type Stats struct {
	Host      uint64
	Container uint64
	Unknown   map[string]uint64 // by reason

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
		max:    c.CacheBytes,
		known:  make(map[string]*entry),
		host:   &event.Workload{Place: event.PlaceHost},
		own:    &event.Workload{Place: event.PlaceContainer, PodUID: c.PodUID, Reason: ReasonNoKubelet},
	}
	if c.PodUID == "" {
		e.own.Reason = ReasonNamespace
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
			return e.own // at or below the agent's own cgroup
		case p.Cgroup == "/":
			return e.because(ReasonNamespace)
		}
	}
	n := e.lookup(p.Cgroup)
	if !n.guess {
		return n.w
	}
	switch {
	case !p.Has(event.FieldNS) || p.NS.PID == 0:
		return e.because(ReasonNamespace)
	case p.NS.PID == initPIDNS:
		return e.host
	}
	return n.w
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
		Hits: c.hits.Load(), Misses: c.misses.Load(), Evicted: c.evicted.Load(),
		Cgroups: c.cgroups.Load(), Bytes: c.bytes.Load(),
	}
	for i, reason := range unknowns {
		s.Unknown[reason] = c.unknown[i].Load()
	}
	return s
}

package enrich

import (
	"slices"
	"strings"

	"github.com/procession-dev/procession/internal/event"
)

// Event completes ev: where its processes run, how they came there, and why a
// uid became 0. Call it once for each event, in their order.
func (e *Enricher) Event(ev *event.Event) {
	e.Resolve(ev.Process)
	if ev.Target != nil {
		e.Resolve(ev.Target)
	}
	if q := ev.Process.Parent; q != nil && q.Workload == nil {
		e.Known(q) // it had no event yet, or is in another cgroup since
	}
	switch ev.Kind {
	case event.Fork:
		ev.Process.Origin = born(ev.Process)
	case event.Exec:
		e.settle(ev.Process)
	case event.UIDChange:
		ev.Cause = cause(ev)
	}
}

// Known takes in a process that ran before the agent did, and its ancestors.
func (e *Enricher) Known(p *event.Process) {
	var line []*event.Process
	for a := p; a != nil && a.Workload == nil && len(line) < 64; a = a.Parent {
		e.Resolve(a)
		line = append(line, a)
	}
	for _, a := range slices.Backward(line) { // what the parent is decides what the child is
		if a.Origin == event.OriginUnknown {
			a.Origin = e.origin(a)
		}
	}
}

// sameContainer says whether both run in the same container.
func sameContainer(a, b *event.Process) bool {
	return a.Workload != nil && b.Workload != nil && (a.Workload == b.Workload ||
		a.Workload.Place == event.PlaceContainer && b.Workload.Place == event.PlaceContainer &&
			a.Workload.ContainerID == b.Workload.ContainerID && a.Workload.ContainerID != "")
}

// born is the origin of a process that was just made.
func born(p *event.Process) event.Origin {
	q := p.Parent
	switch {
	case p.Workload.Place != event.PlaceContainer || q == nil || !sameContainer(p, q):
		return event.OriginUnknown // the runtime's, on the way in
	case q.Origin == event.OriginSetup, q.Origin == event.OriginUnknown:
		return q.Origin
	}
	return event.OriginChild
}

// settle finds out how p came into its container, at its exec. What was found
// once stays, however often it runs other programs.
func (e *Enricher) settle(p *event.Process) {
	switch p.Origin {
	case event.OriginUnknown, event.OriginSetup:
		p.Origin = e.origin(p)
	case event.OriginEntered:
		p.Origin = p.CameBy()
	case event.OriginChild:
		// What an ancestor is may have become known since it entered.
		for a := p.Parent; a != nil && sameContainer(p, a); a = a.Parent {
			if a.Origin == event.OriginEntered {
				a.Workload = p.Workload
				a.Origin = a.CameBy()
			}
			if a.Origin != event.OriginChild {
				break
			}
		}
	}
}

// origin concludes how p came into its container.
//
// A process of the container makes its children in it, so who comes from
// outside has a creator outside: the runtime, whose command line, a host
// process's of root, says whether it made the container or entered it. Whoever
// can write such a process's command line is root on the host. Process 1 of a
// container's own pid namespace is its first without asking.
func (e *Enricher) origin(p *event.Process) event.Origin {
	w := p.Workload
	if w == nil || w.Place != event.PlaceContainer || w.ContainerID == "" {
		return event.OriginUnknown
	}
	if setup(p) {
		return event.OriginSetup
	}
	outside := p.Parent
	for outside != nil && sameContainer(p, outside) {
		switch {
		case outside.Origin == event.OriginSetup:
		case outside.Origin != event.OriginUnknown, outside.Execs > 0: // not just a step of the runtime's on the way in
			return event.OriginChild
		}
		outside = outside.Parent
	}
	own := p.Has(event.FieldNS) && p.NS.PID != 0 && p.NS.PID != initPIDNS
	first := own && p.InnerPID == 1
	verb, shim := runtimeOf(outside)
	switch {
	case w.PodUID != "" && shim == w.ContainerID && verb != "exec":
		e.sandbox(p)
		return event.OriginSetup
	case first, verb == "create", verb == "run", verb == "restore":
		return event.OriginEntry
	case outside == nil && !own:
		return event.OriginUnknown
	case verb == "" && !own && shim != "":
		return event.OriginUnknown // adopted by the shim: the runtime that made it is gone, and the pid does not tell
	}
	return asked(p)
}

// setup says whether p is the runtime's own program, run from memory or from
// outside of the container: "runc init" is a sealed copy. A program of the
// container has a name in it; one that a session starts first cannot lack it.
func setup(p *event.Process) bool {
	name, rest, _ := strings.Cut(p.Cmdline, "\x00") // by the path, if runc itself was called by it
	if command, _, _ := strings.Cut(rest, "\x00"); !p.Has(event.FieldArgs) || base(name) != "runc" || command != "init" {
		return false
	}
	const other = event.MarkMemfd | event.MarkDeleted | event.MarkDetached | event.MarkForeign | event.MarkOutsideRoot
	return p.Marks&other != 0 || p.Sources[event.FieldExe] != event.SourceRecord
}

// runtimeOf reads the command lines of p, a host process, and of those that
// made it: verb is what an OCI runtime was told to do, shim the container that
// containerd's shim was started for, which for a pod of Kubernetes is the
// sandbox.
func runtimeOf(p *event.Process) (verb, shim string) {
	for range 8 {
		if p == nil || p.Workload != nil && p.Workload.Place == event.PlaceContainer {
			return verb, shim
		}
		if p.Has(event.FieldArgs) {
			name := base(firstArg(p.Cmdline))
			switch {
			case verb == "" && (name == "runc" || name == "crun" || name == "youki" || name == "runsc" || name == "docker-runc"):
				verb = argument(p.Cmdline, isVerb)
			case strings.HasPrefix(name, "containerd-shim"):
				if flag(p.Cmdline, "-namespace") != "k8s.io" {
					return verb, "other" // one shim for each container
				}
				return verb, flag(p.Cmdline, "-id")
			case name == "conmon":
				return verb, shim
			}
		}
		p = p.Parent
	}
	return verb, shim
}

func isVerb(s string) bool {
	switch s {
	case "create", "run", "exec", "restore":
		return true
	}
	return false
}

// sandbox gives p's cgroup a Workload that says it holds the pod's namespaces.
// It was wanted since the runtime's first step in it; the kubelet lists no
// sandbox, and looking for each pod's would cost a list or two a second until
// that is given up.
func (e *Enricher) sandbox(p *event.Process) {
	w := *p.Workload
	if e.pods != nil && !w.Sandbox && w.Container == nil {
		e.pods.Unwant(w.PodUID, w.ContainerID)
	}
	w.Sandbox = true
	if w.Reason == ReasonNoStatus {
		w.Reason = ""
	}
	p.Workload = &w
	if n := e.known[p.Cgroup]; n != nil && n.w.ContainerID == w.ContainerID {
		n.w = &w
	}
}

// asked is the origin of a process that was put into its container.
func asked(p *event.Process) event.Origin {
	if p.Workload.PodUID == "" {
		return event.OriginSession // no pod, no probes
	}
	p.Origin = event.OriginEntered
	return p.CameBy()
}

func firstArg(cmdline string) string {
	s, _, _ := strings.Cut(cmdline, "\x00")
	return s
}

// argument is the first argument but the first that fits.
func argument(cmdline string, fits func(string) bool) string {
	_, rest, more := strings.Cut(cmdline, "\x00")
	for more {
		var s string
		s, rest, more = strings.Cut(rest, "\x00")
		if fits(s) {
			return s
		}
	}
	return ""
}

// flag is the argument behind the flag name.
func flag(cmdline, name string) string {
	found := false
	return argument(cmdline, func(s string) bool {
		was := found
		found = s == name
		return was
	})
}

func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

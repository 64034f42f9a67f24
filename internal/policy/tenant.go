package policy

import (
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// maxView bounds the processes of a view. A longer lineage breaks off.
const maxView = 64

// A view is an event as a namespace may see it: nothing of a process outside
// its pod. Expressions see no more than that by themselves; the view is what
// an alert is made of. It is a copy, because a Process is shared by all that
// look at it.
type view struct {
	ev     event.Event
	procs  []event.Process
	target event.Process
}

// of makes the view of ev. It is valid until the next call.
func (v *view) of(ev *event.Event) *event.Event {
	v.ev = *ev
	v.ev.Process = v.lineage(ev.Process)
	if t := ev.Target; t != nil {
		v.ev.Target = nil
		if sees, _ := celenv.TenantSees(ev.Process, t); sees {
			v.target = *t
			end(&v.target, event.SourceNone)
			v.ev.Target = &v.target
		}
	}
	return &v.ev
}

// lineage copies p and its ancestors within the pod. The first process of a
// container has no parent for a namespace, as it has none for those who look
// from inside: its ppid is 0. Where it is not known whether a parent runs in
// the pod, the lineage breaks off: what is beyond is missing.
func (v *view) lineage(p *event.Process) *event.Process {
	self, n := p, 1
	for q := p.Parent; q != nil && n < maxView; q = q.Parent {
		if sees, _ := celenv.TenantSees(self, q); !sees {
			break
		}
		n++
	}
	if cap(v.procs) < n {
		v.procs = make([]event.Process, n, maxView)
	}
	v.procs = v.procs[:n]
	for i := range v.procs {
		v.procs[i] = *p
		if i+1 < n {
			v.procs[i].Parent, p = &v.procs[i+1], p.Parent
			continue
		}
		source := event.SourceNone
		if sees, known := celenv.TenantSees(self, p.Parent); known && !sees {
			source = event.SourceLineage
		}
		end(&v.procs[i], source)
	}
	return &v.procs[0]
}

// end makes p the last of a lineage: without a parent, or, where the source is
// none, with one of whom nothing is known.
func end(p *event.Process, parent event.Source) {
	p.Parent, p.PPID, p.ParentStart = nil, 0, 0
	p.Sources[event.FieldParent] = parent
}

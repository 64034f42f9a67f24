package policy

import (
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// Aggregated says which matches an alert stands for, when it is not one.
type Aggregated struct {
	Count   uint64 // matches: the repeats after the first, or all that reached the threshold
	First   uint64 // Seq of the alert they repeat; 0: there is none
	Why     Why
	From    time.Time // of the first match: of the one that is repeated, if there is one
	Until   time.Time // of the last
	Samples []Sample  // some of them: the first ones, and the last
}

// A Why says why matches are summed up now.
type Why string

// Reasons to sum up.
const (
	WhyThreshold Why = "threshold" // so many matched in the window
	WhyWindow    Why = "window"    // the window of aggregation is over
	WhyEvicted   Why = "evicted"   // there was no room for it any longer
	WhyPolicy    Why = "policy"    // the rule was changed or removed
	WhyEnd       Why = "end"       // the agent stops
)

// A Sample is one of the matches that are summed up. Its text is what the
// process chose.
type Sample struct {
	Time    time.Time
	PID     int32
	HasUID  bool // UID is known
	UID     uint32
	Exe     string // at most maxSampleText bytes, as is Cmdline
	Cmdline string // argv, each argument ends with NUL
}

const (
	maxSamples    = 5
	maxSampleText = 256
)

// samples keeps the first few and the last.
type samples struct{ list []Sample }

func (s *samples) add(ev *event.Event) {
	p := ev.Process
	x := Sample{Time: ev.Time, PID: p.PID, Exe: short(p.Exe, maxSampleText), Cmdline: short(p.Cmdline, maxSampleText)}
	if p.Has(event.FieldIDs) {
		x.HasUID, x.UID = true, p.UID
	}
	if len(s.list) == maxSamples {
		s.list[maxSamples-1] = x
		return
	}
	s.list = append(s.list, x)
}

// bytes is about how much memory it takes.
func (s *samples) bytes() int {
	n := 0
	for i := range s.list {
		n += sampleBytes + len(s.list[i].Exe) + len(s.list[i].Cmdline)
	}
	return n
}

const sampleBytes, processBytes = 96, 768 // without texts

// bytes is about how much memory a match takes whose event is a copy.
func (m *Match) bytes() int {
	n := len(m.Message)
	for i := range m.Evidence {
		x := &m.Evidence[i]
		n += sampleBytes + len(x.Text) + len(x.Term)
		for _, f := range x.Found {
			n += len(f)
		}
	}
	for _, p := range []*event.Process{m.Event.Process, m.Event.Target} {
		for ; p != nil; p = p.Parent {
			n += processBytes + len(p.Cmdline) + len(p.Exe) + len(p.Cwd) + len(p.Cgroup) + len(p.File) + len(p.Name)
		}
	}
	return n
}

// short keeps at most limit bytes of s, and nothing of what it was cut from.
func short(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.Clone(s[:limit])
}

// bounds of a copy, in bytes but for the ancestors.
type bounds struct{ args, path, ancestors, ancestorArgs, ancestorPath int }

var (
	// late is for what is judged again: expressions see no more than this.
	late = bounds{args: 16 << 10, path: 4 << 10, ancestors: maxView, ancestorArgs: 8 << 10, ancestorPath: 4 << 10}
	// repeat is for what is only told.
	repeat = bounds{args: 2 << 10, path: 1 << 10, ancestors: 16, ancestorArgs: 256, ancestorPath: 256}
)

// Snapshot copies an event for Reconsider, bounded: what a process chose to be
// called cannot make it large. A lineage or an argv that is cut says so.
func Snapshot(ev *event.Event) *event.Event { return late.copy(ev) }

func (b bounds) copy(ev *event.Event) *event.Event {
	out := *ev
	if ev.Record != nil {
		r := *ev.Record
		r.Facts = event.Facts{} // it belongs to the reader, and what matters of it is in the process
		out.Record = &r
	}
	out.Process = b.process(ev.Process, b.ancestors, b.args, b.path)
	if ev.Target != nil {
		out.Target = b.process(ev.Target, 0, b.args, b.path)
	}
	out.PrevName = short(ev.PrevName, b.path)
	return &out
}

func (b bounds) process(p *event.Process, ancestors, args, path int) *event.Process {
	out := *p
	out.Cmdline = short(p.Cmdline, args)
	cut := func(s *string, mark event.Marks) {
		if len(*s) > path {
			*s = strings.Clone((*s)[len(*s)-path:]) // the last bytes of a path say most
			out.Marks |= mark
		}
	}
	cut(&out.Exe, event.MarkExeCut)
	cut(&out.Cwd, event.MarkCwdCut)
	cut(&out.Cgroup, event.MarkCgroupCut)
	out.File, out.Name = short(p.File, path), short(p.Name, path)
	if out.Parent = nil; p.Parent != nil && ancestors > 0 {
		out.Parent = b.process(p.Parent, ancestors-1, b.ancestorArgs, b.ancestorPath)
	}
	return &out
}

package policytest

import (
	gojson "encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/internal/event"
)

// A File is a test file.
type File struct {
	// Policies are the files the cases are about, relative to the test file.
	Policies []string `json:"policies"`
	// Namespaces are the labels of namespaces, by name. One that is not here
	// has none.
	Namespaces map[string]map[string]string `json:"namespaces"`
	Node       Node                         `json:"node"`
	Cases      []Case                       `json:"cases"`
}

// Node is the node the agent runs on.
type Node struct {
	Name   string            `json:"name"` // node-1, when not given
	Labels map[string]string `json:"labels"`
}

// A Case is some events and what rules make of all of them together. A rule
// is named by its name, or by policy/name where that is not enough.
type Case struct {
	Name string `json:"name"`
	// Events are each an Event, or an event as the agent prints it. They do
	// not go back in time.
	Events []gojson.RawMessage `json:"events"`
	// Until is how long after the first moment the case ends, like 10m: what
	// is summed up by then, is. The last event, when not given.
	Until string `json:"until"`
	// Expect lists the matches.
	Expect []Expect `json:"expect"`
	// Quiet lists rules that see the events and do not match.
	Quiet []string `json:"quiet"`
	// Undecided, Suppressed and Errors list rules that end so for some event,
	// RateLimited those with alerts beyond their policy's limit.
	Undecided   []string `json:"undecided"`
	Suppressed  []string `json:"suppressed"`
	Errors      []string `json:"errors"`
	RateLimited []string `json:"rateLimited"`
}

// Expect is an alert, or several of the same rule.
type Expect struct {
	Rule      string `json:"rule"`
	Count     *int   `json:"count"`    // alerts; 1, when not given. Those that sum up repeats do not count
	Repeats   uint64 `json:"repeats"`  // matches that were held back by aggregation, and summed up
	Stands    uint64 `json:"stands"`   // matches each alert stands for by its threshold; any, when not given
	Severity  string `json:"severity"` // any, when not given
	Message   string `json:"message"`  // part of the message
	Mode      string `json:"mode"`     // Alert, when not given
	Undecided bool   `json:"undecided"`
}

// Event is an event.
type Event struct {
	Kind    string    `json:"kind"`
	Time    time.Time `json:"time"` // 2026-01-02T03:04:05Z, when not given
	At      string    `json:"at"`   // how long after that it happens, like 90s: not together with time
	Process Process   `json:"process"`
	Parent  *Process  `json:"parent"`
	Target  *Process  `json:"target"`
	// Place is host, container or unknown. Container, when there is one of
	// the next three; else host.
	Place         string `json:"place"`
	Container     string `json:"container"`
	ContainerName string `json:"containerName"`
	Image         string `json:"image"`
	ImageDigest   string `json:"imageDigest"`
	ContainerKind string `json:"containerKind"` // regular, when the kubelet told name or image
	Privileged    bool   `json:"privileged"`
	Pod           *Pod   `json:"pod"`
	From          *IDs   `json:"from"` // UIDChange, GIDChange: the ids before; missing, when not given
	FromName      string `json:"fromName"`
	Cause         string `json:"cause"`     // UIDChange: change.cause; missing, when not given and an id became 0
	ChangeExe     string `json:"changeExe"` // UIDChange, GIDChange: change.exe; missing, when not given
	Exit          Exit   `json:"exit"`
	Synthetic     bool   `json:"synthetic"`
}

// Pod is a pod; Unknown is one of which only the uid is known yet.
type Pod struct {
	UID            string            `json:"uid"`
	Namespace      string            `json:"namespace"`
	Name           string            `json:"name"`
	Labels         map[string]string `json:"labels"`
	ServiceAccount string            `json:"serviceAccount"`
	OwnerKind      string            `json:"ownerKind"`
	OwnerName      string            `json:"ownerName"`
	Annotations    map[string]string `json:"annotations"`
	HostPID        bool              `json:"hostPID"`
	HostNetwork    bool              `json:"hostNetwork"`
	HostIPC        bool              `json:"hostIPC"`
	Unknown        bool              `json:"unknown"`
	Missing        []string          `json:"missing"` // namespaceLabels
}

func (p *Pod) pod() *event.Pod {
	return &event.Pod{UID: p.UID, Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, ServiceAccount: p.ServiceAccount,
		OwnerKind: p.OwnerKind, OwnerName: p.OwnerName, Annotations: p.Annotations, HostPID: p.HostPID, HostNetwork: p.HostNetwork, HostIPC: p.HostIPC}
}

// IDs are ids; the ones that are not given are as uid and gid.
type IDs struct {
	UID  uint32  `json:"uid"`
	EUID *uint32 `json:"euid"`
	SUID *uint32 `json:"suid"`
	GID  uint32  `json:"gid"`
	EGID *uint32 `json:"egid"`
}

// Exit is how a process ended.
type Exit struct {
	Code       uint8 `json:"code"`
	Signal     uint8 `json:"signal"`
	CoreDumped bool  `json:"coreDumped"`
	DurationMs int64 `json:"durationMs"`
}

// Process is a process; the names are those of the variables.
type Process struct {
	IDs
	PID          int32    `json:"pid"`
	InnerPID     int32    `json:"innerPid"` // as pid, when not given
	Exe          string   `json:"exe"`
	Name         string   `json:"name"`
	File         string   `json:"file"`
	Args         []string `json:"args"`
	Cwd          string   `json:"cwd"`
	LoginUID     *uint32  `json:"loginuid"`
	SessionID    int32    `json:"sessionId"`
	TTY          int32    `json:"tty"`
	Capabilities uint64   `json:"capabilities"` // effective, as a number
	NoNewPrivs   bool     `json:"noNewPrivs"`
	Truncated    bool     `json:"truncated"`

	ExeUpperLayer  bool `json:"exeUpperLayer"`
	ExeMemfd       bool `json:"exeMemfd"`
	ExeDeleted     bool `json:"exeDeleted"`
	ExeForeign     bool `json:"exeForeign"`
	ExeOutsideRoot bool `json:"exeOutsideRoot"`
	ExeDetached    bool `json:"exeDetached"`
	ExeSetuid      bool `json:"exeSetuid"`

	// Origin is how it came into its container: child, when not given.
	Origin string `json:"origin"`
	// Host: it runs on the host, though the event is a container's. Parents
	// of who was put into a container do.
	Host   bool     `json:"host"`
	Parent *Process `json:"parent"`
	// Missing lists what could not be read: start, parent, name, exe, file,
	// args, cwd, ids, caps, cgroup, ns, session, login, noNewPrivs, exeFile,
	// upperLayer, and origin.
	Missing []string `json:"missing"`
}

// decode reads a test file, strictly.
func decode(data []byte) (*File, error) {
	asJSON, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return nil, err
	}
	var f File
	strict, err := json.UnmarshalStrict(asJSON, &f)
	if err = errors.Join(append(strict, err)...); err != nil {
		return nil, err
	}
	if len(f.Policies) == 0 || len(f.Cases) == 0 {
		return nil, fmt.Errorf("policies and cases must be given")
	}
	return &f, nil
}

// epoch is when the events of a case happen that do not say when.
var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// parseEvent reads one event: an Event, strictly, or one that the agent
// printed, which may have at besides. namespaces are labels by namespace.
func parseEvent(data []byte, namespaces map[string]map[string]string) (*event.Event, error) {
	var e Event
	if isRecorded(data) {
		out, err := recorded(data)
		if err != nil {
			return nil, err
		}
		if err := json.UnmarshalCaseSensitivePreserveInts(data, &struct {
			At *string `json:"at"`
		}{&e.At}); err != nil {
			return nil, err
		}
		if e.At != "" {
			out.Time, err = e.when()
		}
		if p := out.Process.Workload.Pod; p != nil && p.NamespaceLabels == nil {
			p.NamespaceLabels = namespaces[p.Namespace]
		}
		return out, err
	}
	strict, err := json.UnmarshalStrict(data, &e)
	if err = errors.Join(append(strict, err)...); err != nil {
		return nil, err
	}
	return e.build(namespaces)
}

func (e *Event) when() (time.Time, error) {
	if e.At == "" {
		if e.Time.IsZero() {
			return epoch, nil
		}
		return e.Time, nil
	}
	if !e.Time.IsZero() {
		return epoch, fmt.Errorf("at: stands beside time; only one of them is allowed")
	}
	d, err := time.ParseDuration(e.At)
	if err != nil || d < 0 {
		return epoch, fmt.Errorf("at: %.64q is no length of time like 90s or 2h", e.At)
	}
	return epoch.Add(d), nil
}

func (e *Event) build(namespaces map[string]map[string]string) (*event.Event, error) {
	kind, ok := event.KindByName(e.Kind)
	if !ok {
		return nil, fmt.Errorf("kind: there is no kind %q", e.Kind)
	}
	w, err := e.workload(namespaces)
	if err != nil {
		return nil, err
	}
	b := &builder{pid: 100, workload: w}
	p, err := b.process(&e.Process)
	if err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	if e.Parent != nil {
		if p.Parent, err = b.process(e.Parent); err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
		p.PPID = p.Parent.PID
	}
	when, err := e.when()
	if err != nil {
		return nil, err
	}
	out := &event.Event{Kind: kind, Time: when, Process: p, Synthetic: e.Synthetic, PrevName: e.FromName, HasPrev: e.FromName != "",
		Status:   uint32(e.Exit.Code)<<8 | uint32(e.Exit.Signal),
		Duration: time.Duration(e.Exit.DurationMs) * time.Millisecond}
	if e.Exit.CoreDumped {
		out.Status |= 0x80
	}
	if e.From != nil {
		out.Before, out.HasBefore = e.From.build(), true
	}
	if e.Target != nil {
		if out.Target, err = b.process(e.Target); err != nil {
			return nil, fmt.Errorf("target: %w", err)
		}
	}
	var known bool
	if out.Cause, known = causes[e.Cause]; !known {
		return nil, fmt.Errorf("cause: there is no cause %.64q", e.Cause)
	}
	if e.ChangeExe != "" {
		changedBy(out, e.ChangeExe)
	}
	return out, nil
}

// A builder makes the processes of an event.
type builder struct {
	pid      int32 // of the last one that nobody gave a pid
	workload *event.Workload
}

func (e *Event) workload(namespaces map[string]map[string]string) (*event.Workload, error) {
	w := &event.Workload{Place: event.PlaceHost, ContainerID: e.Container, ContainerName: e.ContainerName, Image: e.Image}
	if e.Container != "" || e.Image != "" || e.Pod != nil {
		w.Place = event.PlaceContainer
	}
	if e.Place != "" {
		var ok bool
		if w.Place, ok = places[e.Place]; !ok {
			return nil, fmt.Errorf("place: %.64q is none of host, container, unknown", e.Place)
		}
	}
	if e.ContainerName+e.Image+e.ImageDigest+e.ContainerKind != "" || e.Privileged {
		kind := e.ContainerKind
		if kind == "" {
			kind = event.ContainerRegular.String()
		}
		var ok bool
		if w.Container, ok = kubelets(kind); !ok {
			return nil, fmt.Errorf("containerKind: there is no kind %.64q", kind)
		}
		w.Container.Name, w.Container.Image, w.Container.ImageDigest, w.Container.Privileged = e.ContainerName, e.Image, e.ImageDigest, e.Privileged
	}
	if p := e.Pod; p != nil {
		if w.PodUID = p.UID; w.PodUID == "" {
			w.PodUID = "uid-of-" + p.Name
		}
		if p.Unknown {
			return w, nil
		}
		w.Pod = p.pod()
		w.Pod.UID, w.Pod.NamespaceLabels = w.PodUID, namespaces[p.Namespace]
		if w.Pod.NamespaceLabels == nil {
			w.Pod.NamespaceLabels = map[string]string{} // known, and none
		}
		for _, m := range p.Missing {
			if m != "namespaceLabels" {
				return nil, fmt.Errorf("pod: missing: there is no fact %.64q", m)
			}
			w.Pod.NamespaceLabels = nil
		}
	}
	return w, nil
}

func (i *IDs) build() event.IDs {
	out := event.IDs{UID: i.UID, EUID: i.UID, SUID: i.UID, GID: i.GID, EGID: i.GID, SGID: i.GID}
	if i.EUID != nil {
		out.EUID, out.SUID = *i.EUID, *i.EUID // as exec leaves them
	}
	if i.SUID != nil {
		out.SUID = *i.SUID
	}
	if i.EGID != nil {
		out.EGID = *i.EGID
	}
	return out
}

func (b *builder) process(p *Process) (*event.Process, error) {
	out := &event.Process{
		PID: p.PID, InnerPID: p.InnerPID, SID: p.SessionID, TTY: p.TTY, LoginUID: 4294967295,
		IDs: p.IDs.build(), CapEffective: p.Capabilities, NoNewPrivs: p.NoNewPrivs,
		Name: p.Name, Exe: p.Exe, File: p.File, Cwd: p.Cwd, Marks: event.MarkUpperKnown,
	}
	if out.PID == 0 {
		b.pid++
		out.PID = b.pid
	}
	if out.InnerPID == 0 {
		out.InnerPID = out.PID
	}
	if p.LoginUID != nil {
		out.LoginUID = *p.LoginUID
	}
	for _, a := range p.Args {
		if strings.Contains(a, "\x00") {
			return nil, fmt.Errorf("args: an argument holds NUL")
		}
		out.Cmdline += a + "\x00"
	}
	out.CmdlineLen = uint32(len(out.Cmdline))
	if p.Truncated {
		out.CmdlineLen++
	}
	for m, set := range map[event.Marks]bool{
		event.MarkUpper: p.ExeUpperLayer, event.MarkMemfd: p.ExeMemfd, event.MarkDeleted: p.ExeDeleted,
		event.MarkForeign: p.ExeForeign, event.MarkOutsideRoot: p.ExeOutsideRoot, event.MarkDetached: p.ExeDetached,
	} {
		if set {
			out.Marks |= m
		}
	}
	if out.ExeFile.Mode = 0o100755; p.ExeSetuid {
		out.ExeFile.Mode |= 0o4000
	}
	return out, b.know(p, out)
}

// know says what is known about out, and who its parent is.
func (b *builder) know(p *Process, out *event.Process) error {
	var ok bool
	if out.Origin, ok = origins[p.Origin]; !ok {
		return fmt.Errorf("origin: there is no origin %.64q", p.Origin)
	}
	switch out.Workload = b.workload; {
	case p.Host:
		out.Workload = &event.Workload{Place: event.PlaceHost}
	case p.Origin == "" && b.workload.Place == event.PlaceContainer:
		out.Origin = event.OriginChild
	}
	for f := range out.Sources {
		out.Sources[f] = event.SourceRecord
	}
	for _, name := range p.Missing {
		switch name {
		case "upperLayer":
			out.Marks &^= event.MarkUpper | event.MarkUpperKnown
			continue
		case "origin":
			out.Origin = event.OriginUnknown
			continue
		}
		f := event.Field(0)
		for f < event.NumFields && f.String() != name {
			f++
		}
		if f == event.NumFields {
			return fmt.Errorf("missing: there is no fact %q", name)
		}
		out.Sources[f] = event.SourceNone
	}
	switch {
	case p.Parent != nil:
		parent, err := b.process(p.Parent)
		if err != nil {
			return fmt.Errorf("parent: %w", err)
		}
		out.Parent, out.PPID = parent, parent.PID
	case out.PID != 1 && out.Has(event.FieldParent):
		out.Parent, out.PPID = hostInit(), 1
	}
	return nil
}

// hostInit is the parent of whoever has no other.
func hostInit() *event.Process {
	p := &event.Process{PID: 1, InnerPID: 1, Name: "systemd", Exe: "/usr/lib/systemd/systemd",
		Cmdline: "/sbin/init\x00", CmdlineLen: 11, LoginUID: 4294967295, Marks: event.MarkUpperKnown, Workload: &event.Workload{Place: event.PlaceHost}}
	for f := range p.Sources {
		p.Sources[f] = event.SourceRecord
	}
	return p
}

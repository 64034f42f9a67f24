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
	Cases    []Case   `json:"cases"`
}

// A Case is some events and what rules make of all of them together. A rule
// is named by its name, or by policy/name where that is not enough.
type Case struct {
	Name string `json:"name"`
	// Events are each an Event, or an event as the agent prints it.
	Events []gojson.RawMessage `json:"events"`
	// Expect lists the matches.
	Expect []Expect `json:"expect"`
	// Quiet lists rules that see the events and do not match.
	Quiet []string `json:"quiet"`
	// Undecided, Suppressed and Errors list rules that end so for some event.
	Undecided  []string `json:"undecided"`
	Suppressed []string `json:"suppressed"`
	Errors     []string `json:"errors"`
}

// Expect is a match, or several of the same rule.
type Expect struct {
	Rule      string `json:"rule"`
	Count     *int   `json:"count"`    // 1, when not given
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
	Pod           *Pod   `json:"pod"`
	From          *IDs   `json:"from"` // UIDChange, GIDChange: the ids before; missing, when not given
	FromName      string `json:"fromName"`
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
	Unknown        bool              `json:"unknown"`
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

	Parent *Process `json:"parent"`
	// Missing lists what could not be read: start, parent, name, exe, file,
	// args, cwd, ids, caps, cgroup, ns, session, login, noNewPrivs, exeFile,
	// and upperLayer.
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
// printed, which may have at besides.
func parseEvent(data []byte) (*event.Event, error) {
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
		return out, err
	}
	strict, err := json.UnmarshalStrict(data, &e)
	if err = errors.Join(append(strict, err)...); err != nil {
		return nil, err
	}
	return e.build()
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

func (e *Event) build() (*event.Event, error) {
	kind, ok := event.KindByName(e.Kind)
	if !ok {
		return nil, fmt.Errorf("kind: there is no kind %q", e.Kind)
	}
	next := int32(100) // pids that nobody gave
	p, err := e.Process.build(&next)
	if err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	if e.Parent != nil {
		if p.Parent, err = e.Parent.build(&next); err != nil {
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
		if out.Target, err = e.Target.build(&next); err != nil {
			return nil, fmt.Errorf("target: %w", err)
		}
	}
	p.Workload, err = e.workload()
	return out, err
}

func (e *Event) workload() (*event.Workload, error) {
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
	if p := e.Pod; p != nil {
		if w.PodUID = p.UID; w.PodUID == "" {
			w.PodUID = "uid-of-" + p.Name
		}
		if !p.Unknown {
			w.Pod = &event.Pod{UID: w.PodUID, Namespace: p.Namespace, Name: p.Name, Labels: p.Labels,
				ServiceAccount: p.ServiceAccount, OwnerKind: p.OwnerKind, OwnerName: p.OwnerName}
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

func (p *Process) build(next *int32) (*event.Process, error) {
	out := &event.Process{
		PID: p.PID, InnerPID: p.InnerPID, SID: p.SessionID, TTY: p.TTY, LoginUID: 4294967295,
		IDs: p.IDs.build(), CapEffective: p.Capabilities, NoNewPrivs: p.NoNewPrivs,
		Name: p.Name, Exe: p.Exe, File: p.File, Cwd: p.Cwd, Marks: event.MarkUpperKnown,
	}
	if out.PID == 0 {
		*next++
		out.PID = *next
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
	return out, p.know(out, next)
}

// know says what is known about out, and who its parent is.
func (p *Process) know(out *event.Process, next *int32) error {
	for f := range out.Sources {
		out.Sources[f] = event.SourceRecord
	}
	for _, name := range p.Missing {
		if name == "upperLayer" {
			out.Marks &^= event.MarkUpper | event.MarkUpperKnown
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
		parent, err := p.Parent.build(next)
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
		Cmdline: "/sbin/init\x00", CmdlineLen: 11, LoginUID: 4294967295, Marks: event.MarkUpperKnown}
	for f := range p.Sources {
		p.Sources[f] = event.SourceRecord
	}
	return p
}

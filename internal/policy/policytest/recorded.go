package policytest

import (
	"encoding/base64"
	gojson "encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/json"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/present"
)

// maxAncestors bounds the lineage of an event; an alert has as many.
const maxAncestors = 64

// A recordedEvent is an event or an alert as the agent prints it
// (docs/events.md): a fact that is not known is a key that is not there.
type recordedEvent struct {
	Kind      string            `json:"kind"`
	Time      time.Time         `json:"time"`
	Synthetic bool              `json:"synthetic"`
	Process   *recordedProcess  `json:"process"`
	Parent    *recordedProcess  `json:"parent"`
	Target    *recordedProcess  `json:"target"`
	Sources   map[string]string `json:"sources"`
	Stamp     string            `json:"stamp"`

	Change *struct {
		From       *recordedIDs `json:"from"`
		To         *recordedIDs `json:"to"`
		Cause      string       `json:"cause"`
		Exe        *string      `json:"exe"`
		ExeRaw     string       `json:"exeRaw"`
		CapsBefore []string     `json:"capabilitiesBefore"`
	} `json:"change"`
	Exit *struct {
		Code            int    `json:"code"`
		Signal          string `json:"signal"`
		CoreDumped      bool   `json:"coreDumped"`
		DurationSeconds number `json:"durationSeconds"`
	} `json:"exit"`

	Place       string `json:"place"`
	PlaceReason string `json:"placeReason"`
	Container   *struct {
		ID          string `json:"id"`
		Name        string `json:"name"`
		Image       string `json:"image"`
		Runtime     string `json:"runtime"`
		ImageDigest string `json:"imageDigest"`
		Kind        string `json:"kind"`
		Privileged  bool   `json:"privileged"`
		Sandbox     bool   `json:"sandbox"`
	} `json:"container"`
	Pod *Pod `json:"pod"`
}

// number is a JSON number as it was written.
type number = gojson.Number

type recordedIDs struct {
	UID   *uint32 `json:"uid"`
	GID   uint32  `json:"gid"`
	SUID  uint32  `json:"suid"`
	SGID  uint32  `json:"sgid"`
	EUID  uint32  `json:"euid"`
	EGID  uint32  `json:"egid"`
	FSUID uint32  `json:"fsuid"`
	FSGID uint32  `json:"fsgid"`

	Name    *string `json:"name"` // of a CommChange
	NameRaw string  `json:"nameRaw"`
}

func (i *recordedIDs) ids() event.IDs {
	return event.IDs{UID: *i.UID, GID: i.GID, SUID: i.SUID, SGID: i.SGID, EUID: i.EUID, EGID: i.EGID, FSUID: i.FSUID, FSGID: i.FSGID}
}

type recordedProcess struct {
	recordedIDs
	PID        int32    `json:"pid"`
	PPID       *int32   `json:"ppid"`
	Start      string   `json:"start"`
	Exe        *string  `json:"exe"`
	ExeRaw     string   `json:"exeRaw"`
	File       *string  `json:"file"`
	FileRaw    string   `json:"fileRaw"`
	Args       []string `json:"args"`
	ArgsRaw    string   `json:"argsRaw"`
	ArgsBytes  uint32   `json:"argsBytes"`
	Cwd        *string  `json:"cwd"`
	CwdRaw     string   `json:"cwdRaw"`
	Cgroup     *string  `json:"cgroup"`
	CgroupRaw  string   `json:"cgroupRaw"`
	SID        *int32   `json:"sid"`
	TTY        int32    `json:"tty"`
	LoginUID   *uint32  `json:"loginuid"`
	InnerPID   int32    `json:"innerPid"`
	NoNewPrivs *bool    `json:"noNewPrivs"`

	Capabilities          []string `json:"capabilities"`
	CapabilitiesPermitted []string `json:"capabilitiesPermitted"`
	NS                    *struct {
		PID  uint32 `json:"pid"`
		Mnt  uint32 `json:"mnt"`
		User uint32 `json:"user"`
		Net  uint32 `json:"net"`
	} `json:"ns"`
	ExeFile *struct {
		Mode string `json:"mode"`
		UID  uint32 `json:"uid"`
		GID  uint32 `json:"gid"`
	} `json:"exeFile"`
	Origin    string            `json:"origin"`
	Marks     []string          `json:"marks"`
	Exited    bool              `json:"exited"`
	Ancestors []recordedProcess `json:"ancestors"`
	Cut       bool              `json:"ancestorsTruncated"`
	Sources   map[string]string `json:"sources"`
}

// isRecorded says whether an event is one that the agent printed: it names
// the sources of its facts, or the kernel's time.
func isRecorded(data []byte) bool {
	var probe struct {
		Sources gojson.RawMessage `json:"sources"`
		Stamp   gojson.RawMessage `json:"stamp"`
	}
	_ = json.UnmarshalCaseSensitivePreserveInts(data, &probe) // what is wrong is found again, and told, by who decodes it
	return probe.Sources != nil || probe.Stamp != nil
}

// recorded reads an event that the agent printed. Keys it does not know are
// left alone: a newer agent prints more.
func recorded(data []byte) (*event.Event, error) {
	var r recordedEvent
	if err := json.UnmarshalCaseSensitivePreserveInts(data, &r); err != nil {
		return nil, err
	}
	kind, ok := event.KindByName(r.Kind)
	switch {
	case slices.Contains(noEvents, r.Kind):
		return nil, fmt.Errorf("kind: %s is no event of a process", r.Kind)
	case !ok:
		return nil, fmt.Errorf("kind: there is no kind %.64q", r.Kind)
	case r.Process == nil:
		return nil, fmt.Errorf("process: is missing")
	}
	p, err := r.Process.build(r.Sources)
	if err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	out := &event.Event{Kind: kind, Time: r.Time, Synthetic: r.Synthetic, Process: p}
	if r.Stamp != "" {
		if out.Stamp, err = strconv.ParseUint(r.Stamp, 10, 64); err != nil {
			return nil, fmt.Errorf("stamp: %.64q is no number", r.Stamp)
		}
	}
	if p.Workload, err = r.workload(); err != nil {
		return nil, err
	}
	if err := r.lineage(p); err != nil {
		return nil, err
	}
	if r.Target != nil {
		if out.Target, err = r.Target.build(r.Target.Sources); err != nil {
			return nil, fmt.Errorf("target: %w", err)
		}
	}
	return out, r.details(out)
}

// lineage puts the ancestors above p. Beyond the last one nothing is known.
func (r *recordedEvent) lineage(p *event.Process) error {
	list := r.Process.Ancestors
	if len(list) == 0 && r.Parent != nil {
		list = []recordedProcess{*r.Parent}
	}
	if len(list) > maxAncestors {
		return fmt.Errorf("process.ancestors: there are %d; at most %d are allowed", len(list), maxAncestors)
	}
	// Where ancestors run is not told. Those of a process on the host do so,
	// too, and so does everything above who was put into a container.
	child, host := p, p.Workload.Place == event.PlaceHost
	for i := range list {
		a, err := list[i].build(list[i].Sources)
		if err != nil {
			return fmt.Errorf("process.ancestors[%d]: %w", i, err)
		}
		host = host || child.Origin != event.OriginUnknown && child.Origin != event.OriginChild
		if host && a.Origin == event.OriginUnknown {
			a.Workload = &event.Workload{Place: event.PlaceHost}
		}
		child.Parent = a
		child = a
	}
	return nil
}

// details are what only some kinds of event have.
func (r *recordedEvent) details(out *event.Event) (err error) {
	if c := r.Change; c != nil && c.From != nil {
		if c.From.UID != nil {
			out.Before, out.HasBefore = c.From.ids(), true
		}
		if c.From.Name != nil {
			if out.PrevName, err = bytesOf("change.from.name", *c.From.Name, c.From.NameRaw); err != nil {
				return err
			}
			out.HasPrev = true
		}
	}
	if c := r.Change; c != nil {
		var ok bool
		if out.Cause, ok = causes[c.Cause]; !ok {
			return fmt.Errorf("change.cause: there is no cause %.64q", c.Cause)
		}
		if out.CapsBefore, err = capabilitySet("change.capabilitiesBefore", c.CapsBefore); err != nil {
			return err
		}
		out.HasCapsBefore = c.CapsBefore != nil
		if c.Exe != nil {
			exe, err := bytesOf("change.exe", *c.Exe, c.ExeRaw)
			if err != nil {
				return err
			}
			if out.Process.Has(event.FieldIDs) {
				changedBy(out, exe)
			}
		}
	}
	if e := r.Exit; e != nil {
		sig, ok := signals[e.Signal]
		switch {
		case e.Signal != "" && !ok:
			return fmt.Errorf("exit.signal: there is no signal %.64q", e.Signal)
		case e.Code < 0 || e.Code > 255:
			return fmt.Errorf("exit.code: %d is not between 0 and 255", e.Code)
		}
		out.Status = uint32(e.Code)<<8 | sig
		if e.CoreDumped {
			out.Status |= 0x80
		}
		if e.DurationSeconds != "" {
			if out.Duration, err = time.ParseDuration(string(e.DurationSeconds) + "s"); err != nil {
				return fmt.Errorf("exit.durationSeconds: %.64q is no number of seconds", e.DurationSeconds)
			}
		}
	}
	return nil
}

// changedBy says which program made a change of ids: only the kernel's record
// tells it, together with the ids.
func changedBy(ev *event.Event, exe string) {
	p := ev.Process
	ev.Record = &event.Record{Kind: ev.Kind, ID: p.UID, EID: p.EUID,
		Facts: event.Facts{From: event.SourceRecord, Have: event.FieldSet(event.FieldExe), Exe: []byte(exe)}}
	if ev.Kind == event.GIDChange {
		ev.Record.ID, ev.Record.EID = p.GID, p.EGID
	}
}

func (r *recordedEvent) workload() (*event.Workload, error) {
	w := &event.Workload{Reason: r.PlaceReason}
	var ok bool
	if w.Place, ok = places[r.Place]; !ok {
		return nil, fmt.Errorf("place: %.64q is none of host, container, unknown", r.Place)
	}
	if c := r.Container; c != nil {
		w.ContainerID, w.ContainerName, w.Image, w.Runtime, w.Sandbox = c.ID, c.Name, c.Image, c.Runtime, c.Sandbox
		if c.Kind != "" { // the kubelet told it
			if w.Container, ok = kubelets(c.Kind); !ok {
				return nil, fmt.Errorf("container.kind: there is no kind %.64q", c.Kind)
			}
			w.Container.Name, w.Container.Image, w.Container.ImageDigest, w.Container.Privileged = c.Name, c.Image, c.ImageDigest, c.Privileged
		}
	}
	if p := r.Pod; p != nil {
		w.PodUID = p.UID
		if p.Name != "" { // else only the uid is known
			w.Pod = p.pod()
		}
	}
	return w, nil
}

// kubelets is a container of a kind, as the kubelet tells of it.
func kubelets(kind string) (*event.Container, bool) {
	for _, k := range []event.ContainerKind{event.ContainerRegular, event.ContainerInit, event.ContainerSidecar, event.ContainerEphemeral} {
		if k.String() == kind {
			return &event.Container{Kind: k}, true
		}
	}
	return nil, false
}

var places = map[string]event.Place{"host": event.PlaceHost, "container": event.PlaceContainer, "unknown": event.PlaceUnknown}

// build makes the process. A fact is known when it is there; sources, where
// they are given, say where it came from.
func (r *recordedProcess) build(sources map[string]string) (*event.Process, error) {
	p := &event.Process{PID: r.PID, InnerPID: r.InnerPID, TTY: r.TTY, Exited: r.Exited}
	var ok bool
	if p.Origin, ok = origins[r.Origin]; !ok {
		return nil, fmt.Errorf("origin: there is no origin %.64q", r.Origin)
	}
	know := func(f event.Field, known bool) {
		if known {
			p.Sources[f] = sourceOf(sources[f.String()])
		}
	}
	if r.Start != "" {
		n, err := strconv.ParseUint(r.Start, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("start: %.64q is no number", r.Start)
		}
		p.Start = n
	}
	know(event.FieldStart, r.Start != "")
	if r.PPID != nil {
		p.PPID = *r.PPID
	}
	know(event.FieldParent, r.PPID != nil)
	for _, t := range []struct {
		name  string
		field event.Field
		to    *string
		text  *string
		raw   string
	}{
		{"name", event.FieldName, &p.Name, r.Name, r.NameRaw},
		{"exe", event.FieldExe, &p.Exe, r.Exe, r.ExeRaw},
		{"file", event.FieldFile, &p.File, r.File, r.FileRaw},
		{"cwd", event.FieldCwd, &p.Cwd, r.Cwd, r.CwdRaw},
		{"cgroup", event.FieldCgroup, &p.Cgroup, r.Cgroup, r.CgroupRaw},
	} {
		if t.text == nil {
			continue
		}
		var err error
		if *t.to, err = bytesOf(t.name, *t.text, t.raw); err != nil {
			return nil, err
		}
		know(t.field, true)
	}
	know(event.FieldArgs, r.Args != nil)
	if err := r.args(p); err != nil {
		return nil, err
	}
	if r.UID != nil {
		p.IDs = r.ids()
	}
	know(event.FieldIDs, r.UID != nil)
	if r.SID != nil {
		p.SID = *r.SID
	}
	know(event.FieldSession, r.SID != nil)
	if r.LoginUID != nil {
		p.LoginUID = *r.LoginUID
	}
	know(event.FieldLogin, r.LoginUID != nil)
	if r.NoNewPrivs != nil {
		p.NoNewPrivs = *r.NoNewPrivs
	}
	know(event.FieldNNP, r.NoNewPrivs != nil)
	if r.NS != nil {
		p.NS = event.NS{PID: r.NS.PID, Mnt: r.NS.Mnt, User: r.NS.User, Net: r.NS.Net}
	}
	know(event.FieldNS, r.NS != nil)
	return p, r.file(p, know)
}

// file is what is known of the file the process runs, and of its
// capabilities.
func (r *recordedProcess) file(p *event.Process, know func(event.Field, bool)) (err error) {
	if f := r.ExeFile; f != nil {
		mode, err := strconv.ParseUint(f.Mode, 8, 16)
		if err != nil {
			return fmt.Errorf("exeFile.mode: %.64q is no octal number like 0100755", f.Mode)
		}
		p.ExeFile = event.ExeFile{Mode: uint16(mode), UID: f.UID, GID: f.GID}
	}
	know(event.FieldExeFile, r.ExeFile != nil)
	for _, name := range r.Marks {
		p.Marks |= marks[name] // one that is not known is a newer agent's
	}
	if p.Has(event.FieldExe) && !p.Marks.Has(upperUnknown) {
		p.Marks |= event.MarkUpperKnown
	}
	p.Marks &^= upperUnknown
	know(event.FieldCaps, r.Capabilities != nil)
	if p.CapEffective, err = capabilitySet("capabilities", r.Capabilities); err != nil {
		return err
	}
	p.CapPermitted, err = capabilitySet("capabilitiesPermitted", r.CapabilitiesPermitted)
	return err
}

func (r *recordedProcess) args(p *event.Process) error {
	if r.ArgsRaw != "" {
		raw, err := base64.StdEncoding.DecodeString(r.ArgsRaw)
		if err != nil {
			return fmt.Errorf("argsRaw: %w", err)
		}
		p.Cmdline = string(raw)
	} else {
		var b strings.Builder
		for _, a := range r.Args {
			b.WriteString(a)
			b.WriteByte(0)
		}
		p.Cmdline = b.String()
		if n := int(r.ArgsBytes); n == len(p.Cmdline)-1 {
			p.Cmdline = p.Cmdline[:n] // the last one lacked its end
		}
	}
	p.CmdlineLen = max(r.ArgsBytes, uint32(len(p.Cmdline)))
	return nil
}

// bytesOf are the bytes a process chose.
func bytesOf(name, text, raw string) (string, error) {
	if raw == "" {
		return text, nil
	}
	b, err := base64.StdEncoding.DecodeString(raw)
	if err != nil {
		return "", fmt.Errorf("%sRaw: %w", name, err)
	}
	return string(b), nil
}

// upperUnknown stands for the mark of that name, which is the absence of
// another one.
const upperUnknown = event.Marks(1 << 15)

var marks = map[string]event.Marks{
	"upperLayer": event.MarkUpper | event.MarkUpperKnown, "upperLayerUnknown": upperUnknown,
	"memfd": event.MarkMemfd, "deleted": event.MarkDeleted, "detached": event.MarkDetached, "outsideRoot": event.MarkOutsideRoot,
	"foreign": event.MarkForeign, "exeCut": event.MarkExeCut, "cgroupCut": event.MarkCgroupCut, "cwdCut": event.MarkCwdCut,
}

func sourceOf(name string) event.Source {
	for _, s := range []event.Source{event.SourceMessage, event.SourceProc, event.SourceLineage} {
		if s.String() == name {
			return s
		}
	}
	return event.SourceRecord
}

var origins, causes = func() (map[string]event.Origin, map[string]event.Cause) {
	o, c := map[string]event.Origin{}, map[string]event.Cause{}
	for n := event.OriginUnknown; n <= event.OriginChild; n++ {
		o[n.String()] = n
	}
	for n := event.CauseUnknown; n <= event.CauseUnexplained; n++ {
		c[n.String()] = n
	}
	return o, c
}()

var signals, capabilities = func() (map[string]uint32, map[string]int) {
	s, c := map[string]uint32{}, map[string]int{}
	for n := range uint32(65) {
		s[string(present.AppendSignal(nil, int32(n)))] = n
	}
	for n := range 64 {
		c[string(present.AppendCapability(nil, n))] = n
	}
	return s, c
}()

func capabilitySet(name string, list []string) (set uint64, err error) {
	for _, c := range list {
		bit, ok := capabilities[c]
		if !ok {
			return 0, fmt.Errorf("%s: there is no capability %.64q", name, c)
		}
		set |= 1 << bit
	}
	return set, nil
}

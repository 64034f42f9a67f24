// Package alert turns what happened, and the rule it matched, into the
// messages that leave the node. Everything a process could influence is
// copied as bytes and bounded: an alert is at most MaxBytes long.
package alert

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/event"
)

// MaxAncestors bounds the ancestors in an alert, the nearest first. A deeper
// lineage is cut and says so (Process.ancestors_cut).
const MaxAncestors = 64

// MaxBytes bounds an encoded alert, whatever the processes in it chose to be
// called: nobody can make an alert too large to be delivered. It is made of the
// process's argv (procfs.DefaultMaxArgs) and paths, the same for a tracee, and
// of what the next two bounds leave of MaxAncestors ancestors.
const MaxBytes = 1 << 20

const (
	maxAncestorArgs = 1 << 10 // bytes of an ancestor's argv; the true length stays
	maxAncestorPath = 512     // bytes of each of its paths; the last ones, which say most
	maxArgs         = 256 << 10
	maxPath         = 4 << 10
)

// A Builder makes messages. It holds no state besides its clock.
type Builder struct {
	// Wall turns a process's start (ns since boot, CLOCK_BOOTTIME) into wall
	// time. Nil leaves start times out.
	Wall func(boot uint64) time.Time
	// User finds the name of a process's real user, as event.Event.User. Nil
	// leaves names out. It is asked for the process an event is about, alone.
	User func(*event.Process) (name string, ok bool)
}

// Event describes ev with at most ancestors ancestors of its process.
func (b *Builder) Event(ev *event.Event, ancestors int) *pb.Event {
	p := ev.Process
	out := &pb.Event{
		Time:      timestamppb.New(ev.Time),
		Kind:      ev.Kind.String(),
		Process:   b.process(p),
		Synthetic: ev.Synthetic,
		Stamp:     ev.Stamp,
	}
	b.lineage(out.Process, p, ancestors)
	if ev.Target != nil {
		out.Target = b.process(ev.Target)
	}
	switch ev.Kind {
	case event.UIDChange, event.GIDChange:
		out.Change = &pb.Change{}
		if ev.HasBefore {
			out.Change.From = ids(ev.Before)
		}
		if p.Has(event.FieldIDs) {
			out.Change.To = ids(p.IDs)
		}
		b.cause(out.Change, ev)
	case event.CommChange:
		out.Change = &pb.Change{ToName: []byte(p.Name)}
		if ev.HasPrev {
			out.Change.FromName = []byte(ev.PrevName)
		}
	case event.Exit:
		out.Exit = &pb.Exit{
			Code:       int32(event.ExitCode(ev.Status)),
			Signal:     int32(event.Signal(ev.Status)),
			CoreDumped: event.DumpedCore(ev.Status),
			DurationNs: uint64(max(ev.Duration, 0)),
			CpuNs:      uint64(max(ev.RunTime, 0)),
		}
	}
	workload(out, p.Workload)
	return out
}

// cause writes down why an id became 0, and what that was concluded from.
func (b *Builder) cause(out *pb.Change, ev *event.Event) {
	if ev.Kind != event.UIDChange {
		return
	}
	out.Cause = ev.Cause.String()
	if ev.HasCapsBefore {
		out.CapsBefore = proto.Uint64(ev.CapsBefore)
	}
	r := ev.Record
	if r == nil || r.From != event.SourceRecord {
		return
	}
	if r.Have.Has(event.FieldExe) {
		out.Exe = append([]byte{}, r.Exe[max(0, len(r.Exe)-maxPath):]...)
	}
	if r.Have.Has(event.FieldExeFile) {
		out.ExeFile = exeFile(r.ExeFile)
	}
}

func workload(out *pb.Event, w *event.Workload) {
	if w == nil {
		out.Place, out.PlaceReason = event.PlaceUnknown.String(), "not-resolved"
		return
	}
	out.Place, out.PlaceReason = w.Place.String(), w.Reason
	out.Container, out.Pod = container(w), pod(w)
}

func container(w *event.Workload) *pb.Container {
	if w.ContainerID == "" {
		return nil
	}
	out := &pb.Container{Id: w.ContainerID, Name: w.ContainerName, Image: w.Image, Runtime: w.Runtime, Sandbox: w.Sandbox}
	if c := w.Container; c != nil {
		out.ImageDigest, out.Kind, out.Privileged = c.ImageDigest, c.Kind.String(), c.Privileged
	}
	return out
}

func pod(w *event.Workload) *pb.Pod {
	p := w.Pod
	switch {
	case p != nil:
		return &pb.Pod{
			Uid: p.UID, Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, Annotations: p.Annotations,
			ServiceAccount: p.ServiceAccount, OwnerKind: p.OwnerKind, OwnerName: p.OwnerName,
			HostPid: p.HostPID, HostNetwork: p.HostNetwork, HostIpc: p.HostIPC,
		}
	case w.PodUID != "":
		return &pb.Pod{Uid: w.PodUID}
	}
	return nil
}

// GaveUp stands before a reason that will not go away any more: nobody looks
// any longer.
const GaveUp = "gave-up "

// Amendment says where the process of an alert runs, as far as it is known by
// now. seq is the alert's number in this run of the agent.
func (b *Builder) Amendment(seq uint64, w *event.Workload, at time.Time, gaveUp bool) *pb.Amendment {
	out := &pb.Amendment{
		Seq: seq, Time: timestamppb.New(at), Place: w.Place.String(), PlaceReason: w.Reason,
		Container: container(w), Pod: pod(w),
	}
	if gaveUp {
		out.PlaceReason = GaveUp + w.Reason
	}
	return out
}

// lineage writes the ancestors down, nearest first. A cycle cannot occur in
// the table, and MaxAncestors ends the walk if one did.
func (b *Builder) lineage(out *pb.Process, p *event.Process, limit int) {
	n := 0
	for a := p.Parent; a != nil; a = a.Parent {
		if n == limit {
			out.AncestorsCut = true
			return
		}
		n++
		out.Ancestors = append(out.Ancestors, b.brief(a, maxAncestorArgs, maxAncestorPath))
	}
}

// brief says who a process is, as much as an ancestor needs, with at most so
// many bytes of argv and of each path.
func (b *Builder) brief(p *event.Process, args, path int) *pb.Process {
	out := &pb.Process{Pid: p.PID, Start: p.Start, Exited: p.Exited, Origin: p.CameBy().String()}
	if b.Wall != nil && p.Start != 0 {
		out.StartTime = timestamppb.New(b.Wall(p.Start))
	}
	if p.Has(event.FieldParent) {
		out.Ppid = proto.Int32(p.PPID)
	}
	m := p.Marks
	text(&out.Name, p, event.FieldName, p.Name, path)
	text(&out.File, p, event.FieldFile, p.File, path)
	if text(&out.Exe, p, event.FieldExe, p.Exe, path) {
		m |= event.MarkExeCut
	}
	if text(&out.Cwd, p, event.FieldCwd, p.Cwd, path) {
		m |= event.MarkCwdCut
	}
	out.Marks = marks(m)
	if p.Has(event.FieldExe) && !m.Has(event.MarkUpperKnown) {
		out.Marks = append(out.Marks, "upperLayerUnknown") // its absence says that the file is from the image
	}
	if p.Has(event.FieldArgs) {
		out.Cmdline, out.CmdlineLen = append([]byte{}, p.Cmdline[:min(len(p.Cmdline), args)]...), p.CmdlineLen
	}
	if p.Has(event.FieldIDs) {
		out.Ids = ids(p.IDs)
	}
	if p.Has(event.FieldSession) {
		out.Sid, out.Tty = proto.Int32(p.SID), proto.Int32(p.TTY)
	}
	if p.Has(event.FieldLogin) {
		out.LoginUid = proto.Uint32(p.LoginUID)
	}
	return out
}

// process says all that is known of a process.
func (b *Builder) process(p *event.Process) *pb.Process {
	out := b.brief(p, maxArgs, maxPath)
	out.InnerPid = p.InnerPID
	if b.User != nil && p.Has(event.FieldIDs) {
		out.User, _ = b.User(p)
	}
	out.Sources = make(map[string]string, event.NumFields)
	for f := range event.NumFields {
		if p.Has(f) {
			out.Sources[f.String()] = p.Sources[f].String()
		}
	}
	text(&out.Cgroup, p, event.FieldCgroup, p.Cgroup, maxPath)
	if p.Has(event.FieldCaps) {
		out.CapPermitted, out.CapEffective = proto.Uint64(p.CapPermitted), proto.Uint64(p.CapEffective)
	}
	if p.Has(event.FieldNNP) {
		out.NoNewPrivs = proto.Bool(p.NoNewPrivs)
	}
	if p.Has(event.FieldNS) {
		out.Ns = &pb.Namespaces{Pid: p.NS.PID, Mnt: p.NS.Mnt, User: p.NS.User, Net: p.NS.Net}
	}
	if p.Has(event.FieldExeFile) {
		out.ExeFile = exeFile(p.ExeFile)
	}
	return out
}

func exeFile(f event.ExeFile) *pb.ExeFile {
	return &pb.ExeFile{
		Dev: f.Dev, Ino: f.Ino, Mode: uint32(f.Mode), Uid: f.UID, Gid: f.GID, Nlink: f.Nlink, FsMagic: f.Magic,
	}
}

// text copies the last limit bytes of a known fact and says whether it had
// more. What is known and empty is not nil: it is not missing.
func text(dst *[]byte, p *event.Process, f event.Field, s string, limit int) (cut bool) {
	if !p.Has(f) {
		return false
	}
	if len(s) > limit {
		s, cut = s[len(s)-limit:], true
	}
	*dst = append(make([]byte, 0, len(s)), s...)
	return cut
}

func ids(v event.IDs) *pb.IDs {
	return &pb.IDs{
		Uid: v.UID, Gid: v.GID, Suid: v.SUID, Sgid: v.SGID,
		Euid: v.EUID, Egid: v.EGID, Fsuid: v.FSUID, Fsgid: v.FSGID,
	}
}

var markNames = []struct {
	mark event.Marks
	name string
}{
	{event.MarkUpper, "upperLayer"},
	{event.MarkMemfd, "memfd"},
	{event.MarkDeleted, "deleted"},
	{event.MarkDetached, "detached"},
	{event.MarkOutsideRoot, "outsideRoot"},
	{event.MarkForeign, "foreign"},
	{event.MarkExeCut, "exeCut"},
	{event.MarkCgroupCut, "cgroupCut"},
	{event.MarkCwdCut, "cwdCut"},
}

func marks(m event.Marks) []string {
	var out []string
	for _, n := range markNames {
		if m.Has(n.mark) {
			out = append(out, n.name)
		}
	}
	return out
}

package celenv

import (
	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"github.com/procession-dev/procession/internal/event"
)

// A Variable is one name an expression may use.
type Variable struct {
	Name  string
	Type  string      // as CEL writes it: string, int, bool, list(string), ...
	Kinds event.Kinds // kinds of event that fill it; 0 all
	Doc   string      // meaning, unit, when it is missing

	celType *cel.Type
	get     func(*Activation) ref.Val // never nil; missing when the fact is not known
}

// FilledBy says whether events of kind k can fill the variable.
func (v *Variable) FilledBy(k event.Kind) bool { return v.Kinds == 0 || v.Kinds.Has(k) }

// missing is the value of a fact that is not known. One is enough: which
// facts were missing is told by the variables an expression uses.
var missing ref.Val = types.NewUnknown(0, types.NewAttributeTrail("missing"))

func text(s string) ref.Val { return types.String(valid(s)) }

func truth(b bool) ref.Val { return types.Bool(b) }

func number[T ~int32 | ~uint32 | ~int](n T) ref.Val { return types.Int(n) }

// A procField is a fact about a process. It becomes process.NAME and, where
// related is set, also parent.NAME, grandparent.NAME, target.NAME and a field
// of the elements of ancestors.
type procField struct {
	name    string
	typ     *cel.Type
	need    event.Field // missing without it
	related bool
	doc     string
	get     func(*event.Process) ref.Val
}

// always stands for need of the one fact every process has.
const always = event.NumFields

func (f *procField) value(p *event.Process) ref.Val {
	if p == nil || f.need != always && !p.Has(f.need) {
		return missing
	}
	return f.get(p)
}

var procFields = []procField{
	{"pid", cel.IntType, always, true, "Process id, as the host sees it.",
		func(p *event.Process) ref.Val { return number(p.PID) }},
	{"ppid", cel.IntType, event.FieldParent, false, "Process id of the parent, as the host sees it.",
		func(p *event.Process) ref.Val { return number(p.PPID) }},
	{"exe", cel.StringType, event.FieldExe, true, "Path of the program file, links resolved, as seen in the file's own mount namespace: `/usr/bin/dash`, not `/bin/sh`. For busybox and the like it is the one file behind all names.",
		func(p *event.Process) ref.Val { return text(clip(p.Exe)) }},
	{"name", cel.StringType, event.FieldName, true, "Task name (comm), at most 15 bytes: usually the last part of the name the program was started by. A process may set it to anything.",
		func(p *event.Process) ref.Val { return text(clip(p.Name)) }},
	{"file", cel.StringType, event.FieldFile, true, "Name handed to execve, as the caller wrote it: the script of a script, the link of a link.",
		func(p *event.Process) ref.Val { return text(clip(p.File)) }},
	{"argv0", cel.StringType, event.FieldArgs, true, "First argument: the name the program was told it has. The caller may set it to anything.",
		func(p *event.Process) ref.Val { return text(clip(firstArg(p.Cmdline))) }},
	{"args", cel.ListType(cel.StringType), event.FieldArgs, true, "All arguments, the first included. At most 512: the first and the last 256.",
		func(p *event.Process) ref.Val { return newList(splitArgs(p.Cmdline)) }},
	{"cmdline", cel.StringType, event.FieldArgs, true, "All arguments, joined by one space. Beyond 8 KiB the middle is left out, see truncated.",
		func(p *event.Process) ref.Val { return text(joinArgs(p.Cmdline)) }},
	{"cwd", cel.StringType, event.FieldCwd, true, "Working directory.",
		func(p *event.Process) ref.Val { return text(clip(p.Cwd)) }},
	{"uid", cel.IntType, event.FieldIDs, true, "Real user id, as the host sees it: root in a user namespace is not 0.",
		func(p *event.Process) ref.Val { return number(p.UID) }},
	{"euid", cel.IntType, event.FieldIDs, true, "Effective user id.",
		func(p *event.Process) ref.Val { return number(p.EUID) }},
	{"suid", cel.IntType, event.FieldIDs, true, "Saved user id.",
		func(p *event.Process) ref.Val { return number(p.SUID) }},
	{"gid", cel.IntType, event.FieldIDs, true, "Real group id.",
		func(p *event.Process) ref.Val { return number(p.GID) }},
	{"egid", cel.IntType, event.FieldIDs, true, "Effective group id.",
		func(p *event.Process) ref.Val { return number(p.EGID) }},
	{"loginuid", cel.IntType, event.FieldLogin, true, "User id of the login this process comes from; 4294967295 when from none.",
		func(p *event.Process) ref.Val { return number(p.LoginUID) }},
	{"sessionId", cel.IntType, event.FieldSession, false, "Session id (setsid(2)).",
		func(p *event.Process) ref.Val { return number(p.SID) }},
	{"tty", cel.IntType, event.FieldSession, true, "Controlling terminal: its index + 1, or 0 for none.",
		func(p *event.Process) ref.Val { return number(p.TTY) }},
	{"capabilities", cel.ListType(cel.StringType), event.FieldCaps, false, "Effective capabilities by name: `'CAP_SYS_ADMIN' in process.capabilities`.",
		func(p *event.Process) ref.Val { return capNames(p.CapEffective) }},
	{"exeUpperLayer", cel.BoolType, event.FieldExe, true, "The program file is not from the container's image: it lies in the upper layer of the overlay.",
		func(p *event.Process) ref.Val {
			if !p.Marks.Has(event.MarkUpperKnown) {
				return missing
			}
			return truth(p.Marks.Has(event.MarkUpper))
		}},
	{"exeMemfd", cel.BoolType, event.FieldExe, true, "The program is an anonymous file in memory (memfd_create).",
		func(p *event.Process) ref.Val { return truth(p.Marks.Has(event.MarkMemfd)) }},
	{"exeDeleted", cel.BoolType, event.FieldExe, true, "The program file had no name any more when it was started.",
		func(p *event.Process) ref.Val { return truth(p.Marks.Has(event.MarkDeleted)) }},
	{"exeForeign", cel.BoolType, event.FieldExe, false, "The program file comes from another mount namespace. Missing unless the kernel recorded it.",
		recordedMark(event.MarkForeign)},
	{"exeOutsideRoot", cel.BoolType, event.FieldExe, false, "The program file is not below the process's root directory. Missing unless the kernel recorded it.",
		recordedMark(event.MarkOutsideRoot)},
	{"exeDetached", cel.BoolType, event.FieldExe, false, "The program file is on a mount that is in no mount namespace. Missing unless the kernel recorded it.",
		recordedMark(event.MarkDetached)},
	{"exeSetuid", cel.BoolType, event.FieldExeFile, true, "The program file has the set-user-id bit.",
		func(p *event.Process) ref.Val { return truth(p.ExeFile.Mode&0o4000 != 0) }},
	{"script", cel.StringType, event.FieldFile, false, "The script, when the program is the interpreter of its `#!` line; empty otherwise. Concluded from file, args and exe.",
		func(p *event.Process) ref.Val {
			if !p.Has(event.FieldArgs) || !p.Has(event.FieldExe) {
				return missing
			}
			return text(clip(script(p)))
		}},
	{"isInit", cel.BoolType, event.FieldNS, true, "It is process 1 of its pid namespace: in a container, its first process.",
		func(p *event.Process) ref.Val {
			if p.InnerPID == 0 {
				return missing
			}
			return truth(p.InnerPID == 1)
		}},
	{"innerPid", cel.IntType, event.FieldNS, true, "Process id inside its own pid namespace. Equal to pid for a process in the host's: no container's process but one with hostPID can make it so.",
		func(p *event.Process) ref.Val {
			if p.InnerPID == 0 {
				return missing
			}
			return number(p.InnerPID)
		}},
	{"truncated", cel.BoolType, event.FieldArgs, false, "args and cmdline leave something out: the arguments are longer than what could be kept. Padding is a way to hide.",
		func(p *event.Process) ref.Val { return truth(p.ArgsCut() || argsTooLong(p.Cmdline)) }},
	{"noNewPrivs", cel.BoolType, event.FieldNNP, false, "It can gain no privileges by running set-user-id programs (no_new_privs).",
		func(p *event.Process) ref.Val { return truth(p.NoNewPrivs) }},
}

// recordedMark is a mark that only the kernel's own record can deny: a look
// into /proc does not see it, so there its absence means nothing.
func recordedMark(m event.Marks) func(*event.Process) ref.Val {
	return func(p *event.Process) ref.Val {
		if p.Marks.Has(m) {
			return types.True
		}
		if p.Sources[event.FieldExe] != event.SourceRecord {
			return missing
		}
		return types.False
	}
}

var (
	ptraceKinds = event.KindSet(event.PtraceAttach, event.PtraceDetach)
	idKinds     = event.KindSet(event.UIDChange, event.GIDChange)
	uidKinds    = event.KindSet(event.UIDChange)
	gidKinds    = event.KindSet(event.GIDChange)
	commKinds   = event.KindSet(event.CommChange)
	exitKinds   = event.KindSet(event.Exit)
)

// eventVars are the variables that are not facts about one process.
var eventVars = []Variable{
	{"event.kind", "string", 0, "Kind of the event, as in the rule's events: `Exec`.",
		cel.StringType, func(a *Activation) ref.Val { return types.String(a.ev.Kind.String()) }},
	{"event.time", "timestamp", 0, "Wall-clock time of the event.",
		cel.TimestampType, func(a *Activation) ref.Val { return types.Timestamp{Time: a.ev.Time} }},
	{"event.synthetic", "bool", 0, "The event was not heard from the kernel but concluded from a scan after a loss.",
		cel.BoolType, func(a *Activation) ref.Val { return truth(a.ev.Synthetic) }},

	{"ancestors", "list(process)", 0, "Parent, grandparent and so on, nearest first, at most 32. Elements have the fields marked as such below. Where the line breaks off, the last element has only missing fields: `ancestors.exists(a, a.name == 'sshd')` is then true or undecided, never false.",
		cel.ListType(processType), func(a *Activation) ref.Val { return ancestors(a.ev.Process) }},

	{"change.from.uid", "int", idKinds, "Real user id before.", cel.IntType, before(func(i *event.IDs) uint32 { return i.UID })},
	{"change.from.euid", "int", idKinds, "Effective user id before.", cel.IntType, before(func(i *event.IDs) uint32 { return i.EUID })},
	{"change.from.suid", "int", idKinds, "Saved user id before. Who had 0 there could always go back to being root.", cel.IntType, before(func(i *event.IDs) uint32 { return i.SUID })},
	{"change.from.gid", "int", idKinds, "Real group id before.", cel.IntType, before(func(i *event.IDs) uint32 { return i.GID })},
	{"change.from.egid", "int", idKinds, "Effective group id before.", cel.IntType, before(func(i *event.IDs) uint32 { return i.EGID })},
	{"change.to.uid", "int", uidKinds, "Real user id after.", cel.IntType,
		after(func(r *event.Record) uint32 { return r.ID }, func(i *event.IDs) uint32 { return i.UID })},
	{"change.to.euid", "int", uidKinds, "Effective user id after.", cel.IntType,
		after(func(r *event.Record) uint32 { return r.EID }, func(i *event.IDs) uint32 { return i.EUID })},
	{"change.to.gid", "int", gidKinds, "Real group id after.", cel.IntType,
		after(func(r *event.Record) uint32 { return r.ID }, func(i *event.IDs) uint32 { return i.GID })},
	{"change.to.egid", "int", gidKinds, "Effective group id after.", cel.IntType,
		after(func(r *event.Record) uint32 { return r.EID }, func(i *event.IDs) uint32 { return i.EGID })},
	{"change.from.name", "string", commKinds, "Task name before.", cel.StringType, func(a *Activation) ref.Val {
		if !a.ev.HasPrev {
			return missing
		}
		return text(clip(a.ev.PrevName))
	}},
	{"change.to.name", "string", commKinds, "Task name after.", cel.StringType, func(a *Activation) ref.Val {
		if !a.ev.Process.Has(event.FieldName) {
			return missing
		}
		return text(clip(a.ev.Process.Name))
	}},

	{"exit.code", "int", exitKinds, "Exit code; 0 when a signal ended it, see exit.signal.", cel.IntType,
		exit(func(s uint32) ref.Val { return number(event.ExitCode(s)) })},
	{"exit.signal", "int", exitKinds, "Signal that ended it; 0 when it exited by itself.", cel.IntType,
		exit(func(s uint32) ref.Val { return number(event.Signal(s)) })},
	{"exit.coreDumped", "bool", exitKinds, "It left a core dump.", cel.BoolType,
		exit(func(s uint32) ref.Val { return truth(event.DumpedCore(s)) })},
	{"exit.durationMs", "int", exitKinds, "Wall time since its start, in milliseconds.", cel.IntType, func(a *Activation) ref.Val {
		if a.ev.Duration <= 0 {
			return missing
		}
		return types.Int(a.ev.Duration.Milliseconds())
	}},

	{"container.id", "string", 0, "Id of the container; empty on the host.", cel.StringType,
		container(func(w *event.Workload) string { return w.ContainerID })},
	{"container.name", "string", 0, "Name of the container in its pod; empty on the host. Missing until the kubelet told it, and for containers that are in no pod.", cel.StringType,
		container(func(w *event.Workload) string { return w.ContainerName })},
	{"container.image", "string", 0, "Image as the kubelet names it; empty on the host. Missing until the kubelet told it, and for containers that are in no pod.", cel.StringType,
		container(func(w *event.Workload) string { return w.Image })},
	{"container.runtime", "string", 0, "docker, containerd, cri-o, podman, ...; empty on the host. Missing where the cgroup's path does not tell.", cel.StringType,
		container(func(w *event.Workload) string { return w.Runtime })},

	{"pod.uid", "string", 0, "Uid of the pod, as the cgroup's path has it; empty outside pods.", cel.StringType, func(a *Activation) ref.Val {
		w := a.ev.Process.Workload
		if w == nil || w.Place == event.PlaceUnknown {
			return missing
		}
		return text(w.PodUID)
	}},
	{"pod.name", "string", 0, "Name of the pod; empty outside pods. Missing until the kubelet told it, as are the others below.", cel.StringType,
		pod(func(p *event.Pod) string { return p.Name })},
	{"pod.namespace", "string", 0, "Namespace of the pod.", cel.StringType, pod(func(p *event.Pod) string { return p.Namespace })},
	{"pod.serviceAccount", "string", 0, "Service account of the pod.", cel.StringType, pod(func(p *event.Pod) string { return p.ServiceAccount })},
	{"pod.ownerKind", "string", 0, "Kind of the pod's controller: `ReplicaSet`.", cel.StringType, pod(func(p *event.Pod) string { return p.OwnerKind })},
	{"pod.ownerName", "string", 0, "Name of the pod's controller.", cel.StringType, pod(func(p *event.Pod) string { return p.OwnerName })},
	{"pod.labels", "map(string, string)", 0, "Labels of the pod. A key that is not there is an error: write `pod.labels[?'app'].orValue('')`.",
		cel.MapType(cel.StringType, cel.StringType), func(a *Activation) ref.Val {
			p, known := podOf(a)
			switch {
			case !known:
				return missing
			case p == nil:
				return types.NewStringStringMap(types.DefaultTypeAdapter, nil)
			}
			return types.NewStringStringMap(types.DefaultTypeAdapter, p.Labels)
		}},

	{"node.name", "string", 0, "Name of the node.", cel.StringType, func(a *Activation) ref.Val {
		if a.node == "" {
			return missing
		}
		return text(a.node)
	}},
}

func before(id func(*event.IDs) uint32) func(*Activation) ref.Val {
	return func(a *Activation) ref.Val {
		if !a.ev.HasBefore {
			return missing
		}
		return number(id(&a.ev.Before))
	}
}

// after prefers what the kernel's message said: in a threaded program one
// task's ids may have changed and the process's not yet.
func after(rec func(*event.Record) uint32, id func(*event.IDs) uint32) func(*Activation) ref.Val {
	return func(a *Activation) ref.Val {
		if r := a.ev.Record; r != nil && r.Kind == a.ev.Kind {
			return number(rec(r))
		}
		if !a.ev.Process.Has(event.FieldIDs) {
			return missing
		}
		return number(id(&a.ev.Process.IDs))
	}
}

// exit values need the status the kernel sent; an exit concluded from a scan
// has none.
func exit(f func(uint32) ref.Val) func(*Activation) ref.Val {
	return func(a *Activation) ref.Val {
		if a.ev.Synthetic {
			return missing
		}
		return f(a.ev.Status)
	}
}

func container(f func(*event.Workload) string) func(*Activation) ref.Val {
	return func(a *Activation) ref.Val {
		w := a.ev.Process.Workload
		switch {
		case w == nil || w.Place == event.PlaceUnknown:
			return missing
		case w.Place == event.PlaceHost:
			return types.String("")
		}
		if s := f(w); s != "" {
			return text(s)
		}
		return missing
	}
}

// podOf finds the pod: nil when there surely is none, known == false when
// there may be one that is not known yet.
func podOf(a *Activation) (p *event.Pod, known bool) {
	w := a.ev.Process.Workload
	switch {
	case w == nil || w.Place == event.PlaceUnknown:
		return nil, false
	case w.Pod != nil:
		return w.Pod, true
	}
	return nil, w.PodUID == ""
}

func pod(f func(*event.Pod) string) func(*Activation) ref.Val {
	return func(a *Activation) ref.Val {
		p, known := podOf(a)
		switch {
		case !known:
			return missing
		case p == nil:
			return types.String("")
		}
		return text(f(p))
	}
}

// relations are the processes an expression can name, besides the one the
// event is about.
var relations = []struct {
	name  string
	kinds event.Kinds
	doc   string
	find  func(*event.Event) *event.Process
}{
	{"parent", 0, "The process that made this one, also when it is gone since.", func(ev *event.Event) *event.Process { return ev.Process.Parent }},
	{"grandparent", 0, "The parent's parent.", func(ev *event.Event) *event.Process {
		if ev.Process.Parent == nil {
			return nil
		}
		return ev.Process.Parent.Parent
	}},
	{"target", ptraceKinds, "The process that is traced.", func(ev *event.Event) *event.Process { return ev.Target }},
}

// variables lists every variable, in the order of the reference page.
func variables() []Variable {
	var out []Variable
	for i := range procFields {
		f := &procFields[i]
		out = append(out, Variable{"process." + f.name, f.typ.String(), 0, f.doc, f.typ,
			func(a *Activation) ref.Val { return f.value(a.ev.Process) }})
	}
	for _, r := range relations {
		for i := range procFields {
			f := &procFields[i]
			if !f.related {
				continue
			}
			out = append(out, Variable{r.name + "." + f.name, f.typ.String(), r.kinds, f.doc, f.typ,
				func(a *Activation) ref.Val { return f.value(r.find(a.ev)) }})
		}
	}
	return append(out, eventVars...)
}

// relatedField finds a field of the elements of ancestors.
func relatedField(name string) *procField {
	for i := range procFields {
		if f := &procFields[i]; f.name == name && f.related {
			return f
		}
	}
	return nil
}

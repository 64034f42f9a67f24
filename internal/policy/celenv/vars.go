package celenv

import (
	"strings"

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

	fact[*Activation]
	tenant bool // another view of a variable of the same name; see NewTenantScope
}

// FilledBy says whether events of kind k can fill the variable.
func (v *Variable) FilledBy(k event.Kind) bool { return v.Kinds == 0 || v.Kinds.Has(k) }

// missing is the value of a fact that is not known. One is enough: which
// facts were missing is told by the variables an expression uses.
var missing ref.Val = types.NewUnknown(0, types.NewAttributeTrail("missing"))

// A procField is a fact about a process. It becomes process.NAME and, where
// related is set, also parent.NAME, grandparent.NAME, target.NAME and a field
// of the elements of ancestors.
type procField struct {
	name    string
	need    event.Field // missing without it
	related bool
	doc     string
	fact[*event.Process]
}

// always stands for need of the one fact every process has.
const always = event.NumFields

// has says whether the fact may be read off p.
func (f *procField) has(p *event.Process) bool {
	return p != nil && (f.need == always || p.Has(f.need))
}

// box is the fact as a CEL value, missing when p is nil or does not have it.
func (f *procField) box(p *event.Process) ref.Val {
	if !f.has(p) {
		return missing
	}
	return f.fact.box(p)
}

var procFields = []procField{
	{"pid", always, true, "Process id, as the host sees it.",
		num(func(p *event.Process) int64 { return int64(p.PID) })},
	{"ppid", event.FieldParent, false, "Process id of the parent, as the host sees it.",
		num(func(p *event.Process) int64 { return int64(p.PPID) })},
	{"exe", event.FieldExe, true, "Path of the program file, links resolved, as seen in the file's own mount namespace: `/usr/bin/dash`, not `/bin/sh`. For busybox and the like it is the one file behind all names.",
		str(func(p *event.Process) string { return p.Exe })},
	{"name", event.FieldName, true, "Task name (comm), at most 15 bytes: usually the last part of the name the program was started by. A process may set it to anything.",
		str(func(p *event.Process) string { return p.Name })},
	{"file", event.FieldFile, true, "Name handed to execve, as the caller wrote it: the script of a script, the link of a link.",
		str(func(p *event.Process) string { return p.File })},
	{"argv0", event.FieldArgs, true, "First argument: the name the program was told it has. The caller may set it to anything.",
		str(func(p *event.Process) string { return firstArg(p.Cmdline) })},
	{"args", event.FieldArgs, true, "All arguments, the first included. At most 512: the first and the last 256.",
		argv(func(p *event.Process) string { return p.Cmdline })},
	{"cmdline", event.FieldArgs, true, "All arguments, joined by one space. Beyond 8 KiB the middle is left out, see truncated.",
		joined(func(p *event.Process) string { return p.Cmdline })},
	{"cwd", event.FieldCwd, true, "Working directory.",
		str(func(p *event.Process) string { return p.Cwd })},
	{"uid", event.FieldIDs, true, "Real user id, as the host sees it: root in a user namespace is not 0.",
		num(func(p *event.Process) int64 { return int64(p.UID) })},
	{"euid", event.FieldIDs, true, "Effective user id.",
		num(func(p *event.Process) int64 { return int64(p.EUID) })},
	{"suid", event.FieldIDs, true, "Saved user id.",
		num(func(p *event.Process) int64 { return int64(p.SUID) })},
	{"gid", event.FieldIDs, true, "Real group id.",
		num(func(p *event.Process) int64 { return int64(p.GID) })},
	{"egid", event.FieldIDs, true, "Effective group id.",
		num(func(p *event.Process) int64 { return int64(p.EGID) })},
	{"loginuid", event.FieldLogin, true, "User id of the login this process comes from; 4294967295 when from none.",
		num(func(p *event.Process) int64 { return int64(p.LoginUID) })},
	{"sessionId", event.FieldSession, false, "Session id (setsid(2)).",
		num(func(p *event.Process) int64 { return int64(p.SID) })},
	{"tty", event.FieldSession, true, "Controlling terminal: its index + 1, or 0 for none.",
		num(func(p *event.Process) int64 { return int64(p.TTY) })},
	{"capabilities", event.FieldCaps, false, "Effective capabilities by name: `'CAP_SYS_ADMIN' in process.capabilities`.",
		caps(func(p *event.Process) uint64 { return p.CapEffective })},
	{"exeUpperLayer", event.FieldExe, true, "The program file is not from the container's image: it lies in the upper layer of the overlay.",
		yesIf(func(p *event.Process) (yes, known bool) {
			return p.Marks.Has(event.MarkUpper), p.Marks.Has(event.MarkUpperKnown)
		})},
	{"exeMemfd", event.FieldExe, true, "The program is an anonymous file in memory (memfd_create).",
		yes(func(p *event.Process) bool { return p.Marks.Has(event.MarkMemfd) })},
	{"exeDeleted", event.FieldExe, true, "The program file had no name any more when it was started.",
		yes(func(p *event.Process) bool { return p.Marks.Has(event.MarkDeleted) })},
	{"exeForeign", event.FieldExe, false, "The program file comes from another mount namespace. Missing unless the kernel recorded it.",
		recordedMark(event.MarkForeign)},
	{"exeOutsideRoot", event.FieldExe, false, "The program file is not below the process's root directory. Missing unless the kernel recorded it.",
		recordedMark(event.MarkOutsideRoot)},
	{"exeDetached", event.FieldExe, false, "The program file is on a mount that is in no mount namespace. Missing unless the kernel recorded it.",
		recordedMark(event.MarkDetached)},
	{"exeSetuid", event.FieldExeFile, true, "The program file has the set-user-id bit.",
		yes(func(p *event.Process) bool { return p.ExeFile.Mode&0o4000 != 0 })},
	{"script", event.FieldFile, false, "The script, when the program is the interpreter of its `#!` line; empty otherwise. Concluded from file, args and exe.",
		strIf(func(p *event.Process) (string, bool) {
			return script(p), p.Has(event.FieldArgs) && p.Has(event.FieldExe)
		})},
	{"isInit", event.FieldNS, true, "It is process 1 of its pid namespace: in a container, its first process.",
		yesIf(func(p *event.Process) (yes, known bool) { return p.InnerPID == 1, p.InnerPID != 0 })},
	{"innerPid", event.FieldNS, true, "Process id inside its own pid namespace. Equal to pid for a process in the host's: no container's process but one with hostPID can make it so.",
		numIf(func(p *event.Process) (int64, bool) { return int64(p.InnerPID), p.InnerPID != 0 })},
	{"truncated", event.FieldArgs, false, "args and cmdline leave something out: the arguments are longer than what could be kept. Padding is a way to hide.",
		yes(func(p *event.Process) bool { return p.ArgsCut() || argsTooLong(p.Cmdline) })},
	{"origin", always, true, "How it came to be in its container: `runtimeSetup` (runc init, pause), `entrypoint` (the container's first), `execSession` (put in from outside: kubectl exec), `probe`, `lifecycleHook` (put in by the kubelet: the command is the pod spec's), `child` (made by another of the container); empty on the host. Missing where it could not be told, and for what was put in from outside until the kubelet told the pod's spec.",
		strIf(func(p *event.Process) (string, bool) {
			o := p.CameBy()
			return o.String(), o != event.OriginEntered && (o != event.OriginUnknown || onHost(p))
		})},
	{"execSession", always, true, "It was put into its running container from outside, and is neither a probe nor a lifecycle hook: kubectl exec, ctr exec, nsenter. What it starts is not: write `process.execSession || ancestors.exists(a, a.execSession)`. Missing as origin.",
		yesIf(func(p *event.Process) (yes, known bool) {
			o := p.CameBy()
			return o == event.OriginSession, o != event.OriginEntered && (o != event.OriginUnknown || onHost(p))
		})},
	{"noNewPrivs", event.FieldNNP, false, "It can gain no privileges by running set-user-id programs (no_new_privs).",
		yes(func(p *event.Process) bool { return p.NoNewPrivs })},
}

func onHost(p *event.Process) bool { return p.Workload != nil && p.Workload.Place == event.PlaceHost }

// recordedMark is a mark that only the kernel's own record can deny: a look
// into /proc does not see it, so there its absence means nothing.
func recordedMark(m event.Marks) fact[*event.Process] {
	return yesIf(func(p *event.Process) (yes, known bool) {
		yes = p.Marks.Has(m)
		return yes, yes || p.Sources[event.FieldExe] == event.SourceRecord
	})
}

var (
	ptraceKinds = event.KindSet(event.PtraceAttach, event.PtraceDetach)
	idKinds     = event.KindSet(event.UIDChange, event.GIDChange)
	uidKinds    = event.KindSet(event.UIDChange)
	gidKinds    = event.KindSet(event.GIDChange)
	commKinds   = event.KindSet(event.CommChange)
	exitKinds   = event.KindSet(event.Exit)
)

// processUser is the one fact about the process that is not in the process
// table: it is looked up when somebody asks.
var processUser = of("process.user", 0, "Name of its real user, by the passwd file of its own root directory: a container's users are its own, and the file is the container's to write. Empty when the user has no name. Missing when the file could not be read, and for a process that is gone.",
	strIf(func(a *Activation) (string, bool) {
		if a.ev.User == nil {
			return "", false
		}
		return a.ev.User(a.ev.Process)
	}))

// eventVars are the variables that are not facts about one process.
var eventVars = []Variable{
	of("event.kind", 0, "Kind of the event, as in the rule's events: `Exec`.",
		str(func(a *Activation) string { return a.ev.Kind.String() })),
	of("event.time", 0, "Wall-clock time of the event.",
		other(cel.TimestampType, func(a *Activation) ref.Val { return types.Timestamp{Time: a.ev.Time} })),
	of("event.synthetic", 0, "The event was not heard from the kernel but concluded from a scan after a loss.",
		yes(func(a *Activation) bool { return a.ev.Synthetic })),

	of("ancestors", 0, "Parent, grandparent and so on, nearest first, at most 32. Elements have the fields marked as such below. Where the line breaks off, the last element has only missing fields: `ancestors.exists(a, a.name == 'sshd')` is then true or undecided, never false.",
		ancestorsOf(viewAll)),

	of("change.from.uid", idKinds, "Real user id before.", before(func(i *event.IDs) uint32 { return i.UID })),
	of("change.from.euid", idKinds, "Effective user id before.", before(func(i *event.IDs) uint32 { return i.EUID })),
	of("change.from.suid", idKinds, "Saved user id before. Who had 0 there could always go back to being root.", before(func(i *event.IDs) uint32 { return i.SUID })),
	of("change.from.gid", idKinds, "Real group id before.", before(func(i *event.IDs) uint32 { return i.GID })),
	of("change.from.egid", idKinds, "Effective group id before.", before(func(i *event.IDs) uint32 { return i.EGID })),
	of("change.to.uid", uidKinds, "Real user id after.",
		after(func(r *event.Record) uint32 { return r.ID }, func(i *event.IDs) uint32 { return i.UID })),
	of("change.to.euid", uidKinds, "Effective user id after.",
		after(func(r *event.Record) uint32 { return r.EID }, func(i *event.IDs) uint32 { return i.EUID })),
	of("change.to.gid", gidKinds, "Real group id after.",
		after(func(r *event.Record) uint32 { return r.ID }, func(i *event.IDs) uint32 { return i.GID })),
	of("change.to.egid", gidKinds, "Effective group id after.",
		after(func(r *event.Record) uint32 { return r.EID }, func(i *event.IDs) uint32 { return i.EGID })),
	of("change.cause", uidKinds, "Why a user id became 0: `setuid-program`, `login` (su, sudo, sshd, cron, ...), `runtime-setup`, `kept-root` (one of its ids was 0 all the time), `capability` (it had CAP_SETUID), `unexplained` (none of these: what an exploit of the kernel leaves). Empty when none became 0. Missing when a fact is that it needs.",
		strIf(func(a *Activation) (string, bool) {
			return a.ev.Cause.String(), a.ev.Cause != event.CauseUnknown || !becameRoot(a.ev)
		})),
	of("change.exe", uidKinds, "The program that made the change. In the exec of a set-user-id program it is the new one, while process.exe is still the old. Missing unless the kernel recorded it.",
		strIf(func(a *Activation) (string, bool) {
			r := a.ev.Record
			if r == nil || r.From != event.SourceRecord || !r.Have.Has(event.FieldExe) {
				return "", false
			}
			return string(r.Exe), true
		})),
	of("change.from.name", commKinds, "Task name before.",
		strIf(func(a *Activation) (string, bool) { return a.ev.PrevName, a.ev.HasPrev })),
	of("change.to.name", commKinds, "Task name after.",
		strIf(func(a *Activation) (string, bool) { return a.ev.Process.Name, a.ev.Process.Has(event.FieldName) })),

	of("exit.code", exitKinds, "Exit code; 0 when a signal ended it, see exit.signal.",
		numIf(func(a *Activation) (int64, bool) { return int64(event.ExitCode(a.ev.Status)), exited(a) })),
	of("exit.signal", exitKinds, "Signal that ended it; 0 when it exited by itself.",
		numIf(func(a *Activation) (int64, bool) { return int64(event.Signal(a.ev.Status)), exited(a) })),
	of("exit.coreDumped", exitKinds, "It left a core dump.",
		yesIf(func(a *Activation) (yes, known bool) { return event.DumpedCore(a.ev.Status), exited(a) })),
	of("exit.durationMs", exitKinds, "Wall time since its start, in milliseconds.",
		numIf(func(a *Activation) (int64, bool) { return a.ev.Duration.Milliseconds(), a.ev.Duration > 0 })),

	of("container.id", 0, "Id of the container; empty on the host.",
		container(func(w *event.Workload) string { return w.ContainerID })),
	of("container.name", 0, "Name of the container in its pod; empty on the host. Missing until the kubelet told it, and for containers that are in no pod.",
		named(func(w *event.Workload) string { return w.ContainerName })),
	of("container.image", 0, "Image as the kubelet names it; empty on the host. Missing until the kubelet told it, and for containers that are in no pod.",
		named(func(w *event.Workload) string { return w.Image })),
	of("container.imageRepository", 0, "The image without tag and digest: `registry.example/shop/web`. Missing as the image.",
		imagePart(func(repository, _ string) string { return repository })),
	of("container.imageTag", 0, "Tag of the image; empty where it has none. Missing as the image.",
		imagePart(func(_, tag string) string { return tag })),
	of("container.imageDigest", 0, "Digest of the image's manifest, `sha256:...`; empty on the host. Missing as the image, and for images that came from no registry.",
		container(func(w *event.Workload) string {
			if w.Container == nil {
				return ""
			}
			return w.Container.ImageDigest
		})),
	of("container.kind", 0, "`regular`, `init`, `sidecar` or `ephemeral` (kubectl debug); empty on the host. Missing as the image.",
		named(func(w *event.Workload) string {
			if w.Container == nil {
				return ""
			}
			return w.Container.Kind.String()
		})),
	of("container.privileged", 0, "The pod's spec makes the container privileged; false on the host. Missing as the image.",
		yesIf(func(a *Activation) (yes, known bool) {
			w := a.ev.Process.Workload
			switch {
			case w == nil || w.Place == event.PlaceUnknown:
				return false, false
			case w.Container != nil:
				return w.Container.Privileged, true
			}
			return false, w.Place == event.PlaceHost || w.Sandbox
		})),
	of("container.runtime", 0, "docker, containerd, cri-o, podman, ...; empty on the host. Missing where the cgroup's path does not tell.",
		container(func(w *event.Workload) string { return w.Runtime })),

	of("pod.uid", 0, "Uid of the pod, as the cgroup's path has it; empty outside pods.",
		strIf(func(a *Activation) (string, bool) {
			w := a.ev.Process.Workload
			if w == nil || w.Place == event.PlaceUnknown {
				return "", false
			}
			return w.PodUID, true
		})),
	of("pod.name", 0, "Name of the pod; empty outside pods. Missing until the kubelet told it, as are the others below.",
		pod(func(p *event.Pod) string { return p.Name })),
	of("pod.namespace", 0, "Namespace of the pod.", pod(func(p *event.Pod) string { return p.Namespace })),
	of("pod.serviceAccount", 0, "Service account of the pod.", pod(func(p *event.Pod) string { return p.ServiceAccount })),
	of("pod.ownerKind", 0, "Kind of the pod's controller: `Deployment` (not its ReplicaSet), `DaemonSet`, `StatefulSet`, `Job`; empty for a pod without one.", pod(func(p *event.Pod) string { return p.OwnerKind })),
	of("pod.ownerName", 0, "Name of the pod's controller.", pod(func(p *event.Pod) string { return p.OwnerName })),
	of("pod.hostPID", 0, "The pod runs in the host's pid namespace.", podFlag(func(p *event.Pod) bool { return p.HostPID })),
	of("pod.hostNetwork", 0, "In the host's network namespace.", podFlag(func(p *event.Pod) bool { return p.HostNetwork })),
	of("pod.hostIPC", 0, "In the host's IPC namespace.", podFlag(func(p *event.Pod) bool { return p.HostIPC })),
	of("pod.annotations", 0, "Annotations of the pod, those that the agent was told to keep. As labels, a key that is not there is an error.",
		podMap(func(p *event.Pod) map[string]string { return p.Annotations })),
	of("pod.labels", 0, "Labels of the pod. A key that is not there is an error: write `pod.labels[?'app'].orValue('')`.",
		podMap(func(p *event.Pod) map[string]string { return p.Labels })),

	of("node.name", 0, "Name of the node.", strIf(func(a *Activation) (string, bool) { return a.node, a.node != "" })),
	of("node.labels", 0, "Labels of the node. A key that is not there is an error, as for pods.",
		strMap(func(a *Activation) (map[string]string, bool) { return a.nodeLabels, a.nodeLabels != nil })),
}

// of makes a variable that is not a fact about one process.
func of(name string, kinds event.Kinds, doc string, f fact[*Activation]) Variable {
	return Variable{Name: name, Type: typeName(f.typ), Kinds: kinds, Doc: doc, fact: f}
}

// typeName is a type as the reference writes it.
func typeName(t *cel.Type) string {
	if t.IsExactType(cel.TimestampType) {
		return "timestamp"
	}
	return t.String()
}

func before(id func(*event.IDs) uint32) fact[*Activation] {
	return numIf(func(a *Activation) (int64, bool) { return int64(id(&a.ev.Before)), a.ev.HasBefore })
}

// after prefers what the kernel's message said: in a threaded program one
// task's ids may have changed and the process's not yet.
func after(rec func(*event.Record) uint32, id func(*event.IDs) uint32) fact[*Activation] {
	return numIf(func(a *Activation) (int64, bool) {
		if r := a.ev.Record; r != nil && r.Kind == a.ev.Kind {
			return int64(rec(r)), true
		}
		return int64(id(&a.ev.Process.IDs)), a.ev.Process.Has(event.FieldIDs)
	})
}

// exited says whether the event has the status the kernel sent; an exit
// concluded from a scan has none.
func exited(a *Activation) bool { return !a.ev.Synthetic }

// becameRoot says whether an id became 0, or may have: what it was before need
// not be known.
func becameRoot(ev *event.Event) bool {
	p := ev.Process
	if p.Has(event.FieldIDs) && p.UID != 0 && p.EUID != 0 {
		return false
	}
	return !ev.HasBefore || ev.Before.UID != 0 || ev.Before.EUID != 0
}

// named is a fact of the pod's spec, which has none about a sandbox.
func named(f func(*event.Workload) string) fact[*Activation] {
	inner := container(f)
	return strIf(func(a *Activation) (string, bool) {
		if w := a.ev.Process.Workload; w != nil && w.Sandbox {
			return "", true
		}
		return inner.text(a)
	})
}

func imagePart(f func(repository, tag string) string) fact[*Activation] {
	image := named(func(w *event.Workload) string { return w.Image })
	return strIf(func(a *Activation) (string, bool) {
		s, ok := image.text(a)
		return f(splitImage(s)), ok
	})
}

func container(f func(*event.Workload) string) fact[*Activation] {
	return strIf(func(a *Activation) (string, bool) {
		w := a.ev.Process.Workload
		switch {
		case w == nil || w.Place == event.PlaceUnknown:
			return "", false
		case w.Place == event.PlaceHost:
			return "", true
		}
		s := f(w)
		return s, s != ""
	})
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

func pod(f func(*event.Pod) string) fact[*Activation] {
	return strIf(func(a *Activation) (string, bool) {
		p, known := podOf(a)
		if p == nil {
			return "", known
		}
		return f(p), true
	})
}

func podFlag(f func(*event.Pod) bool) fact[*Activation] {
	return yesIf(func(a *Activation) (yes, known bool) {
		p, known := podOf(a)
		return p != nil && f(p), known
	})
}

func podMap(f func(*event.Pod) map[string]string) fact[*Activation] {
	return strMap(func(a *Activation) (map[string]string, bool) {
		p, known := podOf(a)
		if p == nil {
			return nil, known
		}
		return f(p), true
	})
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

// variables lists every variable, in the order of the reference page, and
// after them what tenants see instead under some of the names.
func variables() []Variable {
	var out, tenants []Variable
	add := func(to *[]Variable, name string, kinds event.Kinds, f *procField, find func(*Activation) *event.Process) {
		*to = append(*to, of(name+"."+f.name, kinds, f.doc, lift(f.fact, func(a *Activation) (*event.Process, bool) {
			p := find(a)
			return p, f.has(p)
		})))
	}
	for i := range procFields {
		add(&out, "process", 0, &procFields[i], func(a *Activation) *event.Process { return a.ev.Process })
	}
	out = append(out, processUser)
	for _, r := range relations {
		for i := range procFields {
			f := &procFields[i]
			if !f.related {
				continue
			}
			add(&out, r.name, r.kinds, f, func(a *Activation) *event.Process { return r.find(a.ev) })
			add(&tenants, r.name, r.kinds, f, func(a *Activation) *event.Process {
				p := r.find(a.ev)
				if seen, _ := TenantSees(a.ev.Process, p); !seen {
					return nil
				}
				return p
			})
		}
	}
	tenants = append(tenants, of("ancestors", 0, "", ancestorsOf(viewTenant)), of("process.ppid", 0, "", numIf(tenantPPID)))
	for i := range tenants {
		tenants[i].tenant = true
	}
	return append(append(out, eventVars...), tenants...)
}

// tenantPPID is 0 for the first process of the pod, as it is for those inside.
func tenantPPID(a *Activation) (int64, bool) {
	p := a.ev.Process
	switch sees, known := TenantSees(p, p.Parent); {
	case !p.Has(event.FieldParent) || !known:
		return 0, false
	case !sees:
		return 0, true
	}
	return int64(p.PPID), true
}

// hidden are the variables tenants do not have: the node is not theirs.
func hidden(name string) bool { return strings.HasPrefix(name, "node.") }

// relatedField finds a field of the elements of ancestors.
func relatedField(name string) *procField {
	for i := range procFields {
		if f := &procFields[i]; f.name == name && f.related {
			return f
		}
	}
	return nil
}

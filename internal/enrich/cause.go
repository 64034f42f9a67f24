package enrich

import (
	"strings"

	"github.com/procession-dev/procession/internal/event"
)

const capSetuid = 1 << 7 // CAP_SETUID, include/uapi/linux/capability.h

// cause says why a uid became 0, from what was before and from what the kernel
// recorded of the task that changed.
//
// It is a conclusion from everything that is allowed to do it; what is left is
// unexplained: no root before, no CAP_SETUID, no set-user-id file. That is what
// it looks like when a hole in the kernel is used to put new credentials on a
// task. A process in a user namespace of its own whose uid 0 is mapped to the
// host's looks the same, and somebody privileged must have written that map.
// A fact that is missing makes the cause unknown, never innocent.
func cause(ev *event.Event) event.Cause {
	p := ev.Process
	if !p.Has(event.FieldIDs) || !ev.HasBefore {
		return event.CauseUnknown
	}
	b := ev.Before
	if p.UID != 0 && p.EUID != 0 || b.UID == 0 && b.EUID == 0 {
		return event.CauseUnknown // not to 0, or from 0
	}
	f, exe, upper, known := program(ev)
	setuid := known && f.Mode&0o4000 != 0 && f.UID == 0 && !p.NoNewPrivs
	kept := b.UID == 0 || b.EUID == 0 || b.SUID == 0
	capable := ev.HasCapsBefore && ev.CapsBefore&capSetuid != 0
	switch {
	case p.Origin == event.OriginSetup && (setuid || kept || capable):
		return event.CauseRuntime
	case (setuid || kept || capable) && !upper && login(exe):
		return event.CauseLogin
	case (kept || capable) && runtimeProgram(exe, p):
		return event.CauseRuntime
	case setuid:
		return event.CauseSetuid
	case kept:
		return event.CauseKept
	case capable:
		return event.CauseCapability
	case !known || !ev.HasCapsBefore:
		return event.CauseUnknown
	}
	return event.CauseUnexplained
}

// program is the file the task runs. In a set-user-id exec the change comes
// before the exec, and the record has the new program's file already.
//
// upper says that the file is not from the container's image.
func program(ev *event.Event) (f event.ExeFile, exe string, upper, known bool) {
	if r := ev.Record; r != nil && r.From == event.SourceRecord && r.Have.Has(event.FieldExeFile) {
		if r.Have.Has(event.FieldExe) {
			exe = string(r.Exe)
		}
		return r.ExeFile, exe, r.Marks.Has(event.MarkUpper), true
	}
	p := ev.Process
	return p.ExeFile, p.Exe, p.Marks.Has(event.MarkUpper), p.Has(event.FieldExeFile)
}

// login says whether exe is a program whose task it is to change users, at a
// place that is root's.
func login(exe string) bool {
	switch base(exe) {
	case "su", "sudo", "doas", "pkexec", "login", "runuser", "newgrp", "sg", "sshd", "sshd-session", "cron", "crond", "atd",
		"systemd-executor", "agetty", "gdm-session-worker", "sddm-helper", "lightdm", "polkit-agent-helper-1":
		return system(exe)
	}
	return false
}

// runtimeProgram says whether exe is a container runtime on the host.
func runtimeProgram(exe string, p *event.Process) bool {
	switch base(exe) {
	case "runc", "crun", "youki", "conmon", "containerd", "dockerd", "crio", "podman", "newuidmap", "newgidmap":
		return system(exe) && p.Workload != nil && p.Workload.Place == event.PlaceHost
	}
	return strings.HasPrefix(base(exe), "containerd-shim") && system(exe)
}

// system says whether a path lies where distributions install programs.
func system(path string) bool {
	for _, dir := range []string{"/usr/", "/bin/", "/sbin/", "/lib/", "/opt/", "/nix/store/", "/var/lib/rancher/"} {
		if strings.HasPrefix(path, dir) {
			return true
		}
	}
	return false
}

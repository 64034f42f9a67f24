package event

import (
	"slices"
	"strings"
)

// CameBy is p's Origin, where OriginEntered is told apart by what the pod's
// spec says by now: the command lines of probes and hooks are in it.
//
// Whoever may use kubectl exec can type a probe's command, and whoever can
// write to the program that a probe runs is run as the probe.
func (p *Process) CameBy() Origin {
	w := p.Workload
	if p.Origin != OriginEntered || w == nil || w.Container == nil || !p.Has(FieldArgs) || p.ArgsCut() {
		return p.Origin
	}
	ran := func(c []string) bool { return runs(p.Cmdline, c) }
	switch {
	case slices.ContainsFunc(w.Container.Probes, ran):
		return OriginProbe
	case slices.ContainsFunc(w.Container.Hooks, ran):
		return OriginHook
	case p.Execs > 1:
		return OriginEntered // it runs another program by now, so only a match tells something
	}
	return OriginSession
}

// runs says whether cmdline is that of a command in a pod's spec. The kernel
// puts a script's interpreter, and at most one argument for it, in front, and
// the script's path in place of the first argument.
func runs(cmdline string, command []string) bool {
	if len(command) == 0 {
		return false
	}
	if equalArgs(cmdline, command) {
		return true
	}
	for range 2 {
		_, after, ok := strings.Cut(cmdline, "\x00")
		if !ok {
			return false
		}
		cmdline = after
		if script, args, ok := strings.Cut(cmdline, "\x00"); ok && lastPart(script) == lastPart(command[0]) && equalArgs(args, command[1:]) {
			return true
		}
	}
	return false
}

// equalArgs compares arguments that each end with NUL.
func equalArgs(cmdline string, args []string) bool {
	for _, a := range args {
		rest, ok := strings.CutPrefix(cmdline, a)
		if !ok || rest == "" || rest[0] != 0 {
			return false
		}
		cmdline = rest[1:]
	}
	return cmdline == ""
}

func lastPart(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

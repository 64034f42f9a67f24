// Package cgroup tells from a cgroup path which container and pod a process
// belongs to. It is the home of github.com/containerd/cgroups.
//
// Every runtime, cgroup driver and nesting writes another path, so a path is
// read for its parts (a pod's uid, a container's id, names of runtimes), never
// for its beginning. Which part counts follows from who can make a cgroup:
//
//   - Below a pod's container everything belongs to the workload, which may
//     call its own cgroups whatever it likes. So the first container of a pod,
//     from the root, is the answer, and nothing below it is looked at.
//   - A container without a pod may be a whole node (kind, minikube) whose pods
//     lie below it. So there the innermost container counts. Whoever may make
//     cgroups in such a container, which takes privileges, can claim an id.
//   - Below user@UID.service the user makes the cgroups, without privileges.
//     A container's id is taken from there, with Owner set; a pod is not.
//
// Parse never guesses "host": a path that could be seen relative to somewhere
// else, or that is merely the root of whatever the reader sees, has a Kind of
// its own.
package cgroup

import (
	"strconv"
	"strings"
)

// A Kind says what a path leads to.
type Kind uint8

// Kinds of place.
const (
	Unknown   Kind = iota // no path, or one relative to an unknown cgroup
	Root                  // "/": the host's root; in a private cgroup namespace the reader's own cgroup; on cgroup v1 also any process that has ended
	Host                  // no container
	Container             // ContainerID, and PodUID if it is a pod's
	Pod                   // in the pod's cgroup but in none of its containers: PodUID
	Monitor               // a runtime's helper on the host, as conmon; Of is the container it serves
	Node                  // a Kubernetes daemon inside a container that is a node (kind, minikube); Of is that container
)

var kindNames = [...]string{"unknown", "root", "host", "container", "pod", "monitor", "node"}

// String is the kind's name.
func (k Kind) String() string {
	if int(k) >= len(kindNames) {
		return "Kind(" + strconv.Itoa(int(k)) + ")"
	}
	return kindNames[k]
}

// Info is what a path says. Strings may be parts of the path.
type Info struct {
	Kind        Kind
	ContainerID string // 64 hexadecimal digits, or a name (ctr, LXC, Garden, ...)
	Runtime     string // docker, containerd, cri-o, podman, lxc, ...; "" if the path does not say
	PodUID      string // as the kubelet has it; 32 hexadecimal digits for a static pod
	Of          string // Monitor, Node: the container meant above
	Up          int    // leading "..": the path is relative to the reader's cgroup
	Owner       uint32 // the user in whose part of the tree the container lies
	Rootless    bool   // Owner is meaningful
	Guess       bool   // Container: the path is just two names; it is one only if its processes have namespaces of their own
}

// Limits of names, so that no length or alphabet is a runtime's surprise.
const (
	idLen   = 64 // hexadecimal digits of a container id
	uuidLen = 36 // pod uid
	hashLen = 32 // static pod: hexadecimal digits of its configuration's hash
	nameMax = 128
)

// Parse reads one cgroup path, as the kernel prints it in /proc/PID/cgroup. It
// allocates only to undo systemd's escapes.
func Parse(path string) Info {
	path = strings.TrimSuffix(path, " (deleted)") // the cgroup was removed, the process is a zombie
	if path == "" || path[0] != '/' {
		return Info{}
	}
	var w walk
	rest := path[1:]
	for rest == ".." || strings.HasPrefix(rest, "../") {
		w.info.Up++
		rest = strings.TrimPrefix(rest[len(".."):], "/")
	}
	if rest == "" {
		if w.info.Up == 0 {
			w.info.Kind = Root
		}
		return w.info
	}
	for more := true; more && !w.done; {
		var seg string
		seg, rest, more = strings.Cut(rest, "/")
		if seg != "" {
			w.step(unescape(seg))
		}
	}
	return w.result()
}

// A walk goes from the root to the leaf.
type walk struct {
	info  Info
	first string // first segment
	prev  string // segment before this one
	prev2 string // and the one before that
	n     int    // segments seen

	pod       string // uid of the innermost pod
	container bool   // info has a container's id
	node      bool   // a Kubernetes daemon's service below that container
	monitor   bool
	done      bool // nothing further down can change the answer
}

func (w *walk) step(seg string) {
	if w.n == 0 {
		w.first = seg
	}
	w.n++
	w.look(seg)
	w.prev2, w.prev = w.prev, seg
}

func (w *walk) look(seg string) {
	if uid, ok := userManager(seg); ok && !w.container {
		w.info.Owner, w.info.Rootless = uid, true
		return
	}
	// systemd's own notation under the cgroupfs driver: slice:prefix:id.
	if slice, rest, ok := strings.Cut(seg, ":"); ok {
		if prefix, id, ok := strings.Cut(rest, ":"); ok && isHex(id, idLen) {
			w.notePod(slice)
			w.found(id, prefix)
		}
		return
	}
	if w.notePod(seg) {
		return
	}
	if id, prefix, ok := containerID(seg); ok {
		w.found(id, prefix)
		return
	}
	if w.container {
		w.node = w.node || w.pod == "" && w.prev == "system.slice" && kubernetesDaemon(seg)
		return
	}
	w.lookNames(seg)
}

// notePod remembers the uid of a pod's segment.
func (w *walk) notePod(seg string) bool {
	uid, ok := podUID(seg)
	if ok && !w.info.Rootless {
		w.pod = uid
	}
	return ok
}

// found takes a container's id.
func (w *walk) found(id, prefix string) {
	if prefix == "conmon" || strings.HasSuffix(prefix, "-conmon") {
		// Inside a container that is a name the workload chose.
		if !w.container {
			w.info.Of, w.info.Runtime = id, runtime(strings.TrimSuffix(prefix, "-conmon"))
			w.monitor, w.done = true, true
		}
		return
	}
	w.container, w.node = true, false
	w.info.ContainerID = id
	w.info.Runtime = runtime(prefix)
	if prefix == "" {
		w.info.Runtime = runtimeByParent(w.prev)
	}
	if w.pod != "" {
		w.info.PodUID = w.pod
		w.done = true
	}
}

// named takes a container that has a name instead of an id.
func (w *walk) named(name, runtime string) {
	if !validName(name) {
		return
	}
	w.container = true
	w.info.ContainerID, w.info.Runtime = name, runtime
}

// lookNames knows the runtimes that do not use 64 digits.
func (w *walk) lookNames(seg string) {
	switch {
	case strings.HasPrefix(seg, "lxc.payload."):
		w.named(seg[len("lxc.payload."):], "lxc")
	case strings.HasPrefix(seg, "lxc.monitor."), w.prev == "lxc.monitor":
		w.info.Of, w.info.Runtime = strings.TrimPrefix(seg, "lxc.monitor."), "lxc"
		w.monitor, w.done = true, true
	case seg == "conmon" && strings.HasPrefix(w.prev, "libpod"):
		w.info.Runtime = "podman"
		w.monitor, w.done = true, true
	case w.prev == "lxc" && w.prev2 == "libvirt", strings.HasSuffix(seg, ".libvirt-lxc"):
		w.named(strings.TrimSuffix(seg, ".libvirt-lxc"), "libvirt-lxc")
	case w.prev == "lxc" || w.prev == "lxc.payload":
		w.named(seg, "lxc")
	case strings.HasPrefix(seg, "machine-lxc-") && strings.HasSuffix(seg, ".scope"):
		// systemd-machined's name for libvirt's lxc-NUMBER-NAME
		_, name, _ := strings.Cut(seg[len("machine-lxc-"):len(seg)-len(".scope")], "-")
		w.named(name, "libvirt-lxc")
	case w.prev == "buildkit" && w.prev2 == "docker":
		w.named(seg, "buildkit")
	case w.prev == "garden" && w.n == 2:
		w.named(seg, "garden")
	case w.prev == "mesos" && w.n == 2:
		w.named(seg, "mesos")
	case w.n == 2 && w.info.Up == 0 && containerdNamespace(w.prev) && !unitName(seg):
		w.named(seg, "containerd")
	case strings.HasPrefix(seg, "bpm-") && strings.HasSuffix(seg, ".scope"):
		w.named(seg[len("bpm-"):len(seg)-len(".scope")], "bpm")
	}
}

func (w *walk) result() Info {
	i := &w.info
	switch {
	case w.container && w.node:
		i.Kind, i.Of, i.ContainerID = Node, i.ContainerID, ""
	case w.container:
		i.Kind = Container
	case w.monitor:
		i.Kind = Monitor
	case w.pod != "":
		i.Kind, i.PodUID = Pod, w.pod
	case i.Up == 0 && w.n == 2 && containerdPath(w.first, w.prev):
		i.Kind, i.ContainerID, i.Runtime, i.Guess = Container, w.prev, "containerd", true
	case i.Up == 0 || topUnit(w.first):
		i.Kind = Host
	}
	if i.Kind != Container && i.Kind != Node {
		i.Owner, i.Rootless = 0, false
	}
	return *i
}

// userManager reads the uid of user@UID.service, below which the user rules.
func userManager(seg string) (uint32, bool) {
	s, ok := strings.CutPrefix(seg, "user@")
	if !ok {
		return 0, false
	}
	s, ok = strings.CutSuffix(s, ".service")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil
}

// podUID reads "podUID", "kubepods-besteffort-podUID.slice" and the like.
func podUID(seg string) (string, bool) {
	s := strings.TrimSuffix(seg, ".slice")
	if uid, ok := afterPod(s, uuidLen); ok && isUUID(uid) {
		if uid[8] == '_' {
			uid = strings.ReplaceAll(uid, "_", "-")
		}
		return uid, true
	}
	if uid, ok := afterPod(s, hashLen); ok && isHex(uid, hashLen) {
		return uid, true
	}
	return "", false
}

// afterPod cuts the last n characters off s, which follow the word "pod".
func afterPod(s string, n int) (string, bool) {
	i := len(s) - n
	if i < len("pod") || s[i-len("pod"):i] != "pod" {
		return "", false
	}
	if i > len("pod") && s[i-len("pod")-1] != '-' {
		return "", false
	}
	return s[i:], true
}

// isUUID accepts dashes or, as in the names of slices, underscores.
func isUUID(s string) bool {
	sep := s[8]
	if sep != '-' && sep != '_' {
		return false
	}
	for i := range len(s) {
		switch i {
		case 8, 13, 18, 23:
			if s[i] != sep {
				return false
			}
		default:
			if !hexDigit(s[i]) {
				return false
			}
		}
	}
	return true
}

// containerID reads "ID", "ID.scope", "prefix-ID", "prefix-ID.scope".
func containerID(seg string) (id, prefix string, ok bool) {
	s := strings.TrimSuffix(seg, ".scope")
	i := len(s) - idLen
	if i < 0 || !isHex(s[i:], idLen) {
		return "", "", false
	}
	if i == 0 {
		return s, "", true
	}
	// What stands before must end there: 65 digits are no id.
	if i < 2 || s[i-1] != '-' {
		return "", "", false
	}
	return s[i:], s[:i-1], true
}

func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range len(s) {
		if !hexDigit(s[i]) {
			return false
		}
	}
	return true
}

func hexDigit(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' }

// runtime knows the prefixes of scopes.
func runtime(prefix string) string {
	switch prefix {
	case "docker":
		return "docker"
	case "cri-containerd", "containerd", "nerdctl":
		return "containerd"
	case "crio":
		return "cri-o"
	case "libpod", "libpod-payload":
		return "podman"
	}
	return ""
}

// runtimeByParent knows the parents under which a bare id appears.
func runtimeByParent(parent string) string {
	switch parent {
	case "docker":
		return "docker"
	case "libpod", "libpod_parent":
		return "podman"
	}
	return ""
}

// kubernetesDaemon names the services that make a container a node.
func kubernetesDaemon(seg string) bool {
	switch seg {
	case "containerd.service", "kubelet.service", "crio.service", "docker.service", "cri-docker.service":
		return true
	}
	return false
}

// topUnit says whether seg stands directly below the root wherever systemd
// runs, so that a relative path is known to be the host's.
func topUnit(seg string) bool {
	switch seg {
	case "system.slice", "user.slice", "machine.slice", "init.scope":
		return true
	}
	return false
}

// containerdNamespace knows the namespaces that containerd's clients use by
// themselves. Cgroups below /NAMESPACE/NAME are the container's.
func containerdNamespace(seg string) bool {
	switch seg {
	case "default", "k8s.io", "moby":
		return true
	}
	return false
}

// containerdPath says whether two segments may be containerd's /NAMESPACE/NAME
// in a namespace somebody chose: two names that are nobody else's. They may as
// well be a cgroup that somebody made by hand, so it is a guess; a deeper path
// is more often something else.
func containerdPath(ns, name string) bool {
	if !validName(name) || !validName(ns) || unitName(name) || unitName(ns) {
		return false
	}
	switch ns {
	case "user", "system", "machine", "init", "openrc", "elogind", "kubepods", "kubelet", "podruntime",
		"docker", "libpod", "libpod_parent", "lxc", "libvirt", "slurm", "yarn", "hadoop-yarn":
		return false
	}
	return true
}

// unitName says whether seg is named as systemd names its units.
func unitName(seg string) bool {
	i := strings.LastIndexByte(seg, '.')
	if i < 0 {
		return false
	}
	switch seg[i:] {
	case ".service", ".slice", ".scope", ".mount", ".socket", ".swap", ".target", ".user", ".session":
		return true
	}
	return false
}

// validName is what runtimes accept as names, bounded.
func validName(s string) bool {
	if len(s) == 0 || len(s) > nameMax || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

// unescape undoes systemd's \xNN in unit names (systemd.unit(5)).
func unescape(seg string) string {
	if !strings.Contains(seg, `\x`) {
		return seg
	}
	var b strings.Builder
	b.Grow(len(seg))
	for i := 0; i < len(seg); i++ {
		if seg[i] == '\\' && i+3 < len(seg) && seg[i+1] == 'x' {
			if n, err := strconv.ParseUint(seg[i+2:i+4], 16, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(seg[i])
	}
	return b.String()
}

package enrich

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/procfs"
	"github.com/procession-dev/procession/internal/proctable"
	"github.com/procession-dev/procession/internal/testenv"
)

// A watch is the real kernel, table and enricher, and what they told.
type watch struct {
	t     *testing.T
	table *proctable.Table
	who   *Enricher
	conn  *procconn.Conn

	ev event.Event

	mu   sync.Mutex
	told []seen
	wake chan struct{}
}

// A seen is one event, as it was judged.
type seen struct {
	kind   event.Kind
	pid    int32
	args   []string
	exe    string
	marks  event.Marks
	w      event.Workload
	origin event.Origin
	cause  event.Cause
	before event.IDs
	ids    event.IDs
	inner  int32
}

func (w *watch) Record(r *event.Record) {
	w.ev.Reset()
	if !w.table.Apply(r, &w.ev) {
		return
	}
	w.who.Event(&w.ev)
	if w.ev.Kind != event.Exec && w.ev.Kind != event.UIDChange {
		return
	}
	p := w.ev.Process
	w.mu.Lock()
	w.told = append(w.told, seen{
		kind: w.ev.Kind, pid: p.PID, args: strings.Split(strings.TrimSuffix(p.Cmdline, "\x00"), "\x00"), exe: p.Exe, marks: p.Marks,
		w: *p.Workload, origin: p.CameBy(), cause: w.ev.Cause, before: w.ev.Before, ids: p.IDs, inner: p.InnerPID,
	})
	close(w.wake)
	w.wake = make(chan struct{})
	w.mu.Unlock()
}

func (w *watch) Lost(l procconn.Loss) { w.t.Errorf("%d events were lost", l.Count) }

func (w *watch) Idle() {}

func newWatch(t *testing.T, pods Pods) *watch {
	t.Helper()
	testenv.Root(t)
	fs, err := procfs.New("")
	if err != nil {
		t.Fatal(err)
	}
	w := &watch{t: t, who: New(Config{Pods: pods}), wake: make(chan struct{})}
	if w.table, err = proctable.New(proctable.Config{FS: fs}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.conn, err = procconn.Open(ctx, procconn.Config{Recorder: procconn.Require})
	if err != nil {
		cancel()
	}
	testenv.SkipOn(t, err, procconn.ErrNotSupported, procconn.ErrPermission)
	if _, err := w.table.Scan(); err != nil {
		t.Fatal(err)
	}
	for p := range w.table.All() {
		w.who.Known(p)
	}
	done := make(chan error, 1)
	go func() { done <- w.conn.Run(ctx, w) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.conn.Close()
	})
	return w
}

// wait waits for an event.
func (w *watch) wait(what string, ok func(*seen) bool) seen {
	w.t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		w.mu.Lock()
		i := slices.IndexFunc(w.told, func(s seen) bool { return ok(&s) })
		var s seen
		if i >= 0 {
			s = w.told[i]
		}
		wake := w.wake
		w.mu.Unlock()
		if i >= 0 {
			return s
		}
		select {
		case <-wake:
		case <-deadline:
			w.t.Fatalf("not seen: %s", what)
		}
	}
}

// exec waits for the program, other than runc, whose last argument is tag.
func (w *watch) exec(tag string) seen {
	w.t.Helper()
	return w.wait("exec of "+tag, func(s *seen) bool {
		return s.kind == event.Exec && s.args[len(s.args)-1] == tag && s.args[0] != "runc"
	})
}

// A bundle is a container for runc: an overlay of this machine's busybox, with
// a cgroup as Kubernetes makes it.
type bundle struct {
	t        *testing.T
	dir, id  string
	merged   string
	runcRoot string
}

const liveUID = "5cf3b1a2-0b8f-4d7e-9c55-3f1f7f0f6c11"

func newBundle(t *testing.T) *bundle {
	t.Helper()
	for _, program := range []string{"runc", "busybox"} {
		if _, err := exec.LookPath(program); err != nil {
			testenv.Skip(t, program+" is not installed")
		}
	}
	b := &bundle{t: t, dir: t.TempDir(), id: fmt.Sprintf("%064x", os.Getpid())}
	b.runcRoot, b.merged = filepath.Join(b.dir, "runc"), filepath.Join(b.dir, "rootfs")
	lower, upper, work := filepath.Join(b.dir, "lower"), filepath.Join(b.dir, "upper"), filepath.Join(b.dir, "work")
	for _, d := range []string{lower + "/bin", lower + "/usr/bin", lower + "/tmp", lower + "/opt", lower + "/proc", lower + "/dev", lower + "/etc", upper, work, b.merged} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	must(t, "cp", busybox, lower+"/bin/busybox")
	for _, applet := range []string{"sh", "true", "sleep", "cp"} {
		if err := os.Symlink("busybox", lower+"/bin/"+applet); err != nil {
			t.Fatal(err)
		}
	}
	must(t, "cp", busybox, lower+"/usr/bin/su")
	must(t, "chmod", "4755", lower+"/usr/bin/su")
	must(t, "cp", busybox, lower+"/opt/busybox")
	must(t, "chmod", "4755", lower+"/opt/busybox")
	if err := os.WriteFile(lower+"/opt/check.sh", []byte("#!/bin/sh\n/bin/true \"$1\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	opts := "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", b.merged, "overlay", 0, opts); err != nil {
		testenv.Skip(t, "no overlay mounts here: "+err.Error())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(b.merged, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return b
}

func must(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func (b *bundle) runc(args ...string) *exec.Cmd {
	return exec.Command("runc", append([]string{"--root", b.runcRoot, "--log", filepath.Join(b.dir, "log")}, args...)...)
}

// start makes the container and starts its program.
func (b *bundle) start(args ...string) {
	b.t.Helper()
	spec := b.runc("spec")
	spec.Dir = b.dir
	if out, err := spec.CombinedOutput(); err != nil {
		b.t.Fatalf("runc spec: %v\n%s", err, out)
	}
	file := filepath.Join(b.dir, "config.json")
	text, err := os.ReadFile(file)
	if err != nil {
		b.t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(text, &c); err != nil {
		b.t.Fatal(err)
	}
	process, linux := c["process"].(map[string]any), c["linux"].(map[string]any)
	process["terminal"], process["args"], process["noNewPrivileges"] = false, args, false
	c["root"] = map[string]any{"path": b.merged}
	linux["cgroupsPath"] = fmt.Sprintf("/procession-enrich-%d/kubepods/besteffort/pod%s/%s", os.Getpid(), liveUID, b.id)
	c["mounts"] = []any{map[string]any{"destination": "/proc", "type": "proc", "source": "proc"}}
	delete(linux, "maskedPaths")
	delete(linux, "readonlyPaths")
	if text, err = json.Marshal(c); err == nil {
		err = os.WriteFile(file, text, 0o600)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	run := b.runc("run", "--detach", "--bundle", b.dir, b.id)
	// The container keeps what runc had as standard error: a pipe would not end.
	if err := run.Run(); err != nil {
		log, _ := os.ReadFile(filepath.Join(b.dir, "log"))
		testenv.Skip(b.t, fmt.Sprintf("runc runs no container here: %v\n%s", err, log))
	}
	b.t.Cleanup(func() {
		if out, err := b.runc("delete", "--force", b.id).CombinedOutput(); err != nil {
			b.t.Errorf("runc delete: %v\n%s", err, out)
		}
		b.removeCgroups()
	})
}

// removeCgroups takes away the folders above the container's cgroup.
func (b *bundle) removeCgroups() {
	tops, _ := filepath.Glob(fmt.Sprintf("/sys/fs/cgroup/*/procession-enrich-%d", os.Getpid()))
	tops = append(tops, fmt.Sprintf("/sys/fs/cgroup/procession-enrich-%d", os.Getpid()))
	for _, top := range tops {
		removeTree(top)
	}
}

func (b *bundle) exec(args ...string) {
	b.t.Helper()
	if out, err := b.execAs(0, args...); err != nil {
		b.t.Fatalf("runc exec %q: %v\n%s", args, err, out)
	}
}

// execAs returns what the program said, whether or not it failed.
func (b *bundle) execAs(uid int, args ...string) (string, error) {
	cmd := b.runc(append([]string{"exec", "--user", strconv.Itoa(uid), b.id}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// What runc, overlay and the kernel really do is told apart.
func TestRealContainer(t *testing.T) {
	c := &event.Container{Name: "web", Probes: [][]string{{"/bin/true", "probe"}, {"/opt/check.sh", "script"}}, Hooks: [][]string{{"/bin/true", "hook"}}}
	b := newBundle(t)
	pods := &fakePods{answers: true, pods: map[string]*event.Pod{liveUID: {UID: liveUID, Namespace: "shop", Name: "web"}},
		containers: map[string]fakeRun{b.id: {liveUID, c}}}
	w := newWatch(t, pods)
	b.start("/bin/sh", "-c", "/bin/true child-of-entry; cp /bin/busybox /tmp/true; /tmp/true from-upper; exec /bin/sleep 3600")
	b.exec("/bin/true", "session")
	b.exec("/bin/sh", "-c", `/bin/true child-of-session; :`, "session-shell")
	b.exec("/bin/true", "probe")
	b.exec("/opt/check.sh", "script")
	b.exec("/bin/true", "hook")
	b.exec("/bin/true", "nearly", "hook")

	for _, x := range []struct {
		tag    string
		origin event.Origin
	}{
		{"child-of-entry", event.OriginChild},
		{"3600", event.OriginEntry},
		{"session", event.OriginSession},
		{"session-shell", event.OriginSession},
		{"child-of-session", event.OriginChild},
		{"probe", event.OriginProbe},
		{"hook", event.OriginHook},
	} {
		s := w.exec(x.tag)
		if s.origin != x.origin || s.w.ContainerID != b.id || s.w.ContainerName != "web" || s.w.Pod == nil || s.w.Pod.Namespace != "shop" {
			t.Errorf("%s: origin %v, want %v; %+v", x.tag, s.origin, x.origin, s.w)
		}
		if s.marks.Has(event.MarkUpperKnown) && s.marks.Has(event.MarkUpper) {
			t.Errorf("%s runs a program of the image: %b", x.tag, s.marks)
		}
	}
	script := w.wait("the script's shell", func(s *seen) bool { return slices.Equal(s.args, []string{"/bin/sh", "/opt/check.sh", "script"}) })
	if script.origin != event.OriginProbe {
		t.Errorf("a probe that is a script: %v", script.origin)
	}
	nearly := w.wait("nearly a hook", func(s *seen) bool { return slices.Equal(s.args, []string{"/bin/true", "nearly", "hook"}) })
	if nearly.origin != event.OriginSession {
		t.Errorf("nearly a hook: %v", nearly.origin)
	}
	if s := w.exec("from-upper"); s.marks.Has(event.MarkUpperKnown) && !s.marks.Has(event.MarkUpper) {
		t.Errorf("a program that was written in the container: marks %b", s.marks)
	}
	// The runtime's own steps in the container are not called sessions.
	for _, s := range w.all() {
		if len(s.args) == 2 && s.args[1] == "init" && s.w.Place == event.PlaceContainer && s.origin != event.OriginSetup {
			t.Errorf("%q in the container: %v, marks %b", s.args, s.origin, s.marks)
		}
	}
}

func (w *watch) all() []seen {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.told)
}

// Why a uid became 0, as the kernel really lets it.
func TestRealUIDChanges(t *testing.T) {
	b := newBundle(t)
	w := newWatch(t, nil)
	b.start("/bin/sleep", "3600")
	if out, err := b.execAs(1000, "/opt/busybox", "true", "setuid-tool"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, _ = b.execAs(1000, "/usr/bin/su", "--help") // it may well refuse
	change := func(what string, ok func(*seen) bool) seen {
		t.Helper()
		return w.wait(what, func(s *seen) bool {
			return s.kind == event.UIDChange && s.ids.EUID == 0 && s.before.EUID == 1000 && s.before.SUID == 1000 && ok(s)
		})
	}
	tool := w.exec("setuid-tool")
	if s := change("the change by a set-uid program", func(s *seen) bool { return s.pid == tool.pid }); s.cause != event.CauseSetuid {
		t.Errorf("a set-uid program: %v", s.cause)
	}
	su := w.wait("su", func(s *seen) bool { return s.kind == event.Exec && s.exe == "/usr/bin/su" && s.w.ContainerID == b.id })
	if s := change("the change by su", func(s *seen) bool { return s.pid == su.pid }); s.cause != event.CauseLogin {
		t.Errorf("su in a container: %v", s.cause)
	}

	// A capability, kept over the change away from 0.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), agentStage+"=setuid")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}, AmbientCaps: []uintptr{unix.CAP_SETUID}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if s := change("the change by a capability", func(s *seen) bool { return s.pid == int32(cmd.ProcessState.Pid()) }); s.cause != event.CauseCapability {
		t.Errorf("a capability: %v, caps", s.cause)
	}
}

// A workload may mount, bind, rename and nest what it likes: it stays itself.
func TestRealSpoofing(t *testing.T) {
	w := newWatch(t, nil)
	root := hierarchy(t)
	top := fmt.Sprintf("procession-spoof-%d", os.Getpid())
	own := filepath.Join(root, top, "kubepods", "pod"+podUID, webID)
	if err := os.MkdirAll(own, 0o755); err != nil {
		testenv.Skip(t, err.Error())
	}
	t.Cleanup(func() { removeTree(filepath.Join(root, top)) })
	fake := filepath.Join(t.TempDir(), "fake")
	lie := "0::/kubepods/pod" + ownUID + "/" + nodeID + "\n"
	if err := os.WriteFile(fake, []byte(lie), 0o644); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		name, script string
	}{
		{"nothing", ``},
		{"another pod's cgroup below its own", `mkdir -p $OWN/pod` + ownUID + `/` + nodeID + ` && echo $$ > $OWN/pod` + ownUID + `/` + nodeID + `/cgroup.procs`},
		{"a whole tree of another pod", `mkdir -p $OWN/kubepods/besteffort/pod` + ownUID + `/` + nodeID + ` && echo $$ > $OWN/kubepods/besteffort/pod` + ownUID + `/` + nodeID + `/cgroup.procs`},
		{"a service of the host's", `mkdir -p $OWN/system.slice/ssh.service && echo $$ > $OWN/system.slice/ssh.service/cgroup.procs`},
		{"the runtime's monitor", `mkdir -p $OWN/crio-conmon-` + nodeID + `.scope && echo $$ > $OWN/crio-conmon-` + nodeID + `.scope/cgroup.procs`},
		{"a container of docker's", `mkdir -p $OWN/docker/` + nodeID + ` && echo $$ > $OWN/docker/` + nodeID + `/cgroup.procs`},
		{"a renamed cgroup", `mkdir -p $OWN/a && { mv $OWN/a $OWN/pod` + ownUID + ` || true; } && for d in $OWN/a $OWN/pod` + ownUID + `; do [ ! -d $d ] || echo $$ > $d/cgroup.procs; done`},
		{"a bind mount over its own proc files", `mount --bind $FAKE /proc/$$/cgroup && mount --bind $FAKE /proc/$$/mountinfo`},
		{"a mount table full of another pod", `mkdir -p $TMP/kubepods/pod` + ownUID + `/` + nodeID + ` && mount -t tmpfs none $TMP/kubepods/pod` + ownUID + `/` + nodeID},
		{"another cgroup tree mounted over", `mount --bind $FAKEDIR /sys/fs/cgroup`},
		{"a cgroup namespace of its own", `: ; NS=-C`},
	} {
		tag := fmt.Sprintf("spoof-%d", i)
		unshare := "-m"
		if strings.Contains(c.script, "NS=-C") {
			unshare = "-mC"
		}
		cmd := exec.Command("/bin/sh", "-c", `set -e; echo $$ > $OWN/cgroup.procs; exec unshare `+unshare+` /bin/sh -c "$SCRIPT"`)
		cmd.Env = append(os.Environ(), "OWN="+own, "FAKE="+fake, "FAKEDIR="+filepath.Dir(fake), "TMP="+t.TempDir(), "TAG="+tag,
			"SCRIPT=set -e; "+c.script+"\nexec /bin/true \"$TAG\"")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", c.name, err, out)
		}
		s := w.exec(tag)
		if s.w.PodUID != podUID || s.w.ContainerID != webID || s.w.Place != event.PlaceContainer {
			t.Errorf("%s: it is taken for %+v", c.name, s.w)
		}
	}
}

func removeTree(top string) {
	var dirs []string
	_ = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		_ = os.Remove(d)
	}
}

// A pid that comes back at once, in another container, is another process: two
// hundred times.
func TestRealPIDReuse(t *testing.T) {
	w := newWatch(t, nil)
	root := hierarchy(t)
	top := filepath.Join(root, fmt.Sprintf("procession-reuse-%d", os.Getpid()))
	t.Cleanup(func() { removeTree(top) })
	uids := []string{podUID, ownUID}
	ids := []string{webID, nodeID}
	procs := make([]string, 2)
	for i := range uids {
		dir := filepath.Join(top, "kubepods", "pod"+uids[i], ids[i])
		if err := os.MkdirAll(dir, 0o755); err != nil {
			testenv.Skip(t, err.Error())
		}
		procs[i] = filepath.Join(dir, "cgroup.procs")
	}
	const want = 200
	script := `echo $$ > "$PROCS"; exec /bin/true "$TAG"`
	pids := make(map[string]int32)
	last, reused := int32(0), 0
	for i := 0; reused < want; i++ {
		if i == 20*want {
			t.Fatalf("a pid came back %d times only, in %d tries", reused, i)
		}
		if last != 0 {
			if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(int(last-1))), 0); err != nil {
				testenv.Skip(t, err.Error())
			}
		}
		tag := fmt.Sprintf("reuse-%d", i)
		cmd := exec.Command("/bin/sh", "-c", script)
		cmd.Env = []string{"TAG=" + tag, "PROCS=" + procs[i%2]}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		pid := int32(cmd.ProcessState.Pid())
		if pid == last {
			reused++
		}
		pids[tag], last = pid, pid
	}
	for i := range len(pids) {
		tag := fmt.Sprintf("reuse-%d", i)
		s := w.exec(tag)
		if s.pid != pids[tag] || s.w.PodUID != uids[i%2] || s.w.ContainerID != ids[i%2] {
			t.Errorf("%s: pid %d, want %d, in %+v", tag, s.pid, pids[tag], s.w)
		}
	}
	t.Logf("%d pids came back at once, in %d tries", reused, len(pids))
}

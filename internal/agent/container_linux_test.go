package agent

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/testenv"
)

// commandVar makes the test binary the agent: its arguments, by space.
const commandVar = "PROCESSION_TEST_COMMAND"

// A bundle is what runc runs (the OCI runtime specification's config.json), as
// far as it is needed here.
type bundle struct {
	Version  string         `json:"ociVersion"`
	Root     map[string]any `json:"root"`
	Hostname string         `json:"hostname"`
	Process  ociProcess     `json:"process"`
	Mounts   []ociMount     `json:"mounts"`
	Linux    map[string]any `json:"linux"`
}

type ociProcess struct {
	User         map[string]int      `json:"user"`
	Args         []string            `json:"args"`
	Env          []string            `json:"env"`
	Cwd          string              `json:"cwd"`
	Capabilities map[string][]string `json:"capabilities"`
	NoNewPrivs   bool                `json:"noNewPrivileges"`
}

type ociMount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options"`
}

// newBundle writes the bundle of a container that is as the agent's pod is: the
// host's pid and network namespace, a root file system that cannot be written
// to, three capabilities and no more, and a /proc with the usual masks.
func newBundle(t *testing.T, id, command string) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/", root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	caps := []string{"CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"}
	b, err := json.Marshal(bundle{
		Version: "1.0.2", Root: map[string]any{"path": "rootfs", "readonly": true}, Hostname: "agent",
		Process: ociProcess{
			User: map[string]int{"uid": 0, "gid": 0}, Args: []string{"/tmp/agent"}, Env: []string{"PATH=/bin", commandVar + "=" + command}, Cwd: "/",
			Capabilities: map[string][]string{"bounding": caps, "effective": caps, "permitted": caps}, NoNewPrivs: true,
		},
		Mounts: []ociMount{
			{"/proc", "proc", "proc", nil},
			{"/dev", "tmpfs", "tmpfs", []string{"nosuid", "mode=755"}},
			{"/sys", "none", "/sys", []string{"rbind", "ro"}},
			{"/tmp", "tmpfs", "tmpfs", nil},
			{"/tmp/agent", "none", exe, []string{"bind", "ro"}},
		},
		Linux: map[string]any{
			"namespaces":    []map[string]string{{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}},
			"cgroupsPath":   fmt.Sprintf("/procession-test-%d/kubepods/burstable/pod5f0c1b9e-2b1d-4c55-9d0e-4a7c3f1e8b20/%s", os.Getpid(), id),
			"maskedPaths":   []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"},
			"readonlyPaths": []string{"/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestInContainer: the agent runs in a real container, as its pod does, and
// tells what happens in a container, its own, and what happens on the host.
func TestInContainer(t *testing.T) {
	testenv.Root(t)
	runc, err := exec.LookPath("runc")
	if err != nil {
		testenv.Skip(t, "no runc")
	}
	id := fmt.Sprintf("%064x", os.Getpid())
	state := t.TempDir()
	dir := newBundle(t, id, "events --format json --kinds exec --recorder require --duration 60s")
	cmd := exec.Command(runc, "--root", state, "run", "--bundle", dir, id)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// An agent that nobody reads waits with its last events.
		go io.Copy(io.Discard, stdout)
		if out, err := exec.Command(runc, "--root", state, "kill", id, "TERM").CombinedOutput(); err != nil {
			t.Errorf("stop the container: %v: %s", err, out)
		}
		cmd.Wait()
		if out, err := exec.Command(runc, "--root", state, "delete", "--force", id).CombinedOutput(); err != nil {
			t.Logf("delete the container: %v: %s", err, out)
		}
		removeCgroups(t)
	})
	said := bufio.NewReader(stderr)
	for {
		line, err := said.ReadString('\n')
		if strings.Contains(line, "listening") {
			break
		}
		if err != nil {
			t.Fatalf("the agent in the container did not listen: %v: %s", err, line)
		}
		t.Log(strings.TrimSpace(line))
	}
	go io.Copy(io.Discard, said)

	if out, err := exec.Command(runc, "--root", state, "exec", id, "/bin/true", "in-container").CombinedOutput(); err != nil {
		t.Fatalf("runc exec: %v: %s", err, out)
	}
	if err := exec.Command("/bin/true", "on-host").Run(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	lines.Buffer(nil, 4<<20)
	found := map[string]string{} // the argument, to the container's id
	for len(found) < 2 && lines.Scan() {
		var ev struct {
			Process   struct{ Args []string }
			Container struct{ ID string }
			Place     string
		}
		if err := json.Unmarshal(lines.Bytes(), &ev); err != nil {
			t.Fatalf("%v: %s", err, lines.Bytes())
		}
		if a := ev.Process.Args; len(a) == 2 && (a[1] == "in-container" || a[1] == "on-host") {
			found[a[1]] = ev.Container.ID
		}
	}
	if got, ok := found["in-container"]; !ok || got != id {
		t.Errorf("exec in the container: told %t, container %q, want %s", ok, got, id)
	}
	if got, ok := found["on-host"]; !ok || got != "" {
		t.Errorf("exec on the host: told %t, container %q, want none", ok, got)
	}
}

// removeCgroups removes what runc leaves of the path above the container.
func removeCgroups(t *testing.T) {
	name := fmt.Sprintf("procession-test-%d", os.Getpid())
	left, err := filepath.Glob("/sys/fs/cgroup/*/" + name)
	if err != nil {
		t.Fatal(err)
	}
	for _, top := range append(left, "/sys/fs/cgroup/"+name) {
		var dirs []string
		filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) { // children first
			if err := testenv.RemoveCgroup(d); err != nil {
				t.Error(err)
			}
		}
	}
}

package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// What a node does to the machine outside the cluster's directory, and how it
// is undone: kernel settings, one address on lo, the pods' network namespaces
// and links, kube-proxy's tables, cgroups, mounts, and the few paths that
// Kubernetes and CNI do not let one choose.

// keptSysctls are the settings that kubelet, kube-proxy and the CNI plugins
// change.
var keptSysctls = []string{
	"kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	"vm/overcommit_memory", "vm/panic_on_oom",
	"net/ipv4/ip_forward", "net/ipv4/conf/all/forwarding", "net/ipv4/conf/default/forwarding", "net/ipv4/conf/all/route_localnet",
	"net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_tcp_be_liberal", "net/netfilter/nf_conntrack_tcp_timeout_established",
	"net/netfilter/nf_conntrack_tcp_timeout_close_wait",
}

// strayDirs are the directories that the kubelet, libcni and ip make at paths
// that cannot be configured, the inner ones first.
var strayDirs = []string{"/var/log/containers", "/var/lib/cni/results", "/var/lib/cni", "/var/lib/kubelet/device-plugins", "/var/lib/kubelet", "/run/netns"}

// A hostState is what the machine was like before the first start.
type hostState struct {
	Sysctls map[string]string `json:"sysctls"`
	Absent  []string          `json:"absent"` // the strayDirs that were not there
}

func (c *Cluster) hostFile() string { return filepath.Join(c.Dir, "host.json") }

func (c *Cluster) saveHost() error {
	if _, err := os.Stat(c.hostFile()); err == nil {
		return nil
	}
	before := hostState{Sysctls: map[string]string{}}
	for _, k := range keptSysctls {
		if b, err := os.ReadFile("/proc/sys/" + k); err == nil {
			before.Sysctls[k] = strings.TrimSpace(string(b))
		}
	}
	for _, d := range strayDirs {
		if _, err := os.Stat(d); errors.Is(err, fs.ErrNotExist) {
			before.Absent = append(before.Absent, d)
		}
	}
	b, err := json.MarshalIndent(before, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(c.hostFile(), b, 0o644)
}

func (c *Cluster) hostBefore() (before hostState, err error) {
	b, err := os.ReadFile(c.hostFile())
	if err != nil {
		return before, err
	}
	if err := json.Unmarshal(b, &before); err != nil {
		return before, fmt.Errorf("%s: %w", c.hostFile(), err)
	}
	return before, nil
}

func (c *Cluster) absentBefore(dir string) bool {
	before, err := c.hostBefore()
	return err == nil && slices.Contains(before.Absent, dir)
}

func (c *Cluster) restoreHost() error {
	before, err := c.hostBefore()
	if err != nil {
		return err
	}
	var errs []error
	for k, want := range before.Sysctls {
		file := "/proc/sys/" + k
		now, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(now)) == want {
			continue
		}
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			errs = append(errs, fmt.Errorf("restore sysctl: %w", err))
		}
	}
	for _, d := range before.Absent {
		_ = os.Remove(d) // stays if somebody else has put something there
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	return os.Remove(c.hostFile())
}

// checkPrograms names what is missing and where it comes from.
func checkPrograms() error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster needs root")
	}
	for _, p := range []struct{ program, pkg string }{
		{"containerd", "containerd"}, {"ctr", "containerd"}, {"runc", "runc"}, {"etcd", "etcd-server"},
		{"nft", "nftables"}, {"ip", "iproute2"}, {"busybox", "busybox-static"}, {"mount", "mount"},
		{filepath.Join(cniBin, "ptp"), "containernetworking-plugins"},
	} {
		if _, err := exec.LookPath(p.program); err != nil {
			return fmt.Errorf("%s is missing (Debian package %s): run hack/deps-e2e.sh", p.program, p.pkg)
		}
	}
	return nil
}

// checkFree refuses a machine that is somebody else's node, or whose networks
// or ports the cluster would take.
func (c *Cluster) checkFree() error {
	if exec.Command("nft", "list", "table", "ip", "kube-proxy").Run() == nil {
		return errors.New("this machine has a kube-proxy already (nft table ip kube-proxy), which a cluster here would break; if that is only left over: nft delete table ip kube-proxy")
	}
	for _, root := range cgroupRoots() {
		if _, err := os.Stat(filepath.Join(root, "kubepods")); err == nil {
			return fmt.Errorf("this machine is a node already: it has %s/kubepods", root)
		}
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, cidr := range []string{podCIDR, serviceCIDR, nodeAddress + "/32"} {
		_, ours, err := net.ParseCIDR(cidr)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && ours.Contains(n.IP) {
				return fmt.Errorf("this machine has the address %s, in a network that the cluster needs (%s)", n.IP, cidr)
			}
		}
	}
	return c.checkPorts()
}

func (c *Cluster) checkPorts() error {
	for name, addr := range map[string]string{
		Etcd: etcdClient, APIServer: net.JoinHostPort("127.0.0.1", apiPort), Kubelet: "127.0.0.1:10250", "kubelet's health": "127.0.0.1:10248",
		ControllerManager: "127.0.0.1:10257", Scheduler: "127.0.0.1:10259", "kube-proxy's health": "127.0.0.1:10256", "kube-proxy's metrics": "127.0.0.1:10249",
	} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return fmt.Errorf("port for %s: %w", name, err)
		}
		if err := l.Close(); err != nil {
			return err
		}
	}
	return nil
}

// prepareHost gives the node its address. It is one on lo: nothing outside this
// machine reaches it, whatever its other addresses are.
func (c *Cluster) prepareHost() error {
	if err := c.saveHost(); err != nil {
		return err
	}
	if err := run("ip", "address", "replace", c.NodeIP+"/32", "dev", "lo"); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
}

func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// cgroupRoots are the mounted hierarchies, of either version.
func cgroupRoots() []string {
	var roots []string
	for _, m := range mounts() {
		if m.kind == "cgroup" || m.kind == "cgroup2" {
			roots = append(roots, m.at)
		}
	}
	return roots
}

type mountPoint struct{ at, kind string }

func mounts() []mountPoint {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	var ms []mountPoint
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 3 {
			at, err := strconv.Unquote(`"` + strings.ReplaceAll(f[1], `"`, `\"`) + `"`) // \040 for a space
			if err != nil {
				at = f[1]
			}
			ms = append(ms, mountPoint{at: at, kind: f[2]})
		}
	}
	return ms
}

// podNetworks are the network namespaces of our sandboxes, as their bundles
// name them.
func (c *Cluster) podNetworks() []string {
	bundles, _ := filepath.Glob(filepath.Join(c.Dir, "containerd-state", "io.containerd.runtime.v2.task", "k8s.io", "*", "config.json"))
	var found []string
	for _, b := range bundles {
		raw, err := os.ReadFile(b)
		if err != nil {
			continue
		}
		var spec struct {
			Linux struct {
				Namespaces []struct{ Type, Path string } `json:"namespaces"`
			} `json:"linux"`
		}
		if json.Unmarshal(raw, &spec) != nil {
			continue
		}
		for _, ns := range spec.Linux.Namespaces {
			if ns.Type == "network" && strings.HasPrefix(filepath.Base(ns.Path), "cni-") && !slices.Contains(found, ns.Path) {
				found = append(found, ns.Path)
			}
		}
	}
	return found
}

// killContainers ends every container and its shim. The kubelet must be gone,
// or it would start them again.
func (c *Cluster) killContainers(ctx context.Context) error {
	if _, ok := c.running(Containerd); !ok {
		return c.killShims()
	}
	out, err := c.ctr(ctx, "containers", "ls", "-q")
	if err != nil {
		return fmt.Errorf("list containers: %w: %s", err, out)
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for _, id := range strings.Fields(out) {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			// Each of these fails for a container that has no task any more; what is
			// left then has a shim, and those are looked for below.
			_, _ = c.ctr(ctx, "tasks", "kill", "--all", "--signal", "SIGKILL", id)
			_, _ = c.ctr(ctx, "tasks", "rm", "--force", id)
			_, _ = c.ctr(ctx, "containers", "rm", id)
		})
	}
	wg.Wait()
	return c.killShims()
}

// killShims ends the shims that serve our socket and no others: one can outlive
// its task.
func (c *Cluster) killShims() error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, d := range dirs {
		raw, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil {
			continue // ended meanwhile
		}
		args := strings.Split(string(raw), "\x00")
		if !strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") {
			continue
		}
		i := slices.Index(args, "-address")
		if i < 0 || i+1 >= len(args) || args[i+1] != c.socket() {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			killChildren(pid)
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return nil
}

// killChildren ends the first processes of a shim's containers, and with each
// its pid namespace.
func killChildren(pid int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return
	}
	for _, f := range strings.Fields(string(b)) {
		if child, err := strconv.Atoi(f); err == nil {
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
	}
}

// cleanHost takes back what prepareHost and the programs did. It goes on after
// an error and returns them all.
func (c *Cluster) cleanHost(ctx context.Context, networks []string) error {
	if _, err := os.Stat(c.hostFile()); errors.Is(err, fs.ErrNotExist) {
		return nil // never prepared: whatever is there is somebody else's
	}
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	for _, n := range networks {
		if err := syscall.Unmount(n, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			note(fmt.Errorf("unmount %s: %w", n, err))
		}
		note(removeIfThere(n))
	}
	ms := mounts()
	slices.Reverse(ms) // the last mounted first
	for _, m := range ms {
		if strings.HasPrefix(m.at, c.Dir+"/") {
			if err := syscall.Unmount(m.at, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
				note(fmt.Errorf("unmount %s: %w", m.at, err))
			}
		}
	}
	for _, family := range []string{"ip", "ip6"} {
		_ = exec.CommandContext(ctx, "nft", "delete", "table", family, "kube-proxy").Run() // fails if it was not made
	}
	_ = exec.CommandContext(ctx, "ip", "address", "del", c.NodeIP+"/32", "dev", "lo").Run() // likewise
	for _, root := range cgroupRoots() {
		for _, top := range []string{"kubepods", "k8s.io"} {
			note(removeCgroups(ctx, filepath.Join(root, top)))
		}
	}
	note(c.removeStrayFiles())
	note(c.restoreHost())
	return errors.Join(errs...)
}

// removeCgroups removes a tree of empty cgroups, deepest first. The kernel may
// need a moment after the last process ended.
func removeCgroups(ctx context.Context, top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone meanwhile, or never there
		}
		if d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.Reverse(dirs)
	return poll(ctx, cgroupPatience, func() error {
		for _, d := range dirs {
			if err := syscall.Rmdir(d); err != nil && !errors.Is(err, syscall.ENOENT) {
				return fmt.Errorf("remove cgroup %s: %w", d, err)
			}
		}
		return nil
	})
}

// removeStrayFiles removes what the kubelet and libcni write to paths that
// cannot be configured.
func (c *Cluster) removeStrayFiles() error {
	var errs []error
	links, _ := filepath.Glob("/var/log/containers/*")
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, c.Dir+"/") {
			errs = append(errs, removeIfThere(l))
		}
	}
	// Sockets and a checkpoint of the kubelet's device manager, of a kubelet that
	// was not there before ours.
	for _, f := range []string{"kubelet.sock", "kubelet_internal_checkpoint", "DEPRECATION"} {
		if c.absentBefore("/var/lib/kubelet") {
			errs = append(errs, removeIfThere(filepath.Join("/var/lib/kubelet/device-plugins", f)))
		}
	}
	results, _ := filepath.Glob("/var/lib/cni/results/" + networkName + "-*")
	for _, r := range results {
		errs = append(errs, removeIfThere(r))
	}
	return errors.Join(errs...)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

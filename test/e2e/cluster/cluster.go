// Package cluster runs a real Kubernetes node on this machine: etcd, API server,
// controller manager, scheduler, kubelet, kube-proxy, containerd, runc and CNI,
// with TLS, RBAC, webhook authorization on the kubelet and service-account
// tokens as in production. Tests call Up:
//
//	c := cluster.Up(t)
//	c.Apply(t, manifest)
//	c.WaitReady(t, "default", "app=shop", 1)
//	out := c.Exec(t, "default", "shop", "", "id")
//
// The Kubernetes programs are built from their Go modules once per version
// (hack/kubernetes.sh), the rest is Debian's (hack/deps-e2e.sh).
//
// # What it promises
//
//   - A cluster that runs is used as it is, one that runs in part is completed,
//     and otherwise a new one is made, with nothing in it from before.
//   - One test at a time: Up waits until nobody else in any process uses the
//     cluster. It is there until the test and its subtests are over.
//   - Down ends what was started here and nothing else: a process is known by pid,
//     start time and boot, a shim by its socket, a network namespace by its
//     sandbox. Kernel settings are put back.
//   - Nothing listens beyond this machine: the node's address is one on lo, and
//     pods have no way out.
//   - Logs stay until the next new cluster; what a failed test saw is kept
//     beside them.
//
// What it is not: its network plugin enforces no NetworkPolicy, there is no
// cluster DNS and no storage class, etcd does not sync to disk, and a hostNetwork
// pod could speak to etcd, which listens on loopback without TLS.
package cluster

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"text/template"
	"time"
)

// The programs of a cluster, as Stop, Start and LogFile name them.
const (
	Containerd        = "containerd"
	Etcd              = "etcd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	Kubelet           = "kubelet"
	KubeProxy         = "kube-proxy"
)

const (
	nodeName    = "node1"
	nodeAddress = "198.18.77.1" // of the range for benchmarks (RFC 2544): nobody's
	apiPort     = "6443"
	etcdClient  = "127.0.0.1:12379"
	etcdPeer    = "127.0.0.1:12380"
	podCIDR     = "10.244.0.0/24"
	serviceCIDR = "10.96.0.0/16"
	serviceIP   = "10.96.0.1" // of the API server
	networkName = "procession-e2e"
	pauseImage  = "e2e.local/pause:1"
	cniBin      = "/usr/lib/cni"

	// How long a step may take. A loaded machine with two cores needs a tenth of it.
	patience       = 3 * time.Minute
	cgroupPatience = 10 * time.Second
)

// A Cluster is the one of a directory; it need not run.
type Cluster struct {
	Dir        string // state and logs
	Bin        string // kubectl and the other Kubernetes programs, and helm
	Root       string // of this module's checkout
	Node       string // the node's name
	NodeIP     string // the node's address
	Kubeconfig string // a cluster administrator's

	log      io.Writer
	evidence string // where a failed test's is kept, once it is
}

//go:embed conf
var conf embed.FS

// Open finds the checkout, the Kubernetes programs, which it builds if need be,
// and the cluster's directory: $PROCESSION_CACHE/cluster or
// ~/.cache/procession/cluster. Progress goes to log.
func Open(ctx context.Context, log io.Writer) (*Cluster, error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	cache := os.Getenv("PROCESSION_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, err
		}
		cache = filepath.Join(user, "procession")
	}
	if cache, err = filepath.Abs(cache); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "hack", "kubernetes.sh"))
	var diag bytes.Buffer
	cmd.Stderr = io.MultiWriter(log, &diag)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("build the Kubernetes programs: %w: %s", err, tail(diag.Bytes(), 1000))
	}
	dir := filepath.Join(cache, "cluster")
	if n := len(filepath.Join(dir, "containerd.sock.ttrpc")); n > 107 {
		return nil, fmt.Errorf("the cluster's directory %s is too long for a socket in it: set PROCESSION_CACHE to a shorter one", dir)
	}
	return &Cluster{
		Dir: dir, Bin: strings.TrimSpace(string(out)), Root: root, Node: nodeName, NodeIP: nodeAddress,
		Kubeconfig: filepath.Join(dir, "pki", "admin.conf"), log: log,
	}, os.MkdirAll(dir, 0o755)
}

// moduleRoot is the checkout that the working directory is in.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; d != "/"; d = filepath.Dir(d) {
		b, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module github.com/procession-dev/procession\n") {
			return d, nil
		}
	}
	return "", fmt.Errorf("%s is not in a checkout of Procession", dir)
}

func (c *Cluster) socket() string { return filepath.Join(c.Dir, "containerd.sock") }

// LogFile is where a program's output goes.
func (c *Cluster) LogFile(program string) string {
	return filepath.Join(c.Dir, "log", program+".log")
}

// Up gives the test a running cluster. One that it had to start is taken down
// when the test is over, unless PROCESSION_KEEP_CLUSTER is set; one that ran
// before is left running.
func Up(t testing.TB) *Cluster {
	t.Helper()
	ctx := t.Context()
	c, err := Open(ctx, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(unlock)
	_, ran := c.running(Kubelet)
	err = c.Start(ctx)
	t.Cleanup(func() {
		c.KeepEvidence(t)
		if ran || os.Getenv("PROCESSION_KEEP_CLUSTER") != "" {
			return
		}
		if err := c.Down(context.WithoutCancel(ctx)); err != nil {
			t.Errorf("take the cluster down: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// lock waits until this process alone may use the cluster.
func (c *Cluster) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(c.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	said := false
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		if !said {
			said = true
			fmt.Fprintf(c.log, "somebody else uses the cluster (%s is locked), waiting\n", f.Name())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Lock is for programs that are not tests: it waits until nobody uses the
// cluster, and nobody else does until unlock is called.
func (c *Cluster) Lock(ctx context.Context) (unlock func(), err error) { return c.lock(ctx) }

// Start starts what does not run and returns when pods can be made. The caller
// holds the lock.
func (c *Cluster) Start(ctx context.Context) error {
	began := time.Now()
	say := func(what string) { fmt.Fprintf(c.log, "%6.1fs  %s\n", time.Since(began).Seconds(), what) }
	if err := c.prepare(ctx); err != nil {
		return err
	}
	for _, program := range []string{Containerd, Etcd, APIServer} {
		if err := c.Run(program); err != nil {
			return err
		}
	}
	if err := c.waitFor(ctx, Containerd, func() error { _, err := c.ctr(ctx, "version"); return err }); err != nil {
		return err
	}
	if err := c.loadPause(ctx); err != nil {
		return err
	}
	say("containerd ready")
	if err := c.waitFor(ctx, APIServer, func() error { _, err := c.Kubectl(ctx, "get", "--raw=/readyz"); return err }); err != nil {
		return err
	}
	say("API server ready")
	for _, program := range []string{ControllerManager, Scheduler, Kubelet, KubeProxy} {
		if err := c.Run(program); err != nil {
			return err
		}
	}
	if err := c.waitFor(ctx, Kubelet, func() error { return c.ready(ctx) }); err != nil {
		return err
	}
	say("node ready")
	// Without it no pod is admitted.
	if err := c.waitFor(ctx, ControllerManager, func() error { _, err := c.Kubectl(ctx, "get", "serviceaccount", "default"); return err }); err != nil {
		return err
	}
	if err := c.waitFor(ctx, KubeProxy, func() error {
		out, err := exec.CommandContext(ctx, "nft", "list", "map", "ip", "kube-proxy", "service-ips").CombinedOutput()
		if err != nil {
			return fmt.Errorf("no service rules yet: %s", tail(out, 200))
		}
		return nil
	}); err != nil {
		return err
	}
	say("cluster ready")
	return nil
}

// Running says which of the programs run.
func (c *Cluster) Running() []string {
	var names []string
	for _, n := range []string{Containerd, Etcd, APIServer, ControllerManager, Scheduler, Kubelet, KubeProxy} {
		if _, ok := c.running(n); ok {
			names = append(names, n)
		}
	}
	return names
}

// prepare makes the directory and the machine ready. What an ended cluster left
// behind goes first.
func (c *Cluster) prepare(ctx context.Context) error {
	if err := checkPrograms(); err != nil {
		return err
	}
	if len(c.Running()) == 0 {
		if err := c.Down(ctx); err != nil {
			return fmt.Errorf("clean up an old cluster: %w", err)
		}
		if err := c.checkFree(); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(c.Dir, "log")); err != nil {
			return err
		}
	}
	for _, d := range []string{"log", "pids", "etc/cni", "etc/static", "plugins", "kubelet", "etcd"} {
		if err := os.MkdirAll(filepath.Join(c.Dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := c.prepareHost(); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(c.Dir, "pki", "sa.pub")); err != nil {
		server := "https://" + c.NodeIP + ":" + apiPort
		if err := writePKI(filepath.Join(c.Dir, "pki"), server, c.Node, c.NodeIP, serviceIP); err != nil {
			return err
		}
	}
	return c.writeConf()
}

func (c *Cluster) writeConf() error {
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	data := map[string]string{
		"Dir": c.Dir, "Socket": c.socket(), "NodeIP": c.NodeIP, "PauseImage": pauseImage, "CNIBin": cniBin,
		"Runc": runc, "Name": networkName, "PodCIDR": podCIDR,
	}
	tmpl, err := template.New("").Option("missingkey=error").ParseFS(conf, "conf/*")
	if err != nil {
		return err
	}
	for _, t := range tmpl.Templates() {
		if t.Name() == "" {
			continue
		}
		var b bytes.Buffer
		if err := t.Execute(&b, data); err != nil {
			return err
		}
		to := filepath.Join(c.Dir, "etc", t.Name())
		if t.Name() == "cni.conflist" {
			to = filepath.Join(c.Dir, "etc", "cni", "10-"+t.Name())
		}
		// kube-proxy ends when its file is written, even to the same.
		if old, err := os.ReadFile(to); err == nil && bytes.Equal(old, b.Bytes()) {
			continue
		}
		if err := os.WriteFile(to, b.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Run starts one program again after Stop, without waiting for it to be ready.
func (c *Cluster) Run(program string) error {
	in := func(parts ...string) string { return filepath.Join(append([]string{c.Dir}, parts...)...) }
	pki := func(name string) string { return in("pki", name) }
	bin := func(name string) string { return filepath.Join(c.Bin, name) }
	switch program {
	case Containerd:
		return c.start(program, []string{"containerd", "--config", in("etc", "containerd.toml")})
	case Etcd:
		return c.start(program, []string{"etcd", "--data-dir", in("etcd"), "--unsafe-no-fsync", "--log-level", "warn",
			"--listen-client-urls", "http://" + etcdClient, "--advertise-client-urls", "http://" + etcdClient,
			"--listen-peer-urls", "http://" + etcdPeer, "--initial-advertise-peer-urls", "http://" + etcdPeer,
			"--initial-cluster", "default=http://" + etcdPeer})
	case APIServer:
		return c.start(program, []string{bin(program), "--etcd-servers=http://" + etcdClient,
			"--secure-port=" + apiPort, "--bind-address=" + c.NodeIP, "--advertise-address=" + c.NodeIP,
			"--service-cluster-ip-range=" + serviceCIDR, "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--client-ca-file=" + pki("ca.crt"), "--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
			"--kubelet-client-certificate=" + pki("apiserver-kubelet-client.crt"), "--kubelet-client-key=" + pki("apiserver-kubelet-client.key"),
			"--kubelet-certificate-authority=" + pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--service-account-key-file=" + pki("sa.pub"),
			"--service-account-signing-key-file=" + pki("sa.key"),
			"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + pki("front-proxy-client.crt"), "--proxy-client-key-file=" + pki("front-proxy-client.key"),
			"--audit-policy-file=" + in("etc", "audit.yaml"), "--audit-log-path=" + c.LogFile("audit"), "--audit-log-maxsize=500",
			"--cert-dir=" + in("apiserver"), "--allow-privileged=true", "--profiling=false"})
	case ControllerManager:
		conf := pki("controller-manager.conf")
		return c.start(program, []string{bin(program), "--kubeconfig=" + conf, "--authentication-kubeconfig=" + conf, "--authorization-kubeconfig=" + conf,
			"--bind-address=127.0.0.1", "--cert-dir=" + in("controller-manager"), "--leader-elect=false", "--use-service-account-credentials=true",
			"--root-ca-file=" + pki("ca.crt"), "--service-account-private-key-file=" + pki("sa.key"),
			"--cluster-signing-cert-file=" + pki("ca.crt"), "--cluster-signing-key-file=" + pki("ca.key")})
	case Scheduler:
		conf := pki("scheduler.conf")
		return c.start(program, []string{bin(program), "--kubeconfig=" + conf, "--authentication-kubeconfig=" + conf, "--authorization-kubeconfig=" + conf,
			"--bind-address=127.0.0.1", "--cert-dir=" + in("scheduler"), "--leader-elect=false"})
	case Kubelet:
		return c.start(program, []string{bin(program), "--config=" + in("etc", "kubelet.yaml"), "--kubeconfig=" + pki("kubelet.conf"),
			"--hostname-override=" + c.Node, "--node-ip=" + c.NodeIP, "--root-dir=" + in("kubelet"), "--cert-dir=" + in("kubelet", "pki"), "--v=2"})
	case KubeProxy:
		return c.start(program, []string{bin(program), "--config=" + in("etc", "kube-proxy.yaml"), "--hostname-override=" + c.Node})
	}
	return fmt.Errorf("%q is not a program of the cluster", program)
}

// waitFor waits for an answer that depends on a program, and says the end of
// its log if the program died or the time is over.
func (c *Cluster) waitFor(ctx context.Context, program string, ask func() error) error {
	dead := false
	err := poll(ctx, patience, func() error {
		err := ask()
		if _, ok := c.running(program); err != nil && !ok {
			dead = true
			return nil
		}
		return err
	})
	if dead {
		err = errors.New("it ended by itself")
	}
	if err == nil {
		return nil
	}
	log, _ := os.ReadFile(c.LogFile(program))
	return fmt.Errorf("%s: %w\n%s ends with:\n%s", program, err, c.LogFile(program), tail(log, 2000))
}

func (c *Cluster) loadPause(ctx context.Context) error {
	bin := filepath.Join(c.Dir, "pause")
	if _, err := os.Stat(bin); err != nil {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "./test/e2e/cluster/pause")
		cmd.Dir, cmd.Env = c.Root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build pause: %w: %s", err, tail(out, 1000))
		}
	}
	return c.BuildImage(ctx, Image{Name: pauseImage, Entrypoint: []string{"/pause"}, Files: []File{{Path: "/pause", From: bin}}})
}

// Down stops the cluster and takes back what it did to the machine. Only the
// logs stay. It is harmless where nothing runs.
func (c *Cluster) Down(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx) // half a clean-up is none
	networks := c.podNetworks()
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	note(c.stop(ctx, stopGrace, KubeProxy, Kubelet, Scheduler, ControllerManager, APIServer))
	note(c.stop(ctx, stopGrace, Etcd))
	note(c.killContainers(ctx))
	note(c.stop(ctx, stopGrace, Containerd))
	note(c.cleanHost(ctx, networks))
	if len(errs) > 0 {
		return errors.Join(errs...) // what is left tells why
	}
	entries, err := os.ReadDir(c.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case "lock", "log", "failures":
		default:
			note(os.RemoveAll(filepath.Join(c.Dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func tail(b []byte, n int) string {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return string(bytes.TrimSpace(b))
}

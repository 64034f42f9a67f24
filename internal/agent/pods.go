package agent

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/enrich"
	"github.com/procession-dev/procession/internal/enrich/kube"
	"github.com/procession-dev/procession/internal/event"
)

// Where Kubernetes puts a pod's credentials, and the kubelet its Pods API.
const (
	accountDir = "/var/run/secrets/kubernetes.io/serviceaccount"
	podsSocket = "/var/lib/kubelet/pods-api/pods-api.sock"
)

// podFlags say who knows the pods of this node.
type podFlags struct {
	socket, kubelet           string
	ca, serverName, tokenFile string
	api                       bool
	apiServer                 string
	annotations               string
	uid                       string
}

func (f *podFlags) register(fs *flag.FlagSet) {
	kubelet, api := "", ""
	if host := os.Getenv("KUBERNETES_SERVICE_HOST"); host != "" {
		api = "https://" + net.JoinHostPort(host, cmp.Or(os.Getenv("KUBERNETES_SERVICE_PORT"), "443"))
		if ip := os.Getenv("HOST_IP"); ip != "" {
			kubelet = "https://" + net.JoinHostPort(ip, "10250")
		}
	}
	fs.StringVar(&f.socket, "pods-socket", podsSocket, "`path` of the kubelet's Pods API socket, used if it is there; empty is never")
	fs.StringVar(&f.kubelet, "kubelet", kubelet, "`https://host:port` of the kubelet, asked for this node's pods; empty is never (default in a pod: that of $HOST_IP)")
	fs.StringVar(&f.ca, "kubelet-ca", filepath.Join(accountDir, "ca.crt"), "`file` with the certificates that make the kubelet's trusted; for one it made itself /var/lib/kubelet/pki/kubelet.crt")
	fs.StringVar(&f.serverName, "kubelet-server-name", "", "`name` the kubelet's certificate is for (default the host in --kubelet)")
	fs.StringVar(&f.tokenFile, "kubelet-token", filepath.Join(accountDir, "token"), "`file` with the token shown to the kubelet and the API server")
	fs.BoolVar(&f.api, "pods-api-watch", false, "watch this node's pods at the API server when the kubelet cannot be asked; it needs list and watch on pods")
	fs.StringVar(&f.apiServer, "api-server", api, "`https://host:port` of the API server (default in a pod: that of its cluster)")
	fs.StringVar(&f.annotations, "pod-annotations", "", "`names` of pod annotations to keep for rules and alerts, with commas")
	fs.StringVar(&f.uid, "pod-uid", os.Getenv("POD_UID"), "the agent's own pod `uid` (default $POD_UID)")
}

// openPods makes what knows the pods of this node; nil when there is nobody to
// be asked, as outside of Kubernetes.
func (a *agent) openPods() error {
	f := &a.flags.pods
	c := kube.Config{Socket: f.socket, Node: a.flags.node, File: filepath.Join(a.flags.state, "pods"), Annotations: list(f.annotations), Log: a.log}
	if _, err := os.Stat(f.socket); err != nil && f.kubelet == "" {
		c.Socket = "" // no Kubernetes on this machine, at least not with this socket
	}
	if f.kubelet != "" {
		c.Kubelet = kube.Server{URL: f.kubelet, CAFile: f.ca, ServerName: f.serverName, TokenFile: f.tokenFile}
	}
	if f.api {
		if f.apiServer == "" {
			return usagef("--pods-api-watch: the API server is not known; name it with --api-server")
		}
		c.API = kube.Server{URL: f.apiServer, CAFile: filepath.Join(accountDir, "ca.crt"), TokenFile: f.tokenFile}
	}
	if c.Socket == "" && c.Kubelet.URL == "" && c.API.URL == "" {
		return nil
	}
	if err := os.MkdirAll(a.flags.state, 0o700); err != nil {
		return fmt.Errorf("--state: %w", err)
	}
	var err error
	a.pods, err = kube.New(c)
	return err
}

// enrichment is how the agent finds out where processes run.
func (a *agent) enrichment() enrich.Config {
	c := enrich.Config{PodUID: a.flags.pods.uid}
	if a.pods != nil {
		c.Pods = a.pods
	}
	return c
}

// waitForNames has what leaves before its pod is known completed afterwards.
func (a *agent) waitForNames() {
	a.late.complete, a.late.build = a.pipe.who.Complete, &a.build
	a.late.send = func(it *pb.Item) { a.put(it, "amendment") }
	a.late.reconsider = func(ev *event.Event, before *event.Workload) { a.engine.Reconsider(ev, before, a.emit) }
	if a.pods != nil {
		a.late.generation = a.pods.Generation
	}
}

// watchPods has the pipeline look at what waits for them whenever there is
// something new about the pods.
func (a *agent) watchPods(ctx context.Context) error {
	for {
		changed := a.pods.Changed()
		if a.late.waiting.Load() > 0 {
			a.conn.Wake()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

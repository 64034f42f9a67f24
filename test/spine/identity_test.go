package spine

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/testenv"
)

const identityPolicy = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata:
  name: identity
spec:
  rules:
    - name: tagged
      events: [Exec]
      condition: process.cmdline.contains('spine-tag-')
      severity: High
      message: tagged
    - name: in-shop
      events: [Exec]
      condition: process.cmdline.contains('spine-tag-') && pod.namespace == 'shop'
      severity: High
      message: in shop
    - name: in-other
      events: [Exec]
      condition: process.cmdline.contains('spine-tag-') && pod.namespace == 'other'
      severity: High
      message: in other
`

// A fakeKubelet answers at /pods with what the test says. Its certificate is of
// its own making, as many a kubelet's.
type fakeKubelet struct {
	*httptest.Server
	dir   string // ca.crt, token
	pods  atomic.Pointer[string]
	calls atomic.Int64
}

func newKubelet(t *testing.T) *fakeKubelet {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	k := &fakeKubelet{dir: t.TempDir()}
	k.list()
	for name, text := range map[string][]byte{"token": []byte("secret"), "ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})} {
		if err := os.WriteFile(filepath.Join(k.dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" || r.URL.Path != "/pods" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		io.WriteString(w, *k.pods.Load())
		k.calls.Add(1)
	}))
	k.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	k.Config.ErrorLog = log.New(io.Discard, "", 0)
	k.StartTLS()
	t.Cleanup(k.Close)
	return k
}

// list sets the pods, each as the kubelet writes one.
func (k *fakeKubelet) list(pods ...string) {
	s := `{"kind":"PodList","apiVersion":"v1","items":[` + strings.Join(pods, ",") + `]}`
	k.pods.Store(&s)
}

// flags are those of an agent that asks it.
func (k *fakeKubelet) flags() []string {
	return []string{"--kubelet", k.URL, "--kubelet-ca", filepath.Join(k.dir, "ca.crt"), "--kubelet-token", filepath.Join(k.dir, "token")}
}

// kubeletPod is a pod; id is its container's, or "" while it is being made.
func kubeletPod(uid, namespace, name, id string) string {
	if id != "" {
		id = fmt.Sprintf(`{"name":"main","containerID":"containerd://%s"}`, id)
	}
	return fmt.Sprintf(`{"metadata":{"uid":%q,"namespace":%q,"name":%q,"labels":{"app":"web"}},
		"spec":{"containers":[{"name":"main","image":"web:1"}]},"status":{"containerStatuses":[%s]}}`, uid, namespace, name, id)
}

const (
	webUID   = "1fc8cbb1-1d73-41f8-a9ba-825cb32d14b2"
	otherUID = "fe541ac9-403b-452d-94df-674a9282d02d"
)

func containerID(n int) string { return fmt.Sprintf("%064x", 0xc0ffee0000+n) }

// container makes the cgroup of a container and returns its file of processes.
func container(t *testing.T, uid, id string) string {
	t.Helper()
	root := "/sys/fs/cgroup/memory"
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		root = "/sys/fs/cgroup"
	}
	dir := testenv.Cgroup(t, root, fmt.Sprintf("procession-spine-%d/kubepods/pod%s/%s", os.Getpid(), uid, id))
	return filepath.Join(dir, "cgroup.procs")
}

// runIn runs true with a tag in a container.
func runIn(t *testing.T, procs, tag string) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `echo $$ > "$PROCS" && exec /bin/true "$TAG"`)
	cmd.Env = append(os.Environ(), "PROCS="+procs, "TAG="+tag)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// An identityLine has what alerts and amendments say of where a process runs.
type identityLine struct {
	ID, Kind, Rule, Amends string
	Late                   bool
	Place, PlaceReason     string
	Process                struct{ Args []string }
	Container              struct{ ID, Name, Image string }
	Pod                    struct{ UID, Namespace, Name string }
}

// about are the alerts of a tag by rule, and the amendments of each.
func about(t *testing.T, file, tag string) (alerts map[string]identityLine, amendments map[string][]identityLine) {
	t.Helper()
	alerts, amendments = map[string]identityLine{}, map[string][]identityLine{}
	for _, l := range decodeLines[identityLine](t, file) {
		switch {
		case l.Kind == "Amendment":
			amendments[l.Amends] = append(amendments[l.Amends], l)
		case len(l.Process.Args) > 1 && l.Process.Args[1] == tag:
			rule := l.Rule[strings.LastIndexByte(l.Rule, '/')+1:]
			if _, twice := alerts[rule]; twice {
				t.Fatalf("%s alerted twice of %s", rule, tag)
			}
			alerts[rule] = l
		}
	}
	return alerts, amendments
}

// TestLateIdentity: an alert leaves at once; what the kubelet tells later follows
// it, rules that need it are decided then, and no other pod is ever named.
func TestLateIdentity(t *testing.T) {
	k := newKubelet(t)
	p := newCollector(t, identityPolicy)
	// Another pod of the same name, all the time.
	decoy := kubeletPod(otherUID, "other", "web", containerID(2))
	k.list(decoy)
	p.startAgent(k.flags()...)
	eventually(t, "the kubelet is asked", 30*time.Second, func() bool { return k.calls.Load() > 0 })

	web := container(t, webUID, containerID(1))
	runIn(t, web, "spine-tag-1")
	eventually(t, "the alert is there before the pod is known", 30*time.Second, func() bool {
		alerts, _ := about(t, p.alerts, "spine-tag-1")
		return alerts["tagged"].ID != ""
	})
	alerts, _ := about(t, p.alerts, "spine-tag-1")
	if a := alerts["tagged"]; a.PlaceReason != "pod-not-listed" || a.Container.ID != containerID(1) || a.Pod.UID != webUID || a.Pod.Name != "" {
		t.Errorf("the alert at once: %+v", a)
	}
	k.list(decoy, kubeletPod(webUID, "shop", "web", ""))
	eventually(t, "the pod is known", 30*time.Second, func() bool {
		alerts, amendments := about(t, p.alerts, "spine-tag-1")
		return len(amendments[alerts["tagged"].ID]) == 1 && alerts["in-shop"].ID != ""
	})
	k.list(decoy, kubeletPod(webUID, "shop", "web", containerID(1)))
	eventually(t, "the container is known", 60*time.Second, func() bool {
		alerts, amendments := about(t, p.alerts, "spine-tag-1")
		return len(amendments[alerts["tagged"].ID]) == 2 && len(amendments[alerts["in-shop"].ID]) == 1
	})
	alerts, amendments := about(t, p.alerts, "spine-tag-1")
	checkIdentity(t, alerts, amendments)

	// What is known now is known at once, also with the kubelet gone.
	runIn(t, web, "spine-tag-2")
	wantAtOnce(t, p, "spine-tag-2", "shop")
	runIn(t, container(t, otherUID, containerID(2)), "spine-tag-3")
	wantAtOnce(t, p, "spine-tag-3", "other")
	if err := p.agent.stop(syscall.SIGTERM, 60*time.Second); err != nil {
		t.Fatal(err)
	}
	k.Close()
	p.startAgent(k.flags()...)
	runIn(t, web, "spine-tag-4")
	wantAtOnce(t, p, "spine-tag-4", "shop")
}

func checkIdentity(t *testing.T, alerts map[string]identityLine, amendments map[string][]identityLine) {
	t.Helper()
	if len(alerts) != 2 || !alerts["in-shop"].Late || alerts["tagged"].Late {
		t.Errorf("alerts: %+v", alerts)
	}
	if a := alerts["in-shop"]; a.Pod.Namespace != "shop" || a.Pod.Name != "web" || a.PlaceReason != "container-not-listed" {
		t.Errorf("the late alert: %+v", a)
	}
	two := amendments[alerts["tagged"].ID]
	for i, reason := range []string{"container-not-listed", ""} {
		if m := two[i]; m.Pod.Namespace != "shop" || m.Pod.Name != "web" || m.PlaceReason != reason || m.Place != "container" {
			t.Errorf("amendment %d: %+v", i+1, m)
		}
	}
	if c := two[1].Container; c.Name != "main" || c.Image != "web:1" || c.ID != containerID(1) {
		t.Errorf("container: %+v", c)
	}
}

// wantAtOnce wants alerts that have everything, of the tag's rule and of that
// of the namespace alone.
func wantAtOnce(t *testing.T, p *pair, tag, namespace string) {
	t.Helper()
	eventually(t, "alerts of "+tag, 30*time.Second, func() bool {
		alerts, _ := about(t, p.alerts, tag)
		return len(alerts) >= 2
	})
	alerts, _ := about(t, p.alerts, tag)
	for _, rule := range []string{"tagged", "in-" + namespace} {
		a := alerts[rule]
		if a.Pod.Namespace != namespace || a.Pod.Name != "web" || a.Container.Name != "main" || a.PlaceReason != "" || a.Late {
			t.Errorf("%s, %s: %+v", tag, rule, a)
		}
	}
	if len(alerts) != 2 {
		t.Errorf("%s: %d alerts, want 2", tag, len(alerts))
	}
}

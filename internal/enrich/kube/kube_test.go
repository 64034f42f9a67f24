package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// id is a container's id that ends in n.
func id(n int) string { return fmt.Sprintf("%064x", n) }

func uid(n int) string { return fmt.Sprintf("1fc8cbb1-1d73-41f8-a9ba-%012x", n) }

// pod is a pod as the kubelet shows it, with one container that runs.
func pod(n int, namespace, name string) *corev1.Pod {
	yes := true
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{},
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: namespace, UID: types.UID(uid(n)), ResourceVersion: fmt.Sprint(1000 + n),
			Labels: map[string]string{"app": "web", "pod-template-hash": "7d9c6f8b5b"},
			Annotations: map[string]string{
				"kubernetes.io/config.source": "api", "team": "shop",
				"kubectl.kubernetes.io/last-applied-configuration": strings.Repeat(`{"a":"b"}`, 100),
			},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-7d9c6f8b5b", Controller: &yes}},
		},
		Spec: corev1.PodSpec{
			ServiceAccountName: "shop",
			Containers: []corev1.Container{{
				Name: "web", Image: "registry.example/shop/web:1.2",
				LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/bin/check", "--fast"}}}},
			}},
		},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			Name: "web", ContainerID: "containerd://" + id(n),
			ImageID: "registry.example/shop/web@sha256:" + id(77),
		}}},
	}
}

func podList(pods ...*corev1.Pod) *corev1.PodList {
	l := &corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}}
	l.ResourceVersion = "5000"
	for _, p := range pods {
		l.Items = append(l.Items, *p)
	}
	return l
}

// A pki makes servers' certificates.
type pki struct {
	t   *testing.T
	key *ecdsa.PrivateKey
	ca  *x509.Certificate
	pem string // file
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.crt")
	write(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	return &pki{t, key, ca, file}
}

// cert is a server's certificate for name, valid from the given time for a day.
func (k *pki) cert(name string, from time.Time) tls.Certificate {
	k.t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotBefore: from, NotAfter: from.Add(24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(name); ip != nil {
		tmpl.DNSNames, tmpl.IPAddresses = nil, []net.IP{ip}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, k.ca, &k.key.PublicKey, k.key)
	if err != nil {
		k.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k.key}
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A server is a kubelet, or an API server, as far as HTTPS goes: what it
// answers is the test's.
type server struct {
	*httptest.Server
	calls  atomic.Int64
	answer atomic.Pointer[http.HandlerFunc]
	ca     string
	token  string // file
}

func (s *server) set(h http.HandlerFunc) { s.answer.Store(&h) }

// pods makes the server answer with a list.
func (s *server) pods(t *testing.T, pods ...*corev1.Pod) {
	t.Helper()
	b, err := json.Marshal(podList(pods...))
	if err != nil {
		t.Fatal(err)
	}
	s.set(func(w http.ResponseWriter, _ *http.Request) { w.Write(b) })
}

func newServer(t *testing.T) *server {
	t.Helper()
	k := newPKI(t)
	return serveWith(t, k, k.cert("127.0.0.1", time.Now().Add(-time.Hour)))
}

func serveWith(t *testing.T, k *pki, cert tls.Certificate) *server {
	t.Helper()
	s := &server{ca: k.pem, token: filepath.Join(t.TempDir(), "token")}
	write(t, s.token, "secret\n")
	s.set(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		if b, err := os.ReadFile(s.token); err != nil || r.Header.Get("Authorization") != "Bearer "+strings.TrimSpace(string(b)) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		(*s.answer.Load())(w, r)
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *server) server() Server { return Server{URL: s.URL, CAFile: s.ca, TokenFile: s.token} }

// start runs Pods until the test ends.
func start(t *testing.T, c Config) *Pods {
	t.Helper()
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	p.retry = 20 * time.Millisecond
	p.runFor(t)
	return p
}

// runFor runs p, and returns how to stop it.
func (p *Pods) runFor(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		if err := p.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			wg.Wait()
		})
	}
	t.Cleanup(stop)
	return stop
}

// until waits for a condition that a change of p makes true.
func until(t *testing.T, p *Pods, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		changed := p.Changed()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond): // a count changes no generation
		case <-deadline:
			t.Fatalf("waited in vain: %s\nstatus %+v\nstats %+v", what, p.Status(), p.Stats())
		}
	}
}

// found says what is known of a container, as NAMESPACE/POD/CONTAINER.
func found(p *Pods, uid, id string) string {
	pod, c, conflict := p.Find(uid, id)
	switch {
	case conflict:
		return "conflict"
	case pod == nil:
		return ""
	case c == nil:
		return pod.Namespace + "/" + pod.Name
	}
	return pod.Namespace + "/" + pod.Name + "/" + c.Name
}

func TestKubeletTellsPods(t *testing.T) {
	s := newServer(t)
	a, b := pod(1, "shop", "web"), pod(2, "test", "web") // the same name in two namespaces
	static := pod(3, "kube-system", "etcd-node")
	static.UID = "d3b9c81f816480f0c28eb564608ff695"
	static.OwnerReferences = nil
	s.pods(t, a, b, static)
	p := start(t, Config{Kubelet: s.server()})
	until(t, p, "pods are known", func() bool { return p.Status().Source == "kubelet" })
	for _, c := range []struct{ uid, id, want string }{
		{uid(1), id(1), "shop/web/web"},
		{uid(2), id(2), "test/web/web"},
		{uid(1), id(9), "shop/web"},
		{uid(1), "", "shop/web"},
		{uid(9), id(9), ""},
		{uid(1), id(2), "conflict"},
		{uid(9), id(2), "conflict"},
		{"d3b9c81f816480f0c28eb564608ff695", id(3), "kube-system/etcd-node/web"},
	} {
		if got := found(p, c.uid, c.id); got != c.want {
			t.Errorf("pod %s, container %s: got %q, want %q", c.uid, c.id, got, c.want)
		}
	}
	q, _, _ := p.Find(uid(1), "")
	if q.OwnerKind != "Deployment" || q.OwnerName != "web" || q.ServiceAccount != "shop" || q.Labels["app"] != "web" || q.Annotations != nil {
		t.Errorf("pod: %+v", q)
	}
	if st := p.Status(); st.Pods != 3 || !p.Answers() {
		t.Errorf("status %+v", st)
	}
}

// A server that fails costs nothing that was known, is counted by cause, and
// says why.
func TestFailuresKeepWhatIsKnown(t *testing.T) {
	big := strings.Repeat("x", 50<<20)
	good, err := json.Marshal(podList(pod(1, "shop", "web"), pod(5, "shop", "other")))
	if err != nil {
		t.Fatal(err)
	}
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) }
	}
	code := func(n int) http.HandlerFunc { return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(n) } }
	for _, c := range []struct {
		name, cause, says string
		answer            http.HandlerFunc
	}{
		{"forbidden", "forbidden", "nodes/pods", code(403)},
		{"token expired", "unauthorized", "token", code(401)},
		{"failing", "other", "status 500", code(500)},
		{"redirect", "other", "status 302", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
		}},
		{"garbage", "malformed", "list of pods", text("\x00\xff garbage")},
		{"no list", "malformed", "Status", text(`{"kind":"Status","items":[]}`)},
		{"items is no list", "malformed", "items", text(`{"kind":"PodList","items":7}`)},
		{"a pod of another type", "malformed", "pod", text(`{"kind":"PodList","items":[{"metadata":{"name":["x"]}}]}`)},
		{"empty", "unreachable", "breaks off", text("")},
		{"broken off", "unreachable", "breaks off", text(string(good[:len(good)-100]))},
		{"50 MiB of garbage", "malformed", "list of pods", text(big)},
		{"50 MiB in one name", "too-large", "too large", text(`{"kind":"PodList","items":[{"metadata":{"name":"` + big + `"}}]}`)},
		{"50 MiB in one unknown field", "too-large", "too large", text(`{"kind":"PodList","what":"` + big + `"}`)},
		{"a million containers in one pod", "too-large", "too large",
			text(`{"kind":"PodList","items":[{"spec":{"containers":[` + strings.Repeat("{},", 1<<20) + `{}]}}]}`)},
		{"nested", "malformed", "", text(strings.Repeat(`{"items":`, 1<<20))},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			s.pods(t, pod(1, "shop", "web"))
			p := start(t, Config{Kubelet: s.server(), Interval: time.Second})
			until(t, p, "pods are known", p.Answers)
			s.set(c.answer)
			p.Want(uid(2), "") // fetch now
			until(t, p, "the failure is counted as "+c.cause, func() bool { return p.Stats().Failures[c.cause] > 0 })
			until(t, p, "nobody answers", func() bool { return !p.Answers() })
			if got := found(p, uid(1), id(1)); got != "shop/web/web" {
				t.Errorf("what was known is now %q", got)
			}
			if found(p, uid(5), "") != "" {
				t.Error("a part of an answer that failed was taken")
			}
			st := p.Status()
			if st.Source != "none" || !strings.Contains(st.Failed["kubelet"], c.says) || len(st.Failed["kubelet"]) > 2000 {
				t.Errorf("status %+v, want to read %q", st, c.says)
			}
			s.set(text(string(good)))
			until(t, p, "it answers again", p.Answers)
			if got := found(p, uid(5), id(5)); got != "shop/other/web" {
				t.Errorf("the new pod is %q", got)
			}
			if st := p.Status(); st.Failed["kubelet"] != "" {
				t.Errorf("an old failure is still there: %+v", st)
			}
		})
	}
}

// 50 MiB that are pods are too many pods: those within the bound are kept.
func TestTooManyPods(t *testing.T) {
	one, err := json.Marshal(pod(1, "shop", "web"))
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t)
	n := (50 << 20) / len(one)
	if raced {
		n /= 10
	}
	s.set(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"kind":"PodList","apiVersion":"v1","items":[`)
		for i := range n {
			if i > 0 {
				io.WriteString(w, ",")
			}
			io.WriteString(w, strings.NewReplacer(uid(1), uid(i), id(1), id(i)).Replace(string(one)))
		}
		io.WriteString(w, "]}")
	})
	p := start(t, Config{Kubelet: s.server(), MaxPods: 1000})
	until(t, p, "pods are known", p.Answers)
	if st := p.Status(); st.Pods != 1000 || p.Stats().Rejected != uint64(n-1000) {
		t.Errorf("%d pods, %d rejected of %d", st.Pods, p.Stats().Rejected, n)
	}
}

func TestServerMustBeTrusted(t *testing.T) {
	k := newPKI(t)
	other := newPKI(t)
	now := time.Now()
	for _, c := range []struct {
		name  string
		cert  tls.Certificate
		ca    string
		sni   string
		cause string
	}{
		{"own name", k.cert("127.0.0.1", now.Add(-time.Hour)), k.pem, "", ""},
		{"another name, which was asked for", k.cert("node-1", now.Add(-time.Hour)), k.pem, "node-1", ""},
		{"another name", k.cert("node-1", now.Add(-time.Hour)), k.pem, "", "certificate"},
		{"another authority", other.cert("127.0.0.1", now.Add(-time.Hour)), k.pem, "", "certificate"},
		{"our clock is behind", k.cert("127.0.0.1", now.Add(12*time.Hour)), k.pem, "", "certificate"},
		{"our clock is ahead", k.cert("127.0.0.1", now.Add(-36*time.Hour)), k.pem, "", "certificate"},
		{"no authority to trust", k.cert("127.0.0.1", now), filepath.Join(t.TempDir(), "none"), "", "unauthorized"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serveWith(t, k, c.cert)
			s.pods(t, pod(1, "shop", "web"))
			conf := s.server()
			conf.CAFile, conf.ServerName = c.ca, c.sni
			p := start(t, Config{Kubelet: conf})
			if c.cause == "" {
				until(t, p, "pods are known", p.Answers)
				return
			}
			until(t, p, "the failure is counted", func() bool { return p.Stats().Failures[c.cause] > 0 })
			if s.calls.Load() != 0 {
				t.Error("a token was shown to a server that is not trusted")
			}
		})
	}
}

func TestSelfSignedKubelet(t *testing.T) {
	k := newPKI(t)
	s := serveWith(t, k, tls.Certificate{Certificate: [][]byte{k.ca.Raw}, PrivateKey: k.key})
	s.pods(t, pod(1, "shop", "web"))
	conf := s.server()
	conf.ServerName = "node-1" // the certificate of its own has this name
	tmpl := *k.ca
	tmpl.DNSNames = []string{"node-1"}
	der, err := x509.CreateCertificate(rand.Reader, &tmpl, &tmpl, &k.key.PublicKey, k.key)
	if err != nil {
		t.Fatal(err)
	}
	s2 := serveWith(t, k, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k.key})
	s2.pods(t, pod(1, "shop", "web"))
	conf.URL, conf.TokenFile = s2.URL, s2.token
	conf.CAFile = filepath.Join(t.TempDir(), "kubelet.crt")
	write(t, conf.CAFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	p := start(t, Config{Kubelet: conf})
	until(t, p, "pods are known", p.Answers)
}

func TestTokenIsReadAgain(t *testing.T) {
	s := newServer(t)
	s.pods(t, pod(1, "shop", "web"))
	conf := s.server()
	conf.TokenFile = filepath.Join(t.TempDir(), "token")
	write(t, conf.TokenFile, "secret")
	p := start(t, Config{Kubelet: conf})
	until(t, p, "pods are known", p.Answers)
	write(t, s.token, "next") // what the server accepts now
	p.Want(uid(2), "")
	until(t, p, "the old token is refused", func() bool { return p.Stats().Failures["unauthorized"] > 0 })
	write(t, conf.TokenFile, "next")
	until(t, p, "the new token is shown", p.Answers)
}

// However many pods are wanted, and however often, the kubelet is asked little.
func TestWantsAreCoalesced(t *testing.T) {
	s := newServer(t)
	s.pods(t, pod(1, "shop", "web"))
	p := start(t, Config{Kubelet: s.server(), Interval: time.Hour})
	until(t, p, "pods are known", p.Answers)
	before, begin := s.calls.Load(), time.Now()
	for range 3 {
		for i := range 2 * maxWants {
			p.Want(uid(100+i), "")
		}
	}
	until(t, p, "they were looked for", func() bool { return s.calls.Load() >= before+3 })
	calls := s.calls.Load() - before
	if most := int64(time.Since(begin)/shortestPause) + 2; calls > most {
		t.Errorf("%d fetches in %v, want at most one per %v", calls, time.Since(begin), shortestPause)
	}
	st := p.Stats()
	// The second half finds no room, each time it asks.
	if st.Wanted != maxWants+3*maxWants || st.Refused != 3*maxWants {
		t.Errorf("%+v", st)
	}
	// One of them appears.
	s.pods(t, pod(1, "shop", "web"), pod(100, "shop", "late"))
	until(t, p, "the late pod is found", func() bool { return found(p, uid(100), "") != "" })
	until(t, p, "it is counted", func() bool { return p.Stats().Found == 1 })
}

// What is not found is given up, and not looked for again for a while.
func TestWantIsGivenUp(t *testing.T) {
	p, err := New(Config{Kubelet: Server{URL: "https://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	p.replace([]*Pod{kept(t, pod(1, "shop", "web"))}, 0)
	p.Want(uid(1), id(9))
	p.Want(uid(1), id(1)) // is there
	p.Want(uid(7), "")
	now := time.Now()
	settle := func(after time.Duration) (st Stats, wants int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.settleLocked(now.Add(after))
		return p.stats, len(p.wants)
	}
	for _, c := range []struct {
		after   time.Duration
		givenUp uint64
		wants   int
	}{
		{time.Second, 0, 2},
		{patience + time.Second, 1, 2},
		{podPatience + time.Second, 2, 2},
		{podPatience + time.Minute, 2, 2},
		{podPatience + negative + time.Second, 2, 0},
	} {
		if st, n := settle(c.after); st.GivenUp != c.givenUp || n != c.wants || st.Wanted != 2 {
			t.Errorf("after %v: %d wants, %+v", c.after, n, st)
		}
		p.Want(uid(1), id(9))
		if st := p.Stats(); c.wants > 0 && st.Wanted != 2 {
			t.Errorf("after %v it is wanted anew: %+v", c.after, st)
		}
	}
	if due := p.nextWant(now.Add(time.Hour)); !due.Before(now.Add(time.Minute)) {
		t.Error("what is wanted anew is not due")
	}
}

// A sandbox is wanted until it is known to be one, and not looked for after that.
func TestUnwant(t *testing.T) {
	p, err := New(Config{Kubelet: Server{URL: "https://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	p.Want(uid(1), id(8))
	p.Want(uid(1), id(9))
	p.Unwant(uid(1), id(9))
	p.Unwant(uid(1), id(9))
	p.Unwant(uid(2), id(2)) // nobody wanted it
	if st := p.Stats(); st.Wanted != 2 || st.Withdrawn != 1 || len(p.wants) != 1 {
		t.Errorf("%d wants left, %+v", len(p.wants), st)
	}
	p.settleLocked(time.Now().Add(patience + time.Second))
	p.Unwant(uid(1), id(8)) // was given up, and counts as that
	if st := p.Stats(); st.GivenUp != 1 || st.Withdrawn != 1 {
		t.Errorf("%+v", st)
	}
}

// A list is one for all that are wanted: many that are looked for in vain cost
// no more lists than one.
func TestWantsShareLists(t *testing.T) {
	lists := func(wants int) (n int) {
		p, err := New(Config{Kubelet: Server{URL: "https://127.0.0.1:1"}})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		for i := range wants {
			p.Want(uid(1), id(i))
			p.wants[want{uid(1), id(i)}].since = begin.Add(time.Duration(i) * 7 * time.Millisecond)
		}
		for now := begin; now.Before(begin.Add(patience)); n++ {
			now = p.nextWant(now.Add(time.Hour))
			p.settleLocked(now)
		}
		return n
	}
	if one, many := lists(1), lists(40); many > one+one/2 {
		t.Errorf("%d lists in vain for 40 wants, %d for one", many, one)
	} else {
		t.Logf("%d lists in vain for 40 wants, %d for one", many, one)
	}
}

func kept(t testing.TB, p *corev1.Pod) *Pod {
	t.Helper()
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var w wirePod
	if err := json.Unmarshal(b, &w); err != nil {
		t.Fatal(err)
	}
	q, ok := w.keep(nil)
	if !ok {
		t.Fatalf("not kept: %s", b)
	}
	return q
}

func TestUnchangedPodsStayTheSame(t *testing.T) {
	p, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	p.replace([]*Pod{kept(t, pod(1, "shop", "web")), kept(t, pod(2, "shop", "db"))}, 0)
	web, _, _ := p.Find(uid(1), "")
	gen := p.Generation()
	p.replace([]*Pod{kept(t, pod(1, "shop", "web")), kept(t, pod(2, "shop", "db"))}, 0)
	if p.Generation() != gen {
		t.Error("the same list is another generation")
	}
	changed := pod(2, "shop", "db")
	changed.Labels["app"] = "db"
	p.replace([]*Pod{kept(t, pod(1, "shop", "web")), kept(t, changed)}, 0)
	if p.Generation() == gen {
		t.Error("a changed label is no new generation")
	}
	if again, _, _ := p.Find(uid(1), ""); again != web {
		t.Error("an unchanged pod became another")
	}
	p.replace([]*Pod{kept(t, changed)}, 0)
	if found(p, uid(1), id(1)) != "" || found(p, uid(2), id(2)) == "" {
		t.Error("a pod that is gone is still there, or one that is there is gone")
	}
	p.update(kept(t, pod(3, "shop", "cache")), false)
	p.update(kept(t, changed), true)
	if found(p, uid(3), id(3)) != "shop/cache/web" || found(p, uid(2), id(2)) != "" || p.Status().Pods != 1 {
		t.Errorf("after two updates: %+v", p.Status())
	}
}

func TestConfigNamesTheField(t *testing.T) {
	for _, c := range []struct {
		config Config
		says   string
	}{
		{Config{Interval: time.Millisecond}, "interval"},
		{Config{MaxPods: -1}, "maxPods"},
		{Config{Kubelet: Server{URL: "http://127.0.0.1:10255"}}, "https"},
		{Config{Kubelet: Server{URL: "https://user@host"}}, "url"},
		{Config{Kubelet: Server{URL: "https://host/path"}}, "url"},
		{Config{API: Server{URL: "https://host"}}, "node"},
	} {
		if _, err := New(c.config); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v, want to read %q", c.config, err, c.says)
		}
	}
}

func TestFindAllocatesNothing(t *testing.T) {
	p, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	p.replace([]*Pod{kept(t, pod(1, "shop", "web"))}, 0)
	u, i := uid(1), id(1)
	if n := testing.AllocsPerRun(1000, func() { p.Find(u, i); p.Generation() }); n != 0 {
		t.Errorf("Find allocates %v times", n)
	}
}

func TestRest(t *testing.T) {
	for n, want := range map[int]time.Duration{
		0: shortestPause, 20 << 10: shortestPause, 320 << 10: 195312500 * time.Nanosecond, 2 << 20: longestRest, maxAnswer: longestRest,
	} {
		if got := rest(n); got != want {
			t.Errorf("after %d bytes: %v, want %v", n, got, want)
		}
	}
}

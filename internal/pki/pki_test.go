package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/testenv"
)

// A clock that is set by hand.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) step(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

func mustOpen(t *testing.T, dir string, c *clock) *Authority {
	t.Helper()
	a, err := open(dir, c.now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// An agent's files.
type agent struct {
	cert  tls.Certificate
	roots *x509.CertPool
	now   func() time.Time
}

func issue(t *testing.T, a *Authority, node string, life time.Duration) agent {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "out")
	if _, err := a.Issue(node, life, dir); err != nil {
		t.Fatal(err)
	}
	return load(t, dir, a.now)
}

func load(t *testing.T, dir string, now func() time.Time) agent {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "agent.crt"), filepath.Join(dir, "agent.key"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		t.Fatal("ca.crt: no certificate")
	}
	return agent{cert, pool, now}
}

// handshake connects over loopback and returns what each side says, and what
// the server has seen.
func handshake(t *testing.T, server *tls.Config, client *tls.Config) (seen tls.ConnectionState, clientErr, serverErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		tc := tls.Server(c, server)
		if err = tc.Handshake(); err == nil {
			seen = tc.ConnectionState()
			_, err = tc.Write([]byte("k"))
		}
		done <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	tc := tls.Client(c, client)
	if clientErr = tc.Handshake(); clientErr == nil {
		_, clientErr = tc.Read(make([]byte, 1)) // in TLS 1.3 the server's verdict comes later
	}
	c.Close()
	serverErr = <-done
	return seen, clientErr, serverErr
}

func (a agent) config(name string) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{a.cert}, RootCAs: a.roots, ServerName: name, Time: a.now}
}

func serverConfig(t *testing.T, a *Authority, names ...string) *tls.Config {
	t.Helper()
	c, err := a.ServerConfig(names, tls.RequireAndVerifyClientCert, func(err error) { t.Errorf("renewal: %v", err) })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func connects(t *testing.T, s *tls.Config, ag agent) error {
	t.Helper()
	_, cerr, serr := handshake(t, s, ag.config("localhost"))
	return errors.Join(cerr, serr)
}

func TestHandshake(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	a := mustOpen(t, t.TempDir(), newClock())
	s := serverConfig(t, a, "collector.example", "10.1.2.3")
	ag := issue(t, a, "web-1", 2*time.Hour)
	for _, name := range []string{"localhost", "127.0.0.1", "::1", host, "collector.example", "10.1.2.3"} {
		seen, cerr, serr := handshake(t, s, ag.config(name))
		if cerr != nil || serr != nil {
			t.Errorf("%s: client %v, server %v", name, cerr, serr)
			continue
		}
		if node, err := NodeName(seen.VerifiedChains[0][0]); node != "web-1" || err != nil {
			t.Errorf("%s: node %q, %v", name, node, err)
		}
		if seen.Version != tls.VersionTLS13 {
			t.Errorf("%s: version %x, want TLS 1.3", name, seen.Version)
		}
	}
	if _, cerr, _ := handshake(t, s, ag.config("other.example")); cerr == nil {
		t.Error("a name that is not the server's was accepted")
	}
	old := ag.config("localhost")
	old.MaxVersion = tls.VersionTLS12
	if _, _, serr := handshake(t, s, old); serr == nil {
		t.Error("TLS 1.2 was accepted")
	}
	none := ag.config("localhost")
	none.Certificates = nil
	if _, cerr, serr := handshake(t, s, none); serr == nil || !strings.Contains(cerr.Error(), "certificate required") {
		t.Errorf("no certificate: client %v, server %v", cerr, serr)
	}
	// The server's own certificate is not good for an agent.
	inner, err := s.GetConfigForClient(nil)
	if err != nil {
		t.Fatal(err)
	}
	thief := agent{inner.Certificates[0], ag.roots, a.now}
	if _, _, serr := handshake(t, s, thief.config("localhost")); serr == nil {
		t.Error("the server's certificate was accepted from an agent")
	}
	// Nor an agent's for a server.
	fake := s.Clone()
	fake.GetConfigForClient, fake.Certificates = nil, []tls.Certificate{ag.cert}
	if _, cerr, _ := handshake(t, fake, ag.config("")); cerr == nil {
		t.Error("an agent's certificate was accepted from a server")
	}
}

func TestServerConfigRefusesNames(t *testing.T) {
	a := mustOpen(t, t.TempDir(), newClock())
	for _, n := range []string{"", "a b", "a/b", "host:1", "*.x"} {
		if _, err := a.ServerConfig([]string{n}, tls.RequireAndVerifyClientCert, nil); err == nil {
			t.Errorf("name %q was accepted", n)
		}
	}
}

// The server's certificate changes before it ends, without a restart.
func TestServerCertificateRenews(t *testing.T) {
	c := newClock()
	a := mustOpen(t, t.TempDir(), c)
	s := serverConfig(t, a)
	serial := func() *big.Int {
		conf, err := s.GetConfigForClient(nil)
		if err != nil {
			t.Fatal(err)
		}
		return conf.Certificates[0].Leaf.SerialNumber
	}
	ag := issue(t, a, "n", 30*24*time.Hour)
	first := serial()
	c.step(15 * time.Hour)
	if serial().Cmp(first) != 0 {
		t.Error("renewed after 15 of 24 hours")
	}
	c.step(2 * time.Hour)
	second := serial()
	if second.Cmp(first) == 0 {
		t.Error("not renewed after 17 of 24 hours")
	}
	c.step(-48 * time.Hour) // the present one begins in the future now
	if _, err := a.Issue("m", time.Hour, t.TempDir()); err == nil {
		t.Error("a clock before the authority's begin went unnoticed")
	}
	c.step(60 * time.Hour)
	if err := connects(t, s, ag); err != nil {
		t.Errorf("after 29 hours: %v", err)
	}
}

// Over three years an agent that renews every 28 days always connects, with
// the files it has.
func TestAuthorityRollsOver(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	a := mustOpen(t, dir, c)
	s := serverConfig(t, a)
	ag := issue(t, a, "n", MaxNodeLife)
	authorities := map[string]bool{}
	const step = 4 // days
	for day := 0; day < 3*365; day += step {
		if day%28 == 0 {
			// By another process, as the command line does it.
			ag = issue(t, mustOpen(t, dir, c), "n", MaxNodeLife)
		}
		if day%100 == 48 { // restarted
			a = mustOpen(t, dir, c)
			s = serverConfig(t, a)
		}
		if err := connects(t, s, ag); err != nil {
			t.Fatalf("day %d: %v", day, err)
		}
		authorities[string(a.ca.cert.Raw)] = true
		if n := len(a.trusted); n > 3 {
			t.Fatalf("day %d: %d authorities are trusted", day, n)
		}
		c.step(step * 24 * time.Hour)
	}
	if len(authorities) < 3 {
		t.Errorf("%d authorities in three years, want at least 3", len(authorities))
	}
}

// A collector that was off until its authority had expired makes a new one;
// its old agents are refused, new certificates work.
func TestExpiredAuthority(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	old := issue(t, mustOpen(t, dir, c), "n", MaxNodeLife)
	c.step(2 * 365 * 24 * time.Hour)
	a := mustOpen(t, dir, c)
	s := serverConfig(t, a)
	if err := connects(t, s, issue(t, a, "n", time.Hour)); err != nil {
		t.Errorf("a new agent: %v", err)
	}
	if err := connects(t, s, old); err == nil {
		t.Error("an agent of two years ago was accepted")
	}
}

func TestIssuedFiles(t *testing.T) {
	c := newClock()
	state := filepath.Join(t.TempDir(), "pki")
	a := mustOpen(t, state, c)
	out := filepath.Join(t.TempDir(), "a", "b")
	until, err := a.Issue("node-1.example", MaxNodeLife, out)
	if err != nil {
		t.Fatal(err)
	}
	if !until.Equal(c.now().Add(MaxNodeLife)) {
		t.Errorf("good until %v", until)
	}
	for path, mode := range map[string]os.FileMode{
		filepath.Join(out, "agent.key"): 0o600, filepath.Join(out, "agent.crt"): 0o644, filepath.Join(out, "ca.crt"): 0o644, out: 0o700,
		filepath.Join(state, "ca.pem"): 0o600, filepath.Join(state, "ca.crt"): 0o644, state: 0o700} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want %o", path, fi.Mode(), err, mode)
		}
	}
	leaf := load(t, out, c.now).cert.Leaf
	if got := leaf.URIs[0].String(); got != "spiffe://procession/node/node-1.example" {
		t.Errorf("URI %s", got)
	}
	if want := c.now().Add(-time.Hour); !leaf.NotBefore.Equal(want) {
		t.Errorf("begins %v, want %v", leaf.NotBefore, want)
	}
	if k, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
		t.Errorf("key %T", leaf.PublicKey)
	}
	if _, err := a.Issue("node-1.example", time.Hour, out); err != nil {
		t.Errorf("renewed in place: %v", err)
	}
	for _, tt := range []struct {
		node string
		life time.Duration
	}{{"", time.Hour}, {"a/b", time.Hour}, {"-a", time.Hour}, {"ä", time.Hour}, {strings.Repeat("n", 254), time.Hour}, {"n", time.Minute}, {"n", MaxNodeLife + 1}} {
		if _, err := a.Issue(tt.node, tt.life, t.TempDir()); err == nil {
			t.Errorf("Issue(%.20q, %v) worked", tt.node, tt.life)
		}
	}
	if err := connects(t, serverConfig(t, a), issue(t, a, strings.Repeat("n", 253), time.Hour)); err != nil {
		t.Errorf("the longest name: %v", err)
	}
}

// Files that cannot be used are named, with what to do; nothing is made anew
// over them.
func TestBrokenFiles(t *testing.T) {
	c := newClock()
	other := t.TempDir()
	mustOpen(t, other, c)
	otherPEM, err := os.ReadFile(filepath.Join(other, caFile))
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		spoil func(t *testing.T, dir string)
		step  time.Duration
		file  string
		want  string
	}{
		{"empty", write(caFile, nil), 0, caFile, "no certificate in PEM"},
		{"garbage", write(caFile, []byte("garbage")), 0, caFile, "no certificate in PEM"},
		{"no key", func(t *testing.T, dir string) { keep(t, dir, "CERTIFICATE") }, 0, caFile, "no private key"},
		{"no certificate", func(t *testing.T, dir string) { keep(t, dir, "PRIVATE KEY") }, 0, caFile, "no certificate"},
		{"bad certificate", write(caFile, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")), 0, caFile, "the certificate cannot be read"},
		{"key of another", func(t *testing.T, dir string) {
			_, rest := pem.Decode(otherPEM)
			keep(t, dir, "CERTIFICATE")
			appendTo(t, filepath.Join(dir, caFile), rest)
		}, 0, caFile, "do not belong together"},
		{"removed", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, caFile)) }, 0, caFile, "missing, but ca.crt is there"},
		{"the successor is garbage", write(nextFile, []byte("x")), 0, nextFile, "no certificate"},
		{"the predecessor is garbage", write(previousFile, []byte("x")), 0, previousFile, "no certificate"},
		{"the clock was set back", func(*testing.T, string) {}, -2 * time.Hour, caFile, "is not valid before 2026-03-01T11:00:00Z, and the clock says 2026-03-01T10:00:00Z"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newClock()
			dir := t.TempDir()
			mustOpen(t, dir, c)
			tt.spoil(t, dir)
			c.step(tt.step)
			before, _ := os.ReadFile(filepath.Join(dir, tt.file))
			_, err := open(dir, c.now)
			var fe *FileError
			if !errors.As(err, &fe) || fe.Path != filepath.Join(dir, tt.file) || fe.Do == "" || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want it about %s with %q", err, tt.file, tt.want)
			}
			if after, _ := os.ReadFile(filepath.Join(dir, tt.file)); string(after) != string(before) {
				t.Error("the file was changed")
			}
		})
	}
	// An hour back is nothing.
	dir := t.TempDir()
	mustOpen(t, dir, c)
	c.step(-59 * time.Minute)
	mustOpen(t, dir, c)
}

func write(name string, b []byte) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func appendTo(t *testing.T, path string, b []byte) {
	old, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, append(old, b...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// keep leaves one block of ca.pem.
func keep(t *testing.T, dir, typ string) {
	path := filepath.Join(dir, caFile)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for blk, rest := pem.Decode(b); blk != nil; blk, rest = pem.Decode(rest) {
		if blk.Type == typ {
			write(caFile, pem.EncodeToMemory(blk))(t, dir)
			return
		}
	}
	t.Fatalf("no %s in %s", typ, path)
}

// A hand-over that was killed after any of its steps is finished later, and
// agents of before still connect.
func TestHandOverInterrupted(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	a := mustOpen(t, dir, c)
	c.step(310 * 24 * time.Hour) // announced at 305
	if err := func() error { _, err := a.Bundle(); return err }(); err != nil {
		t.Fatal(err)
	}
	c.step(20 * 24 * time.Hour)
	ag := issue(t, a, "n", MaxNodeLife)
	// Killed between its steps: previous.crt, ca.pem, no next.pem.
	old := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.ca.cert.Raw})
	next, err := os.ReadFile(filepath.Join(dir, nextFile))
	if err != nil {
		t.Fatal(err)
	}
	c.step(10 * 24 * time.Hour)
	for _, step := range []struct {
		name string
		b    []byte
	}{{previousFile, old}, {caFile, next}} {
		write(step.name, step.b)(t, dir)
		copied := t.TempDir()
		if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		b := mustOpen(t, copied, c)
		if string(b.ca.cert.Raw) == string(a.ca.cert.Raw) || b.next != nil {
			t.Errorf("after %s: not handed over", step.name)
		}
		if _, err := os.Stat(filepath.Join(copied, nextFile)); err == nil {
			t.Errorf("after %s: %s is still there", step.name, nextFile)
		}
		if err := connects(t, serverConfig(t, b), ag); err != nil {
			t.Errorf("after %s: an agent of before: %v", step.name, err)
		}
	}
}

// Many processes that start at once make one authority.
func TestOpenAtOnce(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	got := make([]string, 8)
	for i := range got {
		wg.Go(func() {
			a, err := Open(dir)
			if err != nil {
				t.Errorf("Open: %v", err)
				return
			}
			got[i] = string(a.ca.cert.Raw)
		})
	}
	wg.Wait()
	for i := range got {
		if got[i] != got[0] {
			t.Fatal("two authorities were made")
		}
	}
}

func TestNodeName(t *testing.T) {
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	tests := []struct {
		name string
		uris []*url.URL
		cn   string
		want string // "" is refused
	}{
		{"neither", nil, "", ""},
		{"common name", nil, "web-1", "web-1"},
		{"common name that is none", nil, "web 1", ""},
		{"uri", []*url.URL{uri("spiffe://procession/node/web-1")}, "other", "web-1"},
		{"two uris", []*url.URL{uri("spiffe://procession/node/a"), uri("spiffe://procession/node/b")}, "", ""},
		{"another trust domain", []*url.URL{uri("spiffe://elsewhere/node/a")}, "a", ""},
		{"another scheme", []*url.URL{uri("https://procession/node/a")}, "a", ""},
		{"another path", []*url.URL{uri("spiffe://procession/pod/a")}, "a", ""},
		{"deeper path", []*url.URL{uri("spiffe://procession/node/a/b")}, "a", ""},
		{"escaped slash", []*url.URL{uri("spiffe://procession/node/a%2Fb")}, "a", ""},
		{"empty name", []*url.URL{uri("spiffe://procession/node/")}, "a", ""},
		{"query", []*url.URL{uri("spiffe://procession/node/a?x")}, "a", ""},
		{"fragment", []*url.URL{uri("spiffe://procession/node/a#x")}, "a", ""},
		{"user", []*url.URL{uri("spiffe://u@procession/node/a")}, "a", ""},
		{"dots", []*url.URL{uri("spiffe://procession/node/..")}, "a", ""},
		{"long", []*url.URL{uri("spiffe://procession/node/" + strings.Repeat("n", 254))}, "a", ""},
	}
	for _, tt := range tests {
		got, err := NodeName(&x509.Certificate{URIs: tt.uris, Subject: pkix.Name{CommonName: tt.cn}})
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%s: %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
}

// FuzzParseSigner: no bytes in a file make the authority panic, and what it
// accepts is an authority whose key fits.
func FuzzParseSigner(f *testing.F) {
	dir := f.TempDir()
	if _, err := Open(dir); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil {
		f.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(append(good[:len(good):len(good)], keyPEM...))
	f.Add(keyPEM)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSigner(b)
		if err == nil && (!s.cert.IsCA || !s.key.PublicKey.Equal(s.cert.PublicKey)) {
			t.Error("accepted", s.cert.Subject)
		}
	})
}

// A shelf is a Storage as a cluster's objects are: nobody is kept out, and who
// commits after somebody else has to look again.
type shelf struct {
	mu      sync.Mutex
	version int
	files   map[string][]byte
	down    error
	commits int
}

type shelfFiles struct {
	s       *shelf
	version int
	files   map[string][]byte
	changed bool
}

func (s *shelf) Begin() (Files, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &shelfFiles{s: s, version: s.version, files: maps.Clone(s.files)}, s.down
}

func (f *shelfFiles) Path(name string) string { return "shelf/" + name }
func (f *shelfFiles) Close()                  {}
func (f *shelfFiles) Read(name string) ([]byte, error) {
	if b, ok := f.files[name]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func (f *shelfFiles) Write(name string, b []byte) error {
	if f.files == nil {
		f.files = map[string][]byte{}
	}
	f.files[name], f.changed = b, true
	return nil
}

func (f *shelfFiles) Remove(name string) error {
	delete(f.files, name)
	f.changed = true
	return nil
}

func (f *shelfFiles) Commit() error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if !f.changed {
		return nil
	}
	if f.version != f.s.version {
		return ErrConflict
	}
	f.s.files, f.s.version, f.s.commits = f.files, f.s.version+1, f.s.commits+1
	return nil
}

// Replicas that start at once on an optimistic storage agree on one authority,
// and none uses a key that was not committed.
func TestConflict(t *testing.T) {
	s := &shelf{}
	var wg sync.WaitGroup
	got := make([]*Authority, 6)
	for i := range got {
		wg.Go(func() {
			a, err := OpenStorage(s)
			if err != nil {
				t.Errorf("OpenStorage: %v", err)
				return
			}
			got[i] = a
		})
	}
	wg.Wait()
	for _, a := range got {
		if b, err := a.Bundle(); err != nil || string(b) != string(s.files[BundleFile]) {
			t.Fatalf("bundle %s, %v, want the one committed", b, err)
		}
	}
	if s.commits != 1 {
		t.Errorf("%d commits, want 1", s.commits)
	}
}

// While Run looks at the files, a storage that is silent stops no handshake;
// what others changed is taken over, and a bundle that was spoilt is put right.
func TestRun(t *testing.T) {
	c := newClock()
	s := &shelf{}
	a, err := openStorage(s, c.now)
	if err != nil {
		t.Fatal(err)
	}
	s.files[BundleFile] = []byte("spoilt")
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 100)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a.Run(ctx, time.Millisecond, func(err error) {
			select {
			case failed <- err:
			default:
			}
		})
	}()
	testenv.Eventually(t, "the bundle is written", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		_, err := parseBundle(s.files[BundleFile])
		return err == nil
	})
	down := errors.New("no answer")
	s.mu.Lock()
	s.down = down
	s.mu.Unlock()
	if err := <-failed; !errors.Is(err, down) {
		t.Errorf("failed with %v", err)
	}
	conf := serverConfig(t, a)
	c.step(25 * time.Hour) // longer than the server's certificate lives
	if err := connects(t, conf, issueIn(t, a, "n")); err != nil {
		t.Errorf("with a silent storage: %v", err)
	}
	cancel()
	<-ended
}

func parseBundle(b []byte) (*x509.Certificate, error) {
	cert, _, err := parseCert(b)
	return cert, err
}

// issueIn issues without a look at the storage.
func issueIn(t *testing.T, a *Authority, node string) agent {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	cert, key, err := a.leafLocked(node, a.now(), time.Hour, func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	})
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.ca.cert)
	return agent{tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, pool, a.now}
}

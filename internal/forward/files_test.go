package forward

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	// As the kubelet does it: nobody sees half a file.
	if err := os.WriteFile(path+".tmp", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

func TestTokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	for _, tt := range []struct{ text, want, err string }{
		{"", "", "is empty"},
		{" \n", "", "is empty"},
		{"a\nb", "", "something else than a token"},
		{"a\x00b", "", "something else than a token"},
		{"ä", "", "something else than a token"},
		{strings.Repeat("a", maxToken+1), "", "larger than 16384 bytes"},
		{"abc.def\n", "abc.def", ""},
	} {
		put(t, path, tt.text)
		got, err := TokenFile(path)()
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%.20q: %q, %v, want %q, %q", tt.text, got, err, tt.want, tt.err)
		}
	}
	if _, err := TokenFile(path + "x")(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestFilesRefused(t *testing.T) {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.crt")
	if _, err := (Files{CA: ca}).TLS(t.Context()); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no bundle: %v", err)
	}
	put(t, ca, "garbage")
	if _, err := (Files{CA: ca}).TLS(t.Context()); err == nil || !strings.Contains(err.Error(), "holds no PEM certificate") {
		t.Errorf("garbage: %v", err)
	}
	_, pem := makePKI()
	put(t, ca, string(pem))
	if _, err := (Files{CA: ca, Cert: dir + "/x", Key: dir + "/y"}).TLS(t.Context()); err == nil || !strings.Contains(err.Error(), "our certificate") {
		t.Errorf("no key: %v", err)
	}
	conf, err := Files{CA: ca, ServerName: "collector"}.TLS(t.Context())
	if err != nil || conf.MinVersion != tls.VersionTLS13 || conf.ServerName != "collector" {
		t.Errorf("%+v, %v", conf, err)
	}
}

// An agent that starts before there is a bundle connects as soon as there is
// one, and goes on when the collector has another authority and key.
func TestBundleChanges(t *testing.T) {
	ca := filepath.Join(t.TempDir(), "ca.crt")
	conf, bundle := makePKI()
	c := newCollector(newStore())
	srv := &server{t: t, addr: "127.0.0.1:0", tls: conf}
	srv.start(c)
	t.Cleanup(func() { srv.kill() })
	a := newAgent(t, srv.addr)
	a.fcfg.TLS = Files{CA: ca, ServerName: "collector"}.TLS
	a.start()
	a.append(3)
	a.wait("no bundle", func() bool { return strings.Contains(a.fw.Status().LastError, "no such file") })
	put(t, ca, string(bundle))
	a.wait("delivered", a.acked)

	srv.kill()
	srv.tls, bundle = makePKI()
	srv.start(newCollector(c.store))
	a.append(3)
	a.wait("the new authority is not trusted", func() bool { return strings.Contains(a.fw.Status().LastError, "certificate") })
	put(t, ca, string(bundle))
	a.wait("delivered again", a.acked)
	check(t, c.store, a.epoch, 6)
}

// The token is shown with each stream, and a new one on a running stream if
// the collector takes it.
func TestTokenShown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	c := newCollector(newStore())
	c.reply = func(w *pb.Welcome) { w.Reauth = true }
	srv := serve(t, c)
	a := newAgent(t, srv.addr)
	a.fcfg.Token = TokenFile(path)
	a.start()
	a.wait("no token, no stream", func() bool { return strings.Contains(a.fw.Status().LastError, "token: ") })
	shown := func(want ...string) func() bool {
		return func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return slices.Equal(c.tokens, want)
		}
	}
	put(t, path, "first\n")
	a.wait("the first", shown("Bearer first"))
	put(t, path, "second\n")
	a.wait("the second", shown("Bearer first", "second"))
	os.Remove(path) // for a moment: nothing happens
	beats := a.fw.Status().Heartbeats
	a.wait("heartbeats go on", func() bool { return a.fw.Status().Heartbeats > beats+2 })
	put(t, path, "third\n")
	a.wait("the third", shown("Bearer first", "second", "third"))
	if st := a.fw.Status(); st.Reauths != 2 || st.Connections != 1 {
		t.Errorf("%d reauths, %d connections, want 2 and 1", st.Reauths, st.Connections)
	}
	// A collector that does not know it gets the new one with the next stream.
	srv.kill()
	old := newCollector(c.store)
	srv.start(old)
	a.wait("connected again", func() bool { return a.fw.Status().Connections == 2 })
	put(t, path, "fourth\n")
	beats = a.fw.Status().Heartbeats
	a.wait("heartbeats go on", func() bool { return a.fw.Status().Heartbeats > beats+2 })
	old.set(func(o *collector) {
		if !slices.Equal(o.tokens, []string{"Bearer third"}) {
			t.Errorf("shown %q", o.tokens)
		}
	})
}

// Without TLS no token leaves.
func TestTokenNeedsTLS(t *testing.T) {
	a := newAgent(t, serve(t, newCollector(newStore())).addr)
	a.fcfg.TLS, a.fcfg.Credentials = nil, insecure.NewCredentials()
	a.fcfg.Token = func() (string, error) { return "secret", nil }
	a.start()
	a.wait("refused", func() bool { return strings.Contains(a.fw.Status().LastError, "transport level security") })
}

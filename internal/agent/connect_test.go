package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/procession-dev/procession/internal/forward"
)

func TestTarget(t *testing.T) {
	for in, want := range map[string]string{
		"":                      "",
		"host":                  "",
		":7443":                 "",
		"host:":                 "",
		"a:b:7443":              "",
		"$(X_SERVICE_HOST):744": "",
		"host:7443":             "host:7443",
		"10.96.0.7:7443":        "10.96.0.7:7443",
		"[fd00::7]:7443":        "[fd00::7]:7443",
		"fd00:10:96::7:7443":    "[fd00:10:96::7]:7443", // as a template writes it
	} {
		got, err := target(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("target(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestConnectFlags(t *testing.T) {
	for _, tt := range []struct {
		name string
		f    connectFlags
		want string
	}{
		{"nothing", connectFlags{}, "--collector is missing"},
		{"no way", connectFlags{collector: "x:1"}, "--tls is missing"},
		{"two ways", connectFlags{collector: "x:1", tls: "/x", token: "/y"}, "one way"},
		{"no bundle", connectFlags{collector: "x:1", token: "/y"}, "--collector-ca is missing"},
		{"no Service", connectFlags{collector: "$(X):1", token: "/y", ca: "/z"}, "is not set"},
		{"no files", connectFlags{collector: "x:1", tls: "/nowhere"}, "collector issue"},
		{"token", connectFlags{collector: "x:1", token: "/y", ca: "/z"}, ""},
	} {
		if err := tt.f.check("n"); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// The bundle is fetched only while its file is not there.
func TestFetchCA(t *testing.T) {
	fetched := errors.New("fetched")
	file := filepath.Join(t.TempDir(), "ca.crt")
	f := connectFlags{collector: "x:1", token: "/y", ca: file,
		fetchCA: func(context.Context) ([]byte, error) { return nil, fetched }}
	var cfg forward.Config
	f.apply(&cfg)
	if _, err := cfg.TLS(t.Context()); !errors.Is(err, fetched) {
		t.Errorf("no file: %v, want it fetched", err)
	}
	if err := os.WriteFile(file, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := cfg.TLS(t.Context()); err == nil || errors.Is(err, fetched) {
		t.Errorf("a broken file: %v, want an error about it", err)
	}
}

// However often it is tried to connect, the API server is asked seldom.
func TestSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		f := seldom(2*time.Second, func(context.Context) ([]byte, error) {
			asked++
			return []byte{byte(asked)}, nil
		})
		for range 100 { // 10 s
			if b, err := f(t.Context()); err != nil || int(b[0]) != asked {
				t.Fatalf("%v, %v", b, err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if asked != 5 {
			t.Errorf("asked %d times in 10 s, want 5", asked)
		}
	})
}

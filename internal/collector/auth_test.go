package collector

import (
	"flag"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAuthFlags(t *testing.T) {
	for _, tt := range []struct {
		args string
		want AuthConfig
		err  string // part of the error, "" is none
	}{
		{args: "--auth passwords", err: "want certificates, tokens"},
		{args: "--auth tokens", err: "--token-audience"},
		{args: "--auth tokens --token-audience a", err: "--agent-account"},
		{args: "--auth tokens --token-audience a --agent-account agent", err: `"agent" is not NAMESPACE/NAME`},
		{args: "--auth tokens --token-audience a --agent-account a/b/c", err: "not NAMESPACE/NAME"},
		{args: "--auth tokens --token-audience a --agent-account a:b/c", err: "not NAMESPACE/NAME"},
		{args: "--auth certificates --agent-account a/b", err: "for --auth tokens"},
		{args: "--ca-secret a/b", err: "go together"},
		{args: "--ca-secret a --ca-configmap a/b", err: "--ca-secret"},
		{args: "", want: AuthConfig{Certificates: true}},
		{args: "--auth tokens,certificates --token-audience a --agent-account n/x --agent-account n/y --ca-secret n/s --ca-configmap n/c",
			want: AuthConfig{Certificates: true, Tokens: true, Audience: "a", Accounts: []string{"n/x", "n/y"}, Secret: "n/s", ConfigMap: "n/c"}},
	} {
		var c AuthConfig
		fs := flag.NewFlagSet("serve", flag.ContinueOnError)
		fs.SetOutput(io.Discard)
		c.register(fs)
		err := fs.Parse(strings.Fields(tt.args))
		if err == nil {
			c, err = c.withDefaults()
		}
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.err)
		} else if err == nil && !cmp.Equal(c, tt.want) {
			t.Errorf("%q (-want +got):\n%s", tt.args, cmp.Diff(tt.want, c))
		}
	}
}

// Tokens without a cluster are refused at the start, not at the first agent.
func TestTokensNeedACluster(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	_, err := New(t.Context(), Config{State: t.TempDir(), Listen: "127.0.0.1:0",
		Auth: AuthConfig{Tokens: true, Audience: "a", Accounts: []string{"n/x"}}})
	if err == nil || !strings.Contains(err.Error(), "in a Kubernetes cluster only") {
		t.Errorf("error %v", err)
	}
}

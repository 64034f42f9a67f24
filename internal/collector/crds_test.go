package collector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

// applied remembers; it fails the first times.
type applied struct {
	fail  int
	names []string
}

func (a *applied) ApplyCRD(_ context.Context, name string, manifest []byte) error {
	if a.fail--; a.fail >= 0 {
		return errors.New("connection refused")
	}
	if !json.Valid(manifest) {
		return errors.New("not JSON")
	}
	a.names = append(a.names, name)
	return nil
}

// The chart's own definitions are applied, also by an API server that is away
// for a moment.
func TestApplyCRDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &applied{fail: 3}
		var out bytes.Buffer
		if err := applyCRDs(t.Context(), a, "../../deploy/helm/procession/crds", &out); err != nil {
			t.Fatal(err)
		}
		want := []string{"clusterdetectionpolicies.procession.dev", "detectionpolicies.procession.dev"}
		if d := cmp.Diff(want, a.names); d != "" {
			t.Error(d)
		}
		if err := applyCRDs(t.Context(), &applied{fail: 1000}, "../../deploy/helm/procession/crds", &out); err == nil {
			t.Error("an API server that never answers: no error")
		}
	})
}

func TestApplyCRDsRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                                  "no CustomResourceDefinition",
		"a: [":                              "x.yaml",
		"{apiVersion: v1, kind: ConfigMap}": "no CustomResourceDefinition",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "x.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		a := &applied{}
		if err := applyCRDs(t.Context(), a, dir, nil); err == nil || !strings.Contains(err.Error(), want) || len(a.names) > 0 {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if err := applyCRDs(t.Context(), &applied{}, t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "has no *.yaml") {
		t.Errorf("an empty folder: %v", err)
	}
}

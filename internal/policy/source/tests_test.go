package source

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Test cases beside a policy are no broken policy.
func TestCasesAreNoPolicies(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.yaml", "a.test.yaml", "b.test.yml", "c.test.json", "test.yaml", ".test.yaml", "d.tests.yaml"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := NewDir(dir, nil).names()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"a.yaml", "d.tests.yaml", "test.yaml"}, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

package wholefile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/wholefile"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	read := func(path string) ([]byte, error) { return wholefile.Read(path, 10) }
	for _, tt := range []struct {
		name string
		read func(string) ([]byte, error)
		path string
		want string
		err  string
	}{
		{"missing", read, filepath.Join(dir, "none"), "", "no such file"},
		{"a directory", read, dir, "", "is a directory"},
		{"too large", read, file("large", "12345678901"), "", "is larger than 10 bytes"},
		{"as large as may be", read, file("fits", "1234567890"), "1234567890", ""},
		{"an empty secret", wholefile.Secret, file("blank", " \n"), "", "blank is empty"},
		{"a secret that is none", wholefile.Secret, file("book", strings.Repeat("a", 64<<10+1)), "", "is larger than 65536 bytes"},
		{"a secret", wholefile.Secret, file("secret", " a b\r\n"), "a b", ""},
	} {
		got, err := tt.read(tt.path)
		if string(got) != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %q, %v, want %q, %q", tt.name, got, err, tt.want, tt.err)
		}
	}
}

// What was there stays when the new content cannot be put in its place, and
// nothing is left beside it.
func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	for _, content := range []string{"first", "second"} {
		if err := wholefile.Replace(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil || st.Mode() != 0o640 {
			t.Fatalf("%v, %v, want mode 0640", st.Mode(), err)
		}
		if b, err := os.ReadFile(path); string(b) != content {
			t.Fatalf("%q, %v, want %q", b, err, content)
		}
	}
	if err := wholefile.Replace(filepath.Join(dir, "none", "a"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("into a directory that is not there: %v", err)
	}
	full := filepath.Join(dir, "full") // a name that cannot be taken over
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := wholefile.Replace(full, nil, 0o600); err == nil || !strings.Contains(err.Error(), "write "+full) {
		t.Errorf("over a directory: %v", err)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 2 {
		t.Errorf("left: %v, %v, want a and full", names, err)
	}
}

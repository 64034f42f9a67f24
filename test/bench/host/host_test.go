package host

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/testenv"
)

func TestCache(t *testing.T) {
	root := t.TempDir()
	t.Setenv(EnvCache, filepath.Join(root, "deep"))
	dir, err := Cache("x")
	if st, serr := os.Stat(dir); err != nil || serr != nil || !st.IsDir() || dir != filepath.Join(root, "deep", "x") {
		t.Errorf("Cache = %q, %v, %v", dir, err, serr)
	}
	t.Setenv(EnvCache, "")
	t.Setenv("HOME", root)
	t.Setenv("XDG_CACHE_HOME", "")
	if dir, err := Cache("x"); err != nil || dir != filepath.Join(root, ".cache", "procession", "x") {
		t.Errorf("Cache without %s = %q, %v", EnvCache, dir, err)
	}
	t.Setenv("HOME", "")
	if _, err := Cache("x"); err == nil || !strings.Contains(err.Error(), EnvCache) {
		t.Errorf("Cache without a home: %v, want an error that names %s", err, EnvCache)
	}
}

func TestInstallNamesWhatIsMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // no apt-get either
	err := Install(t.Context(), io.Discard, Tool{"no-such-program", "its-package"}, Tool{"nor-this", "its-package"})
	if err == nil || strings.Count(err.Error(), "its-package") != 1 {
		t.Errorf("Install: %v, want an error that names its-package once", err)
	}
	if err := Install(t.Context(), io.Discard, Tool{"/bin/sh", "dash"}); err != nil {
		t.Errorf("Install of what is there: %v", err)
	}
}

func TestBuildPrograms(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		testenv.Skip(t, err.Error())
	}
	src, dst := t.TempDir(), t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(src, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("seven.c", "// cflags: -DRESULT=7\nint main(void) { return RESULT; }\n")
	build := func() error { return BuildPrograms(t.Context(), io.Discard, src, dst, runtime.GOARCH) }
	if err := build(); err != nil {
		t.Fatal(err)
	}
	prog := filepath.Join(dst, "seven")
	err := exec.Command(prog).Run()
	if code := err.(*exec.ExitError).ExitCode(); code != 7 {
		t.Errorf("exit code %d, want 7: the flags were not used", code)
	}
	arch, static, err := Arch(prog)
	if err != nil || arch != runtime.GOARCH || !static {
		t.Errorf("Arch = %s, static %v, %v", arch, static, err)
	}
	before, err := os.Stat(prog)
	if err != nil {
		t.Fatal(err)
	}
	if err := build(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(prog); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("a fresh program was built again: %v", err)
	}
	write("broken.c", "int main(void) { return nothing; }\n")
	if err := build(); err == nil || !strings.Contains(err.Error(), "nothing") {
		t.Errorf("a program that does not compile: %v, want what the compiler said", err)
	}
	if _, _, err := Arch(filepath.Join(src, "seven.c")); err == nil {
		t.Error("Arch of a text file: no error")
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	first, err := Lock(t.Context(), io.Discard, dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var said writes = func(string) { cancel() } // it says that it waits; then it is told to stop
	if _, err := Lock(ctx, said, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("a second lock: %v, want to wait until told to stop", err)
	}
	first.Close()
	again, err := Lock(t.Context(), io.Discard, dir)
	if err != nil {
		t.Fatalf("after the first was given back: %v", err)
	}
	again.Close()
}

type writes func(string)

func (w writes) Write(b []byte) (int, error) { w(string(b)); return len(b), nil }

func TestOutputSaysWhatFailed(t *testing.T) {
	_, err := Output(exec.Command("/bin/sh", "-c", "echo bad thing >&2; exit 4"))
	if err == nil || !strings.Contains(err.Error(), "bad thing") || !strings.Contains(err.Error(), "4") {
		t.Errorf("Output: %v, want exit status and message", err)
	}
}

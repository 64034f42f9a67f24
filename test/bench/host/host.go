// Package host is what the VM and bench tools need from the machine they run
// on: a cache directory, programs from Debian, and the small C programs of
// test/bench/load built for the architecture at hand.
//
// It installs Debian packages when it is root, and says so; it never changes
// the system's apt configuration.
package host

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// EnvCache names the directory that holds what is kept between runs.
const EnvCache = "PROCESSION_CACHE"

// Cache is the directory for tool below EnvCache, or below
// ~/.cache/procession. It is made if missing.
func Cache(tool string) (string, error) {
	root := os.Getenv(EnvCache)
	if root == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("no cache directory: %w; set %s", err, EnvCache)
		}
		root = filepath.Join(user, "procession")
	}
	dir, err := filepath.Abs(filepath.Join(root, tool))
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// Lock waits until no other process has the lock of dir: two runs at once
// would share files, and CPUs. Closing what it returns gives the lock back.
func Lock(ctx context.Context, log io.Writer, dir string) (_ io.Closer, err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	fd := int(f.Fd())
	for told := false; ; told = true {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !told {
			fmt.Fprintf(log, "waiting for another run, which has %s\n", f.Name())
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// ModuleRoot is the directory of this module's go.mod.
func ModuleRoot(ctx context.Context) (string, error) {
	out, err := Output(exec.CommandContext(ctx, "go", "env", "GOMOD"))
	if err != nil {
		return "", err
	}
	mod := strings.TrimSpace(string(out))
	if mod == "" || mod == os.DevNull {
		return "", errors.New("not inside the Procession module: run this from its source tree")
	}
	return filepath.Dir(mod), nil
}

// A Tool is a program and the Debian package that has it.
type Tool struct {
	Command string // looked up in PATH, or an absolute path
	Package string
}

// Have says whether the program is there.
func (t Tool) Have() bool {
	_, err := exec.LookPath(t.Command)
	return err == nil
}

// Install makes sure that every tool is there. As root it installs what is
// missing from Debian, after telling log; otherwise it names what to install.
func Install(ctx context.Context, log io.Writer, tools ...Tool) error {
	var missing []string
	for _, t := range tools {
		if !t.Have() && !slices.Contains(missing, t.Package) {
			missing = append(missing, t.Package)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	list := strings.Join(missing, " ")
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("missing programs of the Debian packages %s, and this is not Debian", list)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing: run as root, or: sudo apt-get install --no-install-recommends %s", list)
	}
	fmt.Fprintf(log, "installing from Debian: %s\n", list)
	if err := aptInstall(ctx, missing); err != nil {
		// The usual cause is a package list older than the archive.
		fmt.Fprintln(log, "updating the package lists")
		if _, err := Output(exec.CommandContext(ctx, "apt-get", "update", "-qq")); err != nil {
			return err
		}
		if err := aptInstall(ctx, missing); err != nil {
			return err
		}
	}
	for _, t := range tools {
		if !t.Have() {
			return fmt.Errorf("package %s is installed, but there is no %s", t.Package, t.Command)
		}
	}
	return nil
}

func aptInstall(ctx context.Context, pkgs []string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"install", "-y", "-qq", "--no-install-recommends"}, pkgs...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	_, err := Output(cmd)
	return err
}

// Output runs cmd and returns its standard output; the error has the end of
// what the program said.
func Output(cmd *exec.Cmd) ([]byte, error) {
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(errs.String())
		if said == "" {
			said = strings.TrimSpace(out.String())
		}
		const most = 2000
		if len(said) > most {
			said = "... " + said[len(said)-most:]
		}
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args[:min(len(cmd.Args), 4)], " "), err, said)
	}
	return out.Bytes(), nil
}

// Compiler is the C compiler for a Go architecture.
func Compiler(goarch string) ([]Tool, error) {
	if goarch == runtime.GOARCH {
		return []Tool{{"gcc", "gcc"}, {"ld", "binutils"}}, nil
	}
	if goarch == "arm64" {
		return []Tool{{"aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"}}, nil
	}
	return nil, fmt.Errorf("no C compiler known for %s on %s", goarch, runtime.GOARCH)
}

// BuildPrograms compiles every .c file in src into a static program of the
// same name in dst. A file with a _start of its own is linked without the C
// library; a line "// cflags: ..." adds flags. A program newer than its source
// is kept.
func BuildPrograms(ctx context.Context, log io.Writer, src, dst, goarch string) error {
	files, err := filepath.Glob(filepath.Join(src, "*.c"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	cc, err := Compiler(goarch)
	if err != nil {
		return err
	}
	for _, f := range files {
		prog := filepath.Join(dst, strings.TrimSuffix(filepath.Base(f), ".c"))
		if fresh(prog, f) {
			continue
		}
		if err := Install(ctx, log, cc...); err != nil {
			return err
		}
		if err := installLibc(ctx, log, goarch); err != nil {
			return err
		}
		if err := compile(ctx, cc[0].Command, f, prog); err != nil {
			return err
		}
	}
	return nil
}

// installLibc makes sure of the C library to link with; it has no program to
// look for.
func installLibc(ctx context.Context, log io.Writer, goarch string) error {
	lib := Tool{"/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev"}
	switch {
	case goarch == "arm64" && runtime.GOARCH == "arm64":
		lib.Command = "/usr/lib/aarch64-linux-gnu/libc.a"
	case goarch == "arm64":
		lib = Tool{"/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"}
	}
	if _, err := os.Stat(lib.Command); err == nil {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing: run as root, or: sudo apt-get install --no-install-recommends %s", lib.Package)
	}
	fmt.Fprintf(log, "installing from Debian: %s\n", lib.Package)
	return aptInstall(ctx, []string{lib.Package})
}

func compile(ctx context.Context, cc, src, prog string) error {
	text, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	args := []string{"-O2", "-Wall", "-static"}
	if bytes.Contains(text, []byte("_start")) {
		args = append(args, "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie")
	}
	for line := range strings.Lines(string(text)) {
		if flags, ok := strings.CutPrefix(line, "// cflags:"); ok {
			args = append(args, strings.Fields(flags)...)
		}
	}
	tmp := prog + ".new"
	if _, err := Output(exec.CommandContext(ctx, cc, append(args, "-o", tmp, src)...)); err != nil {
		return err
	}
	return os.Rename(tmp, prog)
}

// fresh says whether made is newer than its source.
func fresh(made, source string) bool {
	m, err1 := os.Stat(made)
	s, err2 := os.Stat(source)
	return err1 == nil && err2 == nil && m.ModTime().After(s.ModTime())
}

// Arch is the Go architecture of an executable, and whether it is static.
func Arch(file string) (goarch string, static bool, err error) {
	f, err := elf.Open(file)
	if err != nil {
		return "", false, fmt.Errorf("%s: not an executable: %w", file, err)
	}
	defer f.Close()
	static = true
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			static = false
		}
	}
	switch f.Machine {
	case elf.EM_X86_64:
		return "amd64", static, nil
	case elf.EM_AARCH64:
		return "arm64", static, nil
	}
	return "", static, fmt.Errorf("%s: built for %v, which no VM here has", file, f.Machine)
}

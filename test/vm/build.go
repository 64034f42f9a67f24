package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/procession-dev/procession/test/bench/host"
	"github.com/procession-dev/procession/test/vm/internal/wire"
)

// A program is something to run in the guest.
type program struct {
	name     string // import path below the module, or file name
	isTest   bool   // a Go test binary: its output is read as such
	arch     string // of a given binary; "" for a package, which is built for any
	path     string // host: the binary, or the package's directory
	pkg      string // import path; "" for a given binary
	testdata string // host: the package's testdata directory, "" without
}

// findPrograms turns the command line's words into programs: files are static
// executables, everything else is a pattern of packages with tests.
func findPrograms(ctx context.Context, words []string) ([]program, error) {
	var progs []program
	var patterns []string
	for _, w := range words {
		st, err := os.Stat(w)
		if err != nil || !st.Mode().IsRegular() {
			patterns = append(patterns, w)
			continue
		}
		arch, static, err := host.Arch(w)
		if err != nil {
			return nil, err
		}
		if !static {
			return nil, fmt.Errorf("%s: needs a dynamic loader, which the guest has not: build it with CGO_ENABLED=0 or -static", w)
		}
		progs = append(progs, program{name: filepath.Base(w), isTest: strings.HasSuffix(w, ".test"), arch: arch, path: w})
	}
	if len(patterns) == 0 {
		return progs, nil
	}
	out, err := host.Output(goCommand(ctx, "", append([]string{"list", "-f",
		"{{.ImportPath}}\t{{.Dir}}\t{{.Module.Path}}\t{{len .TestGoFiles}}\t{{len .XTestGoFiles}}"}, patterns...)...))
	if err != nil {
		return nil, err
	}
	for sc := bufio.NewScanner(strings.NewReader(string(out))); sc.Scan(); {
		f := strings.Split(sc.Text(), "\t")
		if len(f) != 5 || f[3] == "0" && f[4] == "0" {
			continue
		}
		p := program{name: strings.TrimPrefix(f[0], f[2]+"/"), isTest: true, path: f[1], pkg: f[0]}
		if st, err := os.Stat(filepath.Join(p.path, "testdata")); err == nil && st.IsDir() {
			p.testdata = filepath.Join(p.path, "testdata")
		}
		progs = append(progs, p)
	}
	if len(progs) == 0 {
		return nil, fmt.Errorf("no tests in %s", strings.Join(patterns, " "))
	}
	return progs, nil
}

// goCommand is a go command that builds static programs for Linux.
func goCommand(ctx context.Context, arch string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if arch != "" {
		cmd.Env = append(cmd.Env, "GOARCH="+arch)
	}
	return cmd
}

// binaries are the guest's programs of one architecture, on the host.
type binaries struct {
	init    string
	helpers string // directory
	tests   []string
}

// build makes init, helper programs and test binaries for one architecture,
// below dir. Go's own cache makes a second time quick.
func build(ctx context.Context, log io.Writer, root, dir, arch string, o *options, progs []program) (*binaries, error) {
	b := &binaries{init: filepath.Join(dir, "init")}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	cmd := goCommand(ctx, arch, "build", "-trimpath", "-ldflags=-s -w", "-o", b.init, "./test/vm/init")
	cmd.Dir = root
	if _, err := host.Output(cmd); err != nil {
		return nil, err
	}
	b.helpers = filepath.Join(dir, "helpers")
	if err := os.RemoveAll(b.helpers); err != nil {
		return nil, err
	}
	if err := buildHelpers(ctx, log, b.helpers, arch, o, progs); err != nil {
		return nil, err
	}
	for _, p := range progs {
		if p.pkg == "" {
			b.tests = append(b.tests, p.path)
			continue
		}
		out := filepath.Join(dir, strings.ReplaceAll(p.name, "/", "-")+".test")
		fmt.Fprintf(log, "building %s for %s\n", p.name, arch)
		// -s: the symbol table is of no use on a serial console, and a third of the file.
		if _, err := host.Output(goCommand(ctx, arch, "test", "-c", "-ldflags=-s", "-o", out, p.pkg)); err != nil {
			return nil, err
		}
		b.tests = append(b.tests, out)
	}
	return b, nil
}

// buildHelpers builds the C programs of -helpers and of each package's
// testdata, all into one directory: there is no compiler in the guest.
func buildHelpers(ctx context.Context, log io.Writer, dir, arch string, o *options, progs []program) error {
	sources := map[string]string{} // program to directory
	dirs := []string{o.helpers}
	for _, p := range progs {
		dirs = append(dirs, p.testdata)
	}
	for _, src := range dirs {
		if src == "" {
			continue
		}
		files, err := filepath.Glob(filepath.Join(src, "*.c"))
		if err != nil {
			return err
		}
		for _, f := range files {
			name := filepath.Base(f)
			if other := sources[name]; other != "" {
				return fmt.Errorf("helper programs: there is a %s in %s and in %s", name, other, src)
			}
			sources[name] = src
		}
		if err := host.BuildPrograms(ctx, log, src, dir, arch); err != nil {
			return err
		}
	}
	return nil
}

// writeInitramfs writes everything the guest has into one file, and returns
// the programs it is going to run. Programs of another architecture are left
// out.
func writeInitramfs(file, root string, t target, im *image, mods []module, bin *binaries, progs []program, o *options, job *wire.Job) ([]program, error) {
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	c := newCPIO(w)
	c.device("dev/console", 5, 1)
	c.device("dev/null", 1, 3)
	c.file("init", bin.init)
	c.file(wire.Busybox, im.busybox())
	c.bytes("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	c.bytes("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	c.bytes("etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	for _, d := range []string{"mnt", "opt", "usr/bin", "var/lib", "var/log", "var/tmp"} {
		c.dir(d)
	}
	// Some tests compare their package with its page.
	c.tree("src/docs", filepath.Join(root, "docs"))
	for i, m := range mods {
		path := fmt.Sprintf("%s/%02d-%s.ko", wire.ModulesDir, i, m.name)
		c.bytes(path, 0o644, m.data)
		job.Modules = append(job.Modules, path)
	}
	c.tree(wire.HelpersDir, bin.helpers)
	c.dir(wire.FilesDir)
	if o.files != "" {
		c.tree(wire.FilesDir, filesFor(o.files, t.arch))
	}
	var ran []program
	for i, p := range progs {
		if p.arch != "" && p.arch != t.arch {
			continue
		}
		r := wire.Run{Name: p.name, Dir: "/", Env: append([]string{wire.EnvVM + "=" + t.name}, o.env...)}
		path := "/bin/" + filepath.Base(p.path)
		if p.pkg != "" {
			// The package's own directory, as go test does it.
			r.Dir = "/src/" + p.name
			path = r.Dir + "/" + filepath.Base(p.name) + ".test"
			if p.testdata != "" {
				c.tree(r.Dir+"/testdata", p.testdata)
			}
		}
		c.file(path, bin.tests[i])
		r.Args = append([]string{path}, o.argsFor(p)...)
		job.Runs = append(job.Runs, r)
		ran = append(ran, p)
	}
	c.bytes(wire.JobFile, 0o644, []byte(wire.JSON(job)))
	return ran, errors.Join(c.close(), w.Flush(), f.Close())
}

// filesFor is the part of dir for one architecture, or all of it.
func filesFor(dir, arch string) string {
	if st, err := os.Stat(filepath.Join(dir, arch)); err == nil && st.IsDir() {
		return filepath.Join(dir, arch)
	}
	return dir
}

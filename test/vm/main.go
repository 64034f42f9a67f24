// Command vm runs tests on other kernels: it boots Debian's kernels under
// qemu, each with an initramfs that holds nothing but a small init, busybox and
// the static test binaries, and reports what passed where.
//
//	go run ./test/vm ./internal/procconn/...
//	go run ./test/vm -kernels 5.10-amd64,6.12-amd64+lockdown -run Recorder ./internal/procconn/recorder
//	go run ./test/vm my.test -- -test.short
//
// What it does not hide: a test that began and did not end has failed, a
// console line that was damaged is counted and fails the kernel, and a kernel
// that warned meanwhile (tainted) fails too. Only when the emulator itself
// fails is a kernel started a second time, and the log says so.
//
// Kernels come from the Debian archive that the system uses, through an apt
// configuration of their own, and stay in the cache directory
// ($PROCESSION_CACHE/vm, or ~/.cache/procession/vm) until -refresh. The
// emulator is installed from Debian when it is missing and the user is root.
//
// A test in the guest is root on a machine of its own, in its package's
// directory with its testdata and the module's docs, and finds in its environment:
//
//	PROCESSION_TEST_VM       the kernel's name, for example 6.1-amd64
//	PROCESSION_TEST_HELPERS  a directory of static programs: the C files of
//	                         -helpers and of the packages' testdata, built
//	PROCESSION_TEST_FILES    what -files named (its part for the architecture)
//	PROCESSION_TEST_CGROUP   the cgroup directory of a container of a pod; one
//	                         per hierarchy, joined by ":"
//
// A line "FACT name value" that it prints or logs goes into the table of facts.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/procession-dev/procession/test/bench/host"
	"github.com/procession-dev/procession/test/vm/internal/wire"
)

// options are the command line.
type options struct {
	targets     []target
	helpers     string
	files       string
	env         []string
	modules     []string
	mirror      string
	refresh     bool
	run, skip   string
	testTimeout time.Duration
	timeout     time.Duration
	accel       string
	append      string
	cpus        int
	memory      int
	json, facts string
	words       []string // packages and binaries
	extra       []string // arguments after --
}

const defaultKernels = "5.10-amd64,6.1-amd64,6.12-amd64,sid-amd64,6.12-arm64"

func parse(args []string, stderr io.Writer) (*options, error) {
	o := new(options)
	fs := flag.NewFlagSet("vm", flag.ContinueOnError)
	fs.SetOutput(stderr)
	list := fs.Bool("list", false, "list kernels and variants, and exit")
	names := fs.String("kernels", defaultKernels, "kernels to run on, by comma; NAME+VARIANT starts one differently")
	fs.StringVar(&o.helpers, "helpers", "test/bench/load", "directory of C programs to build and take along, below the module; empty for none")
	fs.StringVar(&o.files, "files", "", "directory to take along; its part amd64 or arm64, if it has one")
	env := fs.String("env", "", "environment for the tests: NAME=VALUE, by comma")
	mods := fs.String("modules", "overlay", "kernel modules to load, by comma, where they are not built in")
	fs.StringVar(&o.mirror, "mirror", "", "Debian archive to get kernels from (default: the system's own)")
	fs.BoolVar(&o.refresh, "refresh", false, "get the newest kernels, also when some are in the cache")
	fs.StringVar(&o.run, "run", "", "run only tests that match, as in go test")
	fs.StringVar(&o.skip, "skip", "", "leave out tests that match, as in go test")
	fs.DurationVar(&o.testTimeout, "test-timeout", 5*time.Minute, "time for one test binary")
	fs.DurationVar(&o.timeout, "timeout", 8*time.Minute, "time for one kernel")
	fs.StringVar(&o.accel, "accel", "tcg", "tcg (emulation, runs anywhere) or kvm")
	fs.StringVar(&o.append, "append", "", "more words for the kernel's command line")
	fs.IntVar(&o.cpus, "cpus", 2, "CPUs of the guest")
	fs.IntVar(&o.memory, "memory", 1024, "memory of the guest, MiB")
	fs.StringVar(&o.json, "json", "", "write the result as JSON to this file (default: vm.json in the cache directory)")
	fs.StringVar(&o.facts, "facts", "", "write the table of facts to this file, as Markdown")
	fs.Usage = func() {
		fmt.Fprintf(stderr, "usage: vm [flags] package|binary.test|binary ... [-- test arguments]\n\n"+
			"Boots Debian's kernels under qemu and runs the tests of the packages, or the\ngiven static binaries, on each.\n\n")
		fs.PrintDefaults()
	}
	if i := slices.Index(args, "--"); i >= 0 {
		o.extra = args[i+1:]
		args = args[:i]
	}
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if *list {
		printList(os.Stdout)
		return nil, flag.ErrHelp
	}
	o.words = fs.Args()
	o.env, o.modules = split(*env), split(*mods)
	return o, o.check(*names)
}

func split(s string) []string {
	return slices.DeleteFunc(strings.Split(s, ","), func(s string) bool { return strings.TrimSpace(s) == "" })
}

func (o *options) check(names string) error {
	if len(o.words) == 0 {
		return errors.New("nothing to run: name packages or test binaries (-help says more)")
	}
	if o.accel != "tcg" && o.accel != "kvm" {
		return fmt.Errorf("-accel: %q is neither tcg nor kvm", o.accel)
	}
	if o.cpus < 1 || o.cpus > 64 {
		return fmt.Errorf("-cpus: %d is not in 1..64", o.cpus)
	}
	if o.memory < 256 {
		return fmt.Errorf("-memory: %d MiB is below the minimum of 256", o.memory)
	}
	for _, e := range o.env {
		if !strings.Contains(e, "=") {
			return fmt.Errorf("-env: %q is not NAME=VALUE", e)
		}
	}
	if o.files != "" {
		if st, err := os.Stat(o.files); err != nil || !st.IsDir() {
			return fmt.Errorf("-files: %s is not a directory", o.files)
		}
	}
	for _, n := range split(names) {
		t, err := parseTarget(n)
		if err != nil {
			return err
		}
		o.targets = append(o.targets, t)
	}
	if len(o.targets) == 0 {
		return errors.New("-kernels: names no kernel")
	}
	return nil
}

// argsFor are a program's arguments.
func (o *options) argsFor(p program) []string {
	if !p.isTest {
		return o.extra
	}
	// The marks of test2json tell a test's result from a line that looks like one.
	args := []string{"-test.v=test2json", "-test.timeout=" + o.testTimeout.String()}
	if o.run != "" {
		args = append(args, "-test.run="+o.run)
	}
	if o.skip != "" {
		args = append(args, "-test.skip="+o.skip)
	}
	return append(args, o.extra...)
}

func printList(w io.Writer) {
	fmt.Fprintln(w, "kernels:")
	for _, k := range kernels {
		fmt.Fprintf(w, "  %-12s %s\n", k.name, k.about)
	}
	fmt.Fprintln(w, "variants, as in 6.12-amd64+lockdown:")
	for _, v := range variants {
		fmt.Fprintf(w, "  +%-11s %s\n", v.name, v.about)
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	o, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		var ok bool
		if ok, err = run(ctx, o, os.Stdout, os.Stderr); err == nil && !ok {
			os.Exit(1)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(2)
	}
}

// run does the whole matrix, one kernel after the other, and reports whether
// all passed.
func run(ctx context.Context, o *options, out, log io.Writer) (bool, error) {
	root, err := host.ModuleRoot(ctx)
	if err != nil {
		return false, err
	}
	if o.helpers != "" && !filepath.IsAbs(o.helpers) {
		o.helpers = filepath.Join(root, o.helpers)
	}
	if o.helpers != "" {
		if st, err := os.Stat(o.helpers); err != nil || !st.IsDir() {
			return false, fmt.Errorf("-helpers: %s is not a directory", o.helpers)
		}
	}
	cache, err := host.Cache("vm")
	if err != nil {
		return false, err
	}
	lock, err := host.Lock(ctx, log, cache)
	if err != nil {
		return false, err
	}
	defer lock.Close()
	progs, err := findPrograms(ctx, o.words)
	if err != nil {
		return false, err
	}
	if err := install(ctx, log, o); err != nil {
		return false, err
	}
	built := map[string]*binaries{}
	images := map[string]*image{}
	rep := new(Report)
	for _, t := range o.targets {
		if built[t.arch] == nil {
			if built[t.arch], err = build(ctx, log, root, filepath.Join(cache, "build-"+t.arch), t.arch, o, progs); err != nil {
				return false, err
			}
		}
		at := t.suite + "-" + t.arch
		if images[at] == nil {
			if images[at], err = fetch(ctx, log, cache, t.kernel, o.mirror, o.refresh); err != nil {
				return false, err
			}
		}
		r, err := runKernel(ctx, log, root, cache, t, images[at], built[t.arch], progs, o)
		if err != nil {
			return false, fmt.Errorf("%s: %w", t.name, err)
		}
		rep.Kernels = append(rep.Kernels, r)
		if ctx.Err() != nil {
			break
		}
	}
	rep.writeTable(out)
	if o.json == "" {
		o.json = filepath.Join(cache, "vm.json")
	}
	if err := host.WriteJSON(o.json, rep); err != nil {
		return false, err
	}
	fmt.Fprintf(log, "result: %s\n", o.json)
	if o.facts != "" {
		if err := host.WriteFile(o.facts, func(w io.Writer) error { rep.writeFacts(w); return nil }); err != nil {
			return false, err
		}
	}
	bad := slices.ContainsFunc(rep.Kernels, func(k KernelResult) bool { return !k.ok() })
	return !bad && ctx.Err() == nil, nil
}

// install makes sure of the programs this run needs.
func install(ctx context.Context, log io.Writer, o *options) error {
	tools := []host.Tool{{Command: "dpkg-deb", Package: "dpkg"}, {Command: "xz", Package: "xz-utils"}, {Command: "zstd", Package: "zstd"}}
	for _, t := range o.targets {
		tools = append(tools, machine(t.arch))
	}
	if o.accel == "kvm" {
		if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
			return fmt.Errorf("-accel kvm: %w", err)
		} else {
			f.Close()
		}
		if slices.ContainsFunc(o.targets, func(t target) bool { return t.arch != runtime.GOARCH }) {
			fmt.Fprintln(log, "kernels of another architecture are emulated all the same")
		}
	}
	return host.Install(ctx, log, tools...)
}

// runKernel boots one kernel and runs everything on it.
func runKernel(ctx context.Context, log io.Writer, root, cache string, t target, im *image, bin *binaries, progs []program, o *options) (KernelResult, error) {
	mods, err := im.modulesFor(ctx, o.modules)
	if err != nil {
		return KernelResult{}, err
	}
	work, err := os.MkdirTemp(cache, "run-")
	if err != nil {
		return KernelResult{}, err
	}
	defer os.RemoveAll(work)
	initramfs := filepath.Join(work, "initramfs")
	job := wire.Job{Hostname: "node-a", Now: time.Now().UTC(), Cgroup: t.cgroup}
	ran, err := writeInitramfs(initramfs, root, t, im, mods, bin, progs, o, &job)
	if err != nil {
		return KernelResult{}, err
	}
	if len(ran) == 0 {
		return KernelResult{}, errors.New("no program was built for this architecture")
	}
	if err := os.MkdirAll(filepath.Join(cache, "console"), 0o755); err != nil {
		return KernelResult{}, err
	}
	raw, err := rawLog(filepath.Join(cache, "console", t.name+".log"))
	if err != nil {
		return KernelResult{}, err
	}
	defer raw.Close()
	kctx, cancel := context.WithTimeoutCause(ctx, o.timeout, errTimeout)
	defer cancel()
	fmt.Fprintf(log, "%s: booting %s (%s)\n", t.name, im.Release, o.accel)
	b, err := startAgain(kctx, log, t, qemuArgs(t, im, initramfs, o), &job, raw)
	if err != nil {
		return KernelResult{}, err
	}
	// What came before a Ctrl-C is told too.
	return summarize(context.WithoutCancel(ctx), t, im, ran, b)
}

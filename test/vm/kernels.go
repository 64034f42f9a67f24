package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/procession-dev/procession/test/bench/host"
)

// A kernel is one of Debian's, by the suite it comes from.
type kernel struct {
	name  string // as given on the command line
	suite string
	arch  string // of Go and of Debian alike
	about string
}

// The kernels of the matrix. A suite's kernel moves on with the suite: the
// name says the series, the result says the exact version.
var kernels = []kernel{
	{"5.10-amd64", "bullseye", "amd64", "Debian 11: no typed loads, no module BTF"},
	{"6.1-amd64", "bookworm", "amd64", "Debian 12"},
	{"6.12-amd64", "trixie", "amd64", "Debian 13"},
	{"sid-amd64", "sid", "amd64", "Debian unstable, 7.x at the time of writing"},
	{"5.10-arm64", "bullseye", "arm64", "Debian 11"},
	{"6.1-arm64", "bookworm", "arm64", "Debian 12"},
	{"6.12-arm64", "trixie", "arm64", "Debian 13"},
	{"sid-arm64", "sid", "arm64", "Debian unstable"},
}

// A variant is a kernel started differently.
type variant struct {
	name, append, cgroup, about string
}

var variants = []variant{
	{"cgroup1", "", "v1", "the old cgroup hierarchies, an empty v2 one beside them"},
	{"integrity", "lockdown=integrity", "v2", "lockdown=integrity"},
	{"lockdown", "lockdown=confidentiality", "v2", "lockdown=confidentiality: BPF may not read kernel memory"},
}

// A target is a kernel, and how it is started.
type target struct {
	kernel
	append, cgroup string
}

// parseTarget reads NAME[+VARIANT...].
func parseTarget(s string) (target, error) {
	name, rest, _ := strings.Cut(s, "+")
	i := slices.IndexFunc(kernels, func(k kernel) bool { return k.name == name })
	if i < 0 {
		return target{}, fmt.Errorf("-kernels: there is no kernel %q; -list shows them", name)
	}
	t := target{kernel: kernels[i], cgroup: "v2"}
	t.name = s
	if rest == "" {
		return t, nil
	}
	for _, v := range strings.Split(rest, "+") {
		i := slices.IndexFunc(variants, func(w variant) bool { return w.name == v })
		if i < 0 {
			return target{}, fmt.Errorf("-kernels: %s: there is no variant %q; -list shows them", s, v)
		}
		t.append = strings.TrimSpace(t.append + " " + variants[i].append)
		if variants[i].cgroup == "v1" {
			t.cgroup = "v1"
		}
	}
	return t, nil
}

// An image is a kernel on disk.
type image struct {
	Release  string   // as in uname -r
	Packages []string // name=version of the packages it was taken from
	dir      string
}

func (im *image) vmlinuz() string { return filepath.Join(im.dir, "vmlinuz") }
func (im *image) modules() string { return filepath.Join(im.dir, "modules") }

// busybox is a static one of the kernel's architecture: the guest's shell.
func (im *image) busybox() string { return filepath.Join(im.dir, "busybox") }

// fetch returns the kernel from the cache, or gets it from Debian.
func fetch(ctx context.Context, log io.Writer, cache string, k kernel, mirror string, refresh bool) (*image, error) {
	dir := filepath.Join(cache, "kernels", k.suite+"-"+k.arch)
	im := &image{dir: dir}
	if b, err := os.ReadFile(filepath.Join(dir, "image.json")); err == nil && !refresh {
		if err := json.Unmarshal(b, im); err != nil {
			return nil, fmt.Errorf("%s/image.json: %w (remove the directory to fetch it again)", dir, err)
		}
		if _, err := os.Stat(im.busybox()); err == nil {
			return im, nil
		}
	}
	if mirror == "" {
		var err error
		if mirror, err = systemMirror(ctx); err != nil {
			return nil, err
		}
	}
	work, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	fmt.Fprintf(log, "%s-%s: reading Debian's package lists\n", k.suite, k.arch)
	a, err := newApt(ctx, filepath.Join(work, "apt"), mirror, k)
	if err != nil {
		return nil, err
	}
	pkgs, err := a.kernelPackages(ctx, "linux-image-cloud-"+k.arch)
	if err != nil {
		return nil, err
	}
	bb, err := a.version(ctx, "busybox-static")
	if err != nil {
		return nil, err
	}
	pkgs = append(pkgs, bb)
	fmt.Fprintf(log, "%s-%s: fetching %s\n", k.suite, k.arch, strings.Join(pkgs, " "))
	tree := filepath.Join(work, "tree")
	if err := a.unpack(ctx, tree, pkgs); err != nil {
		return nil, err
	}
	new := &image{Packages: pkgs, dir: filepath.Join(work, "image")}
	if err := new.collect(ctx, tree); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, err
	}
	if err := errors.Join(os.RemoveAll(dir), os.Rename(new.dir, dir)); err != nil {
		return nil, err
	}
	new.dir = dir
	return new, nil
}

// collect finds image and modules in an unpacked tree, where they lie in
// different places from release to release, and moves them into im.dir.
func (im *image) collect(ctx context.Context, tree string) error {
	find := func(what string, globs ...string) (string, error) {
		var hits []string
		for _, g := range globs {
			h, err := filepath.Glob(filepath.Join(tree, g))
			if err != nil {
				return "", err
			}
			hits = append(hits, h...)
		}
		if len(hits) != 1 {
			return "", fmt.Errorf("%d %ss in the packages %s, want 1: %q", len(hits), what, strings.Join(im.Packages, " "), hits)
		}
		return hits[0], nil
	}
	vmlinuz, err := find("kernel image", "boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz", "lib/modules/*/vmlinuz")
	if err != nil {
		return err
	}
	mods, err := find("module directory", "lib/modules/*", "usr/lib/modules/*")
	if err != nil {
		return err
	}
	busybox, err := find("busybox", "bin/busybox", "usr/bin/busybox")
	if err != nil {
		return err
	}
	im.Release = filepath.Base(mods)
	if err := os.MkdirAll(im.dir, 0o755); err != nil {
		return err
	}
	b, err := os.ReadFile(vmlinuz)
	if err != nil {
		return err
	}
	if b, err = unpackZboot(ctx, b); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(vmlinuz), err)
	}
	js, err := json.MarshalIndent(im, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(im.vmlinuz(), b, 0o644), os.Rename(mods, im.modules()), os.Rename(busybox, im.busybox()),
		os.WriteFile(filepath.Join(im.dir, "image.json"), js, 0o644))
}

// systemMirror is the archive the system itself uses for its own release.
func systemMirror(ctx context.Context) (string, error) {
	rel, err := osRelease("/etc/os-release")
	if err != nil {
		return "", err
	}
	out, err := host.Output(exec.CommandContext(ctx, "apt-get", "indextargets",
		"--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"))
	if err != nil {
		return "", fmt.Errorf("find the Debian archive: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == rel && f[1] == "main" {
			return f[2], nil
		}
	}
	return "", fmt.Errorf("the system's apt sources name no archive for %q main: give one with -mirror", rel)
}

func osRelease(file string) (codename string, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return strings.Trim(v, `"`), nil
		}
	}
	return "", fmt.Errorf("%s: no VERSION_CODENAME", file)
}

// apt is apt with a configuration of its own: the system's network settings
// stay, its sources, state and hooks do not.
type apt struct {
	dir, conf, arch string
}

const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

func newApt(ctx context.Context, dir, mirror string, k kernel) (*apt, error) {
	if _, err := os.Stat(keyring); err != nil {
		return nil, fmt.Errorf("%w: install debian-archive-keyring", err)
	}
	a := &apt{dir: dir, conf: filepath.Join(dir, "apt.conf"), arch: k.arch}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial", "debs"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	var b strings.Builder
	for _, c := range []string{"APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success", "APT::Update::Pre-Invoke",
		"DPkg::Post-Invoke", "DPkg::Pre-Invoke", "APT::Architectures"} {
		fmt.Fprintf(&b, "#clear %s;\n", c)
	}
	for _, kv := range [][2]string{
		{"Dir::Etc::sourcelist", dir + "/sources.list"}, {"Dir::Etc::sourceparts", "/dev/null"},
		{"Dir::Etc::preferences", "/dev/null"}, {"Dir::Etc::preferencesparts", "/dev/null"},
		{"Dir::State", dir + "/state"}, {"Dir::State::status", dir + "/status"}, {"Dir::Cache", dir + "/cache"},
		{"APT::Architecture", k.arch}, {"APT::Architectures::", k.arch},
		// Root's cache directory is closed to apt's own user.
		{"APT::Sandbox::User", "root"}, {"Acquire::Languages", "none"}, {"Acquire::Retries", "3"},
		{"Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false"},
		{"Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled", "false"},
		{"Acquire::IndexTargets::deb::CNF::DefaultEnabled", "false"},
	} {
		fmt.Fprintf(&b, "%s %q;\n", kv[0], kv[1])
	}
	src := fmt.Sprintf("deb [signed-by=%s] %s %s main\n", keyring, mirror, k.suite)
	err := errors.Join(os.WriteFile(a.conf, []byte(b.String()), 0o644), os.WriteFile(dir+"/status", nil, 0o644),
		os.WriteFile(dir+"/sources.list", []byte(src), 0o644))
	if err != nil {
		return nil, err
	}
	_, err = host.Output(exec.CommandContext(ctx, "apt-get", "-c", a.conf, "-qq", "update"))
	return a, err
}

// kernelPackages follows the dependencies of a kernel's meta-package to the
// packages that hold image and modules, as name=version. Which ones these are
// differs: up to Debian 13 one linux-image package has it all, later there are
// linux-binary and linux-modules.
func (a *apt) kernelPackages(ctx context.Context, meta string) ([]string, error) {
	var found []string
	seen := map[string]bool{meta: true}
	for todo := []string{meta}; len(todo) > 0; todo = todo[1:] {
		f, err := a.show(ctx, todo[0])
		if err != nil {
			return nil, err
		}
		found = append(found, todo[0]+"="+f["Version"])
		for _, d := range dependencies(f["Depends"]) {
			if !seen[d] && isKernelPackage(d, a.arch) {
				seen[d] = true
				todo = append(todo, d)
			}
		}
	}
	return found, nil
}

// show is the newest version of a package, as control fields.
func (a *apt) show(ctx context.Context, pkg string) (map[string]string, error) {
	out, err := host.Output(exec.CommandContext(ctx, "apt-cache", "-c", a.conf, "show", "--no-all-versions", pkg))
	if err != nil {
		return nil, err
	}
	f := controlFields(out)
	if f["Version"] == "" {
		return nil, fmt.Errorf("package %s: no Version in what apt-cache shows", pkg)
	}
	return f, nil
}

// version is a package as name=version.
func (a *apt) version(ctx context.Context, pkg string) (string, error) {
	f, err := a.show(ctx, pkg)
	return pkg + "=" + f["Version"], err
}

func isKernelPackage(name, arch string) bool {
	for _, p := range []string{"linux-image-", "linux-binary-", "linux-modules-"} {
		if strings.HasPrefix(name, p) && strings.HasSuffix(name, "-cloud-"+arch) {
			return true
		}
	}
	return false
}

// controlFields reads the first paragraph of a Debian control file.
func controlFields(b []byte) map[string]string {
	f := map[string]string{}
	last := ""
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		line := sc.Text()
		switch {
		case line == "":
			return f
		case line[0] == ' ' || line[0] == '\t':
			f[last] += " " + strings.TrimSpace(line)
		default:
			k, v, _ := strings.Cut(line, ":")
			last = k
			f[k] = strings.TrimSpace(v)
		}
	}
	return f
}

// dependencies are the names in a Depends field, of alternatives the first.
func dependencies(field string) []string {
	var names []string
	for _, d := range strings.Split(field, ",") {
		d, _, _ = strings.Cut(d, "|")
		if f := strings.Fields(d); len(f) > 0 {
			name, _, _ := strings.Cut(f[0], ":")
			names = append(names, name)
		}
	}
	return names
}

// unpack fetches the packages, which apt checks against the signed lists, and
// unpacks their files into tree.
func (a *apt) unpack(ctx context.Context, tree string, pkgs []string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-c", a.conf, "-qq", "download"}, pkgs...)...)
	cmd.Dir = filepath.Join(a.dir, "debs")
	if _, err := host.Output(cmd); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(cmd.Dir, "*.deb"))
	if err != nil {
		return err
	}
	if len(debs) != len(pkgs) {
		return fmt.Errorf("apt-get download %s: %d packages came, want %d", strings.Join(pkgs, " "), len(debs), len(pkgs))
	}
	for _, d := range debs {
		if _, err := host.Output(exec.CommandContext(ctx, "dpkg-deb", "-x", d, tree)); err != nil {
			return err
		}
	}
	return nil
}

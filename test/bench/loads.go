package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/procession-dev/procession/test/bench/host"
)

// A load is a kind of program to run again and again.
type load struct {
	name  string
	about string
	runs  int    // without -scale
	prog  string // what is run
	next  string // what that becomes, if it execs another; "" otherwise
}

// execs is how many execs one run makes.
func (l load) execs() int {
	if l.next != "" {
		return 2
	}
	return 1
}

// programs makes everything that is run, below dir.
func programs(ctx context.Context, log io.Writer, root, dir string) ([]load, error) {
	if err := host.BuildPrograms(ctx, log, filepath.Join(root, "test/bench/load"), dir, runtime.GOARCH); err != nil {
		return nil, err
	}
	busybox := filepath.Join(dir, "busybox", "true")
	if err := os.MkdirAll(filepath.Dir(busybox), 0o755); err != nil {
		return nil, err
	}
	if err := host.Install(ctx, log, host.Tool{Command: "busybox", Package: "busybox-static"}); err != nil {
		return nil, err
	}
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(busybox, b, 0o755); err != nil {
		return nil, err
	}
	hello := filepath.Join(dir, "hello")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", hello, "./test/bench/load/hello")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if _, err := host.Output(cmd); err != nil {
		return nil, err
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	dynamic, err := filepath.EvalSymlinks("/bin/true")
	if err != nil {
		return nil, err
	}
	return []load{
		{"tiny", "static, exits with its first instructions", 2000, in("tiny"), ""},
		{"busybox", "static busybox true", 1000, busybox, ""},
		{"true", "dynamically linked true", 1000, dynamic, ""},
		{"go", "a Go program that does nothing", 500, hello, ""},
		{"double", "a process that execs again at once", 500, in("stage"), in("tiny")},
		{"thread", "a process whose second thread execs", 500, in("threadexec"), in("tiny")},
	}, nil
}

// A timing is what the load generator reports.
type timing struct {
	Runs   int     `json:"runs"`
	Execs  int     `json:"execs"`
	Failed int     `json:"failed"`
	WallNs int64   `json:"wallNs"`
	MeanNs float64 `json:"meanNs"`
	MinNs  int64   `json:"minNs"`
	P50Ns  int64   `json:"p50Ns"`
	P90Ns  int64   `json:"p90Ns"`
	P99Ns  int64   `json:"p99Ns"`
}

// run runs the load in the pod's cgroups, with arguments that carry tag. With
// a file for times it runs with a gap, and says when each run began.
func (l load) run(ctx context.Context, dir string, runs int, tag string, cgroups []string, gapMicros int, times string) (timing, error) {
	args := []string{"-n", strconv.Itoa(runs)}
	if l.next != "" {
		args = append(args, "-s", strconv.Itoa(l.execs()), "-x", l.next)
	}
	if len(cgroups) > 0 {
		args = append(args, "-c", strings.Join(cgroups, ":"))
	}
	if times != "" {
		args = append(args, "-g", strconv.Itoa(gapMicros), "-t", times)
	}
	out, err := host.Output(exec.CommandContext(ctx, filepath.Join(dir, "load"), append(args, l.prog, tag)...))
	if err != nil {
		return timing{}, err
	}
	var t timing
	if err := json.Unmarshal(out, &t); err != nil {
		return timing{}, fmt.Errorf("load: %w in %.100q", err, out)
	}
	return t, nil
}

// newTag is a word that no other process has in its arguments.
func newTag() string {
	var b [6]byte
	rand.Read(b[:])
	return "pb" + hex.EncodeToString(b[:])
}

// A podCgroup is a cgroup shaped like that of a container of a pod, one
// directory per hierarchy of this machine.
type podCgroup struct {
	ID   string // of the container
	dirs []string
	made []string // every directory made, parents first
}

// newPodCgroup makes the cgroups.
func newPodCgroup() (*podCgroup, error) {
	roots, err := cgroupMounts("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	if len(roots) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	var id [32]byte
	rand.Read(id[:])
	p := &podCgroup{ID: hex.EncodeToString(id[:])}
	for _, r := range roots {
		dir := r
		// Below a name of our own: a kubelet on this machine removes what it
		// does not know below /kubepods.
		for _, part := range []string{"procession-bench", "kubepods", "burstable", "pod5f0c1b9e-2b1d-4c55-9d0e-4a7c3f1e8b20", p.ID} {
			above := dir
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err == nil {
				p.made = append(p.made, dir)
			} else if !errors.Is(err, os.ErrExist) {
				p.remove()
				return nil, err
			}
			// A new v1 cpuset has no CPU and lets nobody in.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				if b, err := os.ReadFile(filepath.Join(above, f)); err == nil {
					os.WriteFile(filepath.Join(dir, f), b, 0)
				}
			}
		}
		p.dirs = append(p.dirs, dir)
	}
	return p, nil
}

// remove removes what newPodCgroup made.
func (p *podCgroup) remove() {
	for _, d := range slices.Backward(p.made) {
		os.Remove(d)
	}
}

// cgroupMounts are the mount points of all cgroup hierarchies.
func cgroupMounts(mountinfo string) ([]string, error) {
	b, err := os.ReadFile(mountinfo)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for line := range strings.Lines(string(b)) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 1 || (r[0] != "cgroup" && r[0] != "cgroup2") {
			continue
		}
		// One hierarchy may be mounted twice (cpu and cpuacct): entering it
		// twice does no harm.
		if !slices.Contains(dirs, l[4]) {
			dirs = append(dirs, l[4])
		}
	}
	return dirs, nil
}

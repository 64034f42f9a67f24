package enrich

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procfs"
	"github.com/procession-dev/procession/internal/testenv"
)

// The test program is also the agent in a pod: started with agentStage=1 it
// takes a cgroup namespace of its own, where it is; with 2 it resolves the
// pids given and prints what it found.
const (
	agentStage = "PROCESSION_TEST_AGENT"
	agentPIDs  = "PROCESSION_TEST_PIDS"
)

func TestMain(m *testing.M) {
	var err error
	if os.Getenv(rootedStage) != "" {
		if err := liveBelow(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	switch os.Getenv(agentStage) {
	case "1":
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_NEWCGROUP); err == nil {
			os.Setenv(agentStage, "2")
			err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
		}
	case "setuid":
		err = syscall.Setuid(0)
	case "2":
		err = resolveFor(strings.Fields(os.Getenv(agentPIDs)))
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func resolveFor(pids []string) error {
	out := []*event.Workload{}
	e := New(Config{PodUID: ownUID})
	for _, s := range append(pids, strconv.Itoa(os.Getpid())) {
		pid, err := strconv.ParseInt(s, 10, 32)
		if err != nil {
			return err
		}
		p, err := read(int32(pid))
		if err != nil {
			return err
		}
		e.Resolve(p)
		out = append(out, p.Workload)
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

func read(pid int32) (*event.Process, error) {
	fs, err := procfs.New("")
	if err != nil {
		return nil, err
	}
	defer fs.Close()
	path, err := fs.AppendCgroup(nil, pid)
	if err != nil {
		return nil, err
	}
	p := process(event.SourceProc, string(path))
	p.PID = pid
	return p, nil
}

// hierarchy is where cgroups are made: the memory controller's on cgroup v1,
// as procfs chooses.
func hierarchy(t *testing.T) string {
	for _, dir := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			return dir
		}
	}
	testenv.Skip(t, "no cgroup file system at /sys/fs/cgroup")
	return ""
}

// inCgroup starts a program in a new cgroup, and removes both at the end.
func inCgroup(t *testing.T, root, path string, cmd *exec.Cmd) {
	t.Helper()
	dir := testenv.Cgroup(t, root, path)
	cmd.Args = append([]string{"sh", "-c", `echo $$ > "$0" && exec "$@"`, filepath.Join(dir, "cgroup.procs"), cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	cmd.Stderr = os.Stderr
}

// sleeper starts a process that has reached its cgroup when this returns.
func sleeper(t *testing.T, root, path string) string {
	t.Helper()
	cmd := exec.Command("/bin/cat")
	inCgroup(t, root, path, cmd)
	in, out := testenv.Talk(t, cmd)
	fmt.Fprintln(in, "there")
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(cmd.Process.Pid)
}

// The kernel itself writes the paths: of containers, of the host, and of the
// same processes as an agent in a pod sees them.
func TestKernelPaths(t *testing.T) {
	testenv.Root(t)
	root := hierarchy(t)
	name := fmt.Sprintf("procession-test-%d", os.Getpid())
	top := name + ".slice/kubepods"
	const agentID = "3f2a1b9c0d1e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8"
	pids := []string{
		sleeper(t, root, top+"/besteffort/pod"+podUID+"/"+webID),
		sleeper(t, root, top+"/burstable/pod"+ownUID+"/"+webID),
		sleeper(t, root, name+"-host.slice/x.service"),
		sleeper(t, root, name+".slice/x.service"), // near the agent's own cgroup: the path does not tell
	}
	t.Run("host", func(t *testing.T) {
		if link, err := os.Readlink("/proc/self/ns/cgroup"); err != nil || link != initCgroupNS {
			testenv.Skip(t, "the test runs in a cgroup namespace: "+link)
		}
		e := New(Config{})
		for i, want := range []event.Workload{web, inPod(ownUID), host, host} {
			pid, _ := strconv.Atoi(pids[i])
			p, err := read(int32(pid))
			if err != nil {
				t.Fatal(err)
			}
			e.Resolve(p)
			if diff := cmp.Diff(&want, p.Workload); diff != "" {
				t.Errorf("%s (-want +got):\n%s", p.Cgroup, diff)
			}
		}
	})
	t.Run("agent in a pod", func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		inCgroup(t, root, top+"/burstable/pod"+ownUID+"/"+agentID, cmd)
		cmd.Env = append(os.Environ(), agentStage+"=1", agentPIDs+"="+strings.Join(pids, " "))
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		var got []event.Workload
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		own := event.Workload{Place: event.PlaceContainer, PodUID: ownUID, Reason: ReasonNoKubelet}
		if diff := cmp.Diff([]event.Workload{web, inPod(ownUID), host, unknown(ReasonNamespace), own}, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

package agent

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/testenv"
)

// startAgent starts the agent with a command line, its stdout in a file, and
// waits until it listens. stop ends it as Ctrl-C does.
func startAgent(t *testing.T, command, stdout string) (stop func()) {
	t.Helper()
	out, err := os.Create(stdout)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), commandVar+"="+command)
	cmd.Stdout = out
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := bufio.NewReader(stderr)
	for line := ""; !strings.Contains(line, "listening"); {
		if line, err = said.ReadString('\n'); err != nil {
			cmd.Wait()
			if cmd.ProcessState.ExitCode() == exitUnsupported {
				testenv.Skip(t, line)
			}
			t.Fatalf("agent %s: %v: %s", command, err, line)
		}
	}
	return func() {
		t.Helper()
		err := cmd.Process.Signal(os.Interrupt)
		rest, _ := io.ReadAll(said)
		if err := errors.Join(err, cmd.Wait()); err != nil {
			t.Fatalf("agent %s: %v: %s", command, err, rest)
		}
	}
}

// oneOfEach makes an event of each kind, and says of which processes.
func oneOfEach(t *testing.T) (pids map[string]int) {
	t.Helper()
	pids = map[string]int{}
	run := func(name, script string, attr *syscall.SysProcAttr) {
		cmd := exec.Command("/bin/sh", "-c", script, name)
		cmd.Dir, cmd.SysProcAttr = "/", attr
		if err := cmd.Run(); cmd.Process == nil { // they end as they are told to
			t.Fatalf("%s: %v", name, err)
		}
		pids[name] = cmd.Process.Pid
	}
	run("ids", "exit 3", &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: 65534, Gid: 65533}})
	run("crash", "ulimit -c 0; kill -SEGV $$", nil)
	run("rename", "printf renamed >/proc/$$/comm", nil)

	tracee := exec.Command("/bin/sleep", "60")
	if err := tracee.Start(); err != nil {
		t.Fatal(err)
	}
	defer tracee.Wait()
	defer tracee.Process.Kill()
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	pids["tracee"] = tracee.Process.Pid
	if err := syscall.PtraceAttach(tracee.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := syscall.Wait4(tracee.Process.Pid, nil, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	if err := syscall.PtraceDetach(tracee.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return pids
}

// eventsOf finds the events about one of the processes, by name and kind.
func eventsOf(t *testing.T, ndjson []byte, pids map[string]int) map[string]map[string]any {
	t.Helper()
	names := map[float64]string{float64(os.Getpid()): "tracer"}
	for name, pid := range pids {
		names[float64(pid)] = name
	}
	found := map[string]map[string]any{}
	for line := range bytes.Lines(ndjson) {
		var ev map[string]any
		if err := json.Unmarshal(line, &ev); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if name, ok := names[at(ev, "process.pid").(float64)]; ok {
			found[name+" "+ev["kind"].(string)] = ev
		}
	}
	return found
}

// at is what lies at a path of keys; nil: nothing does.
func at(v any, path string) any {
	for key := range strings.SplitSeq(path, ".") {
		m, _ := v.(map[string]any)
		v = m[key]
	}
	return v
}

// TestEveryFactIsTold: each kind of event has, as JSON, each fact that the
// recorder gives for it; and a recording of the same events, replayed, tells the
// same of them.
func TestEveryFactIsTold(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	live, rec := filepath.Join(dir, "live"), filepath.Join(dir, "facts.rec")
	stopEvents := startAgent(t, "events --recorder require --format json --kinds exec,fork,exit,uid,gid,sid,ptrace,comm,coredump", live)
	stopRecord := startAgent(t, "record --recorder require "+rec, filepath.Join(dir, "nothing"))
	pids := oneOfEach(t)
	stopRecord()
	stopEvents()

	told, err := os.ReadFile(live)
	if err != nil {
		t.Fatal(err)
	}
	var again, errs bytes.Buffer
	if code := Main([]string{"replay", "--format", "json", rec}, &again, &errs, ""); code != exitOK {
		t.Fatalf("replay: %s", &errs)
	}
	const (
		identity = "pid ppid start startTime name"
		ids      = " uid gid suid sgid euid egid fsuid fsgid capabilities capabilitiesPermitted noNewPrivs sid tty cgroup"
		file     = " exe exeFile.dev exeFile.ino exeFile.mode exeFile.uid exeFile.gid exeFile.nlink"
		common   = identity + ids + file
		args     = " args argsBytes"
		ns       = " ns.pid ns.mnt ns.user ns.net"
		change   = "from.uid from.gid from.suid from.sgid from.euid from.egid from.fsuid from.fsgid to.uid to.gid to.suid to.sgid to.euid to.egid to.fsuid to.fsgid"
	)
	// Both read the distance between the two clocks by themselves, and these span
	// both. The CPU time they look at one after the other; all other numbers are whole.
	notExact := cmp.Options{
		cmpopts.IgnoreMapEntries(func(key string, _ any) bool { return key == "startTime" || key == "durationSeconds" }),
		cmpopts.EquateApprox(0, 0.01),
	}
	lives, replays := eventsOf(t, told, pids), eventsOf(t, again.Bytes(), pids)
	for _, tt := range []struct {
		event string
		facts map[string]string      // keys below a key
		is    map[string]interface{} // values
	}{
		{"ids Fork", map[string]string{"process": common, "parent": "pid start"}, map[string]any{"parent.pid": float64(os.Getpid())}},
		{"ids SessionChange", map[string]string{"process": common + ns}, map[string]any{"process.sid": float64(pids["ids"])}},
		{"ids GIDChange", map[string]string{"process": common, "change": change}, map[string]any{"change.from.gid": 0.0, "change.to.gid": 65533.0}},
		{"ids UIDChange", map[string]string{"process": common, "change": change}, map[string]any{
			"change.from.uid": 0.0, "change.to.uid": 65534.0, "process.capabilities": []any{}}},
		{"ids Exec", map[string]string{"process": common + args + ns + " file cwd innerPid exeFile.fsMagic", "parent": "pid start"}, map[string]any{
			"process.file": "/bin/sh", "process.args": []any{"/bin/sh", "-c", "exit 3", "ids"}, "process.argsBytes": 22.0,
			"process.uid": 65534.0, "process.sid": float64(pids["ids"]), "process.innerPid": float64(pids["ids"])}},
		{"ids Exit", map[string]string{"process": common + args, "exit": "code durationSeconds cpuSeconds"}, map[string]any{"exit.code": 3.0, "process.exited": true}},
		{"crash CoreDump", map[string]string{"process": common + args}, nil},
		{"crash Exit", map[string]string{"process": common + args, "exit": "durationSeconds cpuSeconds"}, map[string]any{"exit.signal": "SIGSEGV"}},
		{"rename CommChange", map[string]string{"process": common + args}, map[string]any{"change.from.name": "sh", "change.to.name": "renamed"}},
		{"tracer PtraceAttach", map[string]string{"process": common + args, "target": common + args}, map[string]any{"target.pid": float64(pids["tracee"])}},
		{"tracer PtraceDetach", map[string]string{"process": common + args, "target": common + args}, map[string]any{"target.pid": float64(pids["tracee"])}},
	} {
		ev, replayed := lives[tt.event], replays[tt.event]
		if ev == nil || replayed == nil {
			t.Errorf("%s: told %t, replayed %t", tt.event, ev != nil, replayed != nil)
			continue
		}
		for below, keys := range tt.facts {
			for key := range strings.FieldsSeq(keys) {
				if at(ev, below+"."+key) == nil {
					t.Errorf("%s: no %s.%s", tt.event, below, key)
				}
			}
		}
		for path, want := range tt.is {
			if d := cmp.Diff(want, at(ev, path)); d != "" {
				t.Errorf("%s: %s (-want +got):\n%s", tt.event, path, d)
			}
		}
		for _, top := range []string{"time", "stamp", "sources", "place"} {
			if ev[top] == nil {
				t.Errorf("%s: no %s", tt.event, top)
			}
		}
		// Of the tracer, which ran before, both know what their own scan found.
		for _, part := range []string{"process", "change", "exit", "target", "sources"} {
			if strings.HasPrefix(tt.event, "tracer") && part != "target" {
				continue
			}
			if d := cmp.Diff(ev[part], replayed[part], notExact); d != "" {
				t.Errorf("%s: %s in the replay (-live +replay):\n%s", tt.event, part, d)
			}
		}
	}
	if _, err := os.Stat("/proc/self/loginuid"); err == nil && at(lives["ids Exec"], "process.loginuid") == nil {
		t.Error("no login uid")
	}
}

// Command demo does harmless things that raise alerts, says what it did, and
// checks that each alert arrived exactly once. It needs an agent with the
// starter policies on this machine: make run in one terminal, make demo in
// another.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
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

// An act is one harmless deed and the rule that must notice it.
type act struct {
	rule string // policy/rule
	what string // for people
	do   func(dir string) error
}

var acts = []act{
	{"remote-shells/dev-tcp-shell", "bash opens /dev/tcp/127.0.0.1/9 (nobody listens there)", func(string) error {
		return ignoreExit(exec.Command("bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9").Run())
	}},
	{"execution/exec-from-temp", "a copy of true runs from a temporary directory", func(dir string) error {
		b, err := os.ReadFile("/bin/true")
		if err != nil {
			return err
		}
		file := filepath.Join(dir, "hello")
		if err := os.WriteFile(file, b, 0o755); err != nil {
			return err
		}
		return exec.Command(file).Run()
	}},
	{"execution/fileless-execution", "a program runs from memory, without a file (memfd)", fileless},
	{"privilege/root-gained", "a process goes from uid 65534 to 0 without a set-uid program", func(string) error {
		return self("become-root")
	}},
	{"privilege/ptrace-attach", "a process attaches to its own child with ptrace, and lets go", func(string) error {
		return self("trace")
	}},
	{"host/kernel-module-tool", "false is run through a link named insmod", func(dir string) error {
		link := filepath.Join(dir, "insmod")
		if err := os.Symlink("/bin/false", link); err != nil {
			return err
		}
		return ignoreExit(exec.Command(link, "/nonexistent/rootkit.ko").Run())
	}},
	{minerRule, "true gets the arguments of a crypto miner", miner},
	{"credentials/service-account-token", "a shell names the service account's token file with cat", func(string) error {
		return ignoreExit(exec.Command("sh", "-c", ": cat /var/run/secrets/kubernetes.io/serviceaccount/token").Run())
	}},
}

// miner is the act that is repeated to measure: its rule holds no repeat back.
const minerRule = "host/crypto-miner"

func miner(string) error {
	return (&exec.Cmd{Path: "/bin/true", Args: []string{"xmrig", "-o", "stratum+tcp://pool.example:3333", "--donate-level=1"}}).Run()
}

func main() {
	expect := flag.String("expect", "", "wait until each alert is in this `file` (one JSON object a line), and fail if one is missing or double")
	wait := flag.Duration("wait", 10*time.Second, "how long to wait for the alerts")
	measure := flag.Int("measure", 0, "instead: do one of the acts `n` times, 20 ms apart, and say how long the alerts took")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "demo does harmless things that raise alerts.\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	err := error(nil)
	if flag.NArg() == 1 {
		err = deed(flag.Arg(0))
	} else {
		err = run(*expect, *wait, *measure)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// deed is what a child of the demo does.
func deed(name string) error {
	runtime.LockOSThread()
	switch name {
	case "become-root":
		return becomeRoot()
	case "trace":
		return trace()
	case "be-traced":
		fmt.Println("here")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	}
	return fmt.Errorf("unknown deed %q", name)
}

// trace attaches to a child and lets go. The child has a path of its own:
// tracing the same program again would be a repeat, which its rule holds back.
// It is waited for: a parent goes on a little before its child's exec is told.
func trace() error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	link := filepath.Join(filepath.Dir(exe), fmt.Sprintf("traced-%d", os.Getpid()))
	if err := os.Link(exe, link); err != nil {
		return err
	}
	defer os.Remove(link)
	child := exec.Command(link, "be-traced")
	in, err := child.StdinPipe()
	if err != nil {
		return err
	}
	out, err := child.StdoutPipe()
	if err != nil {
		return err
	}
	if err := child.Start(); err != nil {
		return err
	}
	defer child.Wait()
	defer in.Close()
	if _, err := out.Read(make([]byte, 8)); err != nil {
		return fmt.Errorf("wait for the tracee: %w", err)
	}
	if err := unix.PtraceAttach(child.Process.Pid); err != nil {
		return fmt.Errorf("ptrace attach: %w", err)
	}
	if _, err := unix.Wait4(child.Process.Pid, nil, unix.WALL, nil); err != nil {
		return fmt.Errorf("wait for the tracee to stop: %w", err)
	}
	return unix.PtraceDetach(child.Process.Pid)
}

// becomeRoot gives up every root id and takes them back with CAP_SETUID, the
// way a kernel exploit looks from outside. The raw calls change this thread
// only.
func becomeRoot() error {
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
		return fmt.Errorf("setresuid to 65534: %w", e)
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	data[0].Effective = 1 << unix.CAP_SETUID
	if err := unix.Capset(&head, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); e != 0 {
		return fmt.Errorf("setresuid to 0: %w", e)
	}
	return nil
}

func self(deed string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(exe, deed)
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

func fileless(string) error {
	b, err := os.ReadFile("/bin/true")
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("demo", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	cmd := &exec.Cmd{Path: "/proc/self/fd/3", Args: []string{"from-memory"}, ExtraFiles: []*os.File{f}}
	return cmd.Run()
}

func ignoreExit(err error) error {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return nil
	}
	return err
}

func run(expect string, wait time.Duration, measure int) error {
	if os.Geteuid() != 0 {
		return errors.New("run it as root: changing uids and tracing need it")
	}
	if measure > 0 && expect == "" {
		return errors.New("--measure needs --expect: the file the alerts arrive in")
	}
	var from int64
	if expect != "" {
		st, err := os.Stat(expect)
		if err != nil {
			return fmt.Errorf("no alert file yet, is make run up? %w", err)
		}
		from = st.Size()
	}
	if measure > 0 {
		return measured(expect, from, wait, measure)
	}
	dir, err := os.MkdirTemp("/tmp", "procession-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	want := map[string]int{}
	for _, a := range acts {
		if err := a.do(dir); err != nil {
			return fmt.Errorf("%s: %w", a.what, err)
		}
		fmt.Printf("did: %-72s expect: %s\n", a.what, a.rule)
		want[a.rule] = 1
	}
	if expect == "" {
		return nil
	}
	got, err := await(expect, from, wait, want)
	if err != nil {
		return err
	}
	fmt.Printf("\nall %d alerts arrived, each once; from the kernel's event until the collector had it on disk:\n", len(acts))
	for _, a := range acts {
		for _, al := range got[a.rule] {
			fmt.Printf("  %-36s %7.1f ms  %s\n", a.rule, ms(al.latency()), al.ID)
		}
	}
	return nil
}

// measured repeats one act and says how long its alerts took, one by one.
func measured(expect string, from int64, wait time.Duration, n int) error {
	pace := time.NewTicker(20 * time.Millisecond) // each alert a commit of its own, as on a quiet node
	defer pace.Stop()
	for range n {
		if err := miner(""); err != nil {
			return err
		}
		<-pace.C
	}
	got, err := await(expect, from, wait, map[string]int{minerRule: n})
	if err != nil {
		return err
	}
	var took []time.Duration
	for _, a := range got[minerRule] {
		took = append(took, a.latency())
	}
	slices.Sort(took)
	at := func(percent int) float64 { return ms(took[(len(took)-1)*percent/100]) }
	fmt.Printf("%d alerts, each once; from the kernel's event until the collector had it on disk: p50 %.1f ms, p99 %.1f ms, most %.1f ms\n",
		len(took), at(50), at(99), at(100))
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// An arrival is what the check needs of an alert.
type arrival struct {
	ID          string    `json:"id"`
	Rule        string    `json:"rule"`
	Time        time.Time `json:"time"`
	CommittedAt time.Time `json:"committedAt"`
	Process     struct {
		PID       int    `json:"pid"`
		Start     string `json:"start"`
		Ancestors []struct {
			PID int `json:"pid"`
		} `json:"ancestors"`
	} `json:"process"`
}

func (a *arrival) latency() time.Duration { return a.CommittedAt.Sub(a.Time) }

func (a *arrival) descendsFrom(pid int) bool {
	if a.Process.PID == pid {
		return true
	}
	for _, p := range a.Process.Ancestors {
		if p.PID == pid {
			return true
		}
	}
	return false
}

// await waits until the file, from the offset on, holds as many alerts of each
// rule (policy/rule) about this process's children as wanted, at least, and
// says which are missing or double.
func await(file string, from int64, wait time.Duration, want map[string]int) (map[string][]arrival, error) {
	deadline := time.Now().Add(wait)
	for {
		got, err := arrivals(file, from)
		if err != nil {
			return nil, err
		}
		var missing []string
		for rule, n := range want {
			if have := len(got[rule]); have < n {
				missing = append(missing, fmt.Sprintf("%s (%d of %d)", rule, have, n))
			}
		}
		if len(missing) == 0 {
			return got, nil
		}
		if time.Now().After(deadline) {
			slices.Sort(missing)
			return nil, fmt.Errorf("is make run still up? Not all alerts arrived within %v: %s", wait, strings.Join(missing, ", "))
		}
		time.Sleep(20 * time.Millisecond) // a look at what another process writes
	}
}

// arrivals reads the alerts about this process's children, by policy/rule.
func arrivals(file string, from int64) (map[string][]arrival, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return nil, err
	}
	got := map[string][]arrival{}
	seen := map[string]string{} // what an alert is about, to its id
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadBytes('\n')
		if err == io.EOF {
			return got, nil // a line without its end is not written yet
		}
		if err != nil {
			return nil, err
		}
		var a arrival
		if err := json.Unmarshal(line, &a); err != nil {
			return nil, fmt.Errorf("%s holds a line that is no JSON: %w", file, err)
		}
		rule, ours := strings.CutPrefix(a.Rule, "ClusterDetectionPolicy//")
		// This program itself may lie in a temporary folder, which is no act.
		if !ours || !a.descendsFrom(os.Getpid()) || a.Process.PID == os.Getpid() {
			continue
		}
		about := fmt.Sprintf("%s of %d, %s", rule, a.Process.PID, a.Process.Start)
		if other := seen[about]; other != "" {
			return nil, fmt.Errorf("%s holds the alert %s twice: %s and %s", file, about, other, a.ID)
		}
		seen[about] = a.ID
		got[rule] = append(got[rule], a)
	}
}

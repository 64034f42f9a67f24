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
	"strings"
	"syscall"
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
	{"host/crypto-miner", "true gets the arguments of a crypto miner", func(string) error {
		return (&exec.Cmd{Path: "/bin/true", Args: []string{"xmrig", "-o", "stratum+tcp://pool.example:3333", "--donate-level=1"}}).Run()
	}},
	{"credentials/service-account-token", "a shell names the service account's token file with cat", func(string) error {
		return ignoreExit(exec.Command("sh", "-c", ": cat /var/run/secrets/kubernetes.io/serviceaccount/token").Run())
	}},
}

func main() {
	expect := flag.String("expect", "", "wait until each alert is in this `file` (one JSON object a line), and fail if one is missing or double")
	wait := flag.Duration("wait", 10*time.Second, "how long to wait for the alerts")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "demo does harmless things that raise alerts.\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 1 {
		if err := deed(flag.Arg(0)); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(*expect, *wait); err != nil {
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
		child := exec.Command("sleep", "60")
		if err := child.Start(); err != nil {
			return err
		}
		defer func() {
			child.Process.Kill()
			child.Wait()
		}()
		if err := unix.PtraceAttach(child.Process.Pid); err != nil {
			return fmt.Errorf("ptrace attach: %w", err)
		}
		if _, err := unix.Wait4(child.Process.Pid, nil, unix.WALL, nil); err != nil {
			return fmt.Errorf("wait for the tracee: %w", err)
		}
		return unix.PtraceDetach(child.Process.Pid)
	}
	return fmt.Errorf("unknown deed %q", name)
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

func run(expect string, wait time.Duration) error {
	if os.Geteuid() != 0 {
		return errors.New("run it as root: changing uids and tracing need it")
	}
	var from int64
	if expect != "" {
		st, err := os.Stat(expect)
		if err != nil {
			return fmt.Errorf("no alert file yet, is make run up? %w", err)
		}
		from = st.Size()
	}
	dir, err := os.MkdirTemp("/tmp", "procession-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	for _, a := range acts {
		if err := a.do(dir); err != nil {
			return fmt.Errorf("%s: %w", a.what, err)
		}
		fmt.Printf("did: %-72s expect: %s\n", a.what, a.rule)
	}
	if expect == "" {
		return nil
	}
	return check(expect, from, wait)
}

// An arrival is what the check needs of an alert.
type arrival struct {
	ID      string `json:"id"`
	Rule    string `json:"rule"`
	Process struct {
		PID       int `json:"pid"`
		Ancestors []struct {
			PID int `json:"pid"`
		} `json:"ancestors"`
	} `json:"process"`
}

func (a arrival) descendsFrom(pid int) bool {
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

// check waits until the file, from the offset on, holds each expected alert
// of this process's children, and says which are missing or double.
func check(file string, from int64, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for {
		got, err := arrivals(file, from)
		if err != nil {
			return err
		}
		missing := []string{}
		for _, a := range acts {
			if len(got["ClusterDetectionPolicy//"+a.rule]) == 0 {
				missing = append(missing, a.rule)
			}
		}
		if len(missing) == 0 {
			fmt.Printf("\nall %d alerts arrived:\n", len(acts))
			for _, a := range acts {
				ids := got["ClusterDetectionPolicy//"+a.rule]
				fmt.Printf("  %-40s %s\n", a.rule, strings.Join(ids, " "))
			}
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d alerts did not arrive within %v: %s", len(missing), len(acts), wait, strings.Join(missing, ", "))
		}
		time.Sleep(50 * time.Millisecond) // the file is written by another process
	}
}

func arrivals(file string, from int64) (map[string][]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return nil, err
	}
	got := map[string][]string{}
	seen := map[string]bool{}
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
		if !a.descendsFrom(syscall.Getpid()) {
			continue
		}
		if seen[a.ID] {
			return nil, fmt.Errorf("alert %s is in %s twice", a.ID, file)
		}
		seen[a.ID] = true
		got[a.Rule] = append(got[a.Rule], a.ID)
	}
}

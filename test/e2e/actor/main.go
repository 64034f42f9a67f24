// Command actor is the program in the attacked pods that does what a shell
// cannot: run from memory, take root back, trace a child, and be somebody else.
// Under any other name it plays that program: a server or a database starts the
// shell command it was given, everything else does nothing and succeeds.
//
//	actor memfd | become-root | trace | as NAME PROGRAM ARG...
//	actor tick FROM INTERVAL   one alert after the other, numbered, until the end
//	nginx COMMAND
package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	runtime.LockOSThread() // ids and capabilities are a thread's
	if err := run(filepath.Base(os.Args[0]), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "actor:", err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "actor":
	case "nginx", "postgres":
		if len(args) != 1 {
			return fmt.Errorf("%s: want one shell command", name)
		}
		// Not a "sh -c" of a shell's: this process stays the parent.
		return exec.Command("/bin/sh", "-c", args[0]).Run()
	default:
		return nil
	}
	if len(args) == 0 {
		return fmt.Errorf("what to do?")
	}
	switch deed := args[0]; {
	case deed == "memfd":
		return fromMemory()
	case deed == "become-root":
		return becomeRoot()
	case deed == "trace":
		return traceChild()
	case deed == "as" && len(args) >= 3:
		return (&exec.Cmd{Path: args[2], Args: append([]string{args[1]}, args[3:]...)}).Run()
	case deed == "tick" && len(args) == 3:
		return tick(args[1], args[2])
	default:
		return fmt.Errorf("cannot do %q", args)
	}
}

// fromMemory runs a program that is in no file.
func fromMemory() error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	if _, err := f.Write(self); err != nil {
		return err
	}
	return (&exec.Cmd{Path: "/proc/self/fd/3", Args: []string{"from-memory"}, ExtraFiles: []*os.File{f}}).Run()
}

// becomeRoot gives root up altogether and takes it back with CAP_SETUID, which
// looks from outside like credentials overwritten by an exploit.
func becomeRoot() error {
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	const nobody = 65534
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); e != 0 {
		return fmt.Errorf("give root up: %w", e)
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&head, &caps[0]); err != nil {
		return err
	}
	caps[0].Effective |= 1 << unix.CAP_SETUID
	if err := unix.Capset(&head, &caps[0]); err != nil {
		return err
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); e != 0 {
		return fmt.Errorf("take root back: %w", e)
	}
	return nil
}

// traceChild attaches to a child that did not ask for it.
func traceChild() error {
	child := exec.Command("/bin/sleep", "60")
	if err := child.Start(); err != nil {
		return err
	}
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	}()
	if err := unix.PtraceAttach(child.Process.Pid); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if _, err := unix.Wait4(child.Process.Pid, nil, unix.WALL, nil); err != nil {
		return fmt.Errorf("wait for the tracee: %w", err)
	}
	return unix.PtraceDetach(child.Process.Pid)
}

// tick runs a numbered program at each interval and says so, until SIGTERM: the
// numbers on its output are those that ran, so each is an alert or a loss.
func tick(from, interval string) error {
	n, err := strconv.Atoi(from)
	if err != nil {
		return err
	}
	every, err := time.ParseDuration(interval)
	if err != nil {
		return err
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	clock := time.NewTicker(every)
	defer clock.Stop()
	for ; ; n++ {
		select {
		case <-end:
			return nil
		case at := <-clock.C:
			cmd := &exec.Cmd{Path: "/usr/bin/actor", Args: []string{"tick", "tick=" + strconv.Itoa(n)}}
			if err := cmd.Run(); err != nil {
				return err
			}
			fmt.Println(n, at.UTC().Format(time.RFC3339Nano))
		}
	}
}

package agent

import (
	"runtime"
	"syscall"
)

// runAndStop runs a program up to its first instruction, and ends it there. The
// exec is as true as any; what the program would do to start is left out, which
// for one as large as the agent is 10 times as much.
//
// A traced process stops when its exec is done and reported to all who listen.
// We kill it then: it never goes on, whatever becomes of us, but where the
// kernel forgets that it is traced; then it is run in full.
func runAndStop(exe string, args ...string) error {
	// The thread that makes the process is the one that traces it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, err := syscall.ForkExec(exe, append([]string{exe}, args...), &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Ptrace: true}})
	if err != nil {
		return err
	}
	for {
		var st syscall.WaitStatus
		_, err := syscall.Wait4(pid, &st, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return err
		case !st.Stopped():
			return nil // it has ended
		default:
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				return err
			}
		}
	}
}

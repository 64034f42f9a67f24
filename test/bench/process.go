package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A daemon is a program that runs beside the load: an observer, the burner,
// the collector. Its output goes to files in memory.
type daemon struct {
	cmd      *exec.Cmd
	out, err string // files
	done     chan struct{}
	waited   error // valid once done is closed
}

// startDaemon starts a program; out and err are the files for its output.
func startDaemon(args []string, env []string, out, errs string) (*daemon, error) {
	o, err := os.Create(out)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	e, err := os.Create(errs)
	if err != nil {
		return nil, err
	}
	defer e.Close()
	d := &daemon{cmd: exec.Command(args[0], args[1:]...), out: out, err: errs, done: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = o, e
	d.cmd.Env = append(os.Environ(), env...)
	// Its own group: a Ctrl-C at the terminal is for this program, which
	// stops its daemons in order. They do not outlive it.
	d.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		d.waited = d.cmd.Wait()
		close(d.done)
	}()
	return d, nil
}

func (d *daemon) pid() int { return d.cmd.Process.Pid }

// ended says whether it ended by itself, and what it said.
func (d *daemon) ended() error {
	select {
	case <-d.done:
		return fmt.Errorf("ended by itself (%v): %s", d.waited, lastLines(d.err, d.out))
	default:
		return nil
	}
}

// stop asks the program to end, and after some seconds makes it.
func (d *daemon) stop() {
	d.cmd.Process.Signal(os.Interrupt)
	select {
	case <-d.done:
		return
	case <-time.After(8 * time.Second):
	}
	d.cmd.Process.Kill()
	<-d.done
}

// contains says whether a file has the text.
func contains(file, text string) bool {
	b, err := os.ReadFile(file)
	return err == nil && bytes.Contains(b, []byte(text))
}

// lastLines is the end of the first file that is not empty.
func lastLines(files ...string) string {
	for _, f := range files {
		b, err := os.ReadFile(f)
		b = bytes.TrimSpace(b)
		if err != nil || len(b) == 0 {
			continue
		}
		const most = 400
		if len(b) > most {
			b = b[len(b)-most:]
		}
		return strings.ReplaceAll(string(b), "\n", "; ")
	}
	return "it said nothing"
}

var errLate = errors.New("not ready")

// waitFor polls until cond holds; after limit the error is errLate.
func waitFor(ctx context.Context, limit, every time.Duration, cond func() (bool, error)) error {
	deadline := time.Now().Add(limit)
	for {
		ok, err := cond()
		if err != nil || ok {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w within %s", errLate, limit)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(every):
		}
	}
}

// cpuTime is what all threads of a process have used, user and system, also
// those that have ended: the kernel's per-process CPU clock
// (CPUCLOCK_SCHED, include/linux/posix-timers.h), exact to the ns.
func cpuTime(pid int) (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of pid %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// memory is a process's resident memory, in bytes.
func memory(pid int) (peak, now int64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		kb, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "VmHWM:":
			peak = kb << 10
		case "VmRSS:":
			now = kb << 10
		}
	}
	return peak, now
}

// processByName finds a kernel thread.
func processByName(name string) (pid int, ok bool) {
	files, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(b)) == name {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			return pid, err == nil
		}
	}
	return 0, false
}

// forks is how many tasks this machine has made since boot. Beside the load's
// own it shows how much other work disturbed a run.
func forks() uint64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "processes "); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			return n
		}
	}
	return 0
}

// bpfRunTimes is the run time of each BPF program on this machine by id, in
// ns. The kernel counts it while kernel.bpf_stats_enabled is 1.
func bpfRunTimes() map[uint32]uint64 {
	times := map[uint32]uint64{}
	for id := uint32(0); ; {
		// union bpf_attr of BPF_PROG_GET_NEXT_ID: start_id, next_id, open_flags.
		attr := [3]uint32{id}
		if bpf(unix.BPF_PROG_GET_NEXT_ID, unsafe.Pointer(&attr), unsafe.Sizeof(attr)) < 0 {
			return times
		}
		id = attr[1]
		byID := [3]uint32{id}
		fd := bpf(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&byID), unsafe.Sizeof(byID))
		if fd < 0 {
			continue // it has gone meanwhile
		}
		if ns, err := bpfRunTime(fd); err == nil {
			times[id] = ns
		}
		unix.Close(fd)
	}
}

func bpf(cmd int, attr unsafe.Pointer, size uintptr) int {
	r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
	if errno != 0 {
		return -1
	}
	return int(r)
}

// runTimeOffset is where struct bpf_prog_info (include/uapi/linux/bpf.h) has
// run_time_ns.
const runTimeOffset = 192

func bpfRunTime(fd int) (uint64, error) {
	var info [256]byte
	attr := struct {
		fd, size uint32
		info     unsafe.Pointer
	}{uint32(fd), uint32(len(info)), unsafe.Pointer(&info)}
	if bpf(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&attr), unsafe.Sizeof(attr)) < 0 {
		return 0, errors.New("no information on the program")
	}
	if attr.size < runTimeOffset+8 {
		return 0, fmt.Errorf("the kernel tells %d bytes about a program, run time lies at %d", attr.size, runTimeOffset)
	}
	return binary.NativeEndian.Uint64(info[runTimeOffset:]), nil
}

const bpfStats = "/proc/sys/kernel/bpf_stats_enabled"

// enableBPFStats makes the kernel count BPF run time until restore.
func enableBPFStats() (restore func(), err error) {
	old, err := os.ReadFile(bpfStats)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(bpfStats, []byte("1"), 0); err != nil {
		return nil, err
	}
	return func() { os.WriteFile(bpfStats, old, 0) }, nil
}

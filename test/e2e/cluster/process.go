package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// stopGrace is how long a program gets between SIGTERM and SIGKILL. The API
// server waits for its watchers as long as it may.
const stopGrace = 5 * time.Second

// An identity names one process for good: pids are reused, a pid with its start
// time is not, and both begin anew with each boot.
type identity struct {
	pid   int
	start uint64 // field 22 of stat, clock ticks since boot
	boot  string
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// identify reads who has the pid now. A process that ended and was not waited
// for counts as gone.
func identify(pid int) (identity, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return identity{}, err
	}
	// The name in parentheses may hold anything: count from the last one.
	i := strings.LastIndexByte(string(b), ')')
	if i < 0 {
		return identity{}, fmt.Errorf("/proc/%d/stat: no name in %.64q", pid, b)
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return identity{}, fmt.Errorf("/proc/%d/stat: %d fields after the name, want 20", pid, len(f))
	}
	if f[0] == "Z" || f[0] == "X" {
		return identity{}, fmt.Errorf("pid %d: %w", pid, fs.ErrNotExist)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return identity{}, fmt.Errorf("/proc/%d/stat: start time: %w", pid, err)
	}
	boot, err := bootID()
	return identity{pid: pid, start: start, boot: boot}, err
}

func (id identity) alive() bool {
	now, err := identify(id.pid)
	return err == nil && now == id
}

func (id identity) String() string { return fmt.Sprintf("%d %d %s\n", id.pid, id.start, id.boot) }

func parseIdentity(s string) (id identity, err error) {
	if _, err = fmt.Sscanf(s, "%d %d %s", &id.pid, &id.start, &id.boot); err != nil {
		return identity{}, fmt.Errorf("pid file: %w in %.64q", err, s)
	}
	if id.pid <= 1 {
		return identity{}, fmt.Errorf("pid file: pid %d in %.64q", id.pid, s)
	}
	return id, nil
}

func (c *Cluster) pidFile(name string) string { return filepath.Join(c.Dir, "pids", name) }

// running says which process the pid file names, if that one still runs.
func (c *Cluster) running(name string) (identity, bool) {
	b, err := os.ReadFile(c.pidFile(name))
	if err != nil {
		return identity{}, false
	}
	id, err := parseIdentity(string(b))
	if err != nil {
		return identity{}, false
	}
	return id, id.alive()
}

// start runs a program of the cluster in a session of its own, so that it
// outlives this process, with its output at the end of log/NAME.log. One that
// runs already is left alone.
func (c *Cluster) start(name string, argv []string) error {
	if _, ok := c.running(name); ok {
		return nil
	}
	log, err := os.OpenFile(c.LogFile(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	fmt.Fprintf(log, "---- %s starts: %s\n", time.Now().Format(time.RFC3339), strings.Join(argv, " "))
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	id, err := identify(cmd.Process.Pid)
	if err == nil {
		err = os.WriteFile(c.pidFile(name), []byte(id.String()), 0o644)
	}
	// Without a pid file nobody could stop it later.
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return fmt.Errorf("start %s: %w; see %s", name, err, c.LogFile(name))
	}
	go func() { _ = cmd.Wait() }() // reaps it if it ends before we do
	return nil
}

// stop ends the programs that start started and no others: SIGTERM to all, and
// SIGKILL to what is left after the grace.
func (c *Cluster) stop(ctx context.Context, grace time.Duration, names ...string) error {
	left := map[string]identity{}
	for _, n := range names {
		if id, ok := c.running(n); ok {
			left[n] = id
			_ = syscall.Kill(id.pid, syscall.SIGTERM)
		}
	}
	gone := func() error {
		for n, id := range left {
			if id.alive() {
				return fmt.Errorf("%s (pid %d) still runs", n, id.pid)
			}
		}
		return nil
	}
	err := poll(ctx, grace, gone)
	if err != nil {
		for _, id := range left {
			if id.alive() {
				_ = syscall.Kill(id.pid, syscall.SIGKILL)
			}
		}
		err = poll(context.WithoutCancel(ctx), 10*time.Second, gone)
	}
	for _, n := range names {
		if id, still := left[n]; !still || !id.alive() {
			if e := os.Remove(c.pidFile(n)); e != nil && !errors.Is(e, fs.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

// poll asks until the answer is nil or the time is over, and then returns the
// last answer.
func poll(ctx context.Context, limit time.Duration, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v: %w", limit, err)
		case <-tick.C:
		}
	}
}

package main

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// clockEnv names, to a program built by buildBroken, the file of its clock.
const clockEnv = "PROCESSION_CHAOS_CLOCK"

// A clock is the wall clock of one process, or of one that follows it. The
// kernel has no wall clock for some processes alone; so the programs under test
// are built with a time.Now that adds what a shared page says. All that asks
// for the time is deceived, TLS and SQLite as well; the monotonic clock is not,
// just as when a clock is set.
type clock struct{ path string }

func newClock(path string) (c *clock, err error) {
	c = &clock{path}
	return c, os.WriteFile(path, make([]byte, 8), 0o600)
}

func (c *clock) env() string { return clockEnv + "=" + c.path }

// set makes the clock wrong by so much, at once.
func (c *clock) set(by time.Duration) error {
	f, err := os.OpenFile(c.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(int64(by.Seconds()))), 0)
	return err
}

// follows reports whether a process was built to have this clock.
func (c *clock) follows(pid int) (bool, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	return bytes.Contains(maps, []byte(c.path)), err
}

//go:embed testdata/jump.go
var jumpSource []byte

// buildBroken builds programs of this repository, which is at root, into dir,
// with a clock that can be broken: time.Now of Go's own sources gets one line.
func buildBroken(root, dir string, programs ...string) error {
	work, err := os.MkdirTemp("", "procession-chaos-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env: %w", err)
	}
	source := filepath.Join(strings.TrimSpace(string(goroot)), "src", "time")
	text, err := os.ReadFile(filepath.Join(source, "time.go"))
	if err != nil {
		return err
	}
	const now = "\tsec, nsec, mono := runtimeNow()\n\tif mono == 0 {"
	if n := strings.Count(string(text), now); n != 1 {
		return fmt.Errorf("%s/time.go is not as expected: time.Now was found %d times", source, n)
	}
	broken := strings.Replace(string(text), now, strings.Replace(now, "\n", "\n\tsec += jumped()\n", 1), 1)
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(source, "time.go"): filepath.Join(work, "time.go"),
		filepath.Join(source, "jump.go"): filepath.Join(work, "jump.go"),
	}})
	if err != nil {
		return err
	}
	for name, b := range map[string][]byte{"time.go": []byte(broken), "jump.go": jumpSource, "overlay.json": overlay} {
		if err := os.WriteFile(filepath.Join(work, name), b, 0o600); err != nil {
			return err
		}
	}
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-ldflags=-s -w", "-overlay", filepath.Join(work, "overlay.json"), "-o", dir + "/"}, programs...)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build with a clock to break: %w: %s", err, out)
	}
	return nil
}

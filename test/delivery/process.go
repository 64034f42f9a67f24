package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A proc is a program under test, in a process of its own.
type proc struct {
	cmd  *exec.Cmd
	done chan struct{}
	tail tail
}

// launch starts a program. What it says on stderr is kept, to tell why it ended.
func launch(stdout io.Writer, path string, args ...string) (*proc, error) {
	p := &proc{cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = stdout, &p.tail
	// Nothing of a run may outlive it, however it ends.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	return p, nil
}

// stop sends a signal and waits; SIGKILL follows after a while.
func (p *proc) stop(sig syscall.Signal) {
	if p == nil {
		return
	}
	p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		p.cmd.Process.Kill()
		<-p.done
	}
}

func (p *proc) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %v\n%s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, p.tail.String())
	default:
		return nil
	}
}

// rss is what the process has of memory, in MiB.
func (p *proc) rss() (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) > 1 && f[0] == "VmRSS:" {
			kb, err := strconv.ParseFloat(f[1], 64)
			return kb / 1024, err
		}
	}
	return 0, errors.New("no VmRSS in status: the process has ended")
}

// cpu is the time the process has had of CPUs.
func (p *proc) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("stat has %d fields", len(f))
	}
	var ticks int64
	for _, s := range f[11:13] { // utime, stime in ticks of 10 ms
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// A tail keeps the last bytes of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailBytes = 4 << 10

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.b = append(t.b, p...); len(t.b) > tailBytes {
		t.b = t.b[len(t.b)-tailBytes:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

// counted is a program with an address for its metrics.
type counted struct {
	*proc
	metrics string
}

// A collector is one that runs, with its state in a directory of its own.
type collector struct {
	counted
	b    *bench
	dir  string
	addr string // for agents; stays the same over restarts
}

func (c *collector) state() string { return filepath.Join(c.dir, "state") }

// start runs the program and returns when agents can connect.
func (c *collector) start(ctx context.Context) (err error) {
	ready := filepath.Join(c.dir, "ready")
	os.Remove(ready)
	if c.metrics == "" {
		if c.metrics, err = freeAddr(); err != nil {
			return err
		}
	}
	c.proc, err = launch(nil, c.b.collectorPath, "serve", "--state", c.state(), "--listen", c.addr,
		"--ready-file", ready, "--metrics", c.metrics, "--log-level", "error")
	if err != nil {
		return err
	}
	for {
		if b, err := os.ReadFile(ready); err == nil {
			c.addr = strings.TrimSpace(string(b))
			return nil
		}
		if err := c.ended(); err != nil {
			return err
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

// freeAddr is a loopback address nobody listens at.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// counter is the sum of a metric's series that have all the labels, each
// written as it is in the text format: reason="address".
func (c *counted) counter(name string, labels ...string) (sum float64, err error) {
	client := &http.Client{Timeout: 30 * time.Second}
	res, err := client.Get("http://" + c.metrics + "/metrics")
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err
	}
	return sumSeries(string(b), name, labels...)
}

func sumSeries(text, name string, labels ...string) (sum float64, err error) {
	found := false
lines:
	for l := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(l), name)
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		for _, want := range labels {
			if !strings.Contains(rest, want) {
				continue lines
			}
		}
		v, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		sum, found = sum+v, true
	}
	if !found {
		return 0, fmt.Errorf("no series of %s with %v", name, labels)
	}
	return sum, nil
}

// pause waits, unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

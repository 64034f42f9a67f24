package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A bench is one invocation.
type bench struct {
	work     string // directory in memory, seen by this program and what it starts alone
	programs string

	agent, collector, policies string
	collectorAddr              string
	eventsArgs, runArgs        []string
	service                    *daemon
	serviceErr                 error

	scale float64
	pod   *podCgroup // nil: cgroups cannot be made here
}

// A Run is one measurement.
type Run struct {
	Repeat    int    `json:"repeat"`
	Observer  string `json:"observer"`
	Load      string `json:"load"`
	Saturated bool   `json:"saturated"`
	Error     string `json:"error,omitempty"` // it failed: nothing below is meant

	Timing  timing   `json:"timing"`
	Score   score    `json:"score"`
	CPUNs   int64    `json:"cpuNs"`    // of the observer, from the start of the load until it had told everything
	KernNs  int64    `json:"kernelNs"` // of a kernel thread that works for it
	BPFNs   int64    `json:"bpfNs"`    // run time of its BPF programs, wherever they ran
	RSSPeak int64    `json:"rssPeakBytes"`
	RSS     int64    `json:"rssBytes"`
	Foreign int64    `json:"foreignForks"` // tasks made meanwhile that were not the load's
	Latency *latency `json:"latency,omitempty"`
}

// measure runs one load beside one observer.
func (b *bench) measure(ctx context.Context, o *observer, l load, saturated bool) (r Run) {
	r = Run{Observer: o.name, Load: l.name, Saturated: saturated}
	if err := b.measureInto(ctx, o, l, &r); err != nil {
		r.Error = strings.Join(strings.Fields(err.Error()), " ")
	}
	return r
}

func (b *bench) measureInto(ctx context.Context, o *observer, l load, r *Run) error {
	before := bpfRunTimes() // programs older than the observer are not its own
	var d *daemon
	if o.command != nil {
		var err error
		if d, err = b.begin(ctx, o); err != nil {
			return err
		}
		defer d.stop()
	}
	runs := max(1, int(float64(l.runs)*b.scale))
	if r.Saturated {
		runs = max(1, runs/4)
		stop, err := b.saturate(ctx)
		if err != nil {
			return err
		}
		defer stop()
	}
	e := &expectation{tag: newTag(), execs: runs * l.execs(), load: l}
	var cgroups []string
	if b.pod != nil {
		e.container, cgroups = b.pod.ID, b.pod.dirs
	}
	if err := b.warmUp(ctx, l, cgroups); err != nil {
		return err
	}
	c0, err := b.counters(o, d, before)
	if err != nil {
		return err
	}
	if r.Timing, err = l.run(ctx, b.programs, runs, e.tag, cgroups, 0, ""); err != nil {
		return err
	}
	f1 := forks()
	if d != nil {
		if err := b.settle(ctx, d, o, e); err != nil {
			return err
		}
	}
	c1, err := b.counters(o, d, before)
	if err != nil {
		return err
	}
	r.CPUNs, r.KernNs, r.BPFNs = int64(c1.cpu-c0.cpu), int64(c1.kern-c0.kern), int64(c1.bpf-c0.bpf)
	made := int64(runs) + 1 // the load itself
	if l.name == "thread" {
		made += int64(runs)
	}
	r.Foreign = int64(f1-c0.forks) - made
	if d == nil {
		return nil
	}
	r.RSSPeak, r.RSS = memory(d.pid())
	if err := d.ended(); err != nil {
		return err
	}
	d.stop()
	if o.score != nil {
		r.Score, err = scoreFile(d.out, o.score, e)
	}
	return err
}

// warmUp runs a load for a moment, beside no observer too: what one does for the
// first execs alone, as having its code mapped, is not what an exec costs.
func (b *bench) warmUp(ctx context.Context, l load, cgroups []string) error {
	const runs, told = 50, 100 * time.Millisecond
	if _, err := l.run(ctx, b.programs, runs, newTag(), cgroups, 0, ""); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(told): // all have looked by then
		return nil
	}
}

// counters are what is read before and after a load.
type counters struct {
	cpu, kern time.Duration
	bpf       uint64
	forks     uint64
}

func (b *bench) counters(o *observer, d *daemon, old map[uint32]uint64) (c counters, err error) {
	if d != nil {
		if c.cpu, err = cpuTime(d.pid()); err != nil {
			return c, errors.Join(err, d.ended())
		}
	}
	if o.bpf {
		for id, ns := range bpfRunTimes() {
			if _, is := old[id]; !is {
				c.bpf += ns
			}
		}
	}
	if o.helper != "" {
		if pid, ok := processByName(o.helper); ok {
			if c.kern, err = cpuTime(pid); err != nil {
				return c, err
			}
		}
	}
	c.forks = forks()
	return c, nil
}

// settle waits until the observer has told all it is going to tell: every
// exec is there, or its output has not grown for half a second. One that tells
// no execs gets that half second.
func (b *bench) settle(ctx context.Context, d *daemon, o *observer, e *expectation) error {
	const quiet, every = 500 * time.Millisecond, 50 * time.Millisecond
	var size int64 = -1
	since := time.Now()
	err := waitFor(ctx, 15*time.Second, every, func() (bool, error) {
		st, err := os.Stat(d.out)
		if err != nil {
			return false, err
		}
		if st.Size() != size {
			size, since = st.Size(), time.Now()
		}
		if o.score != nil && contains(d.out, fmt.Sprintf("%s-%d;", e.tag, e.execs-1)) {
			got, err := scoreFile(d.out, o.score, e)
			if err != nil || got.Argv == e.execs {
				return true, err
			}
		}
		return time.Since(since) >= quiet, d.ended()
	})
	if errors.Is(err, errLate) {
		return nil // it never falls silent: other programs keep it talking
	}
	return err
}

// saturate keeps every CPU busy until stop is called, for two minutes at most.
func (b *bench) saturate(ctx context.Context) (stop func(), err error) {
	d, err := startDaemon([]string{filepath.Join(b.programs, "burn"), "120"}, nil,
		filepath.Join(b.work, "burn.out"), filepath.Join(b.work, "burn.err"))
	if err != nil {
		return nil, err
	}
	err = waitFor(ctx, 20*time.Second, 20*time.Millisecond, func() (bool, error) { return contains(d.out, "busy"), d.ended() })
	if err != nil {
		d.stop()
		return nil, fmt.Errorf("burn: %w", err)
	}
	return func() {
		d.cmd.Process.Kill() // its children end with it
		<-d.done
	}, nil
}

// A latency is the time from the moment a program is started to the moment
// another process can read the observer's line about it. It contains the
// start itself (see Run.Timing of the load tiny).
type latency struct {
	Execs int   `json:"execs"` // how many of them were told
	P50Ns int64 `json:"p50Ns"`
	P99Ns int64 `json:"p99Ns"`
	MaxNs int64 `json:"maxNs"`
}

// measureLatency runs a slow load (one program every 3 ms) and reads the
// observer's output as it comes.
func (b *bench) measureLatency(ctx context.Context, o *observer, l load) (r Run) {
	r = Run{Observer: o.name, Load: "latency"}
	if err := b.latencyInto(ctx, o, l, &r); err != nil {
		r.Error = strings.Join(strings.Fields(err.Error()), " ")
	}
	return r
}

func (b *bench) latencyInto(ctx context.Context, o *observer, l load, r *Run) error {
	d, err := b.begin(ctx, o)
	if err != nil {
		return err
	}
	defer d.stop()
	runs := max(50, int(300*b.scale))
	e := &expectation{tag: newTag(), execs: runs, load: l}
	follow, err := followFile(d.out, e.tag)
	if err != nil {
		return err
	}
	defer follow.close()
	times := filepath.Join(b.work, "times")
	if r.Timing, err = l.run(ctx, b.programs, runs, e.tag, nil, 3000, times); err != nil {
		return err
	}
	if err := b.settle(ctx, d, o, e); err != nil {
		return err
	}
	follow.close()
	if follow.err != nil {
		return follow.err
	}
	started, err := readTimes(times)
	if err != nil {
		return err
	}
	r.Latency, err = latencies(e, started, follow.seen)
	return err
}

// readTimes reads what the load generator wrote with -t.
func readTimes(file string) ([]int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var times []int64
	for line := range strings.Lines(string(b)) {
		n, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		times = append(times, n)
	}
	return times, nil
}

func latencies(e *expectation, started []int64, seen map[string]int64) (*latency, error) {
	var took []int64
	for arg, at := range seen {
		i, ok := e.index(arg)
		if !ok || i >= len(started) {
			continue
		}
		took = append(took, at-started[i])
	}
	if len(took) == 0 {
		return nil, errors.New("it told no exec of the load")
	}
	slices.Sort(took)
	return &latency{len(took), took[len(took)/2], took[len(took)*99/100], took[len(took)-1]}, nil
}

// A follower notes when a word with the tag first appears in a growing file:
// it sleeps in inotify, so it is no load while nothing comes.
type follower struct {
	fd   int
	f    *os.File
	done chan struct{}
	quit chan struct{}
	seen map[string]int64 // word to CLOCK_REALTIME ns; valid once done is closed
	err  error
}

func followFile(file, tag string) (*follower, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err == nil {
		_, err = unix.InotifyAddWatch(fd, file, unix.IN_MODIFY)
	}
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	w := &follower{fd: fd, f: f, done: make(chan struct{}), quit: make(chan struct{}), seen: map[string]int64{}}
	go w.run(tag)
	return w, nil
}

func (w *follower) close() {
	select {
	case <-w.quit:
	default:
		close(w.quit)
	}
	<-w.done
}

func (w *follower) run(tag string) {
	defer close(w.done)
	defer unix.Close(w.fd)
	defer w.f.Close()
	events := make([]byte, 4096)
	buf := make([]byte, 256<<10)
	var rest []byte
	for {
		fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, 100); err != nil && !errors.Is(err, unix.EINTR) {
			w.err = err
			return
		}
		if fds[0].Revents != 0 {
			unix.Read(w.fd, events)
		}
		n, err := w.f.Read(buf)
		now := time.Now().UnixNano()
		if n > 0 {
			rest = w.note(append(rest, buf[:n]...), tag, now)
			continue
		}
		if err != nil && err != io.EOF {
			w.err = err
			return
		}
		select {
		case <-w.quit:
			return
		default:
		}
	}
}

// note takes the words out of whole lines, and returns what is left of the last.
func (w *follower) note(b []byte, tag string, now int64) []byte {
	end := bytes.LastIndexByte(b, '\n')
	for _, m := range tagged.FindAll(b[:end+1], -1) {
		if bytes.HasPrefix(m, []byte(tag)) {
			if _, ok := w.seen[string(m)]; !ok {
				w.seen[string(m)] = now
			}
		}
	}
	return append([]byte(nil), b[end+1:]...)
}

// machineLines say where this was measured.
func machineLines() []string {
	var u unix.Utsname
	unix.Uname(&u)
	cpu := "unknown CPU"
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if k, v, _ := strings.Cut(sc.Text(), ":"); strings.TrimSpace(k) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	var set unix.CPUSet
	unix.SchedGetaffinity(0, &set)
	return []string{
		fmt.Sprintf("%s, %d CPUs, Linux %s %s", cpu, set.Count(), unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:])),
	}
}

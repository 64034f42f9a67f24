package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/spool"
	"github.com/procession-dev/procession/internal/testenv"
	flood "github.com/procession-dev/procession/internal/testenv/storm"
)

// Variables of TestFlood. Without them a flood has some thousand tasks.
const (
	floodVar = "PROCESSION_FLOOD"      // how long each flood lasts, at the machine's own speed; then nothing may be lost and alerts leave in 100 ms
	floodOut = "PROCESSION_FLOOD_OUT"  // file to append the table of figures to
	floodRun = "PROCESSION_FLOOD_MAKE" // in the child that makes the flood: kind, makers, limit, time
)

func TestMain(m *testing.M) {
	if command := os.Getenv(commandVar); command != "" {
		os.Exit(Main(strings.Fields(command), os.Stdout, os.Stderr, "test"))
	}
	if args := os.Getenv(floodRun); args != "" {
		// What makes the flood is no agent: it goes before nobody.
		if err := renice(0); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		var kind, d string
		var makers int
		var limit int64
		_, err := fmt.Sscan(args, &kind, &makers, &limit, &d)
		var n int64
		fmt.Scanln() // until we are told that our parent is ready to count
		if err == nil {
			var lasts time.Duration
			if lasts, err = time.ParseDuration(d); err == nil {
				n, err = flood.Make(flood.Kind(kind), makers, limit, lasts)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Print(n)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A flooded agent is the whole event path: process table, identity, the starter
// policies, the spool on a disk. It counts what it hears of one family.
type flooded struct {
	conn   *procconn.Conn
	pipe   *pipeline
	engine *policy.Engine
	prompt prompter
	spool  *spool.Spool
	build  alert.Builder

	first        atomic.Int32 // pid of the process that makes the flood, or has it made
	depth        atomic.Int32 // of the flood's processes below it: 1 for its children
	forks, exits atomic.Int64 // of the flood's processes
	threads      atomic.Int64 // records of threads: none may come
	alerts       chan probe   // judged
	told         chan probe   // on disk

	slow   time.Duration // that judging an event takes in addition
	cgroup string        // directory of the flood's own; "" the test's
}

// A probe is an alert that was expected.
type probe struct {
	mark   string        // its own argument
	stamp  uint64        // of its exec: the kernel's, ns of CLOCK_MONOTONIC
	judged time.Duration // after it: in the spool
	synced time.Duration // after it: on disk, and so on its way
	disk   time.Duration // of synced, what the kernel's fdatasync took
}

// own is how long it took without the disk.
func (p probe) own() time.Duration { return max(p.judged, p.synced-p.disk) }

// since is how long ago something was stamped.
func since(stamp uint64) time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return time.Hour
	}
	return time.Duration(uint64(now.Nano()) - stamp)
}

// newFlooded starts one with a ring of so many bytes (0: the usual), that takes
// so much longer to judge an event.
func newFlooded(t *testing.T, ring int, slow time.Duration) *flooded {
	t.Helper()
	testenv.Root(t)
	f := &flooded{alerts: make(chan probe, 1000), told: make(chan probe, 1000), slow: slow}
	f.prompt = newPrompter()
	f.prompt.start(time.Now())
	compiler, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	f.engine = policy.NewEngine(compiler, policy.Config{})
	pack := source.NewDir("../../deploy/helm/procession/policies", slog.New(slog.DiscardHandler))
	if err := pack.Load(compiler, func(u source.Update) { f.engine.Swap(u.Set) }); err != nil {
		t.Fatal(err)
	}
	if f.spool, err = spool.Open(spool.Config{Dir: filepath.Join(t.TempDir(), "spool")}); err != nil {
		t.Fatal(err)
	}
	if f.pipe, err = newPipeline(slog.New(slog.DiscardHandler), f.judge, nil); err != nil {
		t.Fatal(err)
	}
	f.build.Wall = f.pipe.wall
	f.conn, err = procconn.Open(t.Context(), procconn.Config{
		Recorder: procconn.Require, Cwd: true, RingBytes: ring, Kinds: event.KindSet(event.AllKinds()...) &^ event.KindSet(event.CommChange),
	})
	testenv.SkipOn(t, err, procconn.ErrNotSupported, procconn.ErrPermission)
	f.pipe.fair.full = f.conn.Full
	if _, err := f.pipe.table.Scan(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- f.conn.Run(ctx, f) }()
	go func() { done <- f.spool.Run(ctx) }()
	go func() { done <- f.follow(ctx) }()
	t.Cleanup(func() {
		cancel()
		for range 3 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		f.conn.Close()
		f.spool.Close()
		if err := renice(0); f.prompt.allowed && err != nil {
			t.Error(err)
		}
	})
	return f
}

// follow waits for each alert until it is on disk.
func (f *flooded) follow(ctx context.Context) error {
	for {
		select {
		case p := <-f.alerts:
			before := f.spool.Stats().SyncTime
			if f.spool.Sync(ctx) != nil {
				return nil // at the end
			}
			p.synced, p.disk = since(p.stamp), f.spool.Stats().SyncTime-before
			f.told <- p
		case <-ctx.Done():
			return nil
		}
	}
}

// Record counts what came from the kernel, before anything can leave it out.
func (f *flooded) Record(r *event.Record) {
	switch {
	case r.Kind == event.Fork && r.PeerPID != r.PeerTGID, r.Kind == event.Exit && r.PID != r.TGID:
		f.threads.Add(1)
	case r.Kind == event.Fork && f.below(r.TGID) == f.depth.Load()-1:
		f.forks.Add(1)
	case r.Kind == event.Exit && (f.below(r.TGID) == f.depth.Load() ||
		r.Have.Has(event.FieldParent) && f.below(r.PPID) == f.depth.Load()-1): // of one whose beginning was lost
		f.exits.Add(1)
	}
	f.pipe.Record(r)
}

// below says how far below the flood's first process another one is; -9: it is
// not.
func (f *flooded) below(pid int32) int32 {
	first := f.first.Load()
	p := f.pipe.table.Lookup(pid)
	for n := int32(0); n < 3 && p != nil && first != 0; n++ {
		if p.PID == first {
			return n
		}
		p = p.Parent
	}
	return -9
}

func (f *flooded) Lost(l procconn.Loss) { f.pipe.Lost(l) }
func (f *flooded) Idle()                { f.prompt.look(time.Now()); f.pipe.Idle() }

func (f *flooded) judge(ev *event.Event) {
	for begin := time.Now(); time.Since(begin) < f.slow; {
	}
	f.engine.Evaluate(ev, func(m *policy.Match) {
		b, err := proto.Marshal(f.build.Alert(ev, m))
		if err == nil {
			_, err = f.spool.Append(b)
		}
		if err != nil {
			return // the probe is missed then
		}
		if strings.HasPrefix(ev.Process.Cmdline, "xmrig\x00probe-") {
			mark, _, _ := strings.Cut(ev.Process.Cmdline[len("xmrig\x00"):], "\x00")
			f.alerts <- probe{mark: mark, stamp: ev.Stamp, judged: since(ev.Stamp)}
		}
	})
}

// probe starts a program that a rule is about, and returns when its alert is on
// disk.
func (f *flooded) probe(ctx context.Context, n int) (probe, error) {
	mark := fmt.Sprint("probe-", n)
	cmd := &exec.Cmd{Path: "/bin/true", Args: []string{"xmrig", mark, "-o", "stratum+tcp://pool.example:3333"}}
	if err := cmd.Run(); err != nil {
		return probe{}, err
	}
	for {
		select {
		case p := <-f.told:
			if p.mark == mark {
				return p, nil
			} // else a second rule's, of an earlier probe
		case <-ctx.Done():
			return probe{}, fmt.Errorf("no alert for %s: %w", mark, ctx.Err())
		}
	}
}

// A floodResult is what a flood came to.
type floodResult struct {
	made, forks, exits int64
	lost, shed         uint64
	took               time.Duration
	cpu                time.Duration
	probes             []probe
}

// run lets a child make a flood and probes meanwhile.
func (f *flooded) run(t *testing.T, kind flood.Kind, limit int64, lasts time.Duration) (r floodResult) {
	t.Helper()
	lost, shed, cpu := f.pipe.lost.Load(), f.pipe.fair.shed.Load(), ownCPU(t)
	f.first.Store(0)
	f.forks.Store(0)
	f.exits.Store(0)
	makers := runtime.NumCPU()
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d %s", floodRun, kind, makers, limit, lasts))
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	f.depth.Store(1)
	if kind == flood.Fork { // it has them made
		f.depth.Store(2)
	}
	f.first.Store(int32(child.Process.Pid))
	if f.cgroup != "" {
		if err := os.WriteFile(filepath.Join(f.cgroup, "cgroup.procs"), []byte(fmt.Sprint(child.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	if _, err := fmt.Fprintln(in); err != nil {
		t.Fatal(err)
	}
	over := make(chan error, 1)
	go func() {
		_, err := fmt.Fscan(out, &r.made)
		over <- err
	}()
	for n := 0; ; n++ {
		f.tryProbe(t, n, &r)
		select {
		case err = <-over:
		case <-time.After(100 * time.Millisecond):
			continue
		}
		break
	}
	r.took = time.Since(begin)
	if werr := child.Wait(); err != nil || werr != nil {
		t.Fatalf("%s: %v, %v", kind, err, werr)
	}
	f.tryProbe(t, -1, &r) // all older is told now
	r.cpu = ownCPU(t) - cpu
	r.forks, r.exits = f.forks.Load(), f.exits.Load()
	r.lost, r.shed = f.pipe.lost.Load()-lost, f.pipe.fair.shed.Load()-shed
	return r
}

// tryProbe is probe with patience. An alert may be missing if events were lost,
// or if so many others work in our own cgroup that it has a storm of its own.
func (f *flooded) tryProbe(t *testing.T, n int, r *floodResult) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	before := f.pipe.lost.Load() + f.pipe.fair.shed.Load()
	p, err := f.probe(ctx, n)
	switch {
	case err == nil:
		r.probes = append(r.probes, p)
	case f.pipe.lost.Load()+f.pipe.fair.shed.Load() == before:
		t.Error(err)
	default:
		t.Log(err)
	}
}

// ownCPU is the CPU time of this process: the agent, and the starting of probes.
func ownCPU(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// spread is the median and the worst, in ms.
func spread(probes []probe, of func(probe) time.Duration) string {
	var d []time.Duration
	for _, p := range probes {
		d = append(d, of(p))
	}
	slices.Sort(d)
	return fmt.Sprintf("%.1f / %.1f", d[len(d)/2].Seconds()*1000, d[len(d)-1].Seconds()*1000)
}

// TestFlood: whatever one program makes as fast as it can, each process is
// heard or counted as lost, exactly, threads cost no record, and the alert about
// another program still leaves.
func TestFlood(t *testing.T) {
	lasts, limit := time.Minute, int64(5000)
	proof := os.Getenv(floodVar) != ""
	if proof {
		var err error
		if lasts, err = time.ParseDuration(os.Getenv(floodVar)); err != nil {
			t.Fatalf("%s: %v", floodVar, err)
		}
		limit = 0
	}
	f := newFlooded(t, 0, 0)
	var rows []string
	for _, kind := range []flood.Kind{flood.Fork, flood.VFork, flood.Thread} {
		r := f.run(t, kind, limit, lasts)
		if limit > 0 && r.made != limit {
			t.Errorf("%s: made %d, want %d", kind, r.made, limit)
		}
		if n := f.threads.Load(); n != 0 {
			t.Errorf("%s: %d records of threads", kind, n)
		}
		if kind == flood.Thread {
			r.forks, r.exits = r.made, r.made // they are not to be told
		}
		// What is lost may be anybody's: without a loss the counts are equal.
		missing := 2*r.made - r.forks - r.exits
		if missing < 0 || uint64(missing) > r.lost {
			t.Errorf("%s: made %d, heard of %d begins and %d ends, %d events lost", kind, r.made, r.forks, r.exits, r.lost)
		}
		if len(r.probes) == 0 {
			t.Fatalf("%s: no alert about another program", kind)
		}
		share := 100 * r.cpu.Seconds() / r.took.Seconds()
		rows = append(rows, fmt.Sprintf("| %s | %.0f | %.1f M | %d | %d | %d | %.1f | %d | %s | %s | %s |",
			kind, float64(2*r.made)/r.took.Seconds(), float64(2*r.made)/1e6, missing, r.lost, r.shed, share, len(r.probes),
			spread(r.probes, func(p probe) time.Duration { return p.judged }), spread(r.probes, probe.own),
			spread(r.probes, func(p probe) time.Duration { return p.synced })))
		t.Log(rows[len(rows)-1])
		if !proof {
			continue
		}
		if r.lost != 0 {
			t.Errorf("%s: %d events lost", kind, r.lost)
		}
		for _, p := range r.probes {
			if p.synced > 100*time.Millisecond {
				t.Errorf("%s: an alert about another program could leave after %v, of which the disk took %v", kind, p.synced, p.disk)
			}
		}
	}
	if out := os.Getenv(floodOut); out != "" {
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("Measured %s, %d CPUs, Linux %s, %v each.\n\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(),
			unix.ByteSliceToString(u.Release[:]), lasts) + "| flood | events/s | events | not heard of | lost | not judged | agent CPU % of a core | alerts of others | judged | on disk, without the disk's own time | on disk |\n|---|---|---|---|---|---|---|---|---|---|---|\n" +
			strings.Join(rows, "\n") + "\n"
		if err := os.WriteFile(out, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFloodOfOne: the agent is too slow and its ring too small for the flood of
// one cgroup. Left out is that flood alone, all of it is counted, and what
// others do is judged.
func TestFloodOfOne(t *testing.T) {
	f := newFlooded(t, 1<<20, 100*time.Microsecond)
	root := "/sys/fs/cgroup/memory"
	if _, err := os.Stat(root); err != nil {
		root = "/sys/fs/cgroup"
	}
	name := fmt.Sprintf("/procession-flood-%d", os.Getpid())
	f.cgroup = root + name
	if err := os.Mkdir(f.cgroup, 0o755); err != nil {
		testenv.Skip(t, "cannot make a cgroup: "+err.Error())
	}
	defer func() {
		// A process that has been waited for leaves its cgroup a moment later.
		err := os.Remove(f.cgroup)
		for i := 0; i < 500 && errors.Is(err, unix.EBUSY); i++ {
			time.Sleep(10 * time.Millisecond)
			err = os.Remove(f.cgroup)
		}
		if err != nil {
			t.Error(err)
		}
	}()
	r := f.run(t, flood.VFork, 10_000, time.Minute)
	t.Logf("made %d, begins %d, ends %d, lost %d, not judged %d, alerts of others in %v", r.made, r.forks, r.exits, r.lost, r.shed, r.probes)
	if missing := 2*r.made - r.forks - r.exits; missing < 0 || uint64(missing) > r.lost {
		t.Errorf("made %d, heard of %d begins and %d ends, %d events lost", r.made, r.forks, r.exits, r.lost)
	}
	if r.shed == 0 {
		t.Error("nothing was left out: nothing was tested")
	}
	if len(r.probes) == 0 {
		t.Error("no alert about another program")
	}
	var s []storm
	for i := 0; i < 100 && len(s) == 0; i++ { // the second in which it was may not be over
		s = f.pipe.fair.takeStorms()
		time.Sleep(50 * time.Millisecond)
	}
	// Others on a busy machine may have one of their own, but none like this.
	slices.SortFunc(s, func(a, b storm) int { return int(b.Shed) - int(a.Shed) })
	if len(s) == 0 || s[0].Source != name || s[0].Shed == 0 || s[0].Shed > r.shed {
		t.Errorf("storms %+v; want that of %s first, with some of the %d events that were left out", s, name, r.shed)
	}
}

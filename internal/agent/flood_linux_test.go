package agent

import (
	"context"
	"crypto/tls"
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
	"github.com/procession-dev/procession/internal/forward"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/spool"
	"github.com/procession-dev/procession/internal/testenv"
	flood "github.com/procession-dev/procession/internal/testenv/storm"
)

// Variables of TestFlood. Without them a flood has some thousand tasks.
const (
	floodVar = "PROCESSION_FLOOD"     // how long each flood lasts, at the machine's own speed; then nothing may be lost and alerts arrive in 100 ms
	floodOut = "PROCESSION_FLOOD_OUT" // file for the table of figures
)

// A flooded agent is the whole event path: process table, identity, the starter
// policies, the spool on a disk, the stream to a collector. It counts what it
// hears of one family.
type flooded struct {
	conn    *procconn.Conn
	pipe    *pipeline
	engine  *policy.Engine
	prompt  prompter
	spool   *spool.Spool
	forward *forward.Forwarder
	build   alert.Builder

	of      atomic.Pointer[string]             // what the processes of the flood are called
	heard   [event.CommChange + 1]atomic.Int64 // of its processes, by kind
	threads atomic.Int64                       // records of threads: none may come
	alerts  chan probe                         // judged
	writes  chan probe                         // the same
	synced  chan probe                         // on disk
	arrived <-chan arrival                     // at the collector
	told    chan probe                         // the same

	slow   time.Duration // that judging an event takes in addition
	cgroup string        // directory of the flood's own; "" the test's
}

// A probe is an alert that was expected.
type probe struct {
	mark    string // its own argument
	seq     uint64
	stamp   uint64        // of its exec: the kernel's, ns of CLOCK_MONOTONIC
	judged  time.Duration // after it: in the spool
	synced  time.Duration // after it: on disk
	arrived time.Duration // after it: at the collector
}

// since is how long ago something was stamped.
func since(stamp uint64) time.Duration { return time.Duration(monotonic() - stamp) }

// newFlooded starts one with a ring of so many bytes (0: the usual), that takes
// so much longer to judge an event.
func newFlooded(t *testing.T, ring int, slow time.Duration) *flooded {
	t.Helper()
	testenv.Root(t)
	const many = 10_000 // more than a flood has
	f := &flooded{
		alerts: make(chan probe, many), writes: make(chan probe, many),
		synced: make(chan probe, many), told: make(chan probe, many), slow: slow,
	}
	f.prompt = newPrompter()
	compiler, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	f.engine = policy.NewEngine(compiler, policy.Config{})
	pack := source.NewDir("../../deploy/helm/procession/policies", slog.New(slog.DiscardHandler))
	if err := pack.Load(compiler, func(u source.Update) { f.engine.Swap(u.Set) }); err != nil {
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
	t.Cleanup(func() { f.conn.Close() })
	f.pipe.fair.full = f.conn.Full
	if _, err := f.pipe.table.Scan(); err != nil {
		t.Fatal(err)
	}
	f.start(t)
	return f
}

// start lets all parts run until the test's end, which is in the order of the
// flow. Then each alert must be on disk, and at the collector, once.
func (f *flooded) start(t *testing.T) {
	t.Helper()
	var to greeting
	to, f.arrived = startReceiver(t)
	conf, err := forward.TrustOnly(to.CA, "")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "spool")
	if f.spool, err = spool.Open(spool.Config{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	f.forward, err = forward.New(forward.Config{
		Spool: f.spool, Target: to.Addr, TLS: func(context.Context) (*tls.Config, error) { return conf, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	f.prompt.start(time.Now())
	ctx, cancel := context.WithCancel(context.Background())
	sends, stop := context.WithCancel(context.Background())
	done, sent := make(chan error, 4), make(chan error, 1)
	go func() { done <- f.conn.Run(ctx, f) }()
	go func() { done <- f.spool.Run(ctx) }()
	go func() { done <- f.follow(ctx) }()
	go func() { done <- f.followDisk(ctx) }()
	go func() { sent <- f.forward.Run(sends) }()
	t.Cleanup(func() {
		cancel()
		for range 4 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		stop()
		if err := <-sent; err != nil {
			t.Error(err)
		}
		if st := f.forward.Status(); st.Unacked != 0 || st.Gaps+st.Rewinds+st.Impossible+st.LossRanges != 0 {
			t.Errorf("delivery: %+v", st)
		}
		made := f.spool.Stats().Made
		f.spool.Close()
		if rep, err := spool.Inspect(dir, func(*spool.Item) error { return nil }); err != nil || rep.Records != made || rep.Damaged != 0 {
			t.Errorf("%d alerts were made, on disk are %+v, %v", made, rep, err)
		}
		if err := renice(0); f.prompt.allowed && err != nil {
			t.Error(err)
		}
	})
}

// followDisk waits for each alert until it is on disk.
func (f *flooded) followDisk(ctx context.Context) error {
	for {
		select {
		case p := <-f.writes:
			if f.spool.Sync(ctx) != nil {
				return nil // at the end
			}
			p.synced = since(p.stamp)
			f.synced <- p
		case <-ctx.Done():
			return nil
		}
	}
}

// follow waits for each alert until it is at the collector. What comes there
// comes once and in order.
func (f *flooded) follow(ctx context.Context) error {
	var last arrival
	for {
		select {
		case p := <-f.alerts:
			for last.Seq < p.seq {
				select {
				case a := <-f.arrived:
					if a.Seq != last.Seq+1 {
						return fmt.Errorf("alert %d arrived after %d", a.Seq, last.Seq)
					}
					last = a
				case <-ctx.Done():
					return nil
				}
			}
			p.arrived = time.Duration(last.At - p.stamp)
			f.told <- p
		case <-ctx.Done():
			return nil
		}
	}
}

// Record counts what came from the kernel, before anything can leave it out. It
// asks no process table: that is what /proc says after a loss, while older
// records still come. Nor who the parent is: nobody waits for the flood's
// processes, so at their end they have none. They have a name of their own, and
// so has who makes them.
func (f *flooded) Record(r *event.Record) {
	of := f.of.Load()
	switch {
	case r.Kind == event.Fork && r.PeerPID != r.PeerTGID, r.Kind == event.Exit && r.PID != r.TGID:
		f.threads.Add(1)
	case of != nil && string(r.Comm) == *of:
		f.heard[r.Kind].Add(1)
	}
	f.pipe.Record(r)
}

func (f *flooded) Lost(l procconn.Loss) { f.pipe.Lost(l) }
func (f *flooded) Idle()                { f.prompt.look(time.Now()); f.pipe.Idle() }

func (f *flooded) judge(ev *event.Event) {
	for begin := time.Now(); time.Since(begin) < f.slow; {
	}
	f.engine.Evaluate(ev, func(m *policy.Match) {
		var seq uint64
		b, err := proto.Marshal(f.build.Alert(ev, m))
		if err == nil {
			seq, err = f.spool.Append(b)
		}
		if err != nil {
			return // the probe is missed then
		}
		if strings.HasPrefix(ev.Process.Cmdline, "xmrig\x00probe-") {
			mark, _, _ := strings.Cut(ev.Process.Cmdline[len("xmrig\x00"):], "\x00")
			p := probe{mark: mark, seq: seq, stamp: ev.Stamp, judged: since(ev.Stamp)}
			f.alerts <- p
			f.writes <- p
		}
	})
}

// probe starts a program that a rule is about, and returns when its alert is at
// the collector.
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
	made, missing int64 // tasks; events that were not heard of
	lost, shed    uint64
	took          time.Duration
	cpu           time.Duration
	probes        []probe
}

// run lets a child make a flood and probes meanwhile.
func (f *flooded) run(t *testing.T, kind flood.Kind, limit int64, lasts time.Duration) (r floodResult) {
	t.Helper()
	lost, shed, cpu := f.pipe.lost.Load(), f.pipe.fair.shed.Load(), ownCPU(t)
	child := startFlood(t, kind, limit, lasts, f.cgroup)
	name := flood.Name(child.cmd.Process.Pid)
	f.of.Store(&name)
	n := 0
	r.made, r.took = child.run(t, func() { f.tryProbe(t, n, &r); n++ })
	f.tryProbe(t, -1, &r) // all older is told now
	f.waitDisk(t, r.probes)
	r.cpu = ownCPU(t) - cpu
	r.lost, r.shed = f.pipe.lost.Load()-lost, f.pipe.fair.shed.Load()-shed
	if kind == flood.Thread {
		return r // they are not to be told
	}
	of := []event.Kind{event.Fork, event.Exit}
	if kind == flood.ForkIDs {
		of = append(of, event.SessionChange, event.GIDChange, event.UIDChange)
	}
	if int64(len(of)) != kind.Events() {
		t.Fatalf("%s has %d events, counted are %v", kind, kind.Events(), of)
	}
	for _, k := range of {
		missing := r.made - f.heard[k].Load()
		if missing < 0 {
			t.Errorf("%s: made %d, heard of %d times %v", kind, r.made, f.heard[k].Load(), k)
		}
		r.missing += missing
	}
	// What is lost may be anybody's: without a loss the counts are equal.
	if r.missing > int64(r.lost) {
		t.Errorf("%s: of %d events %d were not heard of, %d are counted as lost", kind, r.made*kind.Events(), r.missing, r.lost)
	}
	if limit > 0 && r.made != limit {
		t.Errorf("%s: made %d, want %d", kind, r.made, limit)
	}
	return r
}

// waitDisk waits until all of them are on disk, and notes when each was.
func (f *flooded) waitDisk(t *testing.T, probes []probe) {
	t.Helper()
	patience := time.After(time.Minute)
	at := map[uint64]time.Duration{}
	for i := range probes {
		for at[probes[i].seq] == 0 {
			select {
			case p := <-f.synced:
				at[p.seq] = p.synced
			case <-patience:
				t.Fatalf("alert %d is not on disk", probes[i].seq)
			}
		}
		probes[i].synced = at[probes[i].seq]
	}
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

// floodKinds are the rows of the table.
var floodKinds = []struct {
	kind flood.Kind
	name string
}{
	{flood.Fork, "fork"},
	{flood.ForkIDs, "fork with new session and ids"},
	{flood.VFork, "vfork"},
	{flood.Thread, "thread"},
}

// TestFlood: whatever one program makes as fast as it can, each event of its
// processes is heard or counted as lost, exactly, threads cost no record, and the
// alert about another program still leaves.
func TestFlood(t *testing.T) {
	testenv.Root(t)
	lasts, limit := time.Minute, int64(5000)
	if s := os.Getenv(floodVar); s != "" {
		var err error
		if lasts, err = time.ParseDuration(s); err != nil {
			t.Fatalf("%s: %v", floodVar, err)
		}
		limit = 0
	}
	var rows []string
	for _, row := range floodKinds {
		// What the machine makes when nobody listens, before and after.
		alone, took := unheard(t, row.kind, limit/5, lasts/10)
		var r floodResult
		t.Run(string(row.kind), func(t *testing.T) { r = oneFlood(t, row.kind, limit, lasts) })
		if len(r.probes) == 0 {
			continue // it said why
		}
		after, tookAfter := unheard(t, row.kind, limit/5, lasts/10)
		alone, took = alone+after, took+tookAfter
		events := row.kind.Events()
		bare, rate := float64(alone*events)/took.Seconds(), float64(r.made*events)/r.took.Seconds()
		rows = append(rows, fmt.Sprintf("| %s | %.0f | %.0f (%.0f %%) | %.1f M | %d | %d | %d | %.1f | %d | %s | %s | %s |",
			row.name, bare, rate, 100*rate/bare, float64(r.made*events)/1e6, r.missing, r.lost, r.shed,
			100*r.cpu.Seconds()/r.took.Seconds(), len(r.probes),
			spread(r.probes, func(p probe) time.Duration { return p.judged }),
			spread(r.probes, func(p probe) time.Duration { return p.synced }),
			spread(r.probes, func(p probe) time.Duration { return p.arrived })))
		t.Log(rows[len(rows)-1])
	}
	if out := os.Getenv(floodOut); out != "" {
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("Measured %s, %d CPUs, Linux %s, %v each.\n\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(),
			unix.ByteSliceToString(u.Release[:]), lasts) +
			"| flood | nobody listens: events/s | the agent does: events/s | events | not heard of | lost | not judged | agent CPU % of a core | alerts of others | judged | on disk | at the collector |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n" +
			strings.Join(rows, "\n") + "\n"
		if err := os.WriteFile(out, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// unheard is a flood without an agent.
func unheard(t *testing.T, kind flood.Kind, limit int64, lasts time.Duration) (made int64, took time.Duration) {
	t.Helper()
	return startFlood(t, kind, limit, lasts, "").run(t, func() {})
}

// oneFlood makes a flood before an agent of its own.
func oneFlood(t *testing.T, kind flood.Kind, limit int64, lasts time.Duration) floodResult {
	t.Helper()
	f := newFlooded(t, 0, 0)
	r := f.run(t, kind, limit, lasts)
	if n := f.threads.Load(); n != 0 {
		t.Errorf("%d records of threads", n)
	}
	if len(r.probes) == 0 {
		t.Fatal("no alert about another program")
	}
	if os.Getenv(floodVar) == "" {
		return r
	}
	if r.lost != 0 {
		t.Errorf("%d events lost", r.lost)
	}
	for _, p := range r.probes {
		if p.arrived > 100*time.Millisecond {
			t.Errorf("an alert about another program arrived after %v; it was judged after %v and on disk after %v", p.arrived, p.judged, p.synced)
		}
	}
	return r
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
	t.Logf("made %d, %d events not heard of, lost %d, not judged %d, alerts of others in %v", r.made, r.missing, r.lost, r.shed, r.probes)
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

// Command delivery measures what delivery costs and takes: the memory of a
// collector with thousands of agents and the time until they are back after a
// restart, durable alerts per second beside a bare loop of the same
// transactions, the time to an acknowledgement, the memory of an agent whose
// spool is full, and what ten thousand hostile connections do to all that.
//
//	go run ./test/delivery                        everything (about 6 minutes)
//	go run ./test/delivery -parts idle,durable
//	go run ./test/delivery -docs docs/operations.md
//
// How it is made fair: collector and agent are the programs as built, in
// processes of their own; what plays the other side is another process, whose
// memory is not counted, and which shares the CPUs. The bare loop takes turns
// with the whole way, in one run, on one file system, and the median is told.
//
// It needs a quiet machine. Part agent needs root, because a real agent makes
// real alerts of real processes there.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/procession-dev/procession/test/bench/host"
)

// A bench is one run: its options, its folder, and what it found.
type bench struct {
	collectorPath, agentPath string

	agents  int           // idle ones
	rounds  int           // of the whole way and the bare loop
	conns   int           // hostile connections
	spool   int           // MiB of the agent's spool
	settle  time.Duration // how long memory is watched
	latency time.Duration // how long alerts are sent to be acknowledged

	work string
	log  io.Writer
	rows rows
}

// A part measures one thing.
type part struct {
	name, about string
	run         func(*bench, context.Context) error
}

func parts() []part {
	return []part{
		{"idle", "memory with idle agents, and how they come back", (*bench).idle},
		{"durable", "alerts per second beside a bare loop, and the time to an acknowledgement", (*bench).durable},
		{"agent", "memory of an agent with a full spool", (*bench).agentSpool},
		{"flood", "hostile connections beside honest agents", (*bench).flood},
	}
}

func main() {
	if err := child(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "delivery:", err)
		os.Exit(1)
	}
}

// child runs, and exits, if this process is one.
func child(args []string) (err error) {
	switch {
	case len(args) == 3 && args[0] == fleetWord:
		err = runFleet(args[1], args[2])
	case len(args) == 4 && args[0] == floodWord:
		n, e := strconv.Atoi(args[3])
		if e != nil {
			return e
		}
		err = runFlood(args[1], args[2], n)
	default:
		return nil
	}
	if err == nil {
		os.Exit(0)
	}
	return fmt.Errorf("%s: %w", args[0], err)
}

func run(ctx context.Context, args []string, out, log io.Writer) error {
	all := parts()
	b := &bench{log: log}
	var names []string
	fs := flag.NewFlagSet("delivery", flag.ContinueOnError)
	fs.SetOutput(log)
	chosen := fs.String("parts", "all", "which, by comma: all, "+partNames(all))
	docs := fs.String("docs", "", "put the table between the markers of this file too")
	fs.StringVar(&b.collectorPath, "collector", "bin/collector", "the collector, below the module")
	fs.StringVar(&b.agentPath, "agent", "bin/agent", "the agent, below the module")
	fs.IntVar(&b.agents, "agents", 5000, "idle agents")
	fs.IntVar(&b.rounds, "rounds", 7, "turns of the whole way and the bare loop")
	fs.IntVar(&b.conns, "conns", 10_000, "hostile connections")
	fs.IntVar(&b.spool, "spool", 64, "MiB of the agent's spool")
	fs.DurationVar(&b.settle, "settle", 40*time.Second, "how long memory is watched")
	fs.DurationVar(&b.latency, "latency", 15*time.Second, "how long single alerts are sent")
	fs.StringVar(&b.work, "dir", "", "folder on the disk to be measured (default: in the cache directory)")
	limit := fs.Duration("timeout", 20*time.Minute, "when a run is given up")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("%q is not a flag (-help says more)", fs.Arg(0))
	}
	for name := range strings.SplitSeq(*chosen, ",") {
		if name != "all" && !slices.ContainsFunc(all, func(p part) bool { return p.name == name }) {
			return fmt.Errorf("-parts: no %q; there are %s", name, partNames(all))
		}
		names = append(names, name)
	}
	if b.agents < 1 || b.rounds < 1 || b.conns < 1 || b.spool < 1 {
		return errors.New("-agents, -rounds, -conns and -spool must be above 0")
	}
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	where := machine()
	remove, err := b.prepare(ctx)
	if err != nil {
		return err
	}
	defer remove()
	for _, p := range all {
		if !slices.Contains(names, p.name) && !slices.Contains(names, "all") {
			continue
		}
		if err := p.run(b, ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	if _, err := out.Write(b.rows.markdown()); err != nil || *docs == "" {
		return err
	}
	return putTable(*docs, append([]byte(where+"\n\n"), b.rows.markdown()...))
}

func partNames(all []part) string {
	var names []string
	for _, p := range all {
		names = append(names, p.name)
	}
	return strings.Join(names, ", ")
}

// prepare finds the programs and makes a folder, which remove takes away.
func (b *bench) prepare(ctx context.Context) (remove func(), err error) {
	root, err := host.ModuleRoot(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range []*string{&b.collectorPath, &b.agentPath} {
		if !filepath.IsAbs(*p) {
			*p = filepath.Join(root, *p)
		}
		if _, err := os.Stat(*p); err != nil {
			return nil, fmt.Errorf("%w; make build makes it", err)
		}
	}
	if b.work == "" {
		if b.work, err = host.Cache("delivery"); err != nil {
			return nil, err
		}
	}
	if b.work, err = os.MkdirTemp(b.work, "run-"); err != nil {
		return nil, err
	}
	return func() { os.RemoveAll(b.work) }, nil
}

func (b *bench) folder(name string) (string, error) {
	dir := filepath.Join(b.work, name)
	return dir, os.MkdirAll(dir, 0o700)
}

// self is this program, as one of the children; it ends with its parent.
func (b *bench) self(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// rows are the table: what, figure, aim.
type rows [][3]string

func (r *rows) add(what, figure, aim string) { *r = append(*r, [3]string{what, figure, aim}) }

func (r rows) markdown() []byte {
	var b bytes.Buffer
	b.WriteString("| what | figure | aim |\n|---|---|---|\n")
	for _, c := range r {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", c[0], c[1], c[2])
	}
	return b.Bytes()
}

// Markers of the table in a document.
const (
	beginTable = "<!-- begin delivery figures -->\n"
	endTable   = "<!-- end delivery figures -->"
)

func putTable(file string, table []byte) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	begin, end := bytes.Index(b, []byte(beginTable)), bytes.Index(b, []byte(endTable))
	if begin < 0 || end < begin {
		return fmt.Errorf("%s: no markers %q and %q", file, strings.TrimSpace(beginTable), endTable)
	}
	var next []byte
	next = append(next, b[:begin+len(beginTable)]...)
	next = append(next, table...)
	next = append(next, b[end:]...)
	return os.WriteFile(file, next, 0o644)
}

// machine says where and when this was measured.
func machine() string {
	cpu := "an unknown CPU"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for l := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(k) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	kernel := readLine("/proc/sys/kernel/osrelease")
	load, _, _ := strings.Cut(readLine("/proc/loadavg"), " ")
	return fmt.Sprintf("%s, %d CPUs of %s, kernel %s, %s, a load of %s at the start. Agents and collector share the CPUs.", time.Now().UTC().Format("2 January 2006"), runtime.NumCPU(), cpu, kernel, runtime.Version(), load)
}

func readLine(file string) string {
	b, _ := os.ReadFile(file)
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return v[len(v)/2]
}

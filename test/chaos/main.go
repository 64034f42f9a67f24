package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// options of a run.
type options struct {
	seed   uint64
	time   time.Duration
	faults []string
	store  string
	bin    string
	rate   int
	keep   bool
}

func (o *options) has(fault string) bool { return slices.Contains(o.faults, fault) }

// private runs this program again, with the same arguments, in a mount
// namespace of its own: whoever makes one meanwhile would keep a copy of our
// file systems alive, and they could not be mounted afresh.
func private() (code int, err error) {
	cmd := exec.Command("unshare", append([]string{"--mount", "--propagation", "private", "--kill-child", os.Args[0]}, os.Args[1:]...)...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err = cmd.Run()
	if _, ended := errors.AsType[*exec.ExitError](err); ended {
		err = nil
	}
	return cmd.ProcessState.ExitCode(), err
}

const inside = "PROCESSION_CHAOS_INSIDE"

func main() {
	if os.Getenv(inside) == "" {
		code, err := private()
		if err != nil {
			fmt.Fprintln(os.Stderr, "chaos:", err)
		}
		os.Exit(code)
	}
	var o options
	var seconds int
	var faults string
	flag.Uint64Var(&o.seed, "seed", 0, "of what is broken when; 0 is another one each time")
	flag.IntVar(&seconds, "seconds", 60, "how long things are broken")
	flag.StringVar(&faults, "faults", "all", "which, with commas: "+strings.Join(names(), ", "))
	flag.StringVar(&o.store, "store", "sqlite", "sqlite or postgres")
	flag.StringVar(&o.bin, "bin", "", "`folder` of agent and collector; they are built for the run if it is not given, in the repository's root")
	flag.IntVar(&o.rate, "rate", 60, "alerts a second, of each agent")
	flag.BoolVar(&o.keep, "keep", false, "leave the logs of all processes behind, also when all is well")
	flag.Parse()
	o.time = time.Duration(seconds) * time.Second
	if faults == "all" {
		o.faults = names()
		if o.store == "postgres" { // which has its own disk, power and backups
			o.faults = slices.DeleteFunc(o.faults, func(f string) bool { return f == "restore" })
		} else {
			o.faults = slices.DeleteFunc(o.faults, func(f string) bool { return f == "database" })
		}
	} else {
		o.faults = strings.Split(faults, ",")
	}
	if err := run(o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

var errBreach = errors.New("a promise was broken")

// run breaks things for a while, and says what came of it.
func run(o options, out io.Writer) (err error) {
	for _, f := range o.faults {
		if faultOf(f) == nil {
			return fmt.Errorf("no fault %q; there are %s", f, strings.Join(names(), ", "))
		}
	}
	if o.store != "sqlite" && o.store != "postgres" {
		return fmt.Errorf("store %q is neither sqlite nor postgres", o.store)
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	if o.bin == "" {
		if o.bin, err = os.MkdirTemp("", "procession-chaos-bin-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.bin)
		if err := buildBroken(".", o.bin, "./cmd/agent", "./cmd/collector"); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "seed %d, %v, store %s, faults %s\n", o.seed, o.time, o.store, strings.Join(o.faults, ","))
	w, err := newWorld(o)
	defer func() {
		w.close()
		if err == nil && !o.keep {
			os.RemoveAll(w.work)
		} else {
			fmt.Fprintf(out, "logs are in %s\n", w.work)
		}
	}()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	var acting sync.WaitGroup
	acts := 0
	acting.Go(func() { acts = w.act(ctx) })
	counts, err := w.breakThings()
	stop()
	acting.Wait()
	if err == nil {
		err = w.settle()
	}
	if err != nil {
		return err
	}
	v, err := w.verdict()
	if err != nil {
		return err
	}
	for _, d := range v.detail {
		fmt.Fprintln(out, "breach:", d)
	}
	n := 0
	var kinds []string
	for _, f := range names() {
		if counts[f] > 0 {
			kinds = append(kinds, fmt.Sprintf("%s %d", f, counts[f]))
			n += counts[f]
		}
	}
	word := "kept"
	if v.breach() {
		word, err = "BROKEN", errBreach
	}
	fmt.Fprintf(out, "%s: seed %d, %s, %v, %d faults of %d kinds (%s), %d acts seen by %d agents; %v\n",
		word, o.seed, o.store, o.time, n, len(kinds), strings.Join(kinds, ", "), acts, len(w.agents), v)
	return err
}

// breakThings does so until the time is over, and leaves all well.
func (w *world) breakThings() (map[string]int, error) {
	rnd, counts := w.rnd, make(map[string]int)
	ledger := time.NewTicker(2 * time.Second)
	defer ledger.Stop()
	between := func(lo, hi int) time.Duration { return time.Duration(lo+rnd.IntN(hi-lo)) * time.Millisecond }
	for end := time.Now().Add(w.opt.time); time.Now().Before(end); {
		time.Sleep(between(300, 1500))
		name := w.opt.faults[rnd.IntN(len(w.opt.faults))]
		a := w.agents[rnd.IntN(len(w.agents))]
		if err := faultOf(name)(w, a, between(300, 2500)); err != nil {
			return counts, fmt.Errorf("%s: %w", name, err)
		}
		counts[name]++
		select {
		case <-ledger.C:
			for _, a := range w.agents {
				if err := w.owed.add(a.node, a.state(), false); err != nil {
					return counts, err
				}
			}
		default:
		}
		for _, a := range w.agents {
			if a.ended() {
				return counts, fmt.Errorf("%s: the agent of %s ended by itself; see %s", name, a.node, w.log.Name())
			}
		}
		if w.coll.ended() {
			return counts, fmt.Errorf("%s: the collector ended by itself; see %s", name, w.log.Name())
		}
	}
	w.relay.heal()
	w.mu.Lock()
	w.sick = false
	w.mu.Unlock()
	err := w.clock.set(0)
	for _, a := range w.agents {
		err = errors.Join(err, a.clock.set(0))
	}
	return counts, err
}

// A fault breaks something for a time and mends it.
type fault func(w *world, a *agent, d time.Duration) error

// leap is by how much a clock is set: hours forth or back for a fault that
// ends, or up to three quarters of one for an error that stays, which
// certificates forgive.
func (w *world) leap(stays bool) time.Duration {
	by := time.Hour + time.Duration(w.rnd.Int64N(int64(9*time.Hour)))
	if stays {
		by = time.Duration(w.rnd.Int64N(int64(45 * time.Minute)))
	}
	if w.rnd.IntN(2) == 0 {
		by = -by
	}
	return by
}

// breakClock sets a clock by hours, lets somebody be killed and started again
// meanwhile every other time, and sets it right, or nearly so.
func (w *world) breakClock(c *clock, d time.Duration, again func() error) error {
	if err := c.set(w.leap(false)); err != nil {
		return err
	}
	time.Sleep(d / 2)
	if w.rnd.IntN(2) == 0 {
		if err := again(); err != nil {
			return err
		}
	}
	time.Sleep(d / 2)
	return c.set(w.leap(true))
}

var faults = []struct {
	name string
	do   fault
}{
	{"agent-kill", func(w *world, a *agent, d time.Duration) error {
		a.stop(syscall.SIGKILL)
		time.Sleep(d / 4)
		return w.startAgent(a)
	}},
	{"agent-power", func(w *world, a *agent, d time.Duration) error {
		a.stop(syscall.SIGKILL)
		if err := a.disk.powerCut(); err != nil {
			return err
		}
		return w.startAgent(a)
	}},
	{"agent-full", func(w *world, a *agent, d time.Duration) error {
		if err := a.disk.fill(); err != nil {
			return err
		}
		time.Sleep(d)
		return a.disk.free()
	}},
	{"agent-term", func(w *world, a *agent, d time.Duration) error {
		a.stop(syscall.SIGTERM)
		return w.startAgent(a)
	}},
	{"collector-kill", func(w *world, _ *agent, d time.Duration) error {
		w.coll.stop(syscall.SIGKILL)
		time.Sleep(d / 4)
		return w.startCollector()
	}},
	{"collector-power", func(w *world, _ *agent, d time.Duration) error {
		w.coll.stop(syscall.SIGKILL)
		if err := w.cdisk.powerCut(); err != nil {
			return err
		}
		return w.startCollector()
	}},
	{"collector-full", func(w *world, _ *agent, d time.Duration) error {
		if err := w.cdisk.fill(); err != nil {
			return err
		}
		time.Sleep(d)
		return w.cdisk.free()
	}},
	{"collector-term", func(w *world, _ *agent, d time.Duration) error {
		w.coll.stop(syscall.SIGTERM)
		return w.startCollector()
	}},
	{"stall", func(w *world, _ *agent, d time.Duration) error {
		w.coll.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(d)
		return w.coll.cmd.Process.Signal(syscall.SIGCONT)
	}},
	{"cut", func(w *world, _ *agent, d time.Duration) error {
		w.relay.cut()
		time.Sleep(d)
		w.relay.heal()
		return nil
	}},
	{"black-hole", func(w *world, _ *agent, d time.Duration) error {
		w.relay.stall()
		time.Sleep(d)
		w.relay.heal()
		return nil
	}},
	{"slow", func(w *world, _ *agent, d time.Duration) error {
		w.relay.set(func() { w.relay.pause = 20 * time.Millisecond })
		time.Sleep(d)
		w.relay.heal()
		return nil
	}},
	{"two-streams", func(w *world, _ *agent, d time.Duration) error {
		flow := w.relay.orphan()
		time.Sleep(d)
		flow()
		w.relay.heal()
		return nil
	}},
	{"sink", func(w *world, _ *agent, d time.Duration) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.sick = !w.sick // until it is this fault's turn again
		return nil
	}},
	{"agent-clock", func(w *world, a *agent, d time.Duration) error {
		return w.breakClock(a.clock, d, func() error {
			a.stop(syscall.SIGKILL)
			return w.startAgent(a)
		})
	}},
	{"collector-clock", func(w *world, _ *agent, d time.Duration) error {
		return w.breakClock(w.clock, d, func() error {
			w.coll.stop(syscall.SIGKILL)
			return w.startCollector()
		})
	}},
	{"restore", restoreBackup},
	{"database", func(w *world, _ *agent, d time.Duration) error {
		w.pg.Stop()
		time.Sleep(d)
		return w.pg.Start()
	}},
}

// restoreBackup makes a backup, lets time pass, and puts it in the place of the
// database.
func restoreBackup(w *world, _ *agent, d time.Duration) error {
	file := filepath.Join(w.work, "backup.db")
	os.Remove(file)
	if out, err := exec.Command(w.bin("collector"), "backup", file, "--state", w.state()).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	time.Sleep(d)
	w.coll.stop(syscall.SIGKILL)
	if out, err := exec.Command(w.bin("collector"), "restore", "--state", w.state(), "--from", file).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return w.startCollector()
}

func faultOf(name string) fault {
	for _, f := range faults {
		if f.name == name {
			return f.do
		}
	}
	return nil
}

func names() (all []string) {
	for _, f := range faults {
		all = append(all, f.name)
	}
	return all
}

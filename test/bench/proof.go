package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/procession-dev/procession/test/bench/host"
)

// What is promised, and checked by -proof.
const (
	proofTiny    = 20_000            // execs of the shortest program, each run
	proofDouble  = 400               // processes that exec twice
	proofClassic = 99.0              // percent told rightly without BPF, in the median
	proofRSS     = 32 << 20          // bytes of agent run, from its start on
	proofIdle    = time.Minute       // for which it is left alone
	proofSettle  = 130 * time.Second // in which it does for the first time what it does from time to time
	proofIdleCPU = 0.1               // percent of a core
)

// A proofRow is one condition, run several times.
type proofRow struct {
	what      string
	execs     int // of each run
	told      []score
	container bool
	classic   bool
	errs      []string
}

// right is how many execs of run i were told with everything right.
func (r *proofRow) right(i int) int {
	n := min(r.told[i].Argv, r.told[i].Exe)
	if r.container {
		n = min(n, r.told[i].Container)
	}
	return n
}

// reached says whether the promise is kept.
func (r *proofRow) reached() bool {
	if len(r.errs) > 0 || len(r.told) == 0 {
		return false
	}
	var shares []float64
	for i := range r.told {
		shares = append(shares, 100*float64(r.right(i))/float64(r.execs))
	}
	slices.Sort(shares)
	if r.classic {
		return shares[len(shares)/2] >= proofClassic
	}
	return shares[0] == 100
}

func (r *proofRow) String() string {
	var runs []string
	for i := range r.told {
		runs = append(runs, fmt.Sprint(r.right(i)))
	}
	runs = append(runs, r.errs...)
	return fmt.Sprintf("| %s | %d | %s | %s |", r.what, r.execs, strings.Join(runs, ", "), yes(r.reached()))
}

func yes(ok bool) string {
	if ok {
		return "yes"
	}
	return "**no**"
}

// proveTo is prove, whose table goes to the file of -markdown too.
func (b *bench) proveTo(ctx context.Context, o *options, all []load, can []observer, out, log io.Writer) error {
	var table bytes.Buffer
	err := b.prove(ctx, o, all, can, &table, log)
	if _, werr := out.Write(table.Bytes()); werr != nil {
		return errors.Join(err, werr)
	}
	if o.markdown == "" || table.Len() == 0 {
		return err
	}
	return errors.Join(err, host.WriteFile(o.markdown, func(w io.Writer) error {
		_, err := w.Write(table.Bytes())
		return err
	}))
}

// prove runs what is promised and writes a table. The error names a promise
// that was not kept; without BPF only the table says so, since what else runs
// on the machine decides it.
func (b *bench) prove(ctx context.Context, o *options, all []load, can []observer, out, log io.Writer) error {
	byName := func(name string) *observer {
		i := slices.IndexFunc(can, func(ob observer) bool { return ob.name == name })
		if i < 0 {
			return nil
		}
		return &can[i]
	}
	events, classic, run := byName("agent-events"), byName("agent-events-classic"), byName("agent-run")
	if events == nil || classic == nil || run == nil {
		return errors.New("-proof: agent events, the same without recorder, and agent run must be able to run here")
	}
	var rows []*proofRow
	add := func(what, name string, runs int, ob *observer, saturated bool) {
		l := all[slices.IndexFunc(all, func(l load) bool { return l.name == name })]
		l.runs = runs
		if saturated {
			l.runs *= 4 // measure takes a quarter
		}
		row := &proofRow{what: what, execs: max(1, int(float64(l.runs)*b.scale)) * l.execs(), container: b.pod != nil, classic: ob == classic}
		if saturated {
			row.execs = max(1, max(1, int(float64(l.runs)*b.scale))/4) * l.execs()
		}
		rows = append(rows, row)
		for i := range o.repeats {
			if ctx.Err() != nil {
				return
			}
			r := b.measure(ctx, ob, l, saturated)
			if r.Error != "" {
				row.errs = append(row.errs, r.Error)
				continue
			}
			row.told = append(row.told, r.Score)
			fmt.Fprintf(log, "%s, run %d: %d of %d right, argv %d, exe %d, container %d\n", what, i+1, row.right(len(row.told)-1), row.execs, r.Score.Argv, r.Score.Exe, r.Score.Container)
		}
	}
	for _, saturated := range []bool{false, true} {
		how := ", idle"
		if saturated {
			how = ", every CPU busy"
		}
		add("recorder: 20 us program"+how, "tiny", proofTiny, events, saturated)
		add("recorder: double exec, both stages"+how, "double", proofDouble, events, saturated)
		add("without BPF: 20 us program"+how, "tiny", proofTiny/10, classic, saturated)
	}
	idle, err := b.idle(ctx, log, run)
	if err != nil {
		return err
	}
	_, idleFor := b.idleTimes()
	fmt.Fprintf(out, "Measured %s on %s.\n\n", time.Now().UTC().Format("2006-01-02"), strings.Join(machineLines(), "; "))
	fmt.Fprintf(out, "| what | execs a run | arguments, path and container right, each run | promise kept |\n|---|---|---|---|\n")
	failed := 0
	for _, r := range rows {
		fmt.Fprintln(out, r)
		if !r.classic && !r.reached() {
			failed++
		}
	}
	fmt.Fprintf(out, "\n| agent run, left alone for %v | measured | promise | kept |\n|---|---|---|---|\n", idleFor)
	fmt.Fprintf(out, "| resident memory at its peak, the start included | %.1f MiB (afterwards %.1f) | below %d MiB | %s |\n",
		float64(idle.peak)/(1<<20), float64(idle.rss)/(1<<20), proofRSS>>20, yes(idle.peak < proofRSS))
	kept := yes(idle.cpu < proofIdleCPU)
	if idle.quiet < proofQuiet {
		kept = "not measured: too few quiet seconds"
	}
	fmt.Fprintf(out, "| CPU in the %d s in which nobody on this machine made a task | %.3f %% of a core | below %v %% | %s |\n", idle.quiet, idle.cpu, proofIdleCPU, kept)
	fmt.Fprintf(out, "| CPU in all of the time, in which others made %d tasks | %.3f %% of a core | | |\n", idle.forks, idle.overall)
	if idle.peak >= proofRSS && b.scale >= 1 {
		failed++
	}
	if failed > 0 {
		return fmt.Errorf("-proof: %d promises were not kept", failed)
	}
	return ctx.Err()
}

// An idleness is what an observer costs when nothing happens. On a machine with
// other work there are only some seconds in which nothing does: those count.
type idleness struct {
	rss, peak int64
	cpu       float64 // percent of a core, in the quiet seconds
	quiet     int     // seconds in which nobody made a task
	overall   float64 // percent of a core, in the whole time
	forks     uint64  // tasks made in the whole time
}

// proofQuiet is how many quiet seconds are enough to measure.
const proofQuiet = 10

// idleTimes are how long it is left alone before it is measured, and then. With
// a smaller -scale that is shorter too, and nothing is promised about it.
func (b *bench) idleTimes() (settle, idle time.Duration) {
	if b.scale < 1 {
		return proofSettle / 20, proofIdle / 4
	}
	return proofSettle, proofIdle
}

func (b *bench) idle(ctx context.Context, log io.Writer, o *observer) (id idleness, err error) {
	d, err := b.begin(ctx, o)
	if err != nil {
		return id, err
	}
	defer d.stop()
	rest := func(t time.Duration) error {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(t):
			return d.ended()
		}
	}
	settle, idle := b.idleTimes()
	fmt.Fprintf(log, "%s is left alone for %v\n", o.name, settle+idle)
	if err := rest(settle); err != nil {
		return id, err
	}
	var all, quiet, quietTime time.Duration
	began := time.Now()
	for time.Since(began) < idle {
		f, at := forks(), time.Now()
		c, err := cpuTime(d.pid())
		if err != nil {
			return id, err
		}
		if err := rest(time.Second); err != nil {
			return id, err
		}
		after, err := cpuTime(d.pid())
		if err != nil {
			return id, err
		}
		made := forks() - f
		id.forks += made
		all += after - c
		if made == 0 {
			id.quiet++
			quiet += after - c
			quietTime += time.Since(at)
		}
	}
	id.overall = 100 * float64(all) / float64(time.Since(began))
	id.cpu = 100 * float64(quiet) / float64(max(quietTime, 1))
	id.peak, id.rss = memory(d.pid())
	return id, nil
}

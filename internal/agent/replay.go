package agent

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/proctable"
	"github.com/procession-dev/procession/internal/recording"
)

const replayHelp = `
Takes a recording through the whole pipeline again and prints what comes out:
the alerts of the policies in a directory or, without --policies, the events.
The same recording and policies give the same output, on any machine.

  agent replay --policies deploy/helm/procession/policies monday.rec
  agent replay monday.rec | jq 'select(.kind == "Exec")'
`

func replayCommand(args []string, stdout, stderr io.Writer) error {
	fs := newFlags("replay")
	policies := fs.String("policies", "", "`folder` of policy files; without it events are printed")
	format := fs.String("format", "auto", "text, json (one object a line), or auto: text on a terminal, else json")
	file, err := parseFile(fs, replayHelp, args, stdout)
	if err != nil {
		return err
	}
	out, err := newEventWriter(eventsFlags{format: *format, color: "auto"}, stdout)
	if err != nil {
		return err
	}
	out.failed = func() {}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	in, err := recording.NewReader(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	log, err := newLog(stderr, "text", "warn")
	if err != nil {
		return err
	}
	r := &replay{in: in, out: out}
	use := out.write
	if *policies != "" {
		compiler, err := policy.NewCompiler()
		if err != nil {
			return err
		}
		r.engine = policy.NewEngine(compiler, policy.Config{})
		if err := source.NewDir(*policies, log).Load(compiler, func(u source.Update) { r.engine.Swap(u.Set) }); err != nil {
			return fmt.Errorf("--policies: %w", err)
		}
		use = r.judge
	}
	clock := proctable.FixedClock{Mono: in.Header.Stamp, Boot: in.Header.Boot, Wall: time.Unix(0, in.Header.Wall)}
	if r.pipe, err = pipelineOn(proctable.Config{Clock: clock, Log: log}, log, use, nil); err != nil {
		return err
	}
	out.build.Wall = r.pipe.wall
	err = r.run()
	out.flush()
	r.progress(stderr, file)
	return errors.Join(err, out.err)
}

// parseFile parses flags and the one argument, a file.
func parseFile(fs *flag.FlagSet, about string, args []string, out io.Writer) (string, error) {
	file := ""
	if n := len(args); n > 0 && args[n-1] != "" && args[n-1][0] != '-' {
		file, args = args[n-1], args[:n-1]
	}
	if err := parse(fs, about, args, out); err != nil {
		return "", err
	}
	if file == "" {
		return "", usagef("the file is missing; agent %s --help explains", fs.Name())
	}
	return file, nil
}

// A replay is a recording on its way through the pipeline.
type replay struct {
	in     *recording.Reader
	pipe   *pipeline
	engine *policy.Engine
	out    *eventWriter
	seq    uint64

	processes, records, lost uint64
}

// run applies every entry. The baseline goes in as execs that nobody judges.
func (r *replay) run() error {
	var ev event.Event
	for {
		e, err := r.in.Next()
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		case e.Process != nil:
			r.processes++
			r.pipe.table.Apply(&event.Record{
				Kind: event.Exec, Stamp: r.in.Header.Stamp, PID: e.Process.PID, TGID: e.Process.PID, Facts: e.Process.Facts,
			}, &ev)
		case e.Record != nil:
			r.records++
			r.pipe.Record(e.Record)
		case e.Loss != nil:
			r.lost += e.Loss.Events
		}
	}
}

func (r *replay) judge(ev *event.Event) {
	r.engine.Evaluate(ev, func(m *policy.Match) {
		r.seq++
		a := r.out.build.Alert(ev, m)
		id := present.Identity{Cluster: "replay", Node: "replay", Seq: r.seq}
		if r.out.json {
			r.out.put(present.AppendAlertJSON(r.out.buf[:0], id, a))
		} else {
			r.out.put(r.out.style.AppendAlertLine(r.out.buf[:0], id, a))
		}
	})
}

// progress sums up, on stderr, what the recording was and what came of it.
func (r *replay) progress(stderr io.Writer, file string) {
	h := r.in.Header
	fmt.Fprintf(stderr, "%s: recorded %s on kernel %s (%s): %d processes at the start, %d records, %d lost; %d events",
		file, time.Unix(0, h.Wall).UTC().Format(time.RFC3339), h.Kernel, h.Mode, r.processes, r.records, r.lost, r.pipe.events.Load())
	if r.engine != nil {
		fmt.Fprintf(stderr, ", %d alerts from %d rules", r.seq, len(r.engine.Set().Rules()))
	}
	fmt.Fprintln(stderr)
}

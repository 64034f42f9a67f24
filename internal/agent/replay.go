package agent

import (
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
	"github.com/procession-dev/procession/internal/replay"
)

const replayHelp = `
Usage: agent replay [flags] FILE

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
	log, err := newLog(stderr, "text", "warn")
	if err != nil {
		return err
	}
	in, err := replay.Open(f, log)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	out.build.Wall = in.Wall
	use := out.write
	j := &judge{out: out}
	if *policies != "" {
		compiler, err := policy.NewCompiler()
		if err != nil {
			return err
		}
		j.engine = policy.NewEngine(compiler, policy.Config{Budget: policy.Untimed()})
		if err := source.NewDir(*policies, log).Load(compiler, func(u source.Update) { j.engine.Swap(u.Set) }); err != nil {
			return fmt.Errorf("--policies: %w", err)
		}
		if len(j.engine.Set().Rules()) == 0 {
			return fmt.Errorf("--policies: no rule in %s: there is nothing to judge by", *policies)
		}
		use = j.judge
	}
	if err = in.Run(use); err != nil {
		err = fmt.Errorf("%s: %w; what was before is replayed", file, err)
	}
	if j.engine != nil {
		j.engine.Flush(j.print) // what is still held back
	}
	out.flush()
	j.sumUp(stderr, file, in)
	return errors.Join(err, out.err)
}

// parseFile parses flags and the one argument, a file.
func parseFile(fs *flag.FlagSet, about string, args []string, out io.Writer) (string, error) {
	file, err := parseOne(fs, about, args, out)
	if err == nil && file == "" {
		err = usagef("the file is missing; agent %s --help explains", fs.Name())
	}
	return file, err
}

// A judge prints the alerts that policies raise.
type judge struct {
	engine *policy.Engine // nil: events are printed
	out    *eventWriter
	seq    uint64
}

func (j *judge) judge(ev *event.Event) { j.engine.Evaluate(ev, j.print) }

func (j *judge) print(m *policy.Match) {
	j.seq++
	m.Seq = j.seq // what a summary of its repeats refers to
	a := j.out.build.Alert(m.Event, m)
	id := present.Identity{Cluster: "replay", Node: "replay", Seq: j.seq}
	if j.out.json {
		j.out.put(present.AppendAlertJSON(j.out.buf[:0], id, a))
	} else {
		j.out.put(j.out.style.AppendAlertLine(j.out.buf[:0], id, a))
	}
}

// sumUp says, on stderr, what the recording was and what came of it.
func (j *judge) sumUp(stderr io.Writer, file string, r *replay.Replay) {
	h := r.Header
	fmt.Fprintf(stderr, "%s: recorded %s on kernel %s (%s): %d processes at the start, %d records, %d lost; %d events",
		file, time.Unix(0, h.Wall).UTC().Format(time.RFC3339), h.Kernel, h.Mode, r.Processes, r.Records, r.Lost, r.Events)
	if j.engine != nil {
		fmt.Fprintf(stderr, ", %d alerts from %d rules", j.seq, len(j.engine.Set().Rules()))
	}
	fmt.Fprintln(stderr)
}

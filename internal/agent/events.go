package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/procconn"
)

const eventsHelp = `
Usage: agent events [flags]

Prints process events as they happen, one per line: columns for people on a
terminal, JSON objects when piped. "listening" appears on stderr once events
are proven to arrive. Filters are combined with "and"; a list matches any of
its entries.

  agent events                                   everything but renames
  agent events --kinds exec,uid                  programs and uid changes
  agent events --name nginx,sh --format json     two programs, as JSON
  agent events --container 4fa6 --duration 1m    a container by the start of its id
`

type eventsFlags struct {
	format, kinds, recorder, color string
	pids, uids, containers, names  string
	duration, drain                time.Duration
}

func eventsCommand(args []string, stdout, stderr io.Writer) error {
	var f eventsFlags
	fs := newFlags("events")
	fs.StringVar(&f.format, "format", "auto", "text, json (one object a line), or auto: text on a terminal, else json")
	fs.StringVar(&f.kinds, "kinds", "", "only these `kinds`: "+kindList()+" (default all but comm)")
	fs.DurationVar(&f.duration, "duration", 0, "stop after this time; 0 is never")
	fs.StringVar(&f.pids, "pid", "", "only these `pids`, and what they start")
	fs.StringVar(&f.uids, "uid", "", "only processes with these real or effective `uids`")
	fs.StringVar(&f.containers, "container", "", "only containers whose id starts with one of these `ids`; host means no container")
	fs.StringVar(&f.names, "name", "", "only programs with one of these `names` (task name or last part of the path)")
	fs.StringVar(&f.color, "color", "auto", "auto, always, never")
	fs.StringVar(&f.recorder, "recorder", "auto", "use of the eBPF recorder: auto, off, require")
	fs.DurationVar(&f.drain, "drain", 0, "how often events are taken from the kernel while many come, half as often while few do, 1ms to 50ms (default 10ms)")
	if err := parse(fs, eventsHelp, args, stdout); err != nil {
		return err
	}
	if err := checkCapture(f.recorder, f.drain, f.duration); err != nil {
		return err
	}
	keep, err := newFilter(f)
	if err != nil {
		return err
	}
	out, err := newEventWriter(f, stdout)
	if err != nil {
		return err
	}
	log, err := newLog(stderr, "text", "warn")
	if err != nil {
		return err
	}
	memory := beFrugal(log)
	ctx, stop := untilSignal(context.Background())
	defer stop()
	out.failed = stop // nobody reads any more: end
	// In good order, as by a signal: what kills by default here is a write to a
	// pipe that "head" has closed.
	signal.Ignore(syscall.SIGPIPE)

	prompt := newPrompter()
	prompt.start(time.Now())
	pipe, err := newPipeline(log, func(ev *event.Event) {
		if keep.match(ev) {
			out.write(ev)
		}
	}, func() {
		prompt.look(time.Now())
		out.flush()
	})
	if err != nil {
		return err
	}
	out.build.Wall = pipe.wall
	conn, err := procconn.Open(ctx, procconn.Config{
		Recorder:      procconn.Mode(f.recorder),
		Kinds:         keep.wanted(),
		Cwd:           true,
		DrainInterval: f.drain,
		Log:           log,
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	memory.started()
	pipe.fair.full = conn.Full
	if _, err := pipe.scan(); err != nil {
		return err
	}
	fmt.Fprintln(stderr, "listening")
	if f.duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, f.duration)
		defer cancel()
	}
	out.header()
	err = conn.Run(ctx, pipe)
	out.flush()
	if lost := pipe.lost.Load(); lost > 0 {
		fmt.Fprintf(stderr, "%d events were lost\n", lost)
	}
	if shed := pipe.fair.shed.Load(); shed > 0 {
		fmt.Fprintf(stderr, "%d events of storms were not printed, to keep up with the rest\n", shed)
	}
	if err != nil || errors.Is(out.err, syscall.EPIPE) {
		return err // a reader that has read enough is no failure
	}
	return out.err
}

func kindList() string {
	var s []string
	for _, k := range event.AllKinds() {
		s = append(s, k.Short())
	}
	return strings.Join(s, ", ")
}

// A filter decides which events are printed. The zero filter prints all.
type filter struct {
	kinds      event.Kinds
	pids       map[int32]bool
	uids       map[uint32]bool
	containers []string
	names      []string
}

func newFilter(f eventsFlags) (*filter, error) {
	out := &filter{kinds: event.KindSet(event.AllKinds()...) &^ event.KindSet(event.CommChange)}
	for _, l := range [...]struct{ flag, value string }{
		{"kinds", f.kinds}, {"pid", f.pids}, {"uid", f.uids}, {"container", f.containers}, {"name", f.names},
	} {
		if l.value != "" && len(list(l.value)) == 0 {
			return nil, usagef("--%s: %q is a list of nothing", l.flag, l.value)
		}
	}
	if f.kinds != "" {
		out.kinds = 0
		for _, name := range list(f.kinds) {
			k, ok := event.KindByName(name)
			if !ok {
				return nil, usagef("--kinds: there is no kind %q; the kinds are %s", name, kindList())
			}
			out.kinds |= event.KindSet(k)
			if k == event.PtraceAttach {
				out.kinds |= event.KindSet(event.PtraceDetach)
			}
		}
	}
	for _, s := range list(f.pids) {
		n, err := strconv.ParseInt(s, 10, 32)
		if err != nil || n <= 0 {
			return nil, usagef("--pid: %q is not a process id", s)
		}
		if out.pids == nil {
			out.pids = map[int32]bool{}
		}
		out.pids[int32(n)] = true
	}
	for _, s := range list(f.uids) {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return nil, usagef("--uid: %q is not a user id (a number)", s)
		}
		if out.uids == nil {
			out.uids = map[uint32]bool{}
		}
		out.uids[uint32(n)] = true
	}
	out.containers, out.names = list(f.containers), list(f.names)
	return out, nil
}

// wanted are the kinds the kernel must tell: the filter's, and those the
// process table lives from.
func (f *filter) wanted() event.Kinds {
	return f.kinds | event.KindSet(event.Exec, event.Fork, event.Exit, event.UIDChange, event.GIDChange, event.SessionChange)
}

func (f *filter) match(ev *event.Event) bool {
	p := ev.Process
	switch {
	case !f.kinds.Has(ev.Kind):
		return false
	case len(f.pids) > 0 && !descends(p, f.pids):
		return false
	case len(f.uids) > 0 && (!p.Has(event.FieldIDs) || !f.uids[p.UID] && !f.uids[p.EUID]):
		return false
	case len(f.containers) > 0 && !inContainer(p.Workload, f.containers):
		return false
	case len(f.names) > 0 && !slices.ContainsFunc(f.names, func(n string) bool { return p.Name == n || base(p.Exe) == n }):
		return false
	}
	return true
}

func descends(p *event.Process, pids map[int32]bool) bool {
	for n := 0; p != nil && n < alert.MaxAncestors; n++ {
		if pids[p.PID] {
			return true
		}
		p = p.Parent
	}
	return false
}

func inContainer(w *event.Workload, ids []string) bool {
	if w == nil {
		return false
	}
	return slices.ContainsFunc(ids, func(id string) bool {
		if id == "host" {
			return w.Place == event.PlaceHost
		}
		return w.ContainerID != "" && strings.HasPrefix(w.ContainerID, id)
	})
}

func base(path string) string {
	return path[strings.LastIndexByte(path, '/')+1:]
}

func list(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// An eventWriter writes events as lines or as JSON. It flushes when nothing
// more is waiting, so that a line appears at once and a storm costs few calls.
type eventWriter struct {
	w     *bufio.Writer
	build alert.Builder
	style present.Style
	json  bool
	buf   []byte
	err   error // the first failure to write; the rest is thrown away
	// failed is called once, at the first failure.
	failed func()
}

func newEventWriter(f eventsFlags, stdout io.Writer) (*eventWriter, error) {
	style, terminal, err := present.StyleFor(stdout, f.color)
	if err != nil {
		return nil, usagef("--color: %w", err)
	}
	out := &eventWriter{w: bufio.NewWriterSize(stdout, 64<<10), style: style}
	switch f.format {
	case "auto":
		out.json = !terminal
	case "json":
		out.json = true
	case "text":
	default:
		return nil, usagef("--format: %q is none of auto, text, json", f.format)
	}
	return out, nil
}

func (o *eventWriter) header() {
	if !o.json {
		o.put(o.style.AppendEventHeader(o.buf[:0]))
		o.flush()
	}
}

func (o *eventWriter) write(ev *event.Event) {
	if o.err != nil {
		return
	}
	msg := o.build.Event(ev, 1)
	if o.json {
		o.put(present.AppendEventJSON(o.buf[:0], msg))
	} else {
		o.put(o.style.AppendEventLine(o.buf[:0], msg))
	}
}

func (o *eventWriter) put(line []byte) {
	o.buf = append(line, '\n')
	_, err := o.w.Write(o.buf)
	o.check(err)
}

func (o *eventWriter) flush() { o.check(o.w.Flush()) }

func (o *eventWriter) check(err error) {
	if err != nil && o.err == nil {
		o.err = fmt.Errorf("write events: %w", err)
		o.failed()
	}
}

package author

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/recording"
	"github.com/procession-dev/procession/internal/replay"
)

const replayHelp = `
Takes a recording of "agent record" through policies and shows what they raise.
With --against the same recording goes through older policies as well, and only
the difference is shown: "-" raised before and not now, "+" not before and now.

The same recording and policies give the same output on every machine: no root,
no kernel connector, no cluster. What a recording does not hold (pods, images)
is missing, and rules that need it are undecided, as they would be on a node
whose kubelet does not answer: the sums say how often. Policies of a namespace
need the pod and so are always undecided here.

  agent record --duration 24h day.rec                    as root, on a node
  {policy} replay day.rec --policies new/                what would it raise?
  {policy} replay day.rec --policies new/ --against old/ what would change?
  {policy} replay day.rec --policies new/ --against old/ --format json | jq -c 'select(.change == "added") | .alert.message'

Rules in dry run take part, and are marked as such. With --format json there is
one object a line: {"change": "added" | "removed" | "changed" | "raised", "rule",
"dryRun", "alert", "before"}, and at the end {"summary": {...}}.

Exit codes, as diff has them: 0 read to the end, and no difference; 1 with
--against: there is a difference; 2 something could not be read or compiled.
A recording that was cut off is used up to its last whole block, and that is said.
`

func replayCommand(args []string, io IO) error {
	c := newCommand("replay", io)
	policies := c.flags.String("policies", "", "`PATH` of the policies: a file or a folder")
	against := c.flags.String("against", "", "`PATH` of the policies to compare with: as they were before")
	limit := c.flags.Int("limit", 20, "alerts to show of each rule; 0 is all (text only, the sums are always of all)")
	files, err := c.parse(args, "RECORDING --policies PATH [--against PATH]", replayHelp)
	switch {
	case err != nil:
		return err
	case len(files) != 1:
		return usagef("one recording must be named; %s replay --help explains", io.Name)
	case *policies == "":
		return usagef("--policies is missing; %s replay --help explains", io.Name)
	case *limit < 0:
		return usagef("--limit: %d is less than 0", *limit)
	}
	f, err := os.Open(files[0])
	if err != nil {
		return unreadableError{err}
	}
	defer f.Close()
	in, err := replay.Open(f, nil)
	if err != nil {
		return unreadableError{fmt.Errorf("%s: %w", files[0], err)}
	}
	compiler, err := policy.NewCompiler()
	if err != nil {
		return err
	}
	d := &diff{c: c, limit: *limit, rules: map[string]*ruleCount{},
		style: present.Style{Color: c.style.color, Width: c.style.width, Zone: time.UTC}}
	build := &alert.Builder{Wall: in.Wall}
	if d.now, err = newSide(c, compiler, *policies, build); err != nil {
		return err
	}
	if *against != "" {
		if d.before, err = newSide(c, compiler, *against, build); err != nil {
			return err
		}
	}
	err = in.Run(d.event)
	cut := errors.Is(err, recording.ErrCut)
	if err != nil && !cut {
		return unreadableError{fmt.Errorf("%s: %w", files[0], err)}
	}
	d.event(nil)
	if err := d.sumUp(files[0], in); err != nil {
		return err
	}
	if d.before != nil && d.changes > 0 {
		return errFindings
	}
	return nil
}

// A side is one set of policies on its way through a recording.
type side struct {
	engine *policy.Engine
	build  *alert.Builder
	alerts []found // of the event at hand
	seq    uint64
}

// A found is an alert. It is made at once: the event behind it is gone later.
type found struct {
	rule   string
	dryRun bool
	seq    uint64 // among the side's alerts
	alert  *pb.Alert
}

func newSide(c *command, compiler *policy.Compiler, path string, build *alert.Builder) (*side, error) {
	set, err := c.set(compiler, []string{path})
	if err != nil {
		return nil, err
	}
	s := &side{build: build}
	s.engine = policy.NewEngine(compiler, policy.Config{Budget: policy.Untimed(), DryRun: s.found})
	return s, s.engine.Swap(set)
}

func (s *side) found(m *policy.Match) {
	s.seq++
	m.Seq = s.seq // what a summary of its repeats refers to
	s.alerts = append(s.alerts, found{m.Rule.ID, m.DryRun, s.seq, s.build.Alert(m.Event, m)})
}

// judge gives the alerts of an event, and the summaries that were due; without
// an event, what is still held back.
func (s *side) judge(ev *event.Event) []found {
	s.alerts = s.alerts[:0]
	if ev == nil {
		s.engine.Flush(s.found)
	} else {
		s.engine.Evaluate(ev, s.found)
	}
	return s.alerts
}

// A diff compares what two sets of policies make of the same events.
type diff struct {
	c           *command
	now, before *side // before is nil when there is nothing to compare with
	limit       int
	style       present.Style
	rules       map[string]*ruleCount
	changes     int
	err         error // the first failure to write
}

// ruleCount is what a rule raised, all in all.
type ruleCount struct {
	Rule    string `json:"rule"`
	Before  int    `json:"before"`
	Now     int    `json:"now"`
	Added   int    `json:"added"`
	Removed int    `json:"removed"`
	Changed int    `json:"changed"`
	DryRun  bool   `json:"dryRun,omitempty"`
	// Undecided events: facts the rule needs are not in the recording.
	Undecided uint64 `json:"undecided,omitempty"`

	shown int
}

// event compares what the sides make of an event, or of the end.
func (d *diff) event(ev *event.Event) {
	now := d.now.judge(ev)
	if d.before == nil {
		for _, f := range now {
			d.count(f).Now++
			d.show("raised", f, nil)
		}
		return
	}
	before := slices.Clone(d.before.judge(ev))
	for _, f := range now {
		r := d.count(f)
		r.Now++
		i := slices.IndexFunc(before, func(b found) bool { return b.rule == f.rule && summary(b) == summary(f) })
		switch {
		case i < 0:
			r.Added++
			d.show("added", f, nil)
			continue
		case !same(f, before[i]):
			r.Changed++
			d.show("changed", f, &before[i])
		}
		r.Before++
		before = slices.Delete(before, i, i+1)
	}
	for _, b := range before { // what is left
		r := d.count(b)
		r.Before++
		r.Removed++
		d.show("removed", b, nil)
	}
}

// summary says whether an alert sums up repeats of another one.
func summary(f found) bool { return f.alert.GetAggregated().GetFirstSeq() != 0 }

// same says whether who gets the alerts would see no difference.
func same(a, b found) bool {
	x, y := a.alert, b.alert
	return a.dryRun == b.dryRun && x.GetMessage() == y.GetMessage() && x.GetUndecided() == y.GetUndecided() &&
		x.GetSeverity() == y.GetSeverity() && x.GetTitle() == y.GetTitle() && x.GetAggregated().GetCount() == y.GetAggregated().GetCount()
}

func (d *diff) count(f found) *ruleCount {
	r := d.rules[f.rule]
	if r == nil {
		r = &ruleCount{Rule: f.rule}
		d.rules[f.rule] = r
	}
	r.DryRun = f.dryRun
	return r
}

// show writes one alert, or the two sides of one that changed.
func (d *diff) show(change string, f found, was *found) {
	if change != "raised" {
		d.changes++
	}
	if d.c.format == "json" {
		line := struct {
			Change string          `json:"change"`
			Rule   string          `json:"rule"`
			DryRun bool            `json:"dryRun"`
			Alert  json.RawMessage `json:"alert"`
			Before json.RawMessage `json:"before,omitempty"`
		}{Change: change, Rule: f.rule, DryRun: f.dryRun, Alert: d.json(f)}
		if was != nil {
			line.Before = d.json(*was)
		}
		d.check(json.NewEncoder(d.c.io.Out).Encode(line))
		return
	}
	r := d.rules[f.rule]
	if r.shown++; d.limit > 0 && r.shown > d.limit {
		return
	}
	switch change {
	case "raised":
		d.line("", "", f)
	case "added":
		d.line("+ ", green, f)
	case "removed":
		d.line("- ", red, f)
	case "changed":
		d.line("- ", red, *was)
		d.line("+ ", green, f)
	}
}

func (f found) identity() present.Identity {
	return present.Identity{Cluster: "replay", Node: "replay", Seq: f.seq}
}

func (d *diff) json(f found) json.RawMessage {
	return present.AppendAlertJSON(nil, f.identity(), f.alert)
}

func (d *diff) line(sign, code string, f found) {
	line := d.style.AppendAlertLine(nil, f.identity(), f.alert)
	if summary(f) {
		line = fmt.Appendf(line, " (sums up %d more)", f.alert.GetAggregated().GetCount())
	}
	_, err := fmt.Fprintf(d.c.io.Out, "%s%s\n", d.c.style.in(code, sign), line)
	d.check(err)
}

func (d *diff) check(err error) {
	if err != nil && d.err == nil {
		d.err = fmt.Errorf("write: %w", err)
	}
}

// sumUp tells how often each rule matched, and what the recording was.
func (d *diff) sumUp(file string, r *replay.Replay) error {
	for _, x := range d.now.engine.Stats() {
		if x.Undecided > 0 {
			d.count(found{rule: x.Rule.ID, dryRun: x.Rule.Mode == "DryRun"}).Undecided = x.Undecided
		}
	}
	rules := make([]*ruleCount, 0, len(d.rules))
	for _, x := range d.rules {
		rules = append(rules, x)
	}
	slices.SortFunc(rules, func(a, b *ruleCount) int { return strings.Compare(a.Rule, b.Rule) })
	if d.c.format == "json" {
		d.check(json.NewEncoder(d.c.io.Out).Encode(map[string]any{"summary": map[string]any{
			"recording": file, "started": time.Unix(0, r.Header.Wall).UTC(), "kernel": r.Header.Kernel, "cut": r.Cut,
			"processes": r.Processes, "records": r.Records, "events": r.Events, "lost": r.Lost, "rules": rules,
		}}))
		return d.err
	}
	d.table(d.c.io.Out, rules)
	fmt.Fprintf(d.c.io.Err, "%s: recorded %s on kernel %s: %d processes at the start, %d records, %d lost; %d events\n",
		file, time.Unix(0, r.Header.Wall).UTC().Format(time.RFC3339), r.Header.Kernel, r.Processes, r.Records, r.Lost, r.Events)
	if r.Cut {
		fmt.Fprintf(d.c.io.Err, "%s: the recording is cut off: what its writer had not written yet is not in it\n", file)
	}
	return d.err
}

func (d *diff) table(w io.Writer, rules []*ruleCount) {
	s := d.c.style
	if d.before != nil {
		fmt.Fprintln(w, s.in(bold, fill("rule", 64)+"  before     now"))
	} else {
		fmt.Fprintln(w, s.in(bold, fill("rule", 64)+"  alerts"))
	}
	for _, r := range rules {
		note, code := "", ""
		if r.DryRun {
			note = "  dry run"
		}
		if r.Undecided > 0 {
			note += fmt.Sprintf("  %d undecided", r.Undecided)
		}
		if more := r.shown - d.limit; d.limit > 0 && more > 0 {
			note += fmt.Sprintf("  %d not shown", more)
		}
		if d.before == nil {
			fmt.Fprintf(w, "%s  %6d%s\n", fill(r.Rule, 64), r.Now, note)
			continue
		}
		switch {
		case r.Removed > 0 && r.Added == 0:
			code = red
		case r.Added > 0:
			code = green
		}
		if r.Added+r.Removed+r.Changed > 0 {
			note = fmt.Sprintf("  +%d -%d ~%d", r.Added, r.Removed, r.Changed) + note
		}
		fmt.Fprintln(w, s.in(code, fmt.Sprintf("%s  %6d  %6d%s", fill(r.Rule, 64), r.Before, r.Now, note)))
	}
	switch {
	case len(rules) == 0:
		fmt.Fprintln(w, "no rule matched")
	case d.before != nil && d.changes == 0:
		fmt.Fprintln(w, "no difference")
	}
}

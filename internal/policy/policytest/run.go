package policytest

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
)

// A Report is the outcome of a test file.
type Report struct {
	File  string
	Cases []Result
	Rules []Coverage // of every rule the file is about, by policy
}

// OK says whether all cases passed.
func (r *Report) OK() bool {
	return !slices.ContainsFunc(r.Cases, func(c Result) bool { return len(c.Failures) > 0 })
}

// A Result is the outcome of a case.
type Result struct {
	Name     string
	Events   int
	Matches  int
	Failures []string // empty: passed
}

// Coverage says how many cases a rule has.
type Coverage struct {
	Rule     string // its identity
	File     string // its policy's
	Positive int    // cases that expect it
	Negative int    // cases that call it quiet
}

// Uncovered lists the rules that have not both a case that expects them and
// one that calls them quiet, all reports taken together, and says which one is
// missing.
func Uncovered(reports ...*Report) (out []string) {
	for _, c := range Covered(reports...) {
		if c.Positive == 0 {
			out = append(out, c.Rule+": no case expects it")
		}
		if c.Negative == 0 {
			out = append(out, c.Rule+": no case calls it quiet")
		}
	}
	return out
}

// Covered adds the coverage of several reports up.
func Covered(reports ...*Report) (out []Coverage) {
	at := map[string]int{}
	for _, r := range reports {
		for _, c := range r.Rules {
			i, ok := at[c.Rule]
			if !ok {
				at[c.Rule] = len(out)
				out = append(out, c)
				continue
			}
			out[i].Positive += c.Positive
			out[i].Negative += c.Negative
		}
	}
	return out
}

// Run runs the test file name in fsys. An error means that it could not run:
// the file or a policy cannot be read or compiled.
func Run(c *policy.Compiler, fsys fs.FS, name string) (*Report, error) {
	f, r, err := open(c, fsys, name)
	if err != nil {
		return nil, err
	}
	out := &Report{File: name}
	for i := range f.Cases {
		out.Cases = append(out.Cases, r.run(&f.Cases[i]))
	}
	out.Rules = r.covered()
	return out, nil
}

// Count counts the cases of each rule without running them.
func Count(c *policy.Compiler, fsys fs.FS, name string) ([]Coverage, error) {
	f, r, err := open(c, fsys, name)
	if err != nil {
		return nil, err
	}
	for i := range f.Cases {
		x := &f.Cases[i]
		for _, e := range x.Expect {
			if id, err := r.find(e.Rule); err == nil && e.want() > 0 {
				r.coverage[id].Positive++
			}
		}
		for _, q := range x.Quiet {
			if id, err := r.find(q); err == nil {
				r.coverage[id].Negative++
			}
		}
	}
	return r.covered(), nil
}

// open reads a test file and compiles the policies it is about.
func open(c *policy.Compiler, fsys fs.FS, name string) (*File, *runner, error) {
	data, err := fs.ReadFile(fsys, name)
	if err != nil {
		return nil, nil, err
	}
	f, err := decode(data)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	set, err := f.load(c, fsys, name)
	if err != nil {
		return nil, nil, err
	}
	r := &runner{set: set, compiler: c, coverage: map[string]*Coverage{}, namespaces: f.Namespaces, node: f.Node}
	files := map[*policy.Rule]string{}
	for _, p := range set.Policies() {
		for _, rule := range p.Rules {
			files[rule] = p.File
		}
	}
	for _, rule := range set.Rules() {
		r.coverage[rule.ID] = &Coverage{Rule: rule.ID, File: files[rule]}
	}
	return f, r, nil
}

func (r *runner) covered() (out []Coverage) {
	for _, rule := range r.set.Rules() {
		out = append(out, *r.coverage[rule.ID])
	}
	return out
}

// load compiles the policies a test file is about.
func (f *File) load(c *policy.Compiler, fsys fs.FS, name string) (*policy.Set, error) {
	var policies []*policy.Policy
	for _, p := range f.Policies {
		file := path.Join(path.Dir(name), p)
		text, err := fs.ReadFile(fsys, file)
		if err != nil {
			return nil, fmt.Errorf("%s: policies: %w", name, err)
		}
		objects, err := policy.Parse(file, text)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			compiled, err := c.Compile(o)
			if err != nil {
				return nil, err
			}
			policies = append(policies, compiled)
		}
	}
	return policy.NewSet(policies...)
}

type runner struct {
	set      *policy.Set
	compiler *policy.Compiler
	coverage map[string]*Coverage // by id of the rule

	namespaces map[string]map[string]string
	node       Node
}

// find resolves a rule's name, or policy/name, to its id.
func (r *runner) find(name string) (id string, err error) {
	for _, rule := range r.set.Rules() {
		if rule.Spec.Name != name && rule.Policy+"/"+rule.Spec.Name != name && rule.ID != name {
			continue
		}
		if id != "" {
			return "", fmt.Errorf("rule %s is in several policies: write policy/rule, or its identity", name)
		}
		id = rule.ID
	}
	if id == "" {
		return "", fmt.Errorf("there is no rule %s", name)
	}
	return id, nil
}

// A trial is one case on its way.
type trial struct {
	*runner
	c       *Case
	out     Result
	alerts  []*policy.Match // those that are raised by themselves
	repeats map[string]uint64
	stats   map[string]policy.Stats
}

func (t *trial) fail(format string, args ...any) {
	t.out.Failures = append(t.out.Failures, fmt.Sprintf(format, args...))
}

func (r *runner) run(c *Case) Result {
	t := &trial{runner: r, c: c, out: Result{Name: c.Name, Events: len(c.Events)}, repeats: map[string]uint64{}, stats: map[string]policy.Stats{}}
	if err := t.judge(); err != nil {
		t.fail("%v", err)
		return t.out
	}
	t.out.Matches = len(t.alerts)
	for i := range c.Expect {
		t.expect(&c.Expect[i])
	}
	for _, m := range t.alerts {
		t.fail("%s: matched, and no case expects it: %s", m.Rule.ID, m.Message)
	}
	for _, rule := range r.set.Rules() {
		if n := t.repeats[rule.ID]; n > 0 {
			t.fail("%s: %d matches were held back as repeats, and the case does not say so", rule.ID, n)
		}
	}
	for _, name := range c.Quiet {
		t.quiet(name)
	}
	t.outcomes("undecided", c.Undecided, func(s policy.Stats) bool { return s.Undecided > 0 })
	t.outcomes("suppressed", c.Suppressed, func(s policy.Stats) bool { return s.Suppressed > 0 })
	t.outcomes("errors", c.Errors, func(s policy.Stats) bool { return s.Errors+s.MessageErrors > 0 })
	t.outcomes("rateLimited", c.RateLimited, func(s policy.Stats) bool { return s.RateLimited+s.SummaryLimited > 0 })
	return t.out
}

// judge takes the events through an engine of their own, in virtual time, and
// lets it sum up what it holds back.
func (t *trial) judge() error {
	take := func(m *policy.Match) {
		if m.Aggregated != nil && m.Aggregated.Why != policy.WhyThreshold {
			t.repeats[m.Rule.ID] += m.Aggregated.Count
			return
		}
		t.alerts = append(t.alerts, m)
	}
	node := t.node
	if node.Name == "" {
		node.Name = "node-1"
	}
	if node.Labels == nil {
		node.Labels = map[string]string{}
	}
	engine := policy.NewEngine(t.compiler, policy.Config{Node: node.Name, NodeLabels: node.Labels, Budget: policy.Untimed(), DryRun: take})
	if err := engine.Swap(t.set); err != nil {
		return err
	}
	var now time.Time
	for i, data := range t.c.Events {
		ev, err := parseEvent(data, t.namespaces)
		switch {
		case err != nil:
			t.fail("events[%d]: %v", i, err)
			continue
		case ev.Time.Before(now):
			t.fail("events[%d]: is earlier than the one before", i)
		}
		now, ev.Stamp = ev.Time, 0 // the engine's clock is then the event's time
		engine.Evaluate(ev, take)
	}
	if t.c.Until != "" {
		until, err := time.ParseDuration(t.c.Until)
		if err != nil || epoch.Add(until).Before(now) {
			return fmt.Errorf("until: %.64q is no length of time like 10m that ends after the last event", t.c.Until)
		}
		engine.Tick(uint64(epoch.Add(until).UnixNano()), take)
	}
	for _, s := range engine.Stats() {
		t.stats[s.Rule.ID] = s
	}
	engine.Flush(take)
	return nil
}

// expect takes what the case expects out of what was raised.
func (t *trial) expect(x *Expect) {
	id, err := t.find(x.Rule)
	if err != nil {
		t.fail("expect: %v", err)
		return
	}
	if x.want() > 0 {
		t.coverage[id].Positive++
	}
	var rest []*policy.Match
	n := 0
	for _, m := range t.alerts {
		if m.Rule.ID != id {
			rest = append(rest, m)
			continue
		}
		n++
		for _, problem := range x.differs(m) {
			t.fail("%s: %s", x.Rule, problem)
		}
	}
	if t.alerts = rest; n != x.want() {
		t.fail("%s: matched %d times, want %d%s", x.Rule, n, x.want(), why(t.stats[id]))
	}
	if got := t.repeats[id]; got != x.Repeats {
		t.fail("%s: %d matches were held back as repeats, want %d", x.Rule, got, x.Repeats)
	}
	delete(t.repeats, id)
}

func (t *trial) quiet(name string) {
	id, err := t.find(name)
	if err != nil {
		t.fail("quiet: %v", err)
		return
	}
	t.coverage[id].Negative++
	switch s := t.stats[id]; {
	case s.Evaluated == 0:
		t.fail("%s: is not quiet but blind: no event of the case is of its kind and scope", name)
	case s.Alerts+s.DryRun+s.Aggregated+s.RateLimited > 0:
		t.fail("%s: matched, want quiet", name)
	}
}

// want is how often the rule should match.
func (x *Expect) want() int {
	if x.Count != nil {
		return *x.Count
	}
	return 1
}

func (x *Expect) differs(m *policy.Match) (problems []string) {
	if s := string(m.Rule.Severity()); x.Severity != "" && s != x.Severity {
		problems = append(problems, fmt.Sprintf("severity is %s, want %s", s, x.Severity))
	}
	if !strings.Contains(m.Message, x.Message) {
		problems = append(problems, fmt.Sprintf("message is %q, want %q in it", m.Message, x.Message))
	}
	mode := x.Mode
	if mode == "" {
		mode = "Alert"
	}
	if got := string(m.Rule.Mode); got != mode {
		problems = append(problems, fmt.Sprintf("mode is %s, want %s", got, mode))
	}
	stands := uint64(1)
	if m.Aggregated != nil {
		stands = m.Aggregated.Count
	}
	if x.Stands != 0 && stands != x.Stands {
		problems = append(problems, fmt.Sprintf("stands for %d matches, want %d", stands, x.Stands))
	}
	if m.Undecided != x.Undecided {
		problems = append(problems, fmt.Sprintf("undecided is %v, want %v", m.Undecided, x.Undecided))
	}
	return problems
}

// outcomes compares the rules that ended in one way with those that should.
func (t *trial) outcomes(what string, names []string, is func(policy.Stats) bool) {
	want := map[string]bool{}
	for _, name := range names {
		id, err := t.find(name)
		if err != nil {
			t.fail("%s: %v", what, err)
			continue
		}
		want[id] = true
		if !is(t.stats[id]) {
			t.fail("%s: is not among the %s%s", name, what, why(t.stats[id]))
		}
	}
	for _, rule := range t.set.Rules() {
		if is(t.stats[rule.ID]) && !want[rule.ID] {
			t.fail("%s: is among the %s, and the case does not say so%s", rule.ID, what, why(t.stats[rule.ID]))
		}
	}
}

// why says how a rule's evaluations ended.
func why(s policy.Stats) string {
	out := fmt.Sprintf(" (of %d events: %d false, %d true, %d suppressed, %d undecided, %d failed)",
		s.Evaluated, s.NotMatched, s.Matched, s.Suppressed, s.Undecided, s.Errors)
	for _, x := range []struct {
		n    uint64
		what string
	}{{s.BelowThreshold, "below the threshold"}, {s.Aggregated, "held back as repeats"}, {s.RateLimited, "beyond the rate limit"}} {
		if x.n > 0 {
			out = out[:len(out)-1] + fmt.Sprintf(", %d %s)", x.n, x.what)
		}
	}
	if s.LastError != "" {
		out += ": " + s.LastError
	}
	return out
}

// Events reads the events of all cases of the test file name in fsys, in
// their order.
func Events(fsys fs.FS, name string) ([]*event.Event, error) {
	data, err := fs.ReadFile(fsys, name)
	if err != nil {
		return nil, err
	}
	f, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	var events []*event.Event
	for _, c := range f.Cases {
		for i := range c.Events {
			ev, err := parseEvent(c.Events[i], f.Namespaces)
			if err != nil {
				return nil, fmt.Errorf("%s: case %q: events[%d]: %w", name, c.Name, i, err)
			}
			events = append(events, ev)
		}
	}
	return events, nil
}

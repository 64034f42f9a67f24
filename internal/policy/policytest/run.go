package policytest

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

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
	r := &runner{set: set, compiler: c, coverage: map[string]*Coverage{}}
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
}

// find resolves a rule's name, or policy/name, to its id.
func (r *runner) find(name string) (id string, err error) {
	for _, rule := range r.set.Rules() {
		if rule.Spec.Name != name && rule.Policy+"/"+rule.Spec.Name != name {
			continue
		}
		if id != "" {
			return "", fmt.Errorf("rule %s is in several policies: write policy/rule", name)
		}
		id = rule.ID
	}
	if id == "" {
		return "", fmt.Errorf("there is no rule %s", name)
	}
	return id, nil
}

func (r *runner) run(c *Case) Result {
	out := Result{Name: c.Name, Events: len(c.Events)}
	fail := func(format string, args ...any) { out.Failures = append(out.Failures, fmt.Sprintf(format, args...)) }
	var got []*policy.Match
	collect := func(m *policy.Match) { got = append(got, m) }
	engine := policy.NewEngine(r.compiler, policy.Config{Node: "node-1", DryRun: collect})
	engine.Swap(r.set)
	for i := range c.Events {
		ev, err := parseEvent(c.Events[i])
		if err != nil {
			fail("events[%d]: %v", i, err)
			continue
		}
		engine.Evaluate(ev, collect)
	}
	out.Matches = len(got)
	stats := map[string]policy.Stats{}
	for _, s := range engine.Stats() {
		stats[s.Rule.ID] = s
	}
	for _, x := range c.Expect {
		id, err := r.find(x.Rule)
		if err != nil {
			fail("expect: %v", err)
			continue
		}
		want := x.want()
		if want > 0 {
			r.coverage[id].Positive++
		}
		var rest []*policy.Match
		n := 0
		for _, m := range got {
			if m.Rule.ID != id {
				rest = append(rest, m)
				continue
			}
			n++
			for _, problem := range x.differs(m) {
				fail("%s: %s", x.Rule, problem)
			}
		}
		if got = rest; n != want {
			fail("%s: matched %d times, want %d%s", x.Rule, n, want, why(stats[id]))
		}
	}
	for _, m := range got {
		fail("%s: matched, and no case expects it: %s", m.Rule.ID, m.Message)
	}
	for _, name := range c.Quiet {
		id, err := r.find(name)
		if err != nil {
			fail("quiet: %v", err)
			continue
		}
		r.coverage[id].Negative++
		if s := stats[id]; s.Evaluated == 0 {
			fail("%s: is not quiet but blind: no event of the case is of its kind and scope", name)
		} else if s.Matched > 0 {
			fail("%s: matched, want quiet", name)
		}
	}
	r.outcomes("undecided", c.Undecided, stats, func(s policy.Stats) bool { return s.Undecided > 0 }, fail)
	r.outcomes("suppressed", c.Suppressed, stats, func(s policy.Stats) bool { return s.Suppressed > 0 }, fail)
	r.outcomes("errors", c.Errors, stats, func(s policy.Stats) bool { return s.Errors+s.MessageErrors > 0 }, fail)
	return out
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
	if m.Undecided != x.Undecided {
		problems = append(problems, fmt.Sprintf("undecided is %v, want %v", m.Undecided, x.Undecided))
	}
	return problems
}

// outcomes compares the rules that ended in one way with those that should.
func (r *runner) outcomes(what string, names []string, stats map[string]policy.Stats, is func(policy.Stats) bool, fail func(string, ...any)) {
	want := map[string]bool{}
	for _, name := range names {
		id, err := r.find(name)
		if err != nil {
			fail("%s: %v", what, err)
			continue
		}
		want[id] = true
		if !is(stats[id]) {
			fail("%s: is not among the %s%s", name, what, why(stats[id]))
		}
	}
	for _, rule := range r.set.Rules() {
		if is(stats[rule.ID]) && !want[rule.ID] {
			fail("%s: is among the %s, and the case does not say so%s", rule.ID, what, why(stats[rule.ID]))
		}
	}
}

// why says how a rule's evaluations ended.
func why(s policy.Stats) string {
	out := fmt.Sprintf(" (of %d events: %d false, %d true, %d suppressed, %d undecided, %d failed)",
		s.Evaluated, s.NotMatched, s.Matched, s.Suppressed, s.Undecided, s.Errors)
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
			ev, err := parseEvent(c.Events[i])
			if err != nil {
				return nil, fmt.Errorf("%s: case %q: events[%d]: %w", name, c.Name, i, err)
			}
			events = append(events, ev)
		}
	}
	return events, nil
}

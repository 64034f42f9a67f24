package author

import (
	"cmp"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/match"
	"github.com/procession-dev/procession/internal/policy/policytest"
)

const lintHelp = `
Says what is wrong with policies, what is odd about them, and what they cost,
by the code that compiles them on the nodes. Nothing is applied or changed.

  {policy} lint my-rules.yaml
  {policy} lint deploy/helm/procession/policies
  kubectl get cdp -o yaml NAME | {policy} lint -
  {policy} lint --format json . | jq '.findings[] | select(.level == "error")'
  {policy} lint --rules .           also what each rule costs, and its cases

Checks, by the word in brackets at the end of a finding:

{checks}
Cost, from cheap to dear: indexed (nothing, for events that hold none of the
rule's texts), cheap (a few nanoseconds an event), regexp (a regular expression
an event), opaque (a CEL program an event: some hundred nanoseconds or more).

Exit codes: 0 nothing to say, or notes only; 1 errors or warnings (with
--fail-on error: errors only); 2 something could not be read.
`

// A level is how bad a finding is.
type level string

const (
	levelError   level = "error"   // the policy is refused
	levelWarning level = "warning" // it compiles, and is probably not meant
	levelNote    level = "note"    // to know
)

// checks are what lint looks for; the words are part of its output.
var checks = []struct {
	name  string
	level level
	about string
}{
	{"compile", levelError, "it is refused: a type, a name, a field that is not known"},
	{"duplicate", levelError, "two policies have one name"},
	{"warning", levelWarning, "it compiles and is probably not meant, like 'ABC' looked for in lowerAscii() text"},
	{"always-true", levelWarning, "the condition, or an exception, is true for every event it looks at"},
	{"never-true", levelWarning, "the condition, or an exception, is true for no event"},
	{"constant-part", levelWarning, "a part of an expression does not depend on the event"},
	{"no-index", levelNote, "no text is necessary for the rule: it is looked at for every event of its kinds"},
	{"slow", levelWarning, "the same, with a regular expression or a CEL program for every Exec, Fork or Exit"},
	{"opaque", levelNote, "a part that only CEL itself can decide, which is slow"},
	{"short-text", levelNote, "a text of one or two bytes is necessary: it is found everywhere"},
	{"wide-exception", levelWarning, "an exception is true whenever the condition is: the rule never alerts"},
	{"expired", levelWarning, "an exception is over: mend the cause, prolong it, or remove it"},
	{"expires-soon", levelNote, "an exception ends within 30 days"},
	{"no-test", levelWarning, "no case expects the rule, or none calls it quiet"},
	{"broken-test", levelError, "a file of cases that cannot be read"},
}

// soon is when an exception that ends is worth a note.
const soon = 30 * 24 * time.Hour

// A finding is something to see.
type finding struct {
	Level   level  `json:"level"`
	Check   string `json:"check"`
	File    string `json:"file"`
	Line    int    `json:"line,omitempty"`
	Policy  string `json:"policy,omitempty"`
	Rule    string `json:"rule,omitempty"`
	Field   string `json:"field,omitempty"`
	Message string `json:"message"`
	Snippet string `json:"snippet,omitempty"`
}

// A ruleReport is what a rule costs.
type ruleReport struct {
	Rule     string   `json:"rule"`
	File     string   `json:"file"`
	Severity string   `json:"severity"`
	Mode     string   `json:"mode"`
	Cost     string   `json:"cost"`
	Indexed  bool     `json:"indexed"`
	Texts    int      `json:"texts"`
	Lazy     int      `json:"lazyTerms"`
	Opaque   []string `json:"opaqueTerms"`
	Positive int      `json:"positiveCases"`
	Negative int      `json:"negativeCases"`
}

type lintOutput struct {
	OK       bool         `json:"ok"`
	Files    int          `json:"files"`
	Skipped  int          `json:"skippedFiles"` // YAML in folders that is not about policies
	Findings []finding    `json:"findings"`
	Rules    []ruleReport `json:"rules"`
	Errors   []string     `json:"errors"` // what could not be read
}

func lintCommand(args []string, io IO) error {
	c := newCommand("lint", io)
	failOn := c.flags.String("fail-on", "warning", "exit with 1 for findings of this `level` and worse: warning, error")
	rules := c.flags.Bool("rules", false, "list each rule with its cost and its cases (json always does)")
	at := c.flags.String("at", "", "the `time` exceptions are judged at, like 2027-06-30T00:00:00Z (default now)")
	var list strings.Builder
	for _, x := range checks {
		fmt.Fprintf(&list, "  %-8s %-15s %s\n", x.level, x.name, x.about)
	}
	paths, err := c.parse(args, "PATH...", strings.ReplaceAll(lintHelp, "{checks}", list.String()))
	now := time.Now()
	switch {
	case err != nil:
		return err
	case len(paths) == 0:
		return usagef("a file or a folder is missing; %s lint --help explains", io.Name)
	case *failOn != "warning" && *failOn != "error":
		return usagef("--fail-on: %.64q is neither warning nor error", *failOn)
	case *at != "":
		if now, err = time.Parse(time.RFC3339, *at); err != nil {
			return usagef("--at: %.64q is no time like 2027-06-30T00:00:00Z", *at)
		}
	}
	compiler, err := policy.NewCompiler()
	if err != nil {
		return err
	}
	l := &linter{c: c, compiler: compiler, now: now, out: lintOutput{Findings: []finding{}, Rules: []ruleReport{}, Errors: []string{}}}
	if err := l.run(paths); err != nil {
		return err
	}
	bad := l.finish(level(*failOn))
	if c.format == "json" {
		err = c.json(l.out)
	} else {
		l.print(*rules)
	}
	switch {
	case err != nil:
		return err
	case len(l.out.Errors) > 0:
		return unreadableError{fmt.Errorf("%s could not be read", count(len(l.out.Errors), "path"))}
	case l.out.Files == 0:
		return usagef("there is no policy in %s", strings.Join(paths, ", "))
	case bad:
		return errFindings
	}
	return nil
}

type linter struct {
	c        *command
	compiler *policy.Compiler
	now      time.Time
	out      lintOutput
}

func (l *linter) run(paths []string) error {
	t := look(paths)
	t.beside()
	files, skipped := l.c.load(l.compiler, t, paths)
	l.out.Files, l.out.Skipped = len(files), skipped
	coverage := l.coverage(t.tests)
	owner := map[string]string{}
	for _, f := range files {
		for _, e := range f.errs {
			l.compileError(e)
		}
		for i, p := range f.policies {
			name := p.Kind + " " + p.FullName()
			if first, ok := owner[name]; ok {
				l.add("duplicate", &policy.Error{File: f.path, Line: f.objects[i].LineOf("metadata.name"), Policy: p.FullName(), Field: "metadata.name"},
					"is the name of a policy in %s as well", first)
			} else {
				owner[name] = f.path
			}
			if err := l.policy(f.objects[i], p, coverage); err != nil {
				return err
			}
		}
	}
	for _, err := range t.errs {
		l.out.Errors = append(l.out.Errors, err.Error())
	}
	return nil
}

// coverage counts the cases of each rule, by its identity.
func (l *linter) coverage(tests []string) map[string]policytest.Coverage {
	out := map[string]policytest.Coverage{}
	for _, path := range tests {
		list, err := policytest.Count(l.compiler, osFS{l.c}, path)
		if err != nil {
			l.add("broken-test", &policy.Error{File: path}, "%v", err)
			continue
		}
		for _, x := range list {
			sum := out[x.Rule]
			sum.Positive += x.Positive
			sum.Negative += x.Negative
			out[x.Rule] = sum
		}
	}
	return out
}

func (l *linter) compileError(e *policy.Error) {
	l.add("compile", e, "%s", e.Msg)
}

// add adds a finding at the place of e.
func (l *linter) add(check string, e *policy.Error, format string, args ...any) {
	i := slices.IndexFunc(checks, func(x struct {
		name  string
		level level
		about string
	}) bool {
		return x.name == check
	})
	l.out.Findings = append(l.out.Findings, finding{
		Level: checks[i].level, Check: check, File: e.File, Line: e.Line, Policy: e.Policy, Rule: e.Rule, Field: e.Field,
		Message: fmt.Sprintf(format, args...), Snippet: e.Snip,
	})
}

func (l *linter) policy(o *policy.Object, p *policy.Policy, coverage map[string]policytest.Coverage) error {
	for _, w := range p.Warnings {
		l.add("warning", w, "%s", w.Msg)
	}
	list, err := l.compiler.Inspect(p)
	if err != nil {
		return err
	}
	for i := range list {
		x := &list[i]
		at := func(field string) *policy.Error {
			return &policy.Error{File: o.File, Line: o.LineOf(field), Policy: p.FullName(), Rule: x.Rule.Spec.Name, Field: field}
		}
		l.condition(x, at)
		l.exceptions(x, at)
		cases := coverage[x.Rule.ID]
		switch {
		case cases.Positive == 0 && cases.Negative == 0:
			l.add("no-test", at(x.Field), "no case is about it")
		case cases.Positive == 0:
			l.add("no-test", at(x.Field), "no case expects it")
		case cases.Negative == 0:
			l.add("no-test", at(x.Field), "no case calls it quiet")
		}
		info := &x.Condition
		l.out.Rules = append(l.out.Rules, ruleReport{
			Rule: x.Rule.ID, File: o.File, Severity: string(x.Rule.Severity()), Mode: string(x.Rule.Mode), Cost: string(info.Cost), Indexed: info.Indexed,
			Texts: info.Atoms, Lazy: info.Lazy, Opaque: append([]string{}, info.Opaque...), Positive: cases.Positive, Negative: cases.Negative,
		})
	}
	return nil
}

// condition looks at the shape and the cost of a condition.
func (l *linter) condition(x *policy.Inspection, at func(string) *policy.Error) {
	info, field := &x.Condition, x.Field+".condition"
	constant := l.constant(info, field, at)
	for _, text := range info.Opaque {
		l.add("opaque", at(field), "only CEL can decide %s", short(text, 120))
	}
	if constant {
		return
	}
	if !info.Indexed {
		check := "no-index"
		frequent := slices.ContainsFunc(x.Rule.Spec.Events, func(k v1alpha1.EventKind) bool { return k == "Exec" || k == "Fork" || k == "Exit" })
		if frequent && (info.Cost == match.CostRegexp || info.Cost == match.CostOpaque) {
			check = "slow"
		}
		l.add(check, at(field), "no text is necessary for it: it is looked at for every %s event (cost: %s)", kinds(x.Rule), info.Cost)
	}
	for _, text := range info.Short {
		l.add("short-text", at(field), "it is looked at whenever %q is found, which is everywhere", text)
	}
}

// constant looks for what does not depend on the event, and says whether all
// of the expression is so.
func (l *linter) constant(info *match.Info, field string, at func(string) *policy.Error) bool {
	switch {
	case info.Always:
		l.add("always-true", at(field), "it is true for every event it looks at")
		return true
	case info.Never:
		l.add("never-true", at(field), "it is true for no event")
		return true
	}
	for _, odd := range info.Odd {
		what := "never"
		if odd.Value {
			what = "always"
		}
		place := ""
		if odd.Line > 0 {
			place = fmt.Sprintf("%d:%d: ", odd.Line, odd.Col)
		}
		l.add("constant-part", at(field), "%s%s is %s true", place, short(odd.Text, 120), what)
	}
	return false
}

func (l *linter) exceptions(x *policy.Inspection, at func(string) *policy.Error) {
	for i, e := range x.Rule.Spec.Exceptions {
		field := fmt.Sprintf("%s.exceptions[%d]", x.Field, i)
		l.constant(&x.Exceptions[i], field+".condition", at)
		if slices.Contains(x.Silent, i) && !x.Exceptions[i].Always {
			l.add("wide-exception", at(field+".condition"), "exception %s is true whenever the condition is: the rule never alerts", e.Name)
		}
		if e.ExpiresAt == nil {
			continue
		}
		until := e.ExpiresAt.Time
		switch left := until.Sub(l.now); {
		case left <= 0:
			l.add("expired", at(field+".expiresAt"), "exception %s ended %s", e.Name, until.UTC().Format(time.DateOnly))
		case left < soon:
			l.add("expires-soon", at(field+".expiresAt"), "exception %s ends %s", e.Name, until.UTC().Format(time.DateOnly))
		}
	}
}

func kinds(r *policy.Rule) string {
	var names []string
	for _, k := range r.Spec.Events {
		names = append(names, string(k))
	}
	return strings.Join(names, " and ")
}

// finish sorts, and says whether there is something of level or worse.
func (l *linter) finish(failOn level) (bad bool) {
	slices.SortStableFunc(l.out.Findings, func(a, b finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Check, b.Check), cmp.Compare(a.Message, b.Message))
	})
	for _, f := range l.out.Findings {
		bad = bad || f.Level == levelError || f.Level == levelWarning && failOn == levelWarning
	}
	l.out.OK = !bad && len(l.out.Errors) == 0
	return bad
}

func (l *linter) print(rules bool) {
	w, s := l.c.io.Out, l.c.style
	counts := map[level]int{}
	colours := map[level]string{levelError: red, levelWarning: yellow, levelNote: cyan}
	for _, f := range l.out.Findings {
		counts[f.Level]++
		place := f.File
		if f.Line > 0 {
			place += fmt.Sprintf(":%d", f.Line)
		}
		who := ""
		if f.Rule != "" {
			who = "rule " + f.Rule + ": "
		} else if f.Policy != "" {
			who = "policy " + f.Policy + ": "
		}
		if field := lastField(f.Field); field != "" {
			who += field + ": "
		}
		fmt.Fprintf(w, "%s: %s: %s%s %s\n", s.in(bold, place), s.in(colours[f.Level], string(f.Level)), who, f.Message, s.in(dim, "["+f.Check+"]"))
		if f.Snippet != "" {
			fmt.Fprintln(w, s.in(dim, f.Snippet))
		}
	}
	if rules {
		l.printRules()
	}
	for _, e := range l.out.Errors {
		fmt.Fprintln(l.c.io.Err, e)
	}
	sum := fmt.Sprintf("%s, %s: %s, %s, %s", count(l.out.Files, "file"), count(len(l.out.Rules), "rule"),
		count(counts[levelError], "error"), count(counts[levelWarning], "warning"), count(counts[levelNote], "note"))
	if l.out.Skipped > 0 {
		sum += "; " + count(l.out.Skipped, "file") + " of YAML without a policy left out"
	}
	code := green
	if !l.out.OK {
		code = red
	}
	fmt.Fprintln(w, s.in(code, sum))
}

func (l *linter) printRules() {
	w, s := l.c.io.Out, l.c.style
	fmt.Fprintln(w, s.in(bold, fill("rule", 60)+"  "+fill("severity", 13)+"  cost     texts  lazy  opaque  cases +/-"))
	for _, r := range l.out.Rules {
		fmt.Fprintf(w, "%s  %s  %s %6d %5d %7d  %d/%d\n", fill(r.Rule, 60), fill(r.Severity, 13), fill(r.Cost, 8), r.Texts, r.Lazy, len(r.Opaque),
			r.Positive, r.Negative)
	}
}

// lastField is the end of a field's path, which is enough beside a line.
func lastField(field string) string {
	if strings.HasPrefix(field, "spec.rules[") && !strings.Contains(field, "].") {
		return "" // the rule itself
	}
	if i := strings.Index(field, "]."); i >= 0 && strings.HasPrefix(field, "spec.") {
		return field[i+2:]
	}
	return strings.TrimPrefix(field, "spec.")
}

var _ fs.FS = osFS{}

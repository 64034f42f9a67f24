package author

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
	"github.com/procession-dev/procession/internal/policy/policytest"
	"github.com/procession-dev/procession/internal/present"
)

const explainHelp = `
Says why an event matches a rule or does not, term by term, with the values that
were compared: true, false, or undecided because a fact is missing.

  agent events --format json --duration 10s > events.json     as root
  {policy} explain my-rules.yaml --event events.json --rule shell-to-network
  {policy} explain policies/ --event alert.json --matching    which rules match?
  tail -1 alerts.ndjson | {policy} explain policies/ --event -
  {policy} explain my-rules.yaml --event my-rules.test.yaml --number 3

The event is JSON as agent and collector print events and alerts (one or more), or
YAML or JSON as in a file of test cases; - is standard input. Of several events
--number picks one. Threshold, aggregation and rate limits look at more than one
event and are left out here; "{policy} test" and "replay" show them.

What an event's JSON does not tell is missing: of ancestors it has no file mode
and no namespaces, and "agent events" prints the parent only. An alert has them all.

Exit codes: 0 explained, whatever the outcome; 2 something could not be read or
compiled, or there is no such rule.
`

// An explained is what explain --format json writes of one event.
type explained struct {
	Event int             `json:"event"` // its number in the file, from 1
	Kind  string          `json:"kind"`
	Rules []explainedRule `json:"rules"`
}

type explainedRule struct {
	Rule       string          `json:"rule"`
	Outcome    policy.Outcome  `json:"outcome"`
	Why        string          `json:"why,omitempty"`
	Alert      bool            `json:"alert"`
	Severity   string          `json:"severity"`
	Mode       string          `json:"mode"`
	Message    string          `json:"message,omitempty"`
	Terms      []termView      `json:"terms"`
	Exceptions []explainedExpt `json:"exceptions"`
}

type explainedExpt struct {
	Name    string     `json:"name"`
	Reason  string     `json:"reason"`
	Expired bool       `json:"expired,omitempty"`
	Truth   string     `json:"truth"`
	Error   string     `json:"error,omitempty"`
	Terms   []termView `json:"terms"`
}

type termView struct {
	Text    string   `json:"text"`
	In      string   `json:"in,omitempty"` // variables.NAME
	Line    int      `json:"line,omitempty"`
	Column  int      `json:"column,omitempty"`
	Truth   string   `json:"truth"`
	Negated bool     `json:"negated,omitempty"` // it stands below a "not"
	Error   string   `json:"error,omitempty"`
	Found   []string `json:"found,omitempty"`
	Values  []value  `json:"values"`
}

type value struct {
	Name    string `json:"name"`
	Value   string `json:"value,omitempty"`
	Missing bool   `json:"missing,omitempty"`
}

func explainCommand(args []string, io IO) error {
	c := newCommand("explain", io)
	file := c.flags.String("event", "", "`FILE` with the event, - for standard input")
	number := c.flags.Int("number", 0, "explain the n-th event of the file only; 0 is all of them")
	rule := c.flags.String("rule", "", "explain this rule only: `NAME`, or POLICY/NAME")
	matching := c.flags.Bool("matching", false, "leave out the rules that were not asked and those that are surely false")
	node := c.flags.String("node", "", "what node.name is")
	paths, err := c.parse(args, "POLICY... --event FILE", explainHelp)
	switch {
	case err != nil:
		return err
	case len(paths) == 0:
		return usagef("a policy is missing; %s explain --help explains", io.Name)
	case *file == "":
		return usagef("--event is missing; %s explain --help explains", io.Name)
	case *file == stdin && slices.Contains(paths, stdin):
		return usagef("policy and event cannot both come from standard input")
	}
	data, err := c.read(*file, policytest.MaxFileBytes)
	if err != nil {
		return unreadableError{err}
	}
	events, err := policytest.ParseEvents(data)
	if err != nil {
		return unreadableError{fmt.Errorf("%s: %w", *file, err)}
	}
	if *number < 0 || *number > len(events) {
		return usagef("--number: %s has %s, there is no number %d", *file, count(len(events), "event"), *number)
	}
	compiler, err := policy.NewCompiler()
	if err != nil {
		return err
	}
	set, err := c.set(compiler, paths)
	if err != nil {
		return err
	}
	keep, err := chosen(set, *rule)
	if err != nil {
		return err
	}
	out := []explained{}
	for i, ev := range events {
		if *number > 0 && i+1 != *number {
			continue
		}
		list, err := compiler.Explain(set, ev, policy.Config{Node: *node})
		if err != nil {
			return err
		}
		list = slices.DeleteFunc(list, func(x policy.Explanation) bool {
			return !keep(x.Rule) || *matching && (x.Outcome == policy.OutcomeNotAsked || x.Outcome == policy.OutcomeNoMatch)
		})
		if c.format == "json" {
			out = append(out, explainJSON(i+1, ev, list))
			continue
		}
		if len(out) > 0 || i > 0 && *number == 0 {
			fmt.Fprintln(io.Out)
		}
		c.printExplained(i+1, ev, list)
	}
	if c.format == "json" {
		return c.json(out)
	}
	return nil
}

// chosen selects rules by the name of one; all without.
func chosen(set *policy.Set, name string) (func(*policy.Rule) bool, error) {
	is := func(r *policy.Rule) bool {
		return name == "" || r.Spec.Name == name || r.Policy+"/"+r.Spec.Name == name || r.ID == name
	}
	if !slices.ContainsFunc(set.Rules(), is) {
		var names []string
		for _, r := range set.Rules() {
			names = append(names, r.Spec.Name)
		}
		return nil, usagef("--rule: there is no rule %.80q; %s", name, celenv.Meant(name, names))
	}
	return is, nil
}

func explainJSON(number int, ev *event.Event, list []policy.Explanation) explained {
	out := explained{Event: number, Kind: ev.Kind.String(), Rules: []explainedRule{}}
	for _, x := range list {
		r := explainedRule{Rule: x.Rule.ID, Outcome: x.Outcome, Why: x.Why, Alert: x.Alert, Severity: string(x.Rule.Severity()),
			Mode: string(x.Rule.Mode), Message: x.Message, Terms: terms(x.Terms), Exceptions: []explainedExpt{}}
		for _, e := range x.Exceptions {
			r.Exceptions = append(r.Exceptions, explainedExpt{Name: e.Name, Reason: e.Reason, Expired: e.Expired, Truth: e.Truth.String(),
				Error: text(e.Err), Terms: terms(e.Terms)})
		}
		out.Rules = append(out.Rules, r)
	}
	return out
}

func terms(list []match.Term) []termView {
	out := []termView{}
	for _, t := range list {
		x := termView{Text: t.Text, In: t.In, Line: t.Line, Column: t.Col, Truth: t.Truth.String(), Negated: t.Negated, Error: text(t.Err), Found: t.Found, Values: []value{}}
		for _, v := range t.Values {
			x.Values = append(x.Values, value{v.Name, v.Text, v.Missing})
		}
		out = append(out, x)
	}
	return out
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func (c *command) printExplained(number int, ev *event.Event, list []policy.Explanation) {
	w, s := c.io.Out, c.style
	line := present.Style{Color: s.color, Zone: time.UTC, Width: s.width}
	b := alert.Builder{}
	fmt.Fprintf(w, "%s\n  %s\n", s.in(bold, fmt.Sprintf("event %d: %s", number, ev.Kind)), strings.TrimSpace(string(line.AppendEventLine(nil, b.Event(ev, 1)))))
	others := map[string]int{}
	for _, x := range list {
		if x.Outcome == policy.OutcomeNotAsked {
			others[x.Why]++
			if len(list) > 1 {
				continue
			}
		}
		fmt.Fprintf(w, "\n%s: %s%s\n", s.in(bold, x.Rule.ID), s.in(outcomeColour(x.Outcome), string(x.Outcome)), outcomeNote(&x))
		if x.Message != "" {
			fmt.Fprintf(w, "  message    %s\n", x.Message) // escaped by who made it
		}
		c.printTerms("  ", x.Terms)
		for _, e := range x.Exceptions {
			note := ""
			if e.Expired {
				note = " (expired: it does nothing any more)"
			}
			fmt.Fprintf(w, "  %s exception %s%s: %s\n", c.truth(e.Truth), e.Name, note, safe(short(e.Reason, 120)))
			c.printTerms("    ", e.Terms)
		}
	}
	if len(list) > 1 {
		c.printNotAsked(others)
	}
	if len(list) == 0 {
		fmt.Fprintln(w, "\nno rule matches")
	}
}

func (c *command) printNotAsked(others map[string]int) {
	whys := make([]string, 0, len(others))
	for why := range others {
		whys = append(whys, why)
	}
	slices.Sort(whys)
	for i, why := range whys {
		if i == 0 {
			fmt.Fprintln(c.io.Out)
		}
		fmt.Fprintln(c.io.Out, c.style.in(dim, count(others[why], "rule")+" not asked: "+why))
	}
}

func outcomeColour(o policy.Outcome) string {
	switch o {
	case policy.OutcomeMatch:
		return red
	case policy.OutcomeUndecided, policy.OutcomeFailed:
		return yellow
	case policy.OutcomeExcepted:
		return cyan
	}
	return green
}

// outcomeNote says what follows from an outcome.
func outcomeNote(x *policy.Explanation) string {
	var notes []string
	if x.Why != "" {
		notes = append(notes, x.Why)
	}
	switch {
	case x.Alert && x.Rule.Mode == "DryRun":
		notes = append(notes, "dry run: only who asks is told")
	case x.Alert && x.Outcome != policy.OutcomeMatch:
		notes = append(notes, "onUndecided: an alert of severity "+string(x.Rule.Severity()))
	case x.Alert:
		notes = append(notes, "an alert of severity "+string(x.Rule.Severity()))
	}
	if len(notes) == 0 {
		return ""
	}
	return " (" + strings.Join(notes, "; ") + ")"
}

func (c *command) truth(t celenv.Truth) string {
	code := map[celenv.Truth]string{celenv.True: green, celenv.False: dim, celenv.Undecided: yellow, celenv.Failed: yellow}[t]
	return c.style.in(code, fill(t.String(), 9))
}

func (c *command) printTerms(indent string, list []match.Term) {
	w := c.io.Out
	in := ""
	for _, t := range list {
		if t.In != in {
			if in = t.In; in != "" {
				fmt.Fprintf(w, "%s%s %s\n", indent, fill("", 9), c.style.in(dim, in+":"))
			}
		}
		not := ""
		if t.Negated {
			not = c.style.in(dim, "  (below a not)")
		}
		pad := indent
		if t.In != "" {
			pad += "  "
		}
		fmt.Fprintf(w, "%s%s %s%s\n", pad, c.truth(t.Truth), short(t.Text, 160), not)
		for _, v := range t.Values {
			got := c.style.in(yellow, "missing")
			if !v.Missing {
				got = safe(short(v.Text, 200))
			}
			fmt.Fprintf(w, "%s%s   %s\n", pad, fill("", 9), c.style.in(dim, v.Name+" = ")+got)
		}
		if len(t.Found) > 0 && len(t.Found) < 20 {
			fmt.Fprintf(w, "%s%s   %s\n", pad, fill("", 9), c.style.in(dim, "found ")+safe(strings.Join(t.Found, ", ")))
		}
		if t.Err != nil {
			fmt.Fprintf(w, "%s%s   %s\n", pad, fill("", 9), c.style.in(yellow, safe(t.Err.Error())))
		}
	}
}

package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

func inspected(t *testing.T, c *Compiler, rules string) (*Set, []Inspection) {
	t.Helper()
	objects, err := Parse("p.yaml", []byte("apiVersion: procession.dev/v1alpha1\nkind: ClusterDetectionPolicy\nmetadata: {name: p}\nspec:\n"+
		"  lists: [{name: tools, values: [nc, ncat]}]\n  variables: [{name: isTool, expression: process.name in lists.tools}]\n  rules:\n"+rules))
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Compile(objects[0])
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSet(p)
	if err != nil {
		t.Fatal(err)
	}
	list, err := c.Inspect(p)
	if err != nil {
		t.Fatal(err)
	}
	if n := objects[0].LineOf("spec.rules[0].condition"); n == 0 {
		t.Error("the line of the first condition is not known")
	}
	return s, list
}

// An exception that is true whenever the condition is silences the rule.
func TestSilentExceptions(t *testing.T) {
	c, err := NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		condition, exception string
		silent               bool
	}{
		{"process.exe == '/usr/bin/nc'", "process.exe.startsWith('/usr/')", true},
		{"process.exe == '/usr/bin/nc'", "process.exe.endsWith('nc')", true},
		{"process.exe == '/usr/bin/nc'", "process.exe.contains('bin')", true},
		{"process.exe == '/usr/bin/nc'", "process.exe in ['/usr/bin/nc', '/bin/nc']", true},
		{"process.exe == '/usr/bin/nc'", "process.exe == '/bin/nc'", false},
		{"process.exe in ['/usr/bin/nc', '/bin/nc']", "process.exe == '/bin/nc'", false},
		{"process.exe.startsWith('/usr/bin/')", "process.exe.startsWith('/usr/')", true},
		{"process.exe.startsWith('/usr/')", "process.exe.startsWith('/usr/bin/')", false},
		{"process.exe.startsWith('/usr/')", "process.exe.endsWith('/usr/')", false},
		{"process.exe.contains('nc')", "process.exe.startsWith('nc')", false},
		{"process.exe.contains('/nc')", "process.cmdline.contains('nc')", false},
		{"process.name == 'nc' && process.uid == 0", "process.uid == 0", true},
		{"process.name == 'nc' && process.uid == 0", "process.uid == 0 && process.name == 'nc'", true},
		{"process.name == 'nc' && process.uid == 0", "process.uid == 0 && parent.name == 'cron'", false},
		{"process.name == 'nc' || process.uid == 0", "process.uid == 0", false},
		{"process.name == 'nc' || process.uid == 0", "process.uid == 0 || process.name.startsWith('n')", true},
		{"variables.isTool && process.uid == 7", "process.name in ['nc', 'ncat', 'socat']", true},
		{"process.name == 'nc' && process.uid == 7", "variables.isTool", true},
		{"process.uid == 7 && process.args.exists(a, a == '-e')", "process.args.exists(a, a.startsWith('-'))", true},
		{"process.uid == 7", "process.uid == 8", false},
		{"process.uid == 7 && process.name != 'x'", "process.name != 'x'", true},
		{"process.cmdline.lowerAscii().contains('abc')", "process.cmdline.contains('abc')", false},
		{"process.cmdline.lowerAscii().contains('abcd')", "process.cmdline.lowerAscii().contains('abc')", true},
		{"process.cmdline.matches('a+b') && process.uid == 0", "process.cmdline.matches('a+b')", true},
		{"process.cmdline.matches('a+b') && process.uid == 0", "process.cmdline.matches('a+c')", false},
	} {
		_, list := inspected(t, c, fmt.Sprintf("    - {name: r, events: [Exec], severity: Low, condition: %q, exceptions: [{name: x, reason: for the test, condition: %q}]}\n",
			tt.condition, tt.exception))
		if got := len(list[0].Silent) == 1; got != tt.silent {
			t.Errorf("%s\nexcept %s: silent is %v, want %v", tt.condition, tt.exception, got, tt.silent)
		}
	}
}

// What is explained is what the engine does, whatever becomes of the event.
func TestExplainAgreesWithTheEngine(t *testing.T) {
	c, err := NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	set, _ := inspected(t, c, `    - {name: matches, events: [Exec], severity: High, condition: variables.isTool, messageExpression: "'a ' + process.name"}
    - {name: not-true, events: [Exec], severity: High, condition: process.name == 'sh'}
    - {name: other-kind, events: [Exit, CoreDump], severity: High, condition: process.name == 'nc'}
    - {name: disabled, events: [Exec], severity: High, mode: Disabled, condition: process.name == 'nc'}
    - {name: dry, events: [Exec], severity: High, mode: DryRun, condition: process.name == 'nc'}
    - {name: missing, events: [Exec], severity: High, condition: process.exe == '/nc'}
    - {name: missing-alerts, events: [Exec], severity: High, onUndecided: Alert, condition: process.exe == '/nc'}
    - {name: fails, events: [Exec], severity: High, condition: "process.args[7] == 'x'"}
    - {name: excepted, events: [Exec], severity: High, condition: process.name == 'nc', exceptions: [{name: never, reason: is never true, condition: process.uid == 7}, {name: always, reason: is always so, condition: process.uid == 0}]}
    - {name: over, events: [Exec], severity: High, condition: process.name == 'nc', exceptions: [{name: old, reason: was true once, condition: process.uid == 0, expiresAt: 2020-01-01T00:00:00Z}]}
    - {name: unsure, events: [Exec], severity: High, condition: process.name == 'nc', exceptions: [{name: maybe, reason: nobody knows it, condition: process.cwd == '/'}]}
`)
	p := &event.Process{PID: 7, Name: "nc", Cmdline: "nc\x00"}
	for _, f := range []event.Field{event.FieldName, event.FieldArgs, event.FieldIDs} {
		p.Sources[f] = event.SourceRecord
	}
	ev := &event.Event{Kind: event.Exec, Process: p, Time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	list, err := c.Explain(set, ev, Config{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	alerts := map[string]bool{}
	for _, x := range list {
		line := x.Rule.Spec.Name + ": " + string(x.Outcome)
		if x.Why != "" {
			line += " (" + x.Why + ")"
		}
		for _, e := range x.Exceptions {
			line += fmt.Sprintf(" [%s %s expired=%v]", e.Name, e.Truth, e.Expired)
		}
		got = append(got, line)
		alerts[x.Rule.Spec.Name] = x.Alert
		if x.Alert != (x.Message != "") {
			t.Errorf("%s: alert %v, message %q", x.Rule.Spec.Name, x.Alert, x.Message)
		}
	}
	want := []string{
		"matches: match", "not-true: no match", "other-kind: not asked (it looks at Exit, CoreDump events only)", "disabled: not asked (it is disabled)",
		"dry: match", "missing: undecided (a fact is missing)", "missing-alerts: undecided (a fact is missing)", "fails: failed (index out of bounds: 7)",
		"excepted: excepted (exception always) [never false expired=false] [always true expired=false]",
		"over: match [old true expired=true]", "unsure: match [maybe undecided expired=false]",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}

	raised := map[string]bool{}
	engine := NewEngine(c, Config{DryRun: func(m *Match) { raised[m.Rule.Spec.Name] = true }})
	if err := engine.Swap(set); err != nil {
		t.Fatal(err)
	}
	engine.Evaluate(ev, func(m *Match) { raised[m.Rule.Spec.Name] = true })
	for name, alert := range alerts {
		if raised[name] != alert {
			t.Errorf("%s: explained as alert %v, the engine says %v", name, alert, raised[name])
		}
	}
}

// Each term says what it was, and what was compared.
func TestExplainTerms(t *testing.T) {
	c, err := NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	set, _ := inspected(t, c, "    - {name: r, events: [Exec], severity: High, condition: variables.isTool && process.uid == 7}\n")
	p := &event.Process{PID: 7, Name: "nc"}
	p.Sources[event.FieldName] = event.SourceRecord
	list, err := c.Explain(set, &event.Event{Kind: event.Exec, Process: p}, Config{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, x := range list[0].Terms {
		line := x.Truth.String() + " " + x.Text
		for _, v := range x.Values {
			line += fmt.Sprintf(" %s=%q missing=%v", v.Name, v.Text, v.Missing)
		}
		got = append(got, line)
	}
	all := strings.Join(got, "\n")
	if len(list[0].Terms) < 2 || !strings.Contains(all, `process.name="nc" missing=false`) || !strings.Contains(all, `process.uid="" missing=true`) ||
		list[0].Terms[0].Truth != celenv.True {
		t.Errorf("the terms are:\n%s", all)
	}
}

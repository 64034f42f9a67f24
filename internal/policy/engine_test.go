package policy

import (
	"bytes"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// mustSet compiles policies, given as the text after the head.
func mustSet(t testing.TB, c *Compiler, texts ...string) *Set {
	t.Helper()
	var policies []*Policy
	for i, text := range texts {
		objects, err := Parse(fmt.Sprintf("f%d", i), []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			p, err := c.Compile(o)
			if err != nil {
				t.Fatal(err)
			}
			policies = append(policies, p)
		}
	}
	s, err := NewSet(policies...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustCompiler(t testing.TB) *Compiler {
	t.Helper()
	c, err := NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func execOf(uid uint32, missing ...event.Field) *event.Event {
	p := &event.Process{PID: 7, PPID: 1, IDs: event.IDs{UID: uid, EUID: uid}, Name: "sh", Exe: "/bin/sh", Cwd: "/w",
		Cmdline: "sh\x00-c\x00id\x00", CmdlineLen: 9, Workload: &event.Workload{Place: event.PlaceHost}}
	for f := range p.Sources {
		p.Sources[f] = event.SourceRecord
	}
	for _, f := range missing {
		p.Sources[f] = event.SourceNone
	}
	return &event.Event{Kind: event.Exec, Process: p, Time: noon}
}

const countedPolicy = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: counted, generation: 3}
spec:
  rules:
    - name: plain
      title: User seven
      events: [Exec]
      severity: High
      condition: process.uid == 7
      mitre: [{tactic: execution, technique: T1059}]
      tags: [a]
    - name: excepted
      events: [Exec]
      severity: Low
      condition: process.uid == 7
      messageExpression: "'uid ' + string(process.uid) + ' runs ' + process.exe"
      exceptions:
        - {name: shell, condition: process.exe == '/bin/sh', reason: because it is}
        - {name: expired, condition: "true", reason: because it was, expiresAt: "2026-06-01T12:00:00Z"}
        - {name: not-yet, condition: process.name == 'x', reason: because it will, expiresAt: "2026-06-01T12:00:01Z"}
    - name: loud
      events: [Exec]
      severity: Low
      condition: process.uid == 7
      onUndecided: Alert
    - name: dry
      events: [Exec]
      severity: Low
      mode: DryRun
      condition: process.uid == 7
    - name: "off"
      events: [Exec]
      severity: Low
      mode: Disabled
      condition: "true"
    - name: failing
      events: [Exec]
      severity: Low
      condition: process.args[process.uid] == 'nothing'
      messageExpression: "process.args[9]"
    - name: speechless
      events: [Exec]
      severity: Low
      title: Fallback
      condition: process.uid == 7
      messageExpression: "process.args[9]"
`

// One event after the other, and what each rule makes of them.
func TestCounts(t *testing.T) {
	c := mustCompiler(t)
	var alerts, dry []*Match
	var log bytes.Buffer
	e := NewEngine(c, Config{DryRun: func(m *Match) { dry = append(dry, m) }, Log: slog.New(slog.NewTextHandler(&log, nil))})
	emit := func(m *Match) { alerts = append(alerts, m) }
	e.Evaluate(execOf(7), emit) // without rules nothing happens
	e.Swap(mustSet(t, c, countedPolicy))
	e.Evaluate(execOf(1), emit)
	e.Evaluate(execOf(7), emit)
	e.Evaluate(execOf(7, event.FieldIDs), emit)
	e.Evaluate(execOf(7, event.FieldExe), emit)
	e.Evaluate(execOf(7, event.FieldArgs), emit)
	e.Evaluate(&event.Event{Kind: event.Fork, Process: execOf(7).Process, Time: noon}, emit) // no rule's kind

	var got []string
	for _, s := range e.Stats() {
		line := fmt.Sprintf("%s: %d = %d false + %d true + %d suppressed + %d undecided + %d failed; %d + %d undecided = %d alerts + %d dry; unsure %d, message %d",
			s.Rule.Spec.Name, s.Evaluated, s.NotMatched, s.Matched, s.Suppressed, s.Undecided, s.Errors,
			s.Matched, s.UndecidedAlerts, s.Alerts, s.DryRun, s.UnsureExceptions, s.MessageErrors)
		for _, x := range s.Exceptions {
			line += fmt.Sprintf(" %s=%d", x.Name, x.Hits)
		}
		got = append(got, line)
		if s.Evaluated != s.NotMatched+s.Matched+s.Suppressed+s.Undecided+s.Errors || s.Matched+s.UndecidedAlerts != s.Alerts+s.DryRun {
			t.Errorf("%s does not add up: %+v", s.Rule.ID, s)
		}
		if (s.Matched > 0) != s.LastMatch.Equal(noon) {
			t.Errorf("%s: last match %v", s.Rule.ID, s.LastMatch)
		}
		if (s.Errors > 0) != (s.LastError != "") {
			t.Errorf("%s: %d errors, the last one %q", s.Rule.ID, s.Errors, s.LastError)
		}
	}
	if d := cmp.Diff([]string{
		"plain: 5 = 1 false + 3 true + 0 suppressed + 1 undecided + 0 failed; 3 + 0 undecided = 3 alerts + 0 dry; unsure 0, message 0",
		"excepted: 5 = 1 false + 1 true + 3 suppressed + 0 undecided + 0 failed; 1 + 0 undecided = 1 alerts + 0 dry; unsure 1, message 0 shell=3 expired=0 not-yet=0",
		"loud: 5 = 1 false + 3 true + 0 suppressed + 1 undecided + 0 failed; 3 + 1 undecided = 4 alerts + 0 dry; unsure 0, message 0",
		"dry: 5 = 1 false + 3 true + 0 suppressed + 1 undecided + 0 failed; 3 + 0 undecided = 0 alerts + 3 dry; unsure 0, message 0",
		"off: 0 = 0 false + 0 true + 0 suppressed + 0 undecided + 0 failed; 0 + 0 undecided = 0 alerts + 0 dry; unsure 0, message 0",
		"failing: 5 = 1 false + 0 true + 0 suppressed + 2 undecided + 2 failed; 0 + 0 undecided = 0 alerts + 0 dry; unsure 0, message 0",
		"speechless: 5 = 1 false + 3 true + 0 suppressed + 1 undecided + 0 failed; 3 + 0 undecided = 3 alerts + 0 dry; unsure 0, message 3",
	}, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if len(alerts) != 3+1+4+3 || len(dry) != 3 {
		t.Errorf("%d alerts, %d dry", len(alerts), len(dry))
	}
	for _, m := range dry {
		if !m.DryRun || m.Rule.Spec.Name != "dry" {
			t.Errorf("%+v", m)
		}
	}
	if n := strings.Count(log.String(), "rule failed"); n != 1 || !strings.Contains(log.String(), "rule=ClusterDetectionPolicy//counted/failing") {
		t.Errorf("the log tells %d failures:\n%s", n, &log)
	}
}

func TestMatch(t *testing.T) {
	c := mustCompiler(t)
	set := mustSet(t, c, countedPolicy)
	e := NewEngine(c, Config{})
	e.Swap(set)
	byRule := func(ev *event.Event) map[string]*Match {
		out := map[string]*Match{}
		e.Evaluate(ev, func(m *Match) { out[m.Rule.Spec.Name] = m })
		return out
	}
	m := byRule(execOf(7))["plain"]
	if m.Rule.ID != "ClusterDetectionPolicy//counted/plain" || m.Rule.Title != "User seven" || m.Rule.Severity() != "High" ||
		m.Rule.Generation != 3 || len(m.Rule.Digest) != 64 || len(m.Rule.Mitre()) != 1 || len(m.Rule.Tags()) != 1 {
		t.Errorf("rule: %+v", m.Rule)
	}
	seven := Evidence{Name: "process.uid", Text: "7", Term: "process.uid == 7", Truth: "true"}
	for _, tt := range []struct {
		rule string
		ev   *event.Event
		want Match
	}{
		{"plain", execOf(7), Match{Message: "User seven", Evidence: []Evidence{seven}}},
		{"loud", execOf(7, event.FieldIDs), Match{Message: "loud", Undecided: true, Evidence: []Evidence{{Name: "process.uid", Missing: true, Term: "process.uid == 7", Truth: "undecided"}}}},
		{"excepted", execOf(7, event.FieldExe), Match{Message: "uid 7 runs ?", Undecided: true,
			Evidence: []Evidence{seven,
				{Exception: "shell", Term: "process.exe == '/bin/sh'", Truth: "undecided"},
				{Name: "process.exe", Missing: true, Exception: "shell", Term: "process.exe == '/bin/sh'", Truth: "undecided"},
				{Exception: "not-yet", Term: "process.name == 'x'", Truth: "false"}}}},
		{"speechless", execOf(7), Match{Message: "Fallback", Evidence: []Evidence{seven}}},
	} {
		got := byRule(tt.ev)[tt.rule]
		if got == nil {
			t.Errorf("%s did not match", tt.rule)
			continue
		}
		if d := cmp.Diff(tt.want, *got, cmpopts.IgnoreFields(Match{}, "Rule", "Event")); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.rule, d)
		}
	}
}

// Whatever a process calls itself: what goes into an alert is bounded, and
// the message harms no terminal.
func TestHostileText(t *testing.T) {
	c := mustCompiler(t)
	e := NewEngine(c, Config{})
	e.Swap(mustSet(t, c, withRule("      condition: process.cmdline != '' && process.exe != ''\n      messageExpression: process.exe + ' ' + process.cmdline\n")))
	for _, hostile := range []string{
		"\x1b]0;pwned\x07\x1b[2J", "a\nb\r\tc\x00d", "\u202egnp.exe\u2066", "\xff\xfe\xc3", strings.Repeat("\x1b", 1<<20),
		strings.Repeat("é", 1<<18), "\u200b\ufeff\U000e0041",
	} {
		ev := execOf(7)
		ev.Process.Exe, ev.Process.Cmdline = hostile, hostile
		n := 0
		e.Evaluate(ev, func(m *Match) {
			n++
			if len(m.Message) > MaxMessage || !utf8.ValidString(m.Message) || strings.ContainsAny(m.Message, "\x00\x1b\x07\n\r\t\u202e\u2066\u200b\ufeff\U000e0041") {
				t.Errorf("message of %.40q: %d bytes: %.200q", hostile, len(m.Message), m.Message)
			}
			for _, x := range m.Evidence {
				if len(x.Text) > MaxEvidence+8 || !utf8.ValidString(x.Text) {
					t.Errorf("evidence of %.40q: %s: %d bytes", hostile, x.Name, len(x.Text))
				}
			}
		})
		if n != 1 {
			t.Errorf("%.40q matched %d times", hostile, n)
		}
	}
}

// Containers, hosts, and what cannot be told.
func TestScope(t *testing.T) {
	c := mustCompiler(t)
	policyFor := func(name, scope string) string {
		return strings.Replace(strings.Replace(withRule("      condition: \"true\"\n"), "name: p", "name: "+name, 1), "spec:\n", "spec:\n  scope: {"+scope+"}\n", 1)
	}
	set := mustSet(t, c, policyFor("any", ""), policyFor("both", "targets: [Containers, Host]"), policyFor("containers", "targets: [Containers]"), policyFor("host", "targets: [Host]"))
	e := NewEngine(c, Config{})
	e.Swap(set)
	for _, tt := range []struct {
		name string
		w    *event.Workload
		want string
	}{
		{"not resolved", nil, "any both containers host"},
		{"unknown", &event.Workload{}, "any both containers host"},
		{"host", &event.Workload{Place: event.PlaceHost}, "any both host"},
		{"container", &event.Workload{Place: event.PlaceContainer}, "any both containers"},
		{"out of range", &event.Workload{Place: 77}, "any both containers host"},
	} {
		ev := execOf(1)
		ev.Process.Workload = tt.w
		var got []string
		e.Evaluate(ev, func(m *Match) { got = append(got, m.Rule.Policy) })
		if g := strings.Join(got, " "); g != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, g, tt.want)
		}
	}
	e.Evaluate(&event.Event{Kind: 200, Process: execOf(1).Process}, func(m *Match) { t.Errorf("a kind that does not exist: %v", m) })
	if k := set.Kinds(); k != event.KindSet(event.Exec) {
		t.Errorf("kinds: %b", k)
	}
}

// A whole policy in dry run, or disabled.
func TestPolicyModes(t *testing.T) {
	c := mustCompiler(t)
	for mode, want := range map[string]string{"Alert": "r=Alert s=Disabled", "DryRun": "r=DryRun s=Disabled", "Disabled": "r=Disabled s=Disabled"} {
		text := strings.Replace(withRule("      condition: \"true\"\n    - {name: s, events: [Exec], severity: Low, mode: Disabled, condition: \"true\"}\n"), "spec:\n", "spec:\n  mode: "+mode+"\n", 1)
		var got []string
		for _, r := range mustSet(t, c, text).Rules() {
			got = append(got, r.Spec.Name+"="+string(r.Mode))
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%s: got %s, want %s", mode, g, want)
		}
	}
	text := strings.Replace(withRule("      condition: \"true\"\n      mode: Alert\n"), "spec:\n", "spec:\n  mode: DryRun\n", 1)
	if r := mustSet(t, c, text).Rules()[0]; r.Mode != "Alert" {
		t.Errorf("a rule that overrides dry run is %s", r.Mode)
	}
}

// A rule that panics is one failed rule: the ones before and after go on, and
// a match whose message panics is not lost.
func TestPanic(t *testing.T) {
	c := mustCompiler(t)
	rule := "    - {name: %s, events: [Exec], severity: Low, onUndecided: %s, condition: \"true\", messageExpression: \"'m'\", exceptions: [{name: x, condition: \"false\", reason: because it is}]}\n"
	set := mustSet(t, c, head+"spec:\n  rules:\n"+fmt.Sprintf(rule, "a", "Skip")+fmt.Sprintf(rule, "b", "Skip")+fmt.Sprintf(rule, "c", "Alert")+
		fmt.Sprintf(rule, "d", "Skip")+fmt.Sprintf(rule, "e", "Skip"))
	set.rules[1].condition = new(celenv.Expr) // without a program: a nil pointer
	set.rules[2].exceptions[0].applies = new(celenv.Expr)
	set.rules[3].message = new(celenv.Expr)
	e := NewEngine(c, Config{})
	e.Swap(set)
	var got []string
	e.Evaluate(execOf(1), func(m *Match) { got = append(got, fmt.Sprint(m.Rule.Spec.Name, " ", m.Message, " ", m.Undecided)) })
	if d := cmp.Diff([]string{"a m false", "c m true", "d d false", "e m false"}, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for i, s := range e.Stats() {
		panicked := i == 1 || i == 2 // in the condition, in an exception: that one then does not silence
		if (s.Errors == 1) != (i == 1) || (s.UnsureExceptions == 1) != (i == 2) || strings.Contains(s.LastError, "panic: ") != panicked ||
			s.Evaluated != 1 || (s.MessageErrors == 1) != (i == 3) {
			t.Errorf("%s: %+v", s.Rule.ID, s)
		}
	}
	// A panic of the receiver is not ours to hide.
	defer func() {
		if recover() == nil {
			t.Error("a panic of emit was swallowed")
		}
	}()
	e.Evaluate(execOf(1), func(*Match) { panic("receiver") })
}

// Counts go on when a rule comes again in another set.
func TestSwapKeepsCounts(t *testing.T) {
	c := mustCompiler(t)
	e := NewEngine(c, Config{})
	counts := func() string {
		var out []string
		for _, s := range e.Stats() {
			line := fmt.Sprintf("%s/%s=%d", s.Rule.Policy, s.Rule.Spec.Name, s.Evaluated)
			for _, x := range s.Exceptions {
				line += fmt.Sprintf(" %s=%d", x.Name, x.Hits)
			}
			out = append(out, line)
		}
		return strings.Join(out, ", ")
	}
	exception := "      exceptions: [{name: %s, condition: \"true\", reason: because it is}]\n"
	first := withRule("      condition: \"true\"\n" + fmt.Sprintf(exception, "x"))
	second := strings.Replace(first, "name: p", "name: q", 1)
	for _, step := range []struct {
		set  *Set
		want string
	}{
		{mustSet(t, c, first), "p/r=1 x=1"},
		{mustSet(t, c, first, second), "p/r=2 x=2, q/r=1 x=1"},
		{mustSet(t, c, withRule("      condition: \"true\"\n"+fmt.Sprintf(exception, "z")), second), "p/r=3 z=1, q/r=2 x=2"},
		{mustSet(t, c, second), "q/r=3 x=3"},
		{mustSet(t, c, first, second), "p/r=1 x=1, q/r=4 x=4"},
	} {
		e.Swap(step.set)
		e.Evaluate(execOf(1), func(m *Match) { t.Errorf("%+v", m) })
		if got := counts(); got != step.want {
			t.Errorf("got %s, want %s", got, step.want)
		}
	}
}

func TestDuplicatePolicies(t *testing.T) {
	c := mustCompiler(t)
	var policies []*Policy
	for _, file := range []string{"a.yaml", "b.yaml"} {
		o, err := Parse(file, []byte(withRule("      condition: \"true\"\n")))
		if err != nil {
			t.Fatal(err)
		}
		p, err := c.Compile(o[0])
		if err != nil {
			t.Fatal(err)
		}
		policies = append(policies, p)
	}
	_, err := NewSet(policies...)
	if want := "b.yaml: policy p: metadata.name: is the name of a policy in a.yaml as well; names must be unique"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// Sets are swapped and counts are read while events are judged: an event sees
// one set as a whole, and nothing is lost. For the race detector.
func TestConcurrentSwap(t *testing.T) {
	c := mustCompiler(t)
	both := "      condition: process.uid == 7\n    - {name: s, events: [Exec], severity: Low, condition: process.uid == 7}\n"
	sets := []*Set{mustSet(t, c, withRule(both)), mustSet(t, c, withRule(strings.ReplaceAll(both, "== 7", "< 8")))}
	e := NewEngine(c, Config{})
	e.Swap(sets[0])
	stop := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				e.Swap(sets[i%2])
				runtime.Gosched()
			}
		}
	})
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.Gosched()
			}
			for _, s := range e.Stats() {
				if s.Matched > s.Evaluated || s.Alerts > s.Matched {
					t.Errorf("%+v", s)
					return
				}
			}
		}
	})
	const events = 500
	emitted := 0
	for range events {
		var seen []*Rule
		e.Evaluate(execOf(7), func(m *Match) { seen = append(seen, m.Rule) })
		if len(seen) != 2 || (seen[0].Spec.Condition == "process.uid == 7") != strings.HasSuffix(seen[1].Spec.Condition, "== 7") {
			t.Fatalf("an event was judged by %v", seen)
		}
		emitted += len(seen)
	}
	close(stop)
	others.Wait()
	var alerts uint64
	for _, s := range e.Stats() {
		if s.Evaluated != events || s.Matched != events {
			t.Errorf("%+v", s)
		}
		alerts += s.Alerts
	}
	if alerts != uint64(emitted) || emitted != 2*events {
		t.Errorf("%d alerts counted, %d emitted, want %d", alerts, emitted, 2*events)
	}
}

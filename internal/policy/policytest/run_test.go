package policytest

import (
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/policy"
)

const rules = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: p}
spec:
  rules:
    - {name: root, events: [Exec], severity: High, condition: process.uid == 0, message: root runs something, exceptions: [{name: cron, condition: parent.name == 'cron', reason: because it is}]}
    - {name: crash, events: [Exit], severity: Low, condition: exit.signal == 11, mode: DryRun}
`

const root = "  - name: c\n    events: [{kind: Exec, process: {name: x}}]\n"

// A test that cannot fail is none: each way to be wrong is told.
func TestFailures(t *testing.T) {
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	const all = "    expect: [{rule: root}]\n"
	for _, tt := range []struct{ name, cases, want string }{
		{"passes", root + all, ""},
		{"every detail", root + "    expect: [{rule: p/root, severity: High, message: runs, count: 1, mode: Alert}]\n", ""},
		{"not expected", root, "ClusterDetectionPolicy//p/root: matched, and no case expects it: root runs something"},
		{"wrong severity", root + "    expect: [{rule: root, severity: Low}]\n", "root: severity is High, want Low"},
		{"wrong message", root + "    expect: [{rule: root, message: z}]\n", `root: message is "root runs something", want "z" in it`},
		{"wrong mode", root + "    expect: [{rule: root, mode: DryRun}]\n", "root: mode is Alert, want DryRun"},
		{"wrong count", root + "    expect: [{rule: root, count: 2}]\n", "root: matched 1 times, want 2 (of 1 events: 0 false, 1 true, 0 suppressed, 0 undecided, 0 failed)"},
		{"wrongly sure", root + "    expect: [{rule: root, undecided: true}]\n", "root: undecided is false, want true"},
		{"no such rule", root + all + "    quiet: [rot]\n", "quiet: there is no rule rot"},
		{"not quiet", root + all + "    quiet: [root]\n", "root: matched, want quiet"},
		{"blind", root + all + "    quiet: [crash]\n", "crash: is not quiet but blind: no event of the case is of its kind and scope"},
		{"undecided", "  - name: c\n    events: [{kind: Exec, process: {missing: [ids]}}]\n", "ClusterDetectionPolicy//p/root: is among the undecided, and the case does not say so (of 1 events: 0 false, 0 true, 0 suppressed, 1 undecided, 0 failed)"},
		{"not undecided", root + all + "    undecided: [root]\n", "root: is not among the undecided (of 1 events: 0 false, 1 true, 0 suppressed, 0 undecided, 0 failed)"},
		{"suppressed", "  - name: c\n    events: [{kind: Exec, parent: {name: cron}}]\n", "ClusterDetectionPolicy//p/root: is among the suppressed, and the case does not say so (of 1 events: 0 false, 0 true, 1 suppressed, 0 undecided, 0 failed)"},
		{"suppressed as said", "  - name: c\n    events: [{kind: Exec, parent: {name: cron}}]\n    suppressed: [root]\n", ""},
		{"dry run", "  - name: c\n    events: [{kind: Exit, exit: {signal: 11}}]\n    expect: [{rule: crash, mode: DryRun}]\n", ""},
		{"bad kind", "  - name: c\n    events: [{kind: Exce}]\n", `events[0]: kind: there is no kind "Exce"`},
		{"bad type", "  - name: c\n    events: [{kind: 7}]\n", `events[0]: json: cannot unmarshal number into Go struct field Event.kind of type string`},
		{"unknown field", "  - name: c\n    events: [{kind: Exec, proces: {}}]\n", `events[0]: unknown field "proces"`},
		{"no event", "  - name: c\n    events: [{kind: Loss, stamp: \"1\"}]\n", "events[0]: kind: Loss is no event of a process"},
		{"bad fact", "  - name: c\n    events: [{kind: Exec, process: {missing: [exee]}}]\n", `events[0]: process: missing: there is no fact "exee"`},
		{"bad place", "  - name: c\n    events: [{kind: Exec, place: moon}]\n", `events[0]: place: "moon" is none of host, container, unknown`},
	} {
		fsys := fstest.MapFS{
			"p.yaml":            {Data: []byte(rules)},
			"tests/p.test.yaml": {Data: []byte("policies: [../p.yaml]\ncases:\n" + tt.cases)},
		}
		r, err := Run(c, fsys, "tests/p.test.yaml")
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if got := strings.Join(r.Cases[0].Failures, "\n"); got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

func TestCoverage(t *testing.T) {
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	fsys := fstest.MapFS{"p.yaml": {Data: []byte(rules)}, "p.test.yaml": {Data: []byte("policies: [p.yaml]\ncases:\n" + root + "    expect: [{rule: root}]\n")}}
	r, err := Run(c, fsys, "p.test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"ClusterDetectionPolicy//p/root: no case calls it quiet",
		"ClusterDetectionPolicy//p/crash: no case expects it", "ClusterDetectionPolicy//p/crash: no case calls it quiet",
	}
	if d := cmp.Diff(want, Uncovered(r)); d != "" || !r.OK() {
		t.Errorf("OK %v, -want +got:\n%s", r.OK(), d)
	}
}

func TestCannotRun(t *testing.T) {
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"policies: [nope.yaml]\ncases:\n" + root:      "p.test.yaml: policies: open nope.yaml: file does not exist",
		"policies: [p.yaml]\ncases: [{nmae: x}]\n":    `unknown field "cases[0].nmae"`,
		"policies: [p.yaml]\n":                        "p.test.yaml: policies and cases must be given",
		"policies: [p.test.yaml]\ncases:\n" + root:    "p.test.yaml:1: kind: is missing",
		"policies: [p.yaml, p.yaml]\ncases:\n" + root: "is the name of a policy in p.yaml as well",
	} {
		fsys := fstest.MapFS{"p.yaml": {Data: []byte(rules)}, "p.test.yaml": {Data: []byte(text)}}
		if _, err := Run(c, fsys, "p.test.yaml"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", text, err, want)
		}
	}
}

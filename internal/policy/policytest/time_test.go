package policytest

import (
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/policy"
)

const timed = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: p}
spec:
  scope: {namespaceSelector: {matchLabels: {team: a}}}
  rules:
    - {name: often, events: [Exec], severity: Low, condition: process.name == 'x', threshold: {by: [process.uid], count: 3, window: 1m}}
    - {name: noisy, events: [Exec], severity: High, condition: process.name == 'yy', aggregate: {window: 10m}}
---
apiVersion: procession.dev/v1alpha1
kind: DetectionPolicy
metadata: {name: mine, namespace: shop}
spec:
  rateLimit: {alerts: 1, window: 1h}
  rules: [{name: own, events: [Exec], severity: Low, condition: process.name == 'z'}]
`

func TestVirtualTime(t *testing.T) {
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	ev := func(at, name, more string) string {
		return "      - {kind: Exec, at: " + at + ", process: {name: " + name + "}, pod: {namespace: shop, name: web}" + more + "}\n"
	}
	three := ev("0s", "x", "") + ev("20s", "x", "") + ev("40s", "x", "")
	noisy := ev("0s", "yy", "") + ev("1m", "yy", "") + ev("2m", "yy", "")
	for _, tt := range []struct{ name, events, rest, want string }{
		{"threshold reached", three, "    expect: [{rule: often, stands: 3}]\n", ""},
		{"threshold, wrong number", three, "    expect: [{rule: often, stands: 2}]\n", "often: stands for 3 matches, want 2"},
		{"too slow for the threshold", ev("0s", "x", "") + ev("50s", "x", "") + ev("100s", "x", ""), "    quiet: [often]\n", ""},
		{"not often enough", ev("0s", "x", "") + ev("1s", "x", ""), "    expect: [{rule: often}]\n",
			"often: matched 0 times, want 1 (of 2 events: 0 false, 2 true, 0 suppressed, 0 undecided, 0 failed, 2 below the threshold)"},
		{"repeats", noisy, "    expect: [{rule: noisy, repeats: 2}]\n", ""},
		{"repeats nobody expects", noisy, "    expect: [{rule: noisy}]\n", "noisy: 2 matches were held back as repeats, want 0"},
		{"repeats without a word", noisy, "    expect: []\n",
			"ClusterDetectionPolicy//p/noisy: matched, and no case expects it: noisy\nClusterDetectionPolicy//p/noisy: 2 matches were held back as repeats, and the case does not say so"},
		{"the window is over", ev("0s", "yy", "") + ev("11m", "yy", ""), "    expect: [{rule: noisy, count: 2}]\n", ""},
		{"until", noisy, "    until: 1h\n    expect: [{rule: noisy, repeats: 2}]\n", ""},
		{"until too soon", noisy, "    until: 1m\n", "until: \"1m\" is no length of time like 10m that ends after the last event"},
		{"back in time", ev("5s", "x", "") + ev("4s", "x", ""), "    quiet: [often]\n", "events[1]: is earlier than the one before"},
		{"at and time", ev("5s, time: 2026-01-02T03:04:05Z", "x", ""), "", "events[0]: at: stands beside time; only one of them is allowed"},
		{"rate limited", ev("0s", "z", "") + ev("1s", "z", ""), "    expect: [{rule: own}]\n    rateLimited: [own]\n", ""},
		{"rate limited, not said", ev("0s", "z", "") + ev("1s", "z", ""), "    expect: [{rule: own}]\n",
			"DetectionPolicy/shop/mine/own: is among the rateLimited, and the case does not say so (of 2 events: 0 false, 2 true, 0 suppressed, 0 undecided, 0 failed, 1 beyond the rate limit)"},
		{"another namespace", "      - {kind: Exec, process: {name: z}, pod: {namespace: bank, name: web}}\n", "    quiet: [own]\n",
			"own: is not quiet but blind: no event of the case is of its kind and scope"},
		{"labels of the namespace are not known", strings.Replace(ev("0s", "yy", ""), "name: web}", "name: web, missing: [namespaceLabels]}", 1), "    undecided: [noisy]\n", ""},
		{"a namespace without the label", "      - {kind: Exec, process: {name: yy}, pod: {namespace: bank, name: web}}\n", "    quiet: [noisy]\n",
			"noisy: is not quiet but blind: no event of the case is of its kind and scope"},
	} {
		fsys := fstest.MapFS{
			"p.yaml":      {Data: []byte(timed)},
			"p.test.yaml": {Data: []byte("policies: [p.yaml]\nnamespaces: {shop: {team: a}}\ncases:\n  - name: c\n    events:\n" + tt.events + tt.rest)},
		}
		r, err := Run(c, fsys, "p.test.yaml")
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if d := cmp.Diff(tt.want, strings.Join(r.Cases[0].Failures, "\n")); d != "" {
			t.Errorf("%s: -want +got:\n%s", tt.name, d)
		}
	}
}

// Whatever a file of cases holds, it runs or is refused, and says the same
// each time.
func FuzzRun(f *testing.F) {
	for _, name := range []string{"containers", "execution", "everyday"} {
		data, err := os.ReadFile("../../../deploy/helm/procession/policies/tests/" + name + ".test.yaml")
		if err != nil {
			f.Fatal(err)
		}
		_, cases, _ := strings.Cut(string(data), "\n")
		f.Add("policies: [p.yaml]\n" + cases)
	}
	f.Add("policies: [p.yaml]\nnamespaces: {shop: {team: a}}\nnode: {name: x}\ncases:\n  - {name: c, until: 10m, events: [{kind: Exec, at: 1s, process: {name: yy}, pod: {namespace: shop}}], expect: [{rule: noisy, repeats: 1}], quiet: [often]}\n")
	c, err := policy.NewCompiler()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		fsys := fstest.MapFS{"p.yaml": {Data: []byte(timed)}, "p.test.yaml": {Data: []byte(text)}}
		r, err := Run(c, fsys, "p.test.yaml")
		if err != nil {
			return
		}
		again, err := Run(c, fsys, "p.test.yaml")
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(r, again); d != "" {
			t.Errorf("two runs differ:\n%s", d)
		}
	})
}

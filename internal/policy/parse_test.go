package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/api/v1alpha1"
)

const head = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: p}
`

// withRule is a policy with one rule and something more in it, at line 10.
func withRule(more string) string {
	return head + `spec:
  lists: [{name: l, values: [a]}]
  rules:
    - name: r
      events: [Exec]
      severity: Low
` + more
}

// withSpec is a policy with something more in its spec, at line 5.
func withSpec(more string) string {
	return strings.Replace(withRule("      condition: process.uid == 0\n"), "spec:\n", "spec:\n  "+more+"\n", 1)
}

// withTenantRule is withRule for a policy in a namespace.
func withTenantRule(more string) string {
	return strings.Replace(strings.Replace(withRule(more), "kind: Cluster", "kind: ", 1), "name: p", "name: p, namespace: shop", 1)
}

func compileText(file, text string) error {
	c, err := NewCompiler()
	if err != nil {
		return err
	}
	objects, err := Parse(file, []byte(text))
	if err != nil {
		return err
	}
	for _, o := range objects {
		if _, err := c.Compile(o); err != nil {
			return err
		}
	}
	return nil
}

// Every refusal names file, line, policy, rule and field, and what to do.
func TestRefused(t *testing.T) {
	ok := "      condition: process.uid == 0\n"
	for _, tt := range []struct{ name, text, want string }{
		{"nothing", "", "f: there is no policy in the file"},
		{"comments", "# nothing\n---\n# more\n", "f: there is no policy in the file"},
		{"no YAML", "a: b: c", "f:1: this is not YAML as expected: mapping values are not allowed in this context"},
		{"no YAML in the second document", head + "spec: {rules: []}\n---\n\nx: [\n", "f:7: this is not YAML as expected: did not find expected node content"},
		{"a tab", head + "spec:\n\trules: []\n", "f:5: this is not YAML as expected: found character that cannot start any token"},
		{"no object", "- a\n", "f:1: a policy is an object with apiVersion, kind, metadata and spec"},
		{"text", "hello\n", "f:1: a policy is an object with apiVersion, kind, metadata and spec"},
		{"no kind", "metadata: {name: p}\n", "f:1: policy p: kind: is missing; it must be ClusterDetectionPolicy or DetectionPolicy"},
		{"another kind", "kind: ConfigMap\n", "f:1: kind: is \"ConfigMap\"; it must be ClusterDetectionPolicy or DetectionPolicy"},
		{"a kind to come", "metadata: {name: p}\nkind: DetectionList\n", "f:2: policy p: kind: DetectionList is not supported yet; only ClusterDetectionPolicy or DetectionPolicy is"},
		{"kind is a number", "kind: 7\n", "f:1: kind: is \"7\"; it must be ClusterDetectionPolicy or DetectionPolicy"},
		{"another version", "apiVersion: procession.dev/v1\nkind: ClusterDetectionPolicy\n", "f:1: apiVersion: is \"procession.dev/v1\"; it must be procession.dev/v1alpha1"},
		{"twice", head + "metadata: {name: q}\n", "f:4: this is not YAML as expected: key \"metadata\" already set in map"},
		{"unknown at the top", head + "sepc: {}\n", "f:4: policy p: sepc: is not known; did you mean spec?"},
		{"unknown in the rule", withRule(ok + "      conditions: x\n"), "f:11: policy p: rule r: spec.rules[0].conditions: is not known; did you mean condition?"},
		{"case matters", withRule(ok + "      Message: x\n"), "f:11: policy p: rule r: spec.rules[0].Message: is not known; did you mean message?"},
		{"unknown and unlike", withRule(ok + "      mitre: [{xyzzy: x, technique: T1059}]\n"), "f:11: policy p: rule r: spec.rules[0].mitre[0].xyzzy: is not known; known here: tactic, technique"},
		{"a list to come", head + "spec:\n  lists: [{name: l, valuesFrom: x}]\n", "f:5: policy p: spec.lists[0].valuesFrom: is not supported yet; until then: write the values into the list"},
		{"a response to come", withRule(ok + "      response: Kill\n"), "f:11: policy p: rule r: spec.rules[0].response: is not supported yet; until then: the agent observes and does not act"},
		{"number for text", head + "spec:\n  lists: [{name: l, values: [4444]}]\n", "policy p: spec.lists.values: is a number; it must be text; numbers and yes, no, on, off need quotes to be text"},
		{"text for list", head + "spec:\n  rules:\n    - {name: r, events: Exec}\n", "policy p: spec.rules.events: is text; it must be a list"},
		{"list for object", head + "spec: []\n", "f:4: policy p: spec: is a list; it must be an object"},
		{"bad time", withRule(ok + "      exceptions: [{name: x, condition: \"true\", reason: because it is, expiresAt: tomorrow}]\n"), "policy p: spec.rules.exceptions.expiresAt: \"tomorrow\" is no time; write it like 2027-06-30T00:00:00Z"},

		{"no name", "apiVersion: procession.dev/v1alpha1\nkind: ClusterDetectionPolicy\nspec: {rules: [{name: r, events: [Exec], severity: Low, condition: \"true\"}]}\n", "f:1: metadata.name: is missing"},
		{"bad name", strings.Replace(withRule(ok), "name: p", "name: P_", 1), "f:3: policy P_: metadata.name: is \"P_\"; it must be lower-case letters, digits, '-' and '.', at most 253"},
		{"a namespace", strings.Replace(withRule(ok), "name: p", "name: p, namespace: shop", 1), "f:3: policy shop/p: metadata.namespace: is set; a ClusterDetectionPolicy is in no namespace"},
		{"no rules", head + "spec: {}\n", "f:4: policy p: spec.rules: is empty; there must be at least one rule"},
		{"bad mode", withRule(ok + "      mode: dryrun\n"), "f:11: policy p: rule r: spec.rules[0].mode: is \"dryrun\"; did you mean DryRun?"},
		{"bad severity", strings.Replace(withRule(ok), "Low", "Sever", 1), "f:9: policy p: rule r: spec.rules[0].severity: is \"Sever\"; it must be one of Critical, High, Medium, Low, Informational"},
		{"no severity", strings.Replace(withRule(ok), "      severity: Low\n", "", 1), "f:7: policy p: rule r: spec.rules[0].severity: is missing; it must be Critical, High, Medium, Low or Informational"},
		{"bad event", strings.Replace(withRule(ok), "[Exec]", "[exec]", 1), "f:8: policy p: rule r: spec.rules[0].events[0]: \"exec\" is not a kind of event; did you mean Exec?"},
		{"event twice", strings.Replace(withRule(ok), "[Exec]", "[Exec, Exec]", 1), "spec.rules[0].events[1]: Exec stands here twice"},
		{"no event", strings.Replace(withRule(ok), "[Exec]", "[]", 1), "spec.rules[0].events: is empty; the rule would never be evaluated"},
		{"a window without a unit", withRule(ok + "      aggregate: {window: \"10\"}\n"), "f:11: policy p: rule r: spec.rules[0].aggregate.window: is \"10\"; write it in whole hours, minutes and seconds, like 90s or 1h30m"},
		{"no window", withRule(ok + "      aggregate: {by: [process.exe]}\n"), "spec.rules[0].aggregate.window: is missing; write it like 5m"},
		{"a long window", withRule(ok + "      aggregate: {window: 25h}\n"), "spec.rules[0].aggregate.window: is 25h; it must be from 1s to 24h"},
		{"a key with a mistake", withRule(ok + "      aggregate: {window: 1m, by: [process.exe, pod.nam]}\n"), "f:11: policy p: rule r: spec.rules[0].aggregate.by[1]: 1:1: there is no variable pod.nam; did you mean pod.name?"},
		{"a key of another type", withRule(ok + "      threshold: {count: 2, window: 1m, by: [process.args]}\n"), "spec.rules[0].threshold.by[0]: 1:1: the expression is of type list(string); it must be string or int or bool"},
		{"a key for other events", withRule(ok + "      threshold: {count: 2, window: 1m, by: [exit.code]}\n"), "spec.rules[0].threshold.by[0]: 1:1: exit.code is not known for Exec events"},
		{"five keys", withRule(ok + "      threshold: {count: 2, window: 1m, by: [pod.uid, pod.uid, pod.uid, pod.uid, pod.uid]}\n"), "spec.rules[0].threshold.by: has 5 elements; at most 4 are allowed"},
		{"a long key", withRule(ok + "      threshold: {count: 2, window: 1m, by: [\"'" + strings.Repeat("x", 300) + "'\"]}\n"), "spec.rules[0].threshold.by[0]: has 302 bytes; at most 256 are allowed"},
		{"a threshold of one", withRule(ok + "      threshold: {count: 1, window: 1m}\n"), "spec.rules[0].threshold.count: is 1; it must be from 2 to 1000"},
		{"a threshold without a count", withRule(ok + "      threshold: {window: 1m}\n"), "spec.rules[0].threshold.count: is 0; it must be from 2 to 1000"},
		{"no alerts at all", withSpec("rateLimit: {alerts: 0, window: 1m}"), "f:5: policy p: spec.rateLimit.alerts: is 0; it must be from 1 to 10000"},
		{"a rate without a window", withSpec("rateLimit: {alerts: 5}"), "spec.rateLimit.window: is missing; write it like 5m"},
		{"pods on hosts", withSpec("scope: {targets: [Host], podSelector: {}}"), "f:5: policy p: spec.scope: selects namespaces, pods or containers, and its targets are hosts alone"},
		{"an operator", withSpec("scope: {podSelector: {matchExpressions: [{key: app, operator: in, values: [x]}]}}"), "spec.scope.podSelector.matchExpressions[0].operator: is \"in\"; did you mean In?"},
		{"In without values", withSpec("scope: {namespaceSelector: {matchExpressions: [{key: app, operator: In}]}}"), "spec.scope.namespaceSelector.matchExpressions[0].values: In and NotIn take values, Exists and DoesNotExist take none"},
		{"Exists with values", withSpec("scope: {nodeSelector: {matchExpressions: [{key: app, operator: Exists, values: [x]}]}}"), "spec.scope.nodeSelector.matchExpressions[0].values: In and NotIn take values"},
		{"no label", withSpec("scope: {podSelector: {matchLabels: {\"a b\": x}}}"), "spec.scope.podSelector.matchLabels: \"a b\" is not the key of a label"},
		{"no value of a label", withSpec("scope: {podSelector: {matchLabels: {app: \"a b\"}}}"), "spec.scope.podSelector.matchLabels: \"a b\" is not the value of a label"},
		{"a container's name", withSpec("scope: {containers: [Web]}"), "spec.scope.containers[0]: is \"Web\"; it must be lower-case letters, digits and '-', at most 63"},
		{"a container twice", withSpec("scope: {containers: [web, web]}"), "spec.scope.containers[1]: web is the name of another one as well"},

		{"a tenant without a namespace", strings.Replace(withTenantRule(ok), ", namespace: shop", "", 1), "f:3: policy p: metadata.namespace: is missing; a DetectionPolicy is about the pods of its namespace"},
		{"a tenant in two namespaces", strings.Replace(withTenantRule(ok), "shop", "shop/bank", 1), "metadata.namespace: is \"shop/bank\"; it must be lower-case letters, digits and '-', at most 63"},
		{"a tenant of hosts", strings.Replace(withTenantRule(ok), "spec:\n", "spec:\n  scope: {targets: [Host]}\n", 1), "f:5: policy shop/p: spec.scope.targets: is not known; known here: containers, podSelector"},
		{"a tenant of other namespaces", strings.Replace(withTenantRule(ok), "spec:\n", "spec:\n  scope: {namespaceSelector: {}}\n", 1), "policy shop/p: spec.scope.namespaceSelector: is not known; known here: containers, podSelector"},
		{"a tenant of nodes", strings.Replace(withTenantRule(ok), "spec:\n", "spec:\n  scope: {nodeSelector: {}}\n", 1), "policy shop/p: spec.scope.nodeSelector: is not known"},

		{"bad target", strings.Replace(withRule(ok), "spec:\n", "spec:\n  scope: {targets: [Container]}\n", 1), "f:5: policy p: spec.scope.targets[0]: is \"Container\"; did you mean Containers?"},
		{"rule twice", withRule(ok) + "    - {name: r, events: [Exec], severity: Low, condition: \"true\"}\n", "f:11: policy p: rule r: spec.rules[1].name: r is the name of another one as well"},
		{"bad rule name", strings.Replace(withRule(ok), "name: r", "name: R", 1), "f:7: policy p: rule R: spec.rules[0].name: is \"R\"; it must be lower-case letters, digits and '-', at most 63"},
		{"reserved list name", strings.Replace(withRule(ok), "name: l", "name: in", 1), "f:5: policy p: spec.lists[0].name: in is a reserved word"},
		{"empty list value", strings.Replace(withRule(ok), "[a]", "['']", 1), "spec.lists[0].values[0]: is empty; every text contains the empty one, which is hardly meant"},
		{"two messages", withRule(ok + "      message: x\n      messageExpression: \"'x'\"\n"), "f:12: policy p: rule r: spec.rules[0].messageExpression: stands beside message; only one of them is allowed"},
		{"short reason", withRule(ok + "      exceptions: [{name: x, condition: \"true\", reason: ok}]\n"), "f:11: policy p: rule r: spec.rules[0].exceptions[0].reason: has 2 characters; say why in at least 8"},
		{"bad technique", withRule(ok + "      mitre: [{technique: T10}]\n"), "f:11: policy p: rule r: spec.rules[0].mitre[0].technique: is \"T10\"; it must be like T1059 or T1059.004"},
		{"Sigma without authors", withRule(ok + "      source: {format: Sigma}\n"), "spec.rules[0].source: is Sigma; authors and license must be given"},
		{"long title", withRule(ok + "      title: " + strings.Repeat("x", 5000) + "\n"), "spec.rules[0].title: has 5000 bytes; at most 4096 are allowed"},

		{"no condition", withRule(""), "f:7: policy p: rule r: spec.rules[0].condition: the expression is empty"},
		{"unknown variable", withRule("      condition: process.exx == ''\n"), "f:10: policy p: rule r: spec.rules[0].condition: 1:1: there is no variable process.exx; did you mean process.exe?\n | process.exx == ''\n | ^"},
		{"unknown in the second line", withRule("      condition: |-\n        process.uid == 0 &&\n          poces.name == 'x'\n"),
			"f:10: policy p: rule r: spec.rules[0].condition: 2:3: there is no variable poces.name; did you mean process.name?\n |   poces.name == 'x'\n |   ^"},
		{"wrong type", withRule("      condition: process.uid == 'x'\n"), "spec.rules[0].condition: 1:13: found no matching overload for '==' applied to '(int, string)'"},
		{"no bool", withRule("      condition: process.uid\n"), "spec.rules[0].condition: 1:1: the expression is of type int; it must be bool"},
		{"message is no text", withRule(ok + "      messageExpression: process.uid\n"), "f:11: policy p: rule r: spec.rules[0].messageExpression: 1:1: the expression is of type int; it must be string"},
		{"exception", withRule(ok + "      exceptions:\n        - name: x\n          condition: pod.name = 'x'\n          reason: because it is\n"), "f:13: policy p: rule r: spec.rules[0].exceptions[0].condition: 1:10: Syntax error"},
		{"wrong kind", withRule("      condition: exit.code == 1\n"), "spec.rules[0].condition: 1:1: exit.code is not known for Exec events; it is filled by Exit: make a rule of its own for that"},
		{"variable", strings.Replace(withRule(ok), "spec:\n", "spec:\n  variables: [{name: v, expression: lists.x}]\n", 1), "f:5: policy p: spec.variables[0].expression: 1:1: the policy has no lists.x; did you mean lists.l?"},
		{"variable before its time", strings.Replace(withRule(ok), "spec:\n", "spec:\n  variables: [{name: v, expression: variables.w}, {name: w, expression: \"true\"}]\n", 1), "spec.variables[0].expression: 1:1: the policy has no variables.w"},
		{"a variable of another type", strings.Replace(withRule(ok), "spec:\n", "spec:\n  variables: [{name: v, expression: process.args}]\n", 1), "the expression is of type list(string); it must be bool or int or string"},
		{"too long", withRule("      condition: " + strings.Repeat("process.uid == 0 || ", 1000) + "true\n"), "the expression has 20004 bytes; at most 16384 are allowed"},
		{"large", "# " + strings.Repeat("x", MaxFileBytes), "f: the file has 1048578 bytes; at most 1048576 are allowed"},
	} {
		err := compileText("f", tt.text)
		var errs Errors
		if !errors.As(err, &errs) {
			t.Errorf("%s: error is %T %v, want Errors", tt.name, err, err)
			continue
		}
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, err, tt.want)
		}
	}
}

func TestTooMany(t *testing.T) {
	rules := strings.Repeat("    - {name: r, events: [Exec], severity: Low, condition: \"true\"}\n", v1alpha1.MaxRules+1)
	if err := compileText("f", head+"spec:\n  rules:\n"+rules); err == nil || !strings.Contains(err.Error(), "spec.rules: has 129 elements; at most 128 are allowed") {
		t.Errorf("%v", err)
	}
	docs := strings.Repeat(withRule("      condition: \"true\"\n")+"---\n", 65)
	if err := compileText("f", docs); err == nil || !strings.Contains(err.Error(), "f: the file has 65 documents; at most 64 are allowed") {
		t.Errorf("%v", err)
	}
	if n := len(err32(t)); n > maxErrors {
		t.Errorf("%d errors are reported", n)
	}
}

func err32(t *testing.T) Errors {
	t.Helper()
	var errs Errors
	rules := strings.Repeat("    - {name: R, events: [x, y], severity: Z, condition: \"true\"}\n", 100)
	if !errors.As(compileText("f", head+"spec:\n  rules:\n"+rules), &errs) {
		t.Fatal("no errors")
	}
	return errs
}

// One document's errors do not cost the others.
func TestParseKeepsTheGoodOnes(t *testing.T) {
	objects, err := Parse("f", []byte(withRule("      x: 1\n")+"---\n# comment\n"+strings.Replace(withRule("      condition: \"true\"\n"), "name: p", "name: q", 1)+"--- # end\n{"))
	if len(objects) != 1 || objects[0].Policy.GetName() != "q" || objects[0].Line != 12 {
		t.Fatalf("%+v, %v", objects, err)
	}
	var errs Errors
	if !errors.As(err, &errs) || len(errs) != 2 || errs[0].Policy != "p" || errs[1].Policy != "" {
		t.Fatalf("%v", err)
	}
}

// JSON is YAML, and a line of three dashes in a text does not end a document.
func TestParseForms(t *testing.T) {
	for _, text := range []string{
		`{"apiVersion":"procession.dev/v1alpha1","kind":"ClusterDetectionPolicy","metadata":{"name":"p"},"spec":{"rules":[{"name":"r","events":["Exec"],"severity":"Low","condition":"true"}]}}`,
		withRule("      condition: \"true\"\n      description: |\n        a\n        ---\n        b\n"),
		"---\n" + withRule("      condition: \"true\"\n") + "---\n---\n",
	} {
		objects, err := Parse("f", []byte(text))
		if err != nil || len(objects) != 1 {
			t.Errorf("%s: %d objects, %v", text, len(objects), err)
		}
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte(withRule("      condition: process.uid == 0\n")))
	f.Add([]byte(withRule("      condition: &a process.uid == 0\n      message: *a\n")))
	f.Add([]byte(withTenantRule("      condition: process.uid == 0\n      aggregate: {window: 1h30m, by: [pod.uid, process.tty > 0]}\n      threshold: {count: 3, window: 5m}\n")))
	f.Add([]byte(withSpec("scope: {targets: [Containers], podSelector: {matchLabels: {a: b}, matchExpressions: [{key: x/y, operator: NotIn, values: [z]}]}, containers: [c]}\n  rateLimit: {alerts: 5, window: 1m}")))
	f.Add([]byte("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"))
	f.Add([]byte("kind: ClusterDetectionPolicy\n---\n- x\n--- # y\n{\n"))
	packs, err := filepath.Glob("../../deploy/helm/procession/policies/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, p := range packs {
		data, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	c, err := NewCompiler()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// A file that takes long is as bad as one that crashes.
		watchdog := time.AfterFunc(20*time.Second, func() { panic(fmt.Sprintf("%.2000q takes more than twenty seconds", data)) })
		defer watchdog.Stop()
		objects, err := Parse("f", data)
		checkErrors(t, err)
		if err == nil && len(objects) == 0 {
			t.Fatal("neither a policy nor an error")
		}
		for _, o := range objects {
			p, err := c.Compile(o)
			checkErrors(t, err)
			if (p == nil) == (err == nil) {
				t.Fatalf("policy %v, error %v", p, err)
			}
			if p == nil {
				continue
			}
			if len(p.Rules) != len(o.Policy.Body().Rules) {
				t.Fatalf("%d rules of %d", len(p.Rules), len(o.Policy.Body().Rules))
			}
			if _, err := NewSet(p); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func checkErrors(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	var errs Errors
	if !errors.As(err, &errs) || len(errs) == 0 || len(errs) > maxErrors {
		t.Fatalf("error is %T: %v", err, err)
	}
	for _, e := range errs {
		if e.File != "f" || e.Msg == "" || len(e.Error()) > 8<<10 {
			t.Fatalf("%+v", e)
		}
	}
}

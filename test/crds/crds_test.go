package crds

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	v1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/internal/policy"
)

const chart = "../../deploy/helm/procession"

// A kind is what the API server makes of a definition.
type kind struct {
	structural *schema.Structural
	validator  validation.SchemaValidator
	rules      *cel.Validator
}

// define takes a definition through what the API server does when it is created.
func define(t *testing.T, file string) (name string, k kind) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var crd v1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(text, &crd); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	scheme := runtime.NewScheme()
	install.Install(scheme)
	scheme.Default(&crd)
	crd.Status.StoredVersions = []string{"v1alpha1"}
	var internal apiextensions.CustomResourceDefinition
	if err := scheme.Convert(&crd, &internal, nil); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	for _, e := range crdvalidation.ValidateCustomResourceDefinition(t.Context(), &internal) {
		t.Errorf("%s: the API server refuses the definition: %v", file, e)
	}
	s := internal.Spec.Validation
	if s == nil {
		s = internal.Spec.Versions[0].Schema
	}
	if k.structural, err = schema.NewStructural(s.OpenAPIV3Schema); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if k.validator, _, err = validation.NewSchemaValidator(s.OpenAPIV3Schema); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	k.rules = cel.NewValidator(k.structural, true, celconfig.PerCallLimit)
	return crd.Spec.Names.Kind, k
}

func kinds(t *testing.T) map[string]kind {
	t.Helper()
	files, err := filepath.Glob(chart + "/crds/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no definitions in %s/crds: %v", chart, err)
	}
	out := map[string]kind{}
	for _, f := range files {
		name, k := define(t, f)
		out[name] = k
	}
	return out
}

// refusals are what the API server says when text is applied with strict field
// validation, as kubectl asks for.
func refusals(t *testing.T, ks map[string]kind, text string) (out []string) {
	t.Helper()
	var o map[string]any
	if err := yaml.Unmarshal([]byte(text), &o); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	k, ok := ks[fmt.Sprint(o["kind"])]
	if !ok {
		return []string{fmt.Sprintf("there is no kind %v", o["kind"])}
	}
	for _, path := range pruning.PruneWithOptions(o, k.structural, true, schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}) {
		out = append(out, fmt.Sprintf("unknown field %q", path))
	}
	defaulting.Default(o, k.structural)
	for _, e := range validation.ValidateCustomResource(nil, o, k.validator) {
		out = append(out, e.Error())
	}
	for _, e := range listtype.ValidateListSetsAndMaps(nil, k.structural, o) {
		out = append(out, e.Error())
	}
	errs, _ := k.rules.Validate(t.Context(), (*field.Path)(nil), k.structural, o, nil, celconfig.RuntimeCELCostBudget)
	for _, e := range errs {
		out = append(out, e.Error())
	}
	return out
}

// refused says what an agent finds wrong with the same text.
func refused(c *policy.Compiler, text string) error {
	objects, err := policy.Parse("f", []byte(text))
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

const cluster = `apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: shells}
spec:
  mode: Alert
  scope:
    targets: [Containers]
    namespaceSelector:
      matchExpressions:
        - {key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system]}
    podSelector:
      matchLabels: {app: web}
      matchExpressions:
        - {key: exempt, operator: DoesNotExist}
    containers: [web]
    nodeSelector: {matchLabels: {pool: public}}
  lists:
    - {name: shells, values: [sh, bash]}
  variables:
    - {name: isShell, expression: process.name in lists.shells}
  rateLimit: {alerts: 100, window: 1m}
  rules:
    - name: shell
      title: A shell
      events: [Exec]
      condition: variables.isShell
      severity: High
      message: A shell
      onUndecided: Skip
      exceptions:
        - {name: probe, condition: process.cmdline == 'sh /probe', reason: the probe is a script, expiresAt: "2027-06-30T00:00:00Z"}
      threshold: {by: [pod.uid], count: 3, window: 5m}
      aggregate: {by: [process.cmdline], window: 1h30m}
      mitre: [{tactic: execution, technique: T1059.004}]
      tags: [container]
      references: [https://attack.mitre.org/techniques/T1059/004/]
      authors: [A. Author]
      license: Apache-2.0
      source: {format: Falco, id: x, revision: r1}
      falsePositives: [people at work]
    - {name: other, events: [Exec], condition: "true", severity: Low}
`

const tenant = `apiVersion: procession.dev/v1alpha1
kind: DetectionPolicy
metadata: {name: drift, namespace: shop}
spec:
  scope:
    podSelector: {matchLabels: {app: web}}
    containers: [web]
  rules:
    - name: drift
      events: [Exec]
      condition: process.exeUpperLayer
      severity: High
      aggregate: {window: 10m}
`

// Both of them take the objects that are right, and all of the starter pack.
func TestGood(t *testing.T) {
	ks := kinds(t)
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{"cluster": cluster, "tenant": tenant}
	packs, err := filepath.Glob(chart + "/policies/*.yaml")
	if err != nil || len(packs) == 0 {
		t.Fatalf("no starter policies: %v", err)
	}
	for _, p := range packs {
		data, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for i, doc := range bytes.Split(data, []byte("\n---\n")) {
			texts[fmt.Sprintf("%s[%d]", filepath.Base(p), i)] = string(doc)
		}
	}
	for name, text := range texts {
		for _, e := range refusals(t, ks, text) {
			t.Errorf("%s: the API server says %s", name, e)
		}
		if err := refused(c, text); err != nil {
			t.Errorf("%s: the agent says %v", name, err)
		}
	}
}

// What is wrong is refused by both, and both name the field. Agents do not rely
// on the API server, and people should hear it when they apply.
func TestBad(t *testing.T) {
	ks := kinds(t)
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, text, old, new, field string }{
		{"bad mode", cluster, "mode: Alert", "mode: Audit", "spec.mode"},
		{"unknown field", cluster, "mode: Alert", "moed: Alert", "spec.moed"},
		{"bad event", cluster, "events: [Exec]\n", "events: [Execve]\n", "spec.rules[0].events[0]"},
		{"no events", cluster, "events: [Exec]\n", "events: []\n", "spec.rules[0].events"},
		{"event twice", cluster, "events: [Exec]\n", "events: [Exec, Exec]\n", "spec.rules[0].events[1]"},
		{"no severity", cluster, "      severity: High\n", "", "spec.rules[0].severity"},
		{"bad severity", cluster, "severity: High", "severity: Sever", "spec.rules[0].severity"},
		{"empty condition", cluster, "condition: variables.isShell", "condition: ''", "spec.rules[0].condition"},
		{"long condition", cluster, "condition: variables.isShell", "condition: " + strings.Repeat("true || ", 2500) + "true", "spec.rules[0].condition"},
		{"hosts with pods", cluster, "targets: [Containers]", "targets: [Host]", "spec.scope"},
		{"bad target", cluster, "targets: [Containers]", "targets: [Pods]", "spec.scope.targets[0]"},
		{"bad operator", cluster, "operator: NotIn", "operator: Is", "spec.scope.namespaceSelector.matchExpressions[0].operator"},
		{"In without values", cluster, "operator: DoesNotExist", "operator: In", "spec.scope.podSelector.matchExpressions[0]"},
		{"Exists with values", cluster, "operator: DoesNotExist", "operator: Exists, values: [x]", "spec.scope.podSelector.matchExpressions[0]"},
		{"container's name", cluster, "containers: [web]", "containers: [Web_1]", "spec.scope.containers[0]"},
		{"long window", cluster, "window: 5m", "window: 48h", "spec.rules[0].threshold.window"},
		{"window in words", cluster, "window: 1h30m", "window: one hour", "spec.rules[0].aggregate.window"},
		{"window without a unit", cluster, "window: 1h30m", "window: '10'", "spec.rules[0].aggregate.window"},
		{"threshold of one", cluster, "count: 3", "count: 1", "spec.rules[0].threshold.count"},
		{"threshold too large", cluster, "count: 3", "count: 1001", "spec.rules[0].threshold.count"},
		{"five keys", cluster, "by: [pod.uid]", "by: [pod.uid, pod.uid, pod.uid, pod.uid, pod.uid]", "spec.rules[0].threshold.by"},
		{"no alerts at all", cluster, "alerts: 100", "alerts: 0", "spec.rateLimit.alerts"},
		{"two messages", cluster, "message: A shell", "message: A shell\n      messageExpression: process.exe", "spec.rules[0]"},
		{"short reason", cluster, "reason: the probe is a script", "reason: ok", "spec.rules[0].exceptions[0].reason"},
		{"no reason", cluster, "reason: the probe is a script, ", "", "spec.rules[0].exceptions[0].reason"},
		{"no time", cluster, "2027-06-30T00:00:00Z", "tomorrow", "expiresAt"},
		{"bad technique", cluster, "technique: T1059.004", "technique: '1059'", "spec.rules[0].mitre[0].technique"},
		{"bad tactic", cluster, "tactic: execution", "tactic: Execution", "spec.rules[0].mitre[0].tactic"},
		{"Sigma without authors", cluster, "      authors: [A. Author]\n      license: Apache-2.0\n      source: {format: Falco", "      source: {format: Sigma", "spec.rules[0]"},
		{"Sigma without a license", cluster, "      license: Apache-2.0\n      source: {format: Falco", "      source: {format: Sigma", "spec.rules[0]"},
		{"same rule twice", cluster, "name: other", "name: shell", "spec.rules[1]"},
		{"rule's name", cluster, "name: other", "name: Other", "spec.rules[1].name"},
		{"list's name", cluster, "name: shells, values", "name: my-shells, values", "spec.lists[0].name"},
		{"empty list", cluster, "values: [sh, bash]", "values: []", "spec.lists[0].values"},
		{"empty value", cluster, "values: [sh, bash]", "values: [sh, '']", "spec.lists[0].values[1]"},
		{"no rules", tenant, tenant[strings.Index(tenant, "  rules:"):], "  rules: []\n", "spec.rules"},
		{"a tenant on hosts", tenant, "containers: [web]", "targets: [Host]", "spec.scope.targets"},
		{"a tenant in other namespaces", tenant, "containers: [web]", "namespaceSelector: {}", "spec.scope.namespaceSelector"},
		{"a tenant on nodes", tenant, "containers: [web]", "nodeSelector: {}", "spec.scope.nodeSelector"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := strings.Replace(tt.text, tt.old, tt.new, 1)
			if text == tt.text {
				t.Fatal("nothing was changed")
			}
			found := refusals(t, ks, text)
			if !names(strings.Join(found, "\n"), tt.field) {
				t.Errorf("the API server does not name %s: %q", tt.field, found)
			}
			err := refused(c, text)
			if err == nil || !names(err.Error(), tt.field) {
				t.Errorf("the agent does not name %s: %v", tt.field, err)
			}
		})
	}
}

// names says whether text names a field. The decoder's errors have no index.
func names(text, field string) bool {
	return strings.Contains(text, field) || strings.Contains(text, regexp.MustCompile(`\[\d+\]`).ReplaceAllString(field, ""))
}

// What no schema can see: the agent refuses it, and the status says so.
func TestOnlyTheCompilerSees(t *testing.T) {
	ks := kinds(t)
	c, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ text, old, new, field string }{
		{cluster, "process.name in lists.shells", "process.nam in lists.shells", "spec.variables[0].expression"},
		{tenant, "process.exeUpperLayer", "node.name == 'x'", "spec.rules[0].condition"},
	} {
		text := strings.Replace(tt.text, tt.old, tt.new, 1)
		if found := refusals(t, ks, text); len(found) > 0 {
			t.Errorf("%s: the API server says %q", tt.new, found)
		}
		if err := refused(c, text); err == nil || !strings.Contains(err.Error(), tt.field) {
			t.Errorf("%s: the agent says %v", tt.new, err)
		}
	}
}

// A large policy within all bounds costs the API server less than it allows.
func TestLargest(t *testing.T) {
	ks := kinds(t)
	var b strings.Builder
	b.WriteString("apiVersion: procession.dev/v1alpha1\nkind: ClusterDetectionPolicy\nmetadata: {name: large}\nspec:\n  rules:\n")
	for i := range 128 {
		fmt.Fprintf(&b, "    - {name: r%d, events: [Exec], severity: Low, condition: \"true\", aggregate: {window: 1m}, threshold: {count: 2, window: 1m}}\n", i)
	}
	if found := refusals(t, ks, b.String()); len(found) > 0 {
		t.Errorf("%q", found)
	}
}

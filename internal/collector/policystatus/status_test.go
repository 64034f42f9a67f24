package policystatus

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/api/v1alpha1"
)

var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func shells(generation int64) *Policy {
	return &Policy{Kind: "ClusterDetectionPolicy", Name: "shells", UID: "u1", Generation: generation, Mode: v1alpha1.ModeAlert,
		Rules: []Rule{{Name: "shell"}, {Name: "quiet", Mode: v1alpha1.ModeDryRun}}}
}

// says is a node on which the policy stands like this.
func says(name string, generation, inForce int64, mistake string, rules ...*pb.RuleCount) *node {
	return newNode(name, &pb.PolicyReport{Policies: []*pb.PolicyState{
		{Object: "ClusterDetectionPolicy/other", Generation: 99, InForce: 99},
		{Object: "ClusterDetectionPolicy/shells", Generation: generation, InForce: inForce, Error: mistake, Rules: rules},
	}})
}

const mistake = "rule shell: spec.rules[0].condition: 1:1: there is no variable process.nme"

// brief is a status in one line.
func brief(s *v1alpha1.PolicyStatus) string {
	var b strings.Builder
	for _, c := range s.Conditions {
		fmt.Fprintf(&b, "%s=%s/%s@%d ", c.Type, c.Status, c.Reason, c.ObservedGeneration)
	}
	fmt.Fprintf(&b, "of %d: %d loaded, %d failed", s.Nodes.Desired, s.Nodes.Loaded, s.Nodes.Failed)
	return b.String()
}

func TestConditions(t *testing.T) {
	for _, tc := range []struct {
		name  string
		nodes []*node
		want  string
		words []string // somewhere in the messages
	}{
		{"nobody is there", nil,
			"Accepted=Unknown/NoNodes@2 Programmed=Unknown/NoNodes@2 Degraded=Unknown/NoNodes@2 of 0: 0 loaded, 0 failed", nil},
		{"nobody has seen it", []*node{newNode("a", &pb.PolicyReport{}), says("b", 1, 1, "")},
			"Accepted=Unknown/Waiting@2 Programmed=False/Progressing@2 Degraded=False/AsWritten@2 of 2: 0 loaded, 0 failed", []string{"generation 2 yet"}},
		{"on its way", []*node{says("a", 2, 2, ""), says("b", 1, 1, "")},
			"Accepted=True/Compiled@2 Programmed=False/Progressing@2 Degraded=False/AsWritten@2 of 2: 1 loaded, 0 failed", []string{"1 of 2 nodes"}},
		{"everywhere", []*node{says("a", 2, 2, ""), says("b", 2, 2, "")},
			"Accepted=True/Compiled@2 Programmed=True/InForce@2 Degraded=False/AsWritten@2 of 2: 2 loaded, 0 failed", nil},
		{"broken from the start", []*node{says("a", 2, 0, mistake)},
			"Accepted=False/Refused@2 Programmed=False/Refused@2 Degraded=False/AsWritten@2 of 1: 0 loaded, 1 failed", []string{mistake, "no earlier one is in force"}},
		{"broken, and the one before stays", []*node{says("a", 2, 1, mistake), says("b", 2, 1, mistake)},
			"Accepted=False/Refused@2 Programmed=True/LastGoodInForce@1 Degraded=False/AsWritten@2 of 2: 0 loaded, 2 failed", []string{"generation 1 stays in force on 2 of 2 nodes"}},
		{"broken, and not all have seen that", []*node{says("a", 2, 1, mistake), says("b", 1, 1, "")},
			"Accepted=False/Refused@2 Programmed=True/LastGoodInForce@1 Degraded=False/AsWritten@2 of 2: 0 loaded, 1 failed", []string{"1 of 2 nodes refuse it: " + mistake}},
		{"a new node knows no earlier one", []*node{says("a", 2, 1, mistake), says("b", 2, 0, mistake)},
			"Accepted=False/Refused@2 Programmed=False/Refused@2 Degraded=False/AsWritten@2 of 2: 0 loaded, 2 failed", []string{"refused by 2 of 2 nodes and in force on 0; generation 1 is in force on 1"}},
		{"an old agent refuses what others take", []*node{says("a", 2, 2, ""), says("b", 2, 1, "spec.rules[0].wants: not known")},
			"Accepted=False/Refused@2 Programmed=False/Refused@2 Degraded=False/AsWritten@2 of 2: 1 loaded, 1 failed", []string{"1 of 2 nodes refuse it"}},
		{"a node is ahead of the watch", []*node{says("a", 3, 3, "")},
			"Accepted=Unknown/Waiting@2 Programmed=False/Progressing@2 Degraded=False/AsWritten@2 of 1: 0 loaded, 0 failed", nil},
		{"over budget", []*node{says("a", 2, 2, "", &pb.RuleCount{Name: "shell", OverBudget: "too many rules"})},
			"Accepted=True/Compiled@2 Programmed=True/InForce@2 Degraded=True/RulesImpaired@2 of 1: 1 loaded, 0 failed", []string{"rule shell is over budget: too many rules"}},
		{"undecided", []*node{says("a", 2, 2, "", &pb.RuleCount{Name: "shell", Undecided: 3, Evaluated: 100}), says("b", 2, 2, "", &pb.RuleCount{Name: "shell", Undecided: 1, Evaluated: 100})},
			"Accepted=True/Compiled@2 Programmed=True/InForce@2 Degraded=True/RulesImpaired@2 of 2: 2 loaded, 0 failed", []string{"undecided in 2 % of"}},
		{"undecided, in too few evaluations to tell", []*node{says("a", 2, 2, "", &pb.RuleCount{Name: "shell", Undecided: 3, Evaluated: 99})},
			"Accepted=True/Compiled@2 Programmed=True/InForce@2 Degraded=False/AsWritten@2 of 1: 1 loaded, 0 failed", nil},
		{"failing", []*node{says("a", 2, 2, "", &pb.RuleCount{Name: "quiet", Failed: 1, Error: "no such key"})},
			"Accepted=True/Compiled@2 Programmed=True/InForce@2 Degraded=True/RulesImpaired@2 of 1: 1 loaded, 0 failed", []string{"rule quiet fails: no such key"}},
	} {
		got := summarize(shells(2), tc.nodes, &v1alpha1.PolicyStatus{}, noon)
		if d := cmp.Diff(tc.want, brief(got)); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, d)
		}
		var messages strings.Builder
		for _, c := range got.Conditions {
			messages.WriteString(c.Message + "\n")
		}
		for _, w := range tc.words {
			if !strings.Contains(messages.String(), w) {
				t.Errorf("%s: %q is not in\n%s", tc.name, w, &messages)
			}
		}
	}
}

func TestRules(t *testing.T) {
	at := timestamppb.New(noon.Add(1500 * time.Millisecond))
	nodes := []*node{
		says("a", 2, 2, "", &pb.RuleCount{Name: "shell", Matches: 3, Suppressed: 1, LastMatch: timestamppb.New(noon)}, &pb.RuleCount{Name: "gone", Matches: 99}),
		says("b", 2, 1, mistake, &pb.RuleCount{Name: "shell", Matches: 4, Undecided: 1, LastMatch: at}, &pb.RuleCount{Name: "quiet", Matches: 1}),
	}
	last := metav1.NewTime(noon.Add(time.Second))
	want := []v1alpha1.RuleStatus{
		{Name: "shell", State: v1alpha1.RuleInvalid, Message: "spec.rules[0].condition: 1:1: there is no variable process.nme", Matches: 7, Suppressed: 1, Undecided: 1, LastMatchTime: &last},
		{Name: "quiet", State: v1alpha1.RuleDryRun, Matches: 1},
	}
	got := summarize(shells(2), nodes, &v1alpha1.PolicyStatus{}, noon)
	if d := cmp.Diff(want, got.Rules); d != "" {
		t.Errorf("rules (-want +got):\n%s", d)
	}
	if got.Matches != 8 || !got.LastMatchTime.Equal(&last) {
		t.Errorf("%d matches, the last at %v", got.Matches, got.LastMatchTime)
	}
	off := shells(2)
	off.Mode = v1alpha1.ModeDisabled
	for _, r := range summarize(off, nil, &v1alpha1.PolicyStatus{}, noon).Rules {
		if r.State != v1alpha1.RuleDisabled {
			t.Errorf("a rule of a policy that is off: %+v", r)
		}
	}
}

// The time of a transition is kept while a condition's status is; what another
// hand put there goes.
func TestTransitions(t *testing.T) {
	first := summarize(shells(2), []*node{says("a", 2, 2, "")}, &v1alpha1.PolicyStatus{Conditions: []metav1.Condition{{Type: "Mine", Status: "True"}}}, noon)
	if len(first.Conditions) != 3 {
		t.Errorf("conditions: %s", brief(first))
	}
	second := summarize(shells(3), []*node{says("a", 3, 2, mistake)}, first, noon.Add(time.Hour))
	at := map[string]time.Time{}
	for _, c := range second.Conditions {
		at[c.Type] = c.LastTransitionTime.Time
	}
	if d := cmp.Diff(map[string]time.Time{"Accepted": noon.Add(time.Hour), "Programmed": noon, "Degraded": noon}, at); d != "" {
		t.Errorf("transitions (-want +got):\n%s", d)
	}
}

// A status is as large on ten thousand nodes as on ten, whatever they claim, and
// comes back from JSON as it went.
func TestBounded(t *testing.T) {
	p := &Policy{Kind: "DetectionPolicy", Namespace: "shop", Name: "p", Generation: 2}
	var counts []*pb.RuleCount
	for i := range v1alpha1.MaxRules {
		name := fmt.Sprintf("rule-%d-%s", i, strings.Repeat("x", 50))
		p.Rules = append(p.Rules, Rule{Name: name})
		counts = append(counts, &pb.RuleCount{Name: name, Matches: 1<<64 - 1, OverBudget: strings.Repeat("é", 5000), Error: strings.Repeat("é", 5000), Failed: 1})
	}
	var nodes []*node
	for i := range 10000 {
		r := &pb.PolicyReport{Policies: []*pb.PolicyState{{Object: "DetectionPolicy/shop/p", Generation: 2, InForce: int64(i % 3), Error: strings.Repeat("ü", 5000)}}}
		if i < 3 {
			r.Policies[0].Rules = counts
		}
		nodes = append(nodes, newNode(fmt.Sprint("node-", i), r))
	}
	got := summarize(p, nodes, &v1alpha1.PolicyStatus{}, noon)
	b, err := json.Marshal(got)
	if err != nil || len(b) > 300<<10 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if len(got.Nodes.Failing) != 5 || got.Nodes.Failed != 10000 || got.Matches != 1<<53-1 || len(got.Rules[0].Message) > maxRuleMessage {
		t.Errorf("%d failing of %d, %d matches, a message of %d bytes", len(got.Nodes.Failing), got.Nodes.Failed, got.Matches, len(got.Rules[0].Message))
	}
	var back v1alpha1.PolicyStatus
	if err := json.Unmarshal(b, &back); err != nil || !equality.Semantic.DeepEqual(*got, back) {
		t.Errorf("it is another one after JSON: %v\n%s", err, cmp.Diff(*got, back))
	}
}

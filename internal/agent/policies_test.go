package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
)

const reportedPolicy = `{"apiVersion":"procession.dev/v1alpha1","kind":"%s","metadata":{"name":"%s"%s,"generation":%d},
"spec":{"rules":[{"name":"shell","events":["Exec"],"severity":"Low","condition":"%s"},{"name":"quiet","events":["Exec"],"severity":"Low","condition":"process.name == 'x'"}]}}`

// What an agent reports of its policies comes from the parts that judge by them.
func TestPolicyReport(t *testing.T) {
	compiler, err := policy.NewCompiler()
	if err != nil {
		t.Fatal(err)
	}
	var u source.Update
	update := func(to source.Update) { u = to }
	objects := source.NewObjects("", nil)
	if err := objects.Load(compiler, update); err != nil {
		t.Fatal(err)
	}
	cluster := func(name string, generation int, condition string) source.Object {
		return source.Object{Name: name, Text: fmt.Appendf(nil, reportedPolicy, "ClusterDetectionPolicy", name, "", generation, condition)}
	}
	tenant := source.Object{Namespace: "shop", Name: "drift",
		Text: fmt.Appendf(nil, reportedPolicy, "DetectionPolicy", "drift", `,"namespace":"shop"`, 4, "process.name == 'sh'")}
	set := func(kind string, all ...source.Object) {
		t.Helper()
		if err := objects.Set(kind, all, update); err != nil {
			t.Fatal(err)
		}
	}
	set("ClusterDetectionPolicy", cluster("shells", 2, "process.name == 'sh'"), cluster("bad", 7, "process.nme == 'sh'"))
	set("DetectionPolicy", tenant)
	set("ClusterDetectionPolicy", cluster("shells", 3, "process.nme == 'sh'"), cluster("bad", 7, "process.nme == 'sh'"))

	e := policy.NewEngine(compiler, policy.Config{Node: "n", Budget: policy.Budget{Rules: 1}})
	if err := e.Swap(u.Set); err != nil {
		t.Fatal(err)
	}
	got := policyReport(u, e.Stats(), e.Namespaces())
	mistake := "rule shell: spec.rules[0].condition: 1:1: there is no variable process.nme; did you mean process.name?"
	over := []*pb.RuleCount{{Name: "shell"}, {Name: "quiet"}}
	for _, c := range over {
		c.OverBudget = e.Namespaces()[0].OverBudget[0].Reason
	}
	want := &pb.PolicyReport{Policies: []*pb.PolicyState{
		{Object: "ClusterDetectionPolicy/bad", Generation: 7, Error: mistake},
		{Object: "ClusterDetectionPolicy/shells", Generation: 3, InForce: 2, Error: mistake},
		{Object: "DetectionPolicy/shop/drift", Generation: 4, InForce: 4, Rules: over},
	}}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("report (-want +got):\n%s", d)
	}
}

func TestRuleCount(t *testing.T) {
	rule := &policy.Rule{Policy: "p", Spec: &v1alpha1.Rule{Name: "r"}}
	at := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for _, tc := range []struct {
		name string
		s    policy.Stats
		want *pb.RuleCount
	}{
		{"nothing to say", policy.Stats{State: v1alpha1.RuleActive, Evaluated: 1000, NotMatched: 1000}, nil},
		{"off, as its policy says", policy.Stats{State: v1alpha1.RuleDisabled}, nil},
		{"it matched", policy.Stats{State: v1alpha1.RuleActive, Evaluated: 9, Matched: 3, Suppressed: 2, LateMatches: 1, RateLimited: 1, LastMatch: at},
			&pb.RuleCount{Name: "r", Matches: 6, Suppressed: 3, Evaluated: 9, LastMatch: timestamppb.New(at)}},
		{"it fails", policy.Stats{State: v1alpha1.RuleActive, Evaluated: 5, Errors: 4, Undecided: 1, LastError: "no such \xff key"},
			&pb.RuleCount{Name: "r", Failed: 4, Undecided: 1, Evaluated: 5, Error: "no such ? key"}},
		{"its namespace takes too long", policy.Stats{State: v1alpha1.RuleOverBudget, OverBudget: 3},
			&pb.RuleCount{Name: "r", OverBudget: "the rules of its namespace took more time than they may have; it is not asked about every event"}},
	} {
		tc.s.Rule = rule
		if d := cmp.Diff(tc.want, ruleCount(&tc.s, ""), protocmp.Transform()); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, d)
		}
	}
}

func TestPolicyError(t *testing.T) {
	long := policy.Errors{}
	for range 32 {
		long = append(long, &policy.Error{File: "ClusterDetectionPolicy/x", Line: 1, Policy: "x", Rule: "r", Field: "f", Msg: strings.Repeat("é", 100), Snip: "snip"})
	}
	for _, tc := range []struct {
		err  error
		want string
	}{
		{fs.ErrPermission, "permission denied"},
		{fmt.Errorf("wrapped: %w", errors.New("not \xff UTF-8")), "wrapped: not ? UTF-8"},
		{long[:1], "rule r: f: " + long[0].Msg},
	} {
		if got := policyError(tc.err); got != tc.want {
			t.Errorf("%v becomes %q, want %q", tc.err, got, tc.want)
		}
	}
	if got := policyError(long); len(got) > maxPolicyError || !utf8.ValidString(got) || !strings.HasSuffix(got, "...") {
		t.Errorf("%d bytes: %q", len(got), got)
	}
}

// A report has a bound: counts go first, then objects, and how many is said.
func TestReportBound(t *testing.T) {
	many := func(objects, rules int) *pb.PolicyReport {
		r := &pb.PolicyReport{}
		for i := range objects {
			s := &pb.PolicyState{Object: fmt.Sprintf("DetectionPolicy/namespace-%06d/policy", i), Generation: 1, InForce: 1}
			for j := range rules {
				s.Rules = append(s.Rules, &pb.RuleCount{Name: fmt.Sprint("rule-", j), Matches: 1 << 40, Evaluated: 1 << 50})
			}
			r.Policies = append(r.Policies, s)
		}
		return r
	}
	for _, tc := range []struct {
		objects, rules int
		counts         bool
		leftOut        bool
	}{{10, 10, true, false}, {1000, 10, false, false}, {10000, 0, false, true}} {
		r := many(tc.objects, tc.rules)
		bound(r)
		if n := proto.Size(r); n > maxReport {
			t.Errorf("%d objects with %d rules: %d bytes", tc.objects, tc.rules, n)
		}
		if int(r.LeftOut)+len(r.Policies) != tc.objects || (r.LeftOut > 0) != tc.leftOut || tc.counts != (len(r.Policies[0].Rules) > 0) {
			t.Errorf("%d objects with %d rules: %d left out, %d there, the first with %d", tc.objects, tc.rules, r.LeftOut, len(r.Policies), len(r.Policies[0].Rules))
		}
	}
}

// Only news make a report of their own.
func TestNews(t *testing.T) {
	base := func() *pb.PolicyReport {
		return &pb.PolicyReport{Policies: []*pb.PolicyState{{Object: "a", Generation: 2, InForce: 1, Error: "e", Rules: []*pb.RuleCount{{Name: "r", Matches: 1, Evaluated: 5}}}}}
	}
	was := newsOf(base())
	for name, change := range map[string]func(*pb.PolicyState){
		"generation": func(s *pb.PolicyState) { s.Generation++ },
		"in force":   func(s *pb.PolicyState) { s.InForce++ },
		"error":      func(s *pb.PolicyState) { s.Error = "" },
		"a match":    func(s *pb.PolicyState) { s.Rules[0].Matches++ },
		"budget":     func(s *pb.PolicyState) { s.Rules[0].OverBudget = "yes" },
	} {
		r := base()
		if change(r.Policies[0]); newsOf(r) == was {
			t.Errorf("%s is no news", name)
		}
	}
	r := base()
	r.Policies[0].Rules[0].Evaluated, r.Policies[0].Rules[0].Undecided = 6, 1
	if newsOf(r) != was {
		t.Error("one more evaluation is news")
	}
}

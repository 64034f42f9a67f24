package agent

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/source"
)

const (
	// reportAgain is how often a report that says nothing new is sent all the
	// same: one that was lost on the way does not leave the collector with an
	// old one for longer.
	reportAgain = 5 * time.Minute

	// maxReport bounds the encoded report: what has no room is left out, first
	// what is counted, then objects. A thousand objects take half of it.
	maxReport = 128 << 10

	maxPolicyError = 1024 // bytes of PolicyState.error
	maxRuleError   = 256  // bytes of RuleCount.over_budget and error
)

// A reporter says how the cluster's policies stand on this node. It belongs to
// coverer.write's callers, one behind the other.
type reporter struct {
	told [sha256.Size]byte // what the last report said
	at   time.Time         // when
}

// due is the report, if it says something new or was not made for a while; nil
// otherwise, and where the rules are not objects of a cluster.
func (r *reporter) due(a *agent, now time.Time) *pb.PolicyReport {
	u := a.policies.Load()
	if a.watcher == nil || u == nil {
		return nil
	}
	p := policyReport(*u, a.engine.Stats(), a.engine.Namespaces())
	news := newsOf(p)
	if news == r.told && now.Sub(r.at) < reportAgain {
		return nil
	}
	r.told, r.at = news, now
	return p
}

// newsOf is the part of a report that is worth one of its own: not how often
// rules were evaluated and could not be decided, which always grows.
func newsOf(p *pb.PolicyReport) [sha256.Size]byte {
	var b strings.Builder
	for _, s := range p.GetPolicies() {
		fmt.Fprintf(&b, "%s %d %d %q\n", s.GetObject(), s.GetGeneration(), s.GetInForce(), s.GetError())
		for _, c := range s.GetRules() {
			fmt.Fprintf(&b, " %s %q %d\n", c.GetName(), c.GetOverBudget(), c.GetMatches())
		}
	}
	return sha256.Sum256([]byte(b.String()))
}

// policyReport says of each object what became of it, and of its rules in force
// what there is to say.
func policyReport(u source.Update, stats []policy.Stats, namespaces []policy.Namespace) *pb.PolicyReport {
	over := map[string]string{} // why, by object
	for _, n := range namespaces {
		for _, o := range n.OverBudget {
			over[v1alpha1.KindDetectionPolicy+"/"+n.Name+"/"+o.Policy] = o.Reason
		}
	}
	rules := map[string][]*pb.RuleCount{} // by object
	for i := range stats {
		s := &stats[i]
		object := objectOf(s.Rule)
		if c := ruleCount(s, over[object]); c != nil {
			rules[object] = append(rules[object], c)
		}
	}
	r := &pb.PolicyReport{}
	for _, f := range u.Files {
		s := &pb.PolicyState{Object: f.File, Generation: f.Generation, Rules: rules[f.File]}
		for _, p := range f.Policies {
			s.InForce = max(s.InForce, p.Generation)
		}
		if f.Err != nil {
			s.Error = policyError(f.Err)
		}
		r.Policies = append(r.Policies, s)
	}
	slices.SortFunc(r.Policies, func(a, b *pb.PolicyState) int { return strings.Compare(a.Object, b.Object) })
	bound(r)
	return r
}

// objectOf is the object a rule stands in, as source names it.
func objectOf(r *policy.Rule) string {
	if r.Namespace == "" {
		return v1alpha1.KindClusterDetectionPolicy + "/" + r.Policy
	}
	return v1alpha1.KindDetectionPolicy + "/" + r.Namespace + "/" + r.Policy
}

// ruleCount is what there is to say about a rule, nil if nothing.
func ruleCount(s *policy.Stats, over string) *pb.RuleCount {
	if s.State == v1alpha1.RuleOverBudget {
		over = cmp.Or(over, "the rules of its namespace took more time than they may have; it is not asked about every event")
	} else {
		over = ""
	}
	matches := s.Matched + s.Suppressed + s.LateMatches
	if over == "" && matches+s.Undecided+s.Errors == 0 {
		return nil
	}
	c := &pb.RuleCount{
		Name: s.Rule.Spec.Name, OverBudget: cutText(over, maxRuleError), Matches: matches, Suppressed: s.HeldBack(),
		Undecided: s.Undecided, Failed: s.Errors, Evaluated: s.Evaluated, Error: cutText(s.LastError, maxRuleError),
	}
	if !s.LastMatch.IsZero() {
		c.LastMatch = timestamppb.New(s.LastMatch)
	}
	return c
}

// policyError says what is wrong with an object, a mistake a line. The object
// and the line in it are left out: who reads it sees the object, as YAML.
func policyError(err error) string {
	var all policy.Errors
	if !errors.As(err, &all) {
		return cutText(err.Error(), maxPolicyError)
	}
	var lines []string
	for _, e := range all {
		short := policy.Error{Rule: e.Rule, Field: e.Field, Msg: e.Msg}
		lines = append(lines, short.Error())
	}
	return cutText(strings.Join(lines, "\n"), maxPolicyError)
}

// cutText cuts to n bytes of valid UTF-8, which a message in protobuf must be:
// an error may quote what a process chose.
func cutText(s string, n int) string {
	const dots = "..."
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n-len(dots)], "") + dots
	}
	return strings.ToValidUTF8(s, "?")
}

// bound makes a report fit.
func bound(r *pb.PolicyReport) {
	if proto.Size(r) <= maxReport {
		return
	}
	for _, s := range r.Policies {
		s.Rules = nil
	}
	for size := proto.Size(r); size > maxReport; {
		last := r.Policies[len(r.Policies)-1]
		size -= proto.Size(last) + 2 // tag and length, at least
		r.Policies = r.Policies[:len(r.Policies)-1]
		r.LeftOut++
	}
}

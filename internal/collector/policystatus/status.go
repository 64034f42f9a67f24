package policystatus

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/api/v1alpha1"
)

// A Policy is a policy object of the cluster, as far as its status is about it.
type Policy struct {
	Kind, Namespace, Name string // Namespace is empty for a ClusterDetectionPolicy
	UID                   string
	Generation            int64
	Mode                  v1alpha1.Mode
	Rules                 []Rule
	Status                v1alpha1.PolicyStatus // as it stands there
}

// A Rule is one of its rules.
type Rule struct {
	Name string        `json:"name"`
	Mode v1alpha1.Mode `json:"mode"` // empty: the policy's
}

// Object names the policy as agents do: KIND/NAME or KIND/NAMESPACE/NAME.
func (p *Policy) Object() string {
	if p.Namespace == "" {
		return p.Kind + "/" + p.Name
	}
	return p.Kind + "/" + p.Namespace + "/" + p.Name
}

// A node is what one node says of its policies.
type node struct {
	name   string
	states map[string]*pb.PolicyState // by object
}

func newNode(name string, r *pb.PolicyReport) *node {
	n := &node{name: name, states: make(map[string]*pb.PolicyState, len(r.GetPolicies()))}
	for _, s := range r.GetPolicies() {
		n.states[s.GetObject()] = s
	}
	return n
}

// Bounds of a status, as the definition of the objects has them.
const (
	maxFailing       = 5
	maxFailingReason = 256
	maxRuleMessage   = 1024
	maxMessage       = 2048
	maxDegradedRules = 5
)

// A rule that is undecided in more than one of a hundred evaluations is worth a
// word, when there were enough of them to say so.
const (
	undecidedShare = 100
	enough         = 100
)

// A sum is what the nodes say together about one policy.
type sum struct {
	p        *Policy
	nodes    int
	loaded   int           // run the policy's generation
	failed   int           // refuse it
	inForce  map[int64]int // by generation
	failing  []v1alpha1.FailingNode
	mistake  string // of the first that refuses
	rules    map[string]*ruleSum
	degraded []string // why, by rule
}

type ruleSum struct {
	matches, suppressed, undecided, failed, evaluated uint64
	last                                              time.Time
	overBudget, err                                   string
}

// summarize makes the status of p out of what the nodes say; they are in order
// of their names. was is the status before, for the times of transitions.
func summarize(p *Policy, nodes []*node, was *v1alpha1.PolicyStatus, now time.Time) *v1alpha1.PolicyStatus {
	s := &sum{p: p, nodes: len(nodes), inForce: map[int64]int{}, rules: map[string]*ruleSum{}}
	object := p.Object()
	for _, n := range nodes {
		if st := n.states[object]; st != nil {
			s.add(n.name, st)
		}
	}
	out := &v1alpha1.PolicyStatus{ObservedGeneration: p.Generation,
		Nodes: v1alpha1.NodeCounts{Desired: int32(s.nodes), Loaded: int32(s.loaded), Failed: int32(s.failed), Failing: s.failing}}
	s.ruleStates(out)
	out.Conditions = slices.Clone(was.Conditions)
	// Of another hand: the status is the collector's.
	out.Conditions = slices.DeleteFunc(out.Conditions, func(c metav1.Condition) bool {
		return c.Type != v1alpha1.ConditionAccepted && c.Type != v1alpha1.ConditionProgrammed && c.Type != v1alpha1.ConditionDegraded
	})
	for _, c := range []metav1.Condition{s.accepted(), s.programmed(), s.isDegraded()} {
		c.Message = cut(c.Message, maxMessage)
		c.LastTransitionTime = metav1.NewTime(now.Truncate(time.Second))
		c.ObservedGeneration = cmp.Or(c.ObservedGeneration, p.Generation)
		meta.SetStatusCondition(&out.Conditions, c)
	}
	return out
}

func (s *sum) add(name string, st *pb.PolicyState) {
	switch {
	case st.GetGeneration() != s.p.Generation: // it has not seen it yet
	case st.GetError() != "":
		s.failed++
		if s.mistake == "" {
			s.mistake = st.GetError()
		}
		if len(s.failing) < maxFailing {
			first, _, _ := strings.Cut(st.GetError(), "\n")
			s.failing = append(s.failing, v1alpha1.FailingNode{Node: cut(name, 253), Reason: cut(first, maxFailingReason)})
		}
	case st.GetInForce() == s.p.Generation:
		s.loaded++
	}
	if st.GetInForce() > 0 {
		s.inForce[st.GetInForce()]++
	}
	for _, c := range st.GetRules() {
		r := s.rules[c.GetName()]
		if r == nil {
			r = &ruleSum{}
			s.rules[c.GetName()] = r
		}
		add(&r.matches, c.GetMatches())
		add(&r.suppressed, c.GetSuppressed())
		add(&r.undecided, c.GetUndecided())
		add(&r.failed, c.GetFailed())
		add(&r.evaluated, c.GetEvaluated())
		r.overBudget, r.err = cmp.Or(r.overBudget, c.GetOverBudget()), cmp.Or(r.err, c.GetError())
		if t := c.GetLastMatch(); t != nil && t.AsTime().After(r.last) {
			r.last = t.AsTime()
		}
	}
}

// ruleStates fills in what became of each rule.
func (s *sum) ruleStates(out *v1alpha1.PolicyStatus) {
	var last time.Time
	for _, rule := range s.p.Rules {
		r := s.rules[rule.Name]
		if r == nil {
			r = &ruleSum{}
		}
		st := v1alpha1.RuleStatus{Name: rule.Name, State: stateOf(s.p.Mode, rule.Mode),
			Matches: count(r.matches), Suppressed: count(r.suppressed), Undecided: count(r.undecided)}
		mistake := mistakesOf(s.mistake, rule.Name)
		switch {
		case mistake != "":
			st.State, st.Message = v1alpha1.RuleInvalid, cut(mistake, maxRuleMessage)
		case r.overBudget != "":
			st.State, st.Message = v1alpha1.RuleOverBudget, cut(r.overBudget, maxRuleMessage)
			s.degraded = append(s.degraded, "rule "+rule.Name+" is over budget: "+r.overBudget)
		}
		switch {
		case r.failed > 0:
			s.degraded = append(s.degraded, "rule "+rule.Name+" fails: "+cmp.Or(r.err, "no word why"))
		case r.evaluated >= enough && r.undecided > r.evaluated/undecidedShare:
			s.degraded = append(s.degraded, fmt.Sprintf("rule %s is undecided in %d %% of its evaluations: a fact it needs could not be read", rule.Name, max(1, r.undecided*100/r.evaluated)))
		}
		if !r.last.IsZero() {
			st.LastMatchTime = seconds(r.last)
		}
		if r.last.After(last) {
			last = r.last
		}
		out.Matches = count(uint64(out.Matches + count(r.matches)))
		out.Rules = append(out.Rules, st)
	}
	if !last.IsZero() {
		out.LastMatchTime = seconds(last)
	}
}

func seconds(t time.Time) *metav1.Time {
	out := metav1.NewTime(t.Truncate(time.Second)) // what is finer does not come back
	return &out
}

// add adds to a count, which stops where count does.
func add(to *uint64, n uint64) { *to = uint64(count(*to + uint64(count(n)))) }

// count is a number of things as JSON keeps it exactly, whatever a node claims.
func count(n uint64) int64 { return int64(min(n, 1<<53-1)) }

func stateOf(policy, rule v1alpha1.Mode) v1alpha1.RuleState {
	if policy == v1alpha1.ModeDisabled {
		return v1alpha1.RuleDisabled
	}
	switch cmp.Or(rule, policy) {
	case v1alpha1.ModeDisabled:
		return v1alpha1.RuleDisabled
	case v1alpha1.ModeDryRun:
		return v1alpha1.RuleDryRun
	}
	return v1alpha1.RuleActive
}

// mistakesOf are the lines of an agent's error that are about a rule.
func mistakesOf(text, rule string) string {
	var lines []string
	for line := range strings.SplitSeq(text, "\n") {
		if about, ok := strings.CutPrefix(line, "rule "+rule+": "); ok {
			lines = append(lines, about)
		}
	}
	return strings.Join(lines, "\n")
}

// accepted says whether the policy's generation compiles.
func (s *sum) accepted() metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionAccepted}
	switch {
	case s.failed > 0:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "Refused", s.mistake
		if s.failed < s.nodes {
			c.Message = fmt.Sprintf("%d of %d nodes refuse it: %s", s.failed, s.nodes, s.mistake)
		}
	case s.loaded > 0:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, "Compiled", "Every rule compiles"
	default:
		c.Status, c.Reason, c.Message = metav1.ConditionUnknown, "Waiting", fmt.Sprintf("No node has said what it makes of generation %d yet", s.p.Generation)
		if s.nodes == 0 {
			c.Reason, c.Message = "NoNodes", "No agent reports"
		}
	}
	return c
}

// programmed says whether every node runs it, or what they run instead.
func (s *sum) programmed() metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionProgrammed, Status: metav1.ConditionFalse}
	is := s.p.Generation
	var good int64 // the newest of the earlier ones that is in force somewhere
	for g := range s.inForce {
		if g < is {
			good = max(good, g)
		}
	}
	switch {
	case s.nodes == 0:
		c.Status, c.Reason, c.Message = metav1.ConditionUnknown, "NoNodes", "No agent reports"
	case s.loaded == s.nodes:
		c.Status, c.Reason, c.Message = metav1.ConditionTrue, "InForce", fmt.Sprintf("Generation %d is in force on %s", is, s.of(s.loaded))
	case s.failed == 0:
		c.Reason, c.Message = "Progressing", fmt.Sprintf("Generation %d is in force on %s", is, s.of(s.loaded))
	case good == 0:
		c.Reason, c.Message = "Refused", fmt.Sprintf("Generation %d is refused, and no earlier one is in force", is)
	case s.inForce[good]+s.loaded == s.nodes && s.loaded == 0:
		// It is true of the last good generation, and says so by its number.
		c.Status, c.Reason, c.ObservedGeneration = metav1.ConditionTrue, "LastGoodInForce", good
		c.Message = fmt.Sprintf("Generation %d is refused; generation %d stays in force on %s", is, good, s.of(s.inForce[good]))
	default:
		c.Reason = "Refused"
		c.Message = fmt.Sprintf("Generation %d is refused by %s and in force on %d; generation %d is in force on %d", is, s.of(s.failed), s.loaded, good, s.inForce[good])
	}
	return c
}

func (s *sum) of(n int) string { return fmt.Sprintf("%d of %d nodes", n, s.nodes) }

// isDegraded says whether it does less than it could.
func (s *sum) isDegraded() metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionDegraded, Status: metav1.ConditionFalse, Reason: "AsWritten", Message: "Rules in force are evaluated as they are written"}
	switch {
	case s.nodes == 0:
		c.Status, c.Reason, c.Message = metav1.ConditionUnknown, "NoNodes", "No agent reports"
	case len(s.degraded) > 0:
		c.Status, c.Reason = metav1.ConditionTrue, "RulesImpaired"
		more := ""
		if n := len(s.degraded) - maxDegradedRules; n > 0 {
			more = fmt.Sprintf("; and %d more", n)
		}
		c.Message = strings.Join(s.degraded[:min(len(s.degraded), maxDegradedRules)], "; ") + more
	}
	return c
}

// cut cuts text to n characters, as definitions count them, and bytes.
func cut(s string, n int) string {
	const dots = "..."
	if len(s) <= n {
		return s
	}
	s = s[:n-len(dots)]
	for !utf8.ValidString(s) && len(s) > 0 {
		s = s[:len(s)-1]
	}
	return s + dots
}

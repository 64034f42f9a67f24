package policy

import (
	"slices"
	"strings"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
)

// A Set is all rules of a node. It never changes.
type Set struct {
	policies []*Policy // those of the cluster by name, then those of each namespace
	rules    []*Rule   // by policy, in the order of the policy
	groups   []*group  // the cluster's, if it has any, then by namespace
	tenants  map[string]*group
}

// A group is the policies that share a matcher: those of the cluster, or those
// of one namespace. Nothing of one group can cost another one anything.
type group struct {
	namespace string // empty: the cluster's
	first     int    // the group's first rule among all of the set
	rules     []*Rule
	policies  []*Policy
	starts    []int // of policies: their first rule among the group's
}

// maxKinds is more than there are; a kind that is not known has no rules.
const maxKinds = 32

// NewSet puts policies together. The full name of a policy must be unique.
func NewSet(policies ...*Policy) (*Set, error) {
	s := &Set{policies: slices.Clone(policies), tenants: map[string]*group{}}
	slices.SortStableFunc(s.policies, func(a, b *Policy) int {
		if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	var errs Errors
	for i, p := range s.policies {
		if i > 0 && s.policies[i-1].FullName() == p.FullName() {
			errs = append(errs, duplicate(p, s.policies[i-1]))
		}
	}
	if len(errs) > 0 {
		return nil, errs
	}
	for _, p := range s.policies {
		g := s.group(p.Namespace)
		g.policies, g.starts = append(g.policies, p), append(g.starts, len(g.rules))
		g.rules = append(g.rules, p.Rules...)
		s.rules = append(s.rules, p.Rules...)
	}
	return s, nil
}

// group is the last group, or a new one after it.
func (s *Set) group(namespace string) *group {
	if n := len(s.groups); n > 0 && s.groups[n-1].namespace == namespace {
		return s.groups[n-1]
	}
	g := &group{namespace: namespace, first: len(s.rules)}
	s.groups = append(s.groups, g)
	if namespace != "" {
		s.tenants[namespace] = g
	}
	return g
}

func duplicate(p, first *Policy) *Error {
	return &Error{File: p.File, Policy: p.FullName(), Field: "metadata.name",
		Msg: "is the name of a policy in " + first.File + " as well; names must be unique"}
}

// Policies lists the policies: those of the cluster by name, then those of
// each namespace.
func (s *Set) Policies() []*Policy { return slices.Clone(s.policies) }

// Rules lists the rules, also those that are disabled.
func (s *Set) Rules() []*Rule { return slices.Clone(s.rules) }

// Kinds is the set of kinds that some rule looks at.
func (s *Set) Kinds() event.Kinds {
	var kinds event.Kinds
	for _, r := range s.rules {
		if r.Mode != v1alpha1.ModeDisabled {
			kinds |= r.kinds
		}
	}
	return kinds
}

// active is which rules of a group look at events of a kind in a workload.
type active struct {
	rules  match.Bits // in scope, or perhaps in scope
	unsure match.Bits // of these: perhaps. What they say is at best undecided
	some   bool       // there are unsure ones
	any    bool       // there are rules at all
}

// active resolves the scopes of a group's policies.
func (g *group) active(w *event.Workload, kind event.Kind, node map[string]string) active {
	a := active{rules: match.NewBits(len(g.rules)), unsure: match.NewBits(len(g.rules))}
	for i, p := range g.policies {
		in := p.scope.covers(w, node)
		if in == celenv.False {
			continue
		}
		for j, r := range p.Rules {
			n := g.starts[i] + j
			if r.Mode == v1alpha1.ModeDisabled || kind >= maxKinds || !r.kinds.Has(kind) {
				continue
			}
			a.any = true
			a.rules.Set(n)
			if in != celenv.True {
				a.unsure.Set(n)
				a.some = true
			}
		}
	}
	return a
}

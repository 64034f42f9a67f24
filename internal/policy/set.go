package policy

import (
	"slices"
	"strings"

	"github.com/procession-dev/procession/internal/event"

	"github.com/procession-dev/procession/api/v1alpha1"
)

// A Set is all rules of a node. It never changes.
type Set struct {
	policies []*Policy // by name
	rules    []*Rule   // by policy, in the order of the policy

	// index holds the rules to evaluate, by kind of event and place. Rules of
	// one policy stand side by side: they share the values of its variables.
	index [maxKinds][numPlaces][]int32
}

// maxKinds is more than there are; a kind that is not known has no rules.
const maxKinds = 32

// NewSet puts policies together. The name of a policy must be unique.
func NewSet(policies ...*Policy) (*Set, error) {
	s := &Set{policies: slices.Clone(policies)}
	slices.SortStableFunc(s.policies, func(a, b *Policy) int { return strings.Compare(a.Name, b.Name) })
	var errs Errors
	for i, p := range s.policies {
		if i > 0 && s.policies[i-1].Name == p.Name {
			errs = append(errs, duplicate(p, s.policies[i-1]))
		}
	}
	if len(errs) > 0 {
		return nil, errs
	}
	for _, p := range s.policies {
		for _, r := range p.Rules {
			n := int32(len(s.rules))
			s.rules = append(s.rules, r)
			if r.Mode == v1alpha1.ModeDisabled {
				continue
			}
			for _, k := range r.kinds {
				for place := range numPlaces {
					if r.places[place] {
						s.index[k][place] = append(s.index[k][place], n)
					}
				}
			}
		}
	}
	return s, nil
}

func duplicate(p, first *Policy) *Error {
	return &Error{File: p.File, Policy: p.Name, Field: "metadata.name",
		Msg: "is the name of a policy in " + first.File + " as well; names must be unique"}
}

// Policies lists the policies, by name.
func (s *Set) Policies() []*Policy { return slices.Clone(s.policies) }

// Rules lists the rules, also those that are disabled.
func (s *Set) Rules() []*Rule { return slices.Clone(s.rules) }

// Kinds is the set of kinds that some rule looks at.
func (s *Set) Kinds() event.Kinds {
	var kinds event.Kinds
	for k := range s.index {
		for _, rules := range s.index[k] {
			if len(rules) > 0 {
				kinds |= event.KindSet(event.Kind(k))
			}
		}
	}
	return kinds
}

// rulesFor lists the rules to evaluate for an event.
func (s *Set) rulesFor(ev *event.Event) []int32 {
	place := event.PlaceUnknown
	if w := ev.Process.Workload; w != nil && int(w.Place) < numPlaces {
		place = w.Place
	}
	if ev.Kind >= maxKinds {
		return nil
	}
	return s.index[ev.Kind][place]
}

package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A Policy is a policy of either kind.
//
// +kubebuilder:object:generate=false
type Policy interface {
	metav1.Object
	// PolicyKind is the kind, which a decoded object need not carry.
	PolicyKind() string
	// Body is what both kinds have. It is not a copy.
	Body() *PolicySpec
	// Where is the scope as it is written, in the words of the larger kind. A
	// DetectionPolicy's namespace is not part of it.
	Where() *Scope
}

// NewPolicy makes an empty object of a kind; ok is false for other kinds.
func NewPolicy(kind string) (p Policy, ok bool) {
	switch kind {
	case KindClusterDetectionPolicy:
		return new(ClusterDetectionPolicy), true
	case KindDetectionPolicy:
		return new(DetectionPolicy), true
	}
	return nil, false
}

// PolicyKind implements Policy.
func (*ClusterDetectionPolicy) PolicyKind() string { return KindClusterDetectionPolicy }

// Body implements Policy.
func (p *ClusterDetectionPolicy) Body() *PolicySpec { return &p.Spec.PolicySpec }

// Where implements Policy.
func (p *ClusterDetectionPolicy) Where() *Scope { return &p.Spec.Scope }

// PolicyKind implements Policy.
func (*DetectionPolicy) PolicyKind() string { return KindDetectionPolicy }

// Body implements Policy.
func (p *DetectionPolicy) Body() *PolicySpec { return &p.Spec.PolicySpec }

// Where implements Policy.
func (p *DetectionPolicy) Where() *Scope {
	return &Scope{Targets: []Target{TargetContainers}, PodSelector: p.Spec.Scope.PodSelector, Containers: p.Spec.Scope.Containers}
}

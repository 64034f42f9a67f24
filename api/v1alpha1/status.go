package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Types of the conditions in a PolicyStatus.
const (
	// ConditionAccepted: the policy compiles. The message names the field
	// that does not, with line and column in the expression.
	ConditionAccepted = "Accepted"
	// ConditionProgrammed: every node runs the condition's own
	// observedGeneration. That is metadata.generation, or an earlier one while
	// that is not accepted: the last good one stays in force.
	ConditionProgrammed = "Programmed"
	// ConditionDegraded: over budget, more than one in a hundred evaluations
	// undecided, or rules that fail on a node.
	ConditionDegraded = "Degraded"
)

// PolicyStatus says where a policy stands. The collector, who hears from every
// agent, is its only writer.
type PolicyStatus struct {
	// The metadata.generation that the rest is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// Accepted, Programmed and Degraded.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// What became of each rule, as metadata.generation names them.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=128
	Rules []RuleStatus `json:"rules,omitempty"`

	// On how many nodes the policy is in force.
	// +optional
	Nodes NodeCounts `json:"nodes,omitzero"`

	// Matches of all rules on all nodes, since the agents' starts. When only
	// this and what stands at the rules has changed, it is written once a minute
	// at most, and less often where there are many policies.
	// +optional
	Matches int64 `json:"matches"`

	// The last one of them.
	// +optional
	LastMatchTime *metav1.Time `json:"lastMatchTime,omitempty"`
}

// A RuleState says whether a rule is evaluated.
// +kubebuilder:validation:Enum=Active;DryRun;Disabled;Invalid;OverBudget
type RuleState string

// States of a rule.
const (
	RuleActive     RuleState = "Active"     // it alerts
	RuleDryRun     RuleState = "DryRun"     // it counts
	RuleDisabled   RuleState = "Disabled"   // it is not evaluated, as its policy says
	RuleInvalid    RuleState = "Invalid"    // it does not compile; an older version may be in force
	RuleOverBudget RuleState = "OverBudget" // it is not evaluated, or not always: its namespace is over its budget
)

// RuleStatus is the state of a rule, summed up over all nodes.
type RuleStatus struct {
	// Name of the rule.
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// Whether it is evaluated.
	State RuleState `json:"state"`
	// Why, when it is not as the policy says.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Message string `json:"message,omitempty"`
	// Matches.
	// +optional
	Matches int64 `json:"matches,omitempty"`
	// Of these, not raised: by exception, threshold, aggregation, rate limit.
	// +optional
	Suppressed int64 `json:"suppressed,omitempty"`
	// Evaluations that could not be decided.
	// +optional
	Undecided int64 `json:"undecided,omitempty"`
	// The last match.
	// +optional
	LastMatchTime *metav1.Time `json:"lastMatchTime,omitempty"`
}

// NodeCounts count nodes whose agents report: one that has said nothing for
// three minutes is not counted, and not waited for.
type NodeCounts struct {
	// Nodes that should run the policy.
	// +optional
	Desired int32 `json:"desired"`
	// Nodes that run this generation of it.
	// +optional
	Loaded int32 `json:"loaded"`
	// Nodes that refuse it.
	// +optional
	Failed int32 `json:"failed"`
	// Some of those, at most 5.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=5
	Failing []FailingNode `json:"failing,omitempty"`
}

// FailingNode is a node that refuses a policy.
type FailingNode struct {
	// Its name.
	// +kubebuilder:validation:MaxLength=253
	Node string `json:"node"`
	// Why.
	// +kubebuilder:validation:MaxLength=256
	Reason string `json:"reason"`
}

package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names of the group and version, as they stand in an object's apiVersion.
const (
	Group      = "procession.dev"
	Version    = "v1alpha1"
	APIVersion = Group + "/" + Version

	// KindClusterDetectionPolicy is the kind of ClusterDetectionPolicy.
	KindClusterDetectionPolicy = "ClusterDetectionPolicy"
)

// Limits of a policy. They bound what one policy can cost a node; the numbers
// in the kubebuilder markers below are the same.
const (
	MaxRules          = 128      // rules in a policy
	MaxLists          = 64       // lists in a policy
	MaxListValues     = 4096     // values in a list
	MaxListValueBytes = 1024     // bytes in a value of a list
	MaxVariables      = 64       // variables in a policy
	MaxExceptions     = 64       // exceptions of a rule
	MaxNameBytes      = 63       // bytes in the name of a rule, list, variable, exception
	MaxConditionBytes = 16 << 10 // bytes in a condition or any other expression
	MaxTextBytes      = 4 << 10  // bytes in a title, description, message, reason, reference
	MaxItems          = 64       // items in mitre, tags, references, authors, falsePositives
	MinReason         = 8        // characters in the reason of an exception
)

// Mode says what becomes of a match.
// +kubebuilder:validation:Enum=Alert;DryRun;Disabled
type Mode string

// Modes.
const (
	ModeAlert    Mode = "Alert"    // raise an alert
	ModeDryRun   Mode = "DryRun"   // count it, raise nothing
	ModeDisabled Mode = "Disabled" // do not evaluate
)

// Target names a side of the container boundary.
// +kubebuilder:validation:Enum=Containers;Host
type Target string

// Targets.
const (
	TargetContainers Target = "Containers" // processes in a container
	TargetHost       Target = "Host"       // processes in no container
)

// Severity of an alert.
// +kubebuilder:validation:Enum=Critical;High;Medium;Low;Informational
type Severity string

// Severities, the worst first.
const (
	SeverityCritical      Severity = "Critical"
	SeverityHigh          Severity = "High"
	SeverityMedium        Severity = "Medium"
	SeverityLow           Severity = "Low"
	SeverityInformational Severity = "Informational"
)

// OnUndecided says what a rule does when a fact it needs could not be read.
// +kubebuilder:validation:Enum=Skip;Alert
type OnUndecided string

// Choices for OnUndecided.
const (
	UndecidedSkip  OnUndecided = "Skip"  // count it, raise nothing
	UndecidedAlert OnUndecided = "Alert" // treat it as a match, marked as undecided
)

// EventKind is a kind of event a rule can ask for.
// +kubebuilder:validation:Enum=Exec;Fork;Exit;UIDChange;GIDChange;SessionChange;PtraceAttach;PtraceDetach;CommChange;CoreDump
type EventKind string

// A ClusterDetectionPolicy is a set of rules that looks at processes on hosts
// and in containers anywhere in the cluster.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=cdp,categories=procession
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type ClusterDetectionPolicy struct {
	metav1.TypeMeta `json:",inline"`
	// metadata.name is part of the identity of every rule in the policy and
	// must be unique on a node. metadata.generation goes into each alert; it
	// is 0 for a policy that came from a file.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What to look for.
	// +kubebuilder:validation:Required
	Spec ClusterDetectionPolicySpec `json:"spec"`
}

// ClusterDetectionPolicyList is a list of policies.
//
// +kubebuilder:object:root=true
type ClusterDetectionPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ClusterDetectionPolicy `json:"items"`
}

// ClusterDetectionPolicySpec is the policy itself.
type ClusterDetectionPolicySpec struct {
	// What becomes of a match: Alert raises an alert, DryRun counts the match
	// and raises nothing, Disabled does not evaluate the rules (they must
	// still compile). A rule may override it.
	// +optional
	// +kubebuilder:default=Alert
	Mode Mode `json:"mode,omitempty"`

	// Which processes the rules look at. The scope is not part of any
	// condition: it is decided before, at no cost.
	// +optional
	Scope Scope `json:"scope,omitempty"`

	// Lists of text, written lists.NAME in expressions.
	//
	// Example:
	//   lists:
	//     - name: shells
	//       values: [sh, bash, dash]
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=64
	Lists []List `json:"lists,omitempty"`

	// Named expressions, written variables.NAME in conditions. A variable may
	// use the ones above it. It is evaluated at most once per event, and only
	// when a rule needs it.
	//
	// Example:
	//   variables:
	//     - name: isShell
	//       expression: process.name in lists.shells
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=64
	Variables []Variable `json:"variables,omitempty"`

	// The rules. They are independent of each other: each one that matches
	// raises its own alert.
	// +kubebuilder:validation:Required
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=128
	Rules []Rule `json:"rules"`
}

// Scope selects processes.
type Scope struct {
	// Sides of the container boundary: Containers, Host or both. Both, when
	// empty. A process of which it is not known where it runs is evaluated
	// for either: a rule is never skipped because something could not be read.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=2
	Targets []Target `json:"targets,omitempty"`
}

// List is a named list of text.
type List struct {
	// Name in expressions: lists.NAME. A letter, then letters, digits and
	// underscores; at most 63.
	// +kubebuilder:validation:Pattern=`^[a-zA-Z][a-zA-Z0-9_]*$`
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// The values: 1 to 4096 of at most 1024 bytes each. Comparisons are exact
	// and case matters.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=4096
	Values []string `json:"values"`
}

// Variable is a named expression.
type Variable struct {
	// Name in expressions: variables.NAME. A letter, then letters, digits and
	// underscores; at most 63.
	// +kubebuilder:validation:Pattern=`^[a-zA-Z][a-zA-Z0-9_]*$`
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// A CEL expression of type bool, int or string.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=16384
	Expression string `json:"expression"`
}

// Rule is one detection.
type Rule struct {
	// Name of the rule in its policy. The rule's identity in alerts is
	// ClusterDetectionPolicy//POLICY/NAME. Lower-case letters, digits and '-',
	// at most 63; it should never change, because exceptions, dashboards and
	// silences rely on it.
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`

	// One line for people, without a final stop. Example: "Shell with a
	// network redirection". The name, when empty.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Title string `json:"title,omitempty"`

	// What the rule looks for and why it matters: what an analyst reads first.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Description string `json:"description,omitempty"`

	// The kinds of event the rule looks at. An expression may only use
	// variables that all of them fill: exit.code, for example, needs
	// events: [Exit].
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=10
	Events []EventKind `json:"events"`

	// A CEL expression of type bool over the variables in docs/rules.md. A
	// fact that could not be read is missing, not empty: it makes the
	// condition undecided, unless the rest of it decides.
	//
	// Example:
	//   process.name in ['sh', 'bash'] && process.cmdline.contains('/dev/tcp/')
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=16384
	Condition string `json:"condition"`

	// How bad a match is.
	Severity Severity `json:"severity"`

	// What the alert says, as plain text. The title, when neither message nor
	// messageExpression is given. Not together with messageExpression.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	Message string `json:"message,omitempty"`

	// What the alert says, as a CEL expression of type string. Missing text
	// reads "?". If it fails the alert says the title, and the failure is
	// counted. At most 2048 bytes of its result are used, and what a terminal
	// would not print is escaped.
	//
	// Example:
	//   "'uid ' + string(change.from.uid) + ' became root: ' + process.exe"
	// +optional
	// +kubebuilder:validation:MaxLength=16384
	MessageExpression string `json:"messageExpression,omitempty"`

	// What to do when the condition cannot be decided, because a fact is
	// missing or the expression fails: Skip counts it, Alert also raises an
	// alert that is marked as undecided.
	// +optional
	// +kubebuilder:default=Skip
	OnUndecided OnUndecided `json:"onUndecided,omitempty"`

	// Overrides the policy's mode for this rule. In a policy that is Disabled
	// as a whole every rule is off, whatever it says here.
	// +optional
	Mode Mode `json:"mode,omitempty"`

	// Matches that are known and wanted. An exception silences only when its
	// own condition is surely true: one that cannot be decided does not.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=64
	Exceptions []Exception `json:"exceptions,omitempty"`

	// Entries of MITRE ATT&CK.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Mitre []Mitre `json:"mitre,omitempty"`

	// Free words for filtering. Example: [container, lateral-movement].
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Tags []string `json:"tags,omitempty"`

	// Addresses with more about the detection.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	References []string `json:"references,omitempty"`

	// Who wrote the rule. Required by some licences to be shown with a match;
	// required here for rules whose source format is Sigma.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Authors []string `json:"authors,omitempty"`

	// Licence of the rule, as an SPDX name. Example: DRL-1.1. Required for
	// rules whose source format is Sigma.
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	License string `json:"license,omitempty"`

	// Where an imported rule comes from.
	// +optional
	Source *Source `json:"source,omitempty"`

	// What is known to match without being an attack, and what to do about it.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	FalsePositives []string `json:"falsePositives,omitempty"`
}

// Exception is a match that is known and wanted.
type Exception struct {
	// Name of the exception in its rule. Lower-case letters, digits and '-',
	// at most 63. Its matches are counted under it.
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// A CEL expression of type bool. The rule is silent while it is true.
	//
	// Example:
	//   process.exe == '/opt/backup/bin/agent'
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=16384
	Condition string `json:"condition"`
	// Why, for whoever finds it in a year: at least 8 characters.
	// +kubebuilder:validation:MinLength=8
	// +kubebuilder:validation:MaxLength=4096
	Reason string `json:"reason"`
	// When it ends, as RFC 3339 time. From then on the exception does
	// nothing. Never, when empty. Example: 2027-06-30T00:00:00Z
	// +optional
	ExpiresAt *metav1.Time `json:"expiresAt,omitempty"`
}

// Mitre is an entry of MITRE ATT&CK.
type Mitre struct {
	// Tactic in ATT&CK's short form. Example: privilege-escalation.
	// +optional
	// +kubebuilder:validation:Pattern=`^[a-z]+(-[a-z]+)*$`
	// +kubebuilder:validation:MaxLength=63
	Tactic string `json:"tactic,omitempty"`
	// Technique or sub-technique. Example: T1059.004.
	// +kubebuilder:validation:Pattern=`^T[0-9]{4}(\.[0-9]{3})?$`
	Technique string `json:"technique"`
}

// Source says where an imported rule comes from.
type Source struct {
	// Format it was written in. Example: Sigma.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Format string `json:"format"`
	// Its name there. Example: e2072cab-8c9a-459b-b63c-40ae79e27031
	// +optional
	// +kubebuilder:validation:MaxLength=253
	ID string `json:"id,omitempty"`
	// The version that was imported. Example: a commit.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Revision string `json:"revision,omitempty"`
}

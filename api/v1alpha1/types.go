package v1alpha1

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names of the group and version, as they stand in an object's apiVersion.
const (
	Group      = "procession.dev"
	Version    = "v1alpha1"
	APIVersion = Group + "/" + Version

	// KindClusterDetectionPolicy is the kind of ClusterDetectionPolicy.
	KindClusterDetectionPolicy = "ClusterDetectionPolicy"
	// KindDetectionPolicy is the kind of DetectionPolicy.
	KindDetectionPolicy = "DetectionPolicy"
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
	MaxSelector       = 32       // labels, and expressions, of a selector
	MaxSelectorValues = 64       // values of an expression of a selector
	MaxContainers     = 32       // names of containers in a scope
	MaxKeys           = 4        // expressions in the by of an aggregate or a threshold
	MaxKeyBytes       = 256      // bytes in one of them
	MinThreshold      = 2        // matches for a threshold
	MaxThreshold      = 1000     // matches for a threshold
	MaxRateAlerts     = 10000    // alerts in the window of a rate limit
	MaxWindow         = 24 * time.Hour
	MinWindow         = time.Second
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
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=='Accepted')].status`
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=='Programmed')].status`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.nodes.loaded`
// +kubebuilder:printcolumn:name="Of",type=integer,JSONPath=`.status.nodes.desired`
// +kubebuilder:printcolumn:name="Matches",type=integer,JSONPath=`.status.matches`
// +kubebuilder:printcolumn:name="Last",type=date,JSONPath=`.status.lastMatchTime`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=='Accepted')].message`
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

	// Where the policy stands. Written by the collector alone; what stands
	// here in a file is not looked at.
	// +optional
	Status PolicyStatus `json:"status,omitzero"`
}

// ClusterDetectionPolicyList is a list of policies.
//
// +kubebuilder:object:root=true
type ClusterDetectionPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ClusterDetectionPolicy `json:"items"`
}

// A DetectionPolicy is a set of rules that looks at the containers of its own
// namespace's pods, and at nothing else. Who may write one needs no trust
// beyond the namespace:
//
//   - Its rules see no process outside the namespace's containers. A lineage
//     ends at the container's first process, whose process.ppid is 0.
//   - What it says about the node (node.name) is refused.
//   - Modes, exceptions, thresholds, aggregation and rate limits touch its own
//     rules only. It cannot silence or delay a rule of the cluster.
//   - All policies of a namespace together have a budget on each node; beyond
//     it they, and nobody else's, are left out and reported OverBudget.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Namespaced,shortName=dp,categories=procession
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=='Accepted')].status`
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=='Programmed')].status`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.nodes.loaded`
// +kubebuilder:printcolumn:name="Of",type=integer,JSONPath=`.status.nodes.desired`
// +kubebuilder:printcolumn:name="Matches",type=integer,JSONPath=`.status.matches`
// +kubebuilder:printcolumn:name="Last",type=date,JSONPath=`.status.lastMatchTime`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=='Accepted')].message`
type DetectionPolicy struct {
	metav1.TypeMeta `json:",inline"`
	// metadata.namespace and metadata.name are part of the identity of every
	// rule in the policy. The namespace is also what the rules can see.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What to look for.
	// +kubebuilder:validation:Required
	Spec DetectionPolicySpec `json:"spec"`

	// Where the policy stands. Written by the collector alone; what stands
	// here in a file is not looked at.
	// +optional
	Status PolicyStatus `json:"status,omitzero"`
}

// DetectionPolicyList is a list of policies.
//
// +kubebuilder:object:root=true
type DetectionPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []DetectionPolicy `json:"items"`
}

// ClusterDetectionPolicySpec is a policy of the cluster.
type ClusterDetectionPolicySpec struct {
	// Which processes the rules look at. The scope is not part of any
	// condition: it is decided before, once for a container.
	// +optional
	Scope Scope `json:"scope,omitempty"`

	PolicySpec `json:",inline"`
}

// DetectionPolicySpec is a policy of a namespace.
type DetectionPolicySpec struct {
	// Which containers of the namespace the rules look at; all of them, when
	// empty.
	// +optional
	Scope NamespacedScope `json:"scope,omitempty"`

	PolicySpec `json:",inline"`
}

// PolicySpec is what policies of both kinds have.
type PolicySpec struct {
	// What becomes of a match: Alert raises an alert, DryRun counts the match
	// and raises nothing, Disabled does not evaluate the rules (they must
	// still compile). A rule may override it.
	// +optional
	// +kubebuilder:default=Alert
	Mode Mode `json:"mode,omitempty"`

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

	// How many alerts the policy may raise on one node. It is the last step,
	// after exceptions, thresholds and aggregation; no limit, when not given.
	// What is above it is counted under its rule and not raised.
	// +optional
	RateLimit *RateLimit `json:"rateLimit,omitempty"`
}

// RateLimit bounds alerts in time.
type RateLimit struct {
	// Alerts in a window, 1 to 10000.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10000
	Alerts int32 `json:"alerts"`
	// Length of the window, 1s to 24h. Example: 1m
	// +kubebuilder:validation:MaxLength=16
	// +kubebuilder:validation:Pattern=`^([0-9]+(s|m|h))+$`
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('24h')",message="must be from 1s to 24h"
	Window string `json:"window"`
}

// Scope selects processes. A selector that cannot be decided, because the pod
// or its namespace's labels are not known (yet), leaves the rules candidates:
// what they say is then at best undecided, and never skipped silently.
//
// +kubebuilder:validation:XValidation:rule="!has(self.targets) || size(self.targets) == 0 || 'Containers' in self.targets || (!has(self.namespaceSelector) && !has(self.podSelector) && !has(self.containers))",message="a policy for hosts alone cannot select namespaces, pods or containers"
type Scope struct {
	// Sides of the container boundary: Containers, Host or both. Both, when
	// empty. A process of which it is not known where it runs is evaluated
	// for either: a rule is never skipped because something could not be read.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=2
	Targets []Target `json:"targets,omitempty"`

	// Labels of the namespaces whose pods are looked at. What is in no pod is
	// not looked at then. The label kubernetes.io/metadata.name is the
	// namespace's name and always known; others are known only where the
	// agents are told of namespaces' labels.
	//
	// Example:
	//   namespaceSelector:
	//     matchExpressions:
	//       - {key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system]}
	// +optional
	NamespaceSelector *Selector `json:"namespaceSelector,omitempty"`

	// Labels of the pods that are looked at. What is in no pod is not looked
	// at then.
	// +optional
	PodSelector *Selector `json:"podSelector,omitempty"`

	// Names of the containers that are looked at, as in the pod's spec; all,
	// when empty.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Containers []string `json:"containers,omitempty"`

	// Labels of the nodes on which the rules are evaluated; all, when empty.
	// +optional
	NodeSelector *Selector `json:"nodeSelector,omitempty"`
}

// NamespacedScope selects containers of one namespace.
type NamespacedScope struct {
	// Labels of the pods that are looked at; all, when empty.
	// +optional
	PodSelector *Selector `json:"podSelector,omitempty"`

	// Names of the containers that are looked at, as in the pod's spec; all,
	// when empty.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Containers []string `json:"containers,omitempty"`
}

// A LabelValue is the value of a label.
// +kubebuilder:validation:MaxLength=63
type LabelValue string

// A Selector selects by labels, in the words of Kubernetes. Everything in it
// must hold; an empty one selects everything.
//
// +structType=atomic
type Selector struct {
	// Labels that must be there with exactly these values, at most 32.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	MatchLabels map[string]LabelValue `json:"matchLabels,omitempty"`
	// Requirements, at most 32.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	MatchExpressions []Requirement `json:"matchExpressions,omitempty"`
}

// A Requirement is about one label.
//
// +kubebuilder:validation:XValidation:rule="self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 : !has(self.values) || size(self.values) == 0",message="In and NotIn take values, Exists and DoesNotExist take none"
type Requirement struct {
	// The label. Example: app.kubernetes.io/name
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=317
	Key string `json:"key"`
	// In: it has one of the values. NotIn: it has none of them, or is not
	// there. Exists, DoesNotExist.
	Operator Operator `json:"operator"`
	// For In and NotIn, at most 64.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	Values []LabelValue `json:"values,omitempty"`
}

// An Operator compares a label.
// +kubebuilder:validation:Enum=In;NotIn;Exists;DoesNotExist
type Operator string

// Operators.
const (
	OpIn           Operator = "In"
	OpNotIn        Operator = "NotIn"
	OpExists       Operator = "Exists"
	OpDoesNotExist Operator = "DoesNotExist"
)

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
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=1024
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

// Rule is one detection. What follows a match, in this order: exceptions,
// threshold, aggregate, and the policy's rate limit. Whatever one of them
// holds back is counted under the rule and the step.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.message) && has(self.messageExpression))",message="message and messageExpression cannot be given together"
// +kubebuilder:validation:XValidation:rule="!has(self.source) || self.source.format != 'Sigma' || (has(self.authors) && size(self.authors) > 0 && has(self.license))",message="a rule from Sigma names its authors and its license"
type Rule struct {
	// Name of the rule in its policy. The rule's identity in alerts is
	// KIND/NAMESPACE/POLICY/NAME; the namespace is empty for policies of the
	// cluster. Lower-case letters, digits and '-',
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

	// How often it must match before it is an alert; every match, when not
	// given.
	// +optional
	Threshold *Threshold `json:"threshold,omitempty"`

	// Alerts that are repeated are raised once, and summed up; each is raised,
	// when not given.
	// +optional
	Aggregate *Aggregate `json:"aggregate,omitempty"`

	// Entries of MITRE ATT&CK.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Mitre []Mitre `json:"mitre,omitempty"`

	// Free words for filtering. Example: [container, lateral-movement].
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=4096
	Tags []string `json:"tags,omitempty"`

	// Addresses with more about the detection.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=4096
	References []string `json:"references,omitempty"`

	// Who wrote the rule. Required by some licences to be shown with a match;
	// required here for rules whose source format is Sigma.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=4096
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
	// +kubebuilder:validation:items:MaxLength=4096
	FalsePositives []string `json:"falsePositives,omitempty"`
}

// Threshold makes one alert of several matches.
//
// Example, three shells in one pod within five minutes:
//
//	threshold: {by: [pod.uid], count: 3, window: 5m}
type Threshold struct {
	// CEL expressions of type string, int or bool, at most 4 of at most 256
	// bytes: matches are counted for each combination of their values. A
	// fact that is missing is a value of its own. Counted for the node as a
	// whole, when empty.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=4
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=256
	By []string `json:"by,omitempty"`
	// Matches within the window that make an alert, 2 to 1000. After it the
	// count begins anew.
	// +kubebuilder:validation:Minimum=2
	// +kubebuilder:validation:Maximum=1000
	Count int32 `json:"count"`
	// How long a match counts, in the time of the events, 1s to 24h.
	// Example: 5m
	// +kubebuilder:validation:MaxLength=16
	// +kubebuilder:validation:Pattern=`^([0-9]+(s|m|h))+$`
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('24h')",message="must be from 1s to 24h"
	Window string `json:"window"`
}

// Aggregate holds repeats back. The first match is raised at once. Those that
// follow within the window, from the same container, by the same executable,
// user and lineage, are counted, and at the end of the window one alert sums
// them up, with samples. Anything else, another executable, uid, severity,
// lineage or container, is no repeat and is raised at once.
//
// Example:
//
//	aggregate: {by: [process.cmdline], window: 10m}
type Aggregate struct {
	// CEL expressions of type string, int or bool, at most 4 of at most 256
	// bytes: only matches with the same values are repeats of each other. A
	// fact that is missing is a value of its own.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=4
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=256
	By []string `json:"by,omitempty"`
	// How long repeats are held back, from the first match on, in the time of
	// the events, 1s to 24h. Example: 10m
	// +kubebuilder:validation:MaxLength=16
	// +kubebuilder:validation:Pattern=`^([0-9]+(s|m|h))+$`
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('24h')",message="must be from 1s to 24h"
	Window string `json:"window"`
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
	// +kubebuilder:validation:MaxLength=9
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

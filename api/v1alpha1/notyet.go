package v1alpha1

// NotYet are fields that the design has and the agent does not: name of the
// field, and what to do until then. An object that uses one is refused.
func NotYet(field string) (instead string, ok bool) {
	instead, ok = notYet[field]
	return instead, ok
}

var notYet = map[string]string{
	"namespaceSelector":    "compare pod.namespace in the condition",
	"podSelector":          "compare pod.labels in the condition",
	"nodeSelector":         "compare node.name in the condition",
	"containers":           "compare container.name in the condition",
	"valuesFrom":           "write the values into the list",
	"aggregate":            "alerts are aggregated by the agent's own limits",
	"threshold":            "every match raises an alert",
	"sequence":             "a rule sees one event, and the process's ancestors",
	"response":             "the agent observes and does not act",
	"namespacedExceptions": "write the exception into the rule",
	"status":               "the agent reports the state of a policy itself",
}

// NotYetKind says whether kind is a kind of the design that is not built.
func NotYetKind(kind string) bool {
	switch kind {
	case "DetectionPolicy", "DetectionException", "ClusterDetectionException", "DetectionList", "DetectionNode":
		return true
	}
	return false
}

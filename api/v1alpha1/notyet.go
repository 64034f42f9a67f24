package v1alpha1

// NotYet are fields that the design has and the agent does not: name of the
// field, and what to do until then. An object that uses one is refused.
func NotYet(field string) (instead string, ok bool) {
	instead, ok = notYet[field]
	return instead, ok
}

var notYet = map[string]string{
	"valuesFrom":           "write the values into the list",
	"sequence":             "a rule sees one event, and the process's ancestors",
	"response":             "the agent observes and does not act",
	"namespacedExceptions": "write the exception into the rule",
}

// NotYetKind says whether kind is a kind of the design that is not built.
func NotYetKind(kind string) bool {
	switch kind {
	case "DetectionException", "ClusterDetectionException", "DetectionList", "DetectionNode":
		return true
	}
	return false
}

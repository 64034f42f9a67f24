package sink

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
)

// A Filter says what a sink wants. The zero Filter wants everything but
// coverage, which comes each minute from each node.
type Filter struct {
	Kinds       []store.Kind // empty: all but store.Coverage
	MinSeverity pb.Severity  // of alerts
	Rules       []string     // of alerts: patterns of kind/namespace/policy/rule, as in package path; empty: all
	Namespaces  []string     // of alerts and amendments: patterns of the pod's namespace; empty: all, and what is in no pod
}

// Check reports a pattern that is none.
func (f *Filter) Check() error {
	for key, patterns := range map[string][]string{"rules": f.Rules, "namespaces": f.Namespaces} {
		for i, p := range patterns {
			if _, err := path.Match(p, ""); err != nil {
				return fmt.Errorf("%s[%d]: %.64q is not a pattern: %w", key, i, p, err)
			}
		}
	}
	if slices.Contains(f.Kinds, 0) {
		return errors.New("kinds: a kind without a name")
	}
	return nil
}

// Match reports whether the sink wants r. Rejected and damaged records have no
// severity, rule or namespace: their kind alone decides, as for losses. What
// cannot be read any more is wanted: it is evidence.
func (f *Filter) Match(r *store.Record) bool {
	if len(f.Kinds) == 0 && r.Kind == store.Coverage || len(f.Kinds) > 0 && !slices.Contains(f.Kinds, r.Kind) {
		return false
	}
	if r.Kind == store.Alert && (r.Severity < f.MinSeverity || !matchAny(f.Rules, r.Rule)) {
		return false
	}
	if len(f.Namespaces) == 0 || r.Kind != store.Alert && r.Kind != store.Amendment {
		return true
	}
	var it pb.Item
	if proto.Unmarshal(r.Payload, &it) != nil {
		return true
	}
	pod := it.GetAlert().GetEvent().GetPod()
	if r.Kind == store.Amendment {
		pod = it.GetAmendment().GetPod()
	}
	return matchAny(f.Namespaces, pod.GetNamespace())
}

// matchAny reports whether s matches a pattern; no patterns match all.
func matchAny(patterns []string, s string) bool {
	for _, p := range patterns {
		if ok, _ := path.Match(p, s); ok {
			return true
		}
	}
	return len(patterns) == 0
}

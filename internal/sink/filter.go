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
// coverage, which comes each minute from each node, and what rules in dry run
// have to say.
//
// An amendment goes where its alert goes: it has the alert's rule and severity.
// Only the namespace is its own, for it may be what was not known before. An
// amendment of an agent that is too old to say is wanted whatever its rule.
type Filter struct {
	Kinds       []store.Kind // empty: all but store.Coverage
	DryRun      bool         // alerts and amendments of rules in dry run as well
	MinSeverity pb.Severity  // of alerts and their amendments
	Rules       []string     // of them: patterns of kind/namespace/policy/rule, as in package path; empty: all
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
	kind := r.Kind
	if kind == store.DryRun {
		if !f.DryRun {
			return false
		}
		kind = Within(r)
	}
	if len(f.Kinds) == 0 && kind == store.Coverage || len(f.Kinds) > 0 && !slices.Contains(f.Kinds, kind) {
		return false
	}
	if kind != store.Alert && kind != store.Amendment {
		return true
	}
	old := kind == store.Amendment && r.Rule == ""
	if !old && (r.Severity < f.MinSeverity || !matchAny(f.Rules, r.Rule)) {
		return false
	}
	if len(f.Namespaces) == 0 {
		return true
	}
	var it pb.Item
	if proto.Unmarshal(r.Payload, &it) != nil {
		return true
	}
	pod := it.GetAlert().GetEvent().GetPod()
	if kind == store.Amendment {
		pod = it.GetAmendment().GetPod()
	}
	return matchAny(f.Namespaces, pod.GetNamespace())
}

// Within is the kind of a record, with that of what is in it for one of a rule
// in dry run.
func Within(r *store.Record) store.Kind {
	if r.Kind != store.DryRun {
		return r.Kind
	}
	var it pb.Item
	if proto.Unmarshal(r.Payload, &it) == nil && it.GetAmendment() != nil {
		return store.Amendment
	}
	return store.Alert
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

package alert

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
)

// severities has the number of each severity's name in policies.
var severities = map[string]pb.Severity{
	"Critical":      pb.Severity_SEVERITY_CRITICAL,
	"High":          pb.Severity_SEVERITY_HIGH,
	"Medium":        pb.Severity_SEVERITY_MEDIUM,
	"Low":           pb.Severity_SEVERITY_LOW,
	"Informational": pb.Severity_SEVERITY_INFORMATIONAL,
}

// Alert describes a match: the event with all its process's ancestors, the
// rule, and what the rule saw. ev is the match's Event, or a copy of it.
func (b *Builder) Alert(ev *event.Event, m *policy.Match) *pb.Alert {
	r := m.Rule
	out := &pb.Alert{
		Event:            b.Event(ev, MaxAncestors),
		Severity:         severities[string(r.Severity())],
		Rule:             r.ID,
		Title:            r.Title,
		Message:          m.Message,
		Tags:             r.Tags(),
		PolicyGeneration: r.Generation,
		PolicyDigest:     r.Digest,
		Undecided:        m.Undecided,
		Late:             m.Late,
		DryRun:           m.DryRun,
		Aggregated:       aggregated(m.Aggregated),
	}
	for _, t := range r.Mitre() {
		out.Mitre = append(out.Mitre, &pb.Mitre{Tactic: t.Tactic, Technique: t.Technique})
	}
	for _, e := range m.Evidence {
		out.Evidence = append(out.Evidence, &pb.Evidence{Field: e.Name, Value: e.Text, Missing: e.Missing,
			Term: e.Term, Truth: e.Truth, Exception: e.Exception, Found: e.Found})
	}
	return out
}

func aggregated(a *policy.Aggregated) *pb.Aggregated {
	if a == nil {
		return nil
	}
	out := &pb.Aggregated{Count: a.Count, FirstSeq: a.First, Why: string(a.Why), From: timestamppb.New(a.From), Until: timestamppb.New(a.Until)}
	for _, s := range a.Samples {
		x := &pb.Sample{Time: timestamppb.New(s.Time), Pid: s.PID, Exe: []byte(s.Exe), Cmdline: []byte(s.Cmdline)}
		if s.HasUID {
			x.Uid = proto.Uint32(s.UID)
		}
		out.Samples = append(out.Samples, x)
	}
	return out
}

package present

import (
	"encoding/hex"
	"slices"
	"strconv"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// AppendItemJSON appends an item as one JSON object, without a newline. ok is
// false, and nothing is appended, for one that is empty or of a newer agent.
func AppendItemJSON(dst []byte, id Identity, it *pb.Item) (_ []byte, ok bool) {
	switch it := it.GetItem().(type) {
	case *pb.Item_Alert:
		return AppendAlertJSON(dst, id, it.Alert), true
	case *pb.Item_Amendment:
		return AppendAmendmentJSON(dst, id, it.Amendment), true
	case *pb.Item_Coverage:
		return AppendCoverageJSON(dst, id, it.Coverage), true
	}
	return dst, false
}

// AppendItemLine appends an item as one line, without the newline. ok is as
// that of AppendItemJSON.
func (s Style) AppendItemLine(dst []byte, id Identity, it *pb.Item) (_ []byte, ok bool) {
	switch it := it.GetItem().(type) {
	case *pb.Item_Alert:
		return s.AppendAlertLine(dst, id, it.Alert), true
	case *pb.Item_Amendment:
		return s.AppendAmendmentLine(dst, id, it.Amendment), true
	case *pb.Item_Coverage:
		return s.AppendCoverageLine(dst, id, it.Coverage), true
	}
	return dst, false
}

// AppendAmendmentJSON appends an amendment as one JSON object of kind
// "Amendment", without a newline. id is its own; "amends" has the alert's.
func AppendAmendmentJSON(dst []byte, id Identity, m *pb.Amendment) []byte {
	dst = append(dst, '{')
	dst = appendIdentity(dst, id)
	dst = appendTime(dst, "time", m.GetTime())
	dst = appendCommitted(dst, id)
	dst = appendStr(dst, "kind", "Amendment")
	dst = appendKey(dst, "amends")
	dst = append(dst, '"')
	dst = appendStringBody(dst, Amended(id, m).String())
	dst = append(dst, '"')
	dst = appendStr(dst, "cluster", id.Cluster)
	dst = appendStr(dst, "node", id.Node)
	if m.GetRule() != "" {
		severity, _ := severityName(m.GetSeverity())
		dst = appendStr(dst, "severity", severity)
	}
	dst = appendStr(dst, "rule", m.GetRule())
	dst = appendTrue(dst, "dryRun", m.GetDryRun())
	dst = appendStr(dst, "place", m.GetPlace())
	dst = appendStr(dst, "placeReason", m.GetPlaceReason())
	dst = appendContainer(dst, m.GetContainer())
	dst = appendPod(dst, m.GetPod())
	return append(dst, '}')
}

// Amended is the identity of the alert that an amendment with the identity id
// completes.
func Amended(id Identity, m *pb.Amendment) Identity {
	if len(m.GetEpoch()) == len(id.Epoch) {
		copy(id.Epoch[:], m.GetEpoch())
	}
	id.Seq, id.Committed = m.GetSeq(), time.Time{}
	return id
}

// AppendCoverageJSON appends what a node saw and did not see in a window of
// time as one JSON object of kind "Coverage", without a newline.
func AppendCoverageJSON(dst []byte, id Identity, c *pb.Coverage) []byte {
	dst = append(dst, '{')
	dst = appendIdentity(dst, id)
	dst = appendTime(dst, "time", c.GetTo())
	dst = appendCommitted(dst, id)
	dst = appendStr(dst, "kind", "Coverage")
	dst = appendStr(dst, "cluster", id.Cluster)
	dst = appendStr(dst, "node", id.Node)
	dst = appendKey(dst, "coverage")
	dst = append(dst, '{')
	dst = appendTime(dst, "from", c.GetFrom())
	dst = appendTime(dst, "to", c.GetTo())
	dst = appendTime(dst, "recordingSince", c.GetRecordingSince())
	dst = appendStr(dst, "capture", c.GetCapture())
	dst = appendStr(dst, "captureReason", c.GetCaptureReason())
	dst = appendCounts(dst, "events", c.GetEvents())
	dst = appendCounts(dst, "lost", c.GetLost())
	dst = appendCounts(dst, "missed", c.GetMissed())
	dst = appendCounts(dst, "unresolved", c.GetUnresolved())
	dst = appendCount(dst, "forged", c.GetForged())
	dst = appendCount(dst, "undecided", c.GetUndecided())
	dst = appendCount(dst, "failed", c.GetFailed())
	dst = appendCounts(dst, "suppressed", c.GetSuppressed())
	dst = appendCount(dst, "alerts", c.GetAlerts())
	dst = appendCount(dst, "spooled", c.GetSpooled())
	dst = appendCount(dst, "acked", c.GetAcked())
	dst = appendCount(dst, "evicted", c.GetEvicted())
	dst = appendCount(dst, "spoolBytes", c.GetSpoolBytes())
	dst = appendCount(dst, "unacked", c.GetUnacked())
	dst = appendCount(dst, "beatsSent", c.GetBeatsSent())
	dst = appendCount(dst, "beatsSeen", c.GetBeatsSeen())
	dst = appendSeconds(dst, "beatMaxSeconds", c.GetBeatMaxNs())
	dst = appendCount(dst, "rules", uint64(c.GetRules()))
	dst = appendStr(dst, "policiesDigest", c.GetPoliciesDigest())
	dst = appendStrings(dst, "impaired", c.GetImpaired())
	dst = appendStorms(dst, c.GetStorms())
	dst = appendPolicies(dst, c.GetPolicies())
	dst = appendUnwatched(dst, c.GetUnwatched())
	return append(dst, "}}"...)
}

func appendPolicies(dst []byte, r *pb.PolicyReport) []byte {
	if r == nil {
		return dst
	}
	dst = appendKey(dst, "policies")
	dst = append(dst, '[')
	for _, p := range r.GetPolicies() {
		dst = appendElem(dst)
		dst = append(dst, '{')
		dst = appendStr(dst, "object", p.GetObject())
		dst = appendCount(dst, "generation", uint64(max(0, p.GetGeneration())))
		dst = appendCount(dst, "inForce", uint64(max(0, p.GetInForce())))
		dst = appendStr(dst, "error", p.GetError())
		if len(p.GetRules()) > 0 {
			dst = appendKey(dst, "rules")
			dst = append(dst, '[')
			for _, c := range p.GetRules() {
				dst = appendElem(dst)
				dst = appendRuleCount(dst, c)
			}
			dst = append(dst, ']')
		}
		dst = append(dst, '}')
	}
	dst = append(dst, ']')
	return appendCount(dst, "policiesLeftOut", uint64(r.GetLeftOut()))
}

func appendRuleCount(dst []byte, c *pb.RuleCount) []byte {
	dst = append(dst, '{')
	dst = appendStr(dst, "name", c.GetName())
	dst = appendStr(dst, "overBudget", c.GetOverBudget())
	dst = appendCount(dst, "matches", c.GetMatches())
	dst = appendCount(dst, "suppressed", c.GetSuppressed())
	dst = appendCount(dst, "undecided", c.GetUndecided())
	dst = appendCount(dst, "failed", c.GetFailed())
	dst = appendCount(dst, "evaluated", c.GetEvaluated())
	dst = appendTime(dst, "lastMatch", c.GetLastMatch())
	dst = appendStr(dst, "error", c.GetError())
	return append(dst, '}')
}

func appendUnwatched(dst []byte, u *pb.Unwatched) []byte {
	if u == nil {
		return dst
	}
	dst = appendKey(dst, "unwatched")
	dst = append(dst, '{')
	dst = appendTime(dst, "from", u.GetFrom())
	dst = appendTime(dst, "until", u.GetUntil())
	dst = appendStr(dst, "reason", u.GetReason())
	dst = appendTime(dst, "booted", u.GetBooted())
	return append(dst, '}')
}

func appendStorms(dst []byte, storms []*pb.Storm) []byte {
	if len(storms) == 0 {
		return dst
	}
	dst = appendKey(dst, "storms")
	dst = append(dst, '[')
	for _, s := range storms {
		dst = appendElem(dst)
		dst = append(dst, '{')
		dst = appendStr(dst, "containerId", s.GetContainerId())
		dst = appendStr(dst, "podUid", s.GetPodUid())
		dst = appendCount(dst, "events", s.GetEvents())
		dst = appendCount(dst, "shed", s.GetShed())
		dst = append(dst, '}')
	}
	return append(dst, ']')
}

// maxCount is the highest number every JSON reader keeps exact.
const maxCount = 1<<53 - 1

// appendCount appends a number of things. No agent of ours counts to 2^53; what
// another one claims is cut there.
func appendCount(dst []byte, key string, v uint64) []byte {
	return appendUint(dst, key, min(v, maxCount))
}

// appendCounts appends counts by name, in the order of the names; nothing if
// there are none.
func appendCounts(dst []byte, key string, m map[string]uint64) []byte {
	if len(m) == 0 {
		return dst
	}
	dst = appendKey(dst, key)
	dst = append(dst, '{')
	for _, k := range sortedKeys(m) {
		dst = appendElem(dst)
		dst = appendString(dst, k)
		dst = append(dst, ':')
		dst = strconv.AppendUint(dst, min(m[k], maxCount), 10)
	}
	return append(dst, '}')
}

func sortedKeys(m map[string]uint64) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// AppendAmendmentLine appends an amendment as one line, without the newline.
func (s Style) AppendAmendmentLine(dst []byte, id Identity, m *pb.Amendment) []byte {
	start := len(dst)
	dst = s.on(dst, colourDim)
	dst = s.appendTime(dst, &pb.Event{Time: m.GetTime()}, time.TimeOnly)
	dst = s.off(dst)
	dst = append(dst, " ···· alert "...)
	dst = strconv.AppendUint(dst, m.GetSeq(), 10)
	if e := m.GetEpoch(); len(e) == len(id.Epoch) && string(e) != string(id.Epoch[:]) {
		dst = append(dst, " of epoch "...)
		dst = hex.AppendEncode(dst, e[:4])
	}
	dst = append(dst, " is from "...)
	dst = appendPlace(dst, &pb.Event{Pod: m.GetPod(), Container: m.GetContainer(), Place: m.GetPlace()})
	if n := m.GetContainer().GetName(); n != "" {
		dst = append(dst, " container "...)
		dst = appendWord(dst, n, false)
	}
	if r := m.GetPlaceReason(); r != "" {
		dst = append(dst, " unknown: "...)
		dst = appendWord(dst, r, false)
	}
	dst = append(dst, ' ')
	dst = s.on(dst, colourDim)
	dst = appendWord(dst, id.Node, false)
	dst = s.off(dst)
	return s.cut(dst, start)
}

// AppendCoverageLine appends what a node saw as one line, without the newline.
func (s Style) AppendCoverageLine(dst []byte, id Identity, c *pb.Coverage) []byte {
	start := len(dst)
	dst = s.on(dst, colourDim)
	dst = s.appendTime(dst, &pb.Event{Time: c.GetTo()}, time.TimeOnly)
	dst = s.off(dst)
	lost := Total(c.GetLost())
	dst = append(dst, " SEEN "...)
	if lost > 0 {
		dst = s.on(dst, colourAlarm)
	}
	dst = strconv.AppendUint(dst, Total(c.GetEvents()), 10)
	dst = append(dst, " events, lost "...)
	dst = strconv.AppendUint(dst, lost, 10)
	if lost > 0 {
		dst = s.off(dst)
	}
	dst = append(dst, ", undecided "...)
	dst = strconv.AppendUint(dst, c.GetUndecided(), 10)
	dst = append(dst, ", alerts "...)
	dst = strconv.AppendUint(dst, c.GetAlerts(), 10)
	dst = append(dst, ", unacknowledged "...)
	dst = strconv.AppendUint(dst, c.GetUnacked(), 10)
	dst = append(dst, ", heartbeats "...)
	dst = strconv.AppendUint(dst, c.GetBeatsSeen(), 10)
	dst = append(dst, '/')
	dst = strconv.AppendUint(dst, c.GetBeatsSent(), 10)
	dst = append(dst, ' ')
	dst = appendWord(dst, c.GetCapture(), false)
	dst = append(dst, ' ')
	dst = s.on(dst, colourDim)
	dst = appendWord(dst, id.Node, false)
	dst = s.off(dst)
	return s.cut(dst, start)
}

// Total adds up counts; it stops at the highest number there is.
func Total(counts map[string]uint64) (sum uint64) {
	for _, n := range counts {
		if sum+n < sum {
			return ^uint64(0)
		}
		sum += n
	}
	return sum
}

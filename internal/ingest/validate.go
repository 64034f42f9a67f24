package ingest

import (
	"fmt"
	"hash/crc32"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
)

// Limits of the protocol.
const (
	Protocol = 1

	// MaxMessageBytes is the largest message read from a stream.
	MaxMessageBytes = 4 << 20
	// MaxBatchRecords is the most records, and the most losses, of one batch.
	MaxBatchRecords = 256
	// PreferBatchBytes is what agents are asked to keep batches below.
	PreferBatchBytes = 256 << 10
	// MaxRecordBytes is the largest record that is stored as an item.
	MaxRecordBytes = 1 << 20
	// MaxLanes is the most epochs of one Hello.
	MaxLanes = 1024

	// wholeLanes: an agent whose spool has very many epochs names them in turns,
	// so a Hello of more says nothing about those it leaves out.
	wholeLanes = MaxLanes / 2

	maxNameBytes      = 253      // node, as Kubernetes limits it
	maxHintBytes      = 128      // agent version, boot id
	maxDetailBytes    = 1 << 10  // of a loss; more is cut
	keepRejectedBytes = 64 << 10 // of a rejected record's payload
)

// A FieldError names the field of a message that is wrong.
type FieldError struct {
	Field string // as in the protocol: batch.records[3].seq
	Msg   string
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Msg }

func fieldErr(field, format string, args ...any) error {
	return &FieldError{field, fmt.Sprintf(format, args...)}
}

// checkHello turns a Hello into what the store asks.
func checkHello(h *pb.Hello, node string, now time.Time) (*store.Hello, error) {
	if h.GetProtocol() != Protocol {
		return nil, fieldErr("hello.protocol", "%d, this collector speaks %d", h.GetProtocol(), Protocol)
	}
	for _, f := range []struct {
		name, val string
		limit     int
	}{
		{"hello.agent_version", h.GetAgentVersion(), maxHintBytes},
		{"hello.node", h.GetNode(), maxNameBytes},
		{"hello.boot_id", h.GetBootId(), maxHintBytes},
	} {
		if len(f.val) > f.limit {
			return nil, fieldErr(f.name, "%d bytes, limit %d", len(f.val), f.limit)
		}
	}
	n := len(h.GetLanes())
	if n == 0 {
		return nil, fieldErr("hello.lanes", "none; the running agent's own epoch is missing")
	}
	if n > MaxLanes {
		return nil, fieldErr("hello.lanes", "%d, limit %d", n, MaxLanes)
	}
	out := &store.Hello{Node: node, Lanes: make([]store.Lane, n), Whole: n <= wholeLanes, At: now}
	seen := make(map[store.Epoch]bool, n)
	for i, l := range h.GetLanes() {
		at := func(f string) string { return fmt.Sprintf("hello.lanes[%d].%s", i, f) }
		e, err := store.ParseEpoch(l.GetEpoch())
		if err != nil {
			return nil, fieldErr(at("epoch"), "%v", err)
		}
		if seen[e] {
			return nil, fieldErr(at("epoch"), "%v twice", e)
		}
		seen[e] = true
		if l.GetMade() > store.MaxSeq {
			return nil, fieldErr(at("made"), "%d, limit %d", l.GetMade(), uint64(store.MaxSeq))
		}
		if l.GetFirstSeq() > l.GetMade()+1 {
			return nil, fieldErr(at("first_seq"), "%d, but only %d were made", l.GetFirstSeq(), l.GetMade())
		}
		out.Lanes[i] = store.Lane{Epoch: e, Made: l.GetMade()}
	}
	return out, nil
}

// checkBatch turns a Batch into what the store keeps. Records that are no items
// come out as rejected ones; an error means the batch is not one.
func checkBatch(b *pb.Batch, node string, now time.Time) (*store.Batch, error) {
	e, err := store.ParseEpoch(b.GetEpoch())
	if err != nil {
		return nil, fieldErr("batch.epoch", "%v", err)
	}
	recs, losses := b.GetRecords(), b.GetLosses()
	switch {
	case len(recs)+len(losses) == 0:
		return nil, fieldErr("batch", "has neither records nor losses")
	case len(recs) > MaxBatchRecords:
		return nil, fieldErr("batch.records", "%d, limit %d", len(recs), MaxBatchRecords)
	case len(losses) > MaxBatchRecords:
		return nil, fieldErr("batch.losses", "%d, limit %d", len(losses), MaxBatchRecords)
	case b.GetFirstSeq() == 0:
		return nil, fieldErr("batch.first_seq", "0; numbers begin at 1")
	}
	out := &store.Batch{Node: node, Epoch: e, Received: now, Records: make([]store.Record, 0, len(recs)+len(losses))}
	next, i, j := b.GetFirstSeq(), 0, 0
	for i < len(recs) || j < len(losses) {
		switch {
		case next > store.MaxSeq:
			return nil, fieldErr("batch", "sequence number %d, limit %d", next, uint64(store.MaxSeq))
		case i < len(recs) && recs[i].GetSeq() == next:
			out.Records = append(out.Records, checkRecord(recs[i]))
			i++
			next++
		case j < len(losses) && losses[j].GetFrom() == next:
			l := losses[j]
			if l.GetTo() < l.GetFrom() || l.GetTo() > store.MaxSeq {
				return nil, fieldErr(fmt.Sprintf("batch.losses[%d].to", j), "%d, want %d..%d", l.GetTo(), l.GetFrom(), uint64(store.MaxSeq))
			}
			out.Records = append(out.Records, store.Record{
				Kind: store.Loss, Seq: l.GetFrom(), To: l.GetTo(),
				LossReason: l.GetReason(), Reason: cut(l.GetDetail(), maxDetailBytes)})
			j++
			next = l.GetTo() + 1
		case i < len(recs):
			return nil, fieldErr(fmt.Sprintf("batch.records[%d].seq", i), "%d, want %d", recs[i].GetSeq(), next)
		default:
			return nil, fieldErr(fmt.Sprintf("batch.losses[%d].from", j), "%d, want %d", losses[j].GetFrom(), next)
		}
	}
	return out, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkRecord never fails: what is wrong with one record is stored with it.
func checkRecord(r *pb.Record) store.Record {
	p := r.GetPayload()
	out := store.Record{Seq: r.GetSeq(), To: r.GetSeq(), Payload: p, CRC32C: r.GetCrc32C()}
	reject := func(keep int, format string, args ...any) store.Record {
		kept := p[:min(len(p), keep)]
		return store.Record{Seq: r.GetSeq(), To: r.GetSeq(), Kind: store.Rejected,
			Reason: cut(fmt.Sprintf(format, args...), maxDetailBytes), Payload: kept, CRC32C: store.Checksum(kept)}
	}
	if len(p) > MaxRecordBytes {
		return reject(keepRejectedBytes, "payload: %d bytes, limit %d; the first %d are kept", len(p), MaxRecordBytes, keepRejectedBytes)
	}
	if sum := crc32.Checksum(p, castagnoli); sum != r.GetCrc32C() {
		return reject(keepRejectedBytes, "crc32c: the payload's is %08x, the record says %08x", sum, r.GetCrc32C())
	}
	if h, ok := scanAlert(p); ok {
		out.Kind, out.Severity, out.Rule, out.EventTime = store.Alert, h.severity, cut(h.rule, maxDetailBytes), storable(h.time)
		return out
	}
	return decodeRecord(out, reject)
}

// decodeRecord is checkRecord of any item, by decoding it.
func decodeRecord(out store.Record, reject func(keep int, format string, args ...any) store.Record) store.Record {
	p := out.Payload
	var it pb.Item
	if err := proto.Unmarshal(p, &it); err != nil {
		return reject(keepRejectedBytes, "payload: not an item: %v", err)
	}
	switch it.GetItem().(type) {
	case *pb.Item_Alert:
		a := it.GetAlert()
		if a.GetEvent() == nil {
			return reject(keepRejectedBytes, "payload: an alert without its event")
		}
		out.Kind = kindOf(store.Alert, a.GetDryRun())
		out.Severity, out.Rule, out.EventTime = a.GetSeverity(), cut(a.GetRule(), maxDetailBytes), storable(a.GetEvent().GetTime())
	case *pb.Item_Amendment:
		m := it.GetAmendment()
		if n := len(m.GetEpoch()); n != 0 && n != len(store.Epoch{}) {
			return reject(keepRejectedBytes, "payload: amendment.epoch: %d bytes, want %d", n, len(store.Epoch{}))
		}
		if m.GetSeq() == 0 {
			return reject(keepRejectedBytes, "payload: amendment.seq: 0; numbers begin at 1")
		}
		out.Kind, out.EventTime = kindOf(store.Amendment, m.GetDryRun()), storable(m.GetTime())
		out.Severity, out.Rule = m.GetSeverity(), cut(m.GetRule(), maxDetailBytes)
	case *pb.Item_Coverage:
		out.Kind, out.EventTime = store.Coverage, storable(it.GetCoverage().GetTo())
		if p := it.GetCoverage().GetPolicies(); p != nil {
			b, err := proto.Marshal(p)
			if err != nil {
				return reject(keepRejectedBytes, "payload: coverage.policies: %v", err)
			}
			out.Policies = b
			if b == nil {
				out.Policies = []byte{} // there is no policy
			}
		}
	default:
		// Of a newer agent. All of it is kept, for a collector that knows it.
		return reject(MaxRecordBytes, "payload: an item of a kind this collector does not know")
	}
	return out
}

// kindOf keeps what is in dry run apart.
func kindOf(k store.Kind, dryRun bool) store.Kind {
	if dryRun {
		return store.DryRun
	}
	return k
}

// storable is a time that fits the store's column, or zero.
func storable(ts *timestamppb.Timestamp) time.Time {
	if t := ts.AsTime(); ts.IsValid() && t.Year() >= 1970 && t.Year() < 2262 {
		return t
	}
	return time.Time{}
}

// cut shortens s to at most n bytes of whole characters.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

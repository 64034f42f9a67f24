package sink

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/store"
)

// timeLayout is that of package present.
const timeLayout = "2006-01-02T15:04:05.000000000Z07:00"

// AppendJSON appends a record as one JSON object without a newline: an item
// or a loss as package present has it, a rejected or damaged record as
//
//	{"id","time","kind":"Rejected"|"Damaged","cluster","node","epoch","seq","reason","payload"}
//
// with what came instead of an item in base64. Its time, as that of a loss,
// is when the collector received it.
func AppendJSON(dst []byte, cluster string, r *store.Record) []byte {
	it, l, reason := content(r)
	id := identity(cluster, r)
	if l != nil {
		return present.AppendLossJSON(dst, id, r.Received, l)
	}
	if dst, ok := present.AppendItemJSON(dst, id, it); ok {
		return dst
	}
	kind := "Rejected"
	if r.Kind != store.Rejected {
		kind = "Damaged"
	}
	b, err := json.Marshal(struct {
		ID      string `json:"id"`
		Time    string `json:"time"`
		Kind    string `json:"kind"`
		Cluster string `json:"cluster"`
		Node    string `json:"node"`
		Epoch   string `json:"epoch"`
		Seq     uint64 `json:"seq,string"`
		Reason  string `json:"reason"`
		Payload []byte `json:"payload"`
	}{r.ID(cluster), r.Received.UTC().Format(timeLayout), kind, cluster, r.Node, r.Epoch.String(), r.Seq, reason, r.Payload})
	if err != nil { // strings, bytes and a number: cannot be
		panic(err)
	}
	return append(dst, b...)
}

// AppendLine appends a record as one line for people, without the newline.
func AppendLine(dst []byte, s present.Style, cluster string, r *store.Record) []byte {
	it, l, reason := content(r)
	id := identity(cluster, r)
	if l != nil {
		return s.AppendLossLine(dst, id, r.Received, l)
	}
	if dst, ok := s.AppendItemLine(dst, id, it); ok {
		return dst
	}
	zone, layout := s.Zone, s.Layout
	if zone == nil {
		zone = time.UTC
	}
	if layout == "" {
		layout = time.TimeOnly
	}
	dst = r.Received.In(zone).AppendFormat(dst, layout)
	dst = append(dst, " BAD  record "...)
	dst = strconv.AppendUint(dst, r.Seq, 10)
	dst = append(dst, " of "...)
	dst = present.AppendSafe(dst, []byte(r.Node))
	dst = append(dst, " cannot be read: "...)
	return present.AppendSafe(dst, []byte(reason))
}

func identity(cluster string, r *store.Record) present.Identity {
	return present.Identity{Cluster: cluster, Node: r.Node, Epoch: r.Epoch, Seq: r.Seq, Committed: r.Committed}
}

// content is the item or the loss of a record, or why it is neither.
func content(r *store.Record) (it *pb.Item, l *pb.Loss, reason string) {
	switch r.Kind {
	case store.Alert, store.Amendment, store.Coverage, store.DryRun:
		it = new(pb.Item)
		if err := proto.Unmarshal(r.Payload, it); err != nil || it.GetItem() == nil { // was readable when it was stored
			return nil, nil, fmt.Sprintf("cannot be read any more: %v", err)
		}
		return it, nil, ""
	case store.Loss:
		return nil, &pb.Loss{From: r.Seq, To: r.To, Reason: r.LossReason, Detail: r.Reason}, ""
	}
	return nil, nil, r.Reason
}

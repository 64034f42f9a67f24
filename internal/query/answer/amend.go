package answer

import (
	"context"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/store"
)

// maxAmendments bounds what one question keeps of them, some 100 MiB at worst.
// Alerts whose amendments find no room are told as they left their node.
const maxAmendments = 100_000

// amendments are what became known of alerts after they were stored, so that
// who asks for an alert gets one, with what is known by now.
type amendments map[alertKey][]*pb.Amendment

// An alertKey names an alert.
type alertKey struct {
	node  string
	epoch store.Epoch
	seq   uint64
}

// note keeps r if it is an amendment.
func (a amendments) note(r *store.Record) {
	if r.Kind != store.Amendment && r.Kind != store.DryRun || len(a) >= maxAmendments {
		return
	}
	var it pb.Item
	m := &it
	if proto.Unmarshal(r.Payload, m) != nil || m.GetAmendment() == nil {
		return // it was checked when it came; what is damaged amends nothing
	}
	id := present.Amended(present.Identity{Node: r.Node, Epoch: r.Epoch}, m.GetAmendment())
	k := alertKey{r.Node, store.Epoch(id.Epoch), id.Seq}
	a[k] = append(a[k], m.GetAmendment())
}

// apply puts what is known of an alert into it.
func (a amendments) apply(r *store.Record) {
	if r.Kind != store.Alert && r.Kind != store.DryRun {
		return
	}
	known := a[alertKey{r.Node, r.Epoch, r.Seq}]
	if known == nil {
		return
	}
	var it pb.Item
	if proto.Unmarshal(r.Payload, &it) != nil || it.GetAlert() == nil {
		return
	}
	for _, m := range known {
		present.Amend(it.GetAlert(), m)
	}
	if b, err := proto.Marshal(&it); err == nil {
		r.Payload, r.CRC32C = b, store.Checksum(b)
	}
}

// noteAll keeps the amendments between two cursors.
func (s *Server) noteAll(ctx context.Context, after, to int64, into amendments) error {
	var recs []store.Record
	for after < to {
		var err error
		if recs, err = s.cfg.Store.Read(ctx, recs[:0], after, pageRecords); err != nil || len(recs) == 0 {
			return err
		}
		for i := range recs {
			if after = recs[i].Cursor; after <= to {
				into.note(&recs[i])
			}
		}
	}
	return nil
}

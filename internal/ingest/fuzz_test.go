package ingest

import (
	"bytes"
	"errors"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
)

func seeds(f *testing.F) {
	epoch := bytes.Repeat([]byte{7}, 16)
	record := func(seq uint64, it *pb.Item) *pb.Record {
		b, err := proto.Marshal(it)
		if err != nil {
			f.Fatal(err)
		}
		return &pb.Record{Seq: seq, Payload: b, Crc32C: store.Checksum(b)}
	}
	good := record(3, &pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{Rule: "a/b/c/d", Severity: 3, Event: &pb.Event{Kind: "Exec"}}}})
	unknown := []byte{0xfa, 0x3f, 1, 'x'} // field 1023
	for _, m := range []*pb.StreamRequest{
		{},
		{Message: &pb.StreamRequest_Hello{Hello: &pb.Hello{Protocol: 1, Node: "n", AgentVersion: "v", BootId: "b",
			Lanes: []*pb.Lane{{Epoch: epoch, FirstSeq: 1, Made: 9}, {Epoch: bytes.Repeat([]byte{8}, 16)}}}}},
		{Message: &pb.StreamRequest_Hello{Hello: &pb.Hello{Protocol: 1, Lanes: []*pb.Lane{{Epoch: epoch, FirstSeq: 1 << 63, Made: 1<<64 - 1}}}}},
		{Message: &pb.StreamRequest_Batch{Batch: &pb.Batch{Epoch: epoch, FirstSeq: 1, Records: []*pb.Record{good},
			Losses: []*pb.Loss{{From: 1, To: 2, Reason: 3, Detail: "d"}, {From: 4, To: 1<<63 - 1, Reason: 99}}}}},
		{Message: &pb.StreamRequest_Batch{Batch: &pb.Batch{Epoch: epoch, FirstSeq: 3, Records: []*pb.Record{good, {Seq: 4}, {Seq: 5, Payload: []byte{0xff}}}}}},
		{Message: &pb.StreamRequest_Batch{Batch: &pb.Batch{Epoch: epoch, FirstSeq: 1, Records: []*pb.Record{
			record(1, &pb.Item{Item: &pb.Item_Amendment{Amendment: &pb.Amendment{Seq: 3, Epoch: epoch, Place: "container"}}}),
			record(2, &pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{Events: map[string]uint64{"Exec": 1}}}}),
			{Seq: 3, Payload: unknown, Crc32C: store.Checksum(unknown)}, record(4, &pb.Item{})}}}},
		{Message: &pb.StreamRequest_Batch{Batch: &pb.Batch{Epoch: epoch, FirstSeq: 1<<64 - 1, Records: []*pb.Record{{Seq: 1<<64 - 1}, {Seq: 0}}}}},
		{Message: &pb.StreamRequest_Batch{Batch: &pb.Batch{Epoch: epoch, FirstSeq: 1, Losses: []*pb.Loss{{From: 1, To: 1<<64 - 1}, {From: 0, To: 5}}}}},
		{Message: &pb.StreamRequest_Heartbeat{Heartbeat: &pb.Heartbeat{Epoch: epoch, Made: 5}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0xff, 0x01, 0x02})
}

// FuzzStreamRequest: whatever an agent sends is either refused with the field
// named, or becomes something the store takes: consecutive, bounded, with each
// record there once.
func FuzzStreamRequest(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		var m pb.StreamRequest
		if proto.Unmarshal(data, &m) != nil {
			return
		}
		now := time.Unix(1, 0)
		if h := m.GetHello(); h != nil {
			out, err := checkHello(h, "node", now)
			fieldError(t, err)
			if err == nil && (out.Node != "node" || len(out.Lanes) != len(h.GetLanes()) || len(out.Lanes) == 0 || len(out.Lanes) > MaxLanes) {
				t.Errorf("hello became %+v", out)
			}
		}
		b := m.GetBatch()
		if b == nil {
			return
		}
		out, err := checkBatch(b, "node", now)
		fieldError(t, err)
		if err != nil {
			return
		}
		if out.Node != "node" || len(out.Records) != len(b.GetRecords())+len(b.GetLosses()) || len(out.Records) == 0 {
			t.Fatalf("batch of %d records and %d losses became %+v", len(b.GetRecords()), len(b.GetLosses()), out)
		}
		next, sent := b.GetFirstSeq(), 0
		for i, r := range out.Records {
			if r.Seq != next || r.To < r.Seq || r.To > store.MaxSeq || r.Kind != store.Loss && r.To != r.Seq {
				t.Fatalf("record %d covers %d..%d, want it to begin at %d", i, r.Seq, r.To, next)
			}
			next = r.To + 1
			if r.Kind != store.Loss {
				if was := b.GetRecords()[sent]; r.Kind != store.Rejected && (!bytes.Equal(r.Payload, was.GetPayload()) || r.CRC32C != was.GetCrc32C()) {
					t.Fatalf("record %d was changed", i)
				}
				sent++
			}
			if store.Checksum(r.Payload) != r.CRC32C || len(r.Reason) > maxDetailBytes || len(r.Rule) > maxDetailBytes ||
				!utf8.ValidString(r.Reason) || !utf8.ValidString(r.Rule) {
				t.Fatalf("record %d: %+v", i, r)
			}
			if (r.Kind == store.Rejected) != (r.Reason != "") && r.Kind != store.Loss {
				t.Fatalf("record %d is %v with reason %q", i, r.Kind, r.Reason)
			}
			if !r.EventTime.IsZero() && !time.Unix(0, r.EventTime.UnixNano()).Equal(r.EventTime) {
				t.Fatalf("record %d: the store cannot hold the time %v", i, r.EventTime)
			}
		}
	})
}

func fieldError(t *testing.T, err error) {
	if err == nil {
		return
	}
	if e, ok := errors.AsType[*FieldError](err); !ok || e.Field == "" || e.Msg == "" {
		t.Errorf("%v (%T) names no field", err, err)
	}
}

func TestCut(t *testing.T) {
	for _, tt := range []struct {
		s    string
		n    int
		want string
	}{{"", 0, ""}, {"abc", 3, "abc"}, {"abc", 2, "ab"}, {"aé", 2, "a"}, {"é", 1, ""}, {"日本", 4, "日"}} {
		if got := cut(tt.s, tt.n); got != tt.want {
			t.Errorf("cut(%q, %d) = %q, want %q", tt.s, tt.n, got, tt.want)
		}
	}
}

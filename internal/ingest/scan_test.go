package ingest

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/store"
)

func item(t testing.TB, a *pb.Alert) []byte {
	b, err := proto.Marshal(&pb.Item{Item: &pb.Item_Alert{Alert: a}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The usual alert is not decoded, and costs a name and a time.
func TestScanUsualAlert(t *testing.T) {
	a := ingesttest.Alert("n", 7)
	b := item(t, a)
	h, ok := scanAlert(b)
	if !ok || h.rule != a.GetRule() || h.severity != a.GetSeverity() || !h.time.AsTime().Equal(a.GetEvent().GetTime().AsTime()) {
		t.Errorf("scanned as %+v, %v", h, ok)
	}
	if n := testing.AllocsPerRun(100, func() { scanAlert(b) }); n > 2 {
		t.Errorf("%v allocations for an alert, want 2", n)
	}
}

// TestDryRunIsKeptApart: whoever asked for alerts gets none that only say what
// a rule would have done.
func TestDryRunIsKeptApart(t *testing.T) {
	a := ingesttest.Alert("n", 7)
	for dry, want := range map[bool]store.Kind{false: store.Alert, true: store.DryRun} {
		a.DryRun = dry
		b := item(t, a)
		if got := checkRecord(&pb.Record{Seq: 1, Payload: b, Crc32C: store.Checksum(b)}).Kind; got != want {
			t.Errorf("dry run %v is stored as kind %v, want %v", dry, got, want)
		}
	}
}

// What the scan is sure of, the decoder says too; the rest is the decoder's.
func FuzzScanAlert(f *testing.F) {
	f.Add(item(f, ingesttest.Alert("n", 1)))
	f.Add(item(f, &pb.Alert{DryRun: true, Event: &pb.Event{Kind: "Exec"}}))
	f.Add(item(f, &pb.Alert{}))
	f.Add(item(f, &pb.Alert{Event: &pb.Event{}}))
	f.Add(item(f, &pb.Alert{Severity: -1, Rule: "é", Event: &pb.Event{Time: timestamppb.New(time.Unix(-5, 999))}}))
	usual := item(f, &pb.Alert{Rule: "r", Event: &pb.Event{Kind: "Exec"}})
	f.Add(append(usual[:len(usual):len(usual)], usual...))                                             // merged
	f.Add(append(usual[:len(usual):len(usual)], 0x10, 1))                                              // with an unknown field
	f.Add(protowire.AppendBytes(protowire.AppendTag(nil, numbers().item, protowire.BytesType), []byte{ // numbers that are none
		0x80, 0x80, 0x80, 0x80, 0x10, 0x01}))
	for _, bad := range []string{"\xff", "\x0a\x05a"} {
		alert := protowire.AppendBytes(protowire.AppendTag(nil, numbers().rule, protowire.BytesType), []byte(bad))
		alert = protowire.AppendBytes(protowire.AppendTag(alert, numbers().event, protowire.BytesType), []byte(bad))
		f.Add(protowire.AppendBytes(protowire.AppendTag(nil, numbers().item, protowire.BytesType), alert))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, ok := scanAlert(b); !ok {
			return
		}
		r := &pb.Record{Seq: 1, Payload: b, Crc32C: store.Checksum(b)}
		want := decodeRecord(store.Record{Seq: 1, To: 1, Payload: b, CRC32C: r.Crc32C}, func(_ int, format string, args ...any) store.Record {
			t.Fatalf("scanned, and the decoder says: "+format, args...)
			return store.Record{}
		})
		if diff := cmp.Diff(want, checkRecord(r)); diff != "" {
			t.Fatalf("decoded -, scanned +\n%s", diff)
		}
	})
}

package ingest

import (
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
)

// What a coverage says of policies is handed to the store by itself, also that
// there is none; one that says nothing leaves what was said before.
func TestPolicyReportIsTaken(t *testing.T) {
	for _, tc := range []struct {
		name   string
		report *pb.PolicyReport
	}{
		{"nothing is said", nil},
		{"there is no policy", &pb.PolicyReport{}},
		{"one is refused", &pb.PolicyReport{Policies: []*pb.PolicyState{{Object: "ClusterDetectionPolicy/a", Generation: 2, InForce: 1, Error: "why"}}}},
	} {
		b, err := proto.Marshal(&pb.Item{Item: &pb.Item_Coverage{Coverage: &pb.Coverage{Capture: "recorder", Policies: tc.report}}})
		if err != nil {
			t.Fatal(err)
		}
		r := checkRecord(&pb.Record{Seq: 1, Payload: b, Crc32C: store.Checksum(b)})
		if r.Kind != store.Coverage || (r.Policies != nil) != (tc.report != nil) {
			t.Errorf("%s: %v record, report %q", tc.name, r.Kind, r.Policies)
			continue
		}
		var got pb.PolicyReport
		if err := proto.Unmarshal(r.Policies, &got); err != nil || tc.report != nil && !proto.Equal(&got, tc.report) {
			t.Errorf("%s: %v, %v", tc.name, &got, err)
		}
	}
}

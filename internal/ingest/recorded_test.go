package ingest_test

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// A recorded stream is one of a session that an earlier version recorded.
type recordedStream struct {
	agent  []*pb.StreamRequest
	resume []uint64          // what the collector said in its welcome, lane by lane
	acked  map[string]uint64 // what it acknowledged last, by epoch
}

func readSession(t *testing.T, file string) (all []*recordedStream) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for len(b) > 0 {
		who := b[0]
		n, w := binary.Uvarint(b[1:])
		m := b[1+w : 1+w+int(n)]
		b = b[1+w+int(n):]
		if who == 's' {
			all = append(all, &recordedStream{acked: map[string]uint64{}})
			continue
		}
		s := all[len(all)-1]
		if who == 'a' {
			var r pb.StreamRequest
			if err := proto.Unmarshal(m, &r); err != nil {
				t.Fatal(err)
			}
			s.agent = append(s.agent, &r)
			continue
		}
		var r pb.StreamResponse
		if err := proto.Unmarshal(m, &r); err != nil {
			t.Fatal(err)
		}
		for _, l := range r.GetWelcome().GetResume() {
			s.resume = append(s.resume, l.GetAfter())
		}
		if a := r.GetAck(); a != nil {
			s.acked[string(a.GetEpoch())] = a.GetUpTo()
		}
	}
	return all
}

// An agent of the first release is served: what it sent then gets the same
// answers from today's server, and is stored whole.
func TestRecordedSession(t *testing.T) {
	s := start(t, nil)
	for i, rec := range readSession(t, "../../api/proto/procession/v1/testdata/session-1.bin") {
		st := s.stream("node-1")
		send(t, st, rec.agent[0])
		var resume []uint64
		for _, l := range recv(t, st).GetWelcome().GetResume() {
			resume = append(resume, l.GetAfter())
		}
		if d := cmp.Diff(rec.resume, resume); d != "" {
			t.Fatalf("stream %d: where to go on (-then +now):\n%s", i, d)
		}
		send(t, st, rec.agent[1:]...)
		for acked := map[string]uint64{}; !cmp.Equal(rec.acked, acked); { // the test's time bounds it
			if a := recv(t, st).GetAck(); a != nil {
				acked[string(a.GetEpoch())] = a.GetUpTo()
			}
		}
	}
	kinds := map[store.Kind]int{}
	for _, r := range storetest.All(t, s.st) {
		kinds[r.Kind]++
		if r.Kind == store.Loss && r.LossReason != pb.LossReason_LOSS_REASON_CORRUPT {
			t.Errorf("a loss for %v: %s", r.LossReason, r.Reason)
		}
	}
	if d := cmp.Diff(map[store.Kind]int{store.Alert: 9, store.Coverage: 13, store.Loss: 1}, kinds); d != "" {
		t.Errorf("stored (-want +got):\n%s", d)
	}
}

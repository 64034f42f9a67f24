package ingest_test

import (
	"encoding/binary"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
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

// Agents of earlier times are served: what one sent then gets the same answers
// from today's server, and is stored whole. api/proto says what is in the
// sessions; the tokens of the second are its recorder's.
func TestRecordedSessions(t *testing.T) {
	const dir = "../../api/proto/procession/v1/testdata/"
	t.Run("certificates", func(t *testing.T) {
		s := start(t, nil)
		replay(t, dir+"session-1.bin", func() ingesttest.Stream { return s.stream("node-1") })
		storedKinds(t, s, map[store.Kind]int{store.Alert: 9, store.Coverage: 13, store.Loss: 1}, pb.LossReason_LOSS_REASON_CORRUPT)
	})
	t.Run("tokens", func(t *testing.T) {
		s, api := startTokens(t, 0)
		var shown []string
		for _, rec := range readSession(t, dir+"session-2.bin") {
			for _, m := range rec.agent {
				if r := m.GetReauth(); r != nil {
					shown = append(shown, r.GetToken())
					api.set(func(a *apiServer) { a.nodes[r.GetToken()] = "node-1" })
				}
			}
		}
		replay(t, dir+"session-2.bin", func() ingesttest.Stream { return s.open("Bearer " + api.token("node-1", time.Hour)) })
		for _, newer := range shown {
			eventually(t, "the newer token is asked about", func() bool { return api.count(newer) > 0 })
		}
		storedKinds(t, s, map[store.Kind]int{store.Alert: 7, store.Amendment: 3, store.Coverage: 3}, 0)
	})
}

// replay plays the agent's part of a session.
func replay(t *testing.T, file string, open func() ingesttest.Stream) {
	t.Helper()
	for i, rec := range readSession(t, file) {
		st := open()
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
}

func storedKinds(t *testing.T, s *server, want map[store.Kind]int, loss pb.LossReason) {
	t.Helper()
	kinds := map[store.Kind]int{}
	for _, r := range storetest.All(t, s.st) {
		kinds[r.Kind]++
		if r.Kind == store.Loss && r.LossReason != loss {
			t.Errorf("a loss for %v: %s", r.LossReason, r.Reason)
		}
	}
	if d := cmp.Diff(want, kinds); d != "" {
		t.Errorf("stored (-want +got):\n%s", d)
	}
}

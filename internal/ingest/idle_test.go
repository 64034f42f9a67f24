package ingest_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/store"
)

// goroutines counts those of this process that are in a function.
func goroutines(function string) (n int) {
	buf := make([]byte, 1<<20)
	for {
		if used := runtime.Stack(buf, true); used < len(buf) {
			buf = buf[:used]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		if stack, _, _ := strings.Cut(g, "\ncreated by "); strings.Contains(stack, function+"(") {
			n++
		}
	}
	return n
}

// What an idle agent costs is mostly stacks: of this package's it has one, on
// the goroutine that gRPC has for it anyway.
func TestIdleStreamHasOneGoroutine(t *testing.T) {
	s := start(t, nil)
	const agents = 10
	for i := range agents {
		node := fmt.Sprint("node-", i)
		st := s.stream(node)
		send(t, st, ingesttest.Hello(node, lane(epoch, 0)))
		recv(t, st)
		send(t, st, ingesttest.Heartbeat(epoch, 1), ingesttest.Batch(epoch, records(t, node, 1, 1)))
		if a := recv(t, st).GetAck(); a.GetUpTo() != 1 {
			t.Fatalf("ack %v, want up to 1", a)
		}
	}
	const own = "procession/internal/ingest.(*"
	eventually(t, "no acks are on their way", func() bool { return goroutines(own+"stream).acks") == 0 })
	if n := goroutines(own + "stream).recv"); n != agents {
		t.Errorf("%d goroutines read for %d idle agents, want one each", n, agents)
	}
	if n := goroutines(own + "Server).Stream"); n != agents {
		t.Errorf("%d handlers for %d idle agents", n, agents)
	}
}

// An agent that closed its side and vanished before its acks leaves nothing
// behind, whatever becomes of the commit.
func TestGoneBeforeTheAck(t *testing.T) {
	var g *gate
	s := start(t, func(st store.Store) store.Store { g = &gate{Store: st}; return g })
	cc, err := s.dial(s.creds("n"))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	st, err := pb.NewIngestServiceClient(cc).Stream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send(t, st, ingesttest.Hello("n", lane(epoch, 0)))
	recv(t, st)
	hold := make(chan struct{})
	defer close(hold)
	g.set(hold, nil)
	send(t, st, ingesttest.Batch(epoch, records(t, "n", 1, 1)))
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	const own = "procession/internal/ingest.(*"
	eventually(t, "the end of its side is read", func() bool {
		return s.counter("procession_collector_records_received_total", "") == 1 && goroutines(own+"stream).recv") == 0
	})
	if n := s.counter("procession_collector_streams", ""); n != 1 {
		t.Fatalf("%v live streams while an ack is owed, want 1", n)
	}
	cc.Close()
	eventually(t, "the stream is gone", func() bool {
		return s.counter("procession_collector_streams", "") == 0 && goroutines(own+"Server).Stream") == 0
	})
}

package ingest_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// BenchmarkBeside is, in turns, alerts of 50 agents over TLS until each is on
// the disk and acknowledged, and the bare loop: the same records, put into a
// store of the same kind in transactions of the same size by one goroutine.
// What share of the bare loop's rate the whole way has is the figure.
func BenchmarkBeside(b *testing.B) {
	const streams, each, per = 50, 640, 64
	s := startDir(b, b.TempDir(), nil)
	bare, err := store.OpenSQLite(b.Context(), filepath.Join(b.TempDir(), "bare"))
	if err != nil {
		b.Fatal(err)
	}
	defer bare.Close()
	recs := make([][]*pb.Record, streams)
	conns := make([]*grpc.ClientConn, streams)
	for i := range streams {
		node := fmt.Sprint("node-", i)
		recs[i] = records(b, node, 1, each)
		conns[i] = ingesttest.Dial(b, s.addr, s.creds(node))
		conns[i].Connect()
	}
	var whole, loop time.Duration
	for round := 0; b.Loop(); round++ {
		e := storetest.Epoch(byte(round))
		begin := time.Now()
		var wg sync.WaitGroup
		for i := range streams {
			wg.Go(func() {
				a := &ingesttest.Agent{Node: fmt.Sprint("node-", i), Epoch: e, Records: recs[i], PerSend: per}
				if err := a.RunOn(b.Context(), conns[i]); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		whole += time.Since(begin)
		begin = time.Now()
		for at := 0; at < each; at += per {
			var cs []store.Change
			for i := range streams {
				batch := &store.Batch{Node: fmt.Sprint("node-", i), Epoch: e, Received: begin}
				for _, r := range recs[i][at : at+per] {
					batch.Records = append(batch.Records, store.Record{Seq: r.GetSeq(), To: r.GetSeq(), Kind: store.Alert,
						Payload: r.GetPayload(), CRC32C: r.GetCrc32C(), Rule: "r", EventTime: begin})
				}
				cs = append(cs, batch)
			}
			if _, err := bare.Commit(context.Background(), cs); err != nil {
				b.Fatal(err)
			}
		}
		loop += time.Since(begin)
	}
	n := float64(b.N) * streams * each
	b.ReportMetric(n/whole.Seconds(), "alerts/s")
	b.ReportMetric(n/loop.Seconds(), "bare/s")
	b.ReportMetric(100*loop.Seconds()/whole.Seconds(), "%ofbare")
}

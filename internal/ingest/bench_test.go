package ingest_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// BenchmarkDurable is alerts from 50 agents over TLS until each is synced to
// the disk and acknowledged.
func BenchmarkDurable(b *testing.B) {
	const streams, each, per = 50, 640, 64
	s := startDir(b, b.TempDir(), nil)
	recs := make([][]*pb.Record, streams)
	for i := range recs {
		recs[i] = records(b, fmt.Sprint("node-", i), 1, each)
	}
	var conns []*grpc.ClientConn
	for i := range streams {
		conns = append(conns, ingesttest.Dial(b, s.addr, s.creds(fmt.Sprint("node-", i))))
		conns[i].Connect()
	}
	round := 0
	for b.Loop() {
		var wg sync.WaitGroup
		for i := range streams {
			wg.Go(func() {
				a := &ingesttest.Agent{Node: fmt.Sprint("node-", i), Epoch: storetest.Epoch(byte(round)), Records: recs[i], PerSend: per}
				if err := a.RunOn(b.Context(), conns[i]); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		round++
	}
	b.ReportMetric(float64(b.N)*streams*each/b.Elapsed().Seconds(), "alerts/s")
	b.ReportMetric(float64(len(recs[0][0].GetPayload())), "B/alert")
}

// BenchmarkAckLatency is the time from sending an alert to its ack, with 50
// agents that send 5 alerts a second each.
func BenchmarkAckLatency(b *testing.B) {
	const streams = 50
	s := startDir(b, b.TempDir(), nil)
	var mu sync.Mutex
	var took []time.Duration
	type agent struct {
		st  ingesttest.Stream
		rec []*pb.Record
	}
	agents := make([]agent, streams)
	e := storetest.Epoch(1)
	for i := range agents {
		node := fmt.Sprint("node-", i)
		st, err := pb.NewIngestServiceClient(ingesttest.Dial(b, s.addr, s.creds(node))).Stream(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		send(b, st, ingesttest.Hello(node, lane(e, 0)))
		recv(b, st)
		agents[i] = agent{st, records(b, node, 1, 100)}
	}
	for b.Loop() { // one round: each agent sends one second's alerts
		var wg sync.WaitGroup
		for i := range agents {
			wg.Go(func() {
				a := &agents[i]
				time.Sleep(time.Duration(i) * 200 * time.Millisecond / streams) // agents are not in step
				tick := time.NewTicker(200 * time.Millisecond)
				defer tick.Stop()
				for range 5 {
					if len(a.rec) == 0 {
						return
					}
					begin := time.Now()
					if err := a.st.Send(ingesttest.Batch(e, a.rec[:1])); err != nil {
						b.Error(err)
						return
					}
					if _, err := a.st.Recv(); err != nil {
						b.Error(err)
						return
					}
					d := time.Since(begin)
					a.rec = a.rec[1:]
					mu.Lock()
					took = append(took, d)
					mu.Unlock()
					<-tick.C
				}
			})
		}
		wg.Wait()
	}
	slices.Sort(took)
	b.ReportMetric(float64(len(took))/b.Elapsed().Seconds(), "alerts/s")
	b.ReportMetric(took[len(took)/2].Seconds()*1e3, "p50-ms")
	b.ReportMetric(took[len(took)*99/100].Seconds()*1e3, "p99-ms")
}

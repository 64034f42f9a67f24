package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/forward"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/store"
)

// Size of a round: agents, alerts of each, alerts of a batch.
const durableAgents, durableEach, durablePer = 50, 640, 64

// A sender is an agent with alerts to send, on a connection that stays.
type sender struct {
	node    string
	conn    *grpc.ClientConn
	records []*pb.Record
}

// senders are n agents whose certificates are in dir/tls, with each alerts.
func senders(ctx context.Context, addr, dir string, n, each int) (all []*sender, err error) {
	for i := range n {
		s := &sender{node: nodeName(i)}
		for seq := range each {
			b, err := proto.Marshal(&pb.Item{Item: &pb.Item_Alert{Alert: ingesttest.Alert(s.node, uint64(seq+1))}})
			if err != nil {
				return all, err
			}
			s.records = append(s.records, &pb.Record{Seq: uint64(seq + 1), Payload: b, Crc32C: store.Checksum(b)})
		}
		if s.conn, err = dialAs(ctx, addr, filepath.Join(dir, "tls", s.node), i); err != nil {
			return all, err
		}
		all = append(all, s)
	}
	return all, nil
}

// dialAs is a connection with the certificate in dir, from the i-th source.
func dialAs(ctx context.Context, addr, dir string, i int) (*grpc.ClientConn, error) {
	conf, err := agentFiles(dir).TLS(ctx)
	if err != nil {
		return nil, err
	}
	return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(conf)), grpc.WithContextDialer(dialFrom(source(i))))
}

// agentFiles are the files that issue made.
func agentFiles(dir string) forward.Files {
	return forward.Files{CA: filepath.Join(dir, pki.BundleFile), Cert: filepath.Join(dir, "agent.crt"), Key: filepath.Join(dir, "agent.key"), ServerName: "localhost"}
}

func closeAll(all []*sender) {
	for _, s := range all {
		s.conn.Close()
	}
}

func epoch(n int) (e store.Epoch) {
	binary.BigEndian.PutUint64(e[:], uint64(n+1))
	return e
}

// durable measures alerts per second that are on the collector's disk and
// acknowledged, in turns with a bare loop of the same transactions, and then
// the time to the acknowledgement of single alerts.
func (b *bench) durable(ctx context.Context) error {
	dir, err := b.folder("durable")
	if err != nil {
		return err
	}
	c := &collector{b: b, dir: dir, addr: "127.0.0.1:0"}
	if err := issue(c.state(), dir, durableAgents); err != nil {
		return err
	}
	if err := c.start(ctx); err != nil {
		return err
	}
	defer func() { c.stop(syscall.SIGTERM) }()
	all, err := senders(ctx, c.addr, dir, durableAgents, durableEach)
	defer closeAll(all)
	if err != nil {
		return err
	}
	bare, err := store.OpenSQLite(ctx, filepath.Join(dir, "bare"))
	if err != nil {
		return err
	}
	defer bare.Close()
	var whole, loop, share []float64
	const n = durableAgents * durableEach
	for round := range b.rounds + 1 {
		w, err := wholeWay(ctx, all, epoch(round))
		if err != nil {
			return err
		}
		l, err := bareLoop(ctx, bare, all, epoch(round))
		if err != nil {
			return err
		}
		if round == 0 {
			continue // connections are made, files grow
		}
		whole, loop, share = append(whole, n/w.Seconds()), append(loop, n/l.Seconds()), append(share, 100*l.Seconds()/w.Seconds())
		fmt.Fprintf(b.log, "durable: %.0f/s, bare %.0f/s, %.0f %%\n", n/w.Seconds(), n/l.Seconds(), 100*l.Seconds()/w.Seconds())
	}
	b.rows.add(fmt.Sprintf("alerts of %d agents over TLS until on the collector's disk and acknowledged (%d bytes each), SQLite", durableAgents, len(all[0].records[0].GetPayload())),
		fmt.Sprintf("%s/s (%s to %s)", thousands(median(whole)), thousands(slices.Min(whole)), thousands(slices.Max(whole))), "20,000/s")
	b.rows.add("the bare loop of the same transactions, in turns with it", fmt.Sprintf("%s/s: the whole way has %.0f %% (%.0f to %.0f)",
		thousands(median(loop)), median(share), slices.Min(share), slices.Max(share)), "70 %")
	took, err := b.single(ctx, all, epoch(1<<20))
	if err != nil {
		return err
	}
	b.rows.add(fmt.Sprintf("from sending an alert to its acknowledgement, %d agents with 5 a second each", durableAgents), quantiles(took), "p50 below 10 ms")
	fmt.Fprintf(b.log, "durable: an ack takes %s\n", quantiles(took))
	return nil
}

// wholeWay is how long it takes until all alerts are acknowledged.
func wholeWay(ctx context.Context, all []*sender, e store.Epoch) (time.Duration, error) {
	begin := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range all {
		g.Go(func() error {
			a := &ingesttest.Agent{Node: s.node, Epoch: e, Records: s.records, PerSend: durablePer}
			return a.RunOn(ctx, s.conn)
		})
	}
	err := g.Wait()
	return time.Since(begin), err
}

// bareLoop is how long the same records take in a store of the same kind, in
// transactions of the size the collector gathers, from one goroutine.
func bareLoop(ctx context.Context, st store.Store, all []*sender, e store.Epoch) (time.Duration, error) {
	begin := time.Now()
	for at := 0; at < durableEach; at += durablePer {
		var cs []store.Change
		for _, s := range all {
			batch := &store.Batch{Node: s.node, Epoch: e, Received: begin}
			for _, r := range s.records[at : at+durablePer] {
				batch.Records = append(batch.Records, store.Record{Seq: r.GetSeq(), To: r.GetSeq(), Kind: store.Alert,
					Payload: r.GetPayload(), CRC32C: r.GetCrc32C(), Rule: "ClusterDetectionPolicy//shells/shell-in-container", EventTime: begin})
			}
			cs = append(cs, batch)
		}
		if _, err := st.Commit(ctx, cs); err != nil {
			return 0, err
		}
	}
	return time.Since(begin), nil
}

// single is how long single alerts take, each agent sending five a second for
// a while, at other moments than the others.
func (b *bench) single(ctx context.Context, all []*sender, e store.Epoch) ([]time.Duration, error) {
	const every = 200 * time.Millisecond
	var mu sync.Mutex
	var took []time.Duration
	g, ctx := errgroup.WithContext(ctx)
	for i, s := range all {
		g.Go(func() error {
			st, err := pb.NewIngestServiceClient(s.conn).Stream(ctx)
			if err != nil {
				return err
			}
			if err := st.Send(ingesttest.Hello(s.node, &pb.Lane{Epoch: e[:], FirstSeq: 1})); err != nil {
				return err
			}
			if _, err := st.Recv(); err != nil {
				return err
			}
			if err := pause(ctx, every*time.Duration(i)/time.Duration(len(all))); err != nil {
				return err
			}
			tick := time.NewTicker(every)
			defer tick.Stop()
			for n := range min(int(b.latency/every), len(s.records)) {
				begin := time.Now()
				if err := st.Send(ingesttest.Batch(e, s.records[n:n+1])); err != nil {
					return err
				}
				m, err := st.Recv()
				if err != nil {
					return err
				}
				if m.GetAck().GetUpTo() != uint64(n+1) {
					return fmt.Errorf("%v for alert %d", m, n+1)
				}
				d := time.Since(begin)
				mu.Lock()
				took = append(took, d)
				mu.Unlock()
				<-tick.C
			}
			return nil
		})
	}
	err := g.Wait()
	if err == nil && len(took) == 0 {
		err = errors.New("no alert was sent")
	}
	slices.Sort(took)
	return took, err
}

// quantiles of sorted times.
func quantiles(took []time.Duration) string {
	at := func(share int) float64 { return took[min(len(took)-1, len(took)*share/100)].Seconds() * 1e3 }
	return fmt.Sprintf("p50 %.1f ms, p99 %.1f ms", at(50), at(99))
}

// thousands is a number to three figures.
func thousands(v float64) string {
	n := int(v+50) / 100 * 100
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}

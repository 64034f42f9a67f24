package collector

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// rss is the memory of a process, in MiB.
func rss(t testing.TB, pid int) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		if f := strings.Fields(l); len(f) > 1 && f[0] == "VmRSS:" {
			kb, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb / 1024
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// settled is the memory of a process once it has not shrunk by more than a
// hundredth for two seconds: what handshakes left is collected by then.
func settled(t testing.TB, pid int) float64 {
	t.Helper()
	for now := rss(t, pid); ; {
		time.Sleep(2 * time.Second)
		before := now
		if now = rss(t, pid); now > before*0.99 {
			return now
		}
	}
}

// BenchmarkIdleAgents is the collector's memory with 5,000 agents that are
// connected over TLS and silent, each with a certificate of its own, and how
// long it takes until all have a welcome, at first and after a kill -9 of the
// collector. The agents share this machine with it. Once: -benchtime 1x.
func BenchmarkIdleAgents(b *testing.B) {
	const agents = 5000
	dir := storetest.Dir(b)
	state := filepath.Join(dir, "state")
	ca, err := pki.Open(filepath.Join(state, "pki"))
	if err != nil {
		b.Fatal(err)
	}
	clients := make([]grpc.DialOption, agents)
	for i := range clients {
		node := fmt.Sprint("node-", i)
		out := filepath.Join(dir, "tls", node)
		if _, err := ca.Issue(node, time.Hour, out); err != nil {
			b.Fatal(err)
		}
		clients[i] = grpc.WithTransportCredentials(ingesttest.Credentials(b, out))
	}
	connect := func(addr string) (all []*grpc.ClientConn) {
		var g errgroup.Group
		g.SetLimit(64)
		var mu sync.Mutex
		for i := range agents {
			g.Go(func() error {
				for try := 0; ; try++ {
					cc, err := grpc.NewClient("passthrough:///"+addr, clients[i], grpc.WithReadBufferSize(1024), grpc.WithWriteBufferSize(1024))
					if err != nil {
						return err
					}
					st, err := pb.NewIngestServiceClient(cc).Stream(context.Background())
					if err == nil {
						err = st.Send(ingesttest.Hello(fmt.Sprint("node-", i), &pb.Lane{Epoch: make([]byte, 16), FirstSeq: 1}))
					}
					if err == nil {
						_, err = st.Recv()
					}
					if err == nil {
						mu.Lock()
						all = append(all, cc)
						mu.Unlock()
						return nil
					}
					cc.Close()
					if try > 20 {
						return err
					}
				}
			})
		}
		if err := g.Wait(); err != nil {
			b.Fatal(err)
		}
		return all
	}
	for b.Loop() {
		p := startProc(b, state)
		b.ReportMetric(rss(b, p.cmd.Process.Pid), "MiB-empty")
		begin := time.Now()
		all := connect(p.addr)
		b.ReportMetric(time.Since(begin).Seconds(), "s-connect")
		b.ReportMetric(settled(b, p.cmd.Process.Pid), "MiB")
		p.kill()
		for _, cc := range all {
			cc.Close()
		}
		begin = time.Now()
		p = startProc(b, state)
		all = connect(p.addr)
		b.ReportMetric(time.Since(begin).Seconds(), "s-back")
		for _, cc := range all {
			cc.Close()
		}
		p.kill()
	}
}

package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/spool"
	"github.com/procession-dev/procession/internal/testenv"
)

// agent is a spool and its forwarder.
type agent struct {
	t    testing.TB
	cfg  spool.Config
	fcfg Config

	sp    *spool.Spool
	fw    *Forwarder
	epoch spool.Epoch
	stops []func()
}

func newAgent(t testing.TB, target string) *agent {
	_, conf := pki()
	a := &agent{t: t, cfg: spool.Config{Dir: t.TempDir()}}
	a.fcfg = Config{
		Target: target, TLS: always(conf), Node: "node-1", Version: "test", BootID: "boot",
		HeartbeatInterval: 50 * time.Millisecond, AckTimeout: 20 * time.Second, DrainTimeout: 5 * time.Second,
		EventCounters: func() (uint64, uint64) { return 7, 1 },
		linger:        5 * time.Millisecond, backoffMin: 5 * time.Millisecond, backoffMax: 100 * time.Millisecond,
	}
	t.Cleanup(a.stop)
	return a
}

func (a *agent) openSpool() {
	a.t.Helper()
	var err error
	if a.sp, err = spool.Open(a.cfg); err != nil {
		a.t.Fatal(err)
	}
	ls := a.sp.Lanes()
	a.epoch = ls[len(ls)-1].Epoch
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.sp.Run(ctx) }()
	a.stops = append(a.stops, func() {
		cancel()
		if err := <-done; err != nil {
			a.t.Errorf("spool: %v", err)
		}
	})
}

func (a *agent) start() {
	a.t.Helper()
	if a.sp == nil {
		a.openSpool()
	}
	a.fcfg.Spool = a.sp
	var err error
	if a.fw, err = New(a.fcfg); err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.fw.Run(ctx) }()
	a.stops = append(a.stops, func() {
		cancel()
		if err := <-done; err != nil {
			a.t.Errorf("forward: %v", err)
		}
	})
}

// stop ends the agent in the order of the flow.
func (a *agent) stop() {
	for _, f := range a.stops {
		f()
	}
	a.stops = nil
	if a.sp != nil {
		if err := a.sp.Close(); err != nil {
			a.t.Error(err)
		}
	}
	a.sp = nil
}

func text(e spool.Epoch, seq uint64) string {
	return fmt.Sprintf("%s/%d %s", e, seq, strings.Repeat("x", int(seq*7%400)))
}

// append makes records; their text follows from their number.
func (a *agent) append(n int) {
	a.t.Helper()
	for range n {
		next := a.sp.Stats().Made + 1 // one appender only
		seq, err := a.sp.Append([]byte(text(a.epoch, next)))
		if err != nil || seq != next {
			a.t.Fatalf("append %d: %d, %v", next, seq, err)
		}
	}
}

func (a *agent) wait(what string, cond func() bool) {
	a.t.Helper()
	testenv.Eventually(a.t, what, cond, func() string { return fmt.Sprintf("%+v\n%+v", a.fw.Status(), a.sp.Stats()) })
}

func (a *agent) acked() bool { return a.sp.Stats().Unacked == 0 }

// check says whether the store holds 1..n of the epoch, each once, in order,
// as appended. It returns how many of them are losses.
func check(t testing.TB, st *store, e spool.Epoch, n uint64) (lost uint64) {
	t.Helper()
	next := uint64(1)
	for _, k := range st.Log(e) {
		if k.From != next {
			t.Fatalf("epoch %s: %d..%d is stored where %d should be", e, k.From, k.To, next)
		}
		next = k.To + 1
		if k.Reason != 0 {
			t.Logf("epoch %s: lost %d..%d, %v", e, k.From, k.To, k.Reason)
			lost += k.To - k.From + 1
		} else if want := text(e, k.From); k.Text != want {
			t.Fatalf("epoch %s: record %d is %.60q, want %.60q", e, k.From, k.Text, want)
		}
	}
	if next-1 != n {
		t.Fatalf("epoch %s: stored up to %d, want %d", e, next-1, n)
	}
	return lost
}

func TestConfig(t *testing.T) {
	a := newAgent(t, "127.0.0.1:1")
	a.openSpool()
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no spool", func(c *Config) { c.Spool = nil }, "spool:"},
		{"no target", func(c *Config) { c.Target = "" }, "target:"},
		{"no TLS", func(c *Config) { c.TLS = nil }, "tls:"},
		{"heartbeats without pause", func(c *Config) { c.HeartbeatInterval = 1 }, "heartbeatInterval:"},
		{"negative ack timeout", func(c *Config) { c.AckTimeout = -1 }, "ackTimeout:"},
		{"good", func(c *Config) {}, ""},
	} {
		cfg := a.fcfg
		cfg.Spool = a.sp
		tt.change(&cfg)
		_, err := New(cfg)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestDeliver(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	a := newAgent(t, serve(t, c).addr)
	a.openSpool()
	a.append(500)
	a.start()
	a.wait("500 are acknowledged", a.acked)
	a.append(500)
	a.wait("1000 are acknowledged", a.acked)
	check(t, st, a.epoch, 1000)
	a.wait("heartbeats", func() bool { return a.fw.Status().Heartbeats > 2 })
	s := a.fw.Status()
	if !s.Connected || s.Connections != 1 || s.Records != 1000 || s.Failures != 0 || s.OldestWait != 0 || s.Acks == 0 {
		t.Errorf("status %+v", s)
	}
	if s.ClockSkew > time.Second || s.ClockSkew < -time.Second {
		t.Errorf("clock skew %v against ourselves", s.ClockSkew)
	}
	h := c.hellos[0]
	if h.Node != "node-1" || h.AgentVersion != "test" || h.BootId != "boot" || len(h.Lanes) != 1 {
		t.Errorf("hello %v", h)
	}
	testenv.Eventually(t, "heartbeat tells made", func() bool {
		return st.Made(a.epoch) == 1000
	})
}

// One record alone goes at once; in a burst batches fill.
func TestBatching(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	a := newAgent(t, serve(t, c).addr)
	a.openSpool()
	a.fcfg.linger = time.Minute // were it waited for, the test would fail
	a.start()
	for i := range 5 {
		a.append(1)
		a.wait("one alone", func() bool { return st.Mark(a.epoch) == uint64(i+1) && a.acked() })
	}
	gate := make(chan struct{})
	c.set(func(c *collector) { c.before = func() { <-gate } })
	a.append(1)
	a.wait("one in flight", func() bool { return a.fw.Status().Batches == 6 })
	for range 16 { // they gather until the batch is full
		a.append(4)
		if err := a.sp.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	a.wait("the full batch", func() bool { return a.fw.Status().Batches > 6 })
	if s := a.fw.Status(); s.Batches != 7 || s.Records != 6+64 {
		t.Errorf("%d batches of %d records, want 7 of 70", s.Batches, s.Records)
	}
	a.append(200) // three more full ones, of which the window takes one, and 8
	if err := a.sp.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.wait("the window is full", func() bool { return a.fw.Status().Batches == 8 })
	close(gate)
	a.wait("all", a.acked)
	if s := a.fw.Status(); s.Batches != 11 || s.Records != 270 {
		t.Errorf("%d batches of %d records, want 11 of 270", s.Batches, s.Records)
	}
}

func TestServerKilledAndRestarted(t *testing.T) {
	st := newStore()
	srv := serve(t, newCollector(st))
	a := newAgent(t, srv.addr)
	a.start()
	for range 5 {
		a.append(300)
		testenv.Eventually(t, "some are stored", func() bool { return st.Mark(a.epoch) > a.sp.Stats().Made-300 })
		srv.kill()
		a.append(100)
		srv.start(newCollector(st))
	}
	a.wait("all", a.acked)
	check(t, st, a.epoch, 2000)
	if s := a.fw.Status(); s.Connections < 6 || s.LastError == "" {
		t.Errorf("status %+v", s)
	}
}

// A stream that died may still have a batch in the collector's queue when the
// next one asks where to go on.
func TestDuplicateStreams(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	srv := serve(t, c)
	p := newProxy(t, srv.addr)
	a := newAgent(t, p.addr())
	gate := make(chan struct{}, 100)
	c.set(func(c *collector) { c.before = func() { <-gate } })
	a.start()
	a.append(100)
	a.wait("batches are in flight", func() bool { return a.fw.Status().Batches >= 2 })
	for range 3 {
		n := a.fw.Status().Failures
		a.wait("the cut is seen", func() bool {
			p.cut() // again, should a connection just be in the making
			return a.fw.Status().Failures > n
		})
		gate <- struct{}{}
		a.append(10)
	}
	close(gate)
	a.wait("all", a.acked)
	check(t, st, a.epoch, 130)
}

func TestCutMidBatch(t *testing.T) {
	st := newStore()
	p := newProxy(t, serve(t, newCollector(st)).addr)
	p.cutAfter(9000) // handshake, hello and some of the records
	a := newAgent(t, p.addr())
	a.openSpool()
	a.append(400)
	a.start()
	a.wait("several cuts", func() bool { return a.fw.Status().Failures >= 5 })
	p.cutAfter(0)
	a.wait("all", a.acked)
	check(t, st, a.epoch, 400)
}

func TestStalledAcks(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	var keep sync.Mutex // held: acks are kept back
	held := true
	c.onAck = func(a *pb.Ack) *pb.Ack {
		keep.Lock()
		defer keep.Unlock()
		if held {
			return nil
		}
		return a
	}
	a := newAgent(t, serve(t, c).addr)
	a.fcfg.AckTimeout = 300 * time.Millisecond
	a.openSpool()
	a.append(1000)
	a.start()
	a.wait("the collector is left", func() bool { return strings.Contains(a.fw.Status().LastError, errSilent.Error()) })
	if s := a.fw.Status(); s.Batches > 3*s.Connections {
		t.Errorf("%d batches over %d streams with a window of 3", s.Batches, s.Connections)
	}
	keep.Lock()
	held = false
	keep.Unlock()
	a.wait("all", a.acked)
	check(t, st, a.epoch, 1000)
}

func TestBlackHole(t *testing.T) {
	st := newStore()
	p := newProxy(t, serve(t, newCollector(st)).addr)
	a := newAgent(t, p.addr())
	a.fcfg.AckTimeout, a.fcfg.welcomeWait = 500*time.Millisecond, 500*time.Millisecond
	p.stall()
	a.start()
	a.wait("no welcome", func() bool { return strings.Contains(a.fw.Status().LastError, errNoWelcome.Error()) })
	p.flow()
	a.append(10)
	a.wait("ten", a.acked)
	p.stall()
	a.append(10)
	a.wait("no ack", func() bool { return strings.Contains(a.fw.Status().LastError, errSilent.Error()) })
	p.flow()
	a.wait("all", a.acked)
	check(t, st, a.epoch, 20)
}

func TestSlowLink(t *testing.T) {
	st := newStore()
	p := newProxy(t, serve(t, newCollector(st)).addr)
	p.pause = 2 * time.Millisecond
	a := newAgent(t, p.addr())
	a.start()
	for range 20 {
		a.append(20)
	}
	a.wait("all", a.acked)
	check(t, st, a.epoch, 400)
	if s := a.fw.Status(); s.Connections != 1 {
		t.Errorf("%d connections over a slow link", s.Connections)
	}
}

func TestRestoredFromBackup(t *testing.T) {
	st := newStore()
	srv := serve(t, newCollector(st))
	a := newAgent(t, srv.addr)
	a.start()
	a.append(200)
	a.wait("200", a.acked)
	backup := st.Snapshot()
	a.append(300)
	a.wait("500", a.acked)
	srv.kill()
	st.Restore(backup)
	gate := make(chan struct{})
	c := newCollector(st)
	c.before = func() { <-gate }
	srv.start(c)
	a.wait("the spool knows", func() bool { return a.sp.Stats().Unacked == 300 })
	close(gate)
	a.append(100)
	a.wait("all again", func() bool { return st.Mark(a.epoch) == 600 && a.acked() })
	check(t, st, a.epoch, 600)
	srv.kill()
	st.Restore(newStore()) // the volume is gone
	srv.start(newCollector(st))
	a.wait("all from the beginning", func() bool { return st.Mark(a.epoch) == 600 && a.acked() })
	if lost := check(t, st, a.epoch, 600); lost != 0 {
		t.Errorf("%d lost, although the spool keeps them", lost)
	}
	if s := a.fw.Status(); s.Rewinds != 2 {
		t.Errorf("%d rewinds, want 2", s.Rewinds)
	}
}

func TestDrain(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	a := newAgent(t, serve(t, c).addr)
	a.start()
	a.append(50)
	a.wait("50", a.acked)
	c.sendDrain(10 * time.Millisecond)
	a.wait("a new stream", func() bool { s := a.fw.Status(); return s.Connections == 2 && s.Connected })
	a.append(50)
	a.wait("100", a.acked)
	check(t, st, a.epoch, 100)
	if s := a.fw.Status(); s.Records != 100 {
		t.Errorf("%d records sent, want each of the 100 once", s.Records)
	}
	if s := a.fw.Status(); s.Failures != 0 {
		t.Errorf("a drain counts as a failure: %+v", s)
	}

	// The collector does not wait for the agent's end, and has batches in its queue.
	gate := make(chan struct{})
	c.set(func(c *collector) { c.before = func() { <-gate } })
	n := a.fw.Status().Batches
	a.append(50)
	a.wait("in flight", func() bool { return a.fw.Status().Batches > n })
	c.sendDrain(0)
	c.endStreams()
	close(gate)
	a.wait("150, and a new stream", func() bool { return a.acked() && a.fw.Status().Connections == 3 })
	check(t, st, a.epoch, 150)
	if s := a.fw.Status(); s.Failures != 0 {
		t.Errorf("status %+v", s)
	}
}

// The server ends connections of a certain age. The agent sees it coming.
func TestConnectionAge(t *testing.T) {
	st := newStore()
	srv := &server{t: t, addr: "127.0.0.1:0", age: 300 * time.Millisecond}
	srv.start(newCollector(st))
	t.Cleanup(srv.kill)
	a := newAgent(t, srv.addr)
	a.start()
	for n := uint64(1); a.fw.Status().Connections < 4; n++ {
		a.append(1)
		a.wait("the record", func() bool { return st.Mark(a.epoch) == n })
	}
	a.wait("all", a.acked)
	check(t, st, a.epoch, a.sp.Stats().Made)
	if s := a.fw.Status(); s.Failures != 0 {
		t.Errorf("going away counts as a failure: %+v", s)
	}
}

// A batch of a dead stream that is committed after the next one was welcomed
// comes back in that one's acks.
func TestAckOfAnEarlierStream(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	srv := serve(t, c)
	p := newProxy(t, srv.addr)
	a := newAgent(t, p.addr())
	var late []*pb.Batch // what the dead stream had on its way
	c.onBatch = func(b *pb.Batch) bool { late = append(late, b); return false }
	a.openSpool()
	a.append(64 * 3)
	if err := a.sp.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.start()
	a.wait("in flight", func() bool { return a.fw.Status().Records == 64*3 })
	c.set(func(c *collector) { c.window = 1 })
	c.reply = func(w *pb.Welcome) {
		c.set(func(c *collector) { c.onBatch = nil })
		for _, b := range late {
			if _, err := st.Commit(b); err != nil {
				t.Error(err)
			}
		}
	}
	p.cut()
	a.wait("all", a.acked)
	check(t, st, a.epoch, 64*3)
	if s := a.fw.Status(); s.Connections != 2 {
		t.Errorf("%d streams, want 2: %+v", s.Connections, s)
	}
}

func TestEpochsInOrder(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	srv := serve(t, c)
	a := newAgent(t, srv.addr)
	a.fcfg.maxLanes = 4
	var epochs []spool.Epoch
	for range 7 { // runs without a collector
		a.openSpool()
		a.append(10)
		epochs = append(epochs, a.epoch)
		a.stop()
	}
	a.openSpool()
	a.append(10)
	epochs = append(epochs, a.epoch)
	a.start()
	a.wait("all", a.acked)
	for _, e := range epochs {
		check(t, st, e, 10)
	}
	if n := len(c.hellos[0].Lanes); n != 4+1 || a.fw.Status().Connections < 2 {
		t.Errorf("first hello with %d epochs, want 4 and the running one; status %+v", n, a.fw.Status())
	}
}

func TestLossesAreTold(t *testing.T) {
	st := newStore()
	a := newAgent(t, serve(t, newCollector(st)).addr)
	a.cfg.MaxBytes, a.cfg.SegmentBytes, a.cfg.MaxRecord = 64<<10, 8<<10, 1000
	a.openSpool()
	for range 100 {
		a.append(10)
		if err := a.sp.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.sp.Append(make([]byte, 2000)); !errors.Is(err, spool.ErrTooLarge) {
		t.Fatal(err)
	}
	a.start()
	a.wait("all", a.acked)
	lost := check(t, st, a.epoch, 1001)
	stats := a.sp.Stats()
	if want := stats.Lost[spool.SpoolFull] + stats.Lost[spool.TooLarge]; lost != want || stats.Lost[spool.SpoolFull] == 0 {
		t.Errorf("the store knows of %d lost, the spool of %d: %v", lost, want, stats.Lost)
	}
	l := st.Log(a.epoch)
	if l[0].Reason != pb.LossReason_LOSS_REASON_SPOOL_FULL || l[len(l)-1].Reason != pb.LossReason_LOSS_REASON_TOO_LARGE {
		t.Errorf("first %+v, last %+v", l[0], l[len(l)-1])
	}
}

// What a collector must not say.
func TestBadCollector(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reply func(*pb.Welcome)
		onAck func(*pb.Ack) *pb.Ack
		want  string
	}{
		{"resumes nothing", func(w *pb.Welcome) { w.Resume = nil }, nil, "resumes 0 epochs"},
		{"resumes another epoch", func(w *pb.Welcome) { w.Resume[0].Epoch = make([]byte, 16) }, nil, "resumes epoch 0000"},
		{"resumes a short epoch", func(w *pb.Welcome) { w.Resume[0].Epoch = nil }, nil, "resumes epoch"},
		{"acknowledges what was not sent", nil, func(a *pb.Ack) *pb.Ack { a.UpTo = 1 << 40; return a }, "acknowledgement of 1099511627776"},
		{"acknowledges an unknown epoch", nil, func(a *pb.Ack) *pb.Ack { a.Epoch = make([]byte, 16); return a }, "acknowledgement of 10 in epoch 0000"},
		{"acknowledges no epoch", nil, func(a *pb.Ack) *pb.Ack { a.Epoch = nil; return a }, "epoch of 0 bytes"},
		{"silent about its limits", func(w *pb.Welcome) { w.Window, w.MaxBatchRecords, w.MaxBatchBytes, w.ServerTime = 0, 0, 0, nil }, nil, ""},
		{"wants everything at once", func(w *pb.Welcome) { w.Window, w.MaxBatchRecords, w.MaxBatchBytes = 1<<31, 1<<31, 1<<31 }, nil, ""},
		{"wants tiny batches", func(w *pb.Welcome) { w.Window, w.MaxBatchRecords, w.MaxBatchBytes = 1, 1, 1 }, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := newStore()
			c := newCollector(st)
			c.reply, c.onAck = tt.reply, tt.onAck
			a := newAgent(t, serve(t, c).addr)
			a.openSpool()
			a.append(10)
			if err := a.sp.Sync(t.Context()); err != nil { // one batch
				t.Fatal(err)
			}
			a.start()
			if tt.want != "" {
				a.wait("an error", func() bool { return strings.Contains(a.fw.Status().LastError, tt.want) })
				if tt.onAck == nil && a.acked() {
					t.Error("the spool believes it")
				}
				c.set(func(c *collector) { c.reply, c.onAck = nil, nil })
			}
			a.wait("all", a.acked)
			check(t, st, a.epoch, 10)
		})
	}
}

// A node brought back to an earlier state with its memory.
func TestEpochUsed(t *testing.T) {
	c := newCollector(newStore())
	c.reply = func(w *pb.Welcome) { w.Resume[len(w.Resume)-1].After = 1000 }
	a := newAgent(t, serve(t, c).addr)
	a.openSpool()
	a.append(10)
	a.fcfg.Spool = a.sp
	fw, err := New(a.fcfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := fw.Run(t.Context()); !errors.Is(err, ErrEpochUsed) {
		t.Errorf("Run: %v, want ErrEpochUsed", err)
	}
	if s := fw.Status(); s.Impossible != 1 || a.sp.Stats().Unacked != 10 {
		t.Errorf("status %+v, unacked %d", s, a.sp.Stats().Unacked)
	}
	a.stop()

	// The next run has a new epoch; the collector's word on the old one stands.
	st := newStore()
	c = newCollector(st)
	c.reply = func(w *pb.Welcome) { w.Resume[0].After = 1000 }
	a.fcfg.Target = serve(t, c).addr
	a.start()
	a.append(5)
	a.wait("all", a.acked)
	check(t, st, a.epoch, 5)
}

func TestGapIsCounted(t *testing.T) {
	st := newStore()
	c := newCollector(st)
	c.reply = func(w *pb.Welcome) { w.Resume[0].After = 5 } // but it holds nothing
	a := newAgent(t, serve(t, c).addr)
	var log testenv.Buffer
	a.fcfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	a.openSpool()
	a.append(10)
	a.start()
	a.wait("gaps", func() bool { return a.fw.Status().Gaps > 1 })
	if s := log.String(); strings.Count(s, "refuses the order") != 1 || !strings.Contains(s, "batch from 6, stored are 0") {
		t.Errorf("log:\n%s", s)
	}
	c.set(func(c *collector) { c.reply = nil })
	a.wait("all", a.acked)
	check(t, st, a.epoch, 10)
}

func TestShutdown(t *testing.T) {
	st := newStore()
	srv := serve(t, newCollector(st))
	a := newAgent(t, srv.addr)
	a.fcfg.backoffMin, a.fcfg.backoffMax = time.Hour, time.Hour

	// Connected: everything is delivered before Run returns.
	a.start()
	a.append(1000)
	e := a.epoch
	begin := time.Now()
	a.stop()
	if d := time.Since(begin); d > 4*time.Second {
		t.Errorf("stopped after %v", d)
	}
	check(t, st, e, 1000)
	if s := a.fw.Status(); s.Connections != 1 || s.Failures != 0 {
		t.Errorf("status %+v", s)
	}

	// Nothing to deliver: at once, also in the middle of a back-off.
	srv.kill()
	a.start()
	a.wait("a failure", func() bool { return a.fw.Status().Failures > 0 })
	begin = time.Now()
	a.stop()
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("stopped after %v, with nothing to deliver", d)
	}

	// No collector: DrainTimeout, and the spool keeps it.
	a.fcfg.DrainTimeout = 200 * time.Millisecond
	a.fcfg.backoffMin, a.fcfg.backoffMax = time.Millisecond, time.Millisecond
	a.start()
	a.append(10)
	e = a.epoch
	a.wait("a failure", func() bool { return a.fw.Status().Failures > 0 })
	begin = time.Now()
	a.stop()
	if d := time.Since(begin); d < 200*time.Millisecond || d > 3*time.Second {
		t.Errorf("stopped after %v, want DrainTimeout", d)
	}
	srv.start(newCollector(st))
	a.start()
	a.wait("all", a.acked)
	check(t, st, e, 10)
}

func TestWrongCertificate(t *testing.T) {
	a := newAgent(t, serve(t, newCollector(newStore())).addr)
	a.fcfg.TLS = always(&tls.Config{MinVersion: tls.VersionTLS13})
	a.start()
	a.wait("an error that says why", func() bool { return strings.Contains(a.fw.Status().LastError, "certificate") })
	a.fcfg.TLS, a.fcfg.Credentials = nil, insecure.NewCredentials()
	fw, err := New(a.fcfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- fw.Run(ctx) }()
	a.wait("plain text is refused", func() bool { return fw.Status().Failures > 0 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// All faults at once. 10,000 records over several runs of the agent must be
// in the store exactly once and in order.
func TestChaos(t *testing.T) {
	const total = 10000
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	st := newStore()
	c := newCollector(st)
	srv := serve(t, c)
	p := newProxy(t, srv.addr)
	a := newAgent(t, p.addr())
	var log testenv.Buffer
	a.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	a.fcfg.Log = a.cfg.Log
	defer func() {
		if t.Failed() {
			t.Logf("log:\n%s", &log)
		}
	}()
	a.fcfg.DrainTimeout = 50 * time.Millisecond
	a.fcfg.AckTimeout, a.fcfg.welcomeWait = 200*time.Millisecond, 200*time.Millisecond
	a.start()
	made := map[spool.Epoch]uint64{}
	backup := st.Snapshot()
	faults := map[string]int{}
	for sum := 0; sum < total; {
		n := min(1+rnd.IntN(400), total-sum)
		a.append(n)
		sum += n
		made[a.epoch] += uint64(n)
		fault := []string{"none", "cut", "cut after", "stall", "kill", "drain", "slow commit", "lost acks", "backup", "restore", "agent"}[rnd.IntN(11)]
		faults[fault]++
		switch fault {
		case "cut":
			p.cut()
		case "cut after":
			p.cutAfter(2000 + rnd.IntN(60000))
			p.cut()
		case "stall":
			p.stall()
			<-time.After(time.Duration(rnd.IntN(100)) * time.Millisecond)
			p.flow()
		case "kill":
			srv.kill()
			c = newCollector(st)
			srv.start(c)
		case "drain":
			c.sendDrain(time.Duration(rnd.IntN(20)) * time.Millisecond)
		case "slow commit":
			d := time.Duration(rnd.IntN(5)) * time.Millisecond
			c.set(func(c *collector) { c.before = func() { <-time.After(d) } })
		case "lost acks":
			k := rnd.IntN(3)
			c.set(func(c *collector) {
				c.onAck = func(a *pb.Ack) *pb.Ack {
					if k > 0 && rand.IntN(3) == 0 {
						return nil
					}
					return a
				}
			})
		case "backup":
			backup = st.Snapshot()
		case "restore":
			srv.kill()
			c = newCollector(st)
			st.Restore(backup)
			srv.start(c)
		case "agent":
			a.stop()
			a.start()
		}
		<-time.After(time.Duration(rnd.IntN(30)) * time.Millisecond)
	}
	p.cutAfter(0)
	p.cut()
	c.set(func(c *collector) { c.before, c.onAck = nil, nil })
	// A restored collector has less than it acknowledged; the next stream says so.
	a.wait("all", func() bool {
		for e, n := range made {
			if st.Mark(e) != n {
				return false
			}
		}
		return a.acked()
	})
	for e, n := range made {
		if lost := check(t, st, e, n); lost != 0 {
			t.Errorf("epoch %s: %d lost", e, lost)
		}
	}
	t.Logf("%d epochs, faults %v, %+v", len(made), faults, a.fw.Status())
}

// A full spool to a collector on the same machine: what one agent can send.
func BenchmarkDeliver(b *testing.B) {
	st := newStore()
	c := newCollector(st)
	c.reply = func(w *pb.Welcome) { w.MaxBatchRecords, w.MaxBatchBytes = 256, 256<<10 }
	a := newAgent(b, serve(b, c).addr)
	a.openSpool()
	a.fcfg.HeartbeatInterval = time.Second
	rec := make([]byte, 600)
	for i := range b.N {
		if i%2000 == 1999 {
			if err := a.sp.Sync(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := a.sp.Append(rec); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(600)
	b.ResetTimer()
	a.start()
	for !a.acked() {
		<-time.After(time.Millisecond)
	}
}

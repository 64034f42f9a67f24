package spool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// payload is what record i of a test holds: text that says which it is.
func payload(i, size int) []byte {
	p := fmt.Appendf(nil, "record %d ", i)
	for len(p) < size {
		p = append(p, byte('a'+len(p)%26))
	}
	return p
}

// running is a spool with its committer.
type running struct {
	*Spool
	t    testing.TB
	stop context.CancelFunc
	done chan error
	once sync.Once
	err  error
}

// start opens a spool and runs it until end, or the test's end.
func start(t testing.TB, cfg Config) *running {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &running{Spool: s, t: t, stop: stop, done: make(chan error, 1)}
	go func() { r.done <- s.Run(ctx) }()
	t.Cleanup(func() { r.end() })
	return r
}

// end stops the committer, frees the directory and returns Run's error.
func (r *running) end() error {
	r.once.Do(func() {
		r.stop()
		r.err = <-r.done
		if err := r.Close(); err != nil {
			r.t.Errorf("close: %v", err)
		}
	})
	return r.err
}

func (r *running) append(p []byte) uint64 {
	r.t.Helper()
	seq, err := r.Append(p)
	if err != nil {
		r.t.Fatalf("append: %v", err)
	}
	return seq
}

func (r *running) sync() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.Sync(ctx); err != nil {
		r.t.Fatal(err)
	}
}

// wait waits for cond, which must become true by what the spool does.
func (r *running) wait(what string, cond func(Stats) bool) {
	r.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !cond(r.Stats()) {
		if time.Now().After(deadline) {
			r.t.Fatalf("%s: not within 20 s; %+v", what, r.Stats())
		}
		select {
		case <-r.Changed():
		case <-time.After(2 * time.Millisecond): // acknowledgements are not announced
		}
	}
}

// An entry is a record or a loss, as read.
type entry struct {
	From, To uint64
	Text     string // of a record
	Reason   string // of a loss
	Memory   bool   // a record that is not durable
}

// readAll reads an epoch from after on with small chunks and checks that they
// join without a hole.
func readAll(t testing.TB, s *Spool, e Epoch, after uint64) []entry {
	t.Helper()
	var out []entry
	var c Chunk
	for {
		err := s.Read(e, after, 7, 4096, &c)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatalf("read %s after %d: %v", e, after, err)
		}
		if c.First != after+1 || c.Last < c.First || c.Epoch != e {
			t.Fatalf("read %s after %d: chunk of %s, %d..%d", e, after, c.Epoch, c.First, c.Last)
		}
		next := c.First
		for ri, li := 0, 0; next <= c.Last; {
			switch {
			case ri < len(c.Records) && c.Records[ri].Seq == next:
				r := c.Records[ri]
				if got := crcOf(r.Payload); got != r.CRC {
					t.Fatalf("record %d: CRC %08x, its payload's is %08x", r.Seq, r.CRC, got)
				}
				out = append(out, entry{From: next, To: next, Text: string(r.Payload), Memory: !r.Durable})
				next, ri = next+1, ri+1
			case li < len(c.Losses) && c.Losses[li].From == next:
				l := c.Losses[li]
				if n := len(out); n > 0 && out[n-1].Reason == l.Reason.String() && out[n-1].To == l.From-1 {
					out[n-1].To = l.To // one loss cut by a chunk's end
				} else {
					out = append(out, entry{From: l.From, To: l.To, Reason: l.Reason.String()})
				}
				next, li = l.To+1, li+1
			default:
				t.Fatalf("read %s after %d: number %d is missing in %+v", e, after, next, c)
			}
		}
		after = c.Last
	}
}

// checkSums says whether the counters add up.
func checkSums(t testing.TB, s *Spool) {
	t.Helper()
	st := s.Stats()
	if sum := st.Durable + st.Queued + st.Lost[QueueFull] + st.Lost[TooLarge] + st.Lost[Disk]; sum != st.Made {
		t.Errorf("made %d, but durable + queued + lost = %d: %+v", st.Made, sum, st)
	}
	var buckets uint64
	for _, n := range st.SyncBuckets {
		buckets += n
	}
	if buckets != st.Syncs {
		t.Errorf("%d syncs, %d in the buckets", st.Syncs, buckets)
	}
}

func own(s *Spool) Lane {
	ls := s.Lanes()
	return ls[len(ls)-1]
}

func wantEntries(t testing.TB, what string, got, want []entry) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no directory", Config{}, "dir:"},
		{"tiny", Config{Dir: "x", MaxBytes: 1000}, "maxBytes:"},
		{"segment above a quarter", Config{Dir: "x", MaxBytes: 1 << 20, SegmentBytes: 1 << 20}, "segmentBytes:"},
		{"record above segment", Config{Dir: "x", SegmentBytes: 8192, MaxRecord: 9000}, "maxRecord:"},
		{"record above format", Config{Dir: "x", MaxBytes: 1 << 30, SegmentBytes: 100 << 20, MaxRecord: 20 << 20}, "maxRecord:"},
		{"negative queue", Config{Dir: "x", Queue: -1}, "queue:"},
		{"small queue bytes", Config{Dir: "x", QueueBytes: 100}, "queueBytes:"},
		{"negative ring", Config{Dir: "x", Ring: -1}, "ring:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Open(tt.cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open(%+v): %v, want an error about %q", tt.cfg, err, tt.want)
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	start(t, Config{Dir: dir})
	_, err := Open(Config{Dir: dir})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("second Open: %v, want ErrLocked with our pid", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Dir: file}); err == nil || !strings.Contains(err.Error(), "state directory") {
		t.Errorf("Open of a file: %v, want an error about the state directory", err)
	}
}

func TestDirectoryMode(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "spool")
	start(t, Config{Dir: dir}).end()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	start(t, Config{Dir: dir}).end()
	fi, err := os.Stat(dir)
	if err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v; want 0700", fi.Mode(), err)
	}
}

func TestAppendReadAck(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: dir, Log: slog.New(slog.NewTextHandler(testWriter{t}, nil))})
	var want []entry
	for i := range 100 {
		p := payload(i, i*7) // also the empty record
		if i == 0 {
			p = nil
		}
		seq := s.append(p)
		if seq != uint64(i+1) {
			t.Fatalf("append %d: number %d", i, seq)
		}
		want = append(want, entry{From: seq, To: seq, Text: string(p)})
	}
	s.sync()
	me := own(s.Spool)
	if me.First != 1 || me.Made != 100 {
		t.Errorf("own lane %+v, want 1..100", me)
	}
	wantEntries(t, "all", readAll(t, s.Spool, me.Epoch, 0), want)
	wantEntries(t, "after 50", readAll(t, s.Spool, me.Epoch, 50), want[50:])
	checkSums(t, s.Spool)

	if err := s.Ack(me.Epoch, 101); err == nil {
		t.Error("acknowledged more than was made")
	}
	if err := s.Ack(Epoch{}, 1); !errors.Is(err, ErrEpoch) {
		t.Errorf("ack of an unknown epoch: %v", err)
	}
	if err := s.Ack(me.Epoch, 60); err != nil {
		t.Fatal(err)
	}
	if err := s.Ack(me.Epoch, 10); err != nil { // old news
		t.Fatal(err)
	}
	if st := s.Stats(); st.Unacked != 40 || st.OldestUnacked.IsZero() {
		t.Errorf("unacked %d since %v, want 40", st.Unacked, st.OldestUnacked)
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Append(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("append after the end: %v", err)
	}

	s = start(t, Config{Dir: dir})
	ls := s.Lanes()
	if len(ls) != 2 || ls[0] != (Lane{me.Epoch, 1, 100, 60}) || ls[1].Epoch == me.Epoch {
		t.Fatalf("lanes after a restart: %+v", ls)
	}
	wantEntries(t, "after a restart", readAll(t, s.Spool, me.Epoch, 0), want)
	if st := s.Stats(); st.Unacked != 40 || st.OldestUnacked.IsZero() {
		t.Errorf("after a restart: unacked %d since %v, want 40", st.Unacked, st.OldestUnacked)
	}
}

// Nothing is readable before it was synced, and Run's end syncs everything.
func TestDurableBeforeRead(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if _, err := s.Append(payload(i, 10)); err != nil {
			t.Fatal(err)
		}
	}
	me := own(s)
	if got := readAll(t, s, me.Epoch, 0); got != nil {
		t.Errorf("read before Run: %v", got)
	}
	if me.First != 1 || me.Made != 10 {
		t.Errorf("own lane %+v", me)
	}
	checkSums(t, s)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, s, me.Epoch, 0); len(got) != 10 {
		t.Errorf("read %d after Run, want 10", len(got))
	}
	checkSums(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestQueueFullAndTooLarge(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(Config{Dir: dir, Queue: 4, MaxRecord: 1000, QueueBytes: 4000})
	if err != nil {
		t.Fatal(err)
	}
	var errs []error
	for _, n := range []int{10, 1001, 2000, 10, 10, 10, 10, 5000, 10} {
		_, err := s.Append(payload(n, n))
		errs = append(errs, err)
	}
	for i, want := range []error{nil, ErrTooLarge, ErrTooLarge, nil, nil, nil, ErrFull, ErrFull, ErrFull} {
		if !errors.Is(errs[i], want) || (want == nil) != (errs[i] == nil) {
			t.Errorf("append %d: %v, want %v", i+1, errs[i], want)
		}
	}
	checkSums(t, s)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
	text := string(payload(10, 10))
	wantEntries(t, "losses in order", readAll(t, s, own(s).Epoch, 0), []entry{
		{From: 1, To: 1, Text: text},
		{From: 2, To: 3, Reason: "too-large"},
		{From: 4, To: 4, Text: text}, {From: 5, To: 5, Text: text}, {From: 6, To: 6, Text: text},
		{From: 7, To: 9, Reason: "queue-full"},
	})
	checkSums(t, s)
	if st := s.Stats(); st.Lost[QueueFull] != 3 || st.Lost[TooLarge] != 2 || st.Durable != 4 {
		t.Errorf("stats %+v", st)
	}
	s.Close()
}

func TestQueueFullByBytes(t *testing.T) {
	s, err := Open(Config{Dir: t.TempDir(), MaxRecord: 1000, QueueBytes: 3000})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 3 {
		if _, err := s.Append(payload(i, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Append([]byte("x")); !errors.Is(err, ErrFull) {
		t.Errorf("append to a full queue: %v", err)
	}
	checkSums(t, s)
}

func TestEviction(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Dir: dir, MaxBytes: 64 << 10, SegmentBytes: 8 << 10, KeepAcked: -1, MaxRecord: 2000}
	s := start(t, cfg)
	for i := range 300 {
		s.append(payload(i, 500))
		if i%8 == 0 {
			s.sync()
		}
	}
	s.sync()
	st := s.Stats()
	if st.Bytes > cfg.MaxBytes {
		t.Errorf("%d bytes on disk, bound %d", st.Bytes, cfg.MaxBytes)
	}
	me := own(s.Spool)
	got := readAll(t, s.Spool, me.Epoch, 0)
	if got[0].Reason != "spool-full" || got[0].To != me.First-1 || st.Lost[SpoolFull] != me.First-1 || me.First < 100 {
		t.Errorf("first entry %+v, lane %+v, counted %d", got[0], me, st.Lost[SpoolFull])
	}
	if n := len(got) - 1; uint64(n) != 300-me.First+1 || got[n].Text != string(payload(299, 500)) {
		t.Errorf("%d records from %d on, last %.20q", n, me.First, got[n].Text)
	}
	checkSums(t, s.Spool)
	s.end()

	// A later run still knows why they are gone, and an acknowledged segment is no loss.
	s = start(t, cfg)
	wantEntries(t, "after a restart", readAll(t, s.Spool, me.Epoch, 0), got)
	if err := s.Ack(me.Epoch, 300); err != nil {
		t.Fatal(err)
	}
	s.wait("the acknowledged epoch is forgotten", func(st Stats) bool { return st.Lanes == 1 && st.Segments == 0 })
	if st := s.Stats(); st.Lost != [NumReasons]uint64{} {
		t.Errorf("acknowledged and removed counts as lost: %v", st.Lost)
	}
	if err := s.Read(me.Epoch, 0, 1, 1, new(Chunk)); !errors.Is(err, ErrEpoch) {
		t.Errorf("read of a forgotten epoch: %v", err)
	}
	s.wait("its files go", func(Stats) bool {
		left, _ := filepath.Glob(filepath.Join(dir, "*"+me.Epoch.String()+"*"))
		return len(left) == 0
	})
}

// A collector that lost its store gets again what is still here.
func TestKeepAckedAndResumeBack(t *testing.T) {
	s := start(t, Config{Dir: t.TempDir(), MaxBytes: 256 << 10, SegmentBytes: 8 << 10, KeepAcked: 32 << 10, MaxRecord: 2000})
	e := own(s.Spool).Epoch
	for i := range 200 {
		s.append(payload(i, 500))
		s.sync()
		if err := s.Ack(e, uint64(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	s.wait("trimmed to KeepAcked", func(st Stats) bool { return st.Bytes <= 32<<10+8<<10+2*4096 })
	got := readAll(t, s.Spool, e, 0)
	if got[0].Reason != "spool-full" || len(got) < 40 || got[len(got)-1].To != 200 {
		t.Errorf("%d entries, first %+v, last %+v", len(got), got[0], got[len(got)-1])
	}
	if st := s.Stats(); st.Lost[SpoolFull] != 0 || st.Unacked != 0 {
		t.Errorf("stats %+v", st)
	}
	first := own(s.Spool).First
	if err := s.Resume(e, 0); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.Unacked != 200 {
		t.Errorf("unacked %d after the collector began anew", st.Unacked)
	}
	for i := range 20 { // what must be sent again is not trimmed
		s.append(payload(200+i, 500))
	}
	s.sync()
	if f := own(s.Spool).First; f != first {
		t.Errorf("first %d, was %d: removed although it is not acknowledged", f, first)
	}
	if err := s.Resume(e, 1000); err != nil || s.Stats().Unacked != 0 {
		t.Errorf("resume behind the end: %v, unacked %d", err, s.Stats().Unacked)
	}
}

func TestReadLimits(t *testing.T) {
	s := start(t, Config{Dir: t.TempDir()})
	for i := range 10 {
		s.append(payload(i, 1000))
	}
	s.sync()
	e := own(s.Spool).Epoch
	var c Chunk
	for _, tt := range []struct{ records, bytes, want int }{
		{3, 1 << 20, 3}, {100, 1 << 20, 10}, {100, 1, 1}, {0, 0, 1}, {100, 3 * (1000 + entryCost), 3}, {100, 3*(1000+entryCost) - 1, 2},
	} {
		if err := s.Read(e, 0, tt.records, tt.bytes, &c); err != nil || len(c.Records) != tt.want {
			t.Errorf("at most %d records, %d bytes: got %d, %v; want %d", tt.records, tt.bytes, len(c.Records), err, tt.want)
		}
	}
	if err := s.Read(e, 10, 1, 1, &c); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if err := s.Read(e, 99, 1, 1, &c); !errors.Is(err, io.EOF) {
		t.Errorf("behind the end: %v", err)
	}
}

// A reader waits for records without missing any, while the spool is written,
// bounded and acknowledged.
func TestReadWhileWriting(t *testing.T) {
	const n = 20000
	s := start(t, Config{Dir: t.TempDir(), MaxBytes: 1 << 20, SegmentBytes: 32 << 10, KeepAcked: 64 << 10, MaxRecord: 4096})
	e := own(s.Spool).Epoch
	go func() {
		for i := range n {
			for {
				s.mu.Lock()
				room := s.q.recs < s.cfg.Queue/2 && s.own.last-s.own.acked < 1000
				s.mu.Unlock()
				if room {
					break
				}
				<-time.After(time.Millisecond)
			}
			s.Append(payload(i, 50+i%200))
		}
	}()
	var c Chunk
	for after := uint64(0); after < n; {
		ch := s.Changed()
		err := s.Read(e, after, 100, 64<<10, &c)
		if errors.Is(err, io.EOF) {
			select {
			case <-ch:
			case <-time.After(10 * time.Second):
				t.Fatalf("nothing for 10 s after %d: %+v", after, s.Stats())
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range c.Records {
			if want := payload(int(r.Seq-1), 50+int(r.Seq-1)%200); string(want) != string(r.Payload) {
				t.Fatalf("record %d: %.30q", r.Seq, r.Payload)
			}
		}
		if len(c.Losses) > 0 {
			t.Fatalf("losses %+v", c.Losses)
		}
		after = c.Last
		if err := s.Ack(e, after); err != nil {
			t.Fatal(err)
		}
	}
	checkSums(t, s.Spool)
}

func TestSyncBehindTheCommitter(t *testing.T) {
	s, err := Open(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Append([]byte("x"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Sync(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("sync without a committer: %v", err)
	}
}

// Many short runs: epochs that made nothing leave nothing, those that are
// acknowledged stay only in number.
func TestManyRuns(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), fs: newMemDisk()}
	for i := range keepAckedLanes + 20 {
		s := start(t, cfg)
		if i%2 == 0 {
			s.append(payload(i, 10))
			s.append(payload(i, 10))
			s.sync()
			if err := s.Ack(own(s.Spool).Epoch, 2); err != nil {
				t.Fatal(err)
			}
		}
		s.end()
	}
	s := start(t, cfg)
	if n := len(s.Lanes()); n != (keepAckedLanes+20)/2+1 {
		t.Errorf("%d epochs after %d runs, every second of which made records", n, keepAckedLanes+20)
	}
	s.end()
	for range 50 {
		s := start(t, cfg)
		s.append([]byte("x"))
		s.sync()
		s.Ack(own(s.Spool).Epoch, 1)
		s.end()
	}
	s = start(t, cfg)
	s.wait("old epochs go", func(st Stats) bool { return st.Lanes == keepAckedLanes+1 })
}

func TestInspectLive(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: dir})
	for i := range 10 {
		s.append(payload(i, 10))
	}
	s.append(make([]byte, 2<<20)[:0])
	if _, err := s.Append(make([]byte, 2<<20)); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
	s.sync()
	var b strings.Builder
	rep, err := Verify(dir, &b)
	if err != nil || rep.Records != 11 || rep.Damaged != 0 || rep.Epochs[0].Made != 12 || rep.Epochs[0].Sealed {
		t.Errorf("verify: %+v, %v\n%s", rep, err, b.String())
	}
	b.Reset()
	if _, err := Dump(dir, &b, nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{` 3 record 10 bytes "record 2 j"`, " 12 loss to 12, too-large"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("dump lacks %q:\n%s", want, b.String())
		}
	}
	if _, err := Verify(filepath.Join(dir, "none"), io.Discard); err == nil {
		t.Error("verify of a missing directory: no error")
	}
}

// Append allocates nothing once its buffers have grown.
func TestAppendAllocatesNothing(t *testing.T) {
	s, err := Open(Config{Dir: t.TempDir(), Queue: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.q.items = make([]queued, 0, 3000)
	s.q.buf = make([]byte, 0, 1<<20)
	p := payload(1, 200)
	if n := testing.AllocsPerRun(2000, func() { s.Append(p) }); n != 0 {
		t.Errorf("Append allocates %v times", n)
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// hookFS calls onRead before each read of a segment's frames.
type hookFS struct {
	osFS
	onRead func()
}

type hookFile struct {
	file
	fs *hookFS
}

func (h *hookFS) OpenFile(path string, flag int, perm os.FileMode) (file, error) {
	f, err := h.osFS.OpenFile(path, flag, perm)
	if err != nil || flag != os.O_RDONLY {
		return f, err
	}
	return hookFile{f, h}, nil
}

func (f hookFile) ReadAt(b []byte, off int64) (int, error) {
	if f.fs.onRead != nil {
		f.fs.onRead()
	}
	return f.file.ReadAt(b, off)
}

// Records that become durable while a Read is on its way, in the same segment
// and in new ones, are not missing: they come with the next Read.
func TestCommitDuringRead(t *testing.T) {
	h := &hookFS{}
	s := start(t, Config{Dir: t.TempDir(), MaxBytes: 256 << 10, SegmentBytes: 4 << 10, MaxRecord: 500, fs: h})
	n := 0
	add := func() {
		s.append(payload(n, 300))
		n++
		s.sync()
	}
	add()
	h.onRead = func() {
		if n < 200 {
			add()
		}
	}
	e := own(s.Spool).Epoch
	for after := 0; after < 200; {
		got := readAll(t, s.Spool, e, uint64(after))
		for _, g := range got {
			if g.Reason != "" || g.Text != string(payload(after, 300)) {
				t.Fatalf("record %d is %+v", after+1, g)
			}
			after++
		}
	}
	if st := s.Stats(); st.Lost[Corrupt] != 0 {
		t.Errorf("lost %v", st.Lost)
	}
}

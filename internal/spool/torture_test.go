package spool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/testenv"
)

// written is a spool of one ended run, as files.
type written struct {
	epoch Epoch
	files map[string][]byte
	dir   string // for the lock of those who open it
	seg   string // name of the last segment
	lane  string
	n     int // records
}

// writeSpool makes a spool of n records in segments of segBytes.
func writeSpool(t testing.TB, n, size int, segBytes int64) *written {
	t.Helper()
	dir := t.TempDir()
	s := start(t, Config{Dir: dir, SegmentBytes: segBytes, MaxRecord: 500})
	w := &written{epoch: own(s.Spool).Epoch, n: n, dir: t.TempDir(), files: map[string][]byte{}}
	for i := range n {
		s.append(payload(i, size))
		s.sync()
	}
	s.end()
	names, _ := filepath.Glob(filepath.Join(dir, "*-*"))
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		name = filepath.Base(name)
		w.files[name] = b
		if strings.HasSuffix(name, segExt) {
			w.seg = name // Glob sorts
		} else {
			w.lane = name
		}
	}
	return w
}

// disk puts the files on a disk of their own.
func (w *written) disk(change map[string][]byte) *memDisk {
	d := newMemDisk()
	files := maps.Clone(w.files)
	maps.Copy(files, change)
	for name, b := range files {
		if b != nil {
			d.names[name] = &inode{data: slices.Clone(b), synced: slices.Clone(b)}
		}
	}
	d.synced = maps.Clone(d.names)
	return d
}

// readBack opens the disk's spool and reads the epoch, and checks that no
// record is a wrong one.
func (w *written) readBack(t testing.TB, d *memDisk, size int) []entry {
	t.Helper()
	if w.dir == "" {
		w.dir = t.TempDir()
	}
	s, err := Open(Config{Dir: w.dir, fs: d})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	defer s.Close()
	if s.laneLocked(w.epoch) == nil {
		return nil
	}
	got := readAll(t, s, w.epoch, 0)
	for _, g := range got {
		if g.Reason == "" && g.Text != string(payload(int(g.From-1), size)) {
			t.Fatalf("record %d is %.40q", g.From, g.Text)
		}
	}
	return got
}

// brief is entries as text: "1-5 crash:6-7".
func brief(es []entry) string {
	var b strings.Builder
	for i := 0; i < len(es); {
		j := i
		for es[i].Reason == "" && j+1 < len(es) && es[j+1].Reason == "" {
			j++
		}
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		if es[i].Reason != "" {
			b.WriteString(es[i].Reason + ":")
		}
		fmt.Fprintf(&b, "%d-%d", es[i].From, es[j].To)
		i = j + 1
	}
	return b.String()
}

// frames says where the frames of a segment begin, and where it ends.
func frames(t testing.TB, name string, b []byte) (at []int) {
	t.Helper()
	id, _, _ := parseName(name)
	c := newCursor(bytes.NewReader(b), id.salt(), int64(len(b)))
	for {
		fr, next, dmg, err := c.peek()
		if dmg != nil || err != nil && err != io.EOF {
			t.Fatalf("segment %s: %v %v", name, dmg, err)
		}
		at = append(at, int(c.off))
		if err != nil {
			return at
		}
		c.advance(&fr, next)
	}
}

// unsealed makes the lane what it was while the agent ran.
func unsealed(b []byte, made uint64) []byte {
	b = slices.Clone(b)
	putCounter(b, cSealed, 0)
	putCounter(b, cLast, 0)
	putCounter(b, cMade, made)
	return b
}

func TestTornFiles(t *testing.T) {
	const size = 100
	w := writeSpool(t, 10, size, 4096)
	if len(w.files) != 2 {
		t.Fatalf("%d files, want one segment and one lane", len(w.files))
	}
	at := frames(t, w.seg, w.files[w.seg]) // 11 offsets
	seg := func(change func(b []byte) []byte) map[string][]byte {
		return map[string][]byte{w.seg: change(slices.Clone(w.files[w.seg]))}
	}
	zero := func(from, to int) map[string][]byte {
		return seg(func(b []byte) []byte { clear(b[from:to]); return b })
	}
	flip := func(off int) map[string][]byte {
		return seg(func(b []byte) []byte { b[off] ^= 0x10; return b })
	}
	lane := func(change func(b []byte)) map[string][]byte {
		b := slices.Clone(w.files[w.lane])
		change(b)
		return map[string][]byte{w.lane: b}
	}
	otherName := fileID{99, w.epoch}.name(segExt)
	for _, tt := range []struct {
		name   string
		change map[string][]byte
		want   string
	}{
		{"whole", nil, "1-10"},
		{"cut in the last payload", seg(func(b []byte) []byte { return b[:len(b)-20] }), "1-9 crash:10-10"},
		{"cut in the last header", seg(func(b []byte) []byte { return b[:at[9]+5] }), "1-9 crash:10-10"},
		{"cut between frames", seg(func(b []byte) []byte { return b[:at[8]] }), "1-8 crash:9-10"},
		{"cut in the first frame", seg(func(b []byte) []byte { return b[:at[0]+30] }), "crash:1-10"},
		{"cut in the header", seg(func(b []byte) []byte { return b[:30] }), "crash:1-10"},
		{"empty", seg(func(b []byte) []byte { return b[:0] }), "crash:1-10"},
		{"longer, with zeros", seg(func(b []byte) []byte { return append(b, make([]byte, 5000)...) }), "1-10"},
		{"longer, with noise", seg(func(b []byte) []byte { return append(b, bytes.Repeat([]byte{1, 0, 0, 0, 5}, 999)...) }), "1-10"},
		{"longer, with its own first frame", seg(func(b []byte) []byte { return append(b, b[at[0]:at[1]]...) }), "1-10"},
		{"zeroed end", zero(at[7]+40, at[10]), "1-7 crash:8-10"},
		{"zeroed middle", zero(at[3]+40, at[5]+40), "1-3 corrupt:4-6 7-10"},
		{"zeroed header of the segment", zero(0, segHeaderLen), "1-10"},
		{"zeroed start", zero(0, at[2]), "corrupt:1-2 3-10"},
		{"all zeroed", zero(0, at[10]), "crash:1-10"},
		{"flipped in the header of the segment", flip(45), "1-10"},
		{"flipped in a payload", flip(at[4] + 60), "1-4 corrupt:5-5 6-10"},
		{"flipped in a length", flip(at[4] + 5), "1-4 corrupt:5-5 6-10"},
		{"flipped in a number", flip(at[4] + 8), "1-4 corrupt:5-5 6-10"},
		{"flipped in the last payload", flip(at[9] + 60), "1-9 crash:10-10"},
		{"flipped in two neighbours", seg(func(b []byte) []byte { b[at[4]+60] ^= 1; b[at[5]+2] ^= 1; return b }), "1-4 corrupt:5-6 7-10"},
		{"unknown version", seg(func(b []byte) []byte {
			binary.LittleEndian.PutUint32(b[8:], 2)
			binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
			return b
		}), ""},
		{"unknown version of the lane", lane(func(b []byte) {
			binary.LittleEndian.PutUint32(b[8:], 2)
			binary.LittleEndian.PutUint32(b[52:], crc32.Checksum(b[:52], castagnoli))
		}), ""},
		{"damaged version", seg(func(b []byte) []byte { b[8] = 2; return b }), "1-10"},
		{"lane gone", map[string][]byte{w.lane: nil}, "1-10"},
		{"lane empty", map[string][]byte{w.lane: {}}, "1-10"},
		{"lane zeroed", lane(func(b []byte) { clear(b) }), "1-10"},
		{"lane cut", map[string][]byte{w.lane: w.files[w.lane][:70]}, "1-10"},
		{"counter made zeroed", lane(func(b []byte) { clear(b[laneCounters : laneCounters+8]) }), "1-10"},
		{"segment gone", map[string][]byte{w.seg: nil}, "crash:1-10"},
		{"both gone", map[string][]byte{w.seg: nil, w.lane: nil}, ""},
		{"segment under another name", map[string][]byte{w.seg: nil, otherName: w.files[w.seg]}, "crash:1-10"},
		{"made is ahead: killed", lane(func(b []byte) { copy(b, unsealed(b, 14)) }), "1-10 crash:11-14"},
		{"made is behind: power cut", lane(func(b []byte) { copy(b, unsealed(b, 3)) }), "1-10"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			change := maps.Clone(tt.change)
			if _, ok := change[w.lane]; !ok && change != nil {
				change[w.lane] = unsealed(w.files[w.lane], 10) // so that the tail is looked at
			}
			d := w.disk(change)
			if got := brief(w.readBack(t, d, size)); got != tt.want {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
			// Once repaired, it stays as it is.
			if got := brief(w.readBack(t, d, size)); got != tt.want {
				t.Errorf("the second time: got  %q\nwant %q", got, tt.want)
			}
			if strings.HasPrefix(tt.name, "unknown") {
				for name, b := range w.files {
					want := b
					if c := change[name]; c != nil {
						want = c
					}
					if in := d.names[name]; in == nil || !bytes.Equal(in.data, want) {
						t.Errorf("%s of a newer agent was changed", name)
					}
				}
			}
		})
	}
}

// Damage in a segment that is not the newest is found when it is read.
func TestDamageInOlderSegments(t *testing.T) {
	const size = 200
	w := writeSpool(t, 100, size, 4096)
	segs := slices.DeleteFunc(slices.Sorted(maps.Keys(w.files)), func(n string) bool { return !strings.HasSuffix(n, segExt) })
	if len(segs) < 5 {
		t.Fatalf("%d segments", len(segs))
	}
	second := w.files[segs[1]]
	first, _, err := decodeSegmentHeader(second, mustID(segs[1]))
	if err != nil {
		t.Fatal(err)
	}
	third, _, _ := decodeSegmentHeader(w.files[segs[2]], mustID(segs[2]))
	at := frames(t, segs[1], second)
	cut := func(n int) []byte { return second[:n] }
	flipped := slices.Clone(second)
	flipped[at[1]+50] ^= 4
	for _, tt := range []struct {
		name   string
		change []byte
		want   string
	}{
		{"gone", nil, fmt.Sprintf("1-%d corrupt:%d-%d %d-100", first-1, first, third-1, third)},
		{"empty", []byte{}, fmt.Sprintf("1-%d corrupt:%d-%d %d-100", first-1, first, third-1, third)},
		{"cut", cut(at[2] + 9), fmt.Sprintf("1-%d corrupt:%d-%d %d-100", first+1, first+2, third-1, third)},
		{"flipped", flipped, fmt.Sprintf("1-%d corrupt:%d-%d %d-100", first, first+1, first+1, first+2)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := w.disk(map[string][]byte{segs[1]: tt.change})
			if got := brief(w.readBack(t, d, size)); got != tt.want {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
			rep, err := inspect(d, "", func(*Item) error { return nil })
			if err != nil || rep.Damaged != 1 || len(rep.Epochs[0].Missing) != 1 {
				t.Errorf("inspect: %+v, %v", rep, err)
			}
		})
	}
}

func mustID(name string) fileID {
	id, _, ok := parseName(name)
	if !ok {
		panic(name)
	}
	return id
}

// A segment cut anywhere holds exactly the records that are whole.
func TestEveryPrefix(t *testing.T) {
	const size = 20
	w := writeSpool(t, 8, size, 4096)
	b := w.files[w.seg]
	at := frames(t, w.seg, b)
	for n := range len(b) + 1 {
		whole := 0
		for whole < 8 && at[whole+1] <= n {
			whole++
		}
		want := "1-8"
		switch {
		case whole == 0:
			want = "crash:1-8"
		case whole < 8:
			want = fmt.Sprintf("1-%d crash:%d-8", whole, whole+1)
		}
		d := w.disk(map[string][]byte{w.seg: b[:n], w.lane: unsealed(w.files[w.lane], 8)})
		if got := brief(w.readBack(t, d, size)); got != want {
			t.Fatalf("cut to %d bytes: %q, want %q", n, got, want)
		}
	}
}

// Any flipped bit costs at most the record it is in, which is reported.
func TestEveryBitFlip(t *testing.T) {
	const size = 20
	w := writeSpool(t, 8, size, 4096)
	b := slices.Clone(w.files[w.seg])
	at := frames(t, w.seg, b)
	for bit := range 8 * len(b) {
		b[bit/8] ^= 1 << (bit % 8)
		hit := 0 // record
		for hit < 8 && at[hit] <= bit/8 {
			hit++
		}
		want := "1-8"
		if hit > 0 && bit/8 < at[hit-1]+frameHeader+size { // not in the padding
			kind := "corrupt"
			if hit == 8 {
				kind = "crash" // the end of the newest segment looks torn
			}
			want = fmt.Sprintf("1-%d %s:%d-%d %d-8", hit-1, kind, hit, hit, hit+1)
			want = strings.TrimSuffix(strings.TrimPrefix(want, "1-0 "), " 9-8")
		}
		d := w.disk(map[string][]byte{w.seg: b, w.lane: unsealed(w.files[w.lane], 8)})
		if got := brief(w.readBack(t, d, size)); got != want {
			t.Fatalf("bit %d of byte %d flipped: %q, want %q", bit%8, bit/8, got, want)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	// The lane's bits cost no record.
	l := slices.Clone(w.files[w.lane])
	for bit := range 8 * (laneCounters + 8*int(numCounters)) {
		l[bit/8] ^= 1 << (bit % 8)
		if got := brief(w.readBack(t, w.disk(map[string][]byte{w.lane: l}), size)); got != "1-8" {
			t.Fatalf("bit %d of the lane's byte %d flipped: %q", bit%8, bit/8, got)
		}
		l[bit/8] ^= 1 << (bit % 8)
	}
}

// retrying is a Config for a disk that refuses.
func retrying(t testing.TB, d *memDisk) Config {
	return Config{Dir: t.TempDir(), MaxBytes: 64 << 10, SegmentBytes: 4 << 10, MaxRecord: 500, Ring: 8,
		fs: d, retryFirst: time.Millisecond, retryMax: 4 * time.Millisecond}
}

func refuseWrites(err error) func(int, string, string) error {
	return func(_ int, kind, _ string) error {
		if kind == "write" || kind == "create" {
			return err
		}
		return nil
	}
}

// Whichever write or sync fails, once: nothing is lost, and nothing differs.
func TestFailNthOperation(t *testing.T) {
	scenario := func(t *testing.T, d *memDisk) (epoch Epoch, ops int) {
		s := start(t, retrying(t, d))
		for i := range 40 {
			s.append(payload(i, 300))
			if i%3 == 0 {
				s.sync()
			}
		}
		s.sync()
		epoch = own(s.Spool).Epoch
		if got := brief(readAll(t, s.Spool, epoch, 0)); got != "1-40" {
			t.Errorf("read %q, want all 40", got)
		}
		checkSums(t, s.Spool)
		if st := s.Stats(); st.Durable != 40 || st.Failing != nil {
			t.Errorf("stats %+v", st)
		}
		if err := s.end(); err != nil {
			t.Errorf("run: %v", err)
		}
		return epoch, d.ops
	}
	_, total := scenario(t, newMemDisk())
	for _, failure := range []error{unix.ENOSPC, unix.EIO} {
		for n := 1; n <= total; n++ {
			d := newMemDisk()
			var what string
			d.refuse = func(op int, kind, name string) error {
				if op != n {
					return nil
				}
				what = kind + " " + name
				return failure
			}
			epoch, _ := scenario(t, d)
			if t.Failed() {
				t.Fatalf("with %v at operation %d, %s", failure, n, what)
			}
			d.setRefuse(nil)
			w := &written{epoch: epoch}
			if got := brief(w.readBack(t, d, 300)); got != "1-40" {
				t.Fatalf("with %v at operation %d, %s: after a restart %q", failure, n, what, got)
			}
		}
	}
}

// A failed fdatasync is never repeated on its file.
func TestFailedSyncIsNotRepeated(t *testing.T) {
	d := newMemDisk()
	failed := map[string]bool{}
	rnd := rand.New(rand.NewPCG(1, 2))
	d.refuse = func(_ int, kind, name string) error {
		if kind != "datasync" && kind != "sync" || !strings.HasSuffix(name, segExt) {
			return nil
		}
		if failed[name] {
			t.Errorf("%s of %s after a sync of it failed", kind, name)
		}
		if rnd.IntN(3) == 0 {
			failed[name] = true
			return unix.EIO
		}
		return nil
	}
	cfg := retrying(t, d)
	cfg.MaxBytes = 1 << 20
	s := start(t, cfg)
	for i := range 50 {
		s.append(payload(i, 100))
		s.sync()
	}
	if len(failed) < 5 || s.Stats().WriteErrors != uint64(len(failed)) {
		t.Errorf("%d failed, counted %d", len(failed), s.Stats().WriteErrors)
	}
	if got := brief(readAll(t, s.Spool, own(s.Spool).Epoch, 0)); got != "1-50" {
		t.Errorf("read %q", got)
	}
}

// While the disk refuses, the newest records can be read from memory, the
// others are a loss; all of it is on disk afterwards.
func TestRefusingDisk(t *testing.T) {
	d := newMemDisk()
	cfg := retrying(t, d)
	s := start(t, cfg)
	e := own(s.Spool).Epoch
	for i := range 5 {
		s.append(payload(i, 100))
	}
	s.sync()
	d.setRefuse(refuseWrites(unix.ENOSPC))
	s.append(payload(5, 100))
	woken := s.Changed()
	for len(readAll(t, s.Spool, e, 0)) < 6 {
		select { // a reader sleeps on nothing else
		case <-woken:
			woken = s.Changed()
		case <-time.After(10 * time.Second):
			t.Fatal("nobody told the reader")
		}
	}
	for i := 1; i < 20; i++ {
		s.append(payload(5+i, 100))
	}
	s.wait("the disk fails", func(st Stats) bool {
		return st.Failing != nil && st.Lost[Disk] == 13 && len(readAll(t, s.Spool, e, 0)) == 5+1+7
	})
	checkSums(t, s.Spool)
	got := readAll(t, s.Spool, e, 0)
	if want := "1-5 disk:6-18 19-25"; brief(got) != want {
		t.Errorf("read %q, want %q", brief(got), want)
	}
	for _, g := range got {
		if wantMem := g.From > 18; g.Memory != wantMem {
			t.Errorf("entry %+v: from memory %v", g, g.Memory)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Sync(ctx); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("sync: %v", err)
	}
	// What was acknowledged from memory is not lost when it falls off.
	if err := s.Ack(e, 22); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		s.append(payload(25+i, 100))
	}
	s.wait("four more fell off", func(Stats) bool {
		got := readAll(t, s.Spool, e, 0)
		return brief(got) == "1-5 disk:6-22 23-29"
	})
	checkSums(t, s.Spool)
	if st := s.Stats(); st.Lost[Disk] != 13 || st.WriteErrors < 2 {
		t.Errorf("stats %+v", st)
	}
	d.setRefuse(nil)
	s.sync()
	checkSums(t, s.Spool)
	got = readAll(t, s.Spool, e, 0)
	if want := "1-5 disk:6-22 23-29"; brief(got) != want || got[len(got)-1].Memory {
		t.Errorf("read %q, want %q", brief(got), want)
	}
	if st := s.Stats(); st.Failing != nil || st.Queued != 0 {
		t.Errorf("stats %+v", st)
	}
	s.append(payload(29, 100))
	s.sync()
	s.end()
	w := &written{epoch: e}
	if got := brief(w.readBack(t, d, 100)); got != "1-5 disk:6-22 23-30" {
		t.Errorf("after a restart %q", got)
	}
}

// hold makes the disk's next syncs wait until release is called; held tells
// that one does.
func (d *memDisk) hold() (held <-chan struct{}, release func()) {
	in, out := make(chan struct{}, 100), make(chan struct{})
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sync = func() {
		in <- struct{}{}
		<-out
	}
	return in, func() {
		d.mu.Lock()
		d.sync = nil
		d.mu.Unlock()
		close(out)
	}
}

// What a slow disk has had for longer than Patience can be read without it, in
// order and once, losses included, and is on disk in the end.
func TestSlowDisk(t *testing.T) {
	d := newMemDisk()
	s := start(t, Config{Dir: t.TempDir(), MaxRecord: 500, Patience: time.Millisecond, fs: d})
	e := own(s.Spool).Epoch
	s.append(payload(0, 100))
	s.sync()
	before := s.Stats().Early // nobody has read yet
	held, release := d.hold()
	s.append(payload(1, 100))
	<-held
	s.append(payload(2, 100)) // behind what is being synced
	if _, err := s.Append(make([]byte, 501)); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
	s.append(payload(4, 100))
	var got []entry
	read := func(want string) { // sleeps like a sender, on nothing but Changed
		t.Helper()
		for deadline := time.After(10 * time.Second); ; {
			woken := s.Changed()
			var after uint64 = 1
			if len(got) > 0 {
				after = got[len(got)-1].To
			}
			got = append(got, readAll(t, s.Spool, e, after)...)
			if brief(got) == want {
				return
			}
			select {
			case <-woken:
			case <-deadline:
				t.Fatalf("read %q, want %q", brief(got), want)
			}
		}
	}
	read("2-3 too-large:4-4 5-5")
	s.append(payload(5, 100)) // by now it is slow: told at once
	read("2-3 too-large:4-4 5-6")
	for _, g := range got {
		if g.Reason == "" && !g.Memory {
			t.Errorf("%+v is no more than in memory", g)
		}
	}
	if st := s.Stats(); st.Durable != 1 || st.Early-before != 4 {
		t.Errorf("stats %+v", st)
	}
	checkSums(t, s.Spool)
	if err := s.Ack(e, 5); err != nil { // a collector can be faster than the disk
		t.Fatal(err)
	}
	release()
	s.sync()
	checkSums(t, s.Spool)
	all := readAll(t, s.Spool, e, 0)
	if want := "1-3 too-large:4-4 5-6"; brief(all) != want || all[2].Memory || all[len(all)-1].Memory {
		t.Errorf("read %q, want %q from disk", brief(all), want)
	}
	for i, g := range all {
		if g.Reason == "" && g.Text != string(payload(i, 100)) {
			t.Errorf("record %d is %.40q", g.From, g.Text)
		}
	}
	if st := s.Stats(); st.Durable != 5 || st.Unacked != 1 || st.Early-before != 4 {
		t.Errorf("stats %+v", st)
	}
	s.end()
	w := &written{epoch: e}
	if got := brief(w.readBack(t, d, 100)); got != "1-3 too-large:4-4 5-6" {
		t.Errorf("after a restart %q", got)
	}
}

// With no end to its patience nothing is read before it is on disk.
func TestPatience(t *testing.T) {
	d := newMemDisk()
	s := start(t, Config{Dir: t.TempDir(), Patience: -1, fs: d})
	held, release := d.hold()
	s.append(payload(0, 100))
	<-held
	s.append(payload(1, 100))
	if got := readAll(t, s.Spool, own(s.Spool).Epoch, 0); len(got) != 0 {
		t.Errorf("read %q, none is on disk", brief(got))
	}
	release()
	s.sync()
	if got := readAll(t, s.Spool, own(s.Spool).Epoch, 0); brief(got) != "1-2" {
		t.Errorf("read %q", brief(got))
	}
}

// A run that ends while the disk refuses says so, and the next one names it.
func TestEndWhileRefusing(t *testing.T) {
	d := newMemDisk()
	s := start(t, retrying(t, d))
	e := own(s.Spool).Epoch
	s.append(payload(0, 100))
	s.sync()
	d.setRefuse(refuseWrites(unix.EIO))
	s.append(payload(1, 100))
	s.append(payload(2, 100))
	if err := s.end(); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "2 to 3") {
		t.Errorf("run: %v", err)
	}
	d.setRefuse(nil)
	w := &written{epoch: e}
	if got := brief(w.readBack(t, d, 100)); got != "1-1 crash:2-3" {
		t.Errorf("after a restart %q", got)
	}
}

// The disk is full at the start already.
func TestOpenOnAFullDisk(t *testing.T) {
	d := newMemDisk()
	d.refuse = func(int, string, string) error { return unix.ENOSPC }
	s := start(t, retrying(t, d))
	e := own(s.Spool).Epoch
	s.append(payload(0, 100))
	s.append(payload(1, 100))
	s.wait("in memory", func(st Stats) bool { return st.Failing != nil && len(readAll(t, s.Spool, e, 0)) == 2 })
	d.setRefuse(nil)
	s.sync()
	s.end()
	w := &written{epoch: e}
	if got := brief(w.readBack(t, d, 100)); got != "1-2" {
		t.Errorf("after a restart %q", got)
	}
}

// Power cuts at any operation: what could be read as durable is there
// afterwards, every number means what it meant, and no bytes are wrong.
func TestPowerCuts(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	d := newMemDisk()
	texts := map[Epoch]map[uint64]string{} // all that was ever appended
	durable := map[Epoch]map[uint64]bool{} // all that was ever read as durable
	cuts, kept := 0, 0
	rounds := 150
	for range rounds {
		cfg := retrying(t, d)
		cfg.MaxBytes = 64 << 20 // nothing gives way
		cfg.Patience = []time.Duration{-1, 1, 0}[rnd.IntN(3)]
		s, err := Open(cfg)
		if errors.Is(err, errPowerCut) {
			d.setRefuse(nil)
			d = d.powerCut(rnd)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		checkDurable(t, s, texts, durable)
		if t.Failed() {
			t.Fatalf("after %d cuts", cuts)
		}
		at := d.ops + 1 + rnd.IntN(30)
		cutDisk := d
		d.setRefuse(func(op int, _, _ string) error {
			if op >= at {
				cutDisk.off = true // called with mu held
				return errPowerCut
			}
			return nil
		})
		e := own(s).Epoch
		texts[e], durable[e] = map[uint64]string{}, map[uint64]bool{}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		ackAll := rnd.IntN(2) == 0 // as a collector does that is faster than the disk
		var c Chunk
		for range rnd.IntN(60) {
			if err := s.Read(e, c.Last, 10, 1<<20, &c); ackAll && err == nil {
				if err := s.Ack(e, c.Last); err != nil {
					t.Fatal(err)
				}
			}
			p := payload(rnd.IntN(1e9), rnd.IntN(300))
			s.mu.Lock()
			texts[e][s.own.made+1] = string(p) // before Append: it may be on disk at once
			s.mu.Unlock()
			s.Append(p)
			if rnd.IntN(4) == 0 {
				c, stop := context.WithTimeout(ctx, time.Millisecond)
				s.Sync(c)
				stop()
				noteDurable(s, e, durable)
			}
		}
		noteDurable(s, e, durable)
		cancel()
		<-done
		noteDurable(s, e, durable)
		if rnd.IntN(4) == 0 { // an end without a cut, if it did not come
			d.mu.Lock()
			off := d.off
			d.mu.Unlock()
			if !off {
				d.setRefuse(nil)
				s.Close()
				continue
			}
		}
		d = d.powerCut(rnd)
		s.Close()
		cuts++
	}
	for _, m := range durable {
		kept += len(m)
	}
	if cuts < rounds/2 || kept < rounds {
		t.Errorf("only %d cuts, %d durable records: the test tests nothing", cuts, kept)
	}
}

// A power cut while a crash is being cleaned up forgets nothing about it.
func TestPowerCutDuringOpen(t *testing.T) {
	const size = 100
	w := writeSpool(t, 10, size, 4096)
	torn := w.files[w.seg][:len(w.files[w.seg])-10]
	for n := 1; ; n++ {
		for seed := range uint64(8) {
			d := w.disk(map[string][]byte{w.seg: torn, w.lane: unsealed(w.files[w.lane], 14)})
			d.refuse = func(op int, _, _ string) error {
				if op >= n {
					d.off = true
					return errPowerCut
				}
				return nil
			}
			s, err := Open(Config{Dir: w.dir, fs: d})
			if err == nil {
				s.Close()
				if n < 4 {
					t.Fatalf("Open needs only %d operations?", n)
				}
				return
			}
			if !errors.Is(err, errPowerCut) {
				t.Fatal(err)
			}
			after := d.powerCut(rand.New(rand.NewPCG(seed, 0)))
			if got := brief(w.readBack(t, after, size)); got != "1-9 crash:10-14" {
				t.Fatalf("power cut at operation %d, seed %d: %q", n, seed, got)
			}
		}
	}
}

func noteDurable(s *Spool, e Epoch, durable map[Epoch]map[uint64]bool) {
	s.mu.Lock()
	last := s.own.last
	s.mu.Unlock()
	for seq := uint64(1); seq <= last; seq++ {
		durable[e][seq] = true
	}
}

func checkDurable(t *testing.T, s *Spool, texts map[Epoch]map[uint64]string, durable map[Epoch]map[uint64]bool) {
	t.Helper()
	for e, want := range durable {
		var got []entry
		s.mu.Lock()
		known := s.laneLocked(e) != nil
		s.mu.Unlock()
		if known {
			got = readAll(t, s, e, 0)
		}
		have := map[uint64]string{}
		for _, g := range got {
			if g.Reason == "" {
				have[g.From] = g.Text
			}
		}
		for seq, text := range have {
			if texts[e][seq] != text {
				t.Errorf("epoch %s: record %d is %.40q, appended was %.40q", e, seq, text, texts[e][seq])
			}
		}
		for seq := range want {
			if have[seq] != texts[e][seq] {
				t.Errorf("epoch %s: durable record %d is gone; read %s", e, seq, brief(got))
				return
			}
		}
	}
}

// A page of the counters that cannot be stored to does not take the agent down.
func TestLanePageFaults(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: dir})
	s.append(payload(0, 10))
	s.sync()
	lane, _ := filepath.Glob(filepath.Join(dir, "*"+laneExt))
	if err := os.Truncate(lane[0], 0); err != nil { // a store now raises SIGBUS
		t.Fatal(err)
	}
	s.append(payload(1, 10))
	s.append(payload(2, 10))
	s.sync()
	e := own(s.Spool).Epoch
	if err := s.Ack(e, 1); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.LaneErrors == 0 || st.Durable != 3 {
		t.Errorf("stats %+v", st)
	}
	s.end()
	s = start(t, Config{Dir: dir})
	if got := brief(readAll(t, s.Spool, e, 0)); got != "1-3" {
		t.Errorf("after a restart %q", got)
	}
}

const ownMounts = "SPOOL_TEST_OWN_MOUNTS" // set: this process has a mount namespace of its own

// A real file system, really full. It is mounted in a process of its own, so
// that nothing stays mounted however this ends.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	if os.Getenv(ownMounts) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFullDisk$")
		cmd.Env = append(os.Environ(), ownMounts+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, unix.EPERM) {
			testenv.Skip(t, "a mount namespace: "+err.Error())
		}
		if err != nil || !strings.Contains(string(out), "PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("spooltest", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=512k,mode=0700"); err != nil {
		testenv.Skip(t, "mount tmpfs: "+err.Error())
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) }) // before the directory is removed
	s := start(t, Config{Dir: filepath.Join(dir, "spool"), MaxBytes: 4 << 20, SegmentBytes: 64 << 10, Ring: 16,
		retryFirst: time.Millisecond, retryMax: 10 * time.Millisecond})
	defer s.end()
	e := own(s.Spool).Epoch
	i := 0
	add := func(n int) {
		for range n {
			s.append(payload(i, 1000))
			i++
		}
	}
	add(50)
	s.sync()
	ballast := filepath.Join(dir, "ballast")
	b := bytes.Repeat([]byte{1}, 600<<10)
	if err := os.WriteFile(ballast, b, 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	add(100)
	s.wait("the disk is full", func(st Stats) bool { return errors.Is(st.Failing, unix.ENOSPC) && st.Lost[Disk] > 0 })
	checkSums(t, s.Spool)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	add(20)
	s.sync()
	checkSums(t, s.Spool)
	st := s.Stats()
	got := readAll(t, s.Spool, e, 0)
	var lost uint64
	for _, g := range got {
		if g.Reason == "disk" {
			lost += g.To - g.From + 1
		} else if g.Reason != "" || g.Text != string(payload(int(g.From-1), 1000)) {
			t.Errorf("entry %+v", g)
		}
	}
	if lost != st.Lost[Disk] || got[len(got)-1].To != 170 || st.Failing != nil {
		t.Errorf("read %q; stats %+v", brief(got), st)
	}
	// Acknowledged segments, kept for a collector's sake, give way to new records.
	s.wait("full by itself", func(st Stats) bool {
		if st.Failing == nil {
			changed := s.Changed() // before, or the change may be over already
			add(10)
			<-changed
		}
		return st.Failing != nil
	})
	if err := s.Ack(e, uint64(i-50)); err != nil {
		t.Fatal(err)
	}
	s.sync()
	checkSums(t, s.Spool)
	if err := s.end(); err != nil {
		t.Error(err)
	}
}

// coverAll reads every epoch from its beginning: whatever is on the disk, the
// numbers up to made must be covered, each once, in bounded steps.
func coverAll(t *testing.T, d *memDisk, dir string, most int) {
	t.Helper()
	s, err := Open(Config{Dir: dir, fs: d})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	defer s.Close()
	for _, l := range s.Lanes() {
		var c Chunk
		after := uint64(0)
		for n := 0; ; n++ {
			err := s.Read(l.Epoch, after, 16, 4096, &c)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil || c.First != after+1 || c.Last < c.First || n > most {
				t.Fatalf("read after %d: %d..%d, %v", after, c.First, c.Last, err)
			}
			covered := uint64(len(c.Records))
			for _, x := range c.Losses {
				covered += x.To - x.From + 1
			}
			if covered != c.Last-c.First+1 {
				t.Fatalf("chunk %d..%d covers %d numbers", c.First, c.Last, covered)
			}
			after = c.Last
		}
		if after != l.Made {
			t.Fatalf("covered up to %d, made %d", after, l.Made)
		}
	}
	if _, err := inspect(d, "", func(*Item) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// Any bytes in the files.
func FuzzOpenSegment(f *testing.F) {
	w := writeSpool(f, 3, 20, 4096)
	f.Add(w.files[w.seg], w.files[w.lane][:laneCounters+8*int(numCounters)])
	f.Add(w.files[w.seg][:100], []byte{})
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, seg, lane []byte) {
		full := make([]byte, laneLen)
		copy(full, lane)
		coverAll(t, w.disk(map[string][]byte{w.seg: seg, w.lane: full}), w.dir, len(seg)+10)
	})
}

// Any frames and counters, all with right checks, in two segments of one
// epoch: no number, range or order of them leads a reader astray.
func FuzzFrames(f *testing.F) {
	w := writeSpool(f, 3, 20, 4096)
	second := fileID{mustID(w.seg).number + 1, w.epoch}
	f.Add([]byte{0, 1, 0, 2, 1, 3, 1, 9, 0, 10}, uint64(10), uint64(10), uint64(0), uint64(0), true)
	f.Add([]byte{0, 1, 3, 0, 2, 7, 0, 9, 4, 0, 5, 1, 2, 200}, uint64(10), uint64(4), uint64(20), uint64(3), false)
	f.Fuzz(func(t *testing.T, program []byte, made, last, acked, evicted uint64, sealed bool) {
		lane := newLaneFile(mustID(w.lane), time.Unix(0, 0))
		for c, v := range []uint64{made, last, acked, evicted} {
			putCounter(lane, counter(c), v%maxSeq)
		}
		if sealed {
			putCounter(lane, cSealed, 1)
		}
		id := mustID(w.seg)
		files := map[string][]byte{w.lane: lane}
		b := appendSegmentHeader(nil, id, 1, time.Unix(0, 0))
		next := func() (v byte) {
			if len(program) > 0 {
				v, program = program[0], program[1:]
			}
			return v
		}
		number := func() uint64 { // small ones mostly, some large
			if v := next(); v < 250 {
				return uint64(v) + 1
			} else {
				return 1 << (v - 210)
			}
		}
		for len(program) > 0 && len(b) < 1<<16 {
			switch next() % 6 {
			case 0:
				b = appendFrame(b, record(number(), "x"), id.salt())
			case 1:
				b = appendFrame(b, &frame{seq: number(), to: number(), reason: Reason(next() % 9)}, id.salt())
			case 2:
				b = append(b, bytes.Repeat([]byte{next()}, 8*int(next()%16))...)
			case 3: // damage in what is there
				b[int(next())*len(b)/256] ^= next()
			case 4:
				b = appendFrame(b, record(number(), strings.Repeat("y", int(next()))), 7) // another file's
			case 5:
				if id != second {
					files[w.seg] = b
					id = second
					b = appendSegmentHeader(nil, id, number(), time.Unix(0, 0))
				}
			}
		}
		files[id.name(segExt)] = b
		coverAll(t, w.disk(files), w.dir, 2*len(b)+2*len(files[w.seg])+10)
	})
}

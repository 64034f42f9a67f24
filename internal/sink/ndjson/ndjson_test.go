package ndjson

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

// records from..to, as a store would give them.
func records(t testing.TB, from, to int64) (rs []store.Record) {
	for n := from; n <= to; n++ {
		p, err := proto.Marshal(&pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{
			Rule: "k/ns/p/r", Message: fmt.Sprint("message ", n, strings.Repeat(" word", int(n%7))), Event: &pb.Event{Kind: "Exec"}}}})
		if err != nil {
			t.Fatal(err)
		}
		rs = append(rs, store.Record{Cursor: n, Node: "n", Epoch: store.Epoch{1}, Seq: uint64(n), To: uint64(n), Kind: store.Alert,
			Payload: p, CRC32C: store.Checksum(p)})
	}
	return rs
}

// reader is a sink.ReadFunc over records.
func reader(rs []store.Record) func(context.Context, []store.Record, int64, int) ([]store.Record, error) {
	return func(_ context.Context, dst []store.Record, after int64, limit int) ([]store.Record, error) {
		for _, r := range rs {
			if r.Cursor > after && limit > 0 {
				dst = append(dst, r)
				limit--
			}
		}
		return dst, nil
	}
}

func mustOpen(t testing.TB, path string) *File {
	t.Helper()
	f, err := Open(path, "c")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func deliver(t testing.TB, f *File, rs []store.Record) {
	t.Helper()
	if err := f.Deliver(t.Context(), rs); err != nil {
		t.Fatal(err)
	}
}

// seqs reads the numbers in a file, and fails on a line that is not one object.
func seqs(t testing.TB, path string) (out []int64) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 0 && b[len(b)-1] != '\n' {
		t.Errorf("%s does not end with a line", path)
	}
	for l := range bytes.Lines(b) {
		var o struct{ ID string }
		if err := json.Unmarshal(l, &o); err != nil {
			t.Errorf("%s: line %.80q: %v", path, l, err)
			continue
		}
		var n int64
		if _, err := fmt.Sscan(o.ID[strings.LastIndexByte(o.ID, '/')+1:], &n); err != nil {
			t.Errorf("id %q: %v", o.ID, err)
		}
		out = append(out, n)
	}
	return out
}

func upTo(n int64) (out []int64) {
	for i := int64(1); i <= n; i++ {
		out = append(out, i)
	}
	return out
}

// However the file and the stored cursor stand to each other after a crash,
// Resume and what follows make the file whole, with each record once.
func TestResume(t *testing.T) {
	all := records(t, 1, 20)
	lines := func(t *testing.T, n int64) []byte {
		p := filepath.Join(storetest.Dir(t), "f")
		deliver(t, mustOpen(t, p), all[:n])
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	tests := []struct {
		name string
		file func(t *testing.T) []byte
		from int64
		want int64   // cursor
		seqs []int64 // in the file in the end; nil is 1..20
	}{
		{"new file", func(*testing.T) []byte { return nil }, 0, 0, nil},
		{"cursor and file agree", func(t *testing.T) []byte { return lines(t, 8) }, 8, 8, nil},
		{"killed between write and cursor", func(t *testing.T) []byte { return lines(t, 12) }, 5, 12, nil},
		{"killed before the first cursor", func(t *testing.T) []byte { return lines(t, 12) }, 0, 12, nil},
		{"the file has all", func(t *testing.T) []byte { return lines(t, 20) }, 5, 20, nil},
		{"torn line", func(t *testing.T) []byte { b := lines(t, 12); return b[:len(b)-5] }, 5, 11, nil},
		{"torn line right behind the cursor", func(t *testing.T) []byte { b := lines(t, 6); return b[:len(b)-1] }, 5, 5, nil},
		{"torn first line", func(t *testing.T) []byte { return lines(t, 1)[:10] }, 0, 0, nil},
		{"the torn line is zeros", func(t *testing.T) []byte { return append(lines(t, 7), make([]byte, 5000)...) }, 5, 7, nil},
		{"a lost page before a whole line", func(t *testing.T) []byte {
			a, b := lines(t, 9), lines(t, 10)
			for i := len(a) - 40; i < len(a)-2; i++ {
				b[i] = 0
			}
			return b
		}, 5, 8, nil},
		{"a lost page with the line's end", func(t *testing.T) []byte {
			a, b := lines(t, 9), lines(t, 12)
			for i := len(a) - 40; i < len(a)+3; i++ {
				b[i] = 0
			}
			return b
		}, 5, 8, nil},
		{"the very first line was lost", func(t *testing.T) []byte {
			b := lines(t, 4)
			for i := range 20 {
				b[i] = 0
			}
			return b
		}, 0, 0, nil},
		{"the line behind the cursor was lost", func(t *testing.T) []byte {
			a, b := lines(t, 5), lines(t, 8)
			for i := range 20 {
				b[len(a)+i] = 0
			}
			return b
		}, 5, 5, nil},
		{"moved away after the cursor", func(*testing.T) []byte { return nil }, 8, 8, []int64{9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}},
		{"moved away, and some came", func(t *testing.T) []byte { a, b := lines(t, 8), lines(t, 11); return b[len(a):] }, 9, 11,
			[]int64{9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}},
		{"moved away before the cursor", func(t *testing.T) []byte { a, b := lines(t, 8), lines(t, 11); return b[len(a):] }, 3, 11,
			[]int64{9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}},
		{"another store's file is kept whole", func(t *testing.T) []byte { return []byte("{\"id\":\"other/n/x/1\"}\n") }, 3, 3,
			append([]int64{1}, upTo(20)[3:]...)},
		{"somebody's note is kept", func(t *testing.T) []byte { return append([]byte("{\"note\":1,\"id\":\"x/77\"}\n"), lines(t, 6)...) }, 4, 6,
			append([]int64{77}, upTo(20)...)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(storetest.Dir(t), "alerts.ndjson")
			if err := os.WriteFile(path, tt.file(t), 0o600); err != nil {
				t.Fatal(err)
			}
			f := mustOpen(t, path)
			at, err := f.Resume(t.Context(), tt.from, reader(all))
			if err != nil {
				t.Fatal(err)
			}
			if at != tt.want {
				t.Errorf("goes on after %d, want %d", at, tt.want)
			}
			deliver(t, f, all[at:])
			want := tt.seqs
			if want == nil {
				want = upTo(20)
			}
			if d := cmp.Diff(want, seqs(t, path)); d != "" {
				t.Errorf("numbers in the file (-want +got):\n%s", d)
			}
		})
	}
}

// Cut at every byte: always each record once.
func TestResumeEveryCut(t *testing.T) {
	all := records(t, 1, 6)
	dir := storetest.Dir(t)
	path := filepath.Join(dir, "whole")
	deliver(t, mustOpen(t, path), all)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for from := int64(0); from <= 4; from += 2 {
		// Up to the cursor lines are synced: cuts come behind them.
		synced := 0
		for range from {
			synced += bytes.IndexByte(whole[synced:], '\n') + 1
		}
		for n := synced; n <= len(whole); n++ {
			path := filepath.Join(dir, "cut")
			if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := Open(path, "c")
			if err != nil {
				t.Fatal(err)
			}
			at, err := f.Resume(t.Context(), from, reader(all))
			if err != nil {
				t.Fatal(err)
			}
			deliver(t, f, all[at:])
			f.Close()
			if got, _ := os.ReadFile(path); !bytes.Equal(got, whole) {
				t.Fatalf("cut at %d with the cursor at %d: went on after %d, and the file is\n%s", n, from, at, got)
			}
		}
	}
}

func TestMovedAway(t *testing.T) {
	dir := storetest.Dir(t)
	path := filepath.Join(dir, "alerts.ndjson")
	f := mustOpen(t, path)
	all := records(t, 1, 9)
	deliver(t, f, all[:3])
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	deliver(t, f, all[3:5])
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	deliver(t, f, all[5:7])
	if err := os.Truncate(path, 0); err != nil { // copied, then emptied
		t.Fatal(err)
	}
	deliver(t, f, all[7:])
	if d := cmp.Diff([]int64{1, 2, 3}, seqs(t, path+".1")); d != "" {
		t.Errorf("moved file (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]int64{8, 9}, seqs(t, path)); d != "" {
		t.Errorf("file (-want +got):\n%s", d)
	}
}

func TestFileDescriptors(t *testing.T) {
	count := func() int {
		es, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(es)
	}
	path := filepath.Join(storetest.Dir(t), "f")
	f := mustOpen(t, path)
	before := count()
	for _, r := range records(t, 1, 20) {
		os.Remove(path)
		deliver(t, f, []store.Record{r})
	}
	if after := count(); after != before {
		t.Errorf("%d open files after 20 moves, %d before", after, before)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := storetest.Dir(t)
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	used := filepath.Join(dir, "used")
	mustOpen(t, used)
	for path, want := range map[string]string{
		dir:                             "is a directory",
		fifo:                            "not a regular file",
		"/dev/null":                     "not a regular file",
		filepath.Join(dir, "no", "dir"): "no such file",
		used:                            "another process writes to it",
	} {
		if f, err := Open(path, "c"); err == nil || !strings.Contains(err.Error(), want) {
			if f != nil {
				f.Close()
			}
			t.Errorf("Open(%s): %v, want %q", path, err, want)
		}
	}
}

// A full disk leaves no piece of a line, and the same records go through when
// there is room.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := storetest.Dir(t)
	testenv.SkipOn(t, unix.Mount("test", dir, "tmpfs", 0, "size=256k"), unix.EPERM)
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "alerts.ndjson")
	f := mustOpen(t, path)
	var done int64
	all := records(t, 1, 4000)
	var err error
	for err == nil && done+100 <= int64(len(all)) {
		if err = f.Deliver(t.Context(), all[done:done+100]); err == nil {
			done += 100
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("after %d records: %v, want no space", done, err)
	}
	for range 3 {
		if err := f.Deliver(t.Context(), all[done:done+100]); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("again: %v, want no space", err)
		}
		if got := seqs(t, path); int64(len(got)) != done {
			t.Fatalf("%d lines while full, want %d", len(got), done)
		}
	}
	if err := unix.Mount("test", dir, "tmpfs", unix.MS_REMOUNT, "size=4m"); err != nil {
		t.Fatal(err)
	}
	deliver(t, f, all[done:done+200])
	if d := cmp.Diff(upTo(done+200), seqs(t, path)); d != "" {
		t.Errorf("numbers (-want +got):\n%s", d)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// FuzzResume: whatever stands in the file, nothing of the store is left out.
func FuzzResume(f *testing.F) {
	all := records(f, 1, 5)
	path := filepath.Join(storetest.Dir(f), "seed")
	s, err := Open(path, "c")
	if err != nil {
		f.Fatal(err)
	}
	deliver(f, s, all)
	s.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole, int64(0))
	f.Add(whole[:len(whole)/2], int64(1))
	f.Add([]byte("{}\n{\"id\":1}\n\n\x00\n"), int64(3))
	f.Add([]byte{}, int64(5))
	f.Add(bytes.ReplaceAll(whole, []byte("message"), []byte("mess\nage")), int64(2))
	f.Fuzz(func(t *testing.T, b []byte, from int64) {
		if from < 0 || from > int64(len(all)) {
			return
		}
		path := filepath.Join(storetest.Dir(t), "f")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		n, err := Open(path, "c")
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		at, err := n.Resume(t.Context(), from, reader(all))
		if err != nil {
			t.Fatal(err)
		}
		if at < from || at > int64(len(all)) {
			t.Fatalf("goes on after %d, the cursor was %d", at, from)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if at > from && !bytes.Contains(got, []byte(all[at-1].ID("c"))) {
			t.Fatalf("goes on after %d, which the file does not have", at)
		}
		if len(got) > 0 && got[len(got)-1] != '\n' {
			t.Fatal("does not end with a line")
		}
		deliver(t, n, all[at:])
	})
}

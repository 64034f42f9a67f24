package replay

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"testing"

	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/recording"
)

const fileHead, blockHead = 16, 12 // bytes, docs/recording-format.md

// blocksOf are the unpacked blocks of a recording.
func blocksOf(t testing.TB, data []byte) (blocks [][]byte) {
	t.Helper()
	for data = data[fileHead:]; len(data) > 0; {
		size := binary.LittleEndian.Uint32(data)
		raw, err := io.ReadAll(flate.NewReader(bytes.NewReader(data[blockHead : blockHead+size])))
		if err != nil {
			t.Fatal(err)
		}
		blocks = append(blocks, raw)
		data = data[blockHead+size:]
	}
	return blocks
}

// appendBlock packs a block, with the checksum of whatever is in it.
func appendBlock(t testing.TB, dst, raw []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := flate.NewWriter(&b, flate.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	dst = binary.LittleEndian.AppendUint32(dst, uint32(b.Len()))
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(raw)))
	dst = binary.LittleEndian.AppendUint32(dst, crc32.Checksum(b.Bytes(), crc32.MakeTable(crc32.Castagnoli)))
	return append(dst, b.Bytes()...)
}

// FuzzReplay: a checksum keeps accidents away and no author. Whatever the
// entries of a recording say, it goes the whole way to JSON, twice the same, or
// ends with an error that says where.
func FuzzReplay(f *testing.F) {
	file := write(f, 3)
	blocks := blocksOf(f, file)
	for _, raw := range blocks[1:] {
		f.Add(raw)
		f.Add(raw[:len(raw)/2])
	}
	head := appendBlock(f, bytes.Clone(file[:fileHead]), blocks[0])
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) == 0 || len(raw) > 1<<20 {
			return
		}
		data := appendBlock(t, bytes.Clone(head), raw)
		first, err := tell(t, data)
		var damage *recording.DamageError
		if err != nil && !errors.Is(err, recording.ErrCut) && !errors.As(err, &damage) {
			t.Fatalf("error %v", err)
		}
		if again, _ := tell(t, data); !bytes.Equal(first, again) {
			t.Fatalf("a second replay differs:\n%s\n%s", first, again)
		}
	})
}

// tell is what a replay prints.
func tell(t *testing.T, data []byte) (out []byte, err error) {
	r, err := Open(bytes.NewReader(data), nil)
	if err != nil {
		t.Fatal(err)
	}
	build := alert.Builder{Wall: r.Wall}
	err = r.Run(func(ev *event.Event) {
		if _, ok := event.KindByName(ev.Kind.String()); !ok || ev.Process == nil || ev.Process.PID <= 0 {
			t.Fatalf("event of kind %v about %+v", ev.Kind, ev.Process)
		}
		at := len(out)
		if out = present.AppendEventJSON(out, build.Event(ev, alert.MaxAncestors)); !json.Valid(out[at:]) {
			t.Fatalf("no JSON: %s", out[at:])
		}
	})
	return out, err
}

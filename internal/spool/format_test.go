package spool

import (
	"bytes"
	"errors"
	"hash/crc32"
	"testing"
	"time"
)

func crcOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

func record(seq uint64, p string) *frame {
	return &frame{seq: seq, payload: []byte(p), crc: crcOf([]byte(p))}
}

func TestNames(t *testing.T) {
	id := fileID{0x1f, Epoch{1, 2, 3}}
	if got := id.name(segExt); got != "000000000000001f-01020300000000000000000000000000.seg" {
		t.Errorf("name %q", got)
	}
	if got, ext, ok := parseName(id.name(laneExt)); !ok || got != id || ext != laneExt {
		t.Errorf("parse: %v %q %v", got, ext, ok)
	}
	for _, bad := range []string{
		"", "lock", "x.seg", "1f-01020300000000000000000000000000.seg",
		"000000000000001f-010203000000000000000000000000.seg",
		"000000000000001f-0102030000000000000000000000000g.seg",
		"000000000000001F-01020300000000000000000000000000.seg",
		"000000000000001f-01020300000000000000000000000000.seg.bak",
		"ffffffffffffffff-01020300000000000000000000000000.seg",
	} {
		if _, _, ok := parseName(bad); ok {
			t.Errorf("parseName accepts %q", bad)
		}
	}
}

func TestSegmentHeader(t *testing.T) {
	id := fileID{7, newEpoch()}
	now := time.Unix(0, 1234567890123456789)
	h := appendSegmentHeader(nil, id, 42, now)
	first, created, err := decodeSegmentHeader(h, id)
	if err != nil || first != 42 || !created.Equal(now) {
		t.Fatalf("%d %v %v", first, created, err)
	}
	if _, _, err := decodeSegmentHeader(h, fileID{8, id.epoch}); err == nil {
		t.Error("accepts the header of another segment")
	}
	for i := range 8 * len(h) {
		h[i/8] ^= 1 << (i % 8)
		if _, _, err := decodeSegmentHeader(h, id); err == nil || errors.Is(err, errVersion) {
			t.Errorf("bit %d flipped: %v, want a damaged header", i, err)
		}
		h[i/8] ^= 1 << (i % 8)
	}
}

func TestCounters(t *testing.T) {
	b := newLaneFile(fileID{1, newEpoch()}, time.Now())
	for c := range numCounters {
		putCounter(b, c, 1000+uint64(c))
	}
	for c := range numCounters {
		if v, ok := loadCounter(b, c); !ok || v != 1000+uint64(c) {
			t.Errorf("counter %d: %d %v", c, v, ok)
		}
		for bit := range 64 {
			b[laneCounters+8*int(c)+bit/8] ^= 1 << (bit % 8)
			if v, ok := loadCounter(b, c); ok {
				t.Errorf("counter %d with bit %d flipped is %d", c, bit, v)
			}
			b[laneCounters+8*int(c)+bit/8] ^= 1 << (bit % 8)
		}
	}
	if got, want := counterCheck(cAcked, 0x0605040302), uint64(crcOf([]byte{2, 2, 3, 4, 5, 6, 0})&0xffff); got != want {
		t.Errorf("check %04x, want %04x", got, want)
	}
	clear(b[laneCounters:])
	if _, ok := loadCounter(b, cMade); ok {
		t.Error("a zeroed counter passes for 0")
	}
}

// What a process puts into a record does not pass for a frame: the salt is
// not known to it.
func TestForgedFrame(t *testing.T) {
	id := fileID{7, newEpoch()}
	forged := appendFrame(nil, record(2, "forged"), fileID{7, Epoch{}}.salt())
	b := appendFrame(make([]byte, segHeaderLen), record(1, string(forged)), id.salt())
	b[segHeaderLen] ^= 1 // damage: the reader now looks inside the record
	c := newCursor(bytes.NewReader(b), id.salt(), int64(len(b)))
	if fr, _, dmg, err := c.peek(); err == nil || dmg == nil {
		t.Errorf("found %+v, damage %v, %v", fr, dmg, err)
	}
}

func FuzzDecodeFrame(f *testing.F) {
	f.Add(appendFrame(nil, record(1, "alert"), 9), uint32(9))
	f.Add(appendFrame(nil, record(1<<40, ""), 9), uint32(9))
	f.Add(appendFrame(nil, &frame{seq: 5, to: 9, reason: Disk, detail: []byte("no space")}, 9), uint32(9))
	f.Add(make([]byte, 24), uint32(0))
	f.Fuzz(func(t *testing.T, b []byte, salt uint32) {
		fr, size, err := decodeFrame(b, salt)
		if err != nil {
			if !isDamage(err) {
				t.Fatalf("error %v is none of the three", err)
			}
			if errors.Is(err, errFramePayload) && (size < frameHeader || size > len(b) || size%8 != 0) {
				t.Fatalf("damaged payload with size %d of %d", size, len(b))
			}
			return
		}
		if size > len(b) || fr.seq == 0 || fr.to != 0 && fr.to < fr.seq {
			t.Fatalf("frame %+v, size %d of %d", fr, size, len(b))
		}
		again := appendFrame(nil, &fr, salt)
		// Padding is not checked: it holds nothing.
		n := frameHeader + len(fr.payload)
		if fr.to != 0 {
			n = frameHeader + lossFixed + len(fr.detail)
		}
		if len(again) != size || !bytes.Equal(again[:n], b[:n]) {
			t.Fatalf("encoded again:\n%x\nwas\n%x", again, b[:size])
		}
	})
}

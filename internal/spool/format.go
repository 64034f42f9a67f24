package spool

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"
)

// Sizes of the format; docs/spool-format.md has the byte rulers.
const (
	formatVersion = 1
	segHeaderLen  = 64
	frameHeader   = 24
	lossFixed     = 9 // to, reason
	maxDetail     = 200
	laneLen       = 4096
	laneHeaderLen = 56
	laneCounters  = 64 // offset of the first counter
	maxPayload    = 16 << 20
	maxSeq        = 1<<48 - 1

	segMagic  = "PRCNSPOL"
	laneMagic = "PRCNLANE"
	segExt    = ".seg"
	laneExt   = ".lane"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// An Epoch names one run of the agent.
type Epoch [16]byte

// String is the epoch in hexadecimal.
func (e Epoch) String() string { return hex.EncodeToString(e[:]) }

func newEpoch() (e Epoch) {
	rand.Read(e[:]) // never fails (crypto/rand)
	return e
}

// A Reason says why a record is gone. The numbers are those of LossReason in
// ingest.proto, and on disk.
type Reason uint8

// Reasons.
const (
	SpoolFull Reason = 1 + iota // the oldest records gave way to the bound
	Corrupt                     // the record failed its check, or its file is gone
	Disk                        // the disk refused it and it did not fit in memory
	Crash                       // the agent ended before it was on disk
	QueueFull                   // too many records waited for the disk
	TooLarge                    // larger than MaxRecord

	// NumReasons is the length of an array indexed by Reason.
	NumReasons
)

var reasonNames = [NumReasons]string{"", "spool-full", "corrupt", "disk", "crash", "queue-full", "too-large"}

// String is the reason's name in logs, metrics and dumps.
func (r Reason) String() string {
	if r == 0 || r >= NumReasons {
		return fmt.Sprintf("reason-%d", uint8(r))
	}
	return reasonNames[r]
}

// A Loss says that the records From to To are gone for good.
type Loss struct {
	From, To uint64
	Reason   Reason
	Detail   string // for people; at most 200 bytes
}

// A fileID is what a file's name says.
type fileID struct {
	number uint64
	epoch  Epoch
}

func (id fileID) name(ext string) string {
	return fmt.Sprintf("%016x-%s%s", id.number, id.epoch, ext)
}

// parseName is name's inverse; ok is false for any other name.
func parseName(name string) (id fileID, ext string, ok bool) {
	num, rest, found := strings.Cut(name, "-")
	if !found || len(num) != 16 || len(rest) < 32 {
		return id, "", false
	}
	n, err := strconv.ParseUint(num, 16, 63) // one more always fits
	if err != nil {
		return id, "", false
	}
	id.number = n
	if _, err := hex.Decode(id.epoch[:], []byte(rest[:32])); err != nil {
		return id, "", false
	}
	ext = rest[32:]
	if ext != segExt && ext != laneExt || id.name(ext) != name {
		return id, "", false
	}
	return id, ext, true
}

// salt starts the check of each frame header of the file.
func (id fileID) salt() uint32 {
	var b [24]byte
	copy(b[:], id.epoch[:])
	binary.LittleEndian.PutUint64(b[16:], id.number)
	return crc32.Checksum(b[:], castagnoli)
}

// errVersion reports a file that a newer agent wrote.
var errVersion = errors.New("unknown format version")

func appendSegmentHeader(b []byte, id fileID, first uint64, now time.Time) []byte {
	h := make([]byte, segHeaderLen)
	copy(h, segMagic)
	binary.LittleEndian.PutUint32(h[8:], formatVersion)
	copy(h[16:], id.epoch[:])
	binary.LittleEndian.PutUint64(h[32:], id.number)
	binary.LittleEndian.PutUint64(h[40:], first)
	binary.LittleEndian.PutUint64(h[48:], uint64(now.UnixNano()))
	binary.LittleEndian.PutUint32(h[60:], crc32.Checksum(h[:60], castagnoli))
	return append(b, h...)
}

// decodeSegmentHeader returns errVersion for the undamaged header of another
// version, and another error for a header that cannot be used.
func decodeSegmentHeader(h []byte, id fileID) (first uint64, created time.Time, err error) {
	switch {
	case len(h) < segHeaderLen:
		return 0, created, fmt.Errorf("header of %d bytes, want %d", len(h), segHeaderLen)
	case string(h[:8]) != segMagic:
		return 0, created, errors.New("no segment magic")
	case crc32.Checksum(h[:60], castagnoli) != binary.LittleEndian.Uint32(h[60:]):
		return 0, created, errors.New("header fails its check")
	}
	if v := binary.LittleEndian.Uint32(h[8:]); v != formatVersion {
		return 0, created, fmt.Errorf("%w %d", errVersion, v)
	}
	if !bytes.Equal(h[16:32], id.epoch[:]) || binary.LittleEndian.Uint64(h[32:]) != id.number {
		return 0, created, errors.New("header is of another segment than the name")
	}
	first = binary.LittleEndian.Uint64(h[40:])
	if first == 0 || first > maxSeq {
		return 0, created, fmt.Errorf("first sequence number %d out of range", first)
	}
	return first, time.Unix(0, int64(binary.LittleEndian.Uint64(h[48:]))), nil
}

// A frame is one entry of a segment: a record, or a loss when to is not 0.
type frame struct {
	seq     uint64
	to      uint64 // loss: the last number lost; 0 for a record
	reason  Reason
	detail  []byte
	payload []byte // record
	crc     uint32 // of payload
}

// last is the highest sequence number the frame settles.
func (fr *frame) last() uint64 { return max(fr.seq, fr.to) }

func padded(n int) int { return (n + 7) &^ 7 }

// frameLen is the length on disk of a frame with n bytes of payload.
func frameLen(n int) int { return padded(frameHeader + n) }

// appendFrame appends fr as it stands in a file with this salt. A record's crc
// must be set.
func appendFrame(b []byte, fr *frame, salt uint32) []byte {
	var h [frameHeader]byte
	start := len(b)
	b = append(b, h[:]...)
	if fr.to == 0 {
		h[0] = 1
		b = append(b, fr.payload...)
		binary.LittleEndian.PutUint32(h[16:], fr.crc)
	} else {
		h[0] = 2
		b = binary.LittleEndian.AppendUint64(b, fr.to)
		b = append(b, byte(fr.reason))
		b = append(b, fr.detail[:min(len(fr.detail), maxDetail)]...)
		binary.LittleEndian.PutUint32(h[16:], crc32.Checksum(b[start+frameHeader:], castagnoli))
	}
	n := len(b) - start - frameHeader
	binary.LittleEndian.PutUint32(h[4:], uint32(n))
	binary.LittleEndian.PutUint64(h[8:], fr.seq)
	binary.LittleEndian.PutUint32(h[20:], crc32.Update(salt, castagnoli, h[:20]))
	copy(b[start:], h[:])
	return append(b, make([]byte, frameLen(n)-frameHeader-n)...)
}

// Why bytes are not a good frame.
var (
	errFrameHeader  = errors.New("frame header fails its check")
	errFramePayload = errors.New("payload fails its check")
	errFrameShort   = errors.New("frame ends behind its segment")
)

// decodeHeader checks a frame's header and returns the payload's length.
func decodeHeader(h []byte, salt uint32) (kind byte, n int, seq uint64, crc uint32, err error) {
	if len(h) < frameHeader {
		return 0, 0, 0, 0, errFrameShort
	}
	if crc32.Update(salt, castagnoli, h[:20]) != binary.LittleEndian.Uint32(h[20:]) {
		return 0, 0, 0, 0, errFrameHeader
	}
	length := binary.LittleEndian.Uint32(h[4:])
	seq = binary.LittleEndian.Uint64(h[8:])
	if h[1]|h[2]|h[3] != 0 || h[0] != 1 && h[0] != 2 || length > maxPayload || seq == 0 || seq > maxSeq {
		return 0, 0, 0, 0, errFrameHeader
	}
	return h[0], int(length), seq, binary.LittleEndian.Uint32(h[16:]), nil
}

// decodeFrame reads the frame at the start of b. size is its length on disk,
// also when only the payload is damaged (errFramePayload). fr refers to b.
func decodeFrame(b []byte, salt uint32) (fr frame, size int, err error) {
	kind, n, seq, crc, err := decodeHeader(b, salt)
	if err != nil {
		return frame{}, 0, err
	}
	size = frameLen(n)
	if len(b) < size {
		return frame{}, 0, errFrameShort
	}
	p := b[frameHeader : frameHeader+n]
	if crc32.Checksum(p, castagnoli) != crc {
		return frame{seq: seq}, size, errFramePayload
	}
	if kind == 1 {
		return frame{seq: seq, payload: p, crc: crc}, size, nil
	}
	if n < lossFixed || n > lossFixed+maxDetail {
		return frame{seq: seq}, size, errFramePayload
	}
	fr = frame{seq: seq, to: binary.LittleEndian.Uint64(p), reason: Reason(p[8]), detail: p[lossFixed:]}
	if fr.to < seq || fr.to > maxSeq || fr.reason == 0 || fr.reason >= NumReasons {
		return frame{seq: seq}, size, errFramePayload
	}
	return fr, size, nil
}

// A counter is one of the words in a lane.
type counter int

const (
	cMade counter = iota
	cLast
	cAcked
	cEvicted
	cSealed
	numCounters
)

// counterCheck is the low half of the CRC32C of c and v. crc32.Checksum would
// move its argument to the heap, and this runs in Append.
func counterCheck(c counter, v uint64) uint64 {
	crc := ^uint32(0)
	crc = castagnoli[byte(crc)^byte(c)] ^ crc>>8
	for range 6 {
		crc = castagnoli[byte(crc)^byte(v)] ^ crc>>8
		v >>= 8
	}
	return uint64(^crc) & 0xffff
}

// putCounter stores v as one 64-bit word, so that a kill never leaves half of it.
func putCounter(lane []byte, c counter, v uint64) {
	binary.LittleEndian.PutUint64(lane[laneCounters+8*int(c):], v<<16|counterCheck(c, v))
}

func loadCounter(lane []byte, c counter) (uint64, bool) {
	w := binary.LittleEndian.Uint64(lane[laneCounters+8*int(c):])
	return w >> 16, counterCheck(c, w>>16) == w&0xffff
}

func newLaneFile(id fileID, now time.Time) []byte {
	b := make([]byte, laneLen)
	copy(b, laneMagic)
	binary.LittleEndian.PutUint32(b[8:], formatVersion)
	copy(b[16:], id.epoch[:])
	binary.LittleEndian.PutUint64(b[32:], id.number)
	binary.LittleEndian.PutUint64(b[40:], uint64(now.UnixNano()))
	binary.LittleEndian.PutUint32(b[52:], crc32.Checksum(b[:52], castagnoli))
	for c := range numCounters {
		putCounter(b, c, 0)
	}
	return b
}

func checkLaneFile(b []byte, id fileID) error {
	switch {
	case len(b) < laneLen:
		return fmt.Errorf("lane of %d bytes, want %d", len(b), laneLen)
	case string(b[:8]) != laneMagic:
		return errors.New("no lane magic")
	case crc32.Checksum(b[:52], castagnoli) != binary.LittleEndian.Uint32(b[52:]):
		return errors.New("lane header fails its check")
	case binary.LittleEndian.Uint32(b[8:]) != formatVersion:
		return fmt.Errorf("%w %d", errVersion, binary.LittleEndian.Uint32(b[8:]))
	case !bytes.Equal(b[16:32], id.epoch[:]) || binary.LittleEndian.Uint64(b[32:]) != id.number:
		return errors.New("lane header is of another lane than the name")
	}
	return nil
}

package recording

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/procession-dev/procession/internal/event"
)

const (
	magic     = "PROCESSION-REC\x00" // followed by the version
	blockHead = 12                   // compressed length, raw length, CRC32C of the compressed bytes
	blockSize = 256 << 10            // raw bytes after which a block is written
	maxBlock  = 4 << 20              // raw bytes a reader accepts
)

// Types of an entry, the first byte of its encoding.
const (
	typeHeader byte = iota + 1
	typeProcess
	typeRecord
	typeLoss
	typeEnd // the recording was ended in order, not cut off
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrCut reports that a recording ends in the middle: its writer was stopped
// without Close. Everything before the cut was read.
var ErrCut = errors.New("the recording is cut off: its writer was killed, or it was not copied whole")

// A DamageError says where a recording is damaged.
type DamageError struct {
	Offset int64 // of the block in the file
	Why    string
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("recording: block at byte %d: %s", e.Offset, e.Why)
}

// A Writer writes a recording. It is for one goroutine.
type Writer struct {
	w   io.Writer
	raw encoder
	out bytes.Buffer
	z   *flate.Writer
	err error

	// Entries and Bytes count what was written, Bytes after compression.
	Entries, Bytes uint64
}

// NewWriter starts a recording on w.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	z, err := flate.NewWriter(io.Discard, flate.BestSpeed)
	if err != nil {
		return nil, err
	}
	out := &Writer{w: w, z: z}
	out.write(append([]byte(magic), Version))
	out.raw.b = append(out.raw.b, typeHeader)
	h.fields(&out.raw)
	return out, out.Flush()
}

// Process adds a process that ran when the recording started.
func (w *Writer) Process(p *Baseline) error {
	w.raw.b = append(w.raw.b, typeProcess)
	p.fields(&w.raw)
	return w.added()
}

// Record adds what the kernel said.
func (w *Writer) Record(r *event.Record) error {
	w.raw.b = append(w.raw.b, typeRecord)
	record(&w.raw, r)
	return w.added()
}

// Loss adds that events were lost.
func (w *Writer) Loss(l Loss) error {
	w.raw.b = append(w.raw.b, typeLoss)
	l.fields(&w.raw)
	return w.added()
}

func (w *Writer) added() error {
	w.Entries++
	if len(w.raw.b) >= blockSize {
		return w.Flush()
	}
	return w.err
}

// Flush writes what was added as a block. Small blocks compress badly: flush
// when a second has passed, not after each entry.
func (w *Writer) Flush() error {
	if len(w.raw.b) == 0 || w.err != nil {
		return w.err
	}
	w.out.Reset()
	w.out.Write(make([]byte, blockHead))
	w.z.Reset(&w.out)
	if _, err := w.z.Write(w.raw.b); err != nil {
		return err
	}
	if err := w.z.Close(); err != nil {
		return err
	}
	b := w.out.Bytes()
	binary.LittleEndian.PutUint32(b[0:], uint32(len(b)-blockHead))
	binary.LittleEndian.PutUint32(b[4:], uint32(len(w.raw.b)))
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[blockHead:], castagnoli))
	w.raw.b = w.raw.b[:0]
	w.write(b)
	return w.err
}

// Close ends the recording. It does not close the underlying writer.
func (w *Writer) Close() error {
	w.raw.b = append(w.raw.b, typeEnd)
	return w.Flush()
}

func (w *Writer) write(b []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(b)
	w.Bytes += uint64(n)
	if err != nil {
		w.err = fmt.Errorf("write recording: %w", err)
	}
}

// A Reader reads a recording.
type Reader struct {
	Header Header

	r     io.Reader
	off   int64 // of the next block
	block int64 // offset of the block in dec
	comp  []byte
	raw   []byte
	dec   decoder
	z     io.ReadCloser
	ended bool

	process Baseline
	record  event.Record
	loss    Loss
}

// NewReader reads the header of a recording.
func NewReader(r io.Reader) (*Reader, error) {
	head := make([]byte, len(magic)+1)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("this is no recording: shorter than its header")
	}
	if string(head[:len(magic)]) != magic {
		return nil, fmt.Errorf("this is no recording: it begins with %.16q", head)
	}
	if v := head[len(magic)]; v != Version {
		return nil, fmt.Errorf("the recording has format version %d, this program reads version %d", v, Version)
	}
	in := &Reader{r: r, off: int64(len(head)), z: flate.NewReader(nil)}
	if err := in.nextBlock(); err != nil {
		return nil, err
	}
	if len(in.dec.b) == 0 || in.dec.b[0] != typeHeader {
		return nil, &DamageError{in.block, "the first entry is no header"}
	}
	in.dec.b = in.dec.b[1:]
	in.Header.fields(&in.dec)
	if in.dec.err != nil {
		return nil, &DamageError{in.block, "header: " + in.dec.err.Error()}
	}
	return in, nil
}

// Next returns the next entry, valid until the call after it. At the end of a
// whole recording it returns io.EOF, at that of a cut one ErrCut.
func (r *Reader) Next() (Entry, error) {
	for len(r.dec.b) == 0 {
		if r.ended {
			return Entry{}, io.EOF
		}
		if err := r.nextBlock(); err != nil {
			return Entry{}, err
		}
	}
	kind := r.dec.b[0]
	r.dec.b = r.dec.b[1:]
	var e Entry
	switch kind {
	case typeProcess:
		r.process.fields(&r.dec)
		e.Process = &r.process
	case typeRecord:
		record(&r.dec, &r.record)
		e.Record = &r.record
	case typeLoss:
		r.loss.fields(&r.dec)
		e.Loss = &r.loss
	case typeEnd:
		if len(r.dec.b) != 0 {
			return Entry{}, &DamageError{r.block, fmt.Sprintf("%d bytes follow the end", len(r.dec.b))}
		}
		r.ended = true
		return Entry{}, io.EOF
	default:
		return Entry{}, &DamageError{r.block, fmt.Sprintf("unknown type of entry %d", kind)}
	}
	if r.dec.err != nil {
		return Entry{}, &DamageError{r.block, r.dec.err.Error()}
	}
	return e, nil
}

// nextBlock reads, checks and unpacks a block. Every length is checked before
// memory is taken for it.
func (r *Reader) nextBlock() error {
	r.block = r.off
	var head [blockHead]byte
	switch _, err := io.ReadFull(r.r, head[:]); {
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return ErrCut
	case err != nil:
		return fmt.Errorf("read recording: %w", err)
	}
	size, raw := binary.LittleEndian.Uint32(head[0:]), binary.LittleEndian.Uint32(head[4:])
	if size == 0 || size > maxBlock+maxBlock/8 || raw == 0 || raw > maxBlock {
		return &DamageError{r.block, fmt.Sprintf("lengths %d and %d are impossible", size, raw)}
	}
	r.comp = grow(r.comp, int(size))
	switch _, err := io.ReadFull(r.r, r.comp); {
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return ErrCut
	case err != nil:
		return fmt.Errorf("read recording: %w", err)
	}
	if got, want := crc32.Checksum(r.comp, castagnoli), binary.LittleEndian.Uint32(head[8:]); got != want {
		return &DamageError{r.block, fmt.Sprintf("checksum %08x, want %08x", got, want)}
	}
	if err := r.z.(flate.Resetter).Reset(bytes.NewReader(r.comp), nil); err != nil {
		return err
	}
	r.raw = grow(r.raw, int(raw))
	if _, err := io.ReadFull(r.z, r.raw); err != nil {
		return &DamageError{r.block, "unpack: " + err.Error()}
	}
	r.off += blockHead + int64(size)
	r.dec = decoder{b: r.raw}
	return nil
}

func grow(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}

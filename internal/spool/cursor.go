package spool

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// A damage is a stretch of a segment that is no good frame.
type damage struct {
	off int64 // where it begins
	len int64
	why error
}

func (d *damage) String() string { return fmt.Sprintf("byte %d: %v", d.off, d.why) }

// A cursor walks the frames of one segment front to back, over damage.
type cursor struct {
	f    io.ReaderAt
	salt uint32
	off  int64 // of the next frame
	end  int64 // bytes behind it are not looked at
	seen uint64

	buf  []byte // bytes [base, base+len(buf)) of the file
	base int64
	max  int // how much to read at once
}

func newCursor(f io.ReaderAt, salt uint32, end int64) *cursor {
	return &cursor{f: f, salt: salt, off: segHeaderLen, end: end, max: 64 << 10}
}

// at returns n bytes of the file from off on, fewer at the end. They are valid
// until the next call.
func (c *cursor) at(off int64, n int) ([]byte, error) {
	n = int(min(int64(n), max(c.end-off, 0)))
	if i := off - c.base; i >= 0 && i+int64(n) <= int64(len(c.buf)) {
		return c.buf[i : i+int64(n)], nil
	}
	want := int(min(int64(max(n, c.max)), c.end-off))
	if cap(c.buf) < want {
		c.buf = make([]byte, want)
	}
	c.base, c.buf = off, c.buf[:want]
	got, err := readOver(c.f, c.buf, off)
	c.buf = c.buf[:got]
	if err != nil {
		c.buf = c.buf[:0]
		return nil, err
	}
	return c.buf[:min(n, got)], nil
}

// readOver reads like ReadAt, but a block that the disk cannot read (EIO)
// becomes zeros, which no check accepts: damage, like any other.
func readOver(f io.ReaderAt, b []byte, off int64) (int, error) {
	const block = 4096
	n, err := f.ReadAt(b, off)
	if err == nil || errors.Is(err, io.EOF) {
		return n, nil
	}
	if !errors.Is(err, unix.EIO) {
		return n, err
	}
	for n = 0; n < len(b); {
		step := int(min(block-(off+int64(n))%block, int64(len(b)-n)))
		got, err := f.ReadAt(b[n:n+step], off+int64(n))
		switch {
		case errors.Is(err, io.EOF):
			return n + got, nil
		case errors.Is(err, unix.EIO):
			clear(b[n : n+step])
		case err != nil:
			return n, err
		}
		n += step
	}
	return n, nil
}

// frame decodes what stands at off.
func (c *cursor) frame(off int64) (fr frame, size int, err error) {
	h, err := c.at(off, frameHeader)
	if err != nil {
		return fr, 0, err
	}
	_, n, _, _, err := decodeHeader(h, c.salt)
	if err != nil {
		return fr, 0, err
	}
	if int64(frameLen(n)) > c.end-off { // before allocating for it
		return fr, 0, errFrameShort
	}
	b, err := c.at(off, frameLen(n))
	if err != nil {
		return fr, 0, err
	}
	return decodeFrame(b, c.salt)
}

func isDamage(err error) bool {
	return errors.Is(err, errFrameHeader) || errors.Is(err, errFramePayload) || errors.Is(err, errFrameShort)
}

// peek returns the next good frame and where it ends, without moving there;
// fr is valid until the next call. Damage before it is returned as well, and
// the cursor moves over it. At the end of the segment the error is io.EOF;
// then the damage, if any, reaches up to the end. Other errors are those of
// reading the file.
func (c *cursor) peek() (fr frame, next int64, dmg *damage, err error) {
	for off := c.off; off < c.end; {
		fr, size, err := c.frame(off)
		switch {
		case err == nil && fr.seq > c.seen:
			if dmg != nil {
				dmg.len, c.off = off-dmg.off, off
			}
			return fr, off + int64(size), dmg, nil
		case err == nil: // a number that does not rise: not written by us like this
			err = fmt.Errorf("sequence number %d after %d", fr.seq, c.seen)
		case !isDamage(err):
			return fr, 0, nil, err
		}
		if dmg == nil {
			dmg = &damage{off: off, why: err}
		}
		off += 8
		if errors.Is(err, errFramePayload) {
			off += int64(size) - 8 // the header is good, so is the length
		}
	}
	if dmg != nil {
		dmg.len = c.end - dmg.off
	}
	return fr, 0, dmg, io.EOF
}

// advance moves behind the frame that peek returned.
func (c *cursor) advance(fr *frame, next int64) { c.off, c.seen = next, fr.last() }

package spool

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// A Record is one record as it was appended.
type Record struct {
	Seq     uint64
	Payload []byte // belongs to the Chunk, valid until its next use
	CRC     uint32 // CRC32C (Castagnoli) of Payload, as spooled
	Durable bool   // on this node's disk; false while the disk is slow or refuses
}

// A Chunk is consecutive records and losses of one epoch: together they cover
// First to Last without a hole, each number once.
type Chunk struct {
	Epoch       Epoch
	First, Last uint64 // Last < First: empty
	Records     []Record
	Losses      []Loss

	buf   []byte
	bytes int
}

func (c *Chunk) reset(e Epoch, first uint64) {
	*c = Chunk{Epoch: e, First: first, Last: first - 1, Records: c.Records[:0], Losses: c.Losses[:0], buf: c.buf[:0]}
}

// Bytes is the size of the chunk as Read's maxBytes counts it.
func (c *Chunk) Bytes() int { return c.bytes }

// costs of an entry beside its payload, about what it takes on the wire.
const entryCost = 32

func (c *Chunk) full(n, maxRecords, maxBytes int) bool {
	have := len(c.Records) + len(c.Losses)
	return have > 0 && (have >= maxRecords || c.bytes+entryCost+n > maxBytes)
}

func (c *Chunk) addRecord(fr *frame, durable bool) {
	at := len(c.buf)
	c.buf = append(c.buf, fr.payload...)
	c.Records = append(c.Records, Record{fr.seq, c.buf[at:len(c.buf):len(c.buf)], fr.crc, durable})
	c.Last = fr.seq
	c.bytes += entryCost + len(fr.payload)
}

func (c *Chunk) addLoss(to uint64, r Reason, detail string) {
	from := c.Last + 1
	c.Last = to
	if n := len(c.Losses); n > 0 && c.Losses[n-1].To == from-1 && c.Losses[n-1].Reason == r {
		c.Losses[n-1].To = to
		return
	}
	c.Losses = append(c.Losses, Loss{from, to, r, detail})
	c.bytes += entryCost + len(detail)
}

// A readCursor is where the last Read stopped, so that the next one goes on
// there. Spool.readMu guards it.
type readCursor struct {
	seg *segment
	f   file
	c   *cursor
}

func (rc *readCursor) close() {
	if rc.f != nil {
		rc.f.Close()
	}
	*rc = readCursor{}
}

// Read fills dst with what comes after the number after in the epoch: at most
// maxRecords records and losses and about maxBytes bytes, but always at least
// one. Only what is durable is there, or, when the disk refuses or has taken
// longer than Patience, what waits for it in memory. io.EOF says that there is no more, of an earlier epoch: never
// will be. ErrEpoch says that the spool does not know the epoch (any more).
func (s *Spool) Read(e Epoch, after uint64, maxRecords, maxBytes int, dst *Chunk) error {
	s.readMu.Lock()
	defer s.readMu.Unlock()
	dst.reset(e, after+1)
	// What is synced from here on is for the next call: otherwise it would seem
	// to be missing in a segment that was read to its former end.
	limit := s.readable(e)
	var from uint64 // number of the segment from which on to look
	for {
		seg, end, done, err := s.nextSource(e, from, limit, maxRecords, maxBytes, dst)
		if err != nil {
			return err
		}
		if done {
			break
		}
		full, err := s.readSegment(seg, end, limit, maxRecords, maxBytes, dst)
		if err != nil {
			s.cur.close()
			if dst.Last >= dst.First {
				break // the error comes again with the next call
			}
			s.mu.Lock()
			s.stats.ReadErrors++
			s.mu.Unlock()
			return fmt.Errorf("read segment %s: %w", seg.id.name(segExt), err)
		}
		if full {
			break
		}
		from = seg.id.number + 1
	}
	if dst.Last < dst.First {
		return io.EOF
	}
	return nil
}

// readable is the highest number that segments hold.
func (s *Spool) readable(e Epoch) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.laneLocked(e); l != nil {
		return l.last
	}
	return 0
}

// nextSource finds the segment, numbered from or above, that holds the number
// behind dst.Last. What is in no segment it adds to dst itself; done says that
// this was the end.
func (s *Spool) nextSource(e Epoch, from, limit uint64, maxRecords, maxBytes int, dst *Chunk) (seg *segment, end int64, done bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.freed {
		return nil, 0, false, ErrClosed
	}
	l := s.laneLocked(e)
	if l == nil {
		return nil, 0, false, fmt.Errorf("%w: %s", ErrEpoch, e)
	}
	next := dst.Last + 1
	for next <= limit {
		seg = nil
		for _, g := range s.segs {
			if g.lane != l || g.id.number < from {
				continue
			}
			if seg != nil && g.first > next {
				break
			}
			seg = g
		}
		if seg != nil && seg.first <= next {
			return seg, seg.end, false, nil
		}
		if dst.full(0, maxRecords, maxBytes) {
			return nil, 0, true, nil
		}
		to := limit
		if seg != nil {
			to = min(limit, seg.first-1)
		}
		s.gapLocked(l, to, "no segment has it", dst)
		next = dst.Last + 1
	}
	if l != s.own {
		if next <= l.made && !dst.full(0, maxRecords, maxBytes) {
			dst.addLoss(l.made, Crash, "")
		}
		return nil, 0, true, nil
	}
	if dst.Last >= l.last { // else what is in memory is not what comes next
		s.readMemoryLocked(maxRecords, maxBytes, dst)
	}
	return nil, 0, true, nil
}

func indexOf(segs []*segment, g *segment) int {
	for i := range segs {
		if segs[i] == g {
			return i
		}
	}
	return -1
}

// gapLocked adds to dst that everything up to to is gone.
func (s *Spool) gapLocked(l *lane, to uint64, detail string, dst *Chunk) {
	if dst.Last < l.evicted {
		full := min(to, l.evicted)
		dst.addLoss(full, SpoolFull, "")
		if full == to {
			return
		}
	}
	if known := max(dst.Last, l.corruptTold); known < to {
		s.stats.Lost[Corrupt] += to - known
		l.corruptTold = to
	}
	dst.addLoss(to, Corrupt, cutDetail(detail))
}

// readMemoryLocked adds what the disk refused so far, and what has waited for
// it too long.
func (s *Spool) readMemoryLocked(maxRecords, maxBytes int, dst *Chunk) {
	before := len(dst.Records)
	add := func(fr *frame) bool {
		switch {
		case fr.last() <= dst.Last:
			return true
		case fr.seq > dst.Last+1 || dst.full(len(fr.payload), maxRecords, maxBytes):
			return false
		case fr.to == 0:
			dst.addRecord(fr, false)
		default:
			dst.addLoss(fr.to, fr.reason, string(fr.detail))
		}
		return true
	}
	more := true
	for i := 0; more && i < len(s.ring); i++ {
		more = add(&s.ring[i])
	}
	if slow := s.slowLocked(); slow && more {
		for i := 0; more && i < len(s.writing); i++ {
			more = add(&s.writing[i])
		}
		for i := 0; more && i < len(s.q.items); i++ {
			if max(s.q.items[i].seq, s.q.items[i].to) > dst.Last {
				fr := s.q.frame(i)
				more = add(&fr)
			}
		}
	}
	s.stats.Early += uint64(len(dst.Records) - before)
}

// readSegment adds the frames behind dst.Last that seg has, up to the number
// limit; full says that dst takes no more.
func (s *Spool) readSegment(seg *segment, end int64, limit uint64, maxRecords, maxBytes int, dst *Chunk) (full bool, err error) {
	if s.cur.seg != seg || s.cur.c.seen > dst.Last {
		s.cur.close()
		f, err := s.fs.OpenFile(s.path(seg), os.O_RDONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			s.vanished(seg)
			return false, nil
		}
		if err != nil {
			return false, err
		}
		s.cur = readCursor{seg, f, newCursor(f, seg.id.salt(), end)}
	}
	c := s.cur.c
	if c.end != end { // it grew: what was read ahead may be short
		c.end, c.buf = end, c.buf[:0]
	}
	for {
		fr, next, dmg, err := c.peek()
		if dmg != nil {
			s.mu.Lock()
			s.stats.Damaged++
			s.mu.Unlock()
			s.log.Warn("damage in the spool", "segment", seg.id.name(segExt), "offset", dmg.off, "bytes", dmg.len, "err", dmg.why)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return false, err
		}
		if err != nil {
			// Numbers that should be behind the damage are found missing by nextSource.
			return false, nil
		}
		if fr.last() <= dst.Last {
			c.advance(&fr, next)
			continue
		}
		if fr.seq > limit {
			return false, nil
		}
		if dst.full(len(fr.payload), maxRecords, maxBytes) {
			return true, nil
		}
		if fr.seq > dst.Last+1 {
			detail := "missing in segment " + seg.id.name(segExt)
			if dmg != nil {
				detail = fmt.Sprintf("segment %s, %s", seg.id.name(segExt), dmg)
			}
			s.mu.Lock()
			s.gapLocked(seg.lane, fr.seq-1, detail, dst)
			s.mu.Unlock()
			continue // the frame may not fit any more
		}
		if fr.to == 0 {
			dst.addRecord(&fr, true)
		} else {
			dst.addLoss(min(fr.to, limit), fr.reason, string(fr.detail))
			if fr.to > limit { // its rest is not for now
				return false, nil
			}
		}
		c.advance(&fr, next)
	}
}

// vanished forgets a segment whose file someone removed; one that the
// committer removes is out of the list already or will be.
func (s *Spool) vanished(seg *segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := indexOf(s.segs, seg); i >= 0 {
		s.log.Error("a segment's file is gone", "segment", seg.id.name(segExt))
	}
}

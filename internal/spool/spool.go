package spool

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Config says where a spool is and how large it may get. The zero value of
// each field but Dir means its default.
type Config struct {
	Dir          string        // made if need be, mode 0700
	MaxBytes     int64         // of all files in Dir; the oldest segments give way. Default 64 MiB
	SegmentBytes int64         // length at which a new segment begins, at most MaxBytes/4. Default 4 MiB, or less for a small MaxBytes
	KeepAcked    int64         // bytes of acknowledged segments to keep, for a collector that lost its store. Default 16 MiB, or MaxBytes/4 if that is less; negative keeps none
	MaxRecord    int           // bytes of the largest record. Default 1 MiB, or SegmentBytes/4 if that is less
	Queue        int           // records that may wait for the disk. Default 4096
	QueueBytes   int           // the same in bytes. Default 8 MiB
	Ring         int           // newest records kept in memory while the disk refuses to write, at most QueueBytes/2 of them. Default 1024
	Patience     time.Duration // how long a record waits for the disk until it can be read without. Default 20 ms; negative: for ever
	Log          *slog.Logger

	fs         fileSystem
	retryFirst time.Duration // pause after the disk refused; doubles up to retryMax
	retryMax   time.Duration
}

func (c Config) withDefaults() (Config, error) {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	defInt := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	if c.Dir == "" {
		return c, errors.New("dir: not set")
	}
	def(&c.MaxBytes, 64<<20)
	def(&c.SegmentBytes, min(4<<20, c.MaxBytes/4))
	def(&c.KeepAcked, min(16<<20, c.MaxBytes/4))
	defInt(&c.MaxRecord, int(min(1<<20, c.SegmentBytes/4)))
	defInt(&c.Queue, 4096)
	defInt(&c.QueueBytes, max(8<<20, 2*c.MaxRecord))
	defInt(&c.Ring, 1024)
	if c.Patience == 0 {
		c.Patience = 20 * time.Millisecond
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.fs == nil {
		c.fs = osFS{}
	}
	if c.retryFirst == 0 {
		c.retryFirst, c.retryMax = 100*time.Millisecond, 5*time.Second
	}
	const minBytes = 64 << 10
	switch {
	case c.MaxBytes < minBytes:
		return c, fmt.Errorf("maxBytes: %d is below the minimum of %d", c.MaxBytes, minBytes)
	case c.SegmentBytes < 4096 || c.SegmentBytes > c.MaxBytes/4:
		return c, fmt.Errorf("segmentBytes: %d is not between 4096 and a quarter of maxBytes (%d)", c.SegmentBytes, c.MaxBytes/4)
	case c.MaxRecord < 1 || c.MaxRecord > maxPayload || int64(frameLen(c.MaxRecord)) > c.SegmentBytes-segHeaderLen:
		return c, fmt.Errorf("maxRecord: %d does not fit a segment of %d bytes or the format's %d", c.MaxRecord, c.SegmentBytes, maxPayload)
	case c.Queue < 1:
		return c, fmt.Errorf("queue: %d is below the minimum of 1", c.Queue)
	case c.QueueBytes < 2*c.MaxRecord:
		return c, fmt.Errorf("queueBytes: %d is below twice maxRecord (%d)", c.QueueBytes, 2*c.MaxRecord)
	case c.Ring < 1:
		return c, fmt.Errorf("ring: %d is below the minimum of 1", c.Ring)
	}
	return c, nil
}

// Errors of the spool.
var (
	ErrLocked   = errors.New("spool is in use by another agent")
	ErrClosed   = errors.New("spool is closed")
	ErrEpoch    = errors.New("no such epoch in the spool")
	ErrTooLarge = errors.New("record is larger than maxRecord")
	ErrFull     = errors.New("too many records wait for the disk")
)

// A Spool is the log of one directory. Its methods may be called from several
// goroutines. Open makes one, Run commits what Append queues, Close frees the
// directory after Run has returned.
type Spool struct {
	cfg  Config
	log  *slog.Logger
	fs   fileSystem
	lock interface{ Close() error }

	wake   chan struct{} // the committer has something to do; capacity 1
	readMu sync.Mutex    // held by Read for its cursor
	cur    readCursor

	// The committer's alone, in Run and, before that, in Open.
	active     file    // segment being written; nil: the next write begins one
	nextNumber uint64  // number of the next file
	out        []byte  // frames being written
	entries    []frame // what is being committed
	taken      queue   // the bytes of entries
	retryAt    time.Time
	retryPause time.Duration

	mu       sync.Mutex // guards everything below, and the lanes
	lanes    []*lane    // oldest first; the last is own
	own      *lane
	segs     []*segment // by number, of all lanes
	q        queue
	inFlight int         // records taken from q that are neither synced, nor in ring, nor lost
	writing  []frame     // what is being committed
	since    time.Time   // when the first record taken from q was appended; zero between two commits
	slow     *time.Timer // tells readers that the disk has taken too long
	slowSet  bool        // slow is running
	ring     []frame     // what the disk refused, consecutive from own.last+1; payloads are copies
	ringRecs int
	ringLen  int   // bytes of payload in ring
	failing  error // why the disk refuses; nil when it does not
	marks    []mark
	stats    Stats
	changed  chan struct{} // closed and replaced when there is more to read
	trimDue  bool          // acknowledgements came since the last trim
	closed   bool          // Append gives out no more numbers
	freed    bool          // Close was called
}

// A segment is one file of records. Spool.mu guards last, end and gone; the
// rest never changes.
type segment struct {
	id      fileID
	lane    *lane
	first   uint64
	last    uint64 // highest number in it; 0 in segments not walked, see lastLocked
	end     int64  // bytes that may be read
	created time.Time
}

// A mark says when a number became durable, for the age of what is not acknowledged.
type mark struct {
	last uint64
	at   time.Time
}

// queue holds what was appended and not yet taken by the committer. A record's
// bytes are buf[off:off+n].
type queue struct {
	items []queued
	recs  int
	buf   []byte
	since time.Time // when the first of items was appended
}

type queued struct {
	seq, to uint64 // to != 0: a loss
	reason  Reason
	detail  string
	off, n  int
}

func (q *queue) reset() {
	const keep = 1 << 20 // a burst's memory is not kept for ever
	if cap(q.buf) > keep {
		q.buf = nil
	}
	q.items, q.buf, q.recs, q.since = q.items[:0], q.buf[:0], 0, time.Time{}
}

// frame is item i, with the payload where it lies.
func (q *queue) frame(i int) frame {
	it := &q.items[i]
	fr := frame{seq: it.seq, to: it.to, reason: it.reason}
	if it.to != 0 {
		fr.detail = []byte(it.detail)
		return fr
	}
	fr.payload = q.buf[it.off : it.off+it.n : it.off+it.n]
	fr.crc = crc32.Checksum(fr.payload, castagnoli)
	return fr
}

// lose notes that seq is lost, as part of the loss before it when that is of the same kind.
func (q *queue) lose(seq uint64, r Reason, detail string) {
	if n := len(q.items); n > 0 && q.items[n-1].to == seq-1 && q.items[n-1].reason == r {
		q.items[n-1].to = seq
		return
	}
	q.items = append(q.items, queued{seq: seq, to: seq, reason: r, detail: detail})
}

// Append gives payload the next sequence number, copies it and queues it for
// the disk. It waits for nothing. A record that cannot be queued is ErrFull or
// ErrTooLarge: its number is given out, counted as lost, and read as a Loss.
// After Run has returned the error is ErrClosed, and there is no number.
func (s *Spool) Append(payload []byte) (seq uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, ErrClosed
	}
	seq = s.own.made + 1
	s.own.made = seq
	if e := s.own.store(cMade, seq); e != nil {
		s.stats.LaneErrors++
		s.log.Warn("cannot count records on disk: a crash will not be able to name its losses", "err", e)
	}
	switch {
	// Once full the queue stays so until it is taken, whatever the sizes: the
	// losses after that are one item.
	case s.q.recs >= s.cfg.Queue || len(s.q.buf) > s.cfg.QueueBytes-s.cfg.MaxRecord:
		s.q.lose(seq, QueueFull, "")
		s.stats.Lost[QueueFull]++
		err = ErrFull
	case len(payload) > s.cfg.MaxRecord:
		s.q.lose(seq, TooLarge, fmt.Sprintf("%d bytes, limit %d", len(payload), s.cfg.MaxRecord))
		s.stats.Lost[TooLarge]++
		err = ErrTooLarge
	default:
		s.q.items = append(s.q.items, queued{seq: seq, off: len(s.q.buf), n: len(payload)})
		s.q.buf = append(s.q.buf, payload...)
		s.q.recs++
	}
	if s.q.since.IsZero() {
		s.q.since = time.Now()
		s.watchDiskLocked()
	}
	if s.slowLocked() {
		s.broadcastLocked()
	}
	s.poke()
	return seq, err
}

// waitingLocked is since when the oldest record waits for the disk, of those
// that it has not refused; zero when none does.
func (s *Spool) waitingLocked() time.Time {
	if !s.since.IsZero() {
		return s.since
	}
	return s.q.since
}

// slowLocked says that what waits for the disk can be read without: it has
// taken longer than Patience.
func (s *Spool) slowLocked() bool {
	since := s.waitingLocked()
	return s.cfg.Patience >= 0 && !since.IsZero() && time.Since(since) >= s.cfg.Patience
}

// watchDiskLocked sees to it that readers are told when Patience is over.
func (s *Spool) watchDiskLocked() {
	since := s.waitingLocked()
	if s.slowSet || since.IsZero() || s.cfg.Patience < 0 {
		return
	}
	s.slowSet = true
	left := s.cfg.Patience - time.Since(since)
	if s.slow != nil {
		s.slow.Reset(left)
		return
	}
	s.slow = time.AfterFunc(left, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.slowSet = false
		if s.slowLocked() {
			s.broadcastLocked()
		} else {
			s.watchDiskLocked()
		}
	})
}

func (s *Spool) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// take appends what is queued to into, as frames that refer to s.taken, until
// done gives them back.
func (s *Spool) take(into []frame) []frame {
	s.taken.reset()
	s.mu.Lock()
	s.q, s.taken = s.taken, s.q
	s.inFlight, s.since = s.taken.recs, s.taken.since
	s.mu.Unlock()
	for i := range s.taken.items {
		into = append(into, s.taken.frame(i))
	}
	s.mu.Lock()
	s.writing = into
	s.mu.Unlock()
	return into
}

// done ends a round: what take returned is on disk, in the ring, or lost.
func (s *Spool) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing, s.since = nil, time.Time{}
	if s.slowSet && s.q.since.IsZero() && s.slow.Stop() {
		s.slowSet = false
	}
}

// Sync waits until everything appended so far is on disk, as a record or as a loss.
func (s *Spool) Sync(ctx context.Context) error {
	s.mu.Lock()
	want := s.own.made
	s.mu.Unlock()
	for {
		s.mu.Lock()
		done, failing, ch := s.own.last >= want, s.failing, s.changed
		s.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			if failing != nil {
				return fmt.Errorf("sync spool: %w (the disk: %w)", ctx.Err(), failing)
			}
			return fmt.Errorf("sync spool: %w", ctx.Err())
		}
	}
}

// Changed returns a channel that is closed when there is more to read than at
// the time of the call. Take it before Read, wait on it after io.EOF.
func (s *Spool) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *Spool) broadcastLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// A Lane is one epoch in the spool.
type Lane struct {
	Epoch Epoch
	First uint64 // first sequence number still in the spool; Made+1 when there is none
	Made  uint64 // highest sequence number given out
	Acked uint64 // everything up to here is acknowledged
}

// Lanes lists the epochs the spool knows, oldest first; the last is the
// running agent's own.
func (s *Spool) Lanes() []Lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Lane, len(s.lanes))
	for i, l := range s.lanes {
		out[i] = Lane{l.id.epoch, s.firstLocked(l), l.made, l.acked}
	}
	return out
}

func (s *Spool) firstLocked(l *lane) uint64 {
	for _, g := range s.segs {
		if g.lane == l {
			return min(g.first, l.made+1)
		}
	}
	if l == s.own {
		return l.last + 1 // in memory; made+1 when nothing is
	}
	return l.made + 1
}

func (s *Spool) laneLocked(e Epoch) *lane {
	for _, l := range s.lanes {
		if l.id.epoch == e {
			return l
		}
	}
	return nil
}

// Ack says that the collector holds everything of the epoch up to and
// including upTo. An older or repeated acknowledgement changes nothing.
func (s *Spool) Ack(e Epoch, upTo uint64) error {
	return s.setAcked(e, func(l *lane) (uint64, error) {
		if upTo > l.made {
			return 0, fmt.Errorf("acknowledge %d of epoch %s: only %d were made", upTo, e, l.made)
		}
		return max(upTo, l.acked), nil
	})
}

// Resume says what the collector holds of an epoch when a connection begins.
// Unlike Ack it also goes back, for a collector that lost some of its store:
// records it must get again are not acknowledged any more.
func (s *Spool) Resume(e Epoch, after uint64) error {
	return s.setAcked(e, func(l *lane) (uint64, error) { return min(after, l.made), nil })
}

func (s *Spool) setAcked(e Epoch, next func(*lane) (uint64, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.laneLocked(e)
	if l == nil {
		return fmt.Errorf("%w: %s", ErrEpoch, e)
	}
	v, err := next(l)
	if err != nil || v == l.acked {
		return err
	}
	back := v < l.acked
	if !back {
		s.stats.Acked += v - l.acked
	}
	l.acked = v
	err = l.mapFile(s.fs, s.cfg.Dir)
	if err == nil {
		err = l.store(cAcked, v)
	}
	if err != nil {
		s.stats.LaneErrors++
		s.log.Warn("cannot store what is acknowledged: it will be offered again after a restart", "err", err)
	}
	if l == s.own {
		i := 0
		for i < len(s.marks) && (back || s.marks[i].last <= v) {
			i++
		}
		s.marks = slices.Delete(s.marks, 0, i)
	}
	s.trimDue = true
	s.poke()
	return nil
}

// Stats are counts since Open, except where they say "now".
//
//	Made = Durable + Queued + Lost[QueueFull] + Lost[TooLarge] + Lost[Disk]
//
// The other reasons, SpoolFull, Corrupt and Crash, are losses of what was
// counted as durable before, or by an earlier run.
type Stats struct {
	Made    uint64 // sequence numbers given out
	Durable uint64 // records synced, or acknowledged before the disk took them
	Queued  uint64 // now: records that wait for the disk
	Acked   uint64 // acknowledged, of all epochs; what a collector lost and took again counts twice
	Lost    [NumReasons]uint64

	Unacked       uint64    // now: of all epochs, without what is settled as lost by the collector
	OldestUnacked time.Time // now: when the oldest of them became durable; zero when there is none. Of an earlier run: when its segment was begun
	Lanes         int       // now
	Segments      int       // now
	Bytes         int64     // now: on disk
	Failing       error     // now: why the disk refuses; nil when it does not

	Writes      uint64 // commits tried
	WriteErrors uint64 // of these, refused by write, fdatasync or while making a segment
	Removed     uint64 // segments removed, acknowledged or not
	Early       uint64 // records read before they were on disk: it was slow, or refused. One read twice counts twice
	Damaged     uint64 // damaged places met while reading
	LaneErrors  uint64 // counters that could not be stored
	ReadErrors  uint64

	Syncs       uint64                      // fdatasync calls on segments
	SyncTime    time.Duration               // their sum
	SyncBuckets [len(SyncBounds) + 1]uint64 // by SyncBounds, not cumulative; the last is above all
}

// SyncBounds are the upper bounds of Stats.SyncBuckets.
var SyncBounds = [...]time.Duration{
	250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond,
	500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 5 * time.Second,
}

// Stats takes a snapshot.
func (s *Spool) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Made = s.own.made
	st.Queued = uint64(s.q.recs + s.inFlight + s.ringRecs)
	st.Lanes, st.Segments, st.Bytes = len(s.lanes), len(s.segs), s.bytesLocked()
	st.Failing = s.failing
	for _, l := range s.lanes {
		if l.acked >= l.made {
			continue
		}
		st.Unacked += l.made - l.acked
		if st.OldestUnacked.IsZero() {
			st.OldestUnacked = s.oldestLocked(l)
		}
	}
	return st
}

// oldestLocked is when the first unacknowledged record of l became durable, as
// far as is known.
func (s *Spool) oldestLocked(l *lane) (at time.Time) {
	if l == s.own && len(s.marks) > 0 {
		return s.marks[0].at
	}
	for _, g := range s.segs {
		if g.lane == l && (at.IsZero() || g.first <= l.acked+1) {
			at = g.created
		}
	}
	return at
}

// markLocked remembers when numbers up to last became durable. A few hundred
// marks are enough to tell an age.
func (s *Spool) markLocked(last uint64, now time.Time) {
	const most = 512
	if last <= s.own.acked {
		return
	}
	n := len(s.marks)
	if n > 0 && s.marks[n-1].last >= last {
		return
	}
	if n > 0 && now.Sub(s.marks[n-1].at) < 50*time.Millisecond {
		s.marks[n-1].last = last
		return
	}
	s.marks = append(s.marks, mark{last, now})
	if len(s.marks) < most {
		return
	}
	for i := range most / 2 { // each pair becomes one with the older time
		s.marks[i] = mark{s.marks[2*i+1].last, s.marks[2*i].at}
	}
	s.marks = s.marks[:most/2]
}

const fsBlock = 4096 // what a file takes at least

func onDisk(size int64) int64 { return (size + fsBlock - 1) &^ (fsBlock - 1) }

// bytesLocked is what the spool takes on disk.
func (s *Spool) bytesLocked() int64 {
	n := int64(len(s.lanes)) * laneLen
	for _, g := range s.segs {
		n += onDisk(g.end)
	}
	return n
}

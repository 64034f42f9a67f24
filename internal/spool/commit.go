package spool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Run commits what Append queues. After ctx ends it commits everything that is
// queued, tries the disk once more if it refused, and returns; what it could not
// write then is an error. It must be called once.
func (s *Spool) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for final := false; ; {
		select {
		case <-s.wake:
		case <-timer.C:
		case <-ctx.Done():
			final = true
			// From here on nothing is given a number, so this round is the last.
			s.mu.Lock()
			s.closed = true
			s.mu.Unlock()
		}
		s.trim()
		s.entries = s.take(s.entries[:0])
		s.commit(final)
		s.done()
		clear(s.entries)
		if final {
			return s.left()
		}
		if s.retryAt.IsZero() {
			timer.Reset(time.Hour)
		} else {
			timer.Reset(time.Until(s.retryAt))
		}
	}
}

// left is the error of a last round that did not bring everything to disk.
func (s *Spool) left() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.own.last == s.own.made {
		return nil
	}
	return fmt.Errorf("spool: numbers %d to %d are not on disk: %w", s.own.last+1, s.own.made, s.failing)
}

// commit writes s.entries, or puts them behind what the disk refused.
func (s *Spool) commit(final bool) {
	if s.retryAt.IsZero() {
		n, err := s.write(s.entries, 1<<20)
		if err == nil {
			return
		}
		s.refused(s.entries[n:], err)
	} else {
		s.refused(s.entries, nil)
	}
	if final || !time.Now().Before(s.retryAt) {
		s.retry()
	}
}

// retry writes the ring, in small pieces: a little room is better than none.
func (s *Spool) retry() {
	was := s.failing // only the committer changes it, and ring
	_, err := s.write(s.ring, 64<<10)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.log.Info("disk accepts records again", "refused", was)
		s.retryAt, s.retryPause, s.failing = time.Time{}, 0, nil
		return
	}
	s.failing = err
	s.backOff()
}

func (s *Spool) backOff() {
	s.retryPause = min(max(2*s.retryPause, s.cfg.retryFirst), s.cfg.retryMax)
	s.retryAt = time.Now().Add(s.retryPause)
}

// refused keeps what could not be written in the ring. Frames that fall off
// become one DISK loss at its head.
func (s *Spool) refused(frs []frame, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if s.failing == nil {
			s.log.Warn("disk refuses records: the newest are kept in memory", "err", err)
		}
		s.failing = err
		s.backOff()
	}
	for i := range frs {
		fr := frs[i]
		fr.payload = bytes.Clone(fr.payload)
		s.ring = append(s.ring, fr)
		if fr.to == 0 {
			s.ringRecs++
			s.ringLen += len(fr.payload)
		}
		for len(s.ring) > 1 && (len(s.ring) > s.cfg.Ring || s.ringLen > s.cfg.QueueBytes/2) {
			s.fallOffLocked()
		}
	}
	s.inFlight = 0
	if len(frs) > 0 {
		s.markLocked(frs[len(frs)-1].last(), time.Now())
		s.broadcastLocked()
	}
}

// fallOffLocked turns the oldest frame of the ring into a DISK loss, or joins
// it to the one that is there.
func (s *Spool) fallOffLocked() {
	i := 0
	if s.ring[0].reason == Disk {
		i = 1
	}
	fr := &s.ring[i]
	if fr.to == 0 {
		s.ringRecs--
		s.ringLen -= len(fr.payload)
		if fr.seq <= s.own.acked {
			s.stats.Durable++ // the collector has it
		} else {
			s.stats.Lost[Disk]++
		}
	}
	*fr = frame{seq: s.ring[0].seq, to: fr.last(), reason: Disk, detail: []byte(cutDetail(s.failing.Error()))}
	s.ring = s.ring[i:]
}

func cutDetail(d string) string { return d[:min(len(d), maxDetail)] }

// dropRingLocked forgets the first n frames of the ring: they are on disk.
func (s *Spool) dropRingLocked(n int) {
	for _, fr := range s.ring[:n] {
		if fr.to == 0 {
			s.ringRecs--
			s.ringLen -= len(fr.payload)
		}
	}
	s.ring = s.ring[n:] // in place: retry still walks it
	if len(s.ring) == 0 {
		s.ring = nil
	}
}

// write brings frs to disk, at most piece bytes or one frame at a time, and
// returns how many of them are there, with the error that kept off the rest.
func (s *Spool) write(frs []frame, piece int) (done int, err error) {
	for done < len(frs) {
		n, err := s.writePiece(frs[done:], piece)
		s.mu.Lock()
		s.stats.Writes++
		if err != nil {
			s.stats.WriteErrors++
		}
		s.mu.Unlock()
		if err != nil {
			s.makeRoom(err)
			return done, err
		}
		done += n
	}
	return done, nil
}

func (s *Spool) writePiece(frs []frame, piece int) (int, error) {
	g, err := s.segmentFor(&frs[0])
	if err != nil {
		return 0, err
	}
	// end and last change in this goroutine only.
	end, n, recs := g.end, 0, 0
	s.out = s.out[:0]
	salt := g.id.salt()
	for n < len(frs) && (n == 0 || len(s.out)+frs[n].size() <= piece && end+int64(len(s.out)+frs[n].size()) <= s.cfg.SegmentBytes) {
		s.out = appendFrame(s.out, &frs[n], salt)
		if frs[n].to == 0 {
			recs++
		}
		n++
	}
	s.bound(int64(len(s.out)))
	if err := s.writeSync(end); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	g.end, g.last = end+int64(len(s.out)), frs[n-1].last()
	s.own.last = g.last
	s.stats.Durable += uint64(recs)
	if s.retryAt.IsZero() {
		s.inFlight -= recs
	} else {
		s.dropRingLocked(n) // frs are the ring's
		if len(s.ring) == 0 {
			s.failing = nil // before Sync sees that all is on disk
		}
	}
	s.markLocked(g.last, time.Now())
	s.broadcastLocked()
	return n, nil
}

// size is the frame's length on disk.
func (fr *frame) size() int {
	if fr.to == 0 {
		return frameLen(len(fr.payload))
	}
	return frameLen(lossFixed + min(len(fr.detail), maxDetail))
}

// writeSync writes s.out at end and syncs it. On an error the segment is as it
// was, or given up.
func (s *Spool) writeSync(end int64) error {
	if _, err := s.active.WriteAt(s.out, end); err != nil {
		if terr := s.active.Truncate(end); terr != nil {
			s.giveUpActive() // what stands behind end would be found by a later reader
			return fmt.Errorf("write segment: %w; cut it back: %w", err, terr)
		}
		return fmt.Errorf("write segment: %w", err)
	}
	t := time.Now()
	err := s.active.Datasync()
	s.countSync(time.Since(t))
	if err != nil {
		// The kernel may have thrown the pages away and would report success
		// next time. This file is never synced again.
		s.active.Truncate(end) // only tidy: equal frames will be in the next segment
		s.giveUpActive()
		return fmt.Errorf("sync segment: %w", err)
	}
	return nil
}

func (s *Spool) countSync(d time.Duration) {
	i := 0
	for i < len(SyncBounds) && d > SyncBounds[i] {
		i++
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Syncs++
	s.stats.SyncTime += d
	s.stats.SyncBuckets[i]++
}

func (s *Spool) giveUpActive() {
	s.active.Close()
	s.active = nil
}

// segmentFor returns the segment that fr is to be written to, a new one when
// there is none or fr does not fit.
func (s *Spool) segmentFor(fr *frame) (*segment, error) {
	if s.active != nil {
		g := s.segs[len(s.segs)-1] // only the committer adds and removes
		if g.end == segHeaderLen || g.end+int64(fr.size()) <= s.cfg.SegmentBytes {
			return g, nil
		}
		s.giveUpActive()
	}
	if !s.own.onDisk && s.own.f == nil {
		// The disk was full at the start: the counters come late.
		s.mu.Lock()
		l := *s.own
		s.mu.Unlock()
		if err := createLaneFile(s.fs, s.cfg.Dir, &l); err != nil {
			return nil, fmt.Errorf("make lane: %w", err)
		}
		s.mu.Lock()
		s.own.f, s.own.page, s.own.onDisk = l.f, l.page, true
		err := errors.Join(s.own.store(cMade, s.own.made), s.own.store(cAcked, s.own.acked))
		s.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	s.bound(segHeaderLen)
	g, f, err := s.createSegment(fr.seq)
	if err != nil {
		return nil, fmt.Errorf("make segment: %w", err)
	}
	s.active = f
	s.mu.Lock()
	s.segs = append(s.segs, g)
	s.mu.Unlock()
	return g, nil
}

func (s *Spool) createSegment(first uint64) (*segment, file, error) {
	g := &segment{id: fileID{s.nextNumber, s.own.id.epoch}, lane: s.own, first: first, end: segHeaderLen, created: time.Now()}
	s.nextNumber++ // also when this fails: no name is used twice
	path := s.path(g)
	f, err := s.fs.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	if _, err = f.WriteAt(appendSegmentHeader(nil, g.id, first, g.created), 0); err == nil {
		if err = f.Sync(); err == nil {
			err = s.fs.SyncDir(s.cfg.Dir)
		}
	}
	if err != nil {
		f.Close()
		s.fs.Remove(path) // if that fails too, the next Open finds it empty
		return nil, nil, err
	}
	return g, f, nil
}

func (s *Spool) path(g *segment) string { return filepath.Join(s.cfg.Dir, g.id.name(segExt)) }

// bound makes room for n bytes under MaxBytes: the oldest segments go, never
// the one being written.
func (s *Spool) bound(n int64) {
	for {
		s.mu.Lock()
		over := s.bytesLocked()+onDisk(n) > s.cfg.MaxBytes
		keep := 0
		if s.active != nil {
			keep = 1
		}
		if !over || len(s.segs) <= keep {
			s.mu.Unlock()
			return
		}
		g := s.segs[0]
		s.mu.Unlock()
		if !s.remove(g) {
			return
		}
	}
}

// trim removes acknowledged segments above KeepAcked, oldest first, and
// forgets epochs of which nothing is left.
func (s *Spool) trim() {
	s.mu.Lock()
	due := s.trimDue
	s.trimDue = false
	s.mu.Unlock()
	if due {
		s.trimTo(s.cfg.KeepAcked)
	}
}

// makeRoom gives acknowledged segments up when the disk is full.
func (s *Spool) makeRoom(err error) {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		s.trimTo(-1)
	}
}

// Epochs that are kept only because of KeepAcked; each stands in every Hello.
const keepAckedLanes = 64

func (s *Spool) trimTo(keep int64) {
	s.mu.Lock()
	var acked []*segment
	var bytes int64
	for i, g := range s.segs {
		if s.lastLocked(i) <= g.lane.acked && !(s.active != nil && i == len(s.segs)-1) {
			acked = append(acked, g)
			bytes += onDisk(g.end)
		}
	}
	lanes := 0
	for _, l := range s.lanes {
		if l != s.own && l.acked >= l.made {
			lanes++
		}
	}
	s.mu.Unlock()
	for _, g := range acked {
		if bytes <= keep && lanes <= keepAckedLanes {
			break
		}
		bytes -= onDisk(g.end)
		if !s.remove(g) {
			break
		}
		lanes -= s.forgetLanes()
	}
	s.forgetLanes()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lanes { // settled: their counters change no more
		if l != s.own && l.acked >= l.made {
			l.close()
		}
	}
}

// lastLocked is the highest number in segment i.
func (s *Spool) lastLocked(i int) uint64 {
	g := s.segs[i]
	if g.last != 0 {
		return g.last
	}
	if i+1 < len(s.segs) && s.segs[i+1].lane == g.lane {
		return s.segs[i+1].first - 1
	}
	return g.lane.last
}

// remove takes the file of g away. The lane says so on disk before the file
// is gone, so that a later run can tell a bound from damage.
func (s *Spool) remove(g *segment) bool {
	s.mu.Lock()
	i := slices.Index(s.segs, g)
	l, last := g.lane, s.lastLocked(i)
	from := max(l.acked, l.evicted, g.first-1)
	l.evicted = max(l.evicted, last)
	err := l.mapFile(s.fs, s.cfg.Dir)
	if err == nil {
		err = l.store(cEvicted, l.evicted)
	}
	s.mu.Unlock()
	if err == nil {
		err = l.sync()
	}
	if err != nil {
		// On a full or failing disk the file goes all the same: at worst its
		// numbers are reported with the wrong reason.
		s.log.Warn("cannot store which records gave way", "err", err)
	}
	if err := s.fs.Remove(s.path(g)); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("cannot remove a segment", "err", err)
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.segs = slices.Delete(s.segs, i, i+1)
	s.stats.Removed++
	if last > from {
		s.stats.Lost[SpoolFull] += last - from
		s.log.Warn("spool is full: the oldest records gave way",
			slog.String("epoch", l.id.epoch.String()), slog.Uint64("from", from+1), slog.Uint64("to", last))
	}
	return true
}

// forgetLanes removes earlier epochs that are acknowledged whole and have no
// segment, and says how many.
func (s *Spool) forgetLanes() int {
	s.mu.Lock()
	has := make(map[*lane]bool)
	for _, g := range s.segs {
		has[g.lane] = true
	}
	var gone []*lane
	s.lanes = slices.DeleteFunc(s.lanes, func(l *lane) bool {
		if l == s.own || l.acked < l.made || has[l] {
			return false
		}
		gone = append(gone, l)
		return true
	})
	s.mu.Unlock()
	if len(gone) == 0 {
		return 0
	}
	// First the segments, for good: a segment that came back without its lane
	// would be offered as new.
	if err := s.fs.SyncDir(s.cfg.Dir); err != nil {
		s.log.Warn("cannot sync the spool's directory", "err", err)
	}
	for _, l := range gone {
		s.dropLane(l)
	}
	return len(gone)
}

func (s *Spool) dropLane(l *lane) {
	// Nobody else uses the lane: it is in no list any more. Ack looks it up under mu.
	err := errors.Join(l.close(), s.fs.Remove(filepath.Join(s.cfg.Dir, l.id.name(laneExt))))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("cannot remove a lane", "err", err)
	}
}

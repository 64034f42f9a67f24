package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Open locks the directory, repairs what the last run left, and begins a new
// epoch. ErrLocked says that another process has it. A full disk is no error:
// records are then kept in memory until there is room.
func Open(cfg Config) (*Spool, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("spool: %w", err)
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("spool: %w", err)
	}
	s := &Spool{
		cfg: cfg, log: cfg.Log, fs: cfg.fs, lock: lock,
		wake: make(chan struct{}, 1), changed: make(chan struct{}), trimDue: true,
	}
	if err := s.recover(); err != nil {
		s.freed = true
		return nil, errors.Join(fmt.Errorf("spool: %w", err), s.release())
	}
	s.poke() // the first round trims
	return s, nil
}

// Close frees the directory. Run must have returned, or never been called.
func (s *Spool) Close() error {
	s.readMu.Lock()
	defer s.readMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.freed {
		return nil
	}
	s.freed, s.closed = true, true
	return s.release()
}

func (s *Spool) release() error {
	s.cur.close()
	if s.slow != nil {
		s.slow.Stop()
	}
	var errs []error
	if s.active != nil {
		errs = append(errs, s.active.Close())
		s.active = nil
	}
	for _, l := range s.lanes {
		errs = append(errs, l.close())
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// lockDir makes the directory ours alone.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		// A directory that a volume's group owns cannot always be narrowed;
		// one that all users reach must be.
		if err := os.Chmod(dir, 0o700); err != nil && fi.Mode().Perm()&0o007 != 0 {
			return nil, fmt.Errorf("state directory %s is open to other users (mode %04o) and cannot be narrowed: %w", dir, fi.Mode().Perm(), err)
		}
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory %s is not writable: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock state directory %s: %w", dir, err)
		}
		b := make([]byte, 20)
		n, _ := f.ReadAt(b, 0)
		return nil, fmt.Errorf("state directory %s: %w (pid %.20q)", dir, ErrLocked, bytes.TrimSpace(b[:n]))
	}
	// The pid is for the message above only: no error matters. Always as long:
	// a file cut and written again would be flushed by ext4.
	f.WriteAt(fmt.Appendf(nil, "%-19d\n", os.Getpid()), 0)
	return f, nil
}

// found is what a spool's directory holds: the files of each epoch, by number.
type found struct {
	lanes  map[Epoch][]fileID
	segs   map[Epoch][]segFile
	epochs []Epoch // oldest first
	top    uint64  // highest number of a file
}

type segFile struct {
	id   fileID
	size int64
}

func list(fsys fileSystem, dir string) (*found, error) {
	ents, err := fsys.List(dir)
	if err != nil {
		return nil, err
	}
	// Names sort by number.
	slices.SortFunc(ents, func(a, b dirEntry) int { return strings.Compare(a.name, b.name) })
	fd := &found{lanes: map[Epoch][]fileID{}, segs: map[Epoch][]segFile{}}
	for _, e := range ents {
		id, ext, ok := parseName(e.name)
		if !ok {
			continue
		}
		if fd.lanes[id.epoch] == nil && fd.segs[id.epoch] == nil {
			fd.epochs = append(fd.epochs, id.epoch)
		}
		if ext == laneExt {
			fd.lanes[id.epoch] = append(fd.lanes[id.epoch], id)
		} else {
			fd.segs[id.epoch] = append(fd.segs[id.epoch], segFile{id, e.size})
		}
		fd.top = max(fd.top, id.number)
	}
	return fd, nil
}

func (s *Spool) recover() error {
	fd, err := list(s.fs, s.cfg.Dir)
	if err != nil {
		return err
	}
	s.nextNumber = fd.top + 1
	for _, e := range fd.epochs {
		if err := s.recoverEpoch(fd, e); err != nil {
			return err
		}
	}
	// Across epochs too, segments give way in the order they were made.
	slices.SortFunc(s.segs, func(a, b *segment) int { return strings.Compare(a.id.name(segExt), b.id.name(segExt)) })

	s.own = &lane{id: fileID{s.nextNumber, newEpoch()}}
	s.nextNumber++
	s.lanes = append(s.lanes, s.own)
	s.forgetLanes()
	err = createLaneFile(s.fs, s.cfg.Dir, s.own)
	if outOfRoom(err) {
		s.log.Warn("no room for the spool: a crash before there is some will not be able to name its losses", "err", err)
		err = nil
	}
	if err != nil {
		return fmt.Errorf("make lane: %w", err)
	}
	st := s.Stats()
	s.log.Info("spool open", slog.String("dir", s.cfg.Dir), slog.String("epoch", s.own.id.epoch.String()),
		slog.Int("segments", st.Segments), slog.Int64("bytes", st.Bytes), slog.Uint64("unacked", st.Unacked))
	return nil
}

func outOfRoom(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO)
}

// recoverEpoch adds an earlier epoch's lane and segments.
func (s *Spool) recoverEpoch(fd *found, e Epoch) error {
	l, err := s.recoverLane(fd, e)
	var segs []*segment
	for _, sf := range fd.segs[e] {
		if err != nil {
			break
		}
		var g *segment
		if g, err = s.recoverSegment(l, sf); g != nil {
			segs = append(segs, g)
		}
	}
	if errors.Is(err, errVersion) {
		s.log.Error("an epoch in the spool is of a newer agent: left alone", "epoch", e.String(), "err", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("epoch %s: %w", e, err)
	}
	if !l.sealed {
		if segs, err = s.seal(l, segs); err != nil {
			return fmt.Errorf("epoch %s: %w", e, err)
		}
	}
	if l.made == 0 && len(segs) == 0 {
		s.dropLane(l)
		return nil
	}
	s.lanes = append(s.lanes, l)
	s.segs = append(s.segs, segs...)
	return nil
}

func (s *Spool) recoverLane(fd *found, e Epoch) (*lane, error) {
	var bad *laneError
	for _, id := range fd.lanes[e] {
		l, err := readLaneFile(s.fs, s.cfg.Dir, id)
		if err == nil {
			return l, nil
		}
		if errors.Is(err, errVersion) || !errors.As(err, &bad) {
			return nil, err
		}
		s.log.Warn("a lane is damaged: made again from its segments", "lane", id.name(laneExt), "err", err)
	}
	if bad != nil {
		return &lane{id: fd.lanes[e][0]}, nil // seal writes over it
	}
	return &lane{id: fd.segs[e][0].id}, nil
}

// recoverSegment is nil for a segment that holds nothing and is not the newest
// of its epoch; errVersion for one that is not ours to read.
func (s *Spool) recoverSegment(l *lane, sf segFile) (*segment, error) {
	f, err := s.fs.OpenFile(filepath.Join(s.cfg.Dir, sf.id.name(segExt)), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := make([]byte, segHeaderLen)
	n, err := readOver(f, h, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	g := &segment{id: sf.id, lane: l, end: sf.size}
	g.first, g.created, err = decodeSegmentHeader(h[:n], sf.id)
	if err == nil || errors.Is(err, errVersion) {
		return g, err
	}
	s.log.Warn("a segment's header is damaged", "segment", sf.id.name(segExt), "err", err)
	fr, _, _, err := newCursor(f, sf.id.salt(), sf.size).peek()
	if errors.Is(err, io.EOF) {
		s.removeEmpty(g)
		return nil, nil
	}
	g.first = fr.seq
	return g, err
}

func (s *Spool) removeEmpty(g *segment) {
	s.log.Warn("a segment holds no good record: removed", "segment", g.id.name(segExt), "bytes", g.end)
	if err := s.fs.Remove(s.path(g)); err != nil {
		s.log.Warn("cannot remove a segment", "err", err)
	}
}

// seal ends an epoch whose agent is gone: cuts the torn tail and settles what
// was on disk and what was only promised.
func (s *Spool) seal(l *lane, segs []*segment) ([]*segment, error) {
	for len(segs) > 0 {
		g := segs[len(segs)-1]
		end, last, err := s.cutTail(g)
		if err != nil {
			return nil, err
		}
		if last > 0 {
			g.end, g.last, l.last = end, last, last
			break
		}
		s.removeEmpty(g)
		segs = segs[:len(segs)-1]
	}
	l.last = max(l.last, l.evicted)
	l.made = max(l.made, l.last, l.acked)
	if l.made == 0 {
		return segs, nil
	}
	if settled := max(l.last, l.acked); l.made > settled {
		s.stats.Lost[Crash] += l.made - settled
		s.log.Warn("the last run ended before records were on disk", slog.String("epoch", l.id.epoch.String()),
			slog.Uint64("from", settled+1), slog.Uint64("to", l.made))
	}
	l.sealed = true
	err := s.storeSealed(l)
	if outOfRoom(err) {
		s.log.Warn("cannot seal an epoch: done again at the next start", "err", err)
		err = nil
	}
	return segs, err
}

func (s *Spool) storeSealed(l *lane) error {
	if !l.onDisk {
		return errors.Join(createLaneFile(s.fs, s.cfg.Dir, l), l.close())
	}
	if err := l.mapFile(s.fs, s.cfg.Dir); err != nil {
		return err
	}
	var errs []error
	for c, v := range l.counters() { // sealed is the last of them
		errs = append(errs, l.store(counter(c), v))
	}
	return errors.Join(append(errs, l.sync(), l.close())...)
}

// cutTail finds the last good frame of g and cuts off what stands behind it.
func (s *Spool) cutTail(g *segment) (end int64, last uint64, err error) {
	f, err := s.fs.OpenFile(s.path(g), os.O_RDWR, 0)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	c := newCursor(f, g.id.salt(), g.end)
	for {
		fr, next, _, err := c.peek()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, 0, err
		}
		c.advance(&fr, next)
	}
	if c.seen == 0 || c.off == g.end {
		return c.off, c.seen, nil
	}
	s.log.Warn("torn tail of a segment cut off", "segment", g.id.name(segExt), "from", c.off, "bytes", g.end-c.off)
	if err := f.Truncate(c.off); err != nil {
		return 0, 0, err
	}
	return c.off, c.seen, f.Sync()
}

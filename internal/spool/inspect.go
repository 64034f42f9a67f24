package spool

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// An Item is one entry of a spool, or a damaged place. Exactly one of Record,
// Loss and Damage is set.
type Item struct {
	File   string
	Offset int64
	Epoch  Epoch
	Record *Record // valid until visit returns
	Loss   *Loss
	Damage error
	Length int64 // of Damage, bytes
}

// A Report sums up what Inspect found.
type Report struct {
	Epochs   []EpochReport // oldest first
	Segments int
	Bytes    int64
	Records  uint64
	Damaged  int // damaged places; files that cannot be used and numbers that are missing included
}

// An EpochReport says where an epoch stands, on disk.
type EpochReport struct {
	Epoch                      Epoch
	Made, Last, Acked, Evicted uint64 // as in the lane; Last is 0 before the epoch is sealed
	Sealed                     bool
	Records                    uint64
	First, Highest             uint64 // of the good frames; 0 when there is none
	Missing                    []Loss // numbers between good frames that no frame has
	Tail                       int64  // bytes at the end of a live epoch that are no frame (yet)
}

// Inspect walks the spool in dir, also that of a running agent, and changes
// nothing. visit sees each segment's frames and damaged places in order; its
// error ends the walk.
func Inspect(dir string, visit func(*Item) error) (*Report, error) {
	return inspect(osFS{}, dir, visit)
}

func inspect(fsys fileSystem, dir string, visit func(*Item) error) (*Report, error) {
	fd, err := list(fsys, dir)
	if err != nil {
		return nil, fmt.Errorf("inspect spool: %w", err)
	}
	rep := &Report{}
	for _, e := range fd.epochs {
		er := EpochReport{Epoch: e}
		in := inspector{fs: fsys, dir: dir, rep: rep, er: &er, visit: visit}
		for _, id := range fd.lanes[e] {
			if err := in.lane(id); err != nil {
				return rep, err
			}
		}
		segs := fd.segs[e]
		for i, sf := range segs {
			if err := in.segment(sf, i == len(segs)-1 && !er.Sealed); err != nil {
				return rep, err
			}
		}
		rep.Epochs = append(rep.Epochs, er)
	}
	return rep, nil
}

type inspector struct {
	fs    fileSystem
	dir   string
	rep   *Report
	er    *EpochReport
	visit func(*Item) error
	hurt  bool // damage was met since the last good frame
}

func (in *inspector) damage(name string, off, n int64, err error) error {
	in.rep.Damaged++
	in.hurt = true
	return in.visit(&Item{File: name, Offset: off, Epoch: in.er.Epoch, Damage: err, Length: n})
}

func (in *inspector) lane(id fileID) error {
	l, err := readLaneFile(in.fs, in.dir, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // forgotten meanwhile
	}
	var bad *laneError
	if errors.As(err, &bad) {
		return in.damage(id.name(laneExt), 0, laneLen, err)
	}
	if err != nil {
		return fmt.Errorf("inspect spool: %w", err)
	}
	er := in.er
	er.Made, er.Last, er.Acked, er.Evicted, er.Sealed = l.made, l.last, l.acked, l.evicted, l.sealed
	return nil
}

func (in *inspector) segment(sf segFile, newest bool) error {
	name := sf.id.name(segExt)
	f, err := in.fs.OpenFile(filepath.Join(in.dir, name), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("inspect spool: %w", err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("inspect spool: %w", err)
	}
	in.rep.Segments++
	in.rep.Bytes += size
	h := make([]byte, segHeaderLen)
	n, err := readOver(f, h, 0)
	if err != nil {
		return fmt.Errorf("inspect spool: %w", err)
	}
	if _, _, err := decodeSegmentHeader(h[:n], sf.id); err != nil {
		if err := in.damage(name, 0, segHeaderLen, err); err != nil || errors.Is(err, errVersion) {
			return err
		}
	}
	return in.frames(name, newCursor(f, sf.id.salt(), size), newest)
}

func (in *inspector) frames(name string, c *cursor, newest bool) error {
	er := in.er
	for {
		fr, next, dmg, err := c.peek()
		eof := errors.Is(err, io.EOF)
		if err != nil && !eof {
			return fmt.Errorf("inspect %s: %w", name, err)
		}
		if dmg != nil && eof && newest {
			er.Tail = dmg.len // being written, or torn: the next Open decides
		} else if dmg != nil {
			if err := in.damage(name, dmg.off, dmg.len, dmg.why); err != nil {
				return err
			}
		}
		if eof {
			return nil
		}
		if er.Highest > 0 && fr.seq > er.Highest+1 {
			er.Missing = append(er.Missing, Loss{From: er.Highest + 1, To: fr.seq - 1, Reason: Corrupt})
			if !in.hurt {
				if err := in.damage(name, c.off, 0, fmt.Errorf("numbers %d to %d are missing before it", er.Highest+1, fr.seq-1)); err != nil {
					return err
				}
			}
		}
		if er.First == 0 {
			er.First = fr.seq
		}
		it := &Item{File: name, Offset: c.off, Epoch: er.Epoch}
		if fr.to != 0 {
			it.Loss = &Loss{fr.seq, fr.to, fr.reason, string(fr.detail)}
		} else {
			it.Record = &Record{fr.seq, fr.payload, fr.crc, true}
			if fr.seq > er.Highest { // else a copy, from a segment that was given up
				er.Records++
				in.rep.Records++
			}
		}
		er.Highest, in.hurt = max(er.Highest, fr.last()), false
		if err := in.visit(it); err != nil {
			return err
		}
		c.advance(&fr, next)
	}
}

// Dump writes the spool in dir to w, a line for each entry. format makes the
// text of a payload; nil shows its length and first bytes, quoted.
func Dump(dir string, w io.Writer, format func(payload []byte) string) (*Report, error) {
	if format == nil {
		format = func(p []byte) string { return fmt.Sprintf("%d bytes %.64q", len(p), p) }
	}
	return Inspect(dir, func(it *Item) (err error) {
		switch {
		case it.Record != nil:
			_, err = fmt.Fprintf(w, "%s %d record %s\n", it.Epoch, it.Record.Seq, format(it.Record.Payload))
		case it.Loss != nil:
			_, err = fmt.Fprintf(w, "%s %d loss to %d, %s %q\n", it.Epoch, it.Loss.From, it.Loss.To, it.Loss.Reason, it.Loss.Detail)
		default:
			_, err = fmt.Fprintf(w, "%s - damage in %s at byte %d, %d bytes: %v\n", it.Epoch, it.File, it.Offset, it.Length, it.Damage)
		}
		return err
	})
}

// Verify writes to w every damaged place and every number that is missing
// between others in the spool in dir, and a line for each epoch.
func Verify(dir string, w io.Writer) (*Report, error) {
	start := time.Now()
	rep, err := Inspect(dir, func(it *Item) (err error) {
		if it.Damage != nil {
			_, err = fmt.Fprintf(w, "damage: %s at byte %d, %d bytes: %v\n", it.File, it.Offset, it.Length, it.Damage)
		}
		return err
	})
	if err != nil {
		return rep, err
	}
	for _, e := range rep.Epochs {
		for _, m := range e.Missing {
			fmt.Fprintf(w, "missing: epoch %s, %d to %d\n", e.Epoch, m.From, m.To)
		}
		state := "sealed"
		if !e.Sealed {
			state = "not sealed: live, or its agent was killed"
		}
		fmt.Fprintf(w, "epoch %s: %d records, numbers %d to %d on disk, %d made, %d acknowledged, %d gave way; %s\n",
			e.Epoch, e.Records, e.First, e.Highest, e.Made, e.Acked, e.Evicted, state)
		if e.Tail > 0 {
			fmt.Fprintf(w, "epoch %s: %d bytes at the end are no frame (yet)\n", e.Epoch, e.Tail)
		}
	}
	_, err = fmt.Fprintf(w, "%d segments, %d bytes, %d records, %d damaged places, read in %s\n",
		rep.Segments, rep.Bytes, rep.Records, rep.Damaged, time.Since(start).Round(time.Millisecond))
	return rep, err
}

package spool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"
)

// A lane is one epoch and where it stands. Spool.mu guards it, except that
// files are made and synced by Open and the committer alone.
type lane struct {
	id     fileID
	onDisk bool // it has a file
	f      file
	page   []byte // the mapped file; nil while it is not mapped

	made    uint64 // highest number given out
	last    uint64 // highest number on disk; of the own lane: synced, recorded losses included
	acked   uint64
	evicted uint64
	sealed  bool

	corruptTold uint64 // highest number counted as corrupt, so that reading twice counts once
}

// store puts a counter into the mapped page. A page of a file that someone
// truncated, or for which a copying file system finds no block, faults; the
// agent must outlive that, so a fault turns the lane's file off.
func (l *lane) store(c counter, v uint64) (err error) {
	if l.page == nil {
		return nil
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			l.page, l.onDisk = nil, false // the mapping stays: what would we gain
			err = fmt.Errorf("lane %s: store to the mapped file: %v", l.id.name(laneExt), r)
		}
	}()
	putCounter(l.page, c, v)
	return nil
}

// sync brings the counters to the disk.
func (l *lane) sync() error {
	if l.page == nil {
		return nil
	}
	return l.f.Sync()
}

func (l *lane) close() error {
	if l.f == nil {
		return nil
	}
	var err error
	if l.page != nil {
		err = l.f.Unmap(l.page)
		l.page = nil
	}
	err = errors.Join(err, l.f.Close())
	l.f = nil
	return err
}

// createLaneFile makes and maps the file of l with the counters as they are.
func createLaneFile(fsys fileSystem, dir string, l *lane) error {
	path := filepath.Join(dir, l.id.name(laneExt))
	f, err := fsys.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	b := newLaneFile(l.id, time.Now())
	for c, v := range l.counters() {
		putCounter(b, counter(c), v)
	}
	_, err = f.WriteAt(b, 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = fsys.SyncDir(dir)
	}
	var page []byte
	if err == nil {
		page, err = f.Map(laneLen)
	}
	if err != nil {
		f.Close()
		fsys.Remove(path) // may fail: what is there then is no good lane and will be rebuilt
		return err
	}
	l.f, l.page, l.onDisk = f, page, true
	return nil
}

func (l *lane) counters() [numCounters]uint64 {
	c := [numCounters]uint64{cMade: l.made, cLast: l.last, cAcked: l.acked, cEvicted: l.evicted}
	if l.sealed {
		c[cSealed] = 1
	}
	return c
}

// readLaneFile reads an earlier epoch's counters. Those that fail their check are 0.
func readLaneFile(fsys fileSystem, dir string, id fileID) (*lane, error) {
	f, err := fsys.OpenFile(filepath.Join(dir, id.name(laneExt)), os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, laneLen)
	n, err := readOver(f, b, 0)
	if err != nil {
		return nil, err
	}
	if err := checkLaneFile(b[:n], id); err != nil {
		return nil, &laneError{err}
	}
	var v [numCounters]uint64
	var ok [numCounters]bool
	for c := range numCounters {
		if v[c], ok[c] = loadCounter(b, c); !ok[c] {
			v[c] = 0
		}
	}
	l := &lane{id: id, onDisk: true, made: v[cMade], last: v[cLast], acked: v[cAcked], evicted: v[cEvicted]}
	// Only a lane whose ends are both known needs no second look.
	l.sealed = v[cSealed] == 1 && ok[cMade] && ok[cLast] && l.last <= l.made
	return l, nil
}

// A laneError says that a lane's file is there and is no good lane.
type laneError struct{ error }

func (e *laneError) Unwrap() error { return e.error }

// mapFile maps the file of an earlier epoch, which is done only once its
// counters change: there may be many.
func (l *lane) mapFile(fsys fileSystem, dir string) error {
	if l.page != nil || !l.onDisk {
		return nil
	}
	f, err := fsys.OpenFile(filepath.Join(dir, l.id.name(laneExt)), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if n, err := f.Size(); err != nil || n < laneLen {
		f.Close()
		return fmt.Errorf("lane of %d bytes, want %d: %w", n, laneLen, err)
	}
	page, err := f.Map(laneLen)
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.page = f, page
	return nil
}

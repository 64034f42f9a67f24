// Package ndjson appends every record to a file, one JSON object per line.
//
// The file holds every record exactly once, in order, also after kill -9 or a
// power cut: lines are synced before the cursor moves, and at the start the
// file's tail says what it has. A torn last line is cut off. When somebody
// moves the file away or removes it, a new one is begun; between the two each
// record is once as well, unless the collector was killed in the moments
// between a write and its cursor and the file was moved before the next start.
//
// When the disk is full, what was written in part is taken back and tried
// again. While a sink has the file it is locked (flock) against another one.
package ndjson

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/wholefile"
)

// tailBytes is how far back the last line with an id is looked for. One line
// can have several megabytes: an alert of the largest size, bytes in base64.
const tailBytes = 16 << 20

// A File is a sink.Sink.
type File struct {
	path    string
	cluster string
	f       *os.File
	torn    int64 // where a failed write began; -1 when the file is whole
	buf     []byte
}

var (
	_ sink.Sink    = (*File)(nil)
	_ sink.Resumer = (*File)(nil)
)

// Open opens or makes the file (mode 0600). It must be a regular file.
func Open(path, cluster string) (*File, error) {
	n := &File{path: path, cluster: cluster, torn: -1}
	return n, n.open()
}

func (n *File) open() error {
	// O_NONBLOCK: opening a FIFO would wait for its reader.
	f, err := os.OpenFile(n.path, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return fmt.Errorf("open the NDJSON file: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err == nil {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another process writes to it")
		}
	}
	if err == nil {
		err = wholefile.SyncDir(filepath.Dir(n.path))
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("open the NDJSON file %s: %w", n.path, err)
	}
	n.f, n.torn = f, -1
	return nil
}

// Close closes the file.
func (n *File) Close() error {
	if n.f == nil {
		return nil
	}
	f := n.f
	n.f = nil
	return f.Close()
}

// Deliver implements sink.Sink.
func (n *File) Deliver(ctx context.Context, recs []store.Record) error {
	if err := n.reopen(); err != nil {
		return err
	}
	if err := n.mend(); err != nil {
		return err
	}
	n.buf = n.buf[:0]
	for i := range recs {
		n.buf = append(sink.AppendJSON(n.buf, n.cluster, &recs[i]), '\n')
	}
	st, err := n.f.Stat()
	if err != nil {
		return fmt.Errorf("write alerts to %s: %w", n.path, err)
	}
	// From here on the file is torn until the sync has worked. After a failed
	// sync the kernel may have dropped the pages and call the next one good:
	// so everything is taken back and written again.
	n.torn = st.Size()
	if _, err := n.f.Write(n.buf); err != nil {
		return errors.Join(fmt.Errorf("write alerts to the NDJSON file: %w", err), n.mend())
	}
	if err := n.f.Sync(); err != nil {
		return errors.Join(fmt.Errorf("sync the NDJSON file: %w", err), n.mend())
	}
	n.torn = -1
	if cap(n.buf) > 8<<20 {
		n.buf = nil
	}
	return nil
}

// mend takes back what a failed write left.
func (n *File) mend() error {
	if n.torn < 0 {
		return nil
	}
	if err := n.f.Truncate(n.torn); err != nil {
		return fmt.Errorf("take back a torn write to %s: %w", n.path, err)
	}
	n.torn = -1
	return nil
}

// reopen begins a new file when the path no longer names the one we have.
func (n *File) reopen() error {
	if n.f == nil {
		return n.open()
	}
	here, err := n.f.Stat()
	if err != nil {
		return fmt.Errorf("look at the NDJSON file: %w", err)
	}
	there, err := os.Stat(n.path)
	if err == nil && os.SameFile(here, there) {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look at the NDJSON file: %w", err)
	}
	// What failed before belongs into the new file.
	if err := n.mend(); err != nil {
		return err
	}
	old := n.f
	if err := n.open(); err != nil {
		return err
	}
	return old.Close()
}

// Resume implements sink.Resumer: it cuts what a crash left in pieces, and
// finds the last record above from that the file has.
func (n *File) Resume(ctx context.Context, from int64, read sink.ReadFunc) (int64, error) {
	if err := n.reopen(); err != nil {
		return 0, err
	}
	lines, err := n.tail()
	if err != nil {
		return 0, fmt.Errorf("read the end of %s: %w", n.path, err)
	}
	if len(lines) == 0 {
		return from, nil
	}
	index := make(map[string]int, len(lines))
	for i, l := range lines {
		if l.id != "" {
			index[l.id] = i
		}
	}
	w := walk{id: func(r *store.Record) string { return r.ID(n.cluster) }, read: read}
	next, err := w.first(ctx, from, index)
	if err != nil {
		return 0, err
	}
	if next < 0 && lines[0].start == 0 && lines[0].id == "" {
		next = 0 // the very first line did not make it
	}
	if next < 0 {
		// The cursor is further back than the tail, as when the store took no
		// cursors while the file took alerts; or the file is another store's.
		return w.find(ctx, from, lines[len(lines)-1].id)
	}
	at, bad, err := w.match(ctx, from, lines[next:])
	if err != nil || bad < 0 {
		return at, err
	}
	// A power cut can lose a line and keep a later one: writes reach the disk
	// in any order before the sync. Nothing from there on was acknowledged to
	// the runner; it all comes again.
	if err := n.cut(lines[next+bad].start); err != nil {
		return 0, fmt.Errorf("cut the broken end of %s: %w", n.path, err)
	}
	return at, nil
}

// A line is a whole line of the file; its id is empty if it is not ours.
type line struct {
	start int64
	id    string
}

// tail cuts a torn last line and reads the last whole ones.
func (n *File) tail() ([]line, error) {
	st, err := n.f.Stat()
	if err != nil {
		return nil, err
	}
	size := st.Size()
	tail := make([]byte, min(size, tailBytes))
	base := size - int64(len(tail))
	if _, err := io.ReadFull(io.NewSectionReader(n.f, base, int64(len(tail))), tail); err != nil {
		return nil, err
	}
	end := bytes.LastIndexByte(tail, '\n') + 1
	if end == 0 && base > 0 {
		return nil, fmt.Errorf("no line ends in the last %d bytes: not an NDJSON file of this collector", len(tail))
	}
	if end < len(tail) {
		if err := n.cut(base + int64(end)); err != nil {
			return nil, fmt.Errorf("cut the torn last line: %w", err)
		}
	}
	pos := 0
	if base > 0 { // begins within a line
		pos = bytes.IndexByte(tail, '\n') + 1
	}
	var lines []line
	for pos < end {
		l := tail[pos : pos+bytes.IndexByte(tail[pos:], '\n')]
		var head struct {
			ID string `json:"id"`
		}
		if json.Unmarshal(l, &head) != nil {
			head.ID = ""
		}
		lines = append(lines, line{base + int64(pos), head.ID})
		pos += len(l) + 1
	}
	return lines, nil
}

func (n *File) cut(at int64) error {
	if err := n.f.Truncate(at); err != nil {
		return err
	}
	return n.f.Sync()
}

// A walk goes through the store's records beside the file's lines.
type walk struct {
	id   func(*store.Record) string
	read sink.ReadFunc
	recs []store.Record
}

// first is the line where the record above from is, or would be; -1 if the
// tail does not reach there.
func (w *walk) first(ctx context.Context, from int64, index map[string]int) (_ int, err error) {
	// The record at from may be there no more: then this is one above it.
	if w.recs, err = w.read(ctx, w.recs[:0], from-1, 2); err != nil {
		return 0, err
	}
	for i := range w.recs {
		before := w.recs[i].Cursor <= from
		if at, ok := index[w.id(&w.recs[i])]; ok {
			if before {
				at++
			}
			return at, nil
		}
		if !before {
			break
		}
	}
	return -1, nil
}

// match goes on from the cursor as long as the lines are those of the records.
// bad is the line that is no JSON of ours at all, -1 if there is none.
func (w *walk) match(ctx context.Context, from int64, lines []line) (at int64, bad int, err error) {
	at = from
	for i := 0; i < len(lines); {
		if w.recs, err = w.read(ctx, w.recs[:0], at, 256); err != nil {
			return 0, -1, err
		}
		if len(w.recs) == 0 {
			return at, -1, nil
		}
		for j := range w.recs {
			switch {
			case i == len(lines):
				return at, -1, nil
			case lines[i].id == "":
				return at, i, nil
			case lines[i].id != w.id(&w.recs[j]):
				return at, -1, nil // evidence of another store: not ours to cut
			}
			at = w.recs[j].Cursor
			i++
		}
	}
	return at, -1, nil
}

// find looks for the record with an id above from.
func (w *walk) find(ctx context.Context, from int64, id string) (_ int64, err error) {
	for at := from; id != ""; {
		if w.recs, err = w.read(ctx, w.recs[:0], at, 256); err != nil {
			return 0, err
		}
		if len(w.recs) == 0 {
			break
		}
		for i := range w.recs {
			if w.id(&w.recs[i]) == id {
				return w.recs[i].Cursor, nil
			}
		}
		at = w.recs[len(w.recs)-1].Cursor
	}
	return from, nil
}

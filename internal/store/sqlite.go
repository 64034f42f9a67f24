package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// File names in the state directory.
const (
	dbFile   = "alerts.db"
	lockFile = "collector.lock"
)

// readers is how many reads run beside each other and beside the writer.
const readers = 4

// readBytes ends a Read early: payloads beyond it wait for the next one.
const readBytes = 4 << 20

// SQLite is the Store in one file of the state directory.
//
// Write-ahead log and synchronous=FULL: a commit is one append and one sync of
// the log. NORMAL would not sync there, and lose acknowledged alerts with the
// power. There is one writing connection; reads have their own and never wait
// for it.
type SQLite struct {
	lock *os.File
	w    *sql.DB
	conn *sql.Conn // the only user of w
	r    *sql.DB
	now  func() time.Time

	begin, commit, rollback            *sql.Stmt
	insert, getMark, putMark, openMark *sql.Stmt
	dropMark, putSink                  *sql.Stmt
	read, head, getSink                *sql.Stmt
}

var _ Store = (*SQLite)(nil)

// OpenSQLite opens or makes the database in dir, which is made if missing
// (mode 0700). It refuses network file systems, where neither the log's shared
// memory nor locks can be relied on, and a directory another process uses
// (ErrInUse).
func OpenSQLite(ctx context.Context, dir string) (_ *SQLite, err error) {
	// Asked first too: a file system of others may not even let us look.
	if err := refuseNetwork(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	if err := refuseNetwork(dir); err != nil {
		return nil, err
	}
	s := &SQLite{now: time.Now}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.lock, err = lockDir(dir); err != nil {
		return nil, err
	}
	path, err := filepath.Abs(filepath.Join(dir, dbFile))
	if err != nil {
		return nil, err
	}
	// Made here for its mode: SQLite gives its log and index the same one.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	f.Close()
	if s.w, err = sql.Open("sqlite", dsn(path, "journal_mode(WAL)", "synchronous(FULL)", "journal_size_limit(67108864)")); err != nil {
		return nil, dbError(path, err)
	}
	s.w.SetMaxOpenConns(1)
	if s.conn, err = s.w.Conn(ctx); err != nil {
		return nil, dbError(path, err)
	}
	if err := migrate(ctx, s.conn); err != nil {
		return nil, dbError(path, err)
	}
	if s.r, err = sql.Open("sqlite", dsn(path, "query_only(1)")); err != nil {
		return nil, dbError(path, err)
	}
	s.r.SetMaxOpenConns(readers)
	s.r.SetMaxIdleConns(readers)
	if err := s.prepare(ctx); err != nil {
		return nil, dbError(path, err)
	}
	return s, syncDir(dir)
}

func dsn(path string, pragmas ...string) string {
	q := url.Values{"_busy_timeout": {"5000"}, "_pragma": pragmas}
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + q.Encode()
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("state directory %s: %w", dir, ErrInUse)
		}
		return nil, fmt.Errorf("lock the state directory %s: %w", dir, err)
	}
	return f, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Close ends the store. No method may run or follow.
func (s *SQLite) Close() error {
	var errs []error
	for _, st := range []*sql.Stmt{s.begin, s.commit, s.rollback, s.insert, s.getMark, s.putMark, s.openMark,
		s.dropMark, s.putSink, s.read, s.head, s.getSink} {
		if st != nil {
			errs = append(errs, st.Close())
		}
	}
	if s.r != nil {
		errs = append(errs, s.r.Close())
	}
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
	}
	if s.w != nil {
		errs = append(errs, s.w.Close())
	}
	if s.lock != nil { // last: only now may another collector have the files
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

const recordColumns = `node, epoch, seq, seq_to, kind, severity, rule, event_time, received, committed, loss_reason, reason, payload, crc32c`

func (s *SQLite) prepare(ctx context.Context) error {
	type prep interface {
		PrepareContext(context.Context, string) (*sql.Stmt, error)
	}
	for _, p := range []struct {
		on  prep
		to  **sql.Stmt
		sql string
	}{
		{s.conn, &s.begin, `BEGIN IMMEDIATE`},
		{s.conn, &s.commit, `COMMIT`},
		{s.conn, &s.rollback, `ROLLBACK`},
		{s.conn, &s.insert, `INSERT INTO record(` + recordColumns + `) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?)`},
		{s.conn, &s.getMark, `SELECT up_to, made, ord, ended FROM mark WHERE node=? AND epoch=?`},
		{s.conn, &s.putMark, `INSERT INTO mark(node, epoch, up_to, made, ended, seen, ord)
			VALUES(?,?,?,?,?,?,(SELECT coalesce(max(ord),0)+1 FROM mark WHERE node=?1))
			ON CONFLICT(node, epoch) DO UPDATE SET up_to=excluded.up_to, made=excluded.made, ended=excluded.ended, seen=excluded.seen`},
		{s.conn, &s.openMark, `SELECT epoch, up_to, made, ord FROM mark WHERE node=? AND ended=0 AND ord<?`},
		{s.conn, &s.dropMark, `DELETE FROM mark WHERE node=? AND ended=1 AND seen<?`},
		{s.conn, &s.putSink, `INSERT INTO sink(name, cursor, moved) VALUES(?,?,?)
			ON CONFLICT(name) DO UPDATE SET cursor=excluded.cursor, moved=excluded.moved`},
		{s.r, &s.read, `SELECT id, ` + recordColumns + ` FROM record WHERE id>? ORDER BY id LIMIT ?`},
		{s.r, &s.head, `SELECT coalesce(max(seq),0) FROM sqlite_sequence WHERE name='record'`},
		{s.r, &s.getSink, `SELECT cursor FROM sink WHERE name=?`},
	} {
		st, err := p.on.PrepareContext(ctx, p.sql)
		if err != nil {
			return fmt.Errorf("prepare %.40q: %w", p.sql, err)
		}
		*p.to = st
	}
	return nil
}

// Commit implements Store. It must not be called from two goroutines at once;
// Queue is its one caller.
func (s *SQLite) Commit(ctx context.Context, changes []Change) (_ []Result, err error) {
	for _, c := range changes {
		if err := check(c); err != nil {
			return nil, err
		}
	}
	ctx = context.WithoutCancel(ctx) // half a commit is of no use to anybody
	if _, err := s.begin.ExecContext(ctx); err != nil {
		return nil, dbError("begin", err)
	}
	defer func() {
		if err == nil {
			return
		}
		// A failed COMMIT may or may not have ended the transaction.
		if _, rerr := s.rollback.ExecContext(ctx); rerr != nil && !noTransaction(rerr) {
			err = errors.Join(err, dbError("rollback", rerr))
		}
	}()
	now := s.now()
	results := make([]Result, len(changes))
	for i, c := range changes {
		if results[i], err = s.apply(ctx, c, now); err != nil {
			return nil, dbError("commit", err)
		}
	}
	if _, err := s.commit.ExecContext(ctx); err != nil {
		return nil, dbError("commit", err)
	}
	return results, nil
}

func (s *SQLite) apply(ctx context.Context, c Change, now time.Time) (Result, error) {
	switch c := c.(type) {
	case *Batch:
		return s.applyBatch(ctx, c, now)
	case *Hello:
		return s.applyHello(ctx, c, now)
	case *Heard:
		m, err := s.mark(ctx, c.Node, c.Epoch)
		// Once the agent has started anew its old stream has nothing to tell:
		// what it made is settled.
		if err != nil || m.ended || m.known && m.made >= c.Made {
			return Result{}, err
		}
		m.made = max(m.made, c.Made)
		return Result{}, s.setMark(ctx, c.Node, c.Epoch, m, c.At)
	case *SinkMoved:
		_, err := s.putSink.ExecContext(ctx, c.Sink, c.Cursor, now.UnixNano())
		return Result{}, err
	}
	return Result{}, fmt.Errorf("unknown change %T", c)
}

func (s *SQLite) applyBatch(ctx context.Context, b *Batch, now time.Time) (res Result, err error) {
	m, err := s.mark(ctx, b.Node, b.Epoch)
	if err != nil {
		return res, err
	}
	fresh, duplicates, err := fence(b, m.upTo)
	if err != nil {
		return Result{Err: err, UpTo: m.upTo}, nil
	}
	res.Duplicates = duplicates
	for i := range fresh {
		r := fresh[i]
		r.Node, r.Epoch, r.Received, r.Committed = b.Node, b.Epoch, b.Received, now
		r.Seq = max(r.Seq, m.upTo+1) // a loss that reaches behind the mark
		if err := s.add(ctx, &r, &res); err != nil {
			return res, err
		}
		m.upTo = r.To
	}
	res.UpTo = m.upTo
	if len(fresh) == 0 {
		return res, nil
	}
	m.made = max(m.made, m.upTo)
	return res, s.setMark(ctx, b.Node, b.Epoch, m, b.Received)
}

// forget is how long the mark of an ended epoch is kept after the agent's
// spool no longer named it.
const forget = 90 * 24 * time.Hour

func (s *SQLite) applyHello(ctx context.Context, h *Hello, now time.Time) (res Result, err error) {
	last := len(h.Lanes) - 1
	listed := make(map[Epoch]bool, len(h.Lanes))
	var running mark
	for i, l := range h.Lanes {
		listed[l.Epoch] = true
		m, err := s.mark(ctx, h.Node, l.Epoch)
		if err != nil {
			return res, err
		}
		if i < last && !m.ended {
			if err := s.endEpoch(ctx, h.Node, l.Epoch, &m, l.Made, now, &res); err != nil {
				return res, err
			}
		}
		m.made = max(m.made, l.Made)
		if err := s.setMark(ctx, h.Node, l.Epoch, m, h.At); err != nil {
			return res, err
		}
		res.Marks = append(res.Marks, m.upTo)
	}
	if running, err = s.mark(ctx, h.Node, h.Lanes[last].Epoch); err != nil {
		return res, err
	}
	if !h.Whole {
		return res, nil
	}
	// Epochs the spool no longer names held nothing more on disk. Only those
	// first heard of before the running one: a late Hello of an old process
	// must not end its successor.
	open, err := s.openMarks(ctx, h.Node, running.order)
	if err != nil {
		return res, err
	}
	for e, m := range open {
		if listed[e] {
			continue
		}
		if err := s.endEpoch(ctx, h.Node, e, &m, 0, now, &res); err != nil {
			return res, err
		}
		if err := s.setMark(ctx, h.Node, e, m, h.At); err != nil {
			return res, err
		}
	}
	_, err = s.dropMark.ExecContext(ctx, h.Node, now.Add(-forget).UnixNano())
	return res, err
}

// endEpoch notes that the agent has started anew, and tells what was given out
// in the epoch and never reached the agent's disk.
func (s *SQLite) endEpoch(ctx context.Context, node string, e Epoch, m *mark, held uint64, now time.Time, res *Result) error {
	m.ended = true
	from, to, lost := m.tail(held)
	if !lost {
		return nil
	}
	return s.add(ctx, &Record{
		Node: node, Epoch: e, Seq: from, To: to, Kind: Loss,
		LossReason: pb.LossReason_LOSS_REASON_CRASH,
		Reason:     fmt.Sprintf("the agent had given out %d and was started anew; its spool ends at %d", to, from-1),
		Received:   now, Committed: now,
	}, res)
}

func (s *SQLite) add(ctx context.Context, r *Record, res *Result) error {
	switch r.Kind {
	case Alert, Amendment, Coverage:
		res.Items++
	case Rejected:
		res.Rejected++
	case Loss:
		res.Losses++
		res.LostSeqs += r.To - r.Seq + 1
	default:
		return fmt.Errorf("a record of kind %v cannot be stored", r.Kind)
	}
	_, err := s.insert.ExecContext(ctx, r.Node, r.Epoch[:], int64(r.Seq), int64(r.To), int64(r.Kind), int64(r.Severity), r.Rule,
		nanos(r.EventTime), nanos(r.Received), nanos(r.Committed), int64(r.LossReason), r.Reason, r.Payload, int64(r.CRC32C))
	return err
}

func (s *SQLite) mark(ctx context.Context, node string, e Epoch) (m mark, err error) {
	var upTo, made int64
	err = s.getMark.QueryRowContext(ctx, node, e[:]).Scan(&upTo, &made, &m.order, &m.ended)
	if errors.Is(err, sql.ErrNoRows) {
		return mark{}, nil
	}
	m.known, m.upTo, m.made = true, uint64(upTo), uint64(made)
	return m, err
}

func (s *SQLite) setMark(ctx context.Context, node string, e Epoch, m mark, seen time.Time) error {
	_, err := s.putMark.ExecContext(ctx, node, e[:], int64(m.upTo), int64(m.made), m.ended, nanos(seen))
	return err
}

func (s *SQLite) openMarks(ctx context.Context, node string, below int64) (_ map[Epoch]mark, err error) {
	rows, err := s.openMark.QueryContext(ctx, node, below)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	open := make(map[Epoch]mark)
	for rows.Next() {
		var b []byte
		var upTo, made int64
		m := mark{known: true}
		if err := rows.Scan(&b, &upTo, &made, &m.order); err != nil {
			return nil, err
		}
		e, err := ParseEpoch(b)
		if err != nil {
			return nil, fmt.Errorf("epoch of a mark: %w", err)
		}
		m.upTo, m.made = uint64(upTo), uint64(made)
		open[e] = m
	}
	return open, rows.Err()
}

// Read implements Store.
func (s *SQLite) Read(ctx context.Context, dst []Record, after int64, limit int) (_ []Record, err error) {
	rows, err := s.read.QueryContext(ctx, after, limit)
	if err != nil {
		return dst, dbError("read", err)
	}
	defer rows.Close()
	size := 0
	for size < readBytes && rows.Next() {
		var r Record
		var epoch []byte
		var seq, to, kind, event, received, committed, crc int64
		if err := rows.Scan(&r.Cursor, &r.Node, &epoch, &seq, &to, &kind, &r.Severity, &r.Rule, &event, &received, &committed,
			&r.LossReason, &r.Reason, &r.Payload, &crc); err != nil {
			return dst, dbError("read", err)
		}
		r.Seq, r.To, r.Kind, r.CRC32C = uint64(seq), uint64(to), Kind(kind), uint32(crc)
		r.EventTime, r.Received, r.Committed = fromNanos(event), fromNanos(received), fromNanos(committed)
		var bad error
		if r.Epoch, bad = ParseEpoch(epoch); bad == nil && Checksum(r.Payload) != r.CRC32C {
			bad = fmt.Errorf("checksum %08x, was stored with %08x", Checksum(r.Payload), r.CRC32C)
		}
		if bad != nil {
			r.Kind, r.Reason = Damaged, "the disk gave back other bytes than were stored: "+bad.Error()
		}
		dst = append(dst, r)
		size += len(r.Payload)
	}
	if err := rows.Err(); err != nil {
		return dst, dbError("read", err)
	}
	return dst, nil
}

// Head implements Store.
func (s *SQLite) Head(ctx context.Context) (n int64, err error) {
	if err := s.head.QueryRowContext(ctx).Scan(&n); err != nil {
		return 0, dbError("read", err)
	}
	return n, nil
}

// SinkCursor implements Store.
func (s *SQLite) SinkCursor(ctx context.Context, sink string) (n int64, ok bool, err error) {
	err = s.getSink.QueryRowContext(ctx, sink).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, dbError("read", err)
	}
	return n, true, nil
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// dbError says what was being done, and turns SQLite's codes into the
// package's errors.
func dbError(doing string, err error) error {
	if errors.Is(err, driver.ErrBadConn) {
		return fmt.Errorf("%s: the database connection is gone: %w", doing, err)
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_FULL:
		return fmt.Errorf("%s: %w: %w", doing, ErrFull, err)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return fmt.Errorf("%s: %w: %w", doing, ErrDamaged, err)
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM:
		return fmt.Errorf("%s: %w: %w", doing, fs.ErrPermission, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// noTransaction: ROLLBACK outside of a transaction is SQLITE_ERROR and has no
// code of its own.
func noTransaction(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && e.Code()&0xff == sqlite3.SQLITE_ERROR
}

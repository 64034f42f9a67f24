package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/procession-dev/procession/internal/wholefile"
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
	core
	path string // of the database
	lock *os.File
	wdb  *sql.DB
	conn *sql.Conn // the only user of wdb
	rdb  *sql.DB

	begin, commit, rollback  *sql.Stmt
	insert, getMark, putMark *sql.Stmt
	read                     *sql.Stmt
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
	s := &SQLite{core: core{now: time.Now, bind: func(q string) string { return q }, watched: make(map[string]watched)}}
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
	s.path = path
	// Made here for its mode: SQLite gives its log and index the same one.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	f.Close()
	// auto_vacuum comes first: it can only be set while the file is empty.
	if s.wdb, err = sql.Open("sqlite", dsn(path, "auto_vacuum(INCREMENTAL)", "journal_mode(WAL)", "synchronous(FULL)", "journal_size_limit(67108864)")); err != nil {
		return nil, dbError(path, err)
	}
	s.wdb.SetMaxOpenConns(1)
	if s.conn, err = s.wdb.Conn(ctx); err != nil {
		return nil, dbError(path, err)
	}
	if err := migrate(ctx, s.conn); err != nil {
		return nil, dbError(path, err)
	}
	if s.rdb, err = sql.Open("sqlite", dsn(path, "query_only(1)")); err != nil {
		return nil, dbError(path, err)
	}
	s.rdb.SetMaxOpenConns(readers)
	s.rdb.SetMaxIdleConns(readers)
	s.w, s.r = s.conn, s.rdb
	if err := s.prepare(ctx); err != nil {
		return nil, dbError(path, err)
	}
	return s, wholefile.SyncDir(dir)
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

// Close ends the store. No method may run or follow.
func (s *SQLite) Close() error {
	var errs []error
	for _, st := range []*sql.Stmt{s.begin, s.commit, s.rollback, s.insert, s.getMark, s.putMark, s.read} {
		if st != nil {
			errs = append(errs, st.Close())
		}
	}
	if s.rdb != nil {
		errs = append(errs, s.rdb.Close())
	}
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
	}
	if s.wdb != nil {
		errs = append(errs, s.wdb.Close())
	}
	if s.lock != nil { // last: only now may another collector have the files
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

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
		{s.conn, &s.getMark, selectMark},
		{s.conn, &s.putMark, upsertMark},
		{s.rdb, &s.read, selectRecords},
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
	p := newPlan(s, now)
	results, err := applyAll(ctx, p, changes, func(c Change) (Result, error) { return s.other(ctx, c, now) })
	if err == nil {
		err = s.write(ctx, p)
	}
	if err != nil {
		return nil, dbError("commit", err)
	}
	if _, err := s.commit.ExecContext(ctx); err != nil {
		return nil, dbError("commit", err)
	}
	for i := range results {
		if results[i].Trimmed > 0 {
			s.vacuum(ctx)
			break
		}
	}
	return results, nil
}

// Backup writes the database, as it is at one moment, into a new file, while
// commits and reads go on. The file is a database like alerts.db.
func (s *SQLite) Backup(ctx context.Context, file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // for its mode, and to take nobody else's
	if err != nil {
		return err
	}
	f.Close()
	db, err := sql.Open("sqlite", dsn(s.path)) // the readers may write nothing, not even elsewhere
	if err != nil {
		return err
	}
	defer db.Close()
	// VACUUM INTO takes an empty file.
	if _, err := db.ExecContext(ctx, `VACUUM INTO ?`, file); err != nil {
		os.Remove(file)
		return dbError("back up", err)
	}
	if f, err = os.OpenFile(file, os.O_RDWR, 0); err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close(), wholefile.SyncDir(filepath.Dir(file)))
}

// RestoreSQLite puts a backup in the place of the database in dir, which nobody
// may use, and keeps that one beside it. The backup is checked before. It
// returns the cursor of the newest record.
func RestoreSQLite(ctx context.Context, dir, file string) (head int64, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	if err := checkBackup(ctx, file); err != nil {
		return 0, err
	}
	path := filepath.Join(dir, dbFile)
	tmp := path + ".restoring"
	if err := copyFile(tmp, file); err != nil {
		return 0, err
	}
	// The log belongs to the file beside it: together, or the old log would be
	// played into the new file.
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(path+suffix, path+".before-restore"+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
	}
	if err := os.Rename(tmp, path); err != nil {
		return 0, err
	}
	if err := wholefile.SyncDir(dir); err != nil {
		return 0, err
	}
	lock.Close()
	st, err := OpenSQLite(ctx, dir)
	if err != nil {
		return 0, err
	}
	head, err = st.Head(ctx)
	return head, errors.Join(err, st.Close())
}

// checkBackup refuses what is no whole database of ours.
func checkBackup(ctx context.Context, file string) error {
	path, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil { // SQLite would make it
		return err
	}
	db, err := sql.Open("sqlite", dsn(path, "query_only(1)"))
	if err != nil {
		return err
	}
	defer db.Close()
	var app int
	var check string
	if err := db.QueryRowContext(ctx, `SELECT (SELECT application_id FROM pragma_application_id), (SELECT quick_check FROM pragma_quick_check LIMIT 1)`).Scan(&app, &check); err != nil {
		return dbError(file, err)
	}
	if app != applicationID {
		return fmt.Errorf("%s: not a database of this collector", file)
	}
	if check != "ok" {
		return fmt.Errorf("%s: %w: %s", file, ErrDamaged, check)
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}

// vacuum gives some pages of removed records back to the file system. That it
// fails, as on a full disk, costs nothing: they are used again.
func (s *SQLite) vacuum(ctx context.Context) {
	s.conn.ExecContext(ctx, `PRAGMA incremental_vacuum(4096)`)
}

// write puts what was planned into the open transaction.
func (s *SQLite) write(ctx context.Context, p *plan) error {
	for i := range p.records {
		r := &p.records[i]
		if _, err := s.insert.ExecContext(ctx, r.Node, r.Epoch[:], int64(r.Seq), int64(r.To), int64(r.Kind), int64(r.Severity), r.Rule,
			nanos(r.EventTime), nanos(r.Received), nanos(r.Committed), int64(r.LossReason), r.Reason, r.Payload, int64(r.CRC32C)); err != nil {
			return err
		}
	}
	for l, m := range p.marks {
		if !m.dirty {
			continue
		}
		res, err := s.putMark.ExecContext(ctx, l.node, l.epoch[:], int64(m.upTo), int64(m.made), number(m.ended), nanos(m.seen), m.order, int64(m.was))
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n != 1 {
			return fmt.Errorf("mark of node %s changed meanwhile: %w", l.node, err)
		}
	}
	return s.writeRest(ctx, p)
}

// mark implements marks.
func (s *SQLite) mark(ctx context.Context, l lane) (mark, error) {
	return scanMark(s.getMark.QueryRowContext(ctx, l.node, l.epoch[:]))
}

// Read implements Store.
func (s *SQLite) Read(ctx context.Context, dst []Record, after int64, limit int) (_ []Record, err error) {
	rows, err := s.read.QueryContext(ctx, after, limit)
	if err != nil {
		return dst, dbError("read", err)
	}
	return scanRecords(dst, rows)
}

// Head implements Store.
func (s *SQLite) Head(ctx context.Context) (n int64, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT coalesce(max(seq),0) FROM sqlite_sequence WHERE name='record'`).Scan(&n)
	return n, dbError("read", err)
}

// Size implements Store.
func (s *SQLite) Size(ctx context.Context) (used, free int64, err error) {
	var pages, unused, size int64
	err = s.r.QueryRowContext(ctx, `SELECT (SELECT page_count FROM pragma_page_count), (SELECT freelist_count FROM pragma_freelist_count),
		(SELECT page_size FROM pragma_page_size)`).Scan(&pages, &unused, &size)
	return (pages - unused) * size, unused * size, dbError("read", err)
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
	if err == nil {
		return nil
	}
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		return fmt.Errorf("%s: %w", doing, pgError(pg))
	}
	if errors.Is(err, driver.ErrBadConn) {
		return fmt.Errorf("%s: the database connection is gone: %w", doing, err)
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	code := e.Code() & 0xff
	if e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE { // the index of the log cannot grow
		code = sqlite3.SQLITE_FULL
	}
	switch code {
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

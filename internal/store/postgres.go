package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

// Postgres is the Store in a PostgreSQL database that several collectors share.
//
// Every commit locks the one row of table head first. That puts the commits of
// all collectors one behind the other, so that an agent may change collectors
// at any time and meets the same fence, and gives out cursors: a reader that
// has seen a cursor will never see a lower one appear. Marks are written on the
// condition that they are still what was read.
type Postgres struct {
	core
	wdb *sql.DB
	rdb *sql.DB
}

var _ Store = (*Postgres)(nil)

// commitLimit bounds a commit whose server does not answer.
const commitLimit = time.Minute

// OpenPostgres connects to the database of a connection string (URL or
// key=value) and makes its tables if they are missing. It refuses a server that
// does not sync what it commits.
func OpenPostgres(ctx context.Context, dsn string) (_ *Postgres, err error) {
	conf, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, errors.New("database: not a PostgreSQL connection string") // err has it, with its password
	}
	if conf.ConnectTimeout == 0 {
		conf.ConnectTimeout = 10 * time.Second
	}
	conf.RuntimeParams["application_name"] = "procession-collector"
	sync := stdlib.OptionAfterConnect(func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') IN ('off', 'local')`)
		return err
	})
	p := &Postgres{core: core{now: time.Now, bind: dollars, watched: make(map[string]watched)}, wdb: stdlib.OpenDB(*conf, sync), rdb: stdlib.OpenDB(*conf, sync)}
	p.r = p.rdb
	p.wdb.SetMaxOpenConns(1)
	p.rdb.SetMaxOpenConns(readers)
	p.rdb.SetMaxIdleConns(readers)
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	var fsync string
	if err := p.rdb.QueryRowContext(ctx, `SHOW fsync`).Scan(&fsync); err != nil {
		return nil, dbError("connect to the database", err)
	}
	if fsync != "on" {
		return nil, errors.New("database: the server runs with fsync=off: what it commits would not survive a power cut")
	}
	return p, dbError("make the tables", p.migrate(ctx))
}

// Close ends the store. No method may run or follow.
func (p *Postgres) Close() error { return errors.Join(p.rdb.Close(), p.wdb.Close()) }

// dollars writes the nth ? as $n. No statement has one in a text.
func dollars(query string) string {
	var b strings.Builder
	n := 0
	for part := range strings.SplitSeq(query, "?") {
		if n++; n > 1 {
			b.WriteByte('$')
			b.WriteString(strconv.Itoa(n - 1))
		}
		b.WriteString(part)
	}
	return b.String()
}

// migrationLock keeps collectors that start together from making the tables
// together.
const migrationLock = 0x50726353

// pgMigrations bring the database from version i to i+1; see migrations.
var pgMigrations = []string{
	`CREATE TABLE head(last BIGINT NOT NULL, bytes BIGINT NOT NULL);
	INSERT INTO head VALUES(0, 0);
	CREATE TABLE record(
		id          BIGINT PRIMARY KEY,
		node        TEXT NOT NULL,
		epoch       BYTEA NOT NULL,
		seq         BIGINT NOT NULL,
		seq_to      BIGINT NOT NULL,
		kind        BIGINT NOT NULL,
		severity    BIGINT NOT NULL,
		rule        TEXT NOT NULL,
		event_time  BIGINT NOT NULL,
		received    BIGINT NOT NULL,
		committed   BIGINT NOT NULL,
		loss_reason BIGINT NOT NULL,
		reason      TEXT NOT NULL,
		payload     BYTEA,
		crc32c      BIGINT NOT NULL
	);
	CREATE TABLE mark(
		node  TEXT NOT NULL,
		epoch BYTEA NOT NULL,
		up_to BIGINT NOT NULL,
		made  BIGINT NOT NULL,
		ended BIGINT NOT NULL,
		seen  BIGINT NOT NULL,
		ord   BIGINT NOT NULL,
		PRIMARY KEY(node, epoch)
	);
	CREATE TABLE sink(
		name   TEXT PRIMARY KEY,
		cursor BIGINT NOT NULL,
		moved  BIGINT NOT NULL,
		replay BIGINT NOT NULL DEFAULT 0
	);
	CREATE TABLE dead(
		sink   TEXT NOT NULL,
		cursor BIGINT NOT NULL,
		at     BIGINT NOT NULL,
		reason TEXT NOT NULL,
		PRIMARY KEY(sink, cursor)
	);
	CREATE TABLE lease(
		name  TEXT PRIMARY KEY,
		owner TEXT NOT NULL,
		until BIGINT NOT NULL
	);
	CREATE TABLE node(
		name     TEXT PRIMARY KEY,
		coverage BYTEA NOT NULL,
		received BIGINT NOT NULL
	);`,
	`ALTER TABLE node ADD COLUMN flags TEXT NOT NULL DEFAULT ''`,
	`CREATE TABLE policy_report(
		node    TEXT PRIMARY KEY,
		version BIGINT NOT NULL,
		payload BYTEA NOT NULL
	);
	CREATE INDEX policy_report_version ON policy_report(version)`,
	`ALTER TABLE lease ADD COLUMN lasts BIGINT NOT NULL DEFAULT 0`,
}

func (p *Postgres) migrate(ctx context.Context) error {
	tx, err := p.wdb.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1)`, migrationLock); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS procession_schema(version BIGINT NOT NULL)`); err != nil {
		return err
	}
	version := 0
	if err := tx.QueryRowContext(ctx, `SELECT coalesce(max(version), 0) FROM procession_schema`).Scan(&version); err != nil {
		return err
	}
	if version > len(pgMigrations) {
		return fmt.Errorf("made by a newer collector (schema version %d, this one knows %d)", version, len(pgMigrations))
	}
	for ; version < len(pgMigrations); version++ {
		for stmt := range strings.SplitSeq(pgMigrations[version], ";") {
			if strings.TrimSpace(stmt) == "" {
				continue
			}
			if _, err := tx.ExecContext(ctx, stmt); err != nil {
				return fmt.Errorf("bring the schema to version %d: %w", version+1, err)
			}
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO procession_schema VALUES($1)`, version+1); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// A pgCommit is one transaction.
type pgCommit struct {
	core
	conn  *sql.Conn
	last  int64 // cursor given out last
	bytes int64 // of all payloads
	known map[lane]mark
}

// Commit implements Store. It must not be called from two goroutines at once.
func (p *Postgres) Commit(ctx context.Context, changes []Change) (_ []Result, err error) {
	for _, c := range changes {
		if err := check(c); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitLimit) // half a commit is of no use to anybody
	defer cancel()
	conn, err := p.wdb.Conn(ctx)
	if err != nil {
		return nil, dbError("connect to the database", err)
	}
	defer conn.Close()
	t := &pgCommit{core: p.core, conn: conn, known: make(map[lane]mark)}
	t.w = conn
	defer func() {
		if err == nil {
			return
		}
		// The connection may be in any state: a fresh one costs less than to find out.
		conn.Raw(func(any) error { return driver.ErrBadConn })
	}()
	now, err := t.begin(ctx, changes)
	if err != nil {
		return nil, dbError("begin", err)
	}
	plan := newPlan(t, now)
	results, err := applyAll(ctx, plan, changes, func(c Change) (Result, error) {
		if trim, ok := c.(*Trim); ok {
			return t.trim(ctx, trim)
		}
		return t.other(ctx, c, now)
	})
	if err == nil {
		err = t.write(ctx, plan)
	}
	if err == nil {
		_, err = conn.ExecContext(ctx, `COMMIT`)
	}
	if err != nil {
		return nil, dbError("commit", err)
	}
	return results, nil
}

// raw hands over the connection below database/sql.
func (t *pgCommit) raw(f func(c *pgx.Conn) error) error {
	return t.conn.Raw(func(dc any) error { return f(dc.(*stdlib.Conn).Conn()) })
}

// begin locks the head and reads, in the same round trip, what the changes
// will ask for. The time is this collector's, like that of all else it does: a
// server's clock that is set must not end leases or make records old.
func (t *pgCommit) begin(ctx context.Context, changes []Change) (now time.Time, err error) {
	var lanes []lane
	for _, c := range changes {
		switch c := c.(type) {
		case *Batch:
			lanes = append(lanes, lane{c.Node, c.Epoch})
		case *Heard:
			lanes = append(lanes, lane{c.Node, c.Epoch})
		case *Hello:
			for _, l := range c.Lanes {
				lanes = append(lanes, lane{c.Node, l.Epoch})
			}
		}
	}
	err = t.raw(func(c *pgx.Conn) error {
		b := &pgx.Batch{}
		b.Queue(`BEGIN`)
		b.Queue(`SELECT last, bytes FROM head FOR UPDATE`)
		// One behind the other: a batch is pipelined, and each statement has its
		// own snapshot, taken after the lock.
		query := dollars(selectMark)
		for _, l := range lanes {
			b.Queue(query, l.node, l.epoch[:])
		}
		r := c.SendBatch(ctx, b)
		defer r.Close()
		if _, err := r.Exec(); err != nil {
			return err
		}
		if err := r.QueryRow().Scan(&t.last, &t.bytes); err != nil {
			return err
		}
		now = t.now() // after the lock, so that it is in the order of cursors
		for _, l := range lanes {
			var upTo, made, ended int64
			m := mark{known: true}
			switch err := r.QueryRow().Scan(&upTo, &made, &m.order, &ended); {
			case errors.Is(err, pgx.ErrNoRows):
				m.known = false
			case err != nil:
				return err
			}
			m.upTo, m.made, m.ended = uint64(upTo), uint64(made), ended != 0
			t.known[l] = m
		}
		return nil
	})
	return now, err
}

// mark implements marks.
func (t *pgCommit) mark(ctx context.Context, l lane) (mark, error) {
	if m, ok := t.known[l]; ok {
		return m, nil
	}
	return scanMark(t.conn.QueryRowContext(ctx, dollars(selectMark), l.node, l.epoch[:]))
}

func (t *pgCommit) trim(ctx context.Context, c *Trim) (res Result, err error) {
	var bytes int64
	err = t.conn.QueryRowContext(ctx, `WITH gone AS (DELETE FROM record WHERE id IN (SELECT id FROM record WHERE id<=$1 ORDER BY id LIMIT $2)
		RETURNING coalesce(octet_length(payload), 0) AS n) SELECT count(*), coalesce(sum(n), 0)::bigint FROM gone`, c.UpTo, c.Limit).Scan(&res.Trimmed, &bytes)
	if err != nil || res.Trimmed == 0 {
		return res, err
	}
	t.bytes -= bytes
	_, err = t.exec(ctx, `DELETE FROM dead WHERE cursor<(SELECT coalesce(min(id),0) FROM record)`)
	if err == nil {
		err = t.moveHead(ctx)
	}
	return res, err
}

func (t *pgCommit) moveHead(ctx context.Context) error {
	_, err := t.exec(ctx, `UPDATE head SET last=?, bytes=?`, t.last, t.bytes)
	return err
}

// write puts what was planned into the transaction.
func (t *pgCommit) write(ctx context.Context, p *plan) error {
	err := t.raw(func(c *pgx.Conn) error {
		if err := t.copyRecords(ctx, c, p.records); err != nil {
			return err
		}
		b := &pgx.Batch{}
		query := dollars(upsertMark)
		for l, m := range p.marks {
			if m.dirty {
				b.Queue(query, l.node, l.epoch[:], int64(m.upTo), int64(m.made), int64(number(m.ended)), nanos(m.seen), m.order, int64(m.was))
			}
		}
		r := c.SendBatch(ctx, b)
		defer r.Close()
		for range b.Len() {
			tag, err := r.Exec()
			if err != nil {
				return err
			}
			if tag.RowsAffected() != 1 {
				return errors.New("a mark changed meanwhile")
			}
		}
		return nil
	})
	if err == nil && len(p.records) > 0 {
		err = t.moveHead(ctx)
	}
	if err != nil {
		return err
	}
	return t.writeRest(ctx, p)
}

func (t *pgCommit) copyRecords(ctx context.Context, c *pgx.Conn, records []Record) error {
	if len(records) == 0 {
		return nil
	}
	columns := append([]string{"id"}, strings.Split(recordColumns, ", ")...)
	_, err := c.CopyFrom(ctx, pgx.Identifier{"record"}, columns, pgx.CopyFromSlice(len(records), func(i int) ([]any, error) {
		r := &records[i]
		t.last++
		t.bytes += int64(len(r.Payload))
		return []any{t.last, r.Node, r.Epoch[:], int64(r.Seq), int64(r.To), int64(r.Kind), int64(r.Severity), pgText(r.Rule),
			nanos(r.EventTime), nanos(r.Received), nanos(r.Committed), int64(r.LossReason), pgText(r.Reason), r.Payload, int64(r.CRC32C)}, nil
	}))
	return err
}

// pgText is text as PostgreSQL takes it: UTF-8 without NUL.
func pgText(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\ufffd"), "\x00", "\ufffd")
}

// Read implements Store.
func (p *Postgres) Read(ctx context.Context, dst []Record, after int64, limit int) ([]Record, error) {
	// The bound on bytes is the server's part: rows it has sent have to be read.
	rows, err := p.r.QueryContext(ctx, `SELECT id, `+recordColumns+` FROM (
		SELECT *, sum(coalesce(octet_length(payload), 0)) OVER (ORDER BY id) - coalesce(octet_length(payload), 0) AS before FROM (
			SELECT * FROM record WHERE id>$1 ORDER BY id LIMIT $2) a) b WHERE before<$3 ORDER BY id`, after, limit, readBytes)
	if err != nil {
		return dst, dbError("read", err)
	}
	return scanRecords(dst, rows)
}

// Head implements Store.
func (p *Postgres) Head(ctx context.Context) (n int64, err error) {
	err = p.r.QueryRowContext(ctx, `SELECT last FROM head`).Scan(&n)
	return n, dbError("read", err)
}

// rowBytes is about what a row takes beside its payload.
const rowBytes = 250

// Size implements Store. The server finds room for new rows where old ones
// were, so nothing is counted as free.
func (p *Postgres) Size(ctx context.Context) (used, free int64, err error) {
	err = p.r.QueryRowContext(ctx, `SELECT bytes + (last - coalesce((SELECT min(id)-1 FROM record), last)) * $1 FROM head`, rowBytes).Scan(&used)
	return used, 0, dbError("read", err)
}

// pgError turns the server's codes into the package's errors.
func pgError(err *pgconn.PgError) error {
	switch {
	case err.Code == "53100": // disk_full
		return fmt.Errorf("%w: %w", ErrFull, err)
	case strings.HasPrefix(err.Code, "XX00"): // internal_error, data_corrupted, index_corrupted
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	case err.Code == "42501", err.Code == "25006": // insufficient_privilege, read_only_sql_transaction
		return fmt.Errorf("%w: %w", fs.ErrPermission, err)
	}
	return err
}

package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

const recordColumns = `node, epoch, seq, seq_to, kind, severity, rule, event_time, received, committed, loss_reason, reason, payload, crc32c`

// SQL that engines share, with ? for arguments.
const (
	selectRecords = `SELECT id, ` + recordColumns + ` FROM record WHERE id>? ORDER BY id LIMIT ?`
	selectMark    = `SELECT up_to, made, ord, ended FROM mark WHERE node=? AND epoch=?`
	// The last argument is what up_to was when it was read: the fence holds
	// even if somebody else could write.
	upsertMark = `INSERT INTO mark(node, epoch, up_to, made, ended, seen, ord) VALUES(?,?,?,?,?,?,?)
		ON CONFLICT(node, epoch) DO UPDATE SET up_to=excluded.up_to, made=excluded.made, ended=excluded.ended, seen=excluded.seen
		WHERE mark.up_to=?`
)

// execer is a *sql.Conn, *sql.DB or *sql.Tx.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// A core is what engines have in common: everything that need not be fast.
type core struct {
	w    execer              // within the transaction of a commit
	r    execer              // for reads
	now  func() time.Time    // this process's: no statement asks the engine for the time
	bind func(string) string // the engine's way to write ?

	watched map[string]watched // leases of others, by name; Commit's
}

// A watched is a lease of somebody else as it was seen here first.
type watched struct {
	owner string
	until int64
	since time.Time
}

func (c *core) exec(ctx context.Context, query string, args ...any) (rows int64, err error) {
	res, err := c.w.ExecContext(ctx, c.bind(query), args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// SinkLease is the name of the Lease that SinkMoved asks for.
func SinkLease(sink string) string { return "sink/" + sink }

// other applies a change that is not about records.
func (c *core) other(ctx context.Context, ch Change, now time.Time) (res Result, err error) {
	switch ch := ch.(type) {
	case *SinkMoved:
		return c.sinkMoved(ctx, ch, now)
	case *SinkReplay:
		_, err := c.exec(ctx, `INSERT INTO sink(name, cursor, moved, replay) VALUES(?,?,?,1)
			ON CONFLICT(name) DO UPDATE SET cursor=excluded.cursor, moved=excluded.moved, replay=sink.replay+1`, ch.Sink, ch.Cursor, now.UnixNano())
		return Result{Replayed: true}, err
	case *Lease:
		return c.lease(ctx, ch, now)
	case *Flagged:
		_, err := c.exec(ctx, `UPDATE node SET flags=? WHERE name=?`, ch.Flags, ch.Node)
		return Result{}, err
	case *Trim:
		n, err := c.exec(ctx, `DELETE FROM record WHERE id IN (SELECT id FROM record WHERE id<=? ORDER BY id LIMIT ?)`, ch.UpTo, ch.Limit)
		if err != nil || n == 0 {
			return Result{}, err
		}
		_, err = c.exec(ctx, `DELETE FROM dead WHERE cursor<(SELECT coalesce(min(id),0) FROM record)`)
		return Result{Trimmed: int(n)}, err
	}
	return Result{}, fmt.Errorf("unknown change %T", ch)
}

// lease takes, renews or gives back a lease. Whether one of another owner has
// run out no wall clock decides, neither this process's nor the database's,
// which may be set: it has when it was not renewed for as long as it lasts, by
// the clock here that does not jump. So after a crash of its owner it is free
// that long after the first who wants it began to look.
func (c *core) lease(ctx context.Context, ch *Lease, now time.Time) (Result, error) {
	if ch.For == 0 {
		_, err := c.exec(ctx, `DELETE FROM lease WHERE name=? AND owner=?`, ch.Name, ch.Owner)
		return Result{}, err
	}
	var owner string
	var until, lasts int64
	err := c.w.QueryRowContext(ctx, c.bind(`SELECT owner, until, lasts FROM lease WHERE name=?`), ch.Name).Scan(&owner, &until, &lasts)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return Result{}, err
	}
	if err == nil && owner != ch.Owner {
		if lasts == 0 { // of an earlier version, which did not say
			lasts = int64(ch.For)
		}
		if at := c.watched[ch.Name]; at.owner != owner || at.until != until {
			c.watched[ch.Name] = watched{owner, until, now}
			return Result{Stale: true}, nil
		} else if now.Sub(at.since) < time.Duration(lasts) {
			return Result{Stale: true}, nil
		}
	}
	renewed := now.Add(ch.For).UnixNano()
	if renewed == until { // each renewal must be seen
		renewed++
	}
	_, err = c.exec(ctx, `INSERT INTO lease(name, owner, until, lasts) VALUES(?,?,?,?)
		ON CONFLICT(name) DO UPDATE SET owner=excluded.owner, until=excluded.until, lasts=excluded.lasts`,
		ch.Name, ch.Owner, renewed, int64(ch.For))
	return Result{}, err
}

func (c *core) sinkMoved(ctx context.Context, ch *SinkMoved, now time.Time) (Result, error) {
	if ch.Owner != "" {
		var owner string
		err := c.w.QueryRowContext(ctx, c.bind(`SELECT owner FROM lease WHERE name=?`), SinkLease(ch.Sink)).Scan(&owner)
		if err != nil && !errors.Is(err, sql.ErrNoRows) || owner != ch.Owner {
			if errors.Is(err, sql.ErrNoRows) {
				err = nil
			}
			return Result{Stale: true}, err
		}
	}
	n, err := c.exec(ctx, `INSERT INTO sink(name, cursor, moved, replay) VALUES(?,?,?,?)
		ON CONFLICT(name) DO UPDATE SET cursor=excluded.cursor, moved=excluded.moved WHERE sink.replay=excluded.replay`,
		ch.Sink, ch.Cursor, now.UnixNano(), ch.Replay)
	if err != nil || n == 0 {
		return Result{Stale: n == 0}, err
	}
	for _, d := range ch.Dead {
		if _, err := c.exec(ctx, `INSERT INTO dead(sink, cursor, at, reason) VALUES(?,?,?,?) ON CONFLICT(sink, cursor) DO NOTHING`,
			ch.Sink, d.Cursor, now.UnixNano(), d.Reason); err != nil {
			return Result{}, err
		}
	}
	return Result{}, nil
}

// writeRest writes what a plan has besides records and marks.
func (c *core) writeRest(ctx context.Context, p *plan) error {
	for node, i := range p.coverage {
		r := &p.records[i]
		payload := r.Payload
		if payload == nil {
			payload = []byte{}
		}
		if _, err := c.exec(ctx, `INSERT INTO node(name, coverage, received) VALUES(?,?,?)
			ON CONFLICT(name) DO UPDATE SET coverage=excluded.coverage, received=excluded.received`, node, payload, nanos(r.Received)); err != nil {
			return err
		}
	}
	for node, i := range p.policies {
		// Commits with records come one after the other, so versions do.
		if _, err := c.exec(ctx, `INSERT INTO policy_report(node, version, payload)
			VALUES(?, (SELECT coalesce(max(version), 0)+1 FROM policy_report), ?)
			ON CONFLICT(node) DO UPDATE SET version=excluded.version, payload=excluded.payload`, node, p.records[i].Policies); err != nil {
			return err
		}
	}
	for node := range p.forget {
		if _, err := c.exec(ctx, `DELETE FROM mark WHERE node=? AND ended=1 AND seen<?`, node, p.now.Add(-forget).UnixNano()); err != nil {
			return err
		}
	}
	return nil
}

// openMarks implements marks.
func (c *core) openMarks(ctx context.Context, node string) (_ map[Epoch]mark, err error) {
	rows, err := c.w.QueryContext(ctx, c.bind(`SELECT epoch, up_to, made, ord FROM mark WHERE node=? AND ended=0`), node)
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

// lastOrder implements marks.
func (c *core) lastOrder(ctx context.Context, node string) (n int64, err error) {
	err = c.w.QueryRowContext(ctx, c.bind(`SELECT coalesce(max(ord),0) FROM mark WHERE node=?`), node).Scan(&n)
	return n, err
}

func scanMark(row *sql.Row) (m mark, err error) {
	var upTo, made int64
	var ended int
	err = row.Scan(&upTo, &made, &m.order, &ended)
	if errors.Is(err, sql.ErrNoRows) {
		return mark{}, nil
	}
	m.known, m.upTo, m.made, m.ended = true, uint64(upTo), uint64(made), ended != 0
	return m, err
}

// scanRecords appends rows of selectRecords, up to readBytes.
func scanRecords(dst []Record, rows *sql.Rows) ([]Record, error) {
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
	return dst, dbError("read", rows.Err())
}

// CursorAt implements Store.
func (c *core) CursorAt(ctx context.Context, t time.Time) (n int64, err error) {
	// Transactions take their time in the order of cursors, but for a clock that
	// was set back, and for clocks of several collectors that differ. Then this
	// is a cursor too low: nothing from t on is left out.
	err = c.r.QueryRowContext(ctx, c.bind(`SELECT coalesce(
		(SELECT id-1 FROM record WHERE committed>=? ORDER BY id LIMIT 1),
		(SELECT max(id) FROM record), 0)`), t.UnixNano()).Scan(&n)
	return n, dbError("read", err)
}

// Sinks implements Store.
func (c *core) Sinks(ctx context.Context) (map[string]SinkState, error) {
	rows, err := c.r.QueryContext(ctx, `SELECT name, cursor, replay, moved, (SELECT count(*) FROM dead WHERE dead.sink=sink.name) FROM sink`)
	if err != nil {
		return nil, dbError("read", err)
	}
	defer rows.Close()
	out := make(map[string]SinkState)
	for rows.Next() {
		var name string
		var s SinkState
		var moved int64
		if err := rows.Scan(&name, &s.Cursor, &s.Replay, &moved, &s.Dead); err != nil {
			return nil, dbError("read", err)
		}
		s.Moved = fromNanos(moved)
		out[name] = s
	}
	return out, dbError("read", rows.Err())
}

// DeadLetters implements Store.
func (c *core) DeadLetters(ctx context.Context, sink string, after int64, limit int) (out []Dead, err error) {
	rows, err := c.r.QueryContext(ctx, c.bind(`SELECT cursor, reason FROM dead WHERE sink=? AND cursor>? ORDER BY cursor LIMIT ?`), sink, after, limit)
	if err != nil {
		return nil, dbError("read", err)
	}
	defer rows.Close()
	for rows.Next() {
		var d Dead
		if err := rows.Scan(&d.Cursor, &d.Reason); err != nil {
			return nil, dbError("read", err)
		}
		out = append(out, d)
	}
	return out, dbError("read", rows.Err())
}

// Nodes implements Store.
func (c *core) Nodes(ctx context.Context) (map[string]NodeState, error) {
	rows, err := c.r.QueryContext(ctx, `SELECT m.node, m.seen, n.coverage, coalesce(n.received, 0), coalesce(n.flags, '')
		FROM (SELECT node, max(seen) AS seen FROM mark GROUP BY node) m LEFT JOIN node n ON n.name=m.node`)
	if err != nil {
		return nil, dbError("read", err)
	}
	defer rows.Close()
	out := make(map[string]NodeState)
	for rows.Next() {
		var name string
		var seen, at int64
		var n NodeState
		if err := rows.Scan(&name, &seen, &n.Coverage, &at, &n.Flags); err != nil {
			return nil, dbError("read", err)
		}
		n.Seen, n.At = fromNanos(seen), fromNanos(at)
		out[name] = n
	}
	return out, dbError("read", rows.Err())
}

// PolicyReports implements Store.
func (c *core) PolicyReports(ctx context.Context, after int64) (out []PolicyReport, err error) {
	rows, err := c.r.QueryContext(ctx, c.bind(`SELECT node, version, payload FROM policy_report WHERE version>? ORDER BY version`), after)
	if err != nil {
		return nil, dbError("read", err)
	}
	defer rows.Close()
	for rows.Next() {
		var r PolicyReport
		if err := rows.Scan(&r.Node, &r.Version, &r.Payload); err != nil {
			return nil, dbError("read", err)
		}
		out = append(out, r)
	}
	return out, dbError("read", rows.Err())
}

func number(b bool) int {
	if b {
		return 1
	}
	return 0
}

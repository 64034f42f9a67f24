package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// applicationID marks the file as ours (PRAGMA application_id): "PrcS".
const applicationID = 0x50726353

// migrations bring a database from version i to i+1. They are only ever added
// to: a released one is never changed.
var migrations = []string{
	// 1. Times are ns since 1970 UTC, 0 unknown. AUTOINCREMENT, because without
	// it the rowid would begin again when the newest rows are removed, and
	// cursors must only grow. kind, severity, loss_reason: numbers of store.Kind
	// and of the protocol's enums.
	`CREATE TABLE record(
		id          INTEGER PRIMARY KEY AUTOINCREMENT,
		node        TEXT NOT NULL,
		epoch       BLOB NOT NULL,
		seq         INTEGER NOT NULL,
		seq_to      INTEGER NOT NULL,
		kind        INTEGER NOT NULL,
		severity    INTEGER NOT NULL,
		rule        TEXT NOT NULL,
		event_time  INTEGER NOT NULL,
		received    INTEGER NOT NULL,
		committed   INTEGER NOT NULL,
		loss_reason INTEGER NOT NULL,
		reason      TEXT NOT NULL,
		payload     BLOB,
		crc32c      INTEGER NOT NULL
	) STRICT;
	CREATE TABLE mark(
		node  TEXT NOT NULL,
		epoch BLOB NOT NULL,
		up_to INTEGER NOT NULL,
		made  INTEGER NOT NULL,
		ended INTEGER NOT NULL,
		seen  INTEGER NOT NULL,
		ord   INTEGER NOT NULL,
		PRIMARY KEY(node, epoch)
	) STRICT, WITHOUT ROWID;
	CREATE TABLE sink(
		name   TEXT PRIMARY KEY,
		cursor INTEGER NOT NULL,
		moved  INTEGER NOT NULL
	) STRICT, WITHOUT ROWID;`,

	// 2. Sinks can be sent elsewhere, and have records nobody takes; who may do
	// what; the newest coverage of each node.
	`ALTER TABLE sink ADD COLUMN replay INTEGER NOT NULL DEFAULT 0;
	CREATE TABLE dead(
		sink   TEXT NOT NULL,
		cursor INTEGER NOT NULL,
		at     INTEGER NOT NULL,
		reason TEXT NOT NULL,
		PRIMARY KEY(sink, cursor)
	) STRICT, WITHOUT ROWID;
	CREATE TABLE lease(
		name  TEXT PRIMARY KEY,
		owner TEXT NOT NULL,
		until INTEGER NOT NULL
	) STRICT, WITHOUT ROWID;
	CREATE TABLE node(
		name     TEXT PRIMARY KEY,
		coverage BLOB NOT NULL,
		received INTEGER NOT NULL
	) STRICT, WITHOUT ROWID;`,

	// 3. What is wrong with a node, as far as it was told.
	`ALTER TABLE node ADD COLUMN flags TEXT NOT NULL DEFAULT '';`,

	// 4. What each node said last about its policies.
	`CREATE TABLE policy_report(
		node    TEXT PRIMARY KEY,
		version INTEGER NOT NULL,
		payload BLOB NOT NULL
	) STRICT, WITHOUT ROWID;
	CREATE INDEX policy_report_version ON policy_report(version);`,

	// 5. How long a lease lasts, ns. until is a number that each renewal changes,
	// and nothing else: only earlier versions compare it with a clock.
	`ALTER TABLE lease ADD COLUMN lasts INTEGER NOT NULL DEFAULT 0;`,
}

// migrate brings the database to this program's version, one transaction per
// step. A newer or a foreign database is refused untouched.
func migrate(ctx context.Context, c *sql.Conn) error {
	var app, version, tables int
	if err := c.QueryRowContext(ctx, `SELECT
		(SELECT application_id FROM pragma_application_id),
		(SELECT user_version FROM pragma_user_version),
		(SELECT count(*) FROM sqlite_master)`).Scan(&app, &version, &tables); err != nil {
		return err
	}
	if app != applicationID && (app != 0 || tables != 0) {
		return fmt.Errorf("not a database of this collector (application_id %#x)", app)
	}
	if version > len(migrations) {
		return fmt.Errorf("made by a newer collector (schema version %d, this one knows %d)", version, len(migrations))
	}
	for ; version < len(migrations); version++ {
		step := fmt.Sprintf("BEGIN IMMEDIATE; %s PRAGMA application_id=%d; PRAGMA user_version=%d; COMMIT",
			migrations[version], applicationID, version+1)
		if _, err := c.ExecContext(ctx, step); err != nil {
			c.ExecContext(ctx, `ROLLBACK`)
			return fmt.Errorf("bring the schema to version %d: %w", version+1, err)
		}
	}
	return incremental(ctx, c)
}

// incremental makes a database that was begun without it give room back page by
// page. That needs as much room again, once; without it, it stays as it is.
func incremental(ctx context.Context, c *sql.Conn) error {
	const incremental = 2
	var mode int
	if err := c.QueryRowContext(ctx, `PRAGMA auto_vacuum`).Scan(&mode); err != nil || mode == incremental {
		return err
	}
	_, err := c.ExecContext(ctx, `PRAGMA auto_vacuum=INCREMENTAL; VACUUM`)
	if err = dbError("rewrite the database", err); errors.Is(err, ErrFull) {
		return nil
	}
	return err
}

package store_test

import (
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
)

// A backup is whole while commits go on, and a restored store takes again from
// agents what came after it.
func TestSQLiteBackupAndRestore(t *testing.T) {
	dir := storetest.Dir(t)
	st := openSQLite(t, dir).(*store.SQLite)
	if err := commitN(t, st, 1, 200); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Commit(t.Context(), []store.Change{&store.SinkMoved{Sink: "s", Cursor: 150}}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(storetest.Dir(t), "backup.db")
	var commits sync.WaitGroup
	commits.Go(func() {
		for n := uint64(201); n <= 400; n += 2 {
			if err := commitN(t, st, n, n+1); err != nil {
				t.Error(err)
			}
		}
	})
	if err := st.Backup(t.Context(), file); err != nil {
		t.Fatal(err)
	}
	commits.Wait()
	if err := st.Backup(t.Context(), file); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file that is there: %v", err)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("backup: %v, %v, want mode 0600", fi, err)
	}
	if _, err := store.RestoreSQLite(t.Context(), dir, file); !errors.Is(err, store.ErrInUse) {
		t.Errorf("into a store that is in use: %v", err)
	}
	all := storetest.All(t, st)
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	head, err := store.RestoreSQLite(t.Context(), dir, file)
	if err != nil {
		t.Fatal(err)
	}
	st = openSQLite(t, dir).(*store.SQLite)
	defer st.Close()
	restored := storetest.All(t, st)
	if n := len(restored); n < 200 || int64(n) != head || n%2 != 0 {
		t.Fatalf("restored %d records, head %d; want at least 200, and each commit whole", n, head)
	}
	if d := cmp.Diff(all[:len(restored)], restored); d != "" {
		t.Errorf("restored (-before +after):\n%s", d)
	}
	if err := commitN(t, st, uint64(len(restored)+1), 400); err != nil {
		t.Errorf("agents sending again: %v", err)
	}
	if n := len(storetest.All(t, st)); n != 400 {
		t.Errorf("%d records, want 400", n)
	}
	integrity(t, dir)
	if _, err := os.Stat(filepath.Join(dir, "alerts.db.before-restore")); err != nil {
		t.Error(err)
	}
}

// What is no whole backup changes nothing.
func TestSQLiteRestoreRefuses(t *testing.T) {
	dir := storetest.Dir(t)
	st := openSQLite(t, dir)
	if err := commitN(t, st, 1, 2000); err != nil {
		t.Fatal(err)
	}
	st.Close()
	whole, err := os.ReadFile(filepath.Join(dir, "alerts.db"))
	if err != nil {
		t.Fatal(err)
	}
	tmp := storetest.Dir(t)
	files := map[string][]byte{"text": []byte(strings.Repeat("no database ", 500)), "cut": whole[:len(whole)*2/3], "empty": nil}
	for name, b := range files {
		path := filepath.Join(tmp, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := store.RestoreSQLite(t.Context(), dir, path); err == nil {
			t.Errorf("%s: restored", name)
		}
	}
	if _, err := store.RestoreSQLite(t.Context(), dir, filepath.Join(tmp, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	st = openSQLite(t, dir)
	defer st.Close()
	if n := len(storetest.All(t, st)); n != 2000 {
		t.Errorf("%d records after refused restores, want 2000", n)
	}
}

// Removed records give their room back, and a database that was made before
// that was possible learns it.
func TestSQLiteShrinks(t *testing.T) {
	dir := storetest.Dir(t)
	st := openSQLite(t, dir)
	r := storetest.Alert(1)
	r.Payload = make([]byte, 100<<10)
	r.CRC32C = store.Checksum(r.Payload)
	for n := uint64(1); n <= 100; n++ {
		r.Seq, r.To = n, n
		if res, err := st.Commit(t.Context(), []store.Change{&store.Batch{Node: "n", Epoch: storetest.Epoch(1), Records: []store.Record{r}}}); err != nil || res[0].Err != nil {
			t.Fatal(err)
		}
	}
	used, _, err := st.Size(t.Context())
	if err != nil || used < 9<<20 {
		t.Fatalf("used %d, %v", used, err)
	}
	if _, err := st.Commit(t.Context(), []store.Change{&store.Trim{UpTo: 90, Limit: 100}}); err != nil {
		t.Fatal(err)
	}
	less, free, err := st.Size(t.Context())
	if err != nil || less > used/5 || free > 1<<20 {
		t.Errorf("after 90 of 100 were removed: used %d, free %d, %v", less, free, err)
	}
	st.Close()
	fi, err := os.Stat(filepath.Join(dir, "alerts.db"))
	if err != nil || fi.Size() > 3<<20 {
		t.Errorf("file has %d bytes, %v; want about one tenth of %d", fi.Size(), err, used)
	}
	// As version 1 made it.
	old := storetest.Dir(t)
	openSQLite(t, old).Close()
	alter(t, old, `PRAGMA auto_vacuum=0; VACUUM`)
	openSQLite(t, old).Close()
	db, err := sql.Open("sqlite", filepath.Join(old, "alerts.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	mode := 0
	if err := db.QueryRow(`PRAGMA auto_vacuum`).Scan(&mode); err != nil || mode != 2 {
		t.Errorf("auto_vacuum of an old database is %d, %v, want 2", mode, err)
	}
}

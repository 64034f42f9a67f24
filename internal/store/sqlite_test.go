package store_test

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("STORE_TEST_COMMIT_FOREVER"); dir != "" {
		commitForever(dir)
	}
	os.Exit(m.Run())
}

func openSQLite(t testing.TB, dir string) store.Store {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestSQLite(t *testing.T) { storetest.Run(t, openSQLite) }

func TestSQLiteRefuses(t *testing.T) {
	tests := []struct {
		name string
		dir  func(t *testing.T) string
		want string
		is   error
	}{
		{"state that is a file", func(t *testing.T) string {
			f := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(f, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return f
		}, "not a directory", nil},
		{"a read-only file system", func(t *testing.T) string {
			return tmpfs(t, "size=1m,ro")
		}, "read-only file system", unix.EROFS},
		{"a network file system", fuse, "is on FUSE", nil},
		{"a file that is no database", func(t *testing.T) string {
			d := t.TempDir()
			if err := os.WriteFile(filepath.Join(d, "alerts.db"), []byte(strings.Repeat("not a database ", 1000)), 0o600); err != nil {
				t.Fatal(err)
			}
			return d
		}, "not a database", store.ErrDamaged},
		{"another program's database", func(t *testing.T) string {
			return database(t, `CREATE TABLE x(y)`)
		}, "not a database of this collector", nil},
		{"a newer schema", func(t *testing.T) string {
			d := t.TempDir()
			openSQLite(t, d).Close()
			alter(t, d, `PRAGMA user_version=99`)
			return d
		}, "newer collector (schema version 99", nil},
		{"a store in use", func(t *testing.T) string {
			d := t.TempDir()
			st := openSQLite(t, d)
			t.Cleanup(func() { st.Close() })
			return d
		}, "in use by another collector", store.ErrInUse},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := tt.dir(t)
			st, err := store.OpenSQLite(t.Context(), dir)
			if err == nil {
				st.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), tt.want) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %q, want %q in it, and to be %v", err, tt.want, tt.is)
			}
		})
	}
}

// fuse mounts a FUSE file system nobody serves, of another user: the kernel
// answers statfs by itself then.
func fuse(t *testing.T) string {
	testenv.Root(t)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	testenv.SkipOn(t, err, unix.ENOENT, unix.ENODEV, unix.EPERM)
	dir := t.TempDir()
	err = unix.Mount("test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=12345,group_id=12345", fd))
	if err != nil {
		unix.Close(fd)
		testenv.SkipOn(t, err, unix.ENODEV, unix.EPERM)
	}
	t.Cleanup(func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		unix.Close(fd)
	})
	return dir
}

func tmpfs(t *testing.T, opts string) string {
	testenv.Root(t)
	dir := t.TempDir()
	flags := uintptr(0)
	if o, ok := strings.CutSuffix(opts, ",ro"); ok {
		opts, flags = o, unix.MS_RDONLY
	}
	err := unix.Mount("test", dir, "tmpfs", flags, opts)
	testenv.SkipOn(t, err, unix.EPERM)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func database(t *testing.T, stmt string) string {
	d := t.TempDir()
	alter(t, d, stmt)
	return d
}

func alter(t *testing.T, dir string, stmts ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, "alerts.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, s := range stmts {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

func TestSQLiteFileModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	st := openSQLite(t, dir)
	defer st.Close()
	commitN(t, st, 1, 5)
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("state directory: %v, %v, want 0700", fi.Mode(), err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(files) < 3 {
		t.Errorf("files %v, want database, log and index", files)
	}
	for _, f := range files {
		if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want 0600", f, fi.Mode(), err)
		}
	}
}

func commitN(t testing.TB, st store.Store, from, to uint64) error {
	res, err := st.Commit(t.Context(), []store.Change{&store.Batch{Node: "n", Epoch: storetest.Epoch(1),
		Records: storetest.Alerts(from, to), Received: time.Now()}})
	if err != nil {
		return err
	}
	return res[0].Err
}

// What the disk gives back changed is never shown as an alert, and stands in
// nobody's way.
func TestSQLiteDamagedPayload(t *testing.T) {
	dir := t.TempDir()
	st := openSQLite(t, dir)
	if err := commitN(t, st, 1, 3); err != nil {
		t.Fatal(err)
	}
	st.Close()
	alter(t, dir, `UPDATE record SET payload=x'00' WHERE seq=2`)
	st = openSQLite(t, dir)
	defer st.Close()
	rs := storetest.All(t, st)
	var kinds []store.Kind
	for _, r := range rs {
		kinds = append(kinds, r.Kind)
	}
	if len(rs) != 3 || kinds[0] != store.Alert || kinds[1] != store.Damaged || kinds[2] != store.Alert {
		t.Fatalf("kinds %v, want alert, damaged, alert", kinds)
	}
	if !strings.Contains(rs[1].Reason, "checksum") {
		t.Errorf("reason %q, want the checksum named", rs[1].Reason)
	}
}

// A disk that is full at the start is told as that, however far the start came.
func TestSQLiteOpenOnFullDisk(t *testing.T) {
	for _, size := range []string{"4k", "16k", "32k", "64k"} {
		st, err := store.OpenSQLite(t.Context(), tmpfs(t, "size="+size))
		if err == nil {
			st.Close()
		}
		if !errors.Is(err, store.ErrFull) {
			t.Errorf("%s: %v, want ErrFull", size, err)
		}
	}
}

// A full disk refuses, changes nothing, and heals by itself.
func TestSQLiteFullDisk(t *testing.T) {
	dir := tmpfs(t, "size=2m")
	st := openSQLite(t, dir)
	defer st.Close()
	next := uint64(1)
	if err := commitN(t, st, next, next+9); err != nil {
		t.Fatal(err)
	}
	next += 10
	filler := filepath.Join(dir, "filler")
	for round := range 3 {
		fill(t, filler)
		var err error
		for range 100000 { // what room there is within the log's last page is used up
			if err = commitN(t, st, next, next+9); err != nil {
				break
			}
			next += 10
		}
		if !errors.Is(err, store.ErrFull) {
			t.Fatalf("round %d: commit on a full disk: %v, want ErrFull", round, err)
		}
		if err := commitN(t, st, next, next+9); !errors.Is(err, store.ErrFull) {
			t.Fatalf("round %d: second commit on a full disk: %v, want ErrFull", round, err)
		}
		if got := storetest.All(t, st); uint64(len(got)) != next-1 {
			t.Fatalf("round %d: %d records readable while full, want %d", round, len(got), next-1)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if err := commitN(t, st, next, next+9); err != nil {
			t.Fatalf("round %d: commit after there was room again: %v", round, err)
		}
		next += 10
	}
	if err := st.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	integrity(t, dir)
}

func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 4096)
	for {
		if _, err := f.Write(b); err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			return
		}
	}
}

func integrity(t *testing.T, dir string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, "alerts.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var s string
	if err := db.QueryRow(`PRAGMA integrity_check`).Scan(&s); err != nil || s != "ok" {
		t.Errorf("integrity_check: %q, %v", s, err)
	}
}

// commitForever commits batches and says so on stdout, until it is killed.
func commitForever(dir string) {
	st, err := store.OpenSQLite(context.Background(), dir)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	res, err := st.Commit(context.Background(), []store.Change{&store.Hello{Node: "n", Lanes: []store.Lane{{Epoch: storetest.Epoch(1)}}, At: time.Now()}})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for n := res[0].Marks[0] + 1; ; n += 7 {
		if _, err := st.Commit(context.Background(), []store.Change{&store.Batch{Node: "n", Epoch: storetest.Epoch(1), Records: storetest.Alerts(n, n+6), Received: time.Now()}}); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(n + 6)
	}
}

func TestSQLiteKill(t *testing.T) {
	dir := t.TempDir()
	acked := uint64(0)
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "STORE_TEST_COMMIT_FOREVER="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		sc := bufio.NewScanner(out)
		for n := 0; sc.Scan(); n++ {
			if _, err := fmt.Sscan(sc.Text(), &acked); err != nil {
				t.Fatalf("child: %s", sc.Text())
			}
			if n == 20+13*round {
				cmd.Process.Kill() // its last lines are still read
			}
		}
		cmd.Wait()
		st := openSQLite(t, dir)
		rs := storetest.All(t, st)
		st.Close()
		if uint64(len(rs)) < acked {
			t.Fatalf("round %d: %d records, %d were acknowledged", round, len(rs), acked)
		}
		for i, r := range rs {
			if r.Seq != uint64(i+1) || r.Kind != store.Alert {
				t.Fatalf("round %d: record %d is %v number %d", round, i, r.Kind, r.Seq)
			}
		}
		integrity(t, dir)
	}
	if acked < 3*20*7 {
		t.Errorf("only %d records were acknowledged: nothing was tested", acked)
	}
}

// BenchmarkSQLiteCommit is the cost of one record in commits of so many.
func BenchmarkSQLiteCommit(b *testing.B) {
	for _, size := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("%d-records", size), func(b *testing.B) {
			st := openSQLite(b, b.TempDir())
			defer st.Close()
			payload := []byte(strings.Repeat("p", 600))
			next := uint64(1)
			for b.Loop() {
				rs := make([]store.Record, size)
				for i := range rs {
					rs[i] = store.Record{Seq: next, To: next, Kind: store.Alert, Payload: payload, CRC32C: store.Checksum(payload), Rule: "kind/ns/policy/rule"}
					next++
				}
				if _, err := st.Commit(b.Context(), []store.Change{&store.Batch{Node: "node", Epoch: storetest.Epoch(1), Records: rs}}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(size)*float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

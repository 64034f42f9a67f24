package storetest

import (
	"bytes"
	"database/sql"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver named pgx

	"github.com/procession-dev/procession/internal/testenv"
)

// A Server is a PostgreSQL of its own, in memory, that ends with the test.
type Server struct {
	dir  string
	port int
	cmd  *exec.Cmd
	cred *syscall.Credential
	bin  string
}

// StartPostgres makes and starts a server; it skips where there is none.
func StartPostgres(t testing.TB) *Server {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		testenv.Skip(t, "no PostgreSQL server (Debian: postgresql)")
	}
	s := &Server{dir: Dir(t), bin: filepath.Dir(found[len(found)-1])}
	if os.Getuid() == 0 { // which PostgreSQL refuses to run as
		u, err := user.Lookup("postgres")
		if err != nil {
			if u, err = user.Lookup("nobody"); err != nil {
				t.Fatal(err)
			}
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		s.cred = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(s.dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	initdb := exec.Command(found[len(found)-1], "--auth=trust", "--username=procession", "--encoding=UTF8", "--locale=C", "--no-sync", "-D", filepath.Join(s.dir, "data"))
	initdb.Dir, initdb.SysProcAttr = s.dir, &syscall.SysProcAttr{Credential: s.cred}
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	s.Start(t)
	t.Cleanup(func() { s.Stop() })
	return s
}

// Start starts the server again after Stop, and waits until it answers.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	var log bytes.Buffer
	s.cmd = exec.Command(filepath.Join(s.bin, "postgres"), "-D", filepath.Join(s.dir, "data"), "-k", s.dir, "-h", "",
		"-c", "shared_buffers=16MB", "-c", "max_connections=40", "-c", "autovacuum=off")
	s.cmd.Dir, s.cmd.Stdout, s.cmd.Stderr = s.dir, &log, &log
	// It ends with this process, however that ends.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred, Pdeathsig: syscall.SIGQUIT}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // Pdeathsig is about the thread
		started <- s.cmd.Start()
		select {}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("pgx", s.DSN("public"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if err = db.PingContext(t.Context()); err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.Stop()
			t.Fatalf("PostgreSQL does not answer: %v: %s", err, log.String())
		}
	}
}

// Stop ends the server as a crash of its machine would, but for its files.
func (s *Server) Stop() {
	s.cmd.Process.Signal(syscall.SIGQUIT)
	s.cmd.Wait()
}

// DSN is the connection string of a schema.
func (s *Server) DSN(schema string) string {
	return fmt.Sprintf("host=%s user=procession dbname=postgres sslmode=disable search_path=%s", s.dir, schema)
}

var made sync.Map

// Schema is the DSN of a schema named after dir, which is made the first time.
func (s *Server) Schema(t testing.TB, dir string) string {
	t.Helper()
	h := fnv.New64a()
	h.Write([]byte(dir))
	name := fmt.Sprintf("t%x", h.Sum64())
	if _, there := made.LoadOrStore(s.dir+name, true); there {
		return s.DSN(name)
	}
	db, err := sql.Open("pgx", s.DSN("public"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), `CREATE SCHEMA `+name); err != nil {
		t.Fatal(err)
	}
	return s.DSN(name)
}

// Package postgres runs a PostgreSQL server of one's own, from Debian's
// package, for tests: in a folder, on a socket, as another user when we are
// root. The server ends with this process, however that ends.
package postgres

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver named pgx
)

// ErrNone reports that no server is installed.
var ErrNone = errors.New("no PostgreSQL server (Debian: postgresql)")

// A Server is a PostgreSQL server.
type Server struct {
	dir, bin string
	cred     *syscall.Credential
	cmd      *exec.Cmd
	log      bytes.Buffer
}

// New makes a server's files in dir, which it gives to the user the server runs
// as, and starts it.
func New(dir string) (*Server, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return nil, ErrNone
	}
	initdb := found[len(found)-1]
	s := &Server{dir: dir, bin: filepath.Dir(initdb)}
	if os.Getuid() == 0 { // which PostgreSQL refuses to run as
		u, err := user.Lookup("postgres")
		if err != nil {
			if u, err = user.Lookup("nobody"); err != nil {
				return nil, err
			}
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		s.cred = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command(initdb, "--auth=trust", "--username=procession", "--encoding=UTF8", "--locale=C", "--no-sync", "-D", filepath.Join(dir, "data"))
	cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: s.cred}
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	return s, s.Start()
}

// Start starts the server, again after Stop, and waits until it answers.
func (s *Server) Start() error {
	s.log.Reset()
	s.cmd = exec.Command(filepath.Join(s.bin, "postgres"), "-D", filepath.Join(s.dir, "data"), "-k", s.dir, "-h", "",
		"-c", "shared_buffers=16MB", "-c", "max_connections=40")
	s.cmd.Dir, s.cmd.Stdout, s.cmd.Stderr = s.dir, &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred, Pdeathsig: syscall.SIGQUIT}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // Pdeathsig is about the thread
		started <- s.cmd.Start()
		select {}
	}()
	if err := <-started; err != nil {
		return err
	}
	db, err := sql.Open("pgx", s.DSN("public"))
	if err != nil {
		return err
	}
	defer db.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if err = db.PingContext(context.Background()); err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			s.Stop()
			return fmt.Errorf("PostgreSQL does not answer: %w: %s", err, s.log.String())
		}
	}
}

// Stop ends the server at once, as a crash would.
func (s *Server) Stop() {
	s.cmd.Process.Signal(syscall.SIGQUIT)
	s.cmd.Wait()
}

// DSN is the connection string of a schema.
func (s *Server) DSN(schema string) string {
	return fmt.Sprintf("host=%s user=procession dbname=postgres sslmode=disable search_path=%s", s.dir, schema)
}

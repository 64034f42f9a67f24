package collector

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/ingest/ingesttest"
	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

// The test binary is the collector when it is asked to be.
const asCollector = "COLLECTOR_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asCollector) != "" {
		os.Exit(Main("test", os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// A proc is a collector in a process of its own.
type proc struct {
	cmd    *exec.Cmd
	addr   string
	stderr *testenv.Buffer
	exited chan struct{}
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCollector+"=1")
	return cmd
}

// startProc starts `collector serve` and waits until it is ready.
func startProc(t testing.TB, state string, args ...string) *proc {
	t.Helper()
	return startProcWith(t, nil, state, args...)
}

func startProcWith(t testing.TB, stdout *os.File, state string, args ...string) *proc {
	t.Helper()
	ready := filepath.Join(state, "..", filepath.Base(state)+".ready")
	p := &proc{stderr: new(testenv.Buffer), exited: make(chan struct{})}
	p.cmd = command(append([]string{"serve", "--state", state, "--listen", "127.0.0.1:0", "--ready-file", ready}, args...)...)
	p.cmd.Stderr = p.stderr
	if stdout != nil {
		p.cmd.Stdout = stdout
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.exited) }()
	t.Cleanup(func() { p.kill() })
	deadline := time.After(30 * time.Second)
	for {
		// The file of a collector that was killed is removed by the next one,
		// so its address may be stale for a moment: ask the port.
		if b, err := os.ReadFile(ready); err == nil {
			p.addr = strings.TrimSpace(string(b))
			if c, err := net.Dial("tcp", p.addr); err == nil {
				c.Close()
				return p
			}
		}
		select {
		case <-p.exited:
			t.Fatalf("collector ended: %s", p.stderr)
		case <-deadline:
			t.Fatal("collector is not ready after 30 s")
		case <-time.After(time.Millisecond):
		}
	}
}

func (p *proc) kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// term asks to stop and returns the exit code.
func (p *proc) term(t testing.TB) int {
	t.Helper()
	if err := p.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.exited:
	case <-time.After(30 * time.Second):
		t.Fatal("collector does not stop")
	}
	return p.cmd.ProcessState.ExitCode()
}

func issueFor(t testing.TB, state, node string) credentials.TransportCredentials {
	t.Helper()
	dir := filepath.Join(state, "..", "tls-"+node)
	if out, err := command("issue", "--state", state, "--node", node, "--out", dir).CombinedOutput(); err != nil {
		t.Fatalf("issue: %v: %s", err, out)
	}
	return ingesttest.Credentials(t, dir)
}

// fileIDs are the ids in an NDJSON file; each line must be one object.
func fileIDs(t testing.TB, path string) (ids []string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var o struct{ ID string }
		if err := json.Unmarshal(sc.Bytes(), &o); err != nil {
			t.Fatalf("line %d: %v in %.100q", len(ids)+1, err, sc.Text())
		}
		ids = append(ids, o.ID)
	}
	if sc.Err() != nil {
		t.Fatal(sc.Err())
	}
	return ids
}

func storeIDs(t testing.TB, state string) (ids []string) {
	t.Helper()
	st, err := store.OpenSQLite(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	for _, r := range storetest.All(t, st) {
		ids = append(ids, r.ID("local"))
	}
	return ids
}

// Kill -9 again and again in the middle of 1,000 alerts from agents that
// resend as the protocol says: each is in the store once and in the file once.
func TestKill(t *testing.T) {
	dir := t.TempDir() // the disk: what is synced is part of it
	state, file := filepath.Join(dir, "state"), filepath.Join(dir, "alerts.ndjson")
	const agents, each = 2, 500
	p := startProc(t, state, "--ndjson", file)
	var mu sync.Mutex // guards addr and acked
	addr, acked := p.addr, 0
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	var want []string
	for i := range agents {
		node := fmt.Sprint("node-", i)
		creds := issueFor(t, state, node)
		a := &ingesttest.Agent{Node: node, Epoch: storetest.Epoch(byte(i)), PerSend: 3}
		for n := uint64(1); n <= each; n++ {
			a.Records = append(a.Records, ingesttest.Record(t, node, n))
			want = append(want, fmt.Sprintf("local/%s/%v/%d", node, a.Epoch, n))
		}
		last := uint64(0)
		a.OnAck = func(up uint64) {
			mu.Lock()
			defer mu.Unlock()
			acked += int(up - last)
			last = up
		}
		wg.Go(func() {
			if err := a.Run(ctx, func() (*grpc.ClientConn, error) {
				mu.Lock()
				defer mu.Unlock()
				return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds))
			}); err != nil {
				t.Errorf("%s: %v", node, err)
			}
		})
	}
	rnd := rand.New(rand.NewPCG(rand.Uint64(), 1))
	const kills = 6
	for k := range kills {
		goal := (k+1)*agents*each/(kills+1) + rnd.IntN(40)
		testenv.Eventually(t, fmt.Sprint(goal, " acknowledged"), func() bool { mu.Lock(); defer mu.Unlock(); return acked >= goal || ctx.Err() != nil })
		p.kill()
		p = startProc(t, state, "--ndjson", file)
		mu.Lock()
		addr = p.addr
		mu.Unlock()
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	if code := p.term(t); code != 0 {
		t.Errorf("exit code %d: %s", code, p.stderr)
	}
	stored, lines := storeIDs(t, state), fileIDs(t, file)
	if !slices.Equal(stored, lines) {
		t.Errorf("the file has not the records of the store in their order: %d records, %d lines", len(stored), len(lines))
	}
	slices.Sort(want)
	slices.Sort(stored)
	if !slices.Equal(want, stored) {
		t.Errorf("%d records are in the store, want each of %d once", len(stored), len(want))
	}
}

// Stopped as asked, the collector leaves sinks with everything and cursors
// stored; the next one delivers nothing twice.
func TestStopAndStart(t *testing.T) {
	dir := storetest.Dir(t)
	state, file := filepath.Join(dir, "state"), filepath.Join(dir, "alerts.ndjson")
	term := filepath.Join(dir, "terminal")
	var creds credentials.TransportCredentials
	for round := range 3 {
		p := startProcStdout(t, term, state, "--ndjson", file, "--terminal=never")
		if creds == nil {
			creds = issueFor(t, state, "n")
		}
		sendAlerts(t, p.addr, creds, "n", storetest.Epoch(byte(round)), 50)
		if code := p.term(t); code != 0 {
			t.Fatalf("exit code %d: %s", code, p.stderr)
		}
		if ids := fileIDs(t, file); len(ids) != 50*(round+1) {
			t.Errorf("round %d: %d lines, want %d", round, len(ids), 50*(round+1))
		}
		b, err := os.ReadFile(term)
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(b, []byte("shell-in-container")); n != 50*(round+1) {
			t.Errorf("round %d: %d lines on the terminal, want %d", round, n, 50*(round+1))
		}
		if bytes.Contains(b, []byte{0x1b}) {
			t.Error("escape sequences on a terminal that should have none")
		}
		if _, err := os.Stat(filepath.Join(dir, "state.ready")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the ready file is left: %v", err)
		}
	}
}

func startProcStdout(t testing.TB, stdout, state string, args ...string) *proc {
	t.Helper()
	f, err := os.OpenFile(stdout, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return startProcWith(t, f, state, args...)
}

func sendAlerts(t testing.TB, addr string, creds credentials.TransportCredentials, node string, e store.Epoch, n uint64) {
	t.Helper()
	a := &ingesttest.Agent{Node: node, Epoch: e}
	for i := uint64(1); i <= n; i++ {
		a.Records = append(a.Records, ingesttest.Record(t, node, i))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := a.Run(ctx, func() (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds))
	}); err != nil {
		t.Fatal(err)
	}
}

// Nobody reads the terminal, or it is gone: agents and the other sinks do not
// notice, and the collector stops when asked.
func TestTerminalNobodyReads(t *testing.T) {
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprint("closed ", closed), func(t *testing.T) {
			dir := storetest.Dir(t)
			state, file := filepath.Join(dir, "state"), filepath.Join(dir, "alerts.ndjson")
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			p := startProcWith(t, w, state, "--ndjson", file, "--terminal")
			w.Close()
			if closed {
				r.Close()
			} else {
				defer r.Close()
			}
			creds := issueFor(t, state, "n")
			sendAlerts(t, p.addr, creds, "n", storetest.Epoch(1), 1000) // more than the pipe holds
			testenv.Eventually(t, "all in the file", func() bool { return len(fileIDs(t, file)) == 1000 })
			sendAlerts(t, p.addr, creds, "n", storetest.Epoch(2), 10)
			if !closed {
				return // hanging for good: what is killed is tested in TestHangingSinkIsLeftBehind
			}
			if code := p.term(t); code != 0 {
				t.Errorf("exit code %d: %s", code, p.stderr)
			}
		})
	}
}

// A full disk: nothing is acknowledged, the process lives, and goes on by
// itself when there is room.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	testenv.SkipOn(t, unix.Mount("test", dir, "tmpfs", 0, "size=2m"), unix.EPERM)
	defer unix.Unmount(dir, unix.MNT_DETACH)
	state, file := filepath.Join(dir, "state"), filepath.Join(dir, "alerts.ndjson")
	p := startProc(t, state, "--ndjson", file, "--metrics", "127.0.0.1:0")
	creds := issueFor(t, state, "n")
	metrics := "http://" + p.logged(t, `metrics=(\S+)`)
	a := &ingesttest.Agent{Node: "n", Epoch: storetest.Epoch(1)}
	for i := uint64(1); i <= 3000; i++ {
		a.Records = append(a.Records, ingesttest.Record(t, "n", i))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- a.Run(ctx, func() (*grpc.ClientConn, error) {
			return grpc.NewClient("passthrough:///"+p.addr, grpc.WithTransportCredentials(creds))
		})
	}()
	testenv.Eventually(t, "not ready", func() bool { code, _ := get(t, metrics+"/readyz"); return code == 503 })
	if code, _ := get(t, metrics+"/healthz"); code != 200 {
		t.Errorf("healthz %d while the disk is full, want 200: a restart would not help", code)
	}
	select {
	case err := <-done:
		t.Fatalf("3000 alerts fit: %v", err)
	case <-p.exited:
		t.Fatalf("collector died: %s", p.stderr)
	default:
	}
	if err := unix.Mount("test", dir, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if code := p.term(t); code != 0 {
		t.Fatalf("exit code %d: %s", code, p.stderr)
	}
	if ids := fileIDs(t, file); len(ids) != 3000 || len(unique(ids)) != 3000 {
		t.Errorf("%d lines, %d different, want 3000", len(ids), len(unique(ids)))
	}
	if ids := storeIDs(t, state); len(ids) != 3000 || len(unique(ids)) != 3000 {
		t.Errorf("%d records, %d different, want 3000", len(ids), len(unique(ids)))
	}
}

func unique(ids []string) []string {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	return slices.Compact(ids)
}

func get(t testing.TB, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// What the metrics say adds up over HTTP, too.
func TestMetrics(t *testing.T) {
	dir := storetest.Dir(t)
	state := filepath.Join(dir, "state")
	p := startProc(t, state, "--ndjson", filepath.Join(dir, "f"), "--metrics", "127.0.0.1:0")
	url := "http://" + p.logged(t, `metrics=(\S+)`)
	creds := issueFor(t, state, "n")
	sendAlerts(t, p.addr, creds, "n", storetest.Epoch(1), 100)
	st, err := pb.NewIngestServiceClient(ingesttest.Dial(t, p.addr, creds)).Stream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e := storetest.Epoch(1)
	for _, m := range []*pb.StreamRequest{
		ingesttest.Hello("n", &pb.Lane{Epoch: e[:], FirstSeq: 1, Made: 100}),
		ingesttest.Batch(e, []*pb.Record{ingesttest.Record(t, "n", 100), {Seq: 101, Payload: []byte("x")}}),
	} {
		if err := st.Send(m); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	_, text := get(t, url+"/metrics")
	value := func(name string) float64 {
		m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindStringSubmatch(text)
		if m == nil {
			t.Errorf("no metric %s", name)
			return -1
		}
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Error(err)
		}
		return v
	}
	for name, want := range map[string]float64{
		"procession_collector_records_received_total":                         102,
		`procession_collector_records_total{result="stored"}`:                 100,
		`procession_collector_records_total{result="duplicate"}`:              1,
		`procession_collector_records_total{result="rejected"}`:               1,
		`procession_collector_records_total{result="gap"}`:                    0,
		`procession_collector_records_refused_total{reason="invalid"}`:        0,
		`procession_collector_gaps_total`:                                     0,
		`procession_collector_streams`:                                        1,
		`procession_collector_sink_errors_total{sink="ndjson",what="failed"}`: 0,
	} {
		if got := value(name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if value("procession_collector_commits_total") < 1 || value("procession_collector_commit_seconds_count") < 1 {
		t.Error("no commits counted")
	}
	if strings.Contains(text, "procession_") && strings.Count(text, "# HELP procession_collector_") < 15 {
		t.Error("metrics without help")
	}
}

// logged waits for a line in the collector's log: its standard error comes
// through a pipe, so a line may be seen later than the ready file written
// before it.
func (p *proc) logged(t testing.TB, re string) string {
	t.Helper()
	var m []string
	testenv.Eventually(t, "a line "+re+" in the log", func() bool {
		m = regexp.MustCompile(re).FindStringSubmatch(p.stderr.String())
		return m != nil
	})
	return strings.Trim(m[1], `"`)
}

// The line of the log that says the collector is ready is there for scripts.
func TestReadyLine(t *testing.T) {
	p := startProc(t, filepath.Join(storetest.Dir(t), "state"))
	if got := p.logged(t, `msg="collector ready" listen=(\S+)`); got != p.addr {
		t.Errorf("logged address %s, in the ready file %s", got, p.addr)
	}
}

// One signal stops in order; a second one, while that takes long, kills.
func TestSecondSignalKills(t *testing.T) {
	dir := storetest.Dir(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	p := startProcWith(t, w, filepath.Join(dir, "state"), "--terminal")
	creds := issueFor(t, filepath.Join(dir, "state"), "n")
	sendAlerts(t, p.addr, creds, "n", storetest.Epoch(1), 1000) // fills the pipe: the sink hangs
	if err := p.cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "stopping", func() bool { return strings.Contains(p.stderr.String(), "collector stopping") })
	if err := p.cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	<-p.exited
	if ws := p.cmd.ProcessState.Sys().(interface{ Signaled() bool }); !ws.Signaled() {
		t.Errorf("ended with %v, want killed by the signal", p.cmd.ProcessState)
	}
}

// blocked is a terminal that takes nothing.
type blocked struct{ c chan struct{} }

func (b blocked) Write([]byte) (int, error) { <-b.c; return 0, errors.New("closed") }

// A sink that hangs does not keep the collector from stopping.
func TestHangingSinkIsLeftBehind(t *testing.T) {
	dir := storetest.Dir(t)
	hang := blocked{make(chan struct{})}
	c, err := New(t.Context(), Config{State: filepath.Join(dir, "state"), Listen: "127.0.0.1:0", Terminal: hang,
		NDJSON: filepath.Join(dir, "f"), DrainWait: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	<-c.Ready()
	sendAlerts(t, c.Addr().String(), issueFor(t, filepath.Join(dir, "state"), "n"), "n", storetest.Epoch(1), 5)
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a hanging sink keeps the collector")
	}
	close(hang.c)
	if ids := fileIDs(t, filepath.Join(dir, "f")); len(ids) != 5 {
		t.Errorf("%d lines in the file, want 5", len(ids))
	}
}

// A listener that fails ends the collector with the reason.
func TestRunFails(t *testing.T) {
	c, err := New(t.Context(), Config{State: filepath.Join(storetest.Dir(t), "state"), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	c.agent.Close()
	if err := c.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "serve agents") {
		t.Errorf("Run: %v, want that agents cannot be served", err)
	}
}

// Every mistake at the start is one line that says what, why, and what to do.
func TestCommandLine(t *testing.T) {
	dir := storetest.Dir(t)
	state := filepath.Join(dir, "state")
	if out, err := command("issue", "--state", state, "--node", "n", "--out", filepath.Join(dir, "out")).CombinedOutput(); err != nil {
		t.Fatalf("issue without a collector: %v: %s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	used := storetest.Dir(t)
	st, err := store.OpenSQLite(t.Context(), used)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	broken := storetest.Dir(t)
	if err := os.Mkdir(filepath.Join(broken, "pki"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(broken, "pki", "ca.pem"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	nodb := storetest.Dir(t)
	if err := os.WriteFile(filepath.Join(nodb, "alerts.db"), bytes.Repeat([]byte("x"), 9000), 0o600); err != nil {
		t.Fatal(err)
	}
	serve := func(args ...string) []string {
		return append([]string{"serve", "--listen", "127.0.0.1:0", "--state", state}, args...)
	}
	tests := []struct {
		name string
		args []string
		code int
		out  string // on stdout
		err  string // on stderr; one line
	}{
		{"nothing", nil, 2, "", "Start here:"},
		{"help", []string{"--help"}, 0, "Start here:", ""},
		{"help word", []string{"help"}, 0, "Start here:", ""},
		{"help of serve", []string{"serve", "--help"}, 0, "--ndjson FILE", ""},
		{"help of issue", []string{"issue", "-h"}, 0, "--ttl TIME", ""},
		{"version", []string{"version"}, 0, "collector test\n", ""},
		{"no such command", []string{"frobnicate"}, 2, "", `no command "frobnicate"`},
		{"no such flag", serve("--frob"), 2, "", "-frob (--help lists them)"},
		{"argument", serve("x"), 2, "", `unexpected argument "x"`},
		{"no state", []string{"serve"}, 2, "", "--state: must name a directory"},
		{"flags without a command", []string{"--listen", "x"}, 2, "", "--state: must name a directory"},
		{"address without a port", serve("--listen", "localhost"), 2, "", "--listen: address localhost: missing port"},
		{"metrics without a port", serve("--metrics", "x"), 2, "", "--metrics: address x"},
		{"colour", serve("--terminal=blue"), 2, "", `--terminal: "blue" is none of auto, always, never`},
		{"log format", serve("--log-format", "xml"), 2, "", `--log-format: "xml", want text or json`},
		{"log level", serve("--log-level", "loud"), 2, "", `--log-level: "loud"`},
		{"cluster", serve("--cluster", "a/b"), 2, "", `--cluster: "a/b"`},
		{"server name", serve("--name", "a b"), 2, "", `--name: server name "a b"`},
		{"port taken", serve("--listen", l.Addr().String()), 1, "", "is taken by another process; stop it, or choose another port"},
		{"metrics port taken", serve("--metrics", l.Addr().String()), 1, "", "--metrics: " + l.Addr().String() + " is taken"},
		{"not our address", serve("--listen", "192.0.2.1:7443"), 1, "", "192.0.2.1:7443 is not an address of this machine"},
		{"state in use", serve("--state", used), 1, "", "in use by another collector; stop that one"},
		{"state is a file", serve("--state", filepath.Join(dir, "out", "ca.crt")), 1, "", "not a directory"},
		{"state cannot be made", serve("--state", "/proc/x/y"), 1, "", "--state: make the state directory"},
		{"no database", serve("--state", nodb), 1, "", "move alerts.db* away"},
		{"broken authority", serve("--state", broken), 1, "", "ca.pem: no certificate in PEM; restore it from a backup"},
		{"ndjson into nothing", serve("--ndjson", filepath.Join(dir, "no", "f")), 1, "", "--ndjson: open the NDJSON file"},
		{"ready file into nothing", serve("--ready-file", filepath.Join(dir, "no", "f")), 1, "", "--ready-file: open"},
		{"issue without a node", []string{"issue", "--state", state, "--out", dir}, 2, "", "--node: is required"},
		{"issue for a bad name", []string{"issue", "--state", state, "--out", dir, "--node", "a/b"}, 2, "", `--node: node name "a/b"`},
		{"issue for too long", []string{"issue", "--state", state, "--out", dir, "--node", "n", "--ttl", "9000h"}, 2, "", "--ttl: 9000h0m0s, want 1h0m0s to 720h0m0s"},
		{"issue into a file", []string{"issue", "--state", state, "--out", filepath.Join(dir, "out", "ca.crt"), "--node", "n"}, 1, "", "output directory"},
		{"issue from a broken authority", []string{"issue", "--state", broken, "--out", dir, "--node", "n"}, 1, "", "ca.pem: no certificate"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			c := exec.CommandContext(ctx, os.Args[0], tt.args...)
			c.Env = append(os.Environ(), asCollector+"=1")
			var out, stderr bytes.Buffer
			c.Stdout, c.Stderr = &out, &stderr
			c.Run()
			if code := c.ProcessState.ExitCode(); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if !strings.Contains(out.String(), tt.out) || tt.out == "" && out.Len() > 0 {
				t.Errorf("stdout %q, want %q", out.String(), tt.out)
			}
			if !strings.Contains(stderr.String(), tt.err) || tt.err == "" && stderr.Len() > 0 {
				t.Errorf("stderr %q, want %q", stderr.String(), tt.err)
			}
			if n := strings.Count(strings.TrimSpace(stderr.String()), "\n"); tt.code == 1 && n > 2 {
				t.Errorf("%d lines on stderr:\n%s", n+1, stderr.String())
			}
		})
	}
}

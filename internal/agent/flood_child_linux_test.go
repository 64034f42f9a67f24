package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/testenv/receiver"
	flood "github.com/procession-dev/procession/internal/testenv/storm"
)

// What this program is instead of a test.
const (
	floodRun     = "PROCESSION_FLOOD_MAKE"    // makes a flood: kind, makers, limit, time
	floodReceive = "PROCESSION_FLOOD_RECEIVE" // is a collector
)

func TestMain(m *testing.M) {
	if command := os.Getenv(commandVar); command != "" {
		os.Exit(Main(strings.Fields(command), os.Stdout, os.Stderr, "test"))
	}
	var role func() error
	switch {
	case os.Getenv(floodRun) != "":
		role = makeFlood
	case os.Getenv(floodReceive) != "":
		role = receive
	default:
		os.Exit(m.Run())
	}
	if err := role(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// makeFlood prints how many tasks it made.
func makeFlood() error {
	// What makes the flood is no agent: it goes before nobody.
	if err := renice(0); err != nil {
		return err
	}
	var kind, d string
	var makers int
	var limit int64
	if _, err := fmt.Sscan(os.Getenv(floodRun), &kind, &makers, &limit, &d); err != nil {
		return err
	}
	lasts, err := time.ParseDuration(d)
	if err != nil {
		return err
	}
	// Until we are told that our parent is ready to count. Without it there is nothing to make.
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return err
	}
	n, err := flood.Make(flood.Kind(kind), makers, limit, lasts)
	fmt.Print(n)
	return err
}

// An arrival is a record at the collector.
type arrival struct {
	Seq uint64
	At  uint64 // ns of CLOCK_MONOTONIC
}

// A greeting is how to reach the collector.
type greeting struct {
	Addr string
	CA   []byte
}

// receive is a collector until its input ends. It prints a greeting and then
// arrivals, one a line. A collector is another machine's, where no flood keeps
// it waiting: here that takes more priority than the flood has.
func receive() error {
	if err := renice(-20); err != nil && os.Getenv(floodVar) != "" {
		return err
	}
	conf, ca, err := receiver.PKI()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	arrivals := make(chan arrival, 100_000)
	go func() {
		out := json.NewEncoder(os.Stdout)
		out.Encode(greeting{l.Addr().String(), ca})
		for a := range arrivals {
			out.Encode(a)
		}
	}()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		l.Close()
	}()
	s := &receiver.Server{Store: receiver.NewStore(), Arrived: func(b *pb.Batch) {
		at := monotonic()
		for _, r := range b.Records {
			arrivals <- arrival{r.Seq, at}
		}
	}}
	return s.Serve(l, conf)
}

// monotonic is the clock the kernel stamps events with.
func monotonic() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0
	}
	return uint64(now.Nano())
}

// startReceiver starts a collector that ends with the test, and says how to
// reach it and what comes there.
func startReceiver(t *testing.T) (greeting, <-chan arrival) {
	t.Helper()
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), floodReceive+"=1")
	child.Stderr = os.Stderr
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	arrivals := make(chan arrival, 100_000)
	read := make(chan error, 1)
	t.Cleanup(func() {
		in.Close()
		if err := <-read; !errors.Is(err, io.EOF) {
			t.Errorf("what the collector says: %v", err)
		}
		if err := child.Wait(); err != nil {
			t.Errorf("collector: %v", err)
		}
	})
	lines := json.NewDecoder(bufio.NewReader(out))
	var g greeting
	if err := lines.Decode(&g); err != nil {
		read <- err
		t.Fatal(err)
	}
	go func() {
		for {
			var a arrival
			if err := lines.Decode(&a); err != nil {
				read <- err
				return
			}
			arrivals <- a
		}
	}()
	return g, arrivals
}

// A running is a process that makes a flood, or has it made.
type running struct {
	cmd *exec.Cmd
	in  io.Writer
	out io.Reader
}

// startFlood starts one that waits until it may. A cgroup of its own can be
// its directory's name.
func startFlood(t *testing.T, kind flood.Kind, limit int64, lasts time.Duration, cgroup string) *running {
	t.Helper()
	r := &running{cmd: exec.Command("/proc/self/exe")}
	r.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d %s", floodRun, kind, runtime.NumCPU(), limit, lasts))
	r.cmd.Stderr = os.Stderr
	var err error
	if r.out, err = r.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if cgroup != "" {
		if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(fmt.Sprint(r.cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// run lets it make the flood, with meanwhile called again and again, and says
// how many tasks it made and how long that took.
func (r *running) run(t *testing.T, meanwhile func()) (made int64, took time.Duration) {
	t.Helper()
	begin := time.Now()
	if _, err := fmt.Fprintln(r.in); err != nil {
		t.Fatal(err)
	}
	over, done := context.WithCancel(context.Background())
	var err error
	go func() {
		_, err = fmt.Fscan(r.out, &made)
		took = time.Since(begin)
		done()
	}()
	for over.Err() == nil {
		meanwhile()
		select {
		case <-over.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	if werr := r.cmd.Wait(); err != nil || werr != nil {
		t.Fatalf("flood: %v, %v", err, werr)
	}
	return made, took
}

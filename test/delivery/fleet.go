package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"

	"sync"
	"syscall"
	"time"

	"github.com/procession-dev/procession/internal/forward"
	"github.com/procession-dev/procession/internal/pki"
	"github.com/procession-dev/procession/internal/spool"
)

// fleetWord makes this program the agents' ends of many streams.
const fleetWord = "fleet"

// filesPerAgent: its connection, and the lock and the counters of its spool.
const filesPerAgent = 3

// runFleet is the child: for each folder of certificates below dir an agent's forwarder
// with an empty spool, on a source address of its own. It says how many have
// a stream, and how many streams there were, until its stdin ends.
func runFleet(addr, dir string) error {
	debug.SetGCPercent(400) // the CPU belongs to the collector
	nodes, err := os.ReadDir(filepath.Join(dir, "tls"))
	if err != nil {
		return err
	}
	if err := raiseFiles(filesPerAgent*len(nodes) + 100); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { io.Copy(io.Discard, os.Stdin); stop() }()
	all := make([]*forward.Forwarder, len(nodes))
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	for i, n := range nodes {
		sp, err := spool.Open(spool.Config{Dir: filepath.Join(dir, "spools", n.Name())})
		if err != nil {
			return err
		}
		defer sp.Close()
		all[i], err = forward.New(forward.Config{Spool: sp, Target: "passthrough:///" + addr, Node: n.Name(), DrainTimeout: -1,
			TLS:  agentFiles(filepath.Join(dir, "tls", n.Name())).TLS,
			Dial: dialFrom(source(i))})
		if err != nil {
			return err
		}
	}
	for _, f := range all {
		running.Go(func() { f.Run(ctx) })
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		connected, streams := 0, uint64(0)
		for _, f := range all {
			st := f.Status()
			streams += st.Connections
			if st.Connected {
				connected++
			}
		}
		if _, err := fmt.Println(connected, streams); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// source is the i-th loopback address that agents come from: each node has its own.
func source(i int) net.IP { return net.IPv4(127, 1, byte(i/250), byte(i%250+1)) }

func dialFrom(ip net.IP) func(context.Context, string) (net.Conn, error) {
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: ip}}
	return func(ctx context.Context, addr string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }
}

// raiseFiles lets this process have at least n files.
func raiseFiles(n int) error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	l.Cur, l.Max = max(l.Cur, uint64(n)), max(l.Max, uint64(n))
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("%d open files (ulimit -n): %w", n, err)
	}
	return nil
}

// A fleet is the child as its parent sees it.
type fleet struct {
	*proc
	stdin io.Closer
	said  chan [2]int // connected now, streams so far

	streams int // of what was said last
}

func (b *bench) fleet(addr, dir string) (*fleet, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out, in := io.Pipe()
	f := &fleet{stdin: w, said: make(chan [2]int, 1)}
	p := &proc{done: make(chan struct{})}
	p.cmd = b.self(fleetWord, addr, dir)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = r, in, &p.tail
	if err := p.cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	f.proc = p
	go func() { p.cmd.Wait(); in.Close(); close(p.done) }()
	go func() {
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			var s [2]int
			if n, _ := fmt.Sscan(sc.Text(), &s[0], &s[1]); n != 2 {
				continue
			}
			select { // only the newest counts
			case <-f.said:
			default:
			}
			f.said <- s
		}
		io.Copy(io.Discard, out)
	}()
	return f, nil
}

func (f *fleet) close() {
	if f != nil {
		f.stdin.Close()
		f.stop(syscall.SIGCONT)
	}
}

// An arrival is how agents came to their streams after a collector's start.
type arrival struct {
	half, most, all time.Duration // until so many had one; most are 99 of 100
	cpu             time.Duration // of the collector until then
}

func (a arrival) String() string {
	return fmt.Sprintf("%.1f s (half of them %.1f s, 99 %% %.1f s), %.1f s of the collector's CPU", a.all.Seconds(), a.half.Seconds(), a.most.Seconds(), a.cpu.Seconds())
}

// arrive waits until n more streams than before were made and n are up.
func (f *fleet) arrive(ctx context.Context, c *collector, n int) (a arrival, err error) {
	begin, before := time.Now(), f.streams
	var connected int
	for {
		select {
		case s := <-f.said:
			connected, f.streams = s[0], s[1]
		case <-f.done:
			return a, fmt.Errorf("the agents' %w", f.ended())
		case <-ctx.Done():
			return a, fmt.Errorf("%w: %d of %d agents have a stream", context.Cause(ctx), connected, n)
		}
		for at, share := range map[*time.Duration]int{&a.half: 50, &a.most: 99, &a.all: 100} {
			if *at == 0 && (f.streams-before)*100 >= n*share {
				*at = time.Since(begin)
			}
		}
		if connected == n && a.all != 0 {
			a.cpu, err = c.cpu()
			return a, err
		}
	}
}

func nodeName(i int) string { return fmt.Sprintf("node-%05d", i) }

// issue makes a certificate for each of n nodes below dir/tls.
func issue(state, dir string, n int) error {
	ca, err := pki.Open(filepath.Join(state, "pki"))
	if err != nil {
		return err
	}
	for i := range n {
		node := nodeName(i)
		if _, err := ca.Issue(node, time.Hour, filepath.Join(dir, "tls", node)); err != nil {
			return err
		}
	}
	return nil
}

// idle measures what silent agents cost a collector, and how they come back.
func (b *bench) idle(ctx context.Context) (err error) {
	dir, err := b.folder("idle")
	if err != nil {
		return err
	}
	c := &collector{b: b, dir: dir, addr: "127.0.0.1:0"}
	if err := issue(c.state(), dir, b.agents); err != nil {
		return err
	}
	if err := c.start(ctx); err != nil {
		return err
	}
	defer func() { c.stop(syscall.SIGTERM) }()
	empty, err := c.rss()
	if err != nil {
		return err
	}
	f, err := b.fleet(c.addr, dir)
	if err != nil {
		return err
	}
	defer f.close()
	select { // their spools are open
	case <-f.said:
	case <-f.done:
		return fmt.Errorf("the agents' %w", f.ended())
	}
	first, err := f.arrive(ctx, c, b.agents)
	if err != nil {
		return err
	}
	fmt.Fprintf(b.log, "idle: all %d have a stream after %v\n", b.agents, first)
	early, quiet, most, err := b.watchMemory(ctx, c.proc)
	if err != nil {
		return err
	}
	fmt.Fprintf(b.log, "idle: %.0f MiB at once, %.0f MiB in the long run, at most %.0f MiB; %.0f MiB before\n", early, quiet, most, empty)
	back := make(map[syscall.Signal]arrival)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		begin := time.Now()
		c.stop(sig)
		stopped := time.Since(begin)
		if err := c.start(ctx); err != nil {
			return err
		}
		a, err := f.arrive(ctx, c, b.agents)
		if err != nil {
			return err
		}
		back[sig] = a
		fmt.Fprintf(b.log, "idle: after a %v, which took %.1f s, all are back in %v\n", sig, stopped.Seconds(), a)
	}
	n := b.agents
	b.rows.add(fmt.Sprintf("collector with %d idle agents over TLS, each with a certificate of its own and a heartbeat every 15 s", n),
		fmt.Sprintf("%.0f MiB (at most %.0f), %.0f MiB without agents: %.0f KiB each", quiet, most, empty, (quiet-empty)*1024/float64(n)), "260 MiB")
	b.rows.add("until all have a stream, at first", first.String(), "")
	b.rows.add("the same after a `kill -9` of the collector", back[syscall.SIGKILL].String(), "")
	b.rows.add(fmt.Sprintf("the same after a SIGTERM, which asks them to spread over %v", spread(n)), back[syscall.SIGTERM].String(), "")
	return nil
}

// spread is what a collector that stops asks n agents to spread their return over.
func spread(n int) time.Duration {
	return max(2*time.Second, (time.Duration(n) * time.Second / 200).Round(time.Second))
}

// watchMemory is a process's memory at once and in the long run, which is the
// median of the last seconds, and the highest seen.
func (b *bench) watchMemory(ctx context.Context, p *proc) (early, quiet, most float64, err error) {
	var all []float64
	for end := time.Now().Add(b.settle); ; {
		m, err := p.rss()
		if err != nil {
			return 0, 0, 0, errors.Join(err, p.ended())
		}
		all, most = append(all, m), max(most, m)
		if time.Now().After(end) {
			break
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return 0, 0, 0, err
		}
	}
	return all[0], median(all[len(all)/2:]), most, nil
}

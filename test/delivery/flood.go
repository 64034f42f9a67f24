package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// floodWord makes this program the peer of many hostile connections.
const floodWord = "flood"

// Who is honest while the flood lasts, and where the others come from.
const honest, hostileNodes, hostileSources = 20, 50, 200

// The ways of hostile connections, in turns.
var hostile = []struct {
	about string
	run   func(ctx context.Context, addr, tlsDir string, i int) error
}{
	{"silent", silent},
	{"bytes that are no TLS, a few a second", noTLS},
	{"a handshake and then nothing", quietTLS},
	{"a frame that is drip-fed", slowFrame},
	{"a stream without a hello", noHello},
}

// runFlood is the child: n connections at once that try what they can, and again
// when they are closed, until stdin ends.
func runFlood(addr, dir string, n int) error {
	debug.SetGCPercent(400)
	if err := raiseFiles(n + 200); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	go func() { io.Copy(io.Discard, os.Stdin); stop() }()
	var all sync.WaitGroup
	for i := range n {
		way := hostile[i%len(hostile)]
		certs := filepath.Join(dir, "tls", nodeName(honest+i%hostileNodes))
		all.Go(func() {
			for ctx.Err() == nil {
				way.run(ctx, addr, certs, i) // any end is an end
				pause(ctx, time.Second)
			}
		})
		if i%100 == 99 {
			pause(ctx, 10*time.Millisecond) // the queue of the listener is not what is tested
		}
	}
	all.Wait()
	return nil
}

func dialHostile(ctx context.Context, addr string, i int) (net.Conn, error) {
	c, err := dialFrom(source(5000+i%hostileSources))(ctx, addr)
	if err == nil {
		context.AfterFunc(ctx, func() { c.Close() })
	}
	return c, err
}

func silent(ctx context.Context, addr, _ string, i int) error {
	c, err := dialHostile(ctx, addr, i)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(io.Discard, c)
	return err
}

func noTLS(ctx context.Context, addr, _ string, i int) error {
	c, err := dialHostile(ctx, addr, i)
	if err != nil {
		return err
	}
	return drip(ctx, c, []byte("\x16\x03\x01\x3f\xff"))
}

// drip sends bytes one by one, the last for ever.
func drip(ctx context.Context, c net.Conn, b []byte) error {
	defer c.Close()
	for {
		if _, err := c.Write(b[:1]); err != nil {
			return err
		}
		if len(b) > 1 {
			b = b[1:]
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return err
		}
	}
}

func handshake(ctx context.Context, addr, certs string, i int) (*tls.Conn, error) {
	conf, err := agentFiles(certs).TLS(ctx)
	if err != nil {
		return nil, err
	}
	conf.NextProtos = []string{"h2"}
	raw, err := dialHostile(ctx, addr, i)
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, conf)
	if err := c.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func quietTLS(ctx context.Context, addr, certs string, i int) error {
	c, err := handshake(ctx, addr, certs, i)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(io.Discard, c)
	return err
}

func slowFrame(ctx context.Context, addr, certs string, i int) error {
	c, err := handshake(ctx, addr, certs, i)
	if err != nil {
		return err
	}
	// The preface, empty settings, and the head of a HEADERS frame of 16 KiB.
	if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x40\x00\x01\x04\x00\x00\x00\x01"); err != nil {
		c.Close()
		return err
	}
	return drip(ctx, c, []byte{0x82})
}

func noHello(ctx context.Context, addr, certs string, i int) error {
	cc, err := dialAs(ctx, addr, certs, 5000+i%hostileSources)
	if err != nil {
		return err
	}
	defer cc.Close()
	st, err := pb.NewIngestServiceClient(cc).Stream(ctx)
	if err != nil {
		return err
	}
	_, err = st.Recv()
	return err
}

// flood measures what honest agents feel, and the collector's memory, while
// others hold thousands of connections open.
func (b *bench) flood(ctx context.Context) error {
	dir, err := b.folder("flood")
	if err != nil {
		return err
	}
	c := &collector{b: b, dir: dir, addr: "127.0.0.1:0"}
	if err := issue(c.state(), dir, honest+hostileNodes); err != nil {
		return err
	}
	if err := c.start(ctx); err != nil {
		return err
	}
	defer func() { c.stop(syscall.SIGTERM) }()
	all, err := senders(ctx, c.addr, dir, honest, durableEach)
	defer closeAll(all)
	if err != nil {
		return err
	}
	before, err := b.single(ctx, all, epoch(0))
	if err != nil {
		return err
	}
	memory, err := c.rss()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	f := &proc{cmd: b.self(floodWord, c.addr, dir, strconv.Itoa(b.conns)), done: make(chan struct{})}
	f.cmd.Stdin, f.cmd.Stderr = r, &f.tail
	err = f.cmd.Start()
	r.Close()
	if err != nil {
		return err
	}
	go func() { f.cmd.Wait(); close(f.done) }()
	defer f.stop(syscall.SIGKILL)
	// All have been there once: what is refused, and what is let in, add up.
	open := 0
	for accepted := 0.0; accepted < float64(b.conns); {
		if err := f.ended(); err != nil {
			return err
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return err
		}
		if open, err = c.connections(); err != nil {
			return err
		}
		refused, err := c.counter("procession_collector_connections_refused_total")
		if err != nil {
			return err
		}
		accepted = refused + float64(open)
	}
	watch, stop := context.WithCancel(ctx)
	var most float64
	var watching sync.WaitGroup
	watching.Go(func() {
		for watch.Err() == nil {
			m, _ := c.rss()
			n, _ := c.connections()
			most, open = max(most, m), max(open, n)
			pause(watch, 500*time.Millisecond)
		}
	})
	during, err := b.single(ctx, all, epoch(1))
	stop()
	watching.Wait()
	if err != nil {
		return fmt.Errorf("an honest agent: %w", err)
	}
	refused, err := c.counter("procession_collector_connections_refused_total")
	if err != nil {
		return err
	}
	b.rows.add(fmt.Sprintf("%d honest agents, 5 alerts a second each: from sending to the acknowledgement", honest), quantiles(before), "")
	b.rows.add(fmt.Sprintf("the same beside %d hostile connections (silent, no TLS, silent after the handshake, drip-fed frames, streams without a hello) that come again when closed", b.conns),
		quantiles(during), "delivery goes on")
	b.rows.add("the collector meanwhile", fmt.Sprintf("%.0f MiB at most (%.0f before), %d connections open at most, %.0f refused", most, memory, open, refused), "bounded")
	fmt.Fprintf(b.log, "flood: %s before, %s during; %.0f MiB, %d open, %.0f refused\n", quantiles(before), quantiles(during), most, open, refused)
	return nil
}

// connections are the sockets the collector has.
func (c *collector) connections() (int, error) {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
	return len(fds), err
}

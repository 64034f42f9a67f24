package ingest

import (
	"net"
	"sync"
	"time"
)

// A pace lets a stream bring so many records a second in the long run, and
// burst at once. What is beyond is not read before its time: the agent keeps it.
type pace struct {
	rate, burst float64
	paid        time.Time // all records taken so far are paid for by then
}

// take notes n records.
func (p *pace) take(n int, now time.Time) {
	if p.rate <= 0 {
		return
	}
	if earliest := now.Add(-time.Duration(p.burst / p.rate * float64(time.Second))); p.paid.Before(earliest) {
		p.paid = earliest
	}
	p.paid = p.paid.Add(time.Duration(float64(n) / p.rate * float64(time.Second)))
}

// wait is how long nothing more may be read.
func (p *pace) wait(now time.Time) time.Duration { return p.paid.Sub(now) }

// A gate bounds connections that have not shown who they are, by certificate or
// token, per address, in all and in time: they hold what the handshake has allocated.
// An agent comes from its node, so another address that floods takes nothing
// from it. All connections together are bounded as well.
type gate struct {
	net.Listener
	m *metrics

	perAddress, strangers, conns int           // limits
	meetWait                     time.Duration // how long one may stay a stranger

	mu     sync.Mutex
	byAddr map[string]int // strangers, by address; guarded by mu
	unmet  int            // strangers; guarded by mu
	open   int            // connections; guarded by mu
}

// Accept implements net.Listener. Connections beyond the limits are closed.
func (g *gate) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		tcp, ok := c.(*net.TCPConn)
		if !ok {
			return c, nil
		}
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		reason := g.enter(host)
		if reason == "" {
			c := &gatedConn{TCPConn: tcp, g: g, host: host}
			g.mu.Lock()
			c.stranger = time.AfterFunc(g.meetWait, c.late)
			g.mu.Unlock()
			return c, nil
		}
		g.m.refusedConns.WithLabelValues(reason).Inc()
		tcp.SetLinger(0) // no state is kept for it here
		tcp.Close()
	}
}

func (g *gate) enter(host string) (reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.open >= g.conns:
		return "connections"
	case g.byAddr[host] >= g.perAddress:
		return "address"
	case g.unmet >= g.strangers:
		return "strangers"
	}
	g.byAddr[host]++
	g.unmet++
	g.open++
	return ""
}

// A gatedConn is counted until it is closed.
type gatedConn struct {
	*net.TCPConn
	g    *gate
	host string

	stranger *time.Timer // closes it; nil when it is known who this is; guarded by g.mu
	closed   bool        // guarded by g.mu
}

// met: it is known who this is.
func (c *gatedConn) met() {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	c.metLocked()
}

func (c *gatedConn) metLocked() {
	if c.stranger == nil {
		return
	}
	c.stranger.Stop()
	c.stranger = nil
	c.g.unmet--
	if c.g.byAddr[c.host]--; c.g.byAddr[c.host] == 0 {
		delete(c.g.byAddr, c.host)
	}
}

// late: it has not shown who it is in time.
func (c *gatedConn) late() {
	c.g.mu.Lock()
	stranger := c.stranger != nil
	c.g.mu.Unlock()
	if stranger {
		c.g.m.refusedConns.WithLabelValues("late").Inc()
		c.SetLinger(0)
		c.Close()
	}
}

// Close implements net.Conn.
func (c *gatedConn) Close() error {
	c.g.mu.Lock()
	if !c.closed {
		c.closed = true
		c.g.open--
		c.metLocked()
	}
	c.g.mu.Unlock()
	return c.TCPConn.Close()
}

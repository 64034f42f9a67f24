package main

import (
	"net"
	"sync"
	"time"
)

// A relay passes TCP on from agents to the collector, until told otherwise.
type relay struct {
	l net.Listener

	mu     sync.Mutex // guards what follows
	target string
	pairs  map[*pair]bool
	refuse bool
	hold   chan struct{} // closed when bytes may flow again; nil: they flow
	pause  time.Duration // between pieces of a kilobyte
}

// A pair is one connection and its other half.
type pair struct{ in, out *net.TCPConn }

func newRelay() (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{l: l, pairs: make(map[*pair]bool)}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go r.pass(c.(*net.TCPConn))
		}
	}()
	return r, nil
}

func (r *relay) addr() string { return r.l.Addr().String() }

func (r *relay) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

func (r *relay) pass(in *net.TCPConn) {
	r.mu.Lock()
	target, refuse := r.target, r.refuse
	r.mu.Unlock()
	if refuse {
		in.SetLinger(0)
		in.Close()
		return
	}
	c, err := net.DialTimeout("tcp", target, time.Second)
	if err != nil {
		in.Close()
		return
	}
	p := &pair{in, c.(*net.TCPConn)}
	r.set(func() { r.pairs[p] = true })
	var both sync.WaitGroup
	both.Go(func() { r.copy(p, p.out, p.in, true) })
	both.Go(func() { r.copy(p, p.in, p.out, false) })
	both.Wait()
	r.set(func() { delete(r.pairs, p) })
}

func (r *relay) copy(p *pair, to, from *net.TCPConn, up bool) {
	defer func() {
		if up { // bytes on their way to the collector may outlive the agent's half
			p.out.Close()
		}
		p.in.Close()
	}()
	b := make([]byte, 1024)
	for {
		n, err := from.Read(b)
		if n > 0 {
			r.mu.Lock()
			hold, pause := r.hold, r.pause
			r.mu.Unlock()
			if hold != nil {
				<-hold
			}
			time.Sleep(pause)
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// cut breaks every connection; new ones are refused until heal.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuse = true
	for p := range r.pairs {
		p.in.SetLinger(0)
		p.in.Close()
		p.out.SetLinger(0)
		p.out.Close()
	}
}

// stall keeps all bytes back until flow.
func (r *relay) stall() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hold == nil {
		r.hold = make(chan struct{})
	}
}

// orphan keeps bytes back and breaks the agents' halves of the connections:
// they come back on new ones while the old streams live on at the collector.
// The new ones pass at once; what was kept back follows at flow.
func (r *relay) orphan() (flow func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	held := make(chan struct{})
	r.hold = held
	old := make([]*pair, 0, len(r.pairs))
	for p := range r.pairs {
		old = append(old, p)
	}
	go func() {
		time.Sleep(100 * time.Millisecond) // so that there is something in the hand
		for _, p := range old {
			p.in.SetLinger(0)
			p.in.Close()
		}
		r.set(func() {
			if r.hold == held {
				r.hold = nil
			}
		})
	}()
	return sync.OnceFunc(func() { close(held) })
}

// heal lets everything pass again.
func (r *relay) heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuse, r.pause = false, 0
	if r.hold != nil {
		close(r.hold)
		r.hold = nil
	}
}

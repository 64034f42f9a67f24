package token

import (
	"net"
	"sync"
	"time"
)

// How many refused tokens an address has, and how soon they are forgiven. An
// agent whose token is refused comes back with a growing pause, so that even
// a node with a broken agent stays below.
const (
	badBurst     = 10
	badPerMinute = 10
	maxAddresses = 4096
)

// addresses counts refused tokens by address, so that one pod with made-up
// tokens does not use up what the API server may be asked.
type addresses struct {
	now func() time.Time

	mu sync.Mutex
	by map[string]*bucket // guarded by mu
}

// A bucket runs empty with every refused token, and fills up with time.
type bucket struct {
	left float64
	at   time.Time
}

func newAddresses(now func() time.Time) *addresses {
	return &addresses{now: now, by: make(map[string]*bucket)}
}

func (a *addresses) allowed(addr string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := a.by[host(addr)]
	if b == nil {
		return true
	}
	b.fill(a.now())
	return b.left >= 1
}

func (a *addresses) failed(addr string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	b := a.by[host(addr)]
	if b == nil {
		if len(a.by) >= maxAddresses {
			a.forgetLocked(now)
		}
		b = &bucket{left: badBurst, at: now}
		a.by[host(addr)] = b
	}
	b.fill(now)
	b.left = max(b.left-1, 0)
}

func (b *bucket) fill(now time.Time) {
	b.left = min(b.left+now.Sub(b.at).Minutes()*badPerMinute, badBurst)
	b.at = now
}

// forgetLocked makes room: those with nothing against them go first.
func (a *addresses) forgetLocked(now time.Time) {
	for k, b := range a.by {
		if b.fill(now); b.left >= badBurst {
			delete(a.by, k)
		}
	}
	for k := range a.by { // any quarter: the limit of questions per second holds in any case
		if len(a.by) < maxAddresses*3/4 {
			return
		}
		delete(a.by, k)
	}
}

// host is an address without its port: a peer has many ports.
func host(addr string) string {
	if h, _, err := net.SplitHostPort(addr); err == nil {
		return h
	}
	return addr
}

package kube

import "time"

// A want is a pod, or a container of it, that a process was seen in and that
// is not in the list.
type want struct{ uid, container string }

// wanted is a want's state. One that was given up stays for a while, so that
// the next event in the same cgroup does not begin anew.
type wanted struct {
	since, due, forget time.Time
	over               bool
}

// Bounds of wanting. The pod is in the kubelet's list half a second before its
// first program runs, so a refresh or two find it. The container's id follows
// within milliseconds to some 1.2 s (kubelets that look once a second); the
// sandbox's never does.
const (
	maxWants      = 1024
	firstTry      = 50 * time.Millisecond // for a container; a pod is looked for at once
	podPatience   = 2 * time.Minute
	patience      = 15 * time.Second // for a container
	negative      = 5 * time.Minute  // how long what was given up is not looked for
	longestPause  = 15 * time.Second // between two tries
	shortestPause = 100 * time.Millisecond
	// A list of so many bytes is followed by a pause of 20 times what it costs to
	// read it, at most a second: that is 5 % of a core of ours, and as much of the
	// kubelet's. The time it took would be a bad measure: on a busy machine that
	// is mostly waiting, and a name should not wait longer there.
	costShare   = 20
	readRate    = 32 << 20 // bytes of a list a core reads in a second (BenchmarkList)
	longestRest = time.Second
)

// Want asks for a pod, or for a container of a pod that is known, which the
// list lacks. It returns at once; Changed tells when something was found. A
// want is looked for until found, or for some time.
func (p *Pods) Want(uid, containerID string) {
	if len(p.sources) == 0 {
		return
	}
	now := time.Now()
	w := want{uid, containerID}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wants[w] != nil || p.now.Load().satisfies(w) {
		return
	}
	p.stats.Wanted++
	if len(p.wants) >= maxWants {
		p.stats.Refused++
		return
	}
	n := &wanted{since: now, due: now, forget: now.Add(podPatience + negative)}
	if containerID != "" {
		n.due = now.Add(firstTry)
	}
	p.wants[w] = n
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Unwant takes back the Want of a container that no list will ever have. It
// returns at once.
func (p *Pods) Unwant(uid, containerID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := want{uid, containerID}
	if n := p.wants[w]; n != nil && !n.over {
		p.stats.Withdrawn++
		delete(p.wants, w)
	}
}

func (l *list) satisfies(w want) bool {
	if w.container == "" {
		return l.pods[w.uid] != nil
	}
	_, ok := l.containers[w.container]
	return ok
}

// settleLocked looks which wants a new list has fulfilled.
func (p *Pods) settleLocked(now time.Time) {
	l := p.now.Load()
	for w, n := range p.wants {
		limit := podPatience
		if w.container != "" {
			limit = patience
		}
		switch {
		case l.satisfies(w):
			if !n.over {
				p.stats.Found++
			}
			delete(p.wants, w)
		case now.After(n.forget):
			delete(p.wants, w)
		case n.over:
		case now.Sub(n.since) > limit:
			n.over = true
			p.stats.GivenUp++
		default:
			// The longer it takes, the longer it may take still. This list was one for
			// all that are wanted, whoever it was fetched for.
			n.due = now.Add(min(max(shortestPause, now.Sub(n.since)/4), longestPause))
		}
	}
}

// nextWant is when the next list is wanted, at the latest at last.
func (p *Pods) nextWant(last time.Time) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.wants {
		if !n.over && n.due.Before(last) {
			last = n.due
		}
	}
	return last
}

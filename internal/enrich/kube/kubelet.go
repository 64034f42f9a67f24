package kube

import (
	"context"
	"fmt"
	"time"
)

// listTimeout is how long one answer may take to arrive whole.
const listTimeout = 30 * time.Second

// A kubelet answers at /pods. It has no watch: its list is fetched when
// something is wanted, and from time to time.
type kubelet struct{ client *client }

func (*kubelet) name() string { return "kubelet" }

func (k *kubelet) follow(ctx context.Context, p *Pods, synced func()) error {
	for {
		n, err := k.fetch(ctx, p)
		if err != nil {
			return err
		}
		synced()
		now := time.Now()
		if !p.await(ctx, now.Add(rest(n)), now.Add(p.cfg.Interval)) {
			return ctx.Err()
		}
	}
}

// rest is how long to leave the kubelet alone after a list of n bytes.
func rest(n int) time.Duration {
	cost := time.Duration(n) * time.Second / readRate
	return min(max(shortestPause, costShare*cost), longestRest)
}

// fetch reads the list and returns its length in bytes.
func (k *kubelet) fetch(ctx context.Context, p *Pods) (n int, err error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	body, err := k.client.get(ctx, "/pods")
	if err != nil {
		return 0, fmt.Errorf("kubelet: %w", err)
	}
	defer body.Close()
	d := newDecoder(body)
	pods, rejected, _, err := p.read(d)
	if err != nil {
		return 0, fmt.Errorf("kubelet: %w", err)
	}
	p.replace(pods, rejected)
	return d.in.all, nil
}

// read reads a whole list.
func (p *Pods) read(d *decoder) (pods []*Pod, rejected int, version string, err error) {
	version, err = d.list(func(w *wirePod) {
		q, ok := w.keep(p.cfg.Annotations)
		if !ok || len(pods) >= p.cfg.MaxPods {
			rejected++
			return
		}
		pods = append(pods, q)
	})
	return pods, rejected, version, err
}

// await waits until a list is wanted, but not before earliest nor after
// latest. It says false when ctx ends.
func (p *Pods) await(ctx context.Context, earliest, latest time.Time) bool {
	for {
		due := p.nextWant(latest)
		if due.Before(earliest) {
			due = earliest
		}
		t := time.NewTimer(time.Until(due))
		select {
		case <-ctx.Done():
			t.Stop()
			return false
		case <-t.C:
			return true
		case <-p.kick: // something new is wanted
			t.Stop()
		}
	}
}

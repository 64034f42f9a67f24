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
		begin := time.Now()
		if err := k.fetch(ctx, p); err != nil {
			return err
		}
		synced()
		end := time.Now()
		rest := max(shortestPause, costShare*end.Sub(begin))
		if !p.await(ctx, end.Add(min(rest, longestRest)), end.Add(p.cfg.Interval)) {
			return ctx.Err()
		}
	}
}

func (k *kubelet) fetch(ctx context.Context, p *Pods) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	body, err := k.client.get(ctx, "/pods")
	if err != nil {
		return fmt.Errorf("kubelet: %w", err)
	}
	defer body.Close()
	pods, rejected, _, err := p.read(newDecoder(body))
	if err != nil {
		return fmt.Errorf("kubelet: %w", err)
	}
	p.replace(pods, rejected)
	return nil
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

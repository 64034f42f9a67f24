package kube

import (
	"context"
	"fmt"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	podsv1 "k8s.io/kubelet/pkg/apis/pods/v1alpha1"
)

// A socket is the kubelet's Pods API (Kubernetes 1.37): root alone may connect,
// and it is a file of the host's, so it says by itself who answers.
type socket struct{ path string }

func (*socket) name() string { return "pods-api" }

func (s *socket) follow(ctx context.Context, p *Pods, synced func()) error {
	if _, err := os.Stat(s.path); err != nil {
		return fmt.Errorf("pods api: %w", err)
	}
	conn, err := grpc.NewClient("unix://"+s.path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxObject+1<<10)))
	if err != nil {
		return fmt.Errorf("pods api: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := podsv1.NewPodsClient(conn).WatchPods(ctx, &podsv1.WatchPodsRequest{})
	if err != nil {
		return fmt.Errorf("pods api: %w", err)
	}
	// Until the first list is complete, pods are collected.
	collecting := true
	var pods []*Pod
	rejected := 0
	for {
		ev, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("pods api: %w", err)
		}
		if ev.Type == podsv1.EventType_INITIAL_SYNC_COMPLETE {
			if collecting {
				p.replace(pods, rejected)
				synced()
			}
			collecting, pods = false, nil
			continue
		}
		var w wirePod
		if err := decodeProto(ev.Pod, &w); err != nil {
			return fmt.Errorf("pods api: %w", err)
		}
		q, ok := w.keep(p.cfg.Annotations)
		switch {
		case !ok, collecting && len(pods) >= p.cfg.MaxPods:
			rejected++
			if !collecting {
				p.reject()
			}
		case collecting:
			pods = append(pods, q)
		default:
			p.update(q, ev.Type == podsv1.EventType_DELETED)
		}
	}
}

// reject counts a pod that is none.
func (p *Pods) reject() {
	p.mu.Lock()
	p.stats.Rejected++
	p.mu.Unlock()
}

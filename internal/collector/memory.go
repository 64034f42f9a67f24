package collector

import (
	"context"
	"os"
	"runtime/debug"
	"time"
)

// Garbage is let grow to a share of what lives. With thousands of streams,
// where nearly all that lives is connections, that would be as much again for
// nothing; with few of them collecting often would cost alerts per second. So
// the share is what makes slackBytes of garbage, within bounds.
const (
	slackBytes  = 48 << 20
	streamBytes = 45 << 10 // heap and stacks of one, as measured by test/delivery
	leastShare  = 25       // per cent
)

// garbageShare is the per cent for so many streams.
func garbageShare(streams int) int {
	return min(100, max(leastShare, 100*slackBytes/max(1, streams*streamBytes)))
}

// tuneMemory keeps that share, unless the operator set GOGC.
func (c *Collector) tuneMemory(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	t := time.NewTicker(2 * time.Second)
	defer t.Stop()
	for now := 100; ; {
		select {
		case <-ctx.Done():
			debug.SetGCPercent(100)
			return
		case <-t.C:
		}
		// Setting it stops everything for a moment: only when it matters.
		if share := garbageShare(c.srv.Nodes()); share*10 > now*11 || share*10 < now*9 || share != now && (share == 100 || share == leastShare) {
			debug.SetGCPercent(share)
			now = share
		}
	}
}

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
// the share is what makes so many bytes of garbage, within bounds: less while
// few records come, because little garbage is made then.
const (
	quietSlack, busySlack = 24 << 20, 48 << 20
	quietShare, busyShare = 12, 25   // per cent, at least
	streamBytes           = 40 << 10 // heap and stacks of one, as measured by test/delivery
)

// garbageShare is the per cent for so many streams.
func garbageShare(streams int, busy bool) int {
	slack, least := quietSlack, quietShare
	if busy {
		slack, least = busySlack, busyShare
	}
	return min(100, max(least, 100*slack/max(1, streams*streamBytes)))
}

const (
	memoryLook  = 2 * time.Second
	busyRecords = 2000 // between two looks
	staysBusy   = 6    // looks: the share is not to go up and down
)

// A pressure is how many records come.
type pressure struct {
	records uint64 // until the last look
	busy    int    // looks for which it counts as busy
}

func (p *pressure) look(records uint64) (busy bool) {
	if records-p.records > busyRecords {
		p.busy = staysBusy
	} else if p.busy > 0 {
		p.busy--
	}
	p.records = records
	return p.busy > 0
}

// tuneMemory keeps that share, unless the operator set GOGC.
func (c *Collector) tuneMemory(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	t := time.NewTicker(memoryLook)
	defer t.Stop()
	var p pressure
	for now := 100; ; {
		select {
		case <-ctx.Done():
			debug.SetGCPercent(100)
			return
		case <-t.C:
		}
		share := garbageShare(c.srv.Nodes(), p.look(c.srv.Records()))
		// Setting it stops everything for a moment: only when it matters.
		if share*10 > now*11 || share*10 < now*9 || share != now && (share == 100 || share == quietShare) {
			debug.SetGCPercent(share)
			now = share
		}
	}
}

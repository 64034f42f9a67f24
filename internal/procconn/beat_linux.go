package procconn

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// A beat is the heartbeat: the thread that Run is on renames itself, always to
// the same name, and the kernel's message about it must come back. It belongs to
// Run, but for the atomic fields.
type beat struct {
	tid     atomic.Int32 // the thread that made the last one
	waiting bool
	sent    uint64 // ns, CLOCK_MONOTONIC: just before the last one was made
	next    uint64 // when the next one is due
	lost    uint64 // events lost until then

	last  atomic.Uint64 // sent of the last one that came back
	alive atomic.Bool
}

// isBeat says whether a record is a heartbeat of ours. A heartbeat is counted
// and not handed over.
func (c *Conn) isBeat(k event.Kind, pid, tgid int32) bool {
	return k == event.CommChange && tgid == int32(c.tgid) && pid == c.beat.tid.Load()
}

// sendBeat makes a heartbeat. One that is still waited for is repeated and not
// counted again: BeatsSent is BeatsSeen + BeatsMissed, + 1 while one is out.
func (c *Conn) sendBeat() error {
	if !c.beat.waiting {
		c.n.beatsSent.Add(1)
	}
	c.beat.sent, c.beat.waiting, c.beat.lost = monotonic(), true, c.totalLost
	// What is told about is the thread: stay on it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c.beat.tid.Store(int32(unix.Gettid()))
	if err := c.src.beatAll(); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	return nil
}

func (c *Conn) sawBeat(now uint64) {
	c.n.beatsSeen.Add(1)
	c.beat.waiting, c.beat.next = false, now+uint64(c.cfg.Heartbeat)
	c.beat.last.Store(c.beat.sent)
	c.beat.alive.Store(true)
}

// deadline is how long a heartbeat may take.
func (b *beat) deadline(every time.Duration) time.Duration {
	return max(min(every/2, time.Second), 20*time.Millisecond)
}

// due is when something is to be done about the heartbeat.
func (b *beat) due(c *Conn) uint64 {
	if b.waiting {
		return b.sent + uint64(b.deadline(c.cfg.Heartbeat))
	}
	return b.next
}

// tendBeat makes heartbeats and asks the kernel again when one does not come
// back. looked is when the last drain began: only what had time to arrive
// before that can be missed.
func (c *Conn) tendBeat(looked uint64) error {
	b := &c.beat
	if b.waiting {
		ok, where := c.src.beaten(b.sent)
		switch {
		case ok:
			if !b.alive.Load() {
				c.cfg.Log.LogAttrs(context.Background(), slog.LevelInfo, "process events arrive again")
			}
			c.sawBeat(monotonic())
		case looked < b.due(c):
		case c.totalLost != b.lost:
			return c.sendBeat() // it may be among the lost, which were told
		default:
			c.missBeat(where)
		}
	}
	if !b.waiting && monotonic() >= b.next {
		return c.sendBeat()
	}
	return nil
}

// missBeat asks for events again, and tries the next heartbeat at once. Before
// 6.6 other programs may have counted the listeners far below zero, and each
// LISTEN makes up for one.
func (c *Conn) missBeat(where string) {
	b := &c.beat
	b.waiting, b.next = false, 0
	b.alive.Store(false)
	c.n.beatsMissed.Add(1)
	c.n.relistens.Add(1)
	err := c.listen()
	if now := monotonic(); c.beatLog.allow(now, c.cfg.Heartbeat) {
		attrs := []slog.Attr{
			slog.String("where", where), slog.Duration("since", time.Duration(now-b.last.Load())),
			slog.Uint64("missed", c.n.beatsMissed.Load()),
		}
		if err != nil {
			attrs = append(attrs, slog.Any("err", err))
		}
		c.cfg.Log.LogAttrs(context.Background(), slog.LevelError, "heartbeat did not come back: process events may be missing", attrs...)
	}
}

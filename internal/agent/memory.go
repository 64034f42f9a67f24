package agent

import (
	"context"
	"time"
)

// settleEvery is how often memory is given back: as often as Go collects
// garbage in a program that has nothing to do.
const settleEvery = 2 * time.Minute

// settle gives memory back when the start is over, and from time to time after
// that: what was done once, a connection, new rules, a full disk, should not
// stay resident for as long as the agent lives. It takes some 4 ms each time. A
// failure costs nothing but memory.
func (a *agent) settle(ctx context.Context) {
	for wait := time.Duration(0); ; wait = settleEvery {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if err := settleMemory(); err != nil {
			a.log.Debug("memory that is not needed is kept", "err", err)
			return
		}
	}
}

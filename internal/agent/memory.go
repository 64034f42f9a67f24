package agent

import (
	"context"
	"time"
)

// settleAfter is when the start is over: the collector was reached and the
// first events have been judged.
const settleAfter = time.Minute

// settle gives memory back after the start, and once more when everything that
// an agent usually does was done for the first time. A failure costs nothing
// but memory.
func (a *agent) settle(ctx context.Context) {
	for _, wait := range []time.Duration{0, settleAfter} {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if err := settleMemory(); err != nil {
			a.log.Debug("the memory of the start is kept", "err", err)
			return
		}
	}
}

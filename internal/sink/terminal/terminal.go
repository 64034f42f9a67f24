// Package terminal shows each record as a line for people.
//
// It writes to a stream that takes nothing back: after a crash some lines may
// appear twice, with the same content.
package terminal

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/sink"
	"github.com/procession-dev/procession/internal/store"
)

// A Terminal is a sink.Sink.
type Terminal struct {
	w       io.Writer
	style   present.Style
	cluster string
	buf     []byte
}

// New returns a sink that writes lines to w.
func New(w io.Writer, style present.Style, cluster string) *Terminal {
	return &Terminal{w: w, style: style, cluster: cluster}
}

// Deliver implements sink.Sink. A reader that is gone is sink.ErrGone.
func (t *Terminal) Deliver(ctx context.Context, recs []store.Record) error {
	t.buf = t.buf[:0]
	for i := range recs {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		t.buf = append(sink.AppendLine(t.buf, t.style, t.cluster, &recs[i]), '\n')
	}
	if _, err := t.w.Write(t.buf); err != nil {
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EBADF) || errors.Is(err, unix.EIO) {
			return fmt.Errorf("%w: %w", sink.ErrGone, err)
		}
		return fmt.Errorf("write alerts to the terminal: %w", err)
	}
	return nil
}

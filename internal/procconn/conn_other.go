//go:build !linux

package procconn

import (
	"context"
	"fmt"
	"runtime"
)

// A Conn is an open connection to the process connector. There is none on this
// platform.
type Conn struct{}

// Open says ErrNotSupported.
func Open(ctx context.Context, cfg Config) (*Conn, error) {
	if _, err := cfg.withDefaults(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: it is a part of Linux, this is %s", ErrNotSupported, runtime.GOOS)
}

// Run does nothing.
func (c *Conn) Run(ctx context.Context, h Handler) error { return ErrNotSupported }

// Stats are zero.
func (c *Conn) Stats() Stats { return Stats{} }

// Status is empty.
func (c *Conn) Status() Status { return Status{} }

// Close does nothing.
func (c *Conn) Close() error { return nil }

// Full is 0.
func (c *Conn) Full() float64 { return 0 }

// Wake does nothing.
func (c *Conn) Wake() {}

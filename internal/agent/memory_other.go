//go:build !linux

package agent

import "errors"

// An ownMemory has nothing to give back where agent run cannot run.
type ownMemory struct{ settler }

func newSettler() (*ownMemory, error) { return nil, errors.ErrUnsupported }

func (*ownMemory) close() {}

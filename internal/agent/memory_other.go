//go:build !linux

package agent

import "errors"

// newSettler has nothing to give back where agent run cannot run.
func newSettler() (settler, error) { return settler{}, errors.ErrUnsupported }

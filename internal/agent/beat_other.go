//go:build !linux

package agent

import "errors"

// runAndStop is not needed where agent run cannot run.
func runAndStop(string, ...string) error { return errors.ErrUnsupported }

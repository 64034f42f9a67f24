//go:build !linux

package spool

// Datasync is a whole sync where the system has no smaller one.
func (f osFile) Datasync() error { return f.Sync() }

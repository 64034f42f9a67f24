// Package testenv lets tests use the real machine: root, the process
// connector, BPF. Where something is missing a test skips and says why; with
// PROCESSION_NO_SKIP=1, as in CI, the same skip is a failure.
package testenv

import (
	"errors"
	"os"
	"testing"
)

// NoSkip is the environment variable that turns skips into failures.
const NoSkip = "PROCESSION_NO_SKIP"

// Skip ends the test as skipped, or as failed where nothing may be skipped.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv(NoSkip) != "" {
		t.Fatalf("%s is set, and this test cannot run: %s", NoSkip, reason)
	}
	t.Skip(reason)
}

// Root skips unless the test runs as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root")
	}
}

// SkipOn skips if err is one of the errors that say "not here", and fails on
// any other error.
func SkipOn(t testing.TB, err error, notHere ...error) {
	t.Helper()
	if err == nil {
		return
	}
	for _, e := range notHere {
		if errors.Is(err, e) {
			Skip(t, err.Error())
		}
	}
	t.Fatal(err)
}

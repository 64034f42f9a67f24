package testenv

import (
	"bytes"
	"sync"
	"testing"
	"time"
)

// Eventually waits until ok says so. After a minute, far more than any
// condition takes on a crowded machine, the test fails with what, and with what
// each of now says.
func Eventually(t testing.TB, what string, ok func() bool, now ...func() string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, f := range now {
				what += "\n" + f()
			}
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// A Buffer may be read while it is written to, as the log of a program that runs.
type Buffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

// Write never fails.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String is all that was written.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

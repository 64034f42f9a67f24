package collector

import "testing"

func TestGarbageShare(t *testing.T) {
	for _, tt := range []struct{ streams, quiet, busy int }{
		{-1, 100, 100}, {0, 100, 100}, {50, 100, 100}, {600, 100, 100}, {1200, 51, 100}, {2400, 25, 51}, {5000, 12, 25}, {100_000, 12, 25},
	} {
		if quiet, busy := garbageShare(tt.streams, false), garbageShare(tt.streams, true); quiet != tt.quiet || busy != tt.busy {
			t.Errorf("with %d streams %d %% and %d %% when busy, want %d and %d", tt.streams, quiet, busy, tt.quiet, tt.busy)
		}
	}
}

func TestPressure(t *testing.T) {
	var p pressure
	for i, step := range []struct {
		records uint64
		busy    bool
	}{{2000, false}, {3000, false}, {6000, true}, {6000, true}, {7000, true}, {7000, true}, {8000, true}, {8000, true}, {10_000, false}, {13_000, true}} {
		if busy := p.look(step.records); busy != step.busy {
			t.Errorf("look %d: busy %v, want %v", i, busy, step.busy)
		}
	}
}

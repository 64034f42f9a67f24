package collector

import "testing"

func TestGarbageShare(t *testing.T) {
	for _, tt := range []struct{ streams, want int }{
		{-1, 100}, {0, 100}, {50, 100}, {1000, 100}, {2184, 50}, {5000, 25}, {100_000, 25},
	} {
		if got := garbageShare(tt.streams); got != tt.want {
			t.Errorf("with %d streams %d %%, want %d", tt.streams, got, tt.want)
		}
	}
}

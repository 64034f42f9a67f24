package agent

import (
	"errors"
	"testing"
	"time"
)

// TestSettler: what has grown is given back, the cheap way first, and garbage
// is not collected again and again for what is in use.
func TestSettler(t *testing.T) {
	const mb = 1 << 20
	text, garbage, used := 20*mb, 10*mb, 12*mb
	unmapped, collected := 0, 0
	s := settler{
		resident: func() (int, error) { return text + garbage + used, nil },
		unmap:    func() error { unmapped++; text = 5 * mb; return nil },
		collect:  func() { collected++; garbage = 0 },
	}
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		what                     string
		grow                     func()
		wantUnmapped, wantCollec int
	}{
		{"the start", func() {}, 1, 1},
		{"nothing has grown", func() { text += 2 * mb }, 1, 1},
		{"code ran", func() { text += 8 * mb }, 2, 1},
		{"garbage, too soon", func() { garbage += 8 * mb }, 3, 1},
		{"garbage", func() { now = now.Add(settlePause) }, 4, 2},
		{"more is in use", func() { used += 20 * mb; now = now.Add(settlePause) }, 5, 3},
		{"that stays in use", func() { now = now.Add(settlePause) }, 5, 3},
		{"less is in use, which only shows when something is given back", func() { used -= 20 * mb; text += 24 * mb }, 6, 3},
		{"and it grows again", func() { used += 8 * mb; now = now.Add(settlePause) }, 7, 4},
	} {
		c.grow()
		if err := s.look(now); err != nil {
			t.Fatal(err)
		}
		if unmapped != c.wantUnmapped || collected != c.wantCollec {
			t.Fatalf("%s: unmapped %d times, collected %d times; want %d, %d", c.what, unmapped, collected, c.wantUnmapped, c.wantCollec)
		}
	}
	broken := errors.New("no such file")
	s.resident = func() (int, error) { return 0, broken }
	if err := s.look(now); err != broken {
		t.Errorf("error %v, want %v", err, broken)
	}
}

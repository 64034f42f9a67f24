package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
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
	s.stage()
	if unmapped != 8 || collected != 4 {
		t.Errorf("after a stage: unmapped %d times, collected %d times; want 8, 4", unmapped, collected)
	}
}

// TestSettlerFails: what cannot be given back is said once, and kept.
func TestSettlerFails(t *testing.T) {
	var none settler
	none.stage()
	if err := none.look(time.Now()); err != nil {
		t.Error(err)
	}
	fails := errors.New("operation not permitted")
	for name, s := range map[string]settler{
		"resident": {resident: func() (int, error) { return 0, fails }},
		"unmap":    {resident: func() (int, error) { return 1, nil }, unmap: func() error { return fails }},
	} {
		var log bytes.Buffer
		s.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		for range 3 {
			s.say(s.look(time.Now()))
		}
		if n := strings.Count(log.String(), fails.Error()); n != 1 {
			t.Errorf("%s: said %d times, want once:\n%s", name, n, &log)
		}
	}
}

func TestGoLimit(t *testing.T) {
	const mb = 1 << 20
	for _, c := range []struct{ cgroup, want int64 }{
		{-1, 0},
		{0, 0}, // none
		{1, 32 * mb},
		{40 * mb, 32 * mb},
		{100 * mb, 82 * mb},
		{1 << 62, 1<<62 - (1<<62)/10 - 8*mb},
	} {
		if got := goLimit(c.cgroup); got != c.want {
			t.Errorf("a cgroup that may use %d bytes: %d for Go, want %d", c.cgroup, got, c.want)
		}
	}
}

package agent

import (
	"errors"
	"slices"
	"testing"
	"time"
)

// TestPrompter: the agent goes before others until it uses more than its share,
// then waits like any program, and is prompt again afterwards.
func TestPrompter(t *testing.T) {
	const busy, calm = 600 * time.Millisecond, 400 * time.Millisecond
	for _, c := range []struct {
		name   string
		refuse int             // the call of renice that fails, from 1; 0: none
		uses   []time.Duration // CPU time of one second after the other
		want   []int           // calls of renice
	}{
		{"not allowed", 1, []time.Duration{busy, calm}, []int{-10}},
		{"calm", 0, []time.Duration{calm, calm, calm}, []int{-10}},
		{"too busy, then calm", 0, []time.Duration{calm, busy, busy, calm, calm}, []int{-10, 0, -10}},
		{"lost the capability", 3, []time.Duration{busy, calm, busy}, []int{-10, 0, -10}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []int
			var used time.Duration
			p := prompter{used: func() time.Duration { return used }, renice: func(nice int) error {
				if got = append(got, nice); len(got) == c.refuse {
					return errors.New("operation not permitted")
				}
				return nil
			}}
			now := time.Unix(1000, 0)
			p.start(now)
			for _, d := range c.uses {
				used += d / 2
				p.look(now.Add(promptWindow / 2)) // too early to tell
				used += d / 2
				now = now.Add(promptWindow)
				p.look(now)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("set to %v, want %v", got, c.want)
			}
		})
	}
	var none prompter
	none.start(time.Now())
	none.look(time.Now().Add(time.Hour))
}

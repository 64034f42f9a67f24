//go:build !linux

package enrich

import (
	"errors"

	"github.com/procession-dev/procession/internal/event"
)

// Users finds no names on this platform.
type Users struct{}

// UserStats are zero.
type UserStats struct{ Reads, Failed, Slow uint64 }

// NewUsers says that there are none.
func NewUsers(string) (*Users, error) {
	return nil, errors.New("names of users: there is no /proc here")
}

// Stats are zero.
func (u *Users) Stats() UserStats { return UserStats{} }

// Name finds none.
func (u *Users) Name(*event.Process) (name string, ok bool) { return "", false }

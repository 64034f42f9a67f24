package cgroup

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/cgroups/v3"
)

// A ConflictError says that the lines of one /proc/PID/cgroup name different
// containers. One of them is a lie, or the process was moved while it was read:
// there is no way to tell which.
type ConflictError struct {
	A, B Info
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("cgroup file: lines disagree: container %.80q of pod %.40q, and container %.80q of pod %.40q",
		e.A.ContainerID, e.A.PodUID, e.B.ContainerID, e.B.PodUID)
}

// ParseFile reads the content of /proc/PID/cgroup as a whole. On cgroup v1 a
// process has a path in each hierarchy, and not every runtime places it in
// all: a path with a pod is worth more than one with a container only, and
// that more than one without. Paths of the same worth must agree.
//
// Root is all that is left of a process that has ended, on cgroup v1: only who
// knows that it lives may take Root for the host.
func ParseFile(content []byte) (Info, error) {
	paths, unified, err := cgroups.ParseCgroupFromReaderUnified(bytes.NewReader(content))
	if err != nil {
		return Info{}, fmt.Errorf("cgroup file: %w", err)
	}
	best := Parse(unified)
	for _, ctl := range slices.Sorted(maps.Keys(paths)) {
		i := Parse(paths[ctl])
		switch a, b := worth(i), worth(best); {
		case a > b:
			best = i
		case a == b && (i.ContainerID != best.ContainerID || i.PodUID != best.PodUID || i.Of != best.Of):
			return Info{}, &ConflictError{best, i}
		}
	}
	return best, nil
}

// worth orders what two lines of one file say.
func worth(i Info) int {
	switch i.Kind {
	case Root:
		return 1
	case Host:
		return 2
	case Node:
		return 3
	case Monitor:
		return 4
	case Pod:
		return 6
	case Container:
		if i.PodUID != "" {
			return 7
		}
		return 5
	}
	return 0
}

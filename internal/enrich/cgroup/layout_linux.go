package cgroup

import "github.com/containerd/cgroups/v3"

// Layout says which versions of cgroups this machine has: "v2", "v1", "hybrid"
// (v2 beside v1's controllers), or "" where none is mounted at /sys/fs/cgroup.
// On all but v2 a process has a path in each hierarchy, and the one of the
// memory controller tells where it belongs: whoever may move processes between
// v1 cgroups, which takes root on the host, can move them in that one alone.
func Layout() string {
	switch cgroups.Mode() {
	case cgroups.Unified:
		return "v2"
	case cgroups.Hybrid:
		return "hybrid"
	case cgroups.Legacy:
		return "v1"
	}
	return ""
}

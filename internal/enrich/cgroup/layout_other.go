//go:build !linux

package cgroup

// Layout is "": there are no cgroups.
func Layout() string { return "" }

// MemoryLimit is 0: there are no cgroups.
func MemoryLimit() (int64, error) { return 0, nil }

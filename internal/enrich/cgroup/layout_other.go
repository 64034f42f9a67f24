//go:build !linux

package cgroup

// Layout is "": there are no cgroups.
func Layout() string { return "" }

package cgroup

import (
	"os"
	"testing"

	"github.com/containerd/cgroups/v3"

	"github.com/procession-dev/procession/internal/testenv"
)

// TestLayout: what is mounted agrees with the kernel's lines about this process.
func TestLayout(t *testing.T) {
	v1, v2, err := cgroups.ParseCgroupFileUnified("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	got := Layout()
	switch {
	case got == "":
		if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
			t.Error("no layout, but cgroup v2 is mounted")
		}
		testenv.Skip(t, "no cgroups are mounted at /sys/fs/cgroup")
	case got == "v2" && (len(v1) > 0 || v2 == ""):
		t.Errorf("v2, but this process is in %v of v1 and %q of v2", v1, v2)
	case got != "v2" && len(v1) == 0:
		t.Errorf("%s, but this process is in no hierarchy of v1", got)
	case got == "hybrid" && v2 == "":
		t.Error("hybrid, but this process is in no cgroup of v2")
	}
}

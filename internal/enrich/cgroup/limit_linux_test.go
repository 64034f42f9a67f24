package cgroup

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMemoryLimit: the lowest limit that can be seen, in trees like those of
// hosts and of containers.
func TestMemoryLimit(t *testing.T) {
	const v1Own = "4:memory:/kubepods/podx/c1\n1:cpu,cpuacct:/kubepods/podx/c1\n0::/\n"
	for _, tt := range []struct {
		name  string
		files map[string]string // below the root; proc/self/cgroup among them
		want  int64
		err   string // in the error
	}{
		{"garbage for a number", map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "12x"}, 0, `a/memory.max: "12x" is no number`},
		{"a negative number", map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.high": "-1"}, 0, `a/memory.high: "-1" is no number`},
		{"nothing for a number", map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": ""}, 0, `"" is no number`},
		{"v1 without its line", map[string]string{"proc/self/cgroup": v1Own, "sys/fs/cgroup/memory/memory.stat": "cache 0\n"}, 0, "no line hierarchical_memory_limit"},
		{"a broken list of cgroups", map[string]string{"proc/self/cgroup": "memory\n"}, 0, "which cgroup"},
		{"no cgroups", nil, 0, ""},
		{"none mounted", map[string]string{"proc/self/cgroup": "0::/\n"}, 0, ""},
		{"v2 without limits", map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.high": "max\n"}, 0, ""},
		{"v2", map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "1000\n"}, 1000, ""},
		{"v2, one above is lower", map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "500\n", "sys/fs/cgroup/a/b/memory.max": "1000\n"}, 500, ""},
		{"v2, the process must wait earlier", map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.high": "400\n", "sys/fs/cgroup/a/memory.max": "500\n"}, 400, ""},
		{"v2, a container with a namespace of its own", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000\n"}, 1000, ""},
		{"v2, a container without", map[string]string{"proc/self/cgroup": "0::/kubepods.slice/x.scope\n", "sys/fs/cgroup/memory.max": "1000\n"}, 1000, ""},
		{"v2, outside of the namespace's root", map[string]string{"proc/self/cgroup": "0::/../../etc\n", "sys/etc/memory.max": "7\n", "sys/fs/cgroup/memory.max": "1000\n"}, 1000, ""},
		{"v1", map[string]string{"proc/self/cgroup": v1Own, "sys/fs/cgroup/memory/kubepods/podx/c1/memory.stat": "cache 0\nhierarchical_memory_limit 268435456\n"}, 268435456, ""},
		{"v1 without a limit", map[string]string{"proc/self/cgroup": v1Own, "sys/fs/cgroup/memory/kubepods/podx/c1/memory.stat": "hierarchical_memory_limit 9223372036854771712\n"}, 0, ""},
		{"v1, in a container", map[string]string{"proc/self/cgroup": v1Own, "sys/fs/cgroup/memory/memory.stat": "hierarchical_memory_limit 1000\n"}, 1000, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range tt.files {
				file := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := memoryLimit(root)
			if got != tt.want || (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("limit %d, error %v; want %d, error %q", got, err, tt.want, tt.err)
			}
		})
	}
	if _, err := MemoryLimit(); err != nil {
		t.Errorf("of this process: %v", err)
	}
}

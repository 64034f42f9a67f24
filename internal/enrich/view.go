package enrich

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/procession-dev/procession/internal/enrich/cgroup"
	"github.com/procession-dev/procession/internal/procfs"
)

// Inode numbers of the first namespaces, the same on every Linux
// (PROC_CGROUP_INIT_INO and PROC_PID_INIT_INO, include/linux/proc_ns.h).
const (
	initCgroupNS = "cgroup:[4026531835]"
	initPIDNS    = 4026531836
)

// A view is how the agent sees cgroup paths in /proc. In a pod on cgroup v2 it
// has a cgroup namespace of its own: the kernel prints paths relative to the
// agent's cgroup, "/" is that cgroup, and the host's root is some "/../..".
type view struct {
	known   bool // the agent's cgroup namespace is known
	private bool // and it is not the host's
	up      int  // private: so many ".." lead to the host's root; 0 unknown
}

var hostView = view{known: true}

// detect looks at the agent's own cgroup namespace. That needs no rights. How
// deep it is, the path of pid 1 tells, which lies in another part of the tree.
func detect(proc string) view {
	link, err := os.Readlink(filepath.Join(proc, "self", "ns", "cgroup"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Linux before 4.6, or without cgroups. Or no proc file system at all.
		if _, err := os.Stat(filepath.Join(proc, "self", "ns")); err != nil {
			return view{}
		}
		return hostView
	case err != nil:
		return view{}
	case link == initCgroupNS:
		return hostView
	}
	v := view{known: true, private: true}
	pfs, err := procfs.New(proc)
	if err != nil {
		return v
	}
	defer pfs.Close()
	if path, err := pfs.AppendCgroup(nil, 1); err == nil {
		v.up = cgroup.Parse(string(path)).Up
	}
	return v
}

// absolute makes a path that goes up to the host's root one from there.
func (v view) absolute(path string) string {
	if !v.private || v.up == 0 {
		return path
	}
	rest := path
	for range v.up {
		var ok bool
		if rest, ok = strings.CutPrefix(rest, "/.."); !ok {
			return path
		}
	}
	switch {
	case rest == "":
		return "/"
	case rest[0] != '/' || strings.HasPrefix(rest, "/.."):
		return path
	}
	return rest
}

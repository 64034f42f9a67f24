package recorder

import (
	"fmt"
	"math"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// A kernel is where the running kernel keeps the facts that the program reads:
// offsets in bytes of members of its structs, from its type information. Kernels
// differ in these, so none is written down here; names that changed have all
// their spellings in newKernel.
type kernel struct {
	skbCB, cbPortID int32

	task struct {
		pid, tgid, comm, startBoottime, atomicFlags, exitState   int32
		realParent, groupLeader, signal, realCred, nsproxy       int32
		mm, fs, cgroups, children, sibling, ptraced, ptraceEntry int32
		runTime                                                  int32
		loginUID, sessionID                                      int32 // -1: the kernel has no audit
	}
	signal struct {
		threads, tty, maxRSS, runTime, pidTGID, pidSID int32
	}
	ttyIndex int32
	cred     struct{ uid, capPermitted, userNS int32 }
	nsproxy  struct{ mnt, net int32 }
	nsInum   struct{ pid, mnt, user, net int32 } // ns.inum in each kind of namespace
	pid      struct{ level, numbers int32 }      // numbers[i] = {nr, ns}, upidSize each

	css struct {
		dflCgrp, memory, cgroup int32
	}
	cgroupKn int32
	kernfs   struct{ parent int32 } // {parent, name}

	mm    struct{ argStart, argEnd, envEnd, exeFile int32 }
	file  struct{ path, inode int32 }
	fs    struct{ root, pwd int32 }
	inode struct {
		ino, mode, nlink, uid, sb int32
	}
	super struct{ dev, magic int32 }
	mount struct{ parent, vfs, ns int32 } // {mnt_parent, mnt_mountpoint, mnt.mnt_root}
	// dentry.parent is followed by its name within dentrySpan bytes; name is
	// the offset of the name's pointer behind parent.
	dentry struct{ parent, name, hashed int32 }

	// overlayUpper is the distance from an overlay inode to the pointer to the
	// directory entry in the upper layer, if overlayKnown.
	overlayUpper int32
	overlayKnown bool
}

const (
	listPrev   = 8  // struct list_head {next, prev}
	upidSize   = 16 // struct upid {int nr; struct pid_namespace *ns}
	dentrySpan = 24 // bytes of a dentry that are read at once, from d_parent on
)

// newKernel looks everything up but overlayfs. The error names what the kernel
// lacks or has in another shape than this package knows.
func newKernel(vmlinux *btf.Spec, cgroupV1 bool) (*kernel, error) {
	r := &resolver{spec: vmlinux}
	k := &kernel{}
	k.findTask(r)
	k.findIdentity(r)
	k.findCgroup(r, cgroupV1)
	k.findFiles(r)
	if r.err != nil {
		return nil, r.err
	}
	return k, nil
}

// findTask finds the sender of a message, and what hangs on a task.
func (k *kernel) findTask(r *resolver) {
	k.skbCB = r.at("sk_buff", 48, "cb")
	k.cbPortID = r.at("netlink_skb_parms", 4, "portid")

	t := &k.task
	t.pid = r.at("task_struct", 4, "pid")
	t.tgid = r.at("task_struct", 4, "tgid")
	t.comm = r.at("task_struct", commSize, "comm")
	t.startBoottime = r.at("task_struct", 8, "start_boottime")
	t.atomicFlags = r.at("task_struct", 8, "atomic_flags")
	t.exitState = r.at("task_struct", 4, "exit_state")
	t.realParent = r.at("task_struct", 8, "real_parent")
	t.groupLeader = r.at("task_struct", 8, "group_leader")
	t.signal = r.at("task_struct", 8, "signal")
	t.realCred = r.at("task_struct", 8, "real_cred")
	t.nsproxy = r.at("task_struct", 8, "nsproxy")
	t.mm = r.at("task_struct", 8, "mm")
	t.fs = r.at("task_struct", 8, "fs")
	t.cgroups = r.at("task_struct", 8, "cgroups")
	t.children = r.at("task_struct", 16, "children")
	t.sibling = r.at("task_struct", 16, "sibling")
	t.ptraced = r.at("task_struct", 16, "ptraced")
	t.ptraceEntry = r.at("task_struct", 16, "ptrace_entry")
	t.runTime = r.at("task_struct", 8, "se.sum_exec_runtime")
	t.loginUID = r.optional("task_struct", 4, "loginuid")
	t.sessionID = r.optional("task_struct", 4, "sessionid")

	k.signal.threads = r.at("signal_struct", 4, "nr_threads")
	k.signal.tty = r.at("signal_struct", 8, "tty")
	k.signal.maxRSS = r.at("signal_struct", 8, "maxrss")
	k.signal.runTime = r.at("signal_struct", 8, "sum_sched_runtime")
	pids := r.at("signal_struct", -1, "pids")
	k.signal.pidTGID = pids + 8*r.enum("pid_type", "PIDTYPE_TGID")
	k.signal.pidSID = pids + 8*r.enum("pid_type", "PIDTYPE_SID")
	k.ttyIndex = r.at("tty_struct", 4, "index")
}

// findIdentity finds ids, capabilities and namespaces.
func (k *kernel) findIdentity(r *resolver) {
	k.cred.uid = r.at("cred", 4, "uid")
	for i, name := range []string{"gid", "suid", "sgid", "euid", "egid", "fsuid", "fsgid"} {
		r.follows("cred", name, r.at("cred", 4, name), k.cred.uid+4*int32(i+1))
	}
	k.cred.capPermitted = r.at("cred", 8, "cap_permitted")
	r.follows("cred", "cap_effective", r.at("cred", 8, "cap_effective"), k.cred.capPermitted+8)
	k.cred.userNS = r.at("cred", 8, "user_ns")

	k.nsproxy.mnt = r.at("nsproxy", 8, "mnt_ns")
	k.nsproxy.net = r.at("nsproxy", 8, "net_ns")
	k.nsInum.pid = r.at("pid_namespace", 4, "ns.inum")
	k.nsInum.mnt = r.at("mnt_namespace", 4, "ns.inum")
	k.nsInum.user = r.at("user_namespace", 4, "ns.inum")
	k.nsInum.net = r.at("net", 4, "ns.inum")
	k.pid.level = r.at("pid", 4, "level")
	k.pid.numbers = r.at("pid", -1, "numbers")
	r.follows("upid", "nr", r.at("upid", 4, "nr"), 0)
	r.follows("upid", "ns", r.at("upid", 8, "ns"), upidSize-8)
}

// findCgroup finds the cgroup of a task, in v2 or in the memory controller's
// hierarchy.
func (k *kernel) findCgroup(r *resolver, cgroupV1 bool) {
	k.css.dflCgrp = r.at("css_set", 8, "dfl_cgrp")
	if cgroupV1 {
		k.css.memory = r.at("css_set", -1, "subsys") + 8*r.enum("cgroup_subsys_id", "memory_cgrp_id")
		k.css.cgroup = r.at("cgroup_subsys_state", 8, "cgroup")
	}
	k.cgroupKn = r.at("cgroup", 8, "kn")
	k.kernfs.parent = r.at("kernfs_node", 8, "__parent", "parent") // renamed in 6.15
	r.follows("kernfs_node", "name", r.at("kernfs_node", 8, "name"), k.kernfs.parent+8)
}

// findFiles finds the executable and its arguments, and the way up from a file.
func (k *kernel) findFiles(r *resolver) {
	k.mm.argStart = r.at("mm_struct", 8, "arg_start")
	k.mm.argEnd = r.at("mm_struct", 8, "arg_end")
	k.mm.envEnd = r.at("mm_struct", 8, "env_end")
	k.mm.exeFile = r.at("mm_struct", 8, "exe_file")
	k.file.path = r.at("file", 16, "f_path", "__f_path")
	k.file.inode = r.at("file", 8, "f_inode")
	k.fs.root = r.at("fs_struct", 16, "root")
	k.fs.pwd = r.at("fs_struct", 16, "pwd")
	r.follows("path", "mnt", r.at("path", 8, "mnt"), 0)
	r.follows("path", "dentry", r.at("path", 8, "dentry"), 8)
	k.inode.ino = r.at("inode", 8, "i_ino")
	k.inode.mode = r.at("inode", 2, "i_mode")
	k.inode.nlink = r.at("inode", 4, "i_nlink")
	k.inode.uid = r.at("inode", 4, "i_uid")
	r.follows("inode", "i_gid", r.at("inode", 4, "i_gid"), k.inode.uid+4)
	k.inode.sb = r.at("inode", 8, "i_sb")
	k.super.dev = r.at("super_block", 4, "s_dev")
	k.super.magic = r.at("super_block", 8, "s_magic")

	k.mount.parent = r.at("mount", 8, "mnt_parent")
	r.follows("mount", "mnt_mountpoint", r.at("mount", 8, "mnt_mountpoint"), k.mount.parent+8)
	r.follows("mount", "mnt.mnt_root", r.at("mount", 8, "mnt.mnt_root"), k.mount.parent+16)
	k.mount.vfs = r.at("mount", -1, "mnt")
	k.mount.ns = r.at("mount", 8, "mnt_ns")
	k.dentry.parent = r.at("dentry", 8, "d_parent")
	k.dentry.name = r.at("dentry", 8, "d_name.name") - k.dentry.parent
	if r.err == nil && (k.dentry.name < 8 || k.dentry.name > dentrySpan-8) {
		r.fail("struct dentry: d_name lies %d bytes behind d_parent", k.dentry.name)
	}
	k.dentry.hashed = r.at("dentry", 8, "d_hash.pprev")
}

// findOverlay finds the upper layer's entry in an overlay inode (struct
// ovl_inode, fs/overlayfs/ovl_entry.h), in the kernel's types or the module's.
// Kernels without type information for modules, or where overlayfs is not
// loaded, do not tell.
func (k *kernel) findOverlay(spec *btf.Spec) bool {
	r := &resolver{spec: spec}
	upper := r.at("ovl_inode", 8, "__upperdentry")
	inode := r.at("ovl_inode", -1, "vfs_inode")
	if r.err == nil {
		k.overlayUpper, k.overlayKnown = upper-inode, true
	}
	return k.overlayKnown
}

// A resolver looks members up by name and keeps the first failure.
type resolver struct {
	spec *btf.Spec
	err  error
}

func (r *resolver) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

// at is the offset of a member of a struct. Its size must be the given one, or
// any for -1. Several names are spellings of the same member; a name may lead
// through structs: "d_name.name".
func (r *resolver) at(typ string, size int, names ...string) int32 {
	structs, err := r.spec.AnyTypesByName(typ)
	if err != nil {
		r.fail("struct %s: %w", typ, err)
		return 0
	}
	for _, name := range names {
		for _, s := range structs { // a kernel may have two of one name
			off, t, ok := member(s, strings.Split(name, "."))
			if !ok {
				continue
			}
			// Loads have signed 16-bit offsets.
			if off > math.MaxInt16 {
				r.fail("struct %s: %s lies %d bytes inside", typ, name, off)
				return 0
			}
			if n, err := btf.Sizeof(t); size >= 0 && (err != nil || n != size) {
				r.fail("struct %s: %s has %d bytes, want %d", typ, name, n, size)
				return 0
			}
			return int32(off)
		}
	}
	r.fail("struct %s: no member %s", typ, strings.Join(names, " or "))
	return 0
}

// optional is at, but a member that does not exist is -1.
func (r *resolver) optional(typ string, size int, name string) int32 {
	o := &resolver{spec: r.spec}
	off := o.at(typ, size, name)
	if o.err != nil {
		return -1
	}
	return off
}

// enum is the value of a constant.
func (r *resolver) enum(typ, name string) int32 {
	var e *btf.Enum
	if err := r.spec.TypeByName(typ, &e); err != nil {
		r.fail("enum %s: %w", typ, err)
		return 0
	}
	for _, v := range e.Values {
		if v.Name == name {
			return int32(v.Value)
		}
	}
	r.fail("enum %s: no %s", typ, name)
	return 0
}

// follows checks that members which are read in one go lie beside each other.
// A kernel that shuffles its structs (CONFIG_RANDSTRUCT) is not supported.
func (r *resolver) follows(typ, name string, got, want int32) {
	if got != want {
		r.fail("struct %s: %s lies at byte %d, want %d", typ, name, got, want)
	}
}

// member finds a member by its path through structs and unions, looking
// through those without a name.
func member(t btf.Type, path []string) (uint32, btf.Type, bool) {
	var ms []btf.Member
	switch v := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		ms = v.Members
	case *btf.Union:
		ms = v.Members
	}
	for _, m := range ms {
		switch {
		case m.Name == "":
			if off, t, ok := member(m.Type, path); ok {
				return m.Offset.Bytes() + off, t, true
			}
		case m.Name == path[0] && m.BitfieldSize == 0:
			if len(path) == 1 {
				return m.Offset.Bytes(), m.Type, true
			}
			off, t, ok := member(m.Type, path[1:])
			return m.Offset.Bytes() + off, t, ok
		}
	}
	return 0, nil, false
}

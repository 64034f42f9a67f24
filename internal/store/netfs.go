package store

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// networkFS names the file systems on which a database must not live: their
// shared memory or locks do not hold between hosts, or their sync does not
// reach a disk. Numbers of statfs(2) and include/uapi/linux/magic.h.
var networkFS = map[uint32]string{
	unix.NFS_SUPER_MAGIC:   "NFS",
	unix.SMB_SUPER_MAGIC:   "SMB",
	unix.CIFS_SUPER_MAGIC:  "CIFS",
	unix.SMB2_SUPER_MAGIC:  "SMB2",
	unix.CEPH_SUPER_MAGIC:  "CephFS",
	unix.AFS_SUPER_MAGIC:   "AFS",
	unix.AFS_FS_MAGIC:      "AFS",
	unix.CODA_SUPER_MAGIC:  "Coda",
	unix.NCP_SUPER_MAGIC:   "NCP",
	unix.V9FS_MAGIC:        "9p",
	unix.OCFS2_SUPER_MAGIC: "OCFS2",
	unix.FUSE_SUPER_MAGIC:  "FUSE (sshfs, GlusterFS, virtiofs and others)",
	0x01161970:             "GFS2",
	0x0bd00bd0:             "Lustre",
	0x47504653:             "GPFS",
	0x786f4256:             "VirtualBox shared folder",
}

func refuseNetwork(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("ask for the file system of %s: %w", dir, err)
	}
	if name, bad := networkFS[uint32(st.Type)]; bad {
		return fmt.Errorf("state directory %s is on %s: the database needs a local disk or a block volume, because network file systems lose its locks and its syncs", dir, name)
	}
	return nil
}

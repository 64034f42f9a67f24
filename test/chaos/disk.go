package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A disk is an ext4 file system in a file, which can lose its power.
type disk struct{ image, dir string }

func newDisk(work, name string, megabytes int) (*disk, error) {
	d := &disk{image: filepath.Join(work, name+".img"), dir: filepath.Join(work, name)}
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return nil, err
	}
	if out, err := exec.Command("mkfs.ext4", "-q", d.image, fmt.Sprint(megabytes, "m")).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return d, d.mount()
}

func (d *disk) mount() error {
	if out, err := exec.Command("mount", "-o", "loop", d.image, d.dir).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	return nil
}

// powerCut loses what was not synced: the file system stops without writing its
// journal, and is mounted again. Nobody may use it.
func (d *disk) powerCut() error {
	f, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	// EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH, fs/ext4/ext4.h.
	const ioctl, noLogFlush = 0x8004587d, 2
	err = unix.IoctlSetPointerInt(int(f.Fd()), ioctl, noLogFlush)
	f.Close()
	if err != nil {
		return fmt.Errorf("cut the power of %s: %w", d.dir, err)
	}
	return d.again()
}

// again unmounts and mounts.
func (d *disk) again() (err error) {
	for range 200 { // a process that was killed may not be gone to its last file
		if err = unix.Unmount(d.dir, 0); err != unix.EBUSY {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", d.dir, err)
	}
	if err := d.mount(); err != nil {
		return err
	}
	if err := d.free(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // it was removed, but not for a disk that lost its power since
	}
	return nil
}

// fill leaves no room, until free.
func (d *disk) fill() error {
	f, err := os.Create(filepath.Join(d.dir, "filler"))
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return err
	}
	// Most of it at once, in extents nobody writes; the rest to the last byte.
	if most := int64(st.Bavail)*int64(st.Bsize) - 16<<20; most > 0 {
		unix.Fallocate(int(f.Fd()), 0, 0, most)
	}
	if _, err := f.Seek(0, 2); err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	for len(b) > 0 {
		if _, err := f.Write(b); err != nil {
			b = b[:len(b)/2]
		}
	}
	return nil
}

func (d *disk) free() error { return os.Remove(filepath.Join(d.dir, "filler")) }

func (d *disk) remove() {
	unix.Unmount(d.dir, unix.MNT_DETACH)
	os.Remove(d.image)
}

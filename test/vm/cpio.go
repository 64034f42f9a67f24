package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A cpioWriter writes an initramfs: the "newc" format of the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst. It is not
// compressed: under emulation, unpacking would cost more than reading.
type cpioWriter struct {
	w    io.Writer
	ino  uint32
	off  int64
	dirs map[string]bool
	err  error // the first; later calls do nothing
}

func newCPIO(w io.Writer) *cpioWriter {
	return &cpioWriter{w: w, dirs: map[string]bool{".": true, "/": true}}
}

func (c *cpioWriter) write(b []byte) {
	if c.err != nil {
		return
	}
	n, err := c.w.Write(b)
	c.off += int64(n)
	c.err = err
}

func (c *cpioWriter) pad() {
	if r := c.off % 4; r != 0 {
		c.write(make([]byte, 4-r))
	}
}

func (c *cpioWriter) header(name string, mode, size, rmajor, rminor uint32) {
	if name != trailer {
		c.ino++
	}
	nlink := 1
	c.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		c.ino, mode, 0, 0, nlink, 0, size, 0, 0, rmajor, rminor, len(name)+1, 0))
	c.write(append([]byte(name), 0))
	c.pad()
}

const trailer = "TRAILER!!!"

// The file types of stat(2), which is also what cpio has.
const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
	typeChar = 0o020000
)

func clean(name string) string { return strings.TrimPrefix(filepath.Clean("/"+name), "/") }

// dir makes a directory and those above it, once.
func (c *cpioWriter) dir(name string) {
	name = clean(name)
	if name == "" || c.dirs[name] {
		return
	}
	c.dir(filepath.Dir(name))
	c.dirs[name] = true
	c.header(name, typeDir|0o755, 0, 0, 0)
}

func (c *cpioWriter) device(name string, major, minor uint32) {
	c.dir(filepath.Dir(name))
	c.header(clean(name), typeChar|0o600, 0, major, minor)
}

func (c *cpioWriter) bytes(name string, perm uint32, b []byte) {
	c.dir(filepath.Dir(name))
	c.header(clean(name), typeFile|perm, uint32(len(b)), 0, 0)
	c.write(b)
	c.pad()
}

func (c *cpioWriter) link(name, to string) {
	c.dir(filepath.Dir(name))
	c.header(clean(name), typeLink|0o777, uint32(len(to)), 0, 0)
	c.write([]byte(to))
	c.pad()
}

// file takes a file of the host along.
func (c *cpioWriter) file(name, from string) {
	if c.err != nil {
		return
	}
	b, err := os.ReadFile(from)
	if err != nil {
		c.err = err
		return
	}
	st, err := os.Stat(from)
	if err != nil {
		c.err = err
		return
	}
	c.bytes(name, uint32(st.Mode().Perm()), b)
}

// tree takes a directory of the host along. What is neither file, directory
// nor symbolic link is left out.
func (c *cpioWriter) tree(name, from string) {
	if c.err != nil {
		return
	}
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		to := filepath.Join(name, rel)
		switch {
		case d.IsDir():
			c.dir(to)
		case d.Type().IsRegular():
			c.file(to, path)
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			c.link(to, target)
		}
		return c.err
	})
	if c.err == nil {
		c.err = err
	}
}

// close writes the end and reports the first error of all calls.
func (c *cpioWriter) close() error {
	c.header(trailer, 0, 0, 0, 0)
	return c.err
}

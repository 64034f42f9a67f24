package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/procession-dev/procession/test/bench/host"
)

// unpackZboot takes the kernel out of the EFI wrapper that arm64 images come
// in since 6.1 (drivers/firmware/efi/libstub/zboot-header.S): firmware would
// unpack it, a bare machine does not. Other images come back as they are.
func unpackZboot(ctx context.Context, b []byte) ([]byte, error) {
	if len(b) < 64 || string(b[:2]) != "MZ" || string(b[4:8]) != "zimg" {
		return b, nil
	}
	off, size := binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
	if uint64(off)+uint64(size) > uint64(len(b)) {
		return nil, fmt.Errorf("zboot header: payload at %d of %d bytes is beyond the file's %d", off, size, len(b))
	}
	payload := b[off : off+size]
	method, _, _ := strings.Cut(string(b[24:56]), "\x00")
	return decompress(ctx, method, payload)
}

// decompress unpacks b. The compressors are programs that dpkg needs too.
func decompress(ctx context.Context, method string, b []byte) ([]byte, error) {
	var cmd *exec.Cmd
	switch method {
	case "gzip":
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(z)
	case "xz", "lzma", "xzkern":
		cmd = exec.CommandContext(ctx, "xz", "-dc")
	case "zstd", "zstd22":
		cmd = exec.CommandContext(ctx, "zstd", "-dc")
	default:
		return nil, fmt.Errorf("compressed with %.16q, which is not known here", method)
	}
	cmd.Stdin = bytes.NewReader(b)
	return host.Output(cmd)
}

// A module is a kernel module, unpacked.
type module struct {
	name string
	data []byte
}

// modulesFor finds the wanted modules and those they need, in load order.
// What is built in, or does not exist for this kernel, is left out.
func (im *image) modulesFor(ctx context.Context, wanted []string) ([]module, error) {
	files := map[string]string{}
	err := filepath.WalkDir(im.modules(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok {
				files[moduleName(name)] = path
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var mods []module
	var add func(name string, trail []string) error
	add = func(name string, trail []string) error {
		name = moduleName(name)
		if slices.Contains(trail, name) {
			return fmt.Errorf("module %s needs itself: %s", name, strings.Join(trail, " "))
		}
		file, ok := files[name]
		if !ok || slices.ContainsFunc(mods, func(m module) bool { return m.name == name }) {
			return nil
		}
		m, err := readModule(ctx, name, file)
		if err != nil {
			return err
		}
		deps, err := moduleNeeds(m.data)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, d := range deps {
			if err := add(d, append(trail, name)); err != nil {
				return err
			}
		}
		mods = append(mods, m)
		return nil
	}
	for _, w := range wanted {
		if err := add(w, nil); err != nil {
			return nil, err
		}
	}
	return mods, nil
}

// moduleName is the name as the kernel has it: files may have dashes.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

func readModule(ctx context.Context, name, file string) (module, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return module{}, err
	}
	switch filepath.Ext(file) {
	case ".xz":
		b, err = decompress(ctx, "xz", b)
	case ".zst":
		b, err = decompress(ctx, "zstd", b)
	case ".gz":
		b, err = decompress(ctx, "gzip", b)
	}
	if err != nil {
		return module{}, fmt.Errorf("module %s: %w", file, err)
	}
	return module{name, b}, nil
}

// moduleNeeds reads the names a module depends on from its .modinfo section:
// NUL-separated key=value, among them depends=a,b.
func moduleNeeds(b []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for _, kv := range strings.Split(string(info), "\x00") {
		if v, ok := strings.CutPrefix(kv, "depends="); ok && v != "" {
			return strings.Split(v, ","), nil
		}
	}
	return nil, nil
}

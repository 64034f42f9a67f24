package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// An Image is what a test's container is made of: one layer, from files of this
// machine and from nothing else. Pods that use it say imagePullPolicy: Never.
type Image struct {
	Name       string   // with its tag, for example e2e.local/shell:1
	Entrypoint []string // of the container
	User       string   // "uid" or "uid:gid"; empty is root
	Files      []File
	Busybox    bool // adds this machine's static busybox and a link for each applet
}

// A File is one file of an Image.
type File struct {
	Path string // in the image, absolute
	From string // file of this machine; empty to take Data
	Data []byte
	Link string // a symbolic link to this instead of a file
	Mode int64  // with 0o4000 for a set-uid program; 0 is 0755
	Caps uint64 // file capabilities, one bit each, permitted and effective; 0 is none
}

type imageLayer struct {
	buf   bytes.Buffer
	tar   *tar.Writer
	known map[string]bool
}

func (l *imageLayer) dirs(dir string) error {
	if dir == "/" || dir == "." || l.known[dir] {
		return nil
	}
	if err := l.dirs(path.Dir(dir)); err != nil {
		return err
	}
	l.known[dir] = true
	mode := int64(0o755)
	if dir == "/tmp" {
		mode = 0o1777
	}
	return l.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(dir, "/") + "/", Mode: mode})
}

func (l *imageLayer) file(f File) error {
	if !path.IsAbs(f.Path) {
		return fmt.Errorf("path %q is not absolute", f.Path)
	}
	if f.Link != "" {
		if err := l.dirs(path.Dir(f.Path)); err != nil {
			return err
		}
		return l.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(f.Path, "/"), Linkname: f.Link, Mode: 0o777})
	}
	data := f.Data
	if f.From != "" {
		var err error
		if data, err = os.ReadFile(f.From); err != nil {
			return err
		}
	}
	if err := l.dirs(path.Dir(f.Path)); err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(f.Path, "/"), Mode: f.Mode, Size: int64(len(data))}
	if h.Mode == 0 {
		h.Mode = 0o755
	}
	if f.Caps != 0 {
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": string(fileCaps(f.Caps))}
	}
	if err := l.tar.WriteHeader(h); err != nil {
		return err
	}
	_, err := l.tar.Write(data)
	return err
}

// fileCaps is struct vfs_cap_data (include/uapi/linux/capability.h), revision 2
// with the effective bit.
func fileCaps(mask uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0x02000001)
	for _, part := range []uint32{uint32(mask), 0, uint32(mask >> 32), 0} { // permitted, inheritable, twice
		b = binary.LittleEndian.AppendUint32(b, part)
	}
	return b
}

func (l *imageLayer) busybox(ctx context.Context) error {
	bin, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("busybox-static is missing: %w", err)
	}
	if err := l.file(File{Path: "/bin/busybox", From: bin}); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, bin, "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	for _, applet := range strings.Fields(string(out)) {
		if applet == "busybox" {
			continue
		}
		if err := l.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + applet, Linkname: "/bin/busybox", Mode: 0o777}); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{"/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", "/etc/group": "root:x:0:\nnogroup:x:65534:\n"} {
		if err := l.file(File{Path: name, Data: []byte(text), Mode: 0o644}); err != nil {
			return err
		}
	}
	for _, d := range []string{"/tmp", "/root"} {
		if err := l.dirs(d); err != nil {
			return err
		}
	}
	return nil
}

func digest(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

// write writes the image as an OCI layout in a tar, as `ctr images import`
// and `docker load` take it.
func (im Image) write(ctx context.Context, w io.Writer) error {
	l := &imageLayer{known: map[string]bool{}}
	l.tar = tar.NewWriter(&l.buf)
	if im.Busybox {
		if err := l.busybox(ctx); err != nil {
			return err
		}
	}
	files := slices.Clone(im.Files)
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	for _, f := range files {
		if err := l.file(f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	if err := l.tar.Close(); err != nil {
		return err
	}
	layer := l.buf.Bytes()

	type object = map[string]any
	blobs := map[string][]byte{digest(layer): layer}
	descriptor := func(mediaType string, b []byte) object {
		blobs[digest(b)] = b
		return object{"mediaType": "application/vnd.oci.image." + mediaType, "digest": digest(b), "size": len(b)}
	}
	encode := func(o object) []byte {
		b, err := json.Marshal(o)
		if err != nil {
			panic(err) // strings, numbers and maps of them
		}
		return b
	}
	config := encode(object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Entrypoint": im.Entrypoint, "User": im.User, "Env": []string{"PATH=/bin:/sbin:/usr/bin:/usr/sbin"}},
		"rootfs": object{"type": "layers", "diff_ids": []string{digest(layer)}},
	})
	manifest := encode(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": descriptor("config.v1+json", config),
		"layers": []object{descriptor("layer.v1.tar", layer)},
	})
	top := descriptor("manifest.v1+json", manifest)
	top["annotations"] = map[string]string{"io.containerd.image.name": im.Name, "org.opencontainers.image.ref.name": im.Name}
	return writeLayout(w, encode(object{"schemaVersion": 2, "manifests": []object{top}}), blobs)
}

func writeLayout(w io.Writer, index []byte, blobs map[string][]byte) error {
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index}
	for d, b := range blobs {
		files["blobs/"+strings.Replace(d, ":", "/", 1)] = b
	}
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	tw := tar.NewWriter(w)
	for _, n := range names {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: n, Mode: 0o644, Size: int64(len(files[n]))}); err != nil {
			return err
		}
		if _, err := tw.Write(files[n]); err != nil {
			return err
		}
	}
	return tw.Close()
}

// BuildImage makes an image and loads it into the node.
func (c *Cluster) BuildImage(ctx context.Context, im Image) error {
	f, err := os.CreateTemp(c.Dir, "image-*.tar")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := im.write(ctx, f); err != nil {
		return fmt.Errorf("image %s: %w", im.Name, err)
	}
	_, err = c.LoadImage(ctx, f.Name())
	return err
}

// LoadImage loads the images of an OCI archive into the node, and returns the
// names that the archive gives them, as pods name them.
func (c *Cluster) LoadImage(ctx context.Context, archive string) ([]string, error) {
	out, err := c.ctr(ctx, "images", "import", archive)
	if err != nil {
		return nil, fmt.Errorf("load image %s: %w: %s", filepath.Base(archive), err, out)
	}
	var names []string
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(line, "unpacking "); ok {
			name, _, _ := strings.Cut(rest, " ")
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("load image %s: containerd found none in it: %s", filepath.Base(archive), out)
	}
	return names, nil
}

// ctr runs containerd's own client in the namespace of the kubelet's containers.
func (c *Cluster) ctr(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "ctr", append([]string{"--address", c.socket(), "--namespace", "k8s.io"}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

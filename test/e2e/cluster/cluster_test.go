package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/testenv"
)

func newCluster(t *testing.T) *Cluster {
	t.Helper()
	c := &Cluster{Dir: t.TempDir(), NodeIP: nodeAddress, Node: nodeName, log: t.Output()}
	for _, d := range []string{"pids", "log", "etc/cni"} {
		if err := os.MkdirAll(filepath.Join(c.Dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func TestParseIdentityRefuses(t *testing.T) {
	for name, in := range map[string]string{
		"empty": "", "no numbers": "a b c", "no boot": "12 34", "init": "1 0 x", "negative": "-5 1 x", "zero": "0 1 x",
	} {
		t.Run(name, func(t *testing.T) {
			if id, err := parseIdentity(in); err == nil {
				t.Fatalf("parseIdentity(%q) = %+v, want an error", in, id)
			}
		})
	}
}

func TestIdentityRoundTrip(t *testing.T) {
	me, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseIdentity(me.String())
	if err != nil || got != me || !got.alive() {
		t.Fatalf("identity of this process: got %+v, %v, want %+v alive", got, err, me)
	}
}

// A pid file whose pid now belongs to another process must not kill that one.
func TestStopSparesAnotherProcessWithThePid(t *testing.T) {
	c := newCluster(t)
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	id, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for name, stale := range map[string]identity{
		"started later":     {pid: id.pid, start: id.start - 1, boot: id.boot},
		"since last reboot": {pid: id.pid, start: id.start, boot: "11111111-2222-3333-4444-555555555555"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(c.pidFile(Etcd), []byte(stale.String()), 0o644); err != nil {
				t.Fatal(err)
			}
			if _, ok := c.running(Etcd); ok {
				t.Fatal("a stale pid file names a running program")
			}
			if err := c.stop(t.Context(), stopGrace, Etcd); err != nil {
				t.Fatal(err)
			}
			if !id.alive() {
				t.Fatal("stop ended a process that is not the cluster's")
			}
			if _, err := os.Stat(c.pidFile(Etcd)); err == nil {
				t.Error("the stale pid file is still there")
			}
		})
	}
}

func TestStartStop(t *testing.T) {
	for name, script := range map[string]string{
		"ends when asked":     `echo up; exec sleep 600`,
		"ignores the request": `trap "" TERM; echo up; while :; do sleep 1; done`,
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			argv := []string{"sh", "-c", script}
			if err := c.start(Etcd, argv); err != nil {
				t.Fatal(err)
			}
			id, ok := c.running(Etcd)
			if !ok {
				t.Fatal("not running after start")
			}
			c.Eventually(t, "the program's output in its log", func() error {
				if b, err := os.ReadFile(c.LogFile(Etcd)); err != nil || !strings.Contains(string(b), "\nup\n") {
					return errors.Join(err, errors.New(string(b)))
				}
				return nil
			})
			if err := c.start(Etcd, argv); err != nil {
				t.Fatal(err)
			}
			if again, _ := c.running(Etcd); again != id {
				t.Errorf("a second start made another process: %v, then %v", id, again)
			}
			if err := c.stop(t.Context(), 200e6, Etcd); err != nil {
				t.Fatal(err)
			}
			if id.alive() {
				t.Error("still alive after stop")
			}
			if _, ok := c.running(Etcd); ok {
				t.Error("running after stop")
			}
		})
	}
}

// On a machine that no cluster was started on, whatever looks like one's
// leftovers is somebody else's.
func TestDownTouchesNothingThatWasNotPrepared(t *testing.T) {
	testenv.Root(t)
	c := newCluster(t)
	theirs := filepath.Join(c.Dir, "theirs")
	if err := os.Mkdir(theirs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("e2e", theirs, "tmpfs", 0, "size=64k"); err != nil {
		testenv.SkipOn(t, err, syscall.EPERM)
	}
	defer func() { _ = syscall.Unmount(theirs, syscall.MNT_DETACH) }()
	if err := c.cleanHost(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(mounts(), func(m mountPoint) bool { return m.at == theirs }) {
		t.Error("the mount is gone")
	}
}

func TestRunRefusesAnUnknownProgram(t *testing.T) {
	if err := newCluster(t).Run("kube-nothing"); err == nil {
		t.Fatal("no error")
	}
}

func TestConfIsCompleteAndValid(t *testing.T) {
	c := newCluster(t)
	if _, err := exec.LookPath("runc"); err != nil {
		t.Setenv("PATH", fakeRunc(t))
	}
	if err := c.writeConf(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(c.Dir, "etc", "*.*"))
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, filepath.Join(c.Dir, "etc", "cni", "10-cni.conflist"))
	if len(files) < 5 {
		t.Fatalf("only %d files: %v", len(files), files)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "{{") || strings.Contains(string(b), "no value") {
			t.Errorf("%s: something was not filled in:\n%s", f, b)
		}
		if strings.HasSuffix(f, ".conflist") && !json.Valid(b) {
			t.Errorf("%s: not JSON:\n%s", f, b)
		}
	}
}

func fakeRunc(t *testing.T) string {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "runc"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir + ":" + os.Getenv("PATH")
}

func TestPKI(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	if err := writePKI(dir, "https://198.18.77.1:6443", "node1", "198.18.77.1", "10.96.0.1"); err != nil {
		t.Fatal(err)
	}
	pool := func(ca string) *x509.CertPool {
		b, err := os.ReadFile(filepath.Join(dir, ca+".crt"))
		if err != nil {
			t.Fatal(err)
		}
		p := x509.NewCertPool()
		if !p.AppendCertsFromPEM(b) {
			t.Fatalf("%s.crt holds no certificate", ca)
		}
		return p
	}
	for _, tc := range []struct {
		name, ca, cn string
		org          []string
		host         string // a server's
	}{
		{"apiserver", "ca", "kube-apiserver", nil, "10.96.0.1"},
		{"kubelet-serving", "ca", "system:node:node1", []string{"system:nodes"}, "198.18.77.1"},
		{"kubelet", "ca", "system:node:node1", []string{"system:nodes"}, ""},
		{"admin", "ca", "kubernetes-admin", []string{"system:masters"}, ""},
		{"scheduler", "ca", "system:kube-scheduler", nil, ""},
		{"front-proxy-client", "front-proxy-ca", "front-proxy-client", nil, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pair, err := tls.LoadX509KeyPair(filepath.Join(dir, tc.name+".crt"), filepath.Join(dir, tc.name+".key"))
			if err != nil {
				t.Fatal(err)
			}
			usage := x509.ExtKeyUsageClientAuth
			if tc.host != "" {
				usage = x509.ExtKeyUsageServerAuth
			}
			if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool(tc.ca), DNSName: tc.host, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
				t.Error(err)
			}
			other := map[string]string{"ca": "front-proxy-ca", "front-proxy-ca": "ca"}[tc.ca]
			if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool(other), KeyUsages: []x509.ExtKeyUsage{usage}}); err == nil {
				t.Errorf("also verifies against %s", other)
			}
			if pair.Leaf.Subject.CommonName != tc.cn || !slices.Equal(pair.Leaf.Subject.Organization, tc.org) {
				t.Errorf("subject %v, want CN %s O %v", pair.Leaf.Subject, tc.cn, tc.org)
			}
		})
	}
	b, err := os.ReadFile(filepath.Join(dir, "sa.pub"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatal("sa.pub is not PEM")
	}
	if pub, err := x509.ParsePKIXPublicKey(block.Bytes); err != nil {
		t.Error(err)
	} else if _, ok := pub.(*ecdsa.PublicKey); !ok {
		t.Errorf("sa.pub is a %T", pub)
	}
}

func TestImageIsTheSameEachTime(t *testing.T) {
	im := Image{Name: "e2e.local/x:1", Entrypoint: []string{"/x"}, User: "1000", Files: []File{
		{Path: "/z/deep/file", Data: []byte("z")}, {Path: "/suid", Data: []byte("s"), Mode: 0o4755}, {Path: "/x", Data: []byte("x"), Caps: 1 << 38},
	}}
	var one, two bytes.Buffer
	if err := im.write(t.Context(), &one); err != nil {
		t.Fatal(err)
	}
	slices.Reverse(im.Files)
	if err := im.write(t.Context(), &two); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("two writes differ")
	}

	blobs := untar(t, &one)
	var index struct {
		Manifests []struct {
			Digest      string
			Annotations map[string]string
		}
	}
	if err := json.Unmarshal(blobs["index.json"].data, &index); err != nil {
		t.Fatal(err)
	}
	if len(index.Manifests) != 1 || index.Manifests[0].Annotations["io.containerd.image.name"] != im.Name {
		t.Fatalf("index: %s", blobs["index.json"].data)
	}
	for name, b := range blobs {
		if sum, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && digest(b.data) != "sha256:"+sum {
			t.Errorf("%s has the digest %s", name, digest(b.data))
		}
	}
	var manifest struct{ Layers []struct{ Digest string } }
	if err := json.Unmarshal(blobs["blobs/"+strings.Replace(index.Manifests[0].Digest, ":", "/", 1)].data, &manifest); err != nil {
		t.Fatal(err)
	}
	layer := untar(t, bytes.NewReader(blobs["blobs/"+strings.Replace(manifest.Layers[0].Digest, ":", "/", 1)].data))
	if got := layer["suid"].header.Mode; got != 0o4755 {
		t.Errorf("mode of /suid is %o", got)
	}
	// vfs_cap_data: revision 2 and effective; CAP_PERFMON (38) is bit 6 of the second word.
	want := []byte{1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 6, 0, 0, 0, 0, 0, 0, 0}
	if d := cmp.Diff(want, []byte(layer["x"].header.PAXRecords["SCHILY.xattr.security.capability"])); d != "" {
		t.Errorf("capabilities of /x (-want +got):\n%s", d)
	}
	if _, ok := layer["z/deep/"]; !ok {
		t.Error("the layer has no entry for the directory /z/deep")
	}
}

func TestImageRefusesARelativePath(t *testing.T) {
	if err := (Image{Files: []File{{Path: "x"}}}).write(context.Background(), io.Discard); err == nil {
		t.Fatal("no error")
	}
}

type tarEntry struct {
	header *tar.Header
	data   []byte
}

func untar(t *testing.T, r io.Reader) map[string]tarEntry {
	t.Helper()
	found := map[string]tarEntry{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		found[h.Name] = tarEntry{header: h, data: b}
	}
}

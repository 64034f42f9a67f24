//go:build linux

package recorder

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/testenv"
)

// One record of each kind is kept in testdata/records, for tests on platforms
// without this kernel. With -update this test writes them anew.
func TestCapture(t *testing.T) {
	r := load(t, Config{Cwd: true, Kinds: event.KindSet(event.AllKinds()...)})
	prog := buildProg(t)
	_, hangUp := openConn(t, r)
	pids := capture(t, r, prog)
	hangUp()

	raw := map[string][]byte{}
	d := NewDecoder()
	n, err := r.DrainRaw(func(b []byte) {
		var rec event.Record
		if err := d.Decode(b, &rec); err != nil {
			t.Errorf("%v: %x", err, b)
			return
		}
		name := rec.Kind.Short()
		if rec.Kind == event.KindUnknown {
			name = "ack"
		} else if !pids[rec.TGID] && !pids[rec.PPID] || !bytes.Contains(rec.Cgroup, []byte("kubepods")) {
			return // of somebody else on this machine, or too early
		}
		raw[name] = bytes.Clone(b)
	})
	if c := settled(t, r); err != nil || uint64(n) != c.Recorded {
		t.Errorf("DrainRaw = %d, %v; %+v", n, err, c)
	}
	for _, k := range event.AllKinds() {
		if raw[k.Short()] == nil && k != event.PtraceDetach {
			t.Errorf("no record of kind %v", k)
		}
	}
	if raw["ack"] == nil {
		t.Error("no ack")
	}
	if *update && !t.Failed() {
		if err := os.MkdirAll(recordsDir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, b := range raw {
			if err := os.WriteFile(filepath.Join(recordsDir, name+".bin"), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// capture lets everything happen once, in a container-like cgroup and at a path
// that says nothing about this machine, and gives the processes that did it.
func capture(t *testing.T, r *Recorder, prog string) map[int32]bool {
	dir := newCgroup(t, r, "kubepods-capture", "burstable", "pod2f6a1d0c-93b7-4c6e-8a55-0e1f7b9c4d21", strings.Repeat("0a1b2c3d4e5f6789", 4))
	pids := map[int32]bool{}
	run := func(name string, args ...string) {
		cmd := exec.Command("/mnt/prog", append([]string{"r", "x", name, filepath.Base(name)}, args...)...)
		cmd.Dir = "/mnt"
		p := start(t, cmd)
		pids[int32(p.Process.Pid)] = true
		must(t, os.WriteFile(dir+"/cgroup.procs", []byte(strconv.Itoa(p.Process.Pid)), 0))
		p.byte(t)
		p.end()
	}
	if os.Mkdir("/mnt", 0o755) == nil {
		t.Cleanup(func() { os.Remove("/mnt") })
	}
	inMountNS(t, func(tmp string) {
		must(t, unix.Mount(tmp, "/mnt", "", unix.MS_BIND, ""))
		copyFile(t, prog, "/mnt/prog")
		run("/mnt/prog", "n", "1", "/mnt/prog")
		run("/mnt/prog", "u", "s")
		run("/mnt/prog", "p")
		run("/mnt/prog", "a")
		run("/mnt/prog", "m", "renamed", "e", "3")
	})
	return pids
}

func TestDrainCountsMalformed(t *testing.T) {
	r := load(t, Config{})
	// Facts of this process in a message about another: see TestProgram.
	feed(t, r, message(whatExec, 0, 1, 1, 1))
	feed(t, r, message(whatSID, 0, 2, uint32(os.Getpid()), uint32(os.Getpid())))
	n, err := r.Drain(func(rec *event.Record) {
		if rec.Kind != event.SessionChange {
			t.Errorf("delivered: %v of %d", rec.Kind, rec.TGID)
		}
	})
	if c := total(r); n != 1 || err != nil || r.Malformed() != 1 || c.Recorded != 2 {
		t.Errorf("Drain = %d, %v; malformed %d, %+v", n, err, r.Malformed(), c)
	}
}

// A kernel that is not as we know it is refused with a reason.
func TestUnsupported(t *testing.T) {
	testKernel(t, "struct no_such_struct: ", func(r *resolver) { r.at("no_such_struct", 8, "x") })
	testKernel(t, "struct task_struct: no member no_such or neither", func(r *resolver) { r.at("task_struct", 8, "no_such", "neither") })
	testKernel(t, "struct task_struct: pid has 4 bytes, want 8", func(r *resolver) { r.at("task_struct", 8, "pid") })
	testKernel(t, "struct path: dentry lies at byte 8, want 16", func(r *resolver) { r.follows("path", "dentry", r.at("path", 8, "dentry"), 16) })
	testKernel(t, "enum pid_type: no PIDTYPE_NONE", func(r *resolver) { r.enum("pid_type", "PIDTYPE_NONE") })

	r := load(t, Config{})
	r.prog.Close()
	k, err := readKernel(r.features.CgroupV1)
	if err != nil {
		t.Fatal(err)
	}
	k.task.groupLeader = 3 // no member begins there: a typed load is refused, probe_read is not
	if err := r.load(Config{Kinds: 1 << event.Exec}, k); err != nil || r.features.TypedLoads || r.features.TypedRefused == "" {
		t.Errorf("load = %v with features %+v; want a program without typed loads", err, r.features)
	}
	r.prog.Close()
	k.dentry.name = 1 << 12 // beside the stack: neither is allowed
	err = r.load(Config{Kinds: 1 << event.Exec}, k)
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "stack") {
		t.Errorf("load = %v; want ErrUnsupported and the verifier's reason", err)
	}
}

func testKernel(t *testing.T, want string, look func(*resolver)) {
	t.Helper()
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		testenv.Skip(t, "no type information: "+err.Error())
	}
	r := &resolver{spec: spec}
	look(r)
	if r.err == nil || !strings.HasPrefix(r.err.Error(), want) {
		t.Errorf("error %v, want %s", r.err, want)
	}
}

// Without the capabilities Load says which are missing.
func TestNoCapabilities(t *testing.T) {
	load(t, Config{RingBytes: 64 << 10}) // it would work otherwise
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends without capabilities
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			t.Error(err)
			return
		}
		r, err := Load(Config{})
		// Kernels that let anybody load a program refuse what it calls.
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "CAP_BPF") && !strings.Contains(err.Error(), "func") {
			t.Errorf("Load = %v, %v; want ErrUnsupported naming CAP_BPF", r, err)
		}
	}()
	<-done
}

package spine

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRefusals runs the agent and the collector where they cannot work, and
// wants to read what is wrong, why, and what to do.
func TestRefusals(t *testing.T) {
	dir := built(t)
	agent, collector := filepath.Join(dir, "bin", "agent"), filepath.Join(dir, "bin", "collector")
	if err := os.Chmod(dir, 0o755); err != nil { // for the case that is not root
		t.Fatal(err)
	}
	state, certs := t.TempDir(), t.TempDir()
	issue(t, dir, state, certs)
	policies := t.TempDir()
	full := smallDisk(t, 256<<10)
	fillDisk(t, full)
	readOnly := readOnlyDir(t)

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()

	run := func(extra ...string) []string {
		return append([]string{agent, "run", "--collector", "127.0.0.1:1", "--tls", certs, "--policies", policies, "--state", t.TempDir()}, extra...)
	}
	tests := []struct {
		name string
		args []string
		uid  uint32
		code int
		want []string // all of these, in any order
	}{
		{"events, not root, not in the host's namespaces", []string{"unshare", "-Un", agent, "events", "--duration", "2s"}, 0, 3, []string{"namespace"}},
		{"events, another network namespace without SYS_ADMIN", []string{"unshare", "-n", "setpriv", "--bounding-set", "-sys_admin", agent, "events", "--duration", "2s"}, 0, 3, []string{"network namespace", "hostNetwork"}},
		{"events, another pid namespace", []string{"unshare", "-pf", agent, "events", "--duration", "2s"}, 0, 3, []string{"pid namespace", "hostPID"}},
		{"run, another network namespace without SYS_ADMIN", append([]string{"unshare", "-n", "setpriv", "--bounding-set", "-sys_admin"}, run()...), 0, 3, []string{"network namespace", "hostNetwork"}},
		{"events, not root", []string{agent, "events", "--recorder", "require", "--duration", "2s"}, 65534, 3, []string{"CAP_BPF", "CAP_PERFMON", "recorder: auto"}},
		{"run, policy directory missing", run("--policies", "/nonexistent/policies"), 0, 1, []string{"/nonexistent/policies", "--policies"}},
		{"run, state directory not writable", run("--state", readOnly), 0, 1, []string{readOnly, "read-only"}},
		{"run, certificates missing", run("--tls", "/nonexistent/tls"), 0, 1, []string{"/nonexistent/tls", "collector issue"}},
		{"run, no collector", []string{agent, "run", "--tls", certs}, 0, 2, []string{"--collector"}},
		{"events, unknown kind", []string{agent, "events", "--kinds", "exec,execs"}, 0, 2, []string{`"execs"`, "exec, fork"}},
		{"events, unknown flag", []string{agent, "events", "--kind", "exec"}, 0, 2, []string{"-kind", "--help"}},
		{"collector, port taken", []string{collector, "serve", "--state", t.TempDir(), "--listen", taken.Addr().String()}, 0, 1, []string{taken.Addr().String(), "taken by another process"}},
		{"collector, state directory not writable", []string{collector, "serve", "--state", readOnly, "--listen", "127.0.0.1:0"}, 0, 1, []string{readOnly, "read-only"}},
		{"collector, disk full at the first start", []string{collector, "serve", "--state", filepath.Join(full, "c"), "--listen", "127.0.0.1:0"}, 0, 1, []string{full, "no space left"}},
		{"collector, unknown flag", []string{collector, "serve", "--prot", "1"}, 0, 2, []string{"-prot"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(tt.args[0], tt.args[1:]...)
			cmd.Dir = "/"
			if tt.uid != 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tt.uid, Gid: tt.uid}}
			}
			p := start(t, tt.name, cmd)
			err := p.wait(20 * time.Second)
			out, _ := p.text()
			if code := exitCode(err); code != tt.code {
				t.Errorf("exit code %d, want %d\n%s", code, tt.code, out)
			}
			for _, w := range tt.want {
				if !strings.Contains(out, w) {
					t.Errorf("the message does not say %q:\n%s", w, out)
				}
			}
			if n := strings.Count(strings.TrimSpace(out), "\n"); n > 3 {
				t.Errorf("the message has %d lines, want at most 4:\n%s", n+1, out)
			}
		})
	}
}

// TestNoRuleInForce: an agent that cannot alert must not look like a quiet one.
func TestNoRuleInForce(t *testing.T) {
	dir := built(t)
	state, certs, policies := t.TempDir(), t.TempDir(), t.TempDir()
	issue(t, dir, state, certs)
	broken := strings.Replace(tagPolicy, "process.cmdline", "process.cmdlin", 1)
	if err := os.WriteFile(filepath.Join(policies, "broken.yaml"), []byte(broken), 0o644); err != nil {
		t.Fatal(err)
	}
	p := start(t, "agent", exec.Command(filepath.Join(dir, "bin", "agent"), "run", "--collector", "127.0.0.1:1",
		"--tls", certs, "--policies", policies, "--state", t.TempDir(), "--drain-timeout", "100ms"))
	p.waitFor("listening", 30*time.Second)
	out, _ := p.text()
	for _, want := range []string{"broken.yaml", "rule tagged", "process.cmdlin", "did you mean process.cmdline", "no rule is in force"} {
		if !strings.Contains(out, want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	if err := os.WriteFile(filepath.Join(policies, "broken.yaml"), []byte(tagPolicy), 0o644); err != nil {
		t.Fatal(err)
	}
	p.waitFor("rules=1", 5*time.Second) // mended, without a restart
	if err := p.stop(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Errorf("agent after SIGTERM: %v", err)
	}
}

// issue makes an agent's certificate with the real command.
func issue(t *testing.T, dir, state, out string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(dir, "bin", "collector"), "issue", "--state", state, "--node", "node-under-test", "--out", out)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, b)
	}
}

// smallDisk mounts a tmpfs of the given size.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatalf("mount a small tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func fillDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 4096)
	for range 1 << 20 {
		if _, err := f.Write(block); err != nil {
			return
		}
	}
	t.Fatal("the disk does not fill")
}

// readOnlyDir mounts a read-only tmpfs: root may write anywhere else.
func readOnlyDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, "size=64k"); err != nil {
		t.Fatalf("mount a read-only tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

package store_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

// ext4Shutdown stops a file system as a power cut does: what is not on the
// device yet will never be. EXT4_IOC_SHUTDOWN, fs/ext4/ext4.h, with
// EXT4_GOING_FLAGS_NOLOGFLUSH.
func ext4Shutdown(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	const ioctl, noLogFlush = 0x8004587d, 2
	return unix.IoctlSetPointerInt(int(d.Fd()), ioctl, noLogFlush)
}

// What was acknowledged survives a power cut.
func TestSQLitePowerCut(t *testing.T) {
	testenv.Root(t)
	for _, tool := range []string{"mkfs.ext4", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			testenv.Skip(t, "no "+tool)
		}
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if out, err := exec.Command("mkfs.ext4", "-q", image, "64m").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	mount := func() {
		t.Helper()
		if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
			if strings.Contains(string(out), "loop device") {
				testenv.Skip(t, "no loop devices: "+string(out))
			}
			t.Fatalf("mount: %v: %s", err, out)
		}
	}
	mount()
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	state := filepath.Join(dir, "state")
	// A commit that is under way while the file system is being shut down may be
	// told that it succeeded: ext4 first refuses the work that makes written
	// data part of the file, and only then aborts the journal that fsync asks.
	// A machine without power tells nobody anything. So what counts is what was
	// acknowledged before.
	acked, before := uint64(0), uint64(0)
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "STORE_TEST_COMMIT_FOREVER="+state)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		sc := bufio.NewScanner(out)
		n := 0
		for ; sc.Scan(); n++ {
			if strings.HasPrefix(sc.Text(), "error") {
				break // the disk is gone
			}
			if _, err := fmt.Sscan(sc.Text(), &acked); err != nil {
				t.Fatalf("child: %s", sc.Text())
			}
			if n == 30+7*round {
				before = acked
				if err := ext4Shutdown(dir); err != nil {
					t.Fatalf("cut the power: %v", err)
				}
			}
		}
		cmd.Process.Kill()
		cmd.Wait()
		if n < 30 {
			t.Fatalf("round %d: only %d commits: %s", round, n, sc.Text())
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatalf("unmount: %v", err)
		}
		mount()
		st := openSQLite(t, state)
		rs := storetest.All(t, st)
		if err := st.Close(); err != nil {
			t.Error(err)
		}
		if uint64(len(rs)) < before {
			t.Fatalf("round %d: %d records after the power cut, %d were acknowledged before", round, len(rs), before)
		}
		for i, r := range rs {
			if r.Seq != uint64(i+1) {
				t.Fatalf("round %d: record %d has number %d", round, i, r.Seq)
			}
		}
		integrity(t, state)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("unmount: %v", err)
	}
}

package spine

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestAgentsDiskFull runs the agent on a full disk: it says so, goes on, and
// what the disk did not take is delivered from memory or named as lost. When
// there is room again everything is as before.
func TestAgentsDiskFull(t *testing.T) {
	p := newPair(t)
	if err := p.agent.stop(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	disk := smallDisk(t, 1<<20)
	fillDisk(t, disk)
	if err := os.RemoveAll(filepath.Join(p.state, "agent")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(disk, "agent"), filepath.Join(p.state, "agent")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(disk, "agent"), 0o700); err != nil {
		t.Fatal(err)
	}
	p.startAgent()
	p.act(0, 50)
	p.agent.waitFor("no space left", 20*time.Second)
	if err := os.Remove(filepath.Join(disk, "ballast")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "alerts are spooled again and arrive", 30*time.Second, func() bool {
		p.act(999, 1000)
		got, _ := p.tags()
		return got["spine-tag-999;"] > 0
	})
	p.stopBoth()
	got, losses := p.tags()
	arrived := 0
	for i := range 50 {
		n := got[fmt.Sprintf("spine-tag-%d;", i)]
		if n > 1 {
			t.Errorf("tag %d is there %d times", i, n)
		}
		arrived += n
	}
	if lost := lostIn(t, losses); arrived+lost != 50 {
		t.Errorf("of 50 alerts made on a full disk %d arrived and %d are named as lost", arrived, lost)
	} else {
		t.Logf("of 50 alerts made on a full disk %d arrived from memory, %d are named as lost", arrived, lost)
	}
}

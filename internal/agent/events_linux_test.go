package agent

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/testenv"
)

// TestReaderThatHasEnough: when the program behind the pipe ends, as head does,
// agent events ends in good order and without complaint.
func TestReaderThatHasEnough(t *testing.T) {
	testenv.Root(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), commandVar+"=events --kinds exec --duration 60s")
	cmd.Stdout = w
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	said := bufio.NewReader(stderr)
	for line := ""; !strings.Contains(line, "listening"); {
		if line, err = said.ReadString('\n'); err != nil {
			cmd.Wait()
			if cmd.ProcessState.ExitCode() == exitUnsupported {
				testenv.Skip(t, line)
			}
			t.Fatalf("%v: %s", err, line)
		}
	}
	r.Close()
	if err := exec.Command("/bin/true", "to be told").Run(); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(said)
	if err := errors.Join(err, cmd.Wait()); err != nil || len(rest) != 0 {
		t.Errorf("ended with %v, and said %q", err, rest)
	}
	if d := time.Since(begin); d > 50*time.Second {
		t.Errorf("ended after %v, by its --duration", d)
	}
}

package testenv

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"testing"
)

// Talk starts a program that ends when its standard input does, and gives both
// ends of it. When the test is over it is waited for; one that failed, and was
// not killed, fails the test.
func Talk(t testing.TB, cmd *exec.Cmd) (in io.Writer, out *bufio.Reader) {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		err := cmd.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.Exited()) {
			t.Error(err)
		}
	})
	return stdin, bufio.NewReader(stdout)
}

// Command clusterctl keeps the test cluster up for people at work: make
// cluster-up, look around with what "env" prints, make cluster-down.
//
//	clusterctl up | down | status | env | load ARCHIVE...
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/procession-dev/procession/test/e2e/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "clusterctl:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errors.New("want up, down, status, env or load with archives")
	}
	c, err := cluster.Open(ctx, stderr)
	if err != nil {
		return err
	}
	switch args[0] {
	case "env":
		_, err := fmt.Fprintf(stdout, "export KUBECONFIG=%s PATH=%s:$PATH CONTAINERD_ADDRESS=%s CONTAINERD_NAMESPACE=k8s.io\n",
			c.Kubeconfig, c.Bin, filepath.Join(c.Dir, "containerd.sock"))
		return err
	case "status":
		_, err := fmt.Fprintf(stdout, "running: %s\nlogs: %s\n", strings.Join(c.Running(), " "), filepath.Join(c.Dir, "log"))
		return err
	}
	unlock, err := c.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	switch args[0] {
	case "up":
		if err := c.Start(ctx); err != nil {
			return err
		}
		_, err := fmt.Fprintf(stdout, "The cluster is up. In your shell: eval \"$(go run ./test/e2e/clusterctl env)\" && kubectl get pods -A\nLogs: %s\n", filepath.Join(c.Dir, "log"))
		return err
	case "down":
		return c.Down(ctx)
	case "load":
		for _, a := range args[1:] {
			names, err := c.LoadImage(ctx, a)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintln(stdout, strings.Join(names, "\n")); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("%q: want up, down, status, env or load with archives", args[0])
}

package procconn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// hostNetworks are where the host's network namespace is found, in this order:
// that of pid 1, which may be closed to us, and that of kthreadd, a kernel
// thread. Both are the host's if the pids are, and the connector is there only.
var hostNetworks = [...]string{"/proc/1/ns/net", "/proc/2/ns/net"}

// openAnywhere opens a Conn from here, or, where the kernel says that this is
// not the host's network namespace, with sockets made in that one. A socket
// stays in the namespace it was made in; nothing else of this process goes
// there.
func openAnywhere(ctx context.Context, cfg Config) (*Conn, error) {
	c, err := open(ctx, cfg)
	if !errors.Is(err, unix.ECONNREFUSED) {
		return c, err
	}
	refused := [1 + len(hostNetworks)]error{err}
	for i, path := range hostNetworks {
		cfg.network = path
		if c, err = open(ctx, cfg); err == nil {
			cfg.Log.LogAttrs(ctx, slog.LevelInfo, "this process is not in the host's network namespace; the socket for process events was made there",
				slog.String("namespace", path))
			return c, nil
		}
		refused[1+i] = err
	}
	return nil, fmt.Errorf("%w; or, with hostNetwork: false, give the capabilities SYS_ADMIN and SYS_PTRACE, "+
		"to make the socket in the host's network namespace (now: %w; %w)", refused[0], refused[1], refused[2])
}

// newSocket makes a connector socket in the network namespace at a path, or in
// this process's own if the path is "".
func newSocket(network string) (fd int, err error) {
	const kind = unix.SOCK_DGRAM | unix.SOCK_CLOEXEC
	if network == "" {
		if fd, err = unix.Socket(unix.AF_NETLINK, kind, unix.NETLINK_CONNECTOR); err != nil {
			return -1, diagnose("socket", err)
		}
		return fd, nil
	}
	ns, err := os.Open(network)
	if err != nil {
		return -1, err
	}
	defer ns.Close()
	done := make(chan struct{})
	// The thread is in the other namespace from then on and must not be used
	// for anything else: it ends.
	onOwnThread(func() {
		defer close(done)
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("setns %s: %w", network, err)
			return
		}
		if fd, err = unix.Socket(unix.AF_NETLINK, kind, unix.NETLINK_CONNECTOR); err != nil {
			err = diagnose("socket", err)
		}
	})
	<-done
	if err != nil {
		return -1, err
	}
	return fd, nil
}

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel's audit interface (include/uapi/linux/audit.h).
const (
	auditSet     = 1001
	auditAddRule = 1011
	auditDelRule = 1012
	auditExecve  = 1309
	auditSyscall = 1300

	auditStatusEnabled = 0x1
	auditStatusPID     = 0x4
	auditStatusBacklog = 0x10

	auditFilterExit = 4
	auditAlways     = 2
	auditFieldArch  = 11
	auditEqual      = 0x40000000
)

// auditArch is what the kernel calls this machine, and its execve.
func auditArch() (arch, execve uint32, err error) {
	switch runtime.GOARCH {
	case "amd64":
		return 0xc000003e, 59, nil
	case "arm64":
		return 0xc00000b7, 221, nil
	}
	return 0, 0, fmt.Errorf("audit: %s is not known here", runtime.GOARCH)
}

// auditRule is a struct audit_rule_data: every execve of this machine.
func auditRule() ([]byte, error) {
	arch, execve, err := auditArch()
	if err != nil {
		return nil, err
	}
	ne := binary.NativeEndian
	b := make([]byte, 0, 1040)
	b = ne.AppendUint32(b, auditFilterExit)
	b = ne.AppendUint32(b, auditAlways)
	b = ne.AppendUint32(b, 1) // field_count
	var mask, fields, values, flags [64]uint32
	mask[execve/32] = 1 << (execve % 32)
	fields[0], values[0], flags[0] = auditFieldArch, arch, auditEqual
	for _, a := range [][64]uint32{mask, fields, values, flags} {
		for _, v := range a {
			b = ne.AppendUint32(b, v)
		}
	}
	return ne.AppendUint32(b, 0), nil // buflen
}

// auditStatus is a struct audit_status with the fields of mask set.
func auditStatus(mask, enabled, pid uint32) []byte {
	ne := binary.NativeEndian
	b := make([]byte, 40)
	ne.PutUint32(b[0:], mask)
	ne.PutUint32(b[4:], enabled)
	ne.PutUint32(b[12:], pid)
	ne.PutUint32(b[20:], 8192) // backlog_limit
	return b
}

// auditClient is the smallest program that does what auditd does: it is the
// kernel's audit daemon, with one rule for execve, and writes every record as
// a line "type=N text". It stands for auditd, which does more per record.
func auditClient(ctx context.Context, out io.Writer) (err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_AUDIT)
	if err != nil {
		return fmt.Errorf("audit socket: %w", err)
	}
	defer unix.Close(fd)
	// Like auditd: a socket buffer that takes a burst.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20); err != nil {
		return fmt.Errorf("audit socket: %w", err)
	}
	tv := unix.NsecToTimeval(int64(200 * time.Millisecond))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("audit socket: %w", err)
	}
	a := &auditConn{fd: fd, w: bufio.NewWriterSize(out, 64<<10), buf: make([]byte, 16<<10)}
	rule, err := auditRule()
	if err != nil {
		return err
	}
	pid := uint32(os.Getpid())
	if err := a.request(auditSet, auditStatus(auditStatusPID|auditStatusEnabled|auditStatusBacklog, 1, pid)); err != nil {
		return fmt.Errorf("become the audit daemon: %w (is auditd running?)", err)
	}
	defer func() {
		err = errors.Join(err, a.request(auditSet, auditStatus(auditStatusPID|auditStatusEnabled, 0, 0)))
	}()
	if err := a.request(auditAddRule, rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("audit rule: %w", err)
	}
	defer func() { err = errors.Join(err, a.request(auditDelRule, rule)) }()
	for ctx.Err() == nil {
		if err := a.receive(0); err != nil {
			return err
		}
	}
	return nil
}

type auditConn struct {
	fd   int
	seq  uint32
	w    *bufio.Writer
	buf  []byte
	told bool  // the acknowledgement of seq has come
	ack  error // what it said
}

// request sends a command and waits for its acknowledgement; records that
// come meanwhile are written.
func (a *auditConn) request(typ uint16, body []byte) error {
	a.seq++
	a.told, a.ack = false, nil
	ne := binary.NativeEndian
	msg := make([]byte, 16, 16+len(body))
	ne.PutUint32(msg[0:], uint32(16+len(body)))
	ne.PutUint16(msg[4:], typ)
	ne.PutUint16(msg[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	ne.PutUint32(msg[8:], a.seq)
	if err := unix.Sendto(a.fd, append(msg, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for deadline := time.Now().Add(5 * time.Second); !a.told; {
		if time.Now().After(deadline) {
			return errors.New("no answer from the kernel")
		}
		if err := a.receive(0); err != nil {
			return err
		}
	}
	return a.ack
}

// receive takes one datagram, and flushes when there is none.
func (a *auditConn) receive(flags int) error {
	n, from, err := unix.Recvfrom(a.fd, a.buf, flags|unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EAGAIN) {
		if err := a.w.Flush(); err != nil {
			return err
		}
		n, from, err = unix.Recvfrom(a.fd, a.buf, flags)
	}
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return nil
	case errors.Is(err, unix.ENOBUFS):
		_, err = a.w.WriteString("type=0 receive buffer overrun\n")
		return err
	case err != nil:
		return fmt.Errorf("read audit records: %w", err)
	}
	if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 || n < 16 {
		return nil // not from the kernel
	}
	ne := binary.NativeEndian
	typ, body := ne.Uint16(a.buf[4:]), a.buf[16:n]
	if typ == unix.NLMSG_ERROR {
		if len(body) >= 4 && ne.Uint32(a.buf[8:]) == a.seq {
			a.told = true
			if no := int32(ne.Uint32(body)); no != 0 {
				a.ack = unix.Errno(-no)
			}
		}
		return nil
	}
	_, err = fmt.Fprintf(a.w, "type=%d %s\n", typ, body)
	return err
}

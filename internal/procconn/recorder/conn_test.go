//go:build linux

package recorder

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/testenv"
)

// listenAck is the cn_msg.ack of the tests' LISTEN; the kernel answers with one more.
const listenAck = 0x50524f43

// openConn opens a connector socket with r attached and asks for events. After
// hangUp the kernel runs the program no more.
func openConn(t testing.TB, r *Recorder) (fd int, hangUp func()) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		testenv.Skip(t, "no process connector: "+err.Error())
	}
	var once sync.Once
	hangUp = func() { once.Do(func() { unix.Close(fd) }) }
	t.Cleanup(hangUp)
	if err := r.Attach(fd); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnIdxProc}); err != nil {
		t.Fatal(err)
	}
	const procCnMcastListen = 1
	if err := unix.Sendto(fd, connMessage(listenAck, []byte{procCnMcastListen, 0, 0, 0}), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	return fd, hangUp
}

// connMessage is a datagram for the process connector: struct nlmsghdr, struct
// cn_msg, payload.
func connMessage(ack uint32, payload []byte) []byte {
	m := make([]byte, 36, 36+len(payload))
	binary.NativeEndian.PutUint32(m[0:], uint32(36+len(payload)))
	binary.NativeEndian.PutUint16(m[4:], unix.NLMSG_DONE)
	binary.NativeEndian.PutUint32(m[16:], cnIdxProc)
	binary.NativeEndian.PutUint32(m[20:], cnValProc)
	binary.NativeEndian.PutUint32(m[28:], ack)
	binary.NativeEndian.PutUint16(m[32:], uint16(len(payload)))
	return append(m, payload...)
}

func load(t testing.TB, cfg Config) *Recorder {
	t.Helper()
	testenv.Root(t)
	r, err := Load(cfg)
	testenv.SkipOn(t, err, ErrUnsupported)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// variants are the two ways in which the program can read the kernel.
var variants = []struct {
	name  string
	probe bool
}{{"typed", false}, {"probe_read", true}}

// A listener drains a Recorder on its own goroutine, as procconn does, and
// keeps what it is asked to keep.
type listener struct {
	r      *Recorder
	fd     int
	hangUp func()
	stop   atomic.Bool
	done   chan struct{}
	err    error
	n      int // records delivered; read after close
}

// listen starts a listener. fn runs on its goroutine.
func listen(t testing.TB, r *Recorder, fn func(*event.Record)) *listener {
	t.Helper()
	l := &listener{r: r, done: make(chan struct{})}
	heard := make(chan struct{})
	var once bool
	l.fd, l.hangUp = openConn(t, r)
	go func() {
		defer close(l.done)
		for {
			stopping := l.stop.Load()
			n, err := r.Drain(func(rec *event.Record) {
				if ack, errno, ok := AckOf(rec); ok {
					if ack == listenAck+1 && errno == 0 && rec.TGID == int32(os.Getpid()) && !once {
						once = true
						close(heard)
					}
					return
				}
				fn(rec)
			})
			l.n += n
			if err != nil {
				l.err = err
				return
			}
			if n == 0 {
				if stopping {
					return
				}
				if _, err := r.Wait(-1); err != nil {
					l.err = err
					return
				}
			}
		}
	}()
	t.Cleanup(func() { l.close(t) })
	select {
	case <-heard:
	case <-time.After(5 * time.Second):
		t.Fatal("no answer to LISTEN")
	}
	return l
}

// close closes the socket and ends the listener after a last drain: then all that
// was recorded is delivered.
func (l *listener) close(t testing.TB) {
	l.hangUp()
	if l.stop.Swap(true) {
		return
	}
	if err := l.r.Wake(); err != nil {
		t.Error(err)
	}
	<-l.done
	if l.err != nil {
		t.Error(l.err)
	}
}

// keep is a copy of a record that outlives the call.
func keep(rec *event.Record) event.Record {
	c := *rec
	for _, b := range []*[]byte{&c.Comm, &c.Exe, &c.File, &c.Cmdline, &c.Cwd, &c.Cgroup} {
		*b = slices.Clone(*b)
	}
	return c
}

// total adds the counters of all CPUs.
func total(r *Recorder) (sum CPU) {
	for _, c := range r.Counters(nil) {
		sum.Seen += c.Seen
		sum.Recorded += c.Recorded
		sum.Lost += c.Lost
		sum.Gap += c.Gap
		sum.Forged += c.Forged
	}
	return sum
}

// settled waits until what was seen is recorded or lost: a message may be in
// the making on another CPU.
func settled(t testing.TB, r *Recorder) CPU {
	t.Helper()
	for range 10_000 {
		if c := total(r); c.Seen == c.Recorded+c.Lost {
			return c
		}
		runtime.Gosched()
	}
	t.Fatalf("seen is not recorded + lost: %+v", total(r))
	return CPU{}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{
		{RingBytes: 1000}, {RingBytes: 4096 * 3}, {RingBytes: -4096}, {RingBytes: 1 << 31},
		{SelfTGID: -1}, {Kinds: 1 << 31},
	} {
		if r, err := Load(c); err == nil || errors.Is(err, ErrUnsupported) {
			t.Errorf("Load(%+v) = %v, %v; want an error about the configuration", c, r, err)
		}
	}
}

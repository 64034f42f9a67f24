package procconn

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn/recorder"
	"golang.org/x/sys/unix"
)

const (
	// proveTime is how long events may take to arrive at first: an emulated
	// machine with other work needs more than a second.
	proveTime = 5 * time.Second
	// askAgain is how often LISTEN is repeated meanwhile, and how long silence
	// lasts before the namespaces are looked at.
	askAgain = 500 * time.Millisecond
	// idleEvery is the longest time between two calls of Idle.
	idleEvery = time.Second
)

// errUnproven reports that nothing came back, for no reason that could be
// found: the other way to see may still work.
var errUnproven = errors.New("events could not be proven to arrive")

// A source is a way to see: recording or fallback. All methods but wake are
// called by one goroutine at a time.
type source interface {
	ownThread() bool                               // drain must always be called by the same one
	listener() *socket                             // that sends LISTEN
	drain(last bool) (n int, more bool, err error) // see fallback
	idle() bool                                    // nothing is held back
	pause(n int) time.Duration                     // until the next look, after one that found n records
	nap(d time.Duration) error                     // or until wake is called
	wait(d time.Duration) error                    // until something comes, wake is called, or d is over
	wake()
	losses(tell func(Loss)) error
	full() float64 // see Conn.Full
	beatAll() error
	beaten(since uint64) (ok bool, where string)
	describe(*Status)
	close() error
}

// A Conn is an open connection to the process connector.
type Conn struct {
	cfg  Config
	tgid int
	src  source
	n    counters

	h         Handler    // nil until Run
	tell      func(Loss) // is (*Conn).lost: a method value made once, since making it allocates
	toIdle    int        // records until the clock is looked at
	idleAt    uint64     // ns, CLOCK_MONOTONIC: of the last Idle
	beat      beat
	wantAck   uint32 // cn_msg.ack of the answer to our LISTEN; 0 none is due
	acked     bool
	ackErr    uint32
	lossLog   throttle
	beatLog   throttle
	totalLost uint64 // events
	lossSoFar uint64 // of them, not logged yet

	ran, stopping atomic.Bool
	bye           sync.Once

	mu     sync.Mutex // guards status
	status Status     // but for what Status fills in
}

// Open opens the connector and returns when events are proven to arrive. The
// error wraps ErrNotSupported or ErrPermission where the caller can do
// something about it, and says what.
//
// What comes before Run is kept: open first, then scan /proc, then run. In the
// fall-back, threads that read the facts of execs run from now until Close.
func Open(ctx context.Context, cfg Config) (*Conn, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	var c *Conn
	done := make(chan struct{})
	onOwnThread(func() {
		defer close(done)
		c, err = openAnywhere(ctx, cfg)
	})
	<-done
	return c, err
}

func open(ctx context.Context, cfg Config) (*Conn, error) {
	why := fmt.Errorf("turned off: recorder: %s", Off)
	if cfg.Recorder != Off {
		c := newConn(cfg)
		r, err := openRecording(c)
		if err == nil {
			c.src = r
			if err = c.start(ctx, ""); err == nil {
				return c, nil
			}
		}
		// Namespaces and permissions are the same for both ways.
		hopeless := (errors.Is(err, ErrNotSupported) || errors.Is(err, ErrPermission)) && !errors.Is(err, errUnproven)
		switch {
		case cfg.Recorder == Require && errors.Is(err, recorder.ErrUnsupported):
			return nil, fmt.Errorf("%w: the recorder is required: %w; grant what is missing, or set recorder: %s", ErrNotSupported, err, Auto)
		case cfg.Recorder == Require, hopeless, ctx.Err() != nil:
			return nil, err
		}
		why = err
	}
	c := newConn(cfg)
	f, err := openFallback(c)
	if err != nil {
		return nil, err
	}
	c.src = f
	if err := c.start(ctx, why.Error()); err != nil {
		return nil, err
	}
	if cfg.Recorder != Off {
		cfg.Log.LogAttrs(ctx, slog.LevelWarn, "recorder cannot be used: reading /proc instead",
			slog.String("way", string(c.status.Way)), slog.String("err", why.Error()))
	}
	return c, nil
}

func newConn(cfg Config) *Conn {
	c := &Conn{cfg: cfg, tgid: os.Getpid()}
	c.tell = c.lost
	return c
}

// start proves that events arrive, or closes c.
func (c *Conn) start(ctx context.Context, reason string) error {
	if err := c.prove(ctx); err != nil {
		c.goodbye()
		return errors.Join(err, c.src.close())
	}
	c.status.Reason = reason
	c.status.Since = time.Now()
	c.status.Network = c.cfg.network
	c.src.describe(&c.status)
	return nil
}

// prove asks the kernel for events until our own LISTEN was acknowledged and
// an event that we made came back.
func (c *Conn) prove(ctx context.Context) error {
	begin := monotonic()
	var asked uint64
	for {
		now := monotonic()
		if now-asked >= uint64(askAgain) {
			if asked != 0 && !c.acked {
				if err := diagnoseSilence(); err != nil {
					return err
				}
			}
			asked = now
			if err := c.listen(); err != nil {
				return err
			}
		}
		if _, _, err := c.src.drain(false); err != nil {
			return err
		}
		if err := diagnoseAck(c.ackErr); err != nil {
			return err
		}
		if c.acked && (!c.beat.waiting || asked == now) {
			if err := c.sendBeat(); err != nil {
				return err
			}
		}
		ok, where := false, "every socket"
		if c.acked {
			if ok, where = c.src.beaten(c.beat.sent); ok {
				c.sawBeat(monotonic())
				return nil
			}
		}
		if now-begin > uint64(proveTime) {
			if !c.acked {
				return fmt.Errorf("%w: %w: LISTEN was not acknowledged within %v, although this process is in the host's namespaces: "+
					"on kernels before 6.6 another privileged program may have silenced all listeners; look for one that stops proc connector events",
					ErrNotSupported, errUnproven, proveTime)
			}
			return fmt.Errorf("%w: %w: LISTEN was acknowledged, but an event made by this process did not come back within %v (%s)",
				ErrNotSupported, errUnproven, proveTime, where)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("prove that process events arrive: %w", err)
		}
		if err := c.src.wait(5 * time.Millisecond); err != nil {
			return err
		}
	}
}

// listen sends a LISTEN with a number that nobody else has.
func (c *Conn) listen() error {
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return fmt.Errorf("number for LISTEN: %w", err)
	}
	ack := binary.NativeEndian.Uint32(b[:])
	if ack+1 == 0 { // 0 stands for none
		ack = 1
	}
	c.wantAck = ack + 1
	return c.src.listener().request(opListen, ack)
}

// sawAck takes the answer to somebody's LISTEN or IGNORE.
func (c *Conn) sawAck(ack, errno uint32) {
	if ack == c.wantAck && ack != 0 {
		c.acked, c.ackErr = errno == 0, errno
	}
}

// Run hands everything to h until ctx ends, which is no error. What had
// arrived by then is still handed over. Run may be called once.
func (c *Conn) Run(ctx context.Context, h Handler) error {
	if c.ran.Swap(true) {
		return errors.New("process connector: Run was called before")
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		c.stopping.Store(true)
		c.src.wake()
	})
	defer func() {
		if !stop() {
			<-woken // or Close could close what it rings
		}
	}()
	if !c.src.ownThread() {
		return c.run(h)
	}
	done := make(chan error, 1)
	onOwnThread(func() { done <- c.run(h) })
	return <-done
}

func (c *Conn) run(h Handler) error {
	c.h = h
	c.describe()
	c.beat.waiting, c.beat.next = false, monotonic()+uint64(c.cfg.Heartbeat)
	for !c.stopping.Load() {
		begin := monotonic()
		n, more, err := c.look(false)
		if err != nil {
			return err
		}
		if err := c.tendBeat(begin); err != nil {
			return err
		}
		switch {
		case more:
		case n > 0 || !c.src.idle():
			if err := c.src.nap(c.src.pause(n)); err != nil {
				return err
			}
		default:
			if err := c.src.wait(c.untilNext()); err != nil {
				return err
			}
		}
	}
	return c.finish()
}

// look hands over what there is and tells what was lost.
func (c *Conn) look(last bool) (n int, more bool, err error) {
	if n, more, err = c.src.drain(last); err != nil {
		return 0, false, err
	}
	if err := c.src.losses(c.tell); err != nil {
		return 0, false, err
	}
	if !more {
		c.callIdle()
	}
	return n, more, nil
}

// untilNext is how long an idle reader may sleep.
func (c *Conn) untilNext() time.Duration {
	now := monotonic()
	due := min(c.beat.due(c), c.idleAt+uint64(idleEvery))
	if due <= now {
		return 0
	}
	return time.Duration(due - now)
}

// finish hands over what has arrived. A last heartbeat on each socket shows
// when everything older was read.
func (c *Conn) finish() error {
	if err := c.sendBeat(); err != nil {
		return err
	}
	for begin := monotonic(); ; {
		if _, _, err := c.look(false); err != nil {
			return err
		}
		if ok, _ := c.src.beaten(c.beat.sent); ok {
			c.sawBeat(monotonic())
			break
		}
		if monotonic()-begin > uint64(time.Second) {
			c.n.beatsMissed.Add(1)
			break
		}
		if err := c.src.wait(time.Millisecond); err != nil {
			return err
		}
	}
	c.goodbye()
	for {
		if _, more, err := c.look(true); err != nil || !more {
			return err
		}
	}
}

// goodbye sends IGNORE, if our LISTEN was acknowledged: before 6.6 an IGNORE
// too many silences somebody else.
func (c *Conn) goodbye() {
	c.bye.Do(func() {
		if c.acked {
			// The socket is about to be closed; there is nothing to do about
			// an error, and nothing is lost by it.
			_ = c.src.listener().request(opIgnore, 0)
		}
	})
}

// Close ends the threads of Open and frees everything. Call it after Run, or
// instead of it.
func (c *Conn) Close() error {
	c.goodbye()
	return c.src.close()
}

// Wake has Run call the Handler's Idle soon, though no event comes. It may be
// called from any goroutine until Close.
func (c *Conn) Wake() { c.src.wake() }

// deliver hands one record to the Handler.
func (c *Conn) deliver(r *event.Record) {
	c.n.delivered[r.Kind].Add(1)
	c.h.Record(r)
	if c.toIdle--; c.toIdle <= 0 {
		c.toIdle = 64
		if monotonic()-c.idleAt >= uint64(idleEvery) {
			c.callIdle()
		}
	}
}

func (c *Conn) callIdle() {
	c.idleAt = monotonic()
	c.h.Idle()
}

// lost tells the Handler of a loss.
func (c *Conn) lost(l Loss) {
	c.n.lost[l.Cause].Add(l.Count)
	c.totalLost += l.Count
	c.lossSoFar += l.Count
	if c.lossLog.allow(l.Until, c.cfg.Heartbeat) {
		c.cfg.Log.LogAttrs(context.Background(), slog.LevelWarn, "process events were lost",
			slog.Uint64("lost", c.lossSoFar), slog.String("cause", l.Cause.String()), slog.Int("cpu", l.CPU))
		c.lossSoFar = 0
	}
	c.h.Lost(l)
}

// Stats may be called by anybody at any time.
func (c *Conn) Stats() Stats { return c.n.stats() }

// Full is how full the buffer is from which Run reads, 0 to 1. At 1 events are
// lost. With the recorder it is of this moment, and costs next to nothing;
// without, as of the last look at the kernel's buffers. It is for the Handler,
// in its calls.
func (c *Conn) Full() float64 { return c.src.full() }

// describe renews the status, once it is known what Run's thread may do.
func (c *Conn) describe() {
	s := Status{Reason: c.status.Reason, Since: c.status.Since, Network: c.cfg.network}
	c.src.describe(&s)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status = s
}

// Status may be called by anybody at any time.
func (c *Conn) Status() Status {
	c.mu.Lock()
	s := c.status
	c.mu.Unlock()
	s.Alive = c.beat.alive.Load()
	s.HeartbeatAge = time.Duration(monotonic() - c.beat.last.Load())
	return s
}

// nap sleeps on this thread: a Go timer would have another one wake it.
func nap(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	// An early end does no harm.
	_ = unix.ClockNanosleep(unix.CLOCK_MONOTONIC, 0, &t, nil)
}

// A throttle lets something through at most once per interval.
type throttle struct{ last uint64 }

func (t *throttle) allow(now uint64, every time.Duration) bool {
	if t.last != 0 && now-t.last < uint64(every) {
		return false
	}
	t.last = now
	return true
}

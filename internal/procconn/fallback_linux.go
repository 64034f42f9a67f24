package procconn

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/procession-dev/procession/internal/event"
	"golang.org/x/sys/unix"
)

const (
	// holdBack is how long a message waits for older ones from other sockets.
	holdBack = 10 * time.Millisecond
	// sameWindow is how long after a snapshot an exec of the same process with
	// the same arguments makes it doubtful: the snapshot may be of either.
	sameWindow = 10 * time.Millisecond
	// blindWindow is the same for an exec whose arguments were not read.
	blindWindow = time.Millisecond

	bulkRcvBuf = 32 << 20
	execRcvBuf = 8 << 20
	bulkBatch  = 32      // messages for one system call
	bulkRound  = 4096    // messages read before some are handed over
	pendingMax = 1 << 15 // records held back: beyond that they stay in the socket's buffer
	execChunks = 128     // chunks of 100 kB for execs that wait for their turn
)

// A fallback sees with classic filters: a socket for everything but execs,
// which Run reads, and sockets for execs with threads of their own, which report
// to Run.
type fallback struct {
	c       *Conn
	bulk    *socket // it sends LISTEN
	recv    *receiver
	readers []*execReader
	proc    int
	snap    snapshotter
	tasks   gathering // for ids
	msg     Message   // a record points into it for a moment
	heard   heard
	// bootOffset is sinceBoot of the last drain.
	bootOffset uint64
	polled     []unix.PollFd

	stop *doorbell // rings for good when the readers shall end
	bell *doorbell // rings for Wake

	others, execs *store // of what is pending
	pending       []*item
	told          uint64 // stamp of the last record handed over
	bulkAt        uint64 // stamp of the last message read from bulk
	beatAt        uint64 // stamp of the last heartbeat on bulk
	recent        [4096]recentExec
	// overflow counts messages for which there was no chunk, because old records
	// hold so many: not told yet, since when.
	overflow, overflowSince uint64

	pins   int // CPUs with a reader
	online int
}

// A recentExec is the last exec known of a process, by tgid modulo the table's
// size. A collision only forgets: the guard is weaker then, never wrong.
type recentExec struct {
	tgid  int32
	stamp uint64
	it    *item // while it is pending
}

func openFallback(c *Conn) (*fallback, error) {
	f := &fallback{c: c, proc: -1}
	if err := f.open(); err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *fallback) open() error {
	var err error
	if f.proc, err = openProc(); err != nil {
		return err
	}
	if f.stop, err = newDoorbell(); err != nil {
		return err
	}
	if f.bell, err = newDoorbell(); err != nil {
		return err
	}
	f.tasks.proc, f.snap.cwd = f.proc, f.c.cfg.Cwd
	f.overflowSince = monotonic()
	self := uint32(f.c.tgid)
	size := func(def int) int { return cmp.Or(f.c.cfg.RcvBuf, def) }
	if f.bulk, err = openSocket(f.c.cfg.network, size(bulkRcvBuf), attachClassic(bulkFilter(self, f.c.cfg.Kinds))); err != nil {
		return err
	}
	f.recv = newReceiver(bulkBatch)
	f.others = newStore(256, 256*len(Message{}.Comm), len(Message{}.Comm), 2*pendingMax/256)
	f.execs = newStore(64, 48<<10+snapshotRoom, snapshotRoom, execChunks)
	if !f.c.cfg.Kinds.Has(event.Exec) {
		return nil
	}
	cpus, online, err := usableCPUs()
	if err != nil {
		return err
	}
	f.online = online
	if online > maxPinned || f.c.cfg.single {
		cpus = nil
	}
	f.pins = len(cpus)
	for _, n := range cpus {
		if err := f.addReader(n, execFilter(self, []int{n}, true), size(execRcvBuf)); err != nil {
			return err
		}
	}
	// And one for the CPUs that may not be pinned to, or that come later.
	if err := f.addReader(-1, execFilter(self, cpus, false), size(execRcvBuf)); err != nil {
		return err
	}
	for _, r := range f.readers {
		r.start()
	}
	return nil
}

func (f *fallback) addReader(cpu int, filter []unix.SockFilter, rcvBuf int) error {
	s, err := openSocket(f.c.cfg.network, rcvBuf, attachClassic(filter))
	if err != nil {
		return err
	}
	r := &execReader{f: f, cpu: cpu, sock: s, share: cmp.Or(f.c.cfg.share, usualShare),
		gathering: gathering{proc: f.proc, cwd: f.c.cfg.Cwd}}
	f.readers = append(f.readers, r)
	if err := r.open(reportBuf / (f.pins + 1)); err != nil {
		return fmt.Errorf("reader of CPU %d: %w", cpu, err)
	}
	return nil
}

// ownThread says yes: to make heartbeats it goes from CPU to CPU, and it sleeps in
// system calls.
func (f *fallback) ownThread() bool { return true }

func (f *fallback) nap(d time.Duration) error {
	nap(d)
	return nil
}

func (f *fallback) listener() *socket { return f.bulk }

// wake ends a wait, or the next one.
func (f *fallback) wake() { f.bell.ring() }

// wait blocks until something comes, wake is called, or d is over.
func (f *fallback) wait(d time.Duration) error {
	for _, r := range f.readers {
		if r.begin < r.end {
			return nil
		}
	}
	poll := func(fd int) { f.polled = append(f.polled, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}) }
	f.polled = f.polled[:0]
	poll(f.bell.fd)
	poll(f.bulk.fd)
	for _, r := range f.readers {
		poll(r.from)
	}
	waitFor(f.polled, d)
	if f.polled[0].Revents != 0 {
		f.bell.silence()
	}
	return nil
}

// drain reads what waits and hands over what is old enough; everything if
// last is set. n is the number of records read or handed over, more says that
// something waits still.
func (f *fallback) drain(last bool) (n int, more bool, err error) {
	now := monotonic()
	horizon := now - uint64(holdBack)
	f.bootOffset = clock(unix.CLOCK_BOOTTIME) - now // as sinceBoot
	before := len(f.pending)
	if more, err = f.readBulk(); err != nil {
		return 0, false, err
	}
	if more && !last {
		// What is still in the buffer is younger than what was read, but for
		// the disorder that holdBack is made for.
		horizon = min(horizon, f.bulkAt-min(f.bulkAt, uint64(holdBack)))
	}
	for _, r := range f.readers {
		rest, err := f.readReports(r)
		if err != nil {
			return 0, false, err
		}
		more = more || rest
	}
	n = len(f.pending) - before
	switch {
	case f.c.h == nil:
		horizon = 0 // Open: there is nobody to tell
	case last && !more:
		horizon = math.MaxUint64
	}
	return n + f.tell(horizon), more, nil
}

// readBulk reads the bulk socket.
func (f *fallback) readBulk() (more bool, err error) {
	for total := 0; total < bulkRound && len(f.pending) < pendingMax; {
		n, err := f.recv.receive(f.bulk.fd)
		if err != nil || n == 0 {
			return false, err
		}
		for i := range n {
			b, fromKernel := f.recv.datagram(i)
			f.each(b, fromKernel, func(bool) { f.bulkMessage(&f.msg) })
		}
		if total += n; n < bulkBatch {
			return false, nil
		}
	}
	return true, nil
}

// each decodes the messages of a datagram into msg, one after the other, has them
// taken, and counts those that are none of ours.
func (f *fallback) each(b []byte, fromKernel bool, take func(first bool)) {
	for first := true; first || len(b) > 0; first = false {
		f.c.n.received.Add(1)
		if !fromKernel {
			f.c.n.forged.Add(1)
			return
		}
		var ok bool
		if b, ok = f.c.n.decode(b, &f.msg); ok {
			take(first)
		}
	}
}

func (f *fallback) bulkMessage(m *Message) {
	f.bulkAt = m.Stamp
	kind := m.Kind()
	switch {
	case m.What == WhatNone:
		f.c.n.acks.Add(1)
		f.c.sawAck(m.Ack, m.Err)
		return
	case f.c.isBeat(kind, m.PID, m.TGID):
		f.c.n.own.Add(1)
		f.beatAt = max(f.beatAt, m.Stamp)
		return
	case !f.c.cfg.Kinds.Has(kind):
		f.c.n.notAsked.Add(1)
		return
	}
	it := f.fill(f.others)
	if it == nil {
		return
	}
	if kind == event.CommChange {
		it.in.text, it.rec.Comm = add(it.in.text, it.rec.Comm)
	}
	if kind == event.UIDChange || kind == event.GIDChange {
		f.readIDs(&it.rec)
	}
	f.hold(it)
}

// fill makes an item of msg, or counts it where there is no room.
func (f *fallback) fill(s *store) *item {
	it := s.slot()
	if it == nil {
		f.overflow++
		return nil
	}
	f.msg.Fill(&it.rec)
	return it
}

// hold keeps an item until its turn.
func (f *fallback) hold(it *item) {
	f.c.n.waiting.Add(1)
	f.pending = append(f.pending, it)
}

// readIDs adds all ids of a task that changed some. The message knows two of
// them: if /proc says otherwise it speaks of a later change, or of another
// task.
func (f *fallback) readIDs(r *event.Record) {
	f.tasks.lookAtStatus(r.PID)
	f.snap.ids(&r.Facts, f.tasks.parts[partStatus][:f.tasks.sizes[partStatus]])
	if r.Have == 0 {
		return
	}
	r.From = event.SourceProc
	if !r.Have.Has(event.FieldIDs) {
		return
	}
	real, effective := r.UID, r.EUID
	if r.Kind == event.GIDChange {
		real, effective = r.GID, r.EGID
	}
	if real != r.ID || effective != r.EID {
		r.Facts = event.Facts{}
	}
}

// readReports takes what a reader's thread reports, in the order in which it
// happened on its CPU.
func (f *fallback) readReports(r *execReader) (more bool, err error) {
	select {
	case <-r.done:
		if r.err != nil {
			return false, r.err
		}
	default:
	}
	for len(f.pending) < pendingMax && f.execs.ready() {
		switch ok, err := r.next(&f.heard); {
		case err != nil:
			return false, err
		case !ok:
			return false, nil
		}
		f.report(r, &f.heard)
	}
	return true, nil
}

// report takes one report. The kernel sends one message in a datagram; were there
// more, what was read would be about the first.
func (f *fallback) report(r *execReader, h *heard) {
	r.class.Store(uint32(h.class))
	r.pinned.Store(h.pinned)
	f.each(h.message, h.fromKernel, func(first bool) { f.execMessage(r, h, first) })
}

func (f *fallback) execMessage(r *execReader, h *heard, first bool) {
	m := &f.msg
	if m.What == WhatComm {
		f.c.n.own.Add(1)
		r.beat = max(r.beat, m.Stamp)
		return
	}
	if m.What != WhatExec {
		f.c.n.unknown.Add(1) // the filter lets nothing else pass
		return
	}
	it := f.fill(f.execs)
	if it == nil {
		return
	}
	switch {
	case first && h.ready > 0:
		c := it.in
		c.text, it.outcome, it.doubt = f.snap.facts(&it.rec.Facts, h, m.Stamp, f.bootOffset, c.text)
		it.ready = h.ready
	case first && h.outcome != complete:
		it.outcome = h.outcome
	default:
		it.outcome = gone
	}
	f.hold(it)
	f.check(it)
}

// check checks an exec's facts against the other execs of the same process.
func (f *fallback) check(it *item) {
	last := &f.recent[uint32(it.rec.TGID)%uint32(len(f.recent))]
	known := last.tgid == it.rec.TGID
	switch {
	case known && last.stamp > it.rec.Stamp:
		// It comes late, after a younger one from another CPU.
		if last.it != nil && doubtful(it, last.it) || last.it == nil && last.stamp <= it.ready+uint64(blindWindow) {
			it.drop()
		}
		return
	case known && last.it != nil && doubtful(last.it, it):
		last.it.drop()
	}
	*last = recentExec{it.rec.TGID, it.rec.Stamp, it}
}

// doubtful says whether the facts of first may be about the program of second,
// a later exec of the same process. They certainly are not if the arguments
// differ: each snapshot is of one program.
func doubtful(first, second *item) bool {
	if first.ready == 0 || first.rec.Have == 0 || second.rec.Stamp > first.ready+uint64(sameWindow) {
		return false
	}
	if !second.rec.Have.Has(event.FieldArgs) || !first.rec.Have.Has(event.FieldArgs) {
		return second.rec.Stamp <= first.ready+uint64(blindWindow)
	}
	return string(first.rec.Cmdline) == string(second.rec.Cmdline)
}

// drop throws away facts that may be about another program.
func (it *item) drop() {
	it.rec.Facts = event.Facts{}
	it.outcome, it.doubt, it.ready = superseded, 0, 0
}

func compareItems(a, b *item) int {
	return cmp.Or(cmp.Compare(a.rec.Stamp, b.rec.Stamp), cmp.Compare(a.rec.CPU, b.rec.CPU), cmp.Compare(a.rec.Seq, b.rec.Seq))
}

// tell hands over the pending records up to horizon, in order.
func (f *fallback) tell(horizon uint64) (n int) {
	slices.SortFunc(f.pending, compareItems)
	for n < len(f.pending) && f.pending[n].rec.Stamp <= horizon {
		it := f.pending[n]
		n++
		if it.rec.Stamp < f.told {
			f.c.n.late.Add(1)
		}
		f.told = max(f.told, it.rec.Stamp)
		if it.rec.Kind == event.Exec {
			f.c.n.facts(it.outcome, it.doubt)
			if last := &f.recent[uint32(it.rec.TGID)%uint32(len(f.recent))]; last.it == it {
				last.it = nil
			}
		}
		f.c.n.waiting.Add(-1)
		f.c.deliver(&it.rec)
		it.done()
	}
	rest := copy(f.pending, f.pending[n:])
	clear(f.pending[rest:])
	f.pending = f.pending[:rest]
	return n
}

// pause is short: what is held back to be put in order waits for it too.
func (f *fallback) pause(int) time.Duration { return f.c.cfg.DrainInterval }

// idle says whether nothing is held back.
func (f *fallback) idle() bool { return len(f.pending) == 0 }

// losses tells what the sockets dropped since the last call.
func (f *fallback) losses(tell func(Loss)) error {
	now := monotonic()
	if f.overflow > 0 {
		tell(Loss{Cause: LostQueue, CPU: -1, Count: f.overflow, Since: f.overflowSince, Until: now})
	}
	f.overflow, f.overflowSince = 0, now
	one := func(s *socket, cpu int) error {
		n, since, err := s.lost(now)
		if err == nil && n > 0 {
			tell(Loss{Cause: LostSocket, CPU: cpu, Count: n, Since: since, Until: now})
		}
		return err
	}
	if err := one(f.bulk, -1); err != nil {
		return err
	}
	for _, r := range f.readers {
		if err := one(r.sock, r.cpu); err != nil {
			return err
		}
	}
	return nil
}

// full is about the socket that a storm fills first; execs have others, one per
// CPU, which fill no sooner.
func (f *fallback) full() float64 { return f.bulk.full }

// beatAll makes a heartbeat on every CPU that has a reader, so that each
// socket proves itself.
func (f *fallback) beatAll() error {
	if err := nameThread(); err != nil {
		return err
	}
	var home unix.CPUSet
	if err := unix.SchedGetaffinity(0, &home); err != nil {
		return fmt.Errorf("read CPU affinity: %w", err)
	}
	for _, r := range f.readers {
		// A CPU that went offline, or that this process may not use any more,
		// makes no heartbeat and owes none.
		r.due = r.pinned.Load() && pin(r.cpu) == nil
		if r.due {
			if err := nameThread(); err != nil {
				return err
			}
		}
		r.due = r.due || f.pins == 0
	}
	// If the thread cannot go back it may stay: it works on any CPU.
	_ = unix.SchedSetaffinity(0, &home)
	return nil
}

// beaten says whether the heartbeats made since the stamp came back, and if
// not on which socket.
func (f *fallback) beaten(since uint64) (ok bool, where string) {
	if f.beatAt < since {
		return false, "bulk socket"
	}
	for _, r := range f.readers {
		if r.due && r.beat < since {
			return false, fmt.Sprintf("exec socket of CPU %d", r.cpu)
		}
	}
	return true, ""
}

func (f *fallback) describe(s *Status) {
	s.Way = PerCPU
	if f.pins == 0 {
		s.Way = Single
	}
	s.Facts = fallbackFacts(f.c.cfg.Cwd)
	s.RcvBuf = f.bulk.rcvBuf
	worst := fifo
	for _, r := range f.readers {
		if f.pins > 0 && r.cpu < 0 && f.pins == f.online {
			continue // it waits for CPUs that are not there
		}
		s.Readers++
		worst = min(worst, class(r.class.Load()))
		if r.pinned.Load() {
			s.Pinned++
		}
	}
	if s.Readers == 0 {
		worst = normal
	}
	s.Scheduling = worst.String()
	limit := func(missing, cost string) { s.Limits = append(s.Limits, Limit{missing, cost}) }
	limit("recorder", "Facts of an exec are read from /proc in a race with the process: up to 1 in 100 very short processes is seen "+
		"without arguments or program. Namespaces, login id, the name handed to execve and the overlay layer are never known, "+
		"nor who made a process with CLONE_PARENT.")
	for _, c := range []struct {
		n    uint
		name string
	}{{unix.CAP_BPF, "CAP_BPF"}, {unix.CAP_PERFMON, "CAP_PERFMON"}} {
		if !hasCap(c.n) && !hasCap(unix.CAP_SYS_ADMIN) {
			limit(c.name, "The kernel does not let this process load the recorder.")
		}
	}
	if worst != fifo && s.Readers > 0 {
		limit("CAP_SYS_NICE", "Readers run at "+worst.String()+" instead of "+fifo.String()+
			": facts of many short processes are missed. In a cgroup v1 without a real-time budget the capability does not help.")
	}
	if s.Pinned < s.Readers && f.online <= maxPinned {
		limit("CPU affinity", fmt.Sprintf("%d of %d online CPUs have no reader of their own, because this process may not run there: "+
			"facts of most short processes on them are missed.", f.online-s.Pinned, f.online))
	}
	if f.online > maxPinned {
		limit("CPU count", fmt.Sprintf("One reader serves all %d CPUs, since more than %d sockets would slow down every process: "+
			"facts of many short processes are missed.", f.online, maxPinned))
	}
	s.Limits = append(s.Limits, fileLimits("")...)
	if !f.bulk.forced {
		limit("CAP_NET_ADMIN", fmt.Sprintf("The receive buffer is limited by net.core.rmem_max to %d bytes, about %d events: "+
			"longer bursts are lost, and counted.", f.bulk.rcvBuf, f.bulk.rcvBuf/832))
	}
}

func (f *fallback) close() error {
	if f.stop != nil {
		f.stop.ring()
	}
	var errs []error
	for _, r := range f.readers {
		if r.done == nil {
			r.close()
			continue
		}
		// It may be waiting for room.
		_ = unix.Shutdown(r.from, unix.SHUT_RDWR)
		select {
		case <-r.done:
			r.close()
		case <-time.After(5 * time.Second):
			// Its sockets stay open for it.
			errs = append(errs, fmt.Errorf("reader of CPU %d hangs in /proc", r.cpu))
		}
	}
	if f.bulk != nil {
		f.bulk.close()
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	for _, d := range []*doorbell{f.stop, f.bell} {
		if d != nil {
			d.close()
		}
	}
	if f.proc >= 0 {
		unix.Close(f.proc)
	}
	return nil
}

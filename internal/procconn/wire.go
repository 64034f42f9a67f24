package procconn

import (
	"encoding/binary"
	"fmt"

	"github.com/procession-dev/procession/internal/event"
)

// A What is the kernel's word for what happened (enum proc_cn_event,
// include/uapi/linux/cn_proc.h).
type What uint32

// The events of Linux up to 7.2.
const (
	WhatNone     What = 0 // answer to a LISTEN or IGNORE of anybody
	WhatFork     What = 0x1
	WhatExec     What = 0x2
	WhatUID      What = 0x4
	WhatGID      What = 0x40
	WhatSID      What = 0x80
	WhatPtrace   What = 0x100
	WhatComm     What = 0x200
	WhatCoreDump What = 0x40000000
	WhatExit     What = 0x80000000
)

// Operations of a request to the connector (enum proc_cn_mcast_op).
const (
	opListen = 1
	opIgnore = 2
)

// A datagram from the connector, in the machine's byte order:
//
//	 0  nlmsghdr   len u32, type u16, flags u16, seq u32, pid u32
//	16  cn_msg     idx u32, val u32, seq u32, ack u32, len u16, flags u16
//	36  proc_event what u32, cpu u32, timestamp_ns u64
//	52  union of 8 to 24 bytes, by what
const (
	nlHeaderLen = 16
	cnHeaderLen = 20
	evHeaderLen = 16

	offSeq   = nlHeaderLen + 8
	offWhat  = nlHeaderLen + cnHeaderLen
	offCPU   = offWhat + 4
	offUnion = offWhat + evHeaderLen

	unionLen   = 24                  // since Linux 3.1; older kernels send less
	messageLen = offUnion + unionLen // 76, one message of any kernel since

	nlmsgDone = 3 // NLMSG_DONE, the type of every connector message
	cnIdxProc = 1 // CN_IDX_PROC
	cnValProc = 1 // CN_VAL_PROC
)

// A Message is one message of the connector, decoded. Which of the fields
// below Stamp mean something depends on What; the others are zero.
type Message struct {
	What  What
	CPU   uint32
	Seq   uint32 // per-CPU counter, before any filter; acknowledgements count too
	Ack   uint32 // acknowledgement: the request's ack + 1
	Stamp uint64 // ns, CLOCK_MONOTONIC

	Err       uint32 // WhatNone: errno of the request
	PID, TGID int32  // the task; WhatFork: the child's real parent; WhatPtrace: the tracee

	PeerPID, PeerTGID     int32    // WhatFork: the child; WhatPtrace: the tracer, 0 for a detach
	ParentPID, ParentTGID int32    // WhatExit, WhatCoreDump; 0 unknown (kernels before 4.18)
	ID, EID               uint32   // WhatUID, WhatGID: new real and effective id
	Status                uint32   // WhatExit: wait status
	ExitSignal            uint32   // WhatExit: signal sent to the parent; all ones for a thread
	Comm                  [16]byte // WhatComm: padded with NUL
}

// unionNeeds is how much of the union each event must bring along.
func unionNeeds(w What) int {
	switch w {
	case WhatNone:
		return 4
	case WhatExec, WhatSID, WhatCoreDump:
		return 8
	case WhatFork, WhatUID, WhatGID, WhatPtrace, WhatExit:
		return 16
	case WhatComm:
		return 24
	}
	return 0
}

// Known says whether the event is one of those above.
func (w What) Known() bool { return unionNeeds(w) != 0 }

// A DecodeError says where in a datagram decoding stopped, and why.
type DecodeError struct {
	Off  int    // byte offset of the message in the datagram
	Want string // what should have been there
}

// Error is one line for an operator.
func (e *DecodeError) Error() string {
	return fmt.Sprintf("malformed connector message at byte %d: want %s", e.Off, e.Want)
}

// Decode reads the first message of b into m and returns what follows it. Skip
// is true, and m is of no use, for a message that is well formed but no process
// event: another connector's, or a netlink control message. Messages of an
// unknown What are handed out with their header only. An error is a
// *DecodeError at offset 0, and nothing after it can be trusted: netlink has
// no way to find the next message.
//
// Decode is pure, allocates nothing but the error, and keeps nothing of b.
func Decode(b []byte, m *Message) (rest []byte, skip bool, err error) {
	rest, skip, want := decode(b, m)
	if want != "" {
		return nil, false, &DecodeError{Want: want}
	}
	return rest, skip, nil
}

// decode is Decode for the hot path, where even an error must not allocate:
// want is "" or what is missing.
func decode(b []byte, m *Message) (rest []byte, skip bool, want string) {
	ne := binary.NativeEndian
	if len(b) < nlHeaderLen {
		return nil, false, "a netlink header of 16 bytes"
	}
	n := ne.Uint32(b)
	if n < nlHeaderLen || uint64(n) > uint64(len(b)) {
		return nil, false, "a netlink length within the datagram"
	}
	// NLMSG_ALIGN; the last message need not be padded.
	rest = b[min(uint64(len(b)), (uint64(n)+3)&^3):]
	b = b[:n]
	if ne.Uint16(b[4:]) != nlmsgDone {
		return rest, true, ""
	}
	if len(b) < nlHeaderLen+cnHeaderLen {
		return nil, false, "a connector header of 20 bytes"
	}
	if ne.Uint32(b[16:]) != cnIdxProc || ne.Uint32(b[20:]) != cnValProc {
		return rest, true, ""
	}
	*m = Message{Seq: ne.Uint32(b[24:]), Ack: ne.Uint32(b[28:])}
	size := int(ne.Uint16(b[32:]))
	if size > len(b)-offWhat {
		return nil, false, "a connector length within the message"
	}
	if size < evHeaderLen {
		return nil, false, "a proc_event header of 16 bytes"
	}
	ev := b[offWhat : offWhat+size]
	m.What = What(ne.Uint32(ev))
	m.CPU = ne.Uint32(ev[4:])
	m.Stamp = ne.Uint64(ev[8:])
	// Older kernels send a shorter union; what they do not send reads as 0.
	var u [unionLen]byte
	if size-evHeaderLen < unionNeeds(m.What) {
		return nil, false, "the whole union of the event"
	}
	copy(u[:], ev[evHeaderLen:])
	m.decodeUnion(&u)
	return rest, false, ""
}

func (m *Message) decodeUnion(u *[unionLen]byte) {
	w := func(i int) uint32 { return binary.NativeEndian.Uint32(u[4*i:]) }
	if m.What != WhatNone && m.What.Known() {
		m.PID, m.TGID = int32(w(0)), int32(w(1))
	}
	switch m.What {
	case WhatNone:
		m.Err = w(0)
	case WhatFork, WhatPtrace:
		m.PeerPID, m.PeerTGID = int32(w(2)), int32(w(3))
	case WhatUID, WhatGID:
		m.ID, m.EID = w(2), w(3)
	case WhatComm:
		copy(m.Comm[:], u[8:])
	case WhatCoreDump:
		m.ParentPID, m.ParentTGID = int32(w(2)), int32(w(3))
	case WhatExit:
		m.Status, m.ExitSignal = w(2), w(3)
		m.ParentPID, m.ParentTGID = int32(w(4)), int32(w(5))
	}
}

// AppendMessage appends m to dst as the kernel would send it: what Decode
// reads back as m. Fields that m.What does not use are not sent.
func AppendMessage(dst []byte, m *Message) []byte {
	ne := binary.NativeEndian
	dst = appendHeader(dst, m.Seq, m.Ack, evHeaderLen+unionLen)
	dst = ne.AppendUint32(dst, uint32(m.What))
	dst = ne.AppendUint32(dst, m.CPU)
	dst = ne.AppendUint64(dst, m.Stamp)
	var u [unionLen]byte
	put := func(i int, v uint32) { ne.PutUint32(u[4*i:], v) }
	if m.What != WhatNone && m.What.Known() {
		put(0, uint32(m.PID))
		put(1, uint32(m.TGID))
	}
	switch m.What {
	case WhatNone:
		put(0, m.Err)
	case WhatFork, WhatPtrace:
		put(2, uint32(m.PeerPID))
		put(3, uint32(m.PeerTGID))
	case WhatUID, WhatGID:
		put(2, m.ID)
		put(3, m.EID)
	case WhatComm:
		copy(u[8:], m.Comm[:])
	case WhatCoreDump:
		put(2, uint32(m.ParentPID))
		put(3, uint32(m.ParentTGID))
	case WhatExit:
		put(2, m.Status)
		put(3, m.ExitSignal)
		put(4, uint32(m.ParentPID))
		put(5, uint32(m.ParentTGID))
	}
	return append(dst, u[:]...)
}

// appendRequest appends a LISTEN or IGNORE. The kernel answers with a WhatNone
// message to the whole group whose Ack is ack+1; seq is not echoed. Only the 4
// byte payload works on every kernel: 8 bytes (struct proc_input, 6.6) are
// ignored without an answer by older ones, and a filtered listener does not
// hear its own acknowledgement.
func appendRequest(dst []byte, op, ack uint32) []byte {
	dst = appendHeader(dst, 0, ack, 4)
	return binary.NativeEndian.AppendUint32(dst, op)
}

// appendHeader appends the netlink and the connector header of a message with
// size bytes of payload.
func appendHeader(dst []byte, seq, ack uint32, size int) []byte {
	ne := binary.NativeEndian
	dst = ne.AppendUint32(dst, uint32(nlHeaderLen+cnHeaderLen+size))
	dst = ne.AppendUint16(dst, nlmsgDone)
	dst = append(dst, make([]byte, 10)...) // flags, seq, pid
	dst = ne.AppendUint32(dst, cnIdxProc)
	dst = ne.AppendUint32(dst, cnValProc)
	dst = ne.AppendUint32(dst, seq)
	dst = ne.AppendUint32(dst, ack)
	dst = ne.AppendUint16(dst, uint16(size))
	return ne.AppendUint16(dst, 0)
}

// Kind is the event's kind; event.KindUnknown for acknowledgements and for
// events this package does not know.
func (m *Message) Kind() event.Kind {
	switch m.What {
	case WhatFork:
		return event.Fork
	case WhatExec:
		return event.Exec
	case WhatUID:
		return event.UIDChange
	case WhatGID:
		return event.GIDChange
	case WhatSID:
		return event.SessionChange
	case WhatPtrace:
		if m.PeerTGID == 0 {
			return event.PtraceDetach
		}
		return event.PtraceAttach
	case WhatComm:
		return event.CommChange
	case WhatCoreDump:
		return event.CoreDump
	case WhatExit:
		return event.Exit
	}
	return event.KindUnknown
}

// Fill writes into r what the message alone says. Text in r points into m.
//
// Two things a message does not say: a detach does not name the tracer (PID
// and TGID are 0), and a fork names the child's real parent, which is not the
// creator when that one used CLONE_PARENT.
func (m *Message) Fill(r *event.Record) {
	*r = event.Record{
		Kind: m.Kind(), CPU: m.CPU, Seq: m.Seq, Stamp: m.Stamp,
		PID: m.PID, TGID: m.TGID,
	}
	switch r.Kind {
	case event.Fork:
		r.PeerPID, r.PeerTGID = m.PeerPID, m.PeerTGID
		r.RealParent = m.TGID
	case event.PtraceAttach, event.PtraceDetach:
		r.PID, r.TGID = m.PeerPID, m.PeerTGID
		r.PeerPID, r.PeerTGID = m.PID, m.TGID
	case event.UIDChange, event.GIDChange:
		r.ID, r.EID = m.ID, m.EID
	case event.SessionChange:
		// setsid(2): the session takes the caller's pid and has no terminal.
		r.SID, r.TTY = m.TGID, 0
		r.Have, r.From = event.FieldSet(event.FieldSession), event.SourceMessage
	case event.CommChange:
		r.Comm = untilNUL(m.Comm[:])
		r.Have, r.From = event.FieldSet(event.FieldName), event.SourceMessage
	case event.CoreDump:
		m.fillParent(r)
	case event.Exit:
		r.Status, r.ExitSignal = m.Status, int32(m.ExitSignal)
		m.fillParent(r)
	}
}

func (m *Message) fillParent(r *event.Record) {
	if m.ParentTGID == 0 {
		return // a kernel before 4.18, or no parent in the host's pid namespace
	}
	r.PPID = m.ParentTGID
	r.Have, r.From = event.FieldSet(event.FieldParent), event.SourceMessage
}

// untilNUL is b up to its first NUL. The kernel does not clear what follows
// the NUL in a task's name, so the rest may be an older, longer name.
func untilNUL(b []byte) []byte {
	for i, c := range b {
		if c == 0 {
			return b[:i]
		}
	}
	return b
}

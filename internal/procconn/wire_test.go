package procconn

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/procession-dev/procession/internal/event"
)

// samples is one message of every event, all fields set.
func samples() []Message {
	h := Message{CPU: 3, Seq: 7, Ack: 0, Stamp: 1 << 40}
	with := func(w What, f func(*Message)) Message {
		m := h
		m.What = w
		if w != WhatNone {
			m.PID, m.TGID = 101, 100
		}
		if f != nil {
			f(&m)
		}
		return m
	}
	peer := func(m *Message) { m.PeerPID, m.PeerTGID = 201, 200 }
	return []Message{
		with(WhatNone, func(m *Message) { m.Ack, m.Err = 0xfffffffe, 1 }),
		with(WhatFork, peer),
		with(WhatExec, nil),
		with(WhatUID, func(m *Message) { m.ID, m.EID = 1000, 0xffffffff }),
		with(WhatGID, func(m *Message) { m.ID, m.EID = 5, 6 }),
		with(WhatSID, nil),
		with(WhatPtrace, peer),
		with(WhatPtrace, nil),
		with(WhatComm, func(m *Message) { copy(m.Comm[:], "p2\x00hs.sh") }),
		with(WhatCoreDump, func(m *Message) { m.ParentPID, m.ParentTGID = 9, 8 }),
		with(WhatExit, func(m *Message) { m.Status, m.ExitSignal, m.ParentPID, m.ParentTGID = 139, 17, 9, 8 }),
	}
}

func TestDecodeRoundTrip(t *testing.T) {
	var all []byte
	for _, want := range samples() {
		one := AppendMessage(nil, &want)
		if len(one) != messageLen {
			t.Errorf("what %#x: %d bytes, want %d", want.What, len(one), messageLen)
		}
		var got Message
		rest, skip, err := Decode(one, &got)
		if err != nil || skip || len(rest) != 0 {
			t.Fatalf("what %#x: rest %d, skip %v, err %v", want.What, len(rest), skip, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("what %#x (-want +got):\n%s", want.What, d)
		}
		all = append(all, one...)
	}
	// Several messages in one datagram.
	var got []Message
	for b := all; len(b) > 0; {
		var m Message
		rest, _, err := Decode(b, &m)
		if err != nil {
			t.Fatal(err)
		}
		got, b = append(got, m), rest
	}
	if d := cmp.Diff(samples(), got); d != "" {
		t.Errorf("one datagram (-want +got):\n%s", d)
	}
}

func TestDecodeBadInput(t *testing.T) {
	exec := samples()[2]
	ne := binary.NativeEndian
	change := func(m Message, f func([]byte) []byte) []byte { return f(AppendMessage(nil, &m)) }
	comm := samples()[8]
	for _, c := range []struct {
		name string
		b    []byte
		want string // of DecodeError; "" = skipped or fine
		skip bool
	}{
		{"empty", nil, "a netlink header of 16 bytes", false},
		{"half a header", make([]byte, 15), "a netlink header of 16 bytes", false},
		{"length zero", change(exec, func(b []byte) []byte { ne.PutUint32(b, 0); return b }), "a netlink length within the datagram", false},
		{"length below the header", change(exec, func(b []byte) []byte { ne.PutUint32(b, 15); return b }), "a netlink length within the datagram", false},
		{"length beyond the datagram", change(exec, func(b []byte) []byte { ne.PutUint32(b, 77); return b }), "a netlink length within the datagram", false},
		{"length of 4 GiB", change(exec, func(b []byte) []byte { ne.PutUint32(b, 0xffffffff); return b }), "a netlink length within the datagram", false},
		{"no room for cn_msg", change(exec, func(b []byte) []byte { ne.PutUint32(b, 20); return b[:20] }), "a connector header of 20 bytes", false},
		{"cn_msg length beyond", change(exec, func(b []byte) []byte { ne.PutUint16(b[32:], 41); return b }), "a connector length within the message", false},
		{"cn_msg length below proc_event", change(exec, func(b []byte) []byte { ne.PutUint16(b[32:], 15); return b }), "a proc_event header of 16 bytes", false},
		{"exec without tgid", change(exec, func(b []byte) []byte { ne.PutUint16(b[32:], 20); return b }), "the whole union of the event", false},
		{"comm cut", change(comm, func(b []byte) []byte { ne.PutUint16(b[32:], 39); return b }), "the whole union of the event", false},
		{"exec of a kernel with a short union", change(exec, func(b []byte) []byte { ne.PutUint16(b[32:], 24); ne.PutUint32(b, 60); return b[:60] }), "", false},
		{"another connector", change(exec, func(b []byte) []byte { ne.PutUint32(b[16:], 9); return b }), "", true},
		{"netlink overrun notice", change(exec, func(b []byte) []byte { ne.PutUint16(b[4:], 4); return b }), "", true},
		{"unknown event with an empty union", change(Message{What: 0x400, CPU: 1, Seq: 2}, func(b []byte) []byte { ne.PutUint16(b[32:], 16); return b }), "", false},
	} {
		var m Message
		_, skip, err := Decode(c.b, &m)
		var de *DecodeError
		switch {
		case c.want == "" && (err != nil || skip != c.skip):
			t.Errorf("%s: skip %v err %v, want skip %v and no error", c.name, skip, err, c.skip)
		case c.want != "" && (!errors.As(err, &de) || de.Want != c.want):
			t.Errorf("%s: %v, want a DecodeError for %s", c.name, err, c.want)
		}
	}
}

func TestFill(t *testing.T) {
	name := event.FieldSet(event.FieldName)
	parent := event.FieldSet(event.FieldParent)
	base := event.Record{CPU: 3, Seq: 7, Stamp: 1 << 40, PID: 101, TGID: 100}
	with := func(k event.Kind, f func(*event.Record)) event.Record {
		r := base
		r.Kind = k
		if f != nil {
			f(&r)
		}
		return r
	}
	want := []event.Record{
		with(event.KindUnknown, func(r *event.Record) { r.PID, r.TGID = 0, 0 }),
		with(event.Fork, func(r *event.Record) { r.PeerPID, r.PeerTGID, r.RealParent = 201, 200, 100 }),
		with(event.Exec, nil),
		with(event.UIDChange, func(r *event.Record) { r.ID, r.EID = 1000, 0xffffffff }),
		with(event.GIDChange, func(r *event.Record) { r.ID, r.EID = 5, 6 }),
		with(event.SessionChange, func(r *event.Record) {
			r.SID, r.Have, r.From = 100, event.FieldSet(event.FieldSession), event.SourceMessage
		}),
		with(event.PtraceAttach, func(r *event.Record) { r.PID, r.TGID, r.PeerPID, r.PeerTGID = 201, 200, 101, 100 }),
		with(event.PtraceDetach, func(r *event.Record) { r.PID, r.TGID, r.PeerPID, r.PeerTGID = 0, 0, 101, 100 }),
		with(event.CommChange, func(r *event.Record) { r.Comm, r.Have, r.From = []byte("p2"), name, event.SourceMessage }),
		with(event.CoreDump, func(r *event.Record) { r.PPID, r.Have, r.From = 8, parent, event.SourceMessage }),
		with(event.Exit, func(r *event.Record) {
			r.Status, r.ExitSignal, r.PPID, r.Have, r.From = 139, 17, 8, parent, event.SourceMessage
		}),
	}
	for i, m := range samples() {
		var got event.Record
		m.Fill(&got)
		if d := cmp.Diff(want[i], got); d != "" {
			t.Errorf("what %#x (-want +got):\n%s", m.What, d)
		}
	}
}

func TestDecodeAllocatesNothing(t *testing.T) {
	var b []byte
	for _, m := range samples() {
		b = AppendMessage(b, &m)
	}
	bad := []byte("not a netlink message at all")
	var m Message
	var r event.Record
	if n := testing.AllocsPerRun(1000, func() {
		for rest := b; len(rest) > 0; {
			rest, _, _ = decode(rest, &m)
			m.Fill(&r)
		}
		decode(bad, &m)
	}); n != 0 {
		t.Errorf("decoding allocates %v times", n)
	}
}

// FuzzDecode: whatever comes in, Decode stays inside it, every turn makes it
// shorter, and a message that was understood means the same when it is encoded
// and decoded again.
func FuzzDecode(f *testing.F) {
	var all []byte
	for _, m := range samples() {
		b := AppendMessage(nil, &m)
		f.Add(b)
		f.Add(b[:len(b)-9])
		all = append(all, b...)
	}
	f.Add(all)
	f.Add(appendRequest(nil, opListen, 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		for turns := 0; len(b) > 0; turns++ {
			var m, again Message
			rest, skip, err := Decode(b, &m)
			if err != nil {
				var de *DecodeError
				if !errors.As(err, &de) || de.Want == "" {
					t.Fatalf("error %v is no DecodeError", err)
				}
				return
			}
			if len(rest) >= len(b) {
				t.Fatalf("message of %d bytes leaves %d", len(b), len(rest))
			}
			b = rest
			if skip {
				continue
			}
			tail, skip, err := Decode(AppendMessage(nil, &m), &again)
			if err != nil || skip || len(tail) != 0 || again != m {
				t.Fatalf("again: %+v, tail %d, skip %v, err %v; want %+v", again, len(tail), skip, err, m)
			}
			var r event.Record
			m.Fill(&r)
			if (r.Kind == event.KindUnknown) != (m.What == WhatNone || !m.What.Known()) {
				t.Fatalf("what %#x became kind %v", m.What, r.Kind)
			}
		}
	})
}

package procconn

import (
	"encoding/binary"

	"github.com/procession-dev/procession/internal/event"
	"golang.org/x/sys/unix"
)

// Classic BPF filters for connector sockets. The kernel runs a filter on every
// message before it is queued, and what it rejects costs its sender 0.25 us.
// Offset 0 is the netlink header. A load converts from network order while the
// fields are in the machine's order, so constants are converted as well; two
// loaded fields may be compared as they are.

// A label is a place in a filter that jumps name before it is known.
type label int

const (
	next label = iota // the following instruction
	accept
	reject
	numLabels
)

type jump struct {
	at      int // index of the instruction
	yes, no label
}

// An assembler builds a filter. Only forward jumps exist in classic BPF.
type assembler struct {
	ins    []unix.SockFilter
	jumps  []jump
	places map[label]int
	labels label
}

func newAssembler() *assembler {
	return &assembler{places: map[label]int{}, labels: numLabels}
}

func (a *assembler) label() label { a.labels++; return a.labels - 1 }

func (a *assembler) place(l label) { a.places[l] = len(a.ins) }

func (a *assembler) load(off uint32) {
	a.ins = append(a.ins, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off})
}

// is compares the loaded field with v.
func (a *assembler) is(v uint32, yes, no label) {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], v)
	a.jump(unix.BPF_K, binary.BigEndian.Uint32(b[:]), yes, no)
}

// same compares two fields.
func (a *assembler) same(off1, off2 uint32, yes, no label) {
	a.load(off1)
	a.ins = append(a.ins, unix.SockFilter{Code: unix.BPF_MISC | unix.BPF_TAX})
	a.load(off2)
	a.jump(unix.BPF_X, 0, yes, no)
}

func (a *assembler) jump(src uint16, k uint32, yes, no label) {
	a.jumps = append(a.jumps, jump{len(a.ins), yes, no})
	a.ins = append(a.ins, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | src, K: k})
}

// finish adds the two ends and resolves the jumps. What falls off the end of
// the program is accepted.
func (a *assembler) finish() []unix.SockFilter {
	a.place(accept)
	a.ins = append(a.ins, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff})
	a.place(reject)
	a.ins = append(a.ins, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
	for _, j := range a.jumps {
		a.places[next] = j.at + 1
		a.ins[j.at].Jt = uint8(a.places[j.yes] - j.at - 1)
		a.ins[j.at].Jf = uint8(a.places[j.no] - j.at - 1)
	}
	return a.ins
}

// execFilter accepts the execs, and our own heartbeats, of one CPU (pinned has
// one element and inside is true) or of all but the pinned CPUs.
func execFilter(self uint32, pinned []int, inside bool) []unix.SockFilter {
	a := newAssembler()
	comm, cpu := a.label(), a.label()
	a.load(offWhat)
	a.is(uint32(WhatExec), cpu, next)
	a.is(uint32(WhatComm), comm, reject)
	a.place(comm)
	a.load(offUnion + 4) // process_tgid
	a.is(self, cpu, reject)
	a.place(cpu)
	a.load(offCPU)
	for _, n := range pinned {
		if inside {
			a.is(uint32(n), accept, next)
		} else {
			a.is(uint32(n), reject, next)
		}
	}
	if inside {
		a.ins = append(a.ins, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
	}
	return a.finish()
}

// bulkFilter accepts everything but execs: of the wanted kinds those that are
// about a process, not about a thread; our own heartbeats; acknowledgements;
// and what we do not know, so that it is counted. Ids are changed thread by
// thread, so UID and GID events of threads pass.
func bulkFilter(self uint32, kinds event.Kinds) []unix.SockFilter {
	a := newAssembler()
	fork, exit, comm := a.label(), a.label(), a.label()
	when := func(k event.Kinds, yes label) label {
		if kinds&k != 0 {
			return yes
		}
		return reject
	}
	set := event.KindSet
	a.load(offWhat)
	a.is(uint32(WhatExec), reject, next)
	a.is(uint32(WhatFork), when(set(event.Fork), fork), next)
	a.is(uint32(WhatExit), when(set(event.Exit), exit), next)
	a.is(uint32(WhatComm), comm, next)
	a.is(uint32(WhatUID), when(set(event.UIDChange), accept), next)
	a.is(uint32(WhatGID), when(set(event.GIDChange), accept), next)
	a.is(uint32(WhatSID), when(set(event.SessionChange), accept), next)
	a.is(uint32(WhatPtrace), when(set(event.PtraceAttach, event.PtraceDetach), accept), next)
	a.is(uint32(WhatCoreDump), when(set(event.CoreDump), accept), accept)
	a.place(fork)
	a.same(offUnion+8, offUnion+12, accept, reject) // child_pid, child_tgid
	a.place(exit)
	a.same(offUnion, offUnion+4, accept, reject) // process_pid, process_tgid
	a.place(comm)
	if !kinds.Has(event.CommChange) {
		a.load(offUnion + 4)
		a.is(self, accept, reject)
	}
	return a.finish()
}

package proctable

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// FuzzApply lets a kernel say anything, in any order: forks of unknown
// processes, ends that never were, pids that come back, starts that contradict
// each other. Whatever it says, the table stays in order and within bounds, and
// every record is accounted for.
func FuzzApply(f *testing.F) {
	f.Add([]byte("\x02\x01\x02\x00\x00\x00\x01\x02\x01\x00\x00\x00\x03\x02\x01\x00\x00\x00"))
	f.Add(bytes.Repeat([]byte("\x02\x01\x02\x05\x00\x09\x03\x01\x00\x00\xff\xff"), 40))
	f.Add(bytes.Repeat([]byte("\x02\x03\x04\x11\x22\x33\x01\x04\x03\x11\x22\x33\x04\x04\x05\x11\x22\x33"), 30))
	for seed := range uint64(20) { // long lives, which mutation seldom finds
		rnd := rand.New(rand.NewPCG(seed, 7))
		ops := make([]byte, 6*1500)
		for i := range ops {
			ops[i] = byte(rnd.Uint32())
			if seed%2 == 0 && i%6 == 0 {
				ops[i] = byte(1 + rnd.Uint32()%3) // exec, fork, exit
			}
		}
		f.Add(ops)
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		c := &testClock{Instant{Mono: 100 * s, Boot: 100*s + slept, Wall: bootDay}}
		tab, err := New(Config{MaxProcesses: 64, MaxArgs: 16, MaxText: 2048, Clock: c, ExitGrace: 50 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		var ev event.Event
		stamp := 100 * s
		applied := uint64(0)
		for n := 0; len(ops) >= 6; n++ {
			op := ops[:6]
			ops = ops[6:]
			r := fuzzRecord(op, &stamp)
			if stamp > c.now.Mono {
				c.at(stamp)
			}
			if op[5]&0x1f == 0 {
				tab.Tick(stamp)
				continue
			}
			applied++
			if tab.Apply(r, &ev) {
				if ev.Process == nil || ev.Kind != r.Kind || ev.Duration < 0 {
					t.Fatalf("%+v for %+v", ev, r)
				}
				if r.Kind == event.Exec && string(ev.Process.Exe) != string(r.Exe) {
					t.Fatalf("exec of %q shows %q", r.Exe, ev.Process.Exe)
				}
				depth := 0
				for a := ev.Process.Parent; a != nil; a = a.Parent {
					if depth++; depth > 64 {
						t.Fatal("a circle among the ancestors")
					}
				}
			}
			if n%64 == 0 {
				checkTable(t, tab)
			}
		}
		checkTable(t, tab)
		if st := tab.Stats(); st.Applied != applied || st.TextBytes > 2048+64*4*leanPath {
			t.Fatalf("applied %d records, stats %+v", applied, st)
		}
		// In the end everybody ends, and nothing stays.
		for _, e := range tab.procs {
			if !e.Exited {
				tab.end(e, stamp)
			}
		}
		for range 3 {
			stamp += 10 * s
			tab.Tick(stamp)
		}
		checkTable(t, tab)
		if st := tab.Stats(); st.Live+st.Remembered+st.TextBytes != 0 || len(tab.groups) != 0 {
			t.Fatalf("left behind: %+v", st)
		}
	})
}

// fuzzRecord makes a record of six bytes: kind, subject, peer, and three of
// odds and ends.
func fuzzRecord(op []byte, stamp *uint64) *event.Record {
	*stamp += uint64(op[3]) * ms / 4
	if op[3] == 255 {
		*stamp += 10 * s
	}
	r := &event.Record{
		Kind: event.Kind(op[0] % 12), Stamp: *stamp - uint64(op[4]&3)*ms,
		TGID: int32(op[1] % 80), PID: int32(op[1] % 80), PeerTGID: int32(op[2] % 80), PeerPID: int32(op[2] % 80),
		ID: uint32(op[2] & 3), EID: uint32(op[3] & 3), Status: uint32(op[3]),
	}
	r.From, r.Have, r.Threads = event.Source(op[4]>>2&3), event.Fields(binary.LittleEndian.Uint16(op[4:])), int32(op[5]&3)
	if op[0]&0x80 != 0 {
		r.PID++
	}
	if op[0]&0x40 != 0 {
		r.RealParent, r.PPID = r.PeerTGID, r.PeerTGID
	}
	r.Start = (r.Stamp + slept) - uint64(op[5])*4*ms
	if op[4]&0x80 != 0 {
		r.Start, r.StartTicks = r.Start/10_000_000*10_000_000, true
	}
	if op[5]&0x80 != 0 {
		r.PeerStart, r.ParentStart = r.Start+uint64(op[2])*ms, r.Start-uint64(op[2])*ms
	}
	text := bytes.Repeat(op, 1+int(op[2]))
	r.Comm, r.Cgroup, r.Cwd, r.File = op[:3], op[1:3], text[:op[2]], op
	if r.Have.Has(event.FieldExe) {
		r.Exe = text
	}
	r.Cmdline, r.CmdlineLen = text, uint32(len(text))+uint32(op[4]&1)*100
	r.UID, r.GID = uint32(op[3]&1), uint32(op[4]&1)
	return r
}

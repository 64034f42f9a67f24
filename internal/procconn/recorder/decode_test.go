package recorder

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

var update = flag.Bool("update", false, "write testdata and docs anew")

const recordsDir = "testdata/records"

// records are the captured records: one of each kind.
func records(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob(recordsDir + "/*.bin")
	if err != nil || len(files) == 0 {
		t.Fatalf("no records in %s: %v", recordsDir, err)
	}
	recs := map[string][]byte{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		recs[strings.TrimSuffix(filepath.Base(f), ".bin")] = b
	}
	return recs
}

// describe is a record as text.
func describe(r *event.Record) string {
	var b strings.Builder
	p := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-14s "+format+"\n", append([]any{name}, args...)...)
	}
	p("kind", "%v", r.Kind)
	p("message", "cpu %d seq %d stamp %d", r.CPU, r.Seq, r.Stamp)
	p("task", "%d/%d", r.PID, r.TGID)
	p("peer", "%d/%d start %d", r.PeerPID, r.PeerTGID, r.PeerStart)
	p("id", "%d %d", r.ID, r.EID)
	p("exit", "status %#x signal %d run %d rss %d", r.Status, r.ExitSignal, r.RunTime, r.MaxRSS)
	p("real parent", "%d", r.RealParent)
	var have []string
	for f := range event.NumFields {
		if r.Have.Has(f) {
			have = append(have, f.String())
		}
	}
	p("have", "%s from %v", strings.Join(have, " "), r.From)
	p("start", "%d", r.Start)
	p("parent", "%d start %d", r.PPID, r.ParentStart)
	p("ids", "%+v", r.IDs)
	p("caps", "%#x %#x", r.CapPermitted, r.CapEffective)
	p("namespaces", "%+v inner pid %d", r.NS, r.InnerPID)
	p("session", "%d tty %d login %d audit %d", r.SID, r.TTY, r.LoginUID, r.AuditSession)
	p("no new privs", "%t threads %d", r.NoNewPrivs, r.Threads)
	p("exe file", "%+v", r.ExeFile)
	p("marks", "%010b", r.Marks)
	p("comm", "%q", r.Comm)
	p("exe", "%q", r.Exe)
	p("file", "%q", r.File)
	p("argv", "%q of %d", r.Cmdline, r.CmdlineLen)
	p("cwd", "%q", r.Cwd)
	p("cgroup", "%q", r.Cgroup)
	return b.String()
}

func TestDecodeCaptured(t *testing.T) {
	d := NewDecoder()
	for name, b := range records(t) {
		t.Run(name, func(t *testing.T) {
			var rec event.Record
			if err := d.Decode(b, &rec); err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join(recordsDir, name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(describe(&rec)), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), describe(&rec)); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// A rec builds a record by hand.
type rec struct {
	head                         [headSize]byte
	cgroup, exe, cwd, file, args string
}

func newRec(what, flags uint32) *rec {
	r := &rec{}
	r.put(offVersion, Version)
	r.put(offFlags, flags)
	r.put(offWhat, what)
	r.put(dataPID, 12)
	r.put(dataTGID, 10)
	r.put(offPID, 12)
	r.put(offTGID, 10)
	return r
}

func (r *rec) put(off int, v uint32) *rec {
	binary.LittleEndian.PutUint32(r.head[off:], v)
	return r
}

func (r *rec) put64(off int, v uint64) *rec {
	binary.LittleEndian.PutUint64(r.head[off:], v)
	return r
}

func (r *rec) bytes() []byte {
	text := r.cgroup + r.exe + r.cwd + r.file + r.args
	r.put(offLen, uint32(headSize+len(text)))
	for _, s := range []struct {
		off  int
		text string
	}{{offCgroupLen, r.cgroup}, {offExeLen, r.exe}, {offCwdLen, r.cwd}, {offFileLen, r.file}, {offArgsLen, r.args}} {
		r.put(s.off, uint32(len(s.text)))
	}
	if u32(r.head[:], offArgsTotal) == 0 {
		r.put(offArgsTotal, uint32(len(r.args)))
	}
	return append(r.head[:], text...)
}

func TestDecodeErrors(t *testing.T) {
	good := func() *rec { return newRec(whatExec, flagArgs|pathTop<<exeShift) }
	for _, c := range []struct {
		name string
		b    []byte
		off  int
	}{
		{"nothing", nil, 0},
		{"no header", good().bytes()[:headSize-1], headSize - 1},
		{"another version", good().put(offVersion, 2).bytes(), offVersion},
		{"shorter than it says", (&rec{args: "x"}).with(good()).bytes()[:headSize], offLen},
		{"longer than it says", append(good().bytes(), 0), offLen},
		{"flags from the future", good().put(offFlags, 1<<31).bytes(), offFlags},
		{"a section beyond the end", patch(good().bytes(), offExeLen, 1), offExeLen},
		{"a section larger than its room", patch((&rec{cgroup: strings.Repeat("x\x00", cgroupMax)}).with(good()).bytes(), offCgroupLen, 2*cgroupMax), offCgroupLen},
		{"a length that wraps around", patch(good().bytes(), offArgsLen, 1<<32-1), offArgsLen},
		{"text that belongs to no section", patch((&rec{args: "xx"}).with(good()).bytes(), offArgsLen, 1), headSize + 1},
		{"a path without end", (&rec{exe: "sh"}).with(good()).bytes(), headSize},
		{"a cgroup without end", (&rec{cgroup: "pod"}).with(good()).bytes(), headSize},
		{"a file name without end", (&rec{file: "sh"}).with(good()).bytes(), headSize},
		{"fewer arguments than are there", (&rec{args: "sh\x00"}).with(good().put(offArgsTotal, 2)).bytes(), offArgsTotal},
		{"no task", good().put(offPID, 0).bytes(), offPID},
		{"a negative process", good().put(offTGID, 1<<31).bytes(), offPID},
		{"no such kind", good().put(offWhat, 0x10).bytes(), offWhat},
		{"two kinds", good().put(offWhat, whatExec|whatFork).bytes(), offWhat},
		{"facts of another process", good().put(dataTGID, 11).bytes(), dataTGID},
		{"facts of another tracer", newRec(whatPtrace, 0).put(ptraceTracerPID, 7).put(ptraceTracerTGID, 7).bytes(), ptraceTracerTGID},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := event.Record{Kind: event.Exit, Facts: event.Facts{Exe: []byte("stale")}}
			err := NewDecoder().Decode(c.b, &out)
			var de *DecodeError
			if !errors.As(err, &de) || de.Off != c.off {
				t.Errorf("error %v, want one at byte %d", err, c.off)
			}
			if diff := cmp.Diff(event.Record{}, out); diff != "" {
				t.Errorf("the record is not empty:\n%s", diff)
			}
		})
	}
}

// with takes the header of another record.
func (r *rec) with(head *rec) *rec {
	r.head = head.head
	return r
}

func patch(b []byte, off int, v uint32) []byte {
	binary.LittleEndian.PutUint32(b[off:], v)
	return b
}

func TestDecodeText(t *testing.T) {
	const exe, cwd = exeShift, cwdShift
	for _, c := range []struct {
		name   string
		r      *rec
		exe    string
		marks  event.Marks
		have   event.Fields
		others string // cwd, cgroup
	}{
		{"unread", &rec{head: newRec(whatExec, 0).head, exe: "sh\x00bin\x00", cgroup: "x\x00"}, "", 0, 0, ""},
		{"path", &rec{head: newRec(whatExec, (pathTop|pathRoot)<<exe).head, exe: "sh\x00bin\x00usr\x00"}, "/usr/bin/sh", 0, event.FieldSet(event.FieldExe), ""},
		{"no names", &rec{head: newRec(whatExec, (pathTop|pathRoot)<<exe).head}, "/", 0, event.FieldSet(event.FieldExe), ""},
		{"outside root", &rec{head: newRec(whatExec, pathTop<<exe).head, exe: "sh\x00"}, "/sh", event.MarkOutsideRoot, event.FieldSet(event.FieldExe), ""},
		{"deleted", &rec{head: newRec(whatExec, (pathTop|pathRoot|pathUnhash)<<exe).head, exe: "sh\x00"}, "/sh (deleted)", event.MarkDeleted, event.FieldSet(event.FieldExe), ""},
		{"cut", &rec{head: newRec(whatExec, pathCut<<exe).head, exe: "c\x00b\x00"}, "/b/c", event.MarkExeCut, event.FieldSet(event.FieldExe), ""},
		{"memfd", &rec{head: newRec(whatExec, (pathPseudo|pathUnhash)<<exe).head, exe: "memfd:x\x00"}, "/memfd:x (deleted)", event.MarkMemfd, event.FieldSet(event.FieldExe), ""},
		{"memfd with an evil name", &rec{head: newRec(whatExec, (pathPseudo|pathUnhash)<<exe).head, exe: "memfd:a/\x00"}, "/memfd:a/ (deleted)", event.MarkMemfd, event.FieldSet(event.FieldExe), ""},
		{"escaped", &rec{head: newRec(whatExec, pathPseudo<<exe).head, exe: "sh\x00dir\x00/\x00"}, "/", event.MarkOutsideRoot, event.FieldSet(event.FieldExe), ""},
		{"escaped root", &rec{head: newRec(whatExec, pathPseudo<<exe).head, exe: "/\x00"}, "/", event.MarkOutsideRoot, event.FieldSet(event.FieldExe), ""},
		{"pseudo without name", &rec{head: newRec(whatExec, pathPseudo<<exe).head}, "/ (deleted)", event.MarkMemfd, event.FieldSet(event.FieldExe), ""},
		{"detached", &rec{head: newRec(whatExec, flagExeNS|(pathTop|pathRoot)<<exe).head}, "/", event.MarkDetached, event.FieldSet(event.FieldExe), ""},
		{"in an anonymous namespace", &rec{head: newRec(whatExec, flagExeNS|(pathTop|pathRoot)<<exe).put(offExeNS, 0xeffffff7).head}, "/", event.MarkDetached, event.FieldSet(event.FieldExe), ""},
		{"foreign", &rec{head: newRec(whatExec, flagNS|flagExeNS|(pathTop|pathRoot)<<exe).put(offExeNS, 7).put(offNSMnt, 8).head}, "/", event.MarkForeign, event.FieldSet(event.FieldExe, event.FieldNS), ""},
		{"own namespace", &rec{head: newRec(whatExec, flagNS|flagExeNS|(pathTop|pathRoot)<<exe).put(offExeNS, 8).put(offNSMnt, 8).head}, "/", 0, event.FieldSet(event.FieldExe, event.FieldNS), ""},
		{"namespace unknown", &rec{head: newRec(whatExec, flagExeNS|(pathTop|pathRoot)<<exe).put(offExeNS, 7).head}, "/", 0, event.FieldSet(event.FieldExe), ""},
		{"layer unknown", &rec{head: newRec(whatExec, flagUpper).head}, "", 0, 0, ""},
		{"upper layer", &rec{head: newRec(whatExec, flagUpper|flagUpperKnown).head}, "", event.MarkUpper | event.MarkUpperKnown, 0, ""},
		{"lower layer", &rec{head: newRec(whatExec, flagUpperKnown).head}, "", event.MarkUpperKnown, 0, ""},
		{"cwd", &rec{head: newRec(whatExec, pathTop<<cwd).head, cwd: "tmp\x00"}, "", 0, event.FieldSet(event.FieldCwd), "/tmp"},
		{"cwd deleted", &rec{head: newRec(whatExec, (pathTop|pathUnhash)<<cwd).head, cwd: "tmp\x00"}, "", 0, event.FieldSet(event.FieldCwd), "/tmp (deleted)"},
		{"cwd cut", &rec{head: newRec(whatExec, pathCut<<cwd).head, cwd: "tmp\x00"}, "", event.MarkCwdCut, event.FieldSet(event.FieldCwd), "/tmp"},
		{"root cgroup", &rec{head: newRec(whatExec, flagCgroupTop).head}, "", 0, event.FieldSet(event.FieldCgroup), "/"},
		{"cgroup", &rec{head: newRec(whatExec, flagCgroupTop).head, cgroup: "ctr\x00pod\x00"}, "", 0, event.FieldSet(event.FieldCgroup), "/pod/ctr"},
		{"cgroup cut", &rec{head: newRec(whatExec, flagCgroupCut).head, cgroup: "ctr\x00pod\x00"}, "", event.MarkCgroupCut, event.FieldSet(event.FieldCgroup), "/pod/ctr"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out event.Record
			if err := NewDecoder().Decode(c.r.bytes(), &out); err != nil {
				t.Fatal(err)
			}
			if string(out.Exe) != c.exe || out.Marks != c.marks || string(out.Cwd)+string(out.Cgroup) != c.others {
				t.Errorf("exe %q marks %010b cwd %q cgroup %q; want %q %010b %q", out.Exe, out.Marks, out.Cwd, out.Cgroup, c.exe, c.marks, c.others)
			}
			if have := out.Have &^ event.FieldSet(event.FieldNNP, event.FieldParent); have != c.have {
				t.Errorf("have %b, want %b", have, c.have)
			}
		})
	}
}

func TestDecodeNumbers(t *testing.T) {
	decode := func(r *rec) event.Record {
		t.Helper()
		var out event.Record
		if err := NewDecoder().Decode(r.bytes(), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Run("what was not read is missing", func(t *testing.T) {
		r := decode(newRec(whatExec, 0).put(offIDs, 5).put64(offCaps, 5).put(offSID, 5).put(offLogin, 5).put(offNSMnt, 5).put64(offExeIno, 5).put(offPPID, 5))
		if r.Have != event.FieldSet(event.FieldNNP) {
			t.Errorf("have %b", r.Have)
		}
		if r.IDs != (event.IDs{}) || r.CapPermitted != 0 || r.SID != 0 || r.LoginUID != 0 || r.NS != (event.NS{}) || r.ExeFile != (event.ExeFile{}) || r.PPID != 0 {
			t.Errorf("facts without their flag: %+v", r.Facts)
		}
	})
	t.Run("run time", func(t *testing.T) {
		zombie := newRec(whatExit, 0).put64(offRunTime, 5).put64(offRunTimeOthers, 7).put(offExitState, 0x20)
		if got := decode(zombie).RunTime; got != 12 {
			t.Errorf("of a zombie %d, want the sum 12", got)
		}
		// The kernel has added the first to the second already.
		dead := newRec(whatExit, 0).put64(offRunTime, 5).put64(offRunTimeOthers, 7).put(offExitState, 0x10)
		if got := decode(dead).RunTime; got != 7 {
			t.Errorf("of a dead task %d, want the larger 7", got)
		}
	})
	t.Run("parent of a reaped process", func(t *testing.T) {
		gone := newRec(whatExit, 0).put(offPPID, 3).put64(offParentStart, 9)
		if r := decode(gone); r.Have.Has(event.FieldParent) || r.PPID != 0 {
			t.Errorf("parent %d that the message does not name", r.PPID)
		}
		if r := decode(gone.put(exitParentTGID, 3)); !r.Have.Has(event.FieldParent) || r.PPID != 3 || r.ParentStart != 9 {
			t.Errorf("parent %d of %d", r.PPID, r.ParentStart)
		}
	})
	t.Run("start of another peer", func(t *testing.T) {
		fork := newRec(whatFork, flagPeer).put(forkChildPID, 20).put(forkChildTGID, 20).put(offPeerPID, 19).put64(offPeerStart, 9)
		if r := decode(fork); r.PeerStart != 0 || r.PeerTGID != 20 {
			t.Errorf("peer %d of %d", r.PeerTGID, r.PeerStart)
		}
		if r := decode(fork.put(offPeerPID, 20)); r.PeerStart != 9 {
			t.Errorf("peer of %d, want 9", r.PeerStart)
		}
	})
	t.Run("name", func(t *testing.T) {
		r := newRec(whatComm, flagComm)
		copy(r.head[commName:], "new\x00old-rest-of-it")
		copy(r.head[offComm:], "writer")
		if got := decode(r); string(got.Comm) != "new" || got.PID != 12 || got.TGID != 10 {
			t.Errorf("%q of %d/%d", got.Comm, got.PID, got.TGID)
		}
		full := newRec(whatExec, flagComm)
		copy(full.head[offComm:], "0123456789abcdef")
		if got := decode(full); string(got.Comm) != "0123456789abcdef" {
			t.Errorf("%q", got.Comm)
		}
	})
	t.Run("ack", func(t *testing.T) {
		r := decode(newRec(whatAck, 0).put(offAck, 77).put(dataErr, 1))
		ack, errno, ok := AckOf(&r)
		if ack != 77 || errno != 1 || !ok || r.TGID != 10 || r.Kind != event.KindUnknown {
			t.Errorf("ack %d %d %t of %+v", ack, errno, ok, r)
		}
		if _, _, ok := AckOf(&event.Record{Kind: event.Exec}); ok {
			t.Error("an exec is an ack")
		}
	})
}

// A Decoder's room is never too small: the largest record does not allocate.
func TestDecodeAllocatesNothing(t *testing.T) {
	full := func(n int) string { return strings.Repeat(strings.Repeat("x", nameMax-1)+"\x00", n/nameMax) }
	largest := (&rec{
		cgroup: full(cgroupMax), exe: full(exeMax), cwd: full(cwdMax),
		file: strings.Repeat("f", fileMax-1) + "\x00", args: strings.Repeat("a", argsMax),
	}).with(newRec(whatExec, flagCgroupTop|flagFile|flagArgs|(pathTop|pathUnhash)<<exeShift|(pathTop|pathUnhash)<<cwdShift)).bytes()
	if len(largest) != MaxRecord {
		t.Fatalf("the largest record has %d bytes, MaxRecord is %d", len(largest), MaxRecord)
	}
	recs := records(t)
	recs["largest"] = largest
	// One byte per name is the other extreme.
	recs["smallest names"] = (&rec{cgroup: strings.Repeat("\x00", cgroupMax), exe: strings.Repeat("\x00", exeMax), cwd: strings.Repeat("\x00", cwdMax)}).
		with(newRec(whatExec, flagCgroupTop|(pathTop|pathUnhash)<<exeShift|(pathTop|pathUnhash)<<cwdShift)).bytes()
	d := NewDecoder()
	for name, b := range recs {
		var out event.Record
		if n := testing.AllocsPerRun(100, func() {
			if err := d.Decode(b, &out); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: Decode allocates %v times", name, n)
		}
	}
}

// Whatever the bytes are, Decode does not panic, does not hand out bytes that
// are not the record's, and gives an empty record with its error.
func FuzzDecode(f *testing.F) {
	for _, b := range records(f) {
		f.Add(b)
		f.Add(b[:len(b)-1])
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, b := range records(f) {
		for range 8 {
			c := bytes.Clone(b)
			c[rnd.IntN(len(c))] ^= 1 << rnd.IntN(8)
			f.Add(c)
		}
	}
	f.Add((&rec{cgroup: "c\x00b\x00a\x00", exe: "/\x00"}).with(newRec(whatExec, flagCgroupCut|pathPseudo<<exeShift)).bytes())
	d := NewDecoder()
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		var out event.Record
		if err := d.Decode(b, &out); err != nil {
			var de *DecodeError
			if !errors.As(err, &de) || de.Off < 0 || de.Off > len(b) && de.Off > headSize {
				t.Fatalf("error %v", err)
			}
			if diff := cmp.Diff(event.Record{}, out); diff != "" {
				t.Fatalf("%v, but the record is not empty:\n%s", err, diff)
			}
			return
		}
		if len(b) > MaxRecord {
			t.Fatalf("a record of %d bytes decodes", len(b))
		}
		for name, text := range map[string][]byte{"comm": out.Comm, "file": out.File, "argv": out.Cmdline} {
			if !inside(text, b) {
				t.Fatalf("%s is not in the record", name)
			}
		}
		for name, text := range map[string][]byte{"exe": out.Exe, "cwd": out.Cwd, "cgroup": out.Cgroup} {
			if !inside(text, d.text) {
				t.Fatalf("%s is not in the decoder", name)
			}
			// Each character is the record's, but the slashes and the suffix.
			for _, part := range strings.Split(strings.TrimSuffix(string(text), deleted), "/") {
				if !bytes.Contains(b, []byte(part)) {
					t.Fatalf("%s has %q, which is not in the record", name, part)
				}
			}
			if len(text) > 0 && text[0] != '/' {
				t.Fatalf("%s %q is not absolute", name, text)
			}
		}
		if int(out.CmdlineLen) < len(out.Cmdline) {
			t.Fatalf("argv of %d bytes has %d", out.CmdlineLen, len(out.Cmdline))
		}
		if out.Have != 0 && out.From != event.SourceRecord {
			t.Fatalf("facts from %v", out.From)
		}
		if out.TGID <= 0 || out.Kind != event.KindUnknown && out.Kind != event.Fork && out.Kind != event.PtraceDetach && out.Kind != event.PtraceAttach && out.TGID != i32(b, dataTGID) {
			t.Fatalf("the record is about %d, the message about %d", out.TGID, i32(b, dataTGID))
		}
		first := describe(&out)
		if err := d.Decode(b, &out); err != nil || describe(&out) != first {
			t.Fatalf("a second time: %v\n%s\n%s", err, first, describe(&out))
		}
	})
}

// inside says whether s lies in b, and cannot grow into what follows.
func inside(s, b []byte) bool {
	if len(s) == 0 {
		return true
	}
	from, end := uintptr(unsafe.Pointer(unsafe.SliceData(s))), uintptr(unsafe.Pointer(unsafe.SliceData(b)))+uintptr(len(b))
	return from >= uintptr(unsafe.Pointer(unsafe.SliceData(b))) && from+uintptr(cap(s)) <= end
}

func BenchmarkDecode(b *testing.B) {
	for name, raw := range records(b) {
		b.Run(name, func(b *testing.B) {
			d := NewDecoder()
			var out event.Record
			b.ReportAllocs()
			b.SetBytes(int64(len(raw)))
			for b.Loop() {
				if err := d.Decode(raw, &out); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

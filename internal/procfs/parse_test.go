package procfs

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// statLine is a stat with the fields that matter, the rest as zeros.
func statLine(pid int32, comm, state string, ppid, session int64, tty uint32, flags uint64, threads, start, stack, arg0, arg1 uint64) string {
	return fmt.Sprintf("%d (%s) %s %d 0 %d %d -1 %d 0 0 0 0 0 0 0 0 20 0 %d 0 %d 0 0 0 0 0 %d"+strings.Repeat(" 0", 19)+" %d %d 0 0 0\n",
		pid, comm, state, ppid, session, tty, flags, threads, start, stack, arg0, arg1)
}

func TestParseStat(t *testing.T) {
	for _, c := range []struct {
		name, in, err string
		want          Stat
	}{
		{"nothing", "", "no name", Stat{}},
		{"no parenthesis", "1 sh S 1", "no name", Stat{}},
		{"parentheses the wrong way", "1 )sh( S 1", "no name", Stat{}},
		{"no pid", "(sh) S 1", "no name", Stat{}},
		{"pid is text", "x (sh) S 1", "no pid", Stat{}},
		{"pid too large", "2147483648 (sh) S 1", "no pid", Stat{}},
		{"nothing after the name", "1 (sh)", "fields", Stat{}},
		{"cut before the start time", "1 (sh) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0", "fields", Stat{}},
		{"parent is text", "1 (sh) S x" + strings.Repeat(" 0", 30), "field 4", Stat{}},
		{"negative parent", "1 (sh) S -5" + strings.Repeat(" 0", 30), "field 4", Stat{}},
		{"start time beyond all time", statLine(1, "sh", "S", 0, 0, 0, 0, 1, 1<<63, 0, 0, 0), "field 22", Stat{}},
		{
			"plain", statLine(7, "sh", "S", 1, 7, 0, 0x400000, 1, 250, 1000, 500, 520), "",
			Stat{PID: 7, State: 'S', PPID: 1, Session: 7, Flags: 0x400000, Threads: 1, StartTicks: 250, StartStack: 1000, ArgsLen: 20},
		},
		{
			"being reaped", statLine(7, "sh", "X", 0, -1, 0, 4, 0, 250, 0, 0, 0), "",
			Stat{PID: 7, State: 'X', Flags: 4, StartTicks: 250},
		},
		{
			"arguments end before they start", statLine(7, "sh", "S", 1, 7, 0, 0, 1, 250, 1000, 520, 500), "",
			Stat{PID: 7, State: 'S', PPID: 1, Session: 7, Threads: 1, StartTicks: 250, StartStack: 1000},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got Stat
			err := ParseStat([]byte(c.in), &got)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("ParseStat(%q): %v, want an error with %q", c.in, err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatalf("ParseStat(%q): %v", c.in, err)
			}
			if string(got.Comm()) != "sh" {
				t.Errorf("comm: got %q", got.Comm())
			}
			got.comm, got.commLen = c.want.comm, c.want.commLen
			if d := cmp.Diff(c.want, got, cmp.AllowUnexported(Stat{})); d != "" {
				t.Errorf("ParseStat(%q): %s", c.in, d)
			}
		})
	}
}

func TestTTYIndex(t *testing.T) {
	dev := func(major, minor uint32) uint32 { return minor&0xff | major<<8 | minor&^0xff<<12 }
	for _, c := range []struct {
		name string
		dev  uint32
		want int32
	}{
		{"none", 0, 0},
		{"pts/0", dev(136, 0), 1},
		{"pts/3", dev(136, 3), 4},
		{"pts/1000", dev(136, 1000), 1001},
		{"tty1", dev(4, 1), 1},
		{"ttyS0", dev(4, 64), 1},
		{"console", dev(5, 1), 2},
	} {
		if got := ttyIndex(c.dev); got != c.want {
			t.Errorf("%s (%#x): got %d, want %d", c.name, c.dev, got, c.want)
		}
	}
}

func TestParseStatus(t *testing.T) {
	for _, c := range []struct {
		name, in, err string
		want          Status
	}{
		{"nothing", "", "no Tgid", Status{}},
		{"no thread group", "Name:\tsh\nUid:\t1\t2\t3\t4\n", "no Tgid", Status{}},
		{"three uids", "Tgid:\t5\nUid:\t1\t2\t3\n", "Uid", Status{}},
		{"five gids", "Tgid:\t5\nGid:\t1\t2\t3\t4\t5\n", "Gid", Status{}},
		{"uid too large", "Tgid:\t5\nUid:\t1\t2\t3\t4294967296\n", "Uid", Status{}},
		{"capabilities too long", "Tgid:\t5\nCapPrm:\t00000000000000000\n", "CapPrm", Status{}},
		{"capabilities not in hex", "Tgid:\t5\nCapEff:\t000000000000000G\n", "CapEff", Status{}},
		{"cut within a line", "Tgid:\t5\nUid:\t1\t2\t3\t4", "", Status{TGID: 5, have: haveTGID}},
		{
			"second line of a kind", "Tgid:\t5\nUid:\t1\t2\t3\t4\nUid:\t0\t0\t0\t0\n", "",
			Status{TGID: 5, UIDs: [4]uint32{1, 2, 3, 4}, have: haveTGID | haveUIDs},
		},
		{
			"nested pid namespaces", "Tgid:\t5\nNSpid:\t5\t3\t1\n", "",
			Status{TGID: 5, InnerPID: 1, have: haveTGID},
		},
		{
			"overflow ids", "Tgid:\t5\nUid:\t4294967295\t65534\t0\t0\nCapPrm:\tffffffffffffffff\nNoNewPrivs:\t1\n", "",
			Status{
				TGID: 5, UIDs: [4]uint32{4294967295, 65534, 0, 0}, CapPrm: ^uint64(0), NoNewPrivs: true,
				have: haveTGID | haveUIDs | haveCapPrm | haveNNP,
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got Status
			err := ParseStatus([]byte(c.in), &got)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("ParseStatus(%q): %v, want an error with %q", c.in, err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatalf("ParseStatus(%q): %v", c.in, err)
			}
			if d := cmp.Diff(c.want, got, cmp.AllowUnexported(Status{})); d != "" {
				t.Errorf("ParseStatus(%q): %s", c.in, d)
			}
		})
	}
}

func TestParseCgroup(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"no colons", "nonsense\n", ""},
		{"one colon", "0:/x\n", ""},
		{"cut within the line", "0::/x", ""},
		{"relative path", "0::x\n", ""},
		{"removed with its hierarchy", "4:memory: (deleted)\n", ""},
		{"a controller we do not use", "3:cpuset:/x\n", ""},
		{"v2", "0::/kubepods.slice/a\n", "/kubepods.slice/a"},
		{"v2 removed", "0::/kubepods.slice/a (deleted)\n", "/kubepods.slice/a"},
		{"v1", "9:name=systemd:/s\n4:memory:/m\n", "/m"},
		{"v1 without memory", "9:name=systemd:/s\n3:cpu:/c\n", "/s"},
		{"memory among others", "4:hugetlb,memory,rdma:/m\n", "/m"},
		{"hybrid", "4:memory:/m\n0::/\n", "/m"},
		{"hybrid, v2 first", "0::/\n4:memory:/m\n", "/m"},
		{"hybrid, memory in v2", "9:name=systemd:/s\n0::/u\n", "/u"},
		{"controller's name within another", "4:memoryx:/wrong\n3:xmemory:/wrong\n0::/right\n", "/right"},
		{"path holds colons", "0::/a:memory:/b\n", "/a:memory:/b"},
		{"own cgroup namespace", "0::/../../x\n", "/../../x"},
		{"two v2 lines", "0::/first\n0::/second\n", "/first"},
	} {
		got, ok := ParseCgroup([]byte(c.in))
		if string(got) != c.want || ok != (c.want != "") {
			t.Errorf("%s: ParseCgroup(%q) = %q, %v, want %q", c.name, c.in, got, ok, c.want)
		}
	}
}

func FuzzStat(f *testing.F) {
	f.Add(int32(1), "sh", int32(0), int32(1), uint32(0), uint64(5), uint64(77), []byte(""))
	f.Add(int32(300), ") R 1 (", int32(9), int32(300), uint32(34817), uint64(1), uint64(1<<40), []byte("1 (a) S"))
	f.Add(int32(300), "x\ny", int32(9), int32(300), uint32(34817), uint64(1), uint64(1<<40), []byte("1 (a)) S 1 1 1 1 1 1 1"))
	f.Fuzz(func(t *testing.T, pid int32, comm string, ppid, session int32, flags uint32, start, stack uint64, raw []byte) {
		var st Stat
		if err := ParseStat(raw, &st); err == nil && (st.PID < 0 || st.PPID < 0 || st.Session < 0 || st.Threads < 0 || st.commLen > 64) {
			t.Fatalf("ParseStat(%q) = %+v", raw, st)
		}
		// Whatever the name, the numbers after it are read as written.
		if pid < 0 || ppid < 0 || session < 0 || len(comm) > 64 || start > 1<<60 {
			return
		}
		line := statLine(pid, comm, "S", int64(ppid), int64(session), 0, uint64(flags), 3, start, stack, 10, 30)
		if err := ParseStat([]byte(line), &st); err != nil {
			t.Fatalf("ParseStat(%q): %v", line, err)
		}
		if st.PID != pid || string(st.Comm()) != comm || st.PPID != ppid || st.Session != session || st.Flags != flags ||
			st.StartTicks != start || st.StartStack != stack || st.Threads != 3 || st.ArgsLen != 20 {
			t.Fatalf("ParseStat(%q) = %+v", line, st)
		}
	})
}

func FuzzStatus(f *testing.F) {
	f.Add(uint32(0), uint32(1), uint32(2), uint32(3), uint64(1), int32(5), int32(1), []byte("Tgid:\t5\nUid:\t1\t2\t3\t4\n"))
	f.Add(uint32(4294967295), uint32(0), uint32(0), uint32(0), ^uint64(0), int32(5), int32(9), []byte("x\\nUid:\t0"))
	f.Fuzz(func(t *testing.T, u1, u2, u3, u4 uint32, caps uint64, tgid, inner int32, raw []byte) {
		var s Status
		if err := ParseStatus(raw, &s); err == nil && (s.TGID < 0 || s.InnerPID < 0) {
			t.Fatalf("ParseStatus(%q) = %+v", raw, s)
		}
		if tgid < 0 || inner <= 0 {
			return
		}
		// The kernel escapes newlines in the name; then no name can make a line.
		name := bytes.ReplaceAll(raw, []byte("\n"), []byte(`\n`))
		text := fmt.Sprintf("Name:\t%s\nTgid:\t%d\nUid:\t%d\t%d\t%d\t%d\nGid:\t%d\t%d\t%d\t%d\nNSpid:\t%d\t%d\nCapPrm:\t%016x\nCapEff:\t%016x\nNoNewPrivs:\t1\n",
			name, tgid, u1, u2, u3, u4, u4, u3, u2, u1, tgid, inner, caps, ^caps)
		if err := ParseStatus([]byte(text), &s); err != nil {
			t.Fatalf("ParseStatus(%q): %v", text, err)
		}
		want := Status{
			TGID: tgid, UIDs: [4]uint32{u1, u2, u3, u4}, GIDs: [4]uint32{u4, u3, u2, u1}, InnerPID: inner,
			CapPrm: caps, CapEff: ^caps, NoNewPrivs: true,
			have: haveTGID | haveUIDs | haveGIDs | haveCapPrm | haveCapEff | haveNNP,
		}
		if s != want {
			t.Fatalf("ParseStatus(%q) = %+v, want %+v", text, s, want)
		}
	})
}

func FuzzCgroup(f *testing.F) {
	f.Add("/kubepods/x", "/y", []byte("4:memory:/a\n0::/\n"))
	f.Add("/a:b", "/", []byte("0::/x (deleted)\n"))
	f.Fuzz(func(t *testing.T, v2, memory string, raw []byte) {
		path, ok := ParseCgroup(raw)
		if ok && (len(path) == 0 || path[0] != '/' || bytes.IndexByte(path, '\n') >= 0 || !bytes.Contains(raw, path)) {
			t.Fatalf("ParseCgroup(%q) = %q", raw, path)
		}
		if !ok && path != nil {
			t.Fatalf("ParseCgroup(%q) = %q without ok", raw, path)
		}
		// A name in one line never changes which line is taken.
		if strings.Contains(v2+memory, "\n") {
			return
		}
		const mark = " (deleted)"
		v2, memory = "/"+strings.TrimSuffix(v2, mark), "/"+strings.TrimSuffix(memory, mark)
		v2, memory = strings.TrimSuffix(v2, mark), strings.TrimSuffix(memory, mark)
		for _, in := range []string{
			"0::" + v2 + "\n5:cpu,memory:" + memory + "\n3:cpuset:" + v2 + "\n",
			"5:memory:" + memory + mark + "\n0::" + v2 + "\n",
		} {
			if path, ok := ParseCgroup([]byte(in)); !ok || string(path) != memory {
				t.Fatalf("ParseCgroup(%q) = %q, %v, want %q", in, path, ok, memory)
			}
		}
	})
}

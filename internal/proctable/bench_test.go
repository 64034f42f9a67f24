package proctable

import (
	"fmt"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/procession-dev/procession/internal/event"
)

// BenchmarkEvent is what one event costs in a table of 1,000 processes.
func BenchmarkEvent(b *testing.B) {
	setup := func(b *testing.B) *world {
		w := newWorld(b, Config{ExitGrace: 100 * time.Millisecond})
		w.exec(1, 0, "/sbin/init", "init")
		for pid := int32(10); pid < 1010; pid++ {
			w.fork(1, pid)
			w.exec(pid, 1, "/usr/bin/service", "service", "--config", fmt.Sprint("/etc/service/", pid))
		}
		return w
	}
	// Each life has a pid of its own; their records are made once.
	const lives = 512
	type life struct{ fork, exec, exit *event.Record }
	births := func(w *world) []life {
		ls := make([]life, lives)
		for i := range ls {
			pid := int32(5000 + i)
			ls[i] = life{w.forkRec(10, pid), w.execRec(pid, 10, "/bin/tiny", "tiny", "tag-1234;", "--flag"), w.exitRec(pid, 0)}
			ls[i].exec.Have &^= event.FieldSet(event.FieldStart)
			ls[i].exit.Have &^= event.FieldSet(event.FieldStart)
		}
		return ls
	}
	step := func(w *world, r *event.Record) {
		w.stamp += 100_000
		r.Stamp = w.stamp
		w.tab.Apply(r, &w.ev)
	}
	b.Run("fork+exit", func(b *testing.B) {
		w := setup(b)
		ls := births(w)
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			l := &ls[i%lives]
			step(w, l.fork)
			step(w, l.exit)
			if i++; i%100 == 0 {
				w.tab.Tick(w.stamp)
			}
		}
	})
	b.Run("fork+exec+exit", func(b *testing.B) {
		w := setup(b)
		ls := births(w)
		w.exec(11, 1, "/bin/tiny", "tiny") // its cgroup is known
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			l := &ls[i%lives]
			step(w, l.fork)
			step(w, l.exec)
			step(w, l.exit)
			if i++; i%100 == 0 {
				w.tab.Tick(w.stamp)
			}
		}
	})
	b.Run("uid", func(b *testing.B) {
		w := setup(b)
		r := withIDs(w.rec(event.UIDChange, 10), 0, 0)
		b.ReportAllocs()
		for b.Loop() {
			r.UID ^= 1000
			step(w, r)
		}
	})
}

// fill puts n live processes into the table, as on a node with 110 pods: each
// of 20 programs with 60 bytes of arguments, half of the processes with a
// program of their own.
func fill(w *world, n int) {
	w.exec(1, 0, "/sbin/init", "init")
	for i := range n {
		pid := int32(10 + i)
		w.fork(1, pid)
		if i%2 == 0 {
			r := w.execRec(pid, 1, fmt.Sprintf("/usr/local/bin/program-%d", i%20), "program", "--listen=0.0.0.0:8080", fmt.Sprintf("--worker-id=worker-%07d", i))
			r.Cgroup = fmt.Appendf(nil, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod%032d.slice/cri-containerd-%064d.scope", i%110, i%110)
			r.Cwd, r.Have = []byte("/var/lib/program"), r.Have|event.FieldSet(event.FieldCwd)
			w.must(r)
		}
	}
}

// heap is the memory in use.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// perProcess is the published bound of what a process costs, in bytes, with
// the usual text.
const perProcess = 700

func TestMemoryPerProcess(t *testing.T) {
	const n = 20_000
	w := newWorld(t, Config{})
	before := heap()
	fill(w, n)
	w.start = nil
	got := (heap() - before) / n
	t.Logf("%d B/process, of these %d for the entry", got, unsafe.Sizeof(entry{}))
	if got > perProcess {
		t.Errorf("%d B/process, want at most %d", got, perProcess)
	}
	if st := w.tab.Stats(); st.Live != n+1 {
		t.Errorf("stats: %+v", st)
	}
}

// BenchmarkMemory is the memory of 100,000 live processes.
func BenchmarkMemory(b *testing.B) {
	const n = 100_000
	for b.Loop() {
		w := newWorld(b, Config{})
		before := heap()
		fill(w, n)
		w.start = nil
		used := heap() - before
		b.ReportMetric(float64(used)/n, "B/process")
		b.ReportMetric(float64(used)/(1<<20), "MiB")
		runtime.KeepAlive(w)
	}
}

func BenchmarkScan(b *testing.B) {
	needProc(b)
	tr := newTree(b)
	const n = 200
	for pid := int32(1); pid <= n; pid++ {
		tr.put(treeProc{pid: pid, ppid: pid / 2, start: uint64(pid) * s, exe: "/bin/x", args: []string{"x"}})
	}
	w := newWorld(b, Config{FS: tr.fs()})
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			if _, err := w.tab.Scan(); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/process")
	})
	b.Run("again", func(b *testing.B) {
		for b.Loop() {
			if err := w.tab.Rescan(func(*event.Event) {}); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/process")
	})
}

//go:build linux

package recorder

import (
	"os/exec"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/procession-dev/procession/internal/event"
)

// What the program costs the task that it runs in, by the kernel's own
// statistics (which add some 30 ns to each run). ns/exec is one exec, without
// the process's fork and exit; those are events that the program rejects here
// and are measured first.
func BenchmarkKernel(b *testing.B) {
	prog := buildProg(b)
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()

	run := func(b *testing.B, cfg Config) (runs, ns float64) {
		cfg.RingBytes = 64 << 20 // nobody reads
		r := load(b, cfg)
		_, hangUp := openConn(b, r)
		before, err := r.prog.Stats()
		if err != nil {
			b.Fatal(err)
		}
		if out, err := exec.Command(prog, "n", strconv.Itoa(b.N), prog).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		hangUp()
		after, err := r.prog.Stats()
		if err != nil {
			b.Fatal(err)
		}
		if c := total(r); c.Lost != 0 {
			b.Skipf("the ring is too small for %d processes", b.N)
		}
		return float64(after.RunCount - before.RunCount), float64(after.Runtime - before.Runtime)
	}
	var rejected float64
	b.Run("rejected", func(b *testing.B) {
		runs, ns := run(b, Config{Kinds: event.KindSet(event.CoreDump)})
		rejected = ns / runs
		b.ReportMetric(rejected, "ns/event")
	})
	for _, c := range []struct {
		name string
		cfg  Config
	}{
		{"exec", Config{Kinds: event.KindSet(event.Exec)}},
		{"exec with cwd", Config{Kinds: event.KindSet(event.Exec), Cwd: true}},
		{"exec with cwd by probe_read", Config{Kinds: event.KindSet(event.Exec), Cwd: true, ForceProbe: true}},
	} {
		b.Run(c.name, func(b *testing.B) {
			runs, ns := run(b, c.cfg)
			b.ReportMetric((ns-(runs-float64(b.N))*rejected)/float64(b.N), "ns/exec")
		})
	}
	b.Run("process", func(b *testing.B) { // fork, exec and exit
		_, ns := run(b, Config{Cwd: true})
		b.ReportMetric(ns/float64(b.N), "ns/process")
	})
}

// BenchmarkDrain is what a record costs the reader, decoding and all.
func BenchmarkDrain(b *testing.B) {
	r := load(b, Config{Cwd: true, Kinds: event.KindSet(event.Exec)})
	prog := buildProg(b)
	_, hangUp := openConn(b, r)
	if out, err := exec.Command(prog, "n", "1000", prog).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	hangUp()
	b.ReportAllocs()
	records := 0
	for b.Loop() {
		r.ring.pos = 0 // nobody writes any more: read the same again
		n, err := r.Drain(func(*event.Record) {})
		if err != nil {
			b.Fatal(err)
		}
		records += n
	}
	b.ReportMetric(float64(b.Elapsed())/float64(records), "ns/record")
}

package spool

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// Appending as fast as the disk takes it: group commit.
func BenchmarkAppendCommit(b *testing.B) {
	for _, size := range []int{100, 600, 4096} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			s := start(b, Config{Dir: b.TempDir()})
			p := payload(1, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Append(p); err != nil {
					s.sync() // the queue is full: wait for the disk
				}
			}
			s.sync()
			st := s.Stats()
			b.ReportMetric(float64(st.Durable)/b.Elapsed().Seconds(), "durable/s")
			b.ReportMetric(float64(st.Durable)/float64(st.Syncs), "records/sync")
		})
	}
}

// What Append costs its caller, who is on the event path, while the committer
// keeps up.
func BenchmarkAppend(b *testing.B) {
	s := start(b, Config{Dir: b.TempDir()})
	p := payload(1, 600)
	b.ReportAllocs()
	var lat []time.Duration
	for i := 0; b.Loop(); i++ {
		if i%1000 == 999 {
			b.StopTimer()
			s.sync()
			b.StartTimer()
		}
		t := time.Now()
		s.Append(p)
		lat = append(lat, time.Since(t))
	}
	slices.Sort(lat)
	b.ReportMetric(float64(lat[len(lat)/2].Nanoseconds()), "p50-ns")
	b.ReportMetric(float64(lat[len(lat)*99/100].Nanoseconds()), "p99-ns")
}

// One record at a time, until it may be sent.
func BenchmarkAppendToReadable(b *testing.B) {
	s := start(b, Config{Dir: b.TempDir()})
	p := payload(1, 600)
	var lat []time.Duration
	for b.Loop() {
		t := time.Now()
		s.Append(p)
		s.sync()
		lat = append(lat, time.Since(t))
	}
	slices.Sort(lat)
	b.ReportMetric(float64(lat[len(lat)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(lat[len(lat)*99/100].Microseconds()), "p99-us")
}

// fill makes a spool of about n bytes.
func fill(b *testing.B, dir string, n int) (Epoch, uint64) {
	s := start(b, Config{Dir: dir, MaxBytes: 2 * int64(n), KeepAcked: 1, SegmentBytes: 4 << 20})
	for i := range n / (600 + frameHeader) {
		if i%2000 == 0 {
			s.sync()
		}
		s.append(payload(i, 600))
	}
	s.sync()
	l := own(s.Spool)
	if err := s.end(); err != nil {
		b.Fatal(err)
	}
	return l.Epoch, l.Made
}

// Opening a full spool.
func BenchmarkReopen64MiB(b *testing.B) {
	dir := b.TempDir()
	fill(b, dir, 62<<20)
	for b.Loop() {
		s, err := Open(Config{Dir: dir, MaxBytes: 128 << 20, SegmentBytes: 4 << 20})
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}

func BenchmarkRead(b *testing.B) {
	dir := b.TempDir()
	e, n := fill(b, dir, 16<<20)
	s, err := Open(Config{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	var c Chunk
	after := uint64(0)
	records := 0
	b.SetBytes(600)
	for b.Loop() {
		if records == len(c.Records) {
			if after >= n {
				after = 0
			}
			if err := s.Read(e, after, 256, 256<<10, &c); err != nil {
				b.Fatal(err)
			}
			after, records = c.Last, 0
		}
		records++
	}
}

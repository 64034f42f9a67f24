package recording

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

// fill sets every field reachable from v to something random, so that a
// field the codec forgets is noticed.
func fill(rnd *rand.Rand, v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(rnd, v.Field(i))
		}
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int32:
		v.SetInt(int64(rnd.Int32()) * (1 - 2*int64(rnd.IntN(2))))
	case reflect.Int64:
		v.SetInt(rnd.Int64())
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(1 + rnd.Uint64()>>(65-v.Type().Bits()))
	case reflect.String:
		v.SetString("6.1.0-test")
	case reflect.Slice:
		b := make([]byte, 1+rnd.IntN(30))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		v.SetBytes(b)
	default:
		panic("the codec has no field of kind " + v.Kind().String())
	}
}

func random[T any](rnd *rand.Rand) *T {
	v := new(T)
	fill(rnd, reflect.ValueOf(v).Elem())
	return v
}

func TestEveryFieldSurvives(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var file bytes.Buffer
	head := *random[Header](rnd)
	w, err := NewWriter(&file, head)
	if err != nil {
		t.Fatal(err)
	}
	var want []Entry
	for i := range 5000 {
		var e Entry
		switch i % 10 {
		case 0:
			e.Process = random[Baseline](rnd)
			err = w.Process(e.Process)
		case 1:
			e.Loss = random[Loss](rnd)
			err = w.Loss(*e.Loss)
		default:
			e.Record = random[event.Record](rnd)
			err = w.Record(e.Record)
		}
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, e)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if w.Entries != 5000 || w.Bytes != uint64(file.Len()) {
		t.Errorf("writer counts %d entries, %d bytes; the file has %d bytes", w.Entries, w.Bytes, file.Len())
	}
	r, err := NewReader(&file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(head, r.Header); diff != "" {
		t.Errorf("header (-written +read):\n%s", diff)
	}
	for i := range want {
		got, err := r.Next()
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		if diff := cmp.Diff(want[i], got); diff != "" {
			t.Fatalf("entry %d (-written +read):\n%s", i, diff)
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after the last entry: %v, want io.EOF", err)
	}
}

func sample(t testing.TB) []byte {
	rnd := rand.New(rand.NewPCG(3, 4))
	var file bytes.Buffer
	w, err := NewWriter(&file, Header{Kernel: "k", Mode: "recorder"})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for range 2 {
			if err := w.Record(random[event.Record](rnd)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return file.Bytes()
}

// readAll returns the records before the error, and the error.
func readAll(b []byte) (n int, err error) {
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return 0, err
	}
	for {
		if _, err := r.Next(); err != nil {
			return n, err
		}
		n++
	}
}

func TestEveryCutIsNoticed(t *testing.T) {
	b := sample(t)
	last := 0
	for i := range b {
		n, err := readAll(b[:i])
		if err == nil || err == io.EOF {
			t.Fatalf("cut after %d of %d bytes: read as a whole recording", i, len(b))
		}
		if n < last {
			t.Fatalf("cut after %d bytes: %d records, but a shorter piece had %d", i, n, last)
		}
		last = n
	}
	if n, err := readAll(b); n != 6 || err != io.EOF {
		t.Errorf("whole: %d records, %v", n, err)
	}
	if _, err := readAll(b[:len(b)-1]); !errors.Is(err, ErrCut) {
		t.Errorf("cut in the last block: %v, want ErrCut", err)
	}
}

func TestEveryFlippedBitIsNoticed(t *testing.T) {
	b := sample(t)
	for i := range b {
		for bit := range 8 {
			bad := bytes.Clone(b)
			bad[i] ^= 1 << bit
			if _, err := readAll(bad); err == io.EOF && !sameRecords(b, bad) {
				t.Fatalf("byte %d bit %d: damage was read as a whole recording", i, bit)
			}
		}
	}
}

// sameRecords says whether both files hold the same records: a flip in the
// raw length of a block's head may be harmless.
func sameRecords(a, b []byte) bool {
	ra, errA := NewReader(bytes.NewReader(a))
	rb, errB := NewReader(bytes.NewReader(b))
	if errA != nil || errB != nil {
		return false
	}
	for {
		ea, errA := ra.Next()
		eb, errB := rb.Next()
		if errA != nil || errB != nil {
			return errA == errB
		}
		if !cmp.Equal(ea, eb) {
			return false
		}
	}
}

func TestOtherFilesAreRefused(t *testing.T) {
	for name, b := range map[string][]byte{
		"empty":         {},
		"text":          []byte("#!/bin/sh\necho this is a script\n"),
		"newer version": append([]byte(magic), Version+1),
		"only a magic":  []byte(magic),
	} {
		if _, err := NewReader(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: read without an error", name)
		}
	}
}

func FuzzReader(f *testing.F) {
	b := sample(f)
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Add([]byte(magic + "\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := readAll(b)
		if err == nil {
			t.Fatal("neither an end nor an error")
		}
		if n > 8*maxBlock {
			t.Fatalf("%d records from %d bytes", n, len(b))
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	rnd := rand.New(rand.NewPCG(5, 6))
	r := random[event.Record](rnd)
	w, err := NewWriter(io.Discard, Header{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := w.Record(r); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(w.Bytes)/float64(w.Entries), "B/record")
}

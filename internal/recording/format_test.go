package recording

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/testenv"
)

var update = flag.Bool("update", false, "write docs/recording-format.md, and the kept recording of a new version")

// sayAll says everything in a recording, an entry a line.
func sayAll(t *testing.T, data []byte) string {
	t.Helper()
	r, err := NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	for v := any(r.Header); ; {
		if err := enc.Encode(v); err != nil {
			t.Fatal(err)
		}
		e, err := r.Next()
		if err == io.EOF {
			return out.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		v = e
	}
}

// A recording of this version that was made once and kept is read as it was
// meant then. Whoever changes what is written makes a new Version, and this
// test then keeps one of it (go test -update).
func TestKeptRecording(t *testing.T) {
	name := fmt.Sprintf("testdata/version-%d", Version)
	data, err := os.ReadFile(name + ".rec")
	if errors.Is(err, os.ErrNotExist) && *update {
		rnd := rand.New(rand.NewPCG(7, 8))
		var b bytes.Buffer
		w, err := NewWriter(&b, *random[Header](rnd))
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(err, w.Process(random[Baseline](rnd)), w.Loss(*random[Loss](rnd)))
		for range 3 {
			err = errors.Join(err, w.Record(random[event.Record](rnd)))
		}
		if err = errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		data = b.Bytes()
		if err := errors.Join(os.WriteFile(name+".rec", data, 0o644), os.WriteFile(name+".json", []byte(sayAll(t, data)), 0o644)); err != nil {
			t.Fatal(err)
		}
	} else if err != nil {
		t.Fatalf("%v: a new version needs a recording that is kept: go test -update", err)
	}
	want, err := os.ReadFile(name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), sayAll(t, data)); d != "" {
		t.Errorf("a recording of version %d is read as something else: what is written was changed, so Version must be (-was +is):\n%s", Version, d)
	}
}

// TestFormatPage: docs/recording-format.md has the numbers that stand for
// kinds, facts, sources and marks in a recording. A recording may outlive the
// program that made it: a number keeps its meaning, or Version changes.
func TestFormatPage(t *testing.T) {
	var b strings.Builder
	row := func(what string, names []string) { fmt.Fprintf(&b, "| %s | %s |\n", what, strings.Join(names, ", ")) }
	b.WriteString("| number | meaning |\n|---|---|\n")
	var kinds, fields, sources, marks []string
	for _, k := range event.AllKinds() {
		kinds = append(kinds, fmt.Sprintf("%d %s", k, k))
	}
	for f := range event.NumFields {
		fields = append(fields, fmt.Sprintf("%d `%s`", f, f))
	}
	for s := event.SourceRecord; s <= event.SourceLineage; s++ {
		sources = append(sources, fmt.Sprintf("%d `%s`", s, s))
	}
	for i, name := range []string{"upper layer", "upper layer known", "memfd", "deleted", "detached", "outside the root", "foreign",
		"exe cut", "cgroup cut", "cwd cut"} {
		marks = append(marks, fmt.Sprintf("%d %s", i, name))
	}
	row("kind of a record", kinds)
	row("bit of the facts that are there", fields)
	row("source of the facts", sources)
	row("bit of the marks", marks)
	testenv.DocSection(t, "../../docs/recording-format.md", "numbers", b.String(), *update)

	for i, m := range []event.Marks{event.MarkUpper, event.MarkUpperKnown, event.MarkMemfd, event.MarkDeleted, event.MarkDetached,
		event.MarkOutsideRoot, event.MarkForeign, event.MarkExeCut, event.MarkCgroupCut, event.MarkCwdCut} {
		if m != 1<<i {
			t.Errorf("mark %d is %#x", i, m)
		}
	}
	page, err := os.ReadFile("../../docs/recording-format.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("Format version %d.", Version), fmt.Sprintf("|PROCESSION-REC\\0|%d |", Version), fmt.Sprintf("%8d+size", blockHead),
		fmt.Sprintf("at most %.1f MiB", float64(maxBlock+maxBlock/8)/(1<<20)), fmt.Sprintf("at most %d MiB", maxBlock>>20),
		fmt.Sprintf("\n        %d header ", typeHeader), fmt.Sprintf("\n        %d process ", typeProcess), fmt.Sprintf("\n        %d record ", typeRecord),
		fmt.Sprintf("\n        %d loss ", typeLoss), fmt.Sprintf("\n        %d end ", typeEnd),
	} {
		if !strings.Contains(string(page), want) {
			t.Errorf("docs/recording-format.md does not say %q", want)
		}
	}
}

// A number that does not fit its field would be another one: a kind of 257 an
// exec.
func TestNumbersThatDoNotFit(t *testing.T) {
	for name, v := range map[string]func(codec){
		"kind":  func(c codec) { k := event.Kind(0); num(c, &k) },
		"pid":   func(c codec) { n := int32(0); num(c, &n) },
		"flag":  func(c codec) { f := false; yesNo(c, &f) },
		"uid":   func(c codec) { n := uint32(0); num(c, &n) },
		"marks": func(c codec) { m := event.Marks(0); num(c, &m) },
	} {
		for u, ok := range map[uint64]bool{1: true, 1 << 40: false} {
			var e encoder
			e.u64(&u)
			d := decoder{b: e.b}
			if v(&d); (d.err == nil) != ok {
				t.Errorf("%s %d: %v", name, u, d.err)
			}
		}
	}
	minus := int32(-1)
	var e encoder
	num(&e, &minus)
	d := decoder{b: e.b}
	got := int32(0)
	if num(&d, &got); got != -1 || d.err != nil {
		t.Errorf("-1 is read as %d, %v", got, d.err)
	}
}

package recorder

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The header has no holes and no overlaps, and numbers lie where a load of
// their size may be done on any machine.
func TestLayout(t *testing.T) {
	next, names := 0, map[string]bool{}
	for _, f := range fields {
		if f.off != next {
			t.Errorf("%s begins at %d, the field before ends at %d", f.name, f.off, next)
		}
		if align := min(f.size&-f.size, 8); f.off%align != 0 {
			t.Errorf("%s of %d bytes begins at %d", f.name, f.size, f.off)
		}
		if names[f.name] || f.meaning == "" {
			t.Errorf("%s: twice, or without a meaning", f.name)
		}
		names[f.name] = true
		next = f.off + f.size
	}
	if next != headSize || headSize%8 != 0 {
		t.Errorf("the header ends at %d of %d", next, headSize)
	}

	var all uint32
	for _, f := range flags {
		if all&f.bits != 0 || all > f.bits {
			t.Errorf("flag %s is out of order or used twice", f.name)
		}
		all |= f.bits
	}
	if all != flagsKnown {
		t.Errorf("flags are %#x, the decoder knows %#x", all, uint32(flagsKnown))
	}
	all = 0
	for _, f := range pathFlags {
		all |= f.bits
	}
	if all != pathBits {
		t.Errorf("path flags are %#x, the decoder knows %#x", all, pathBits)
	}
}

const formatDoc = "../../../docs/record-format.md"

// docs/record-format.md draws the layout as it is.
func TestFormatDoc(t *testing.T) {
	doc, err := os.ReadFile(formatDoc)
	if vm := os.Getenv("PROCESSION_TEST_VM"); vm != "" && errors.Is(err, fs.ErrNotExist) {
		t.Skip("the documentation is not in this virtual machine")
	}
	if err != nil {
		t.Fatal(err)
	}
	want := doc
	for name, text := range map[string]string{
		"ruler":      "```\n" + ruler() + "```\n",
		"fields":     fieldTable(),
		"flags":      flagTable(flags[:]),
		"path-flags": flagTable(pathFlags[:]),
		"limits": fmt.Sprintf("version %d; header %d bytes; cgroup names up to %d bytes and %d levels; each path up to %d bytes and %d names and mounts; "+
			"file name up to %d bytes; argv up to %d bytes; largest record %d bytes\n",
			Version, headSize, cgroupMax, cgroupDepth, exeMax, pathDepth, fileMax, argsMax, MaxRecord),
	} {
		begin, end := []byte("<!-- "+name+" -->\n"), []byte("<!-- end -->\n")
		before, rest, ok := bytes.Cut(want, begin)
		_, after, ok2 := bytes.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("%s: no block %s", formatDoc, name)
		}
		want = bytes.Join([][]byte{before, begin, []byte(text), end, after}, nil)
	}
	if *update {
		if err := os.WriteFile(formatDoc, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(string(want), string(doc)); diff != "" {
		t.Errorf("%s is not the layout (go test -update writes it): -want +got\n%s", formatDoc, diff)
	}
}

// ruler draws the header, eight bytes per line.
func ruler() string {
	const column = 8
	line := func(offs map[int]bool) string {
		b := []byte("      +" + strings.Repeat("-", 8*column-1) + "+\n")
		for off := range offs {
			b[6+off%8*column] = '+'
		}
		return string(b)
	}
	var out strings.Builder
	out.WriteString("      0       1       2       3       4       5       6       7\n")
	ends := map[int]bool{}
	for row := 0; row < headSize; row += 8 {
		starts, inside, text := map[int]bool{}, false, ""
		for _, f := range fields {
			from, to := max(f.off, row), min(f.off+f.size, row+8)
			if from >= to {
				continue
			}
			name := f.name
			if f.off < row {
				name, inside = "", true // goes on from the line before
			}
			starts[from] = true
			text += fmt.Sprintf("| %-*s", (to-from)*column-2, name)
		}
		if !inside {
			for off := range starts {
				ends[off] = true
			}
			out.WriteString(line(ends))
		}
		fmt.Fprintf(&out, "%5d %s|\n", row, text)
		ends = starts
	}
	out.WriteString(line(ends))
	return out.String()
}

func fieldTable() string {
	var b strings.Builder
	b.WriteString("| offset | bytes | field | meaning |\n|---:|---:|---|---|\n")
	for _, f := range fields {
		fmt.Fprintf(&b, "| %d | %d | `%s` | %s |\n", f.off, f.size, f.name, f.meaning)
	}
	return b.String()
}

func flagTable(flags []flagRow) string {
	var b strings.Builder
	b.WriteString("| bit | flag | meaning |\n|---:|---|---|\n")
	for _, f := range flags {
		bit, n := bits.TrailingZeros32(f.bits), bits.OnesCount32(f.bits)
		where := fmt.Sprint(bit)
		if n > 1 {
			where = fmt.Sprintf("%d-%d", bit, bit+n-1)
		}
		fmt.Fprintf(&b, "| %s | `%s` | %s |\n", where, f.name, f.meaning)
	}
	return b.String()
}

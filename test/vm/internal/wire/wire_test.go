package wire

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	whole := string(Frame{Seq: 7, Kind: KindLine, Text: "\x16--- PASS: TestX (0.00s)\r\n\xff"}.Append(nil))
	tests := []struct {
		name, line string
		ok, bad    bool
	}{
		{"kernel text only", "[    0.1] Linux version", false, false},
		{"cut", whole[:len(whole)-5], false, true},
		{"kernel text inside", whole[:20] + "[ 1.0] oops" + whole[20:], false, true},
		{"one bit", strings.Replace(whole, "PASS", "PASR", 1), false, true},
		{"no body", "@vm 00000000", false, true},
		{"bad checksum", "@vm zzzz 1 line \"\"", false, true},
		{"whole", whole, true, false},
		{"whole after kernel text", "[ 1.0] oops " + whole, true, false},
		{"whole with carriage return", strings.TrimSuffix(whole, "\n") + "\r\n", true, false},
	}
	for _, tt := range tests {
		f, ok, err := Parse(tt.line)
		if ok != tt.ok || (err != nil) != tt.bad {
			t.Errorf("%s: Parse(%q) = %+v, %v, %v; want ok %v, error %v", tt.name, tt.line, f, ok, err, tt.ok, tt.bad)
		}
		if ok && (f.Seq != 7 || f.Kind != KindLine || f.Text != "\x16--- PASS: TestX (0.00s)\r\n\xff") {
			t.Errorf("%s: Parse(%q) = %+v", tt.name, tt.line, f)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("@vm 00000000 1 line \"\"")
	f.Add(string(Frame{1, KindBye, ""}.Append(nil)))
	f.Add(string(Frame{4294967295, KindLine, "a\"\\\n\x00\xff"}.Append(nil)))
	f.Fuzz(func(t *testing.T, line string) {
		fr, ok, err := Parse(line)
		if ok && err != nil {
			t.Fatalf("Parse(%q): both a frame and %v", line, err)
		}
		if !ok {
			return
		}
		again, ok, err := Parse(string(fr.Append(nil)))
		if !ok || err != nil || again != fr {
			t.Fatalf("Parse(%q) = %+v; written again it reads %+v, %v, %v", line, fr, again, ok, err)
		}
	})
}

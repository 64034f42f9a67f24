package present

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"google.golang.org/protobuf/proto"
)

// checkHarmless knows the dangerous characters by their Unicode properties, on
// its own account, and fails if any of them is in the output.
func checkHarmless(t *testing.T, out []byte) {
	t.Helper()
	if !utf8.Valid(out) {
		t.Fatalf("output is not UTF-8: %.200q", out)
	}
	for i, r := range string(out) {
		if unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Zl, unicode.Zp, unicode.Bidi_Control,
			unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) || r != ' ' && unicode.Is(unicode.Zs, r) {
			t.Fatalf("output has %U at %d: %.200q", r, i, out)
		}
	}
}

// unsafe undoes AppendSafe for a line of words, by the rules in its comment.
func unsafe(t *testing.T, line string) [][]byte {
	t.Helper()
	var words [][]byte
	for len(line) > 0 {
		word := []byte{}
		quoted := line[0] == '\''
		if quoted {
			line = line[1:]
		}
		for {
			if quoted && line == "" {
				t.Fatal("quote without end")
			}
			if quoted && line[0] == '\'' {
				line = line[1:]
				break
			}
			if !quoted && (line == "" || line[0] == ' ') {
				break
			}
			if line[0] != '\\' {
				word = append(word, line[0])
				line = line[1:]
				continue
			}
			switch line[1] {
			case 'n', 't', 'r':
				word = append(word, map[byte]byte{'n': '\n', 't': '\t', 'r': '\r'}[line[1]])
				line = line[2:]
			case 'x':
				n, err := strconv.ParseUint(line[2:4], 16, 8)
				if err != nil {
					t.Fatal(err)
				}
				word = append(word, byte(n))
				line = line[4:]
			case 'u':
				end := strings.IndexByte(line, '}')
				n, err := strconv.ParseUint(line[3:end], 16, 32)
				if err != nil {
					t.Fatal(err)
				}
				word = utf8.AppendRune(word, rune(n))
				line = line[end+1:]
			default:
				word = append(word, line[1])
				line = line[2:]
			}
		}
		words = append(words, word)
		if line != "" {
			if line[0] != ' ' {
				t.Fatalf("no space after a word: %.100q", line)
			}
			line = line[1:]
		}
	}
	return words
}

func addSeeds(f *testing.F) {
	for _, s := range []string{
		"", "a", "a b", "'", "it's", `\`, `\x41`, `"`, "\x00\x01\x1b[0m\x7f", "\n\r\t", "\xff\xfe", "\xc2", "\xc2\x85",
		"\u0085\u009b", "\u202a\u202e\u2066\u2069\u200e\u061c", "\u200b\u200d\ufeff\u00ad", "\u2028\u2029", "\u00a0\u3000", "\u034f\u115f\u3164\uffa0\u2800",
		"e\u0301", "\u0301", " \u0301", "x\u0301\u0301\u0301\u0301\u0301\u0301", "\ufffd", "→…", "日本\U0001f600", "\U000e0001\U000e0041", "\U0010ffff", "\ue000", "\xed\xa0\x80", "\xf4\x90\x80\x80",
		"sh\x00-c\x00id", "\u2764\ufe0f", "\u0600", "\U000110bd", "\u05d0\u0627",
	} {
		f.Add([]byte(s), []byte("x"))
	}
}

func FuzzSafe(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		line := AppendSafe(nil, a)
		line = append(line, ' ')
		line = AppendSafe(line, b)
		checkHarmless(t, line)
		got := unsafe(t, string(line))
		if len(got) != 2 || !bytes.Equal(got[0], a) || !bytes.Equal(got[1], b) {
			t.Fatalf("%q %q became %q and reads back as %q", a, b, line, got)
		}
		// In a command line between double quotes no word can end it.
		cmd := string(appendWord(nil, a, true))
		if strings.Contains(strings.ReplaceAll(strings.ReplaceAll(cmd, `\\`, ""), `\"`, ""), `"`) {
			t.Fatalf("%q has a bare double quote in a command line: %s", a, cmd)
		}
	})
}

func FuzzJSON(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, cmd, name []byte) {
		s := strings.ToValidUTF8(string(name), "?")
		p := &pb.Process{
			Pid: -1, Cmdline: cmd, CmdlineLen: uint32(len(cmd)), Name: name, Exe: name, Cwd: name, File: name, Cgroup: name,
			CapEffective: proto.Uint64(uint64(len(cmd)) << 38), Marks: []string{s}, Sources: map[string]string{s: s},
		}
		p.Ancestors = []*pb.Process{{Name: name}}
		ev := &pb.Event{
			Kind: s, Process: p, Place: s, PlaceReason: s, Container: &pb.Container{Id: s}, Pod: &pb.Pod{Name: s, Labels: map[string]string{s: s}},
			Change: &pb.Change{FromName: name, ToName: cmd}, Exit: &pb.Exit{Signal: int32(len(name)), DurationNs: uint64(len(cmd))},
		}
		a := &pb.Alert{Event: ev, Rule: s, Message: s, Title: s, Tags: []string{s}, Evidence: []*pb.Evidence{{Field: s, Value: s}}, Mitre: []*pb.Mitre{{Technique: s}},
			Aggregated: &pb.Aggregated{Count: uint64(len(cmd)), FirstSeq: 7, Why: s, Samples: []*pb.Sample{{Exe: name, Cmdline: cmd}}}}
		js := AppendAlertJSON(nil, Identity{Cluster: string(name), Node: s}, a)
		checkHarmless(t, js)
		var got struct {
			Message string
			Process map[string]any
		}
		if err := json.Unmarshal(js, &got); err != nil {
			t.Fatalf("not JSON: %v: %s", err, js)
		}
		if got.Message != s {
			t.Fatalf("message %q came back as %q", s, got.Message)
		}
		if b := rawBytes(t, got.Process, "name"); !bytes.Equal(b, name) {
			t.Fatalf("name %q came back as %q", name, b)
		}
		checkArgs(t, got.Process, cmd)
		for _, style := range []Style{{}, {Width: 60}} {
			line := style.AppendAlertLine(nil, Identity{Node: s}, a)
			checkHarmless(t, line)
			line2 := style.AppendEventLine(nil, ev)
			checkHarmless(t, line2)
			if style.Width > 0 && max(cells(line), cells(line2)) > style.Width {
				t.Fatalf("lines of %d and %d columns: %s %s", cells(line), cells(line2), line, line2)
			}
		}
	})
}

func checkArgs(t *testing.T, p map[string]any, cmd []byte) {
	t.Helper()
	if raw, ok := p["argsRaw"]; ok {
		if b, err := base64.StdEncoding.DecodeString(raw.(string)); err != nil || !bytes.Equal(b, cmd) {
			t.Fatalf("argsRaw of %q is %q, %v", cmd, b, err)
		}
		if utf8.Valid(cmd) {
			t.Fatalf("argsRaw for valid UTF-8 %q", cmd)
		}
		return
	}
	var back []byte
	for _, a := range p["args"].([]any) {
		back = append(append(back, a.(string)...), 0)
	}
	want := cmd
	if len(want) > 0 && want[len(want)-1] != 0 {
		want = append(bytes.Clone(want), 0)
	}
	if !bytes.Equal(back, want) {
		t.Fatalf("arguments %q came back as %q", want, back)
	}
}

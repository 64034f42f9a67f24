package present

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

const docsFile = "../../docs/events.md"

// keys collects the path of every key in a JSON value, in the form the table
// of docs/events.md uses.
func keys(set map[string]bool, path string, v any) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			keys(set, path, e)
		}
	case map[string]any:
		switch path { // keys are data
		case "pod.labels", "pod.annotations", "coverage.events", "coverage.lost", "coverage.missed", "coverage.unresolved", "coverage.suppressed":
			return
		}
		if strings.HasSuffix(path, "sources") {
			return
		}
		for k, e := range v {
			p := k
			switch path {
			case "":
			case "parent", "target", "process.ancestors": // the same as a process
				p = "process." + k
			case "change.from", "change.to":
				p = "change.from." + k
			case "change.exeFile":
				p = "process.exeFile." + k
			default:
				p = path + "." + k
			}
			set[p] = true
			keys(set, p, e)
		}
	}
}

func emitted(t *testing.T, js []byte) map[string]bool {
	t.Helper()
	set := map[string]bool{}
	var v any
	if err := json.Unmarshal(js, &v); err != nil {
		t.Fatalf("%v: %s", err, js)
	}
	keys(set, "", v)
	return set
}

// everything is an alert in which every field of every message is set.
func everything() *pb.Alert {
	a := &pb.Alert{}
	fill(a.ProtoReflect(), 4)
	// bytes that are not UTF-8 bring out the Raw keys, a greater length the cut.
	p := a.Event.Process
	p.Exe, p.File, p.Name, p.Cmdline, p.Cwd, p.Cgroup = []byte{0xff}, []byte{0xff}, []byte{0xff}, []byte{0xff}, []byte{0xff}, []byte{0xff}
	a.Event.Change.FromName, a.Event.Change.Exe = []byte{0xff}, []byte{0xff}
	a.Aggregated.Samples[0].Exe, a.Aggregated.Samples[0].Cmdline = []byte{0xff}, []byte{0xff}
	return a
}

func fill(m protoreflect.Message, depth int) {
	if ts, ok := m.Interface().(*timestamppb.Timestamp); ok {
		ts.Seconds, ts.Nanos = testTime.Unix(), 5
		return
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		switch {
		case fd.IsMap():
			m.Mutable(fd).Map().Set(protoreflect.ValueOfString("exe").MapKey(), scalar(fd.MapValue()))
		case fd.IsList() && fd.Message() != nil:
			if depth > 1 {
				fill(m.Mutable(fd).List().AppendMutable().Message(), depth-1)
			}
		case fd.IsList():
			m.Mutable(fd).List().Append(scalar(fd))
		case fd.Message() != nil:
			fill(m.Mutable(fd).Message(), depth-1)
		default:
			m.Set(fd, scalar(fd))
		}
	}
}

func scalar(fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("text of " + string(fd.Name()))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte("bytes of " + string(fd.Name())))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(2)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(100 + fd.Number()))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(100 + fd.Number()))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(100 + fd.Number()))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(100 + fd.Number()))
	}
	panic("no value for " + fd.FullName())
}

// Nothing in a message may be left out of the JSON: dropping any field of an
// alert in which all are set has to change it.
func TestJSONIsComplete(t *testing.T) {
	amendment, coverage := &pb.Amendment{}, &pb.Coverage{}
	fill(amendment.ProtoReflect(), 4)
	amendment.Epoch = bytes.Repeat([]byte{1}, 16)
	fill(coverage.ProtoReflect(), 4)
	full := everything()
	if n := missing(t, "alert", full, func() []byte { return AppendAlertJSON(nil, testID, full) }); n < 100 {
		t.Errorf("only %d fields of an alert were tried", n)
	}
	if n := missing(t, "amendment", amendment, func() []byte { return itemJSON(t, amendment) }); n < 15 {
		t.Errorf("only %d fields of an amendment were tried", n)
	}
	if n := missing(t, "coverage", coverage, func() []byte { return itemJSON(t, coverage) }); n < 28 {
		t.Errorf("only %d fields of a coverage were tried", n)
	}
}

func itemJSON(t *testing.T, m proto.Message) []byte {
	t.Helper()
	it := &pb.Item{}
	switch m := m.(type) {
	case *pb.Amendment:
		it.Item = &pb.Item_Amendment{Amendment: m}
	case *pb.Coverage:
		it.Item = &pb.Item_Coverage{Coverage: m}
	}
	js, ok := AppendItemJSON(nil, testID, it)
	if !ok {
		t.Fatalf("no JSON of %v", it)
	}
	return js
}

// missing names the fields of full without which its JSON is the same. It
// returns how many were tried.
func missing(t *testing.T, what string, full proto.Message, js func() []byte) (n int) {
	whole := string(js())
	var walk func(path string, m protoreflect.Message)
	walk = func(path string, m protoreflect.Message) {
		if _, ok := m.Interface().(*timestamppb.Timestamp); ok {
			return
		}
		m.Range(func(fd protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
			name := path + "." + string(fd.Name())
			// Only the process an event is about has a lineage.
			if strings.Contains(string(fd.Name()), "ancestors") && path != "alert.event.process" {
				return true
			}
			var saved proto.Message = proto.Clone(m.Interface())
			m.Clear(fd)
			if string(js()) == whole {
				t.Errorf("%s is not in the JSON", name)
			}
			n++
			m.Set(fd, saved.ProtoReflect().Get(fd))
			v := m.Get(fd)
			switch {
			case fd.IsMap():
			case fd.IsList() && fd.Message() != nil:
				for i := range v.List().Len() {
					walk(name+"[]", v.List().Get(i).Message())
				}
			case fd.Message() != nil && !fd.IsList():
				walk(name, v.Message())
			}
			return true
		})
	}
	walk(what, full.ProtoReflect())
	return n
}

// The table in docs/events.md and the code name the same keys.
func TestDocsTable(t *testing.T) {
	doc, err := os.ReadFile(docsFile)
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllSubmatch(doc, -1) {
		if documented[string(m[1])] {
			t.Errorf("%s has two rows", m[1])
		}
		documented[string(m[1])] = true
	}
	got := emitted(t, AppendAlertJSON(nil, testID, everything()))
	maps.Copy(got, emitted(t, AppendEventJSON(nil, everything().Event)))
	maps.Copy(got, emitted(t, AppendLossJSON(nil, testID, testTime, testLoss())))
	for _, m := range []proto.Message{&pb.Amendment{}, &pb.Coverage{}} {
		fill(m.ProtoReflect(), 4)
		maps.Copy(got, emitted(t, itemJSON(t, m)))
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(documented)), slices.Sorted(maps.Keys(got))); diff != "" {
		t.Errorf("%s against what is emitted (-docs +code):\n%s", docsFile, diff)
	}
}

// The examples in docs/events.md are what the code makes.
func TestDocsExamples(t *testing.T) {
	doc, err := os.ReadFile(docsFile)
	if err != nil {
		t.Fatal(err)
	}
	pretty := func(js []byte) string {
		var b bytes.Buffer
		if err := json.Indent(&b, js, "", "  "); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	lines := Style{}.AppendEventHeader(nil)
	for _, e := range events()[:2] {
		lines = Style{}.AppendEventLine(append(lines, '\n'), e.ev)
	}
	for lang, want := range map[string][]string{
		"json": {pretty(AppendAlertJSON(nil, testID, shellAlert())), pretty(AppendAmendmentJSON(nil, testID, shopAmendment())),
			pretty(AppendLossJSON(nil, testID, testTime, testLoss())), pretty(AppendCoverageJSON(nil, testID, minuteCoverage()))},
		"text": {string(Style{}.AppendAlertLine(nil, testID, shellAlert())), string(lines)},
	} {
		blocks := regexp.MustCompile("(?ms)^```"+lang+"\n(.*?)\n```$").FindAllSubmatchIndex(doc, -1)
		if len(blocks) != len(want) {
			t.Fatalf("%d %s examples in %s, want %d", len(blocks), lang, docsFile, len(want))
		}
		for i := len(blocks) - 1; i >= 0; i-- {
			from, to := blocks[i][2], blocks[i][3]
			if got := string(doc[from:to]); got != want[i] && !*update {
				t.Errorf("%s example %d (-docs +code):\n%s", lang, i+1, cmp.Diff(got, want[i]))
			}
			doc = fmt.Appendf(nil, "%s%s%s", doc[:from], want[i], doc[to:])
		}
	}
	if *update {
		if err := os.WriteFile(docsFile, doc, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

package processionv1_test

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protopath"
	"google.golang.org/protobuf/reflect/protorange"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

var update = flag.Bool("update", false, "add what is new to testdata; what was there must stay")

// surface is the wire: every field, value and method with what decides how it
// travels. A line that is gone or another is a break.
func surface() (lines []string) {
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	var messages func(ms protoreflect.MessageDescriptors)
	messages = func(ms protoreflect.MessageDescriptors) {
		for i := range ms.Len() {
			m := ms.Get(i)
			for j := range m.Fields().Len() {
				f := m.Fields().Get(j)
				kind := f.Kind().String()
				if f.Message() != nil {
					kind = string(f.Message().FullName())
				} else if f.Enum() != nil {
					kind = string(f.Enum().FullName())
				}
				in := ""
				if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
					in = " in " + string(o.Name())
				}
				add("field %s = %d %s %s %s%s", m.FullName(), f.Number(), f.Name(), f.Cardinality(), kind, in)
			}
			messages(m.Messages())
		}
	}
	for _, file := range []protoreflect.FileDescriptor{pb.File_procession_v1_alert_proto, pb.File_procession_v1_ingest_proto, pb.File_procession_v1_query_proto} {
		messages(file.Messages())
		for i := range file.Enums().Len() {
			e := file.Enums().Get(i)
			for j := range e.Values().Len() {
				add("value %s = %d %s", e.FullName(), e.Values().Get(j).Number(), e.Values().Get(j).Name())
			}
		}
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				add("method %s/%s %s %v %s %v", s.FullName(), m.Name(), m.Input().FullName(), m.IsStreamingClient(), m.Output().FullName(), m.IsStreamingServer())
			}
		}
	}
	sort.Strings(lines)
	return lines
}

// Nothing that was ever on the wire changes its number, type or name, or goes.
// With -update new lines are added, and only those.
func TestNothingBreaks(t *testing.T) {
	const file = "testdata/surface.txt"
	b, err := os.ReadFile(file)
	if err != nil && !*update {
		t.Fatal(err)
	}
	was := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(b) == 0 {
		was = nil
	}
	is := surface()
	have := make(map[string]bool)
	for _, l := range is {
		have[l] = true
	}
	for _, l := range was {
		if !have[l] {
			t.Errorf("broken: %s is gone or another now; agents and collectors of different versions would not understand each other", l)
		}
		delete(have, l)
	}
	if len(have) > 0 && !*update {
		for l := range have {
			t.Errorf("new: %s; run go test ./api/proto/procession/v1 -update, and it may never change again", l)
		}
	}
	if *update && !t.Failed() {
		if err := os.WriteFile(file, []byte(strings.Join(is, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// House rules of the protos: lower_case fields, enums that begin with an
// UNSPECIFIED 0 and carry their name, a comment-worthy package version.
func TestLint(t *testing.T) {
	for _, l := range surface() {
		f := strings.Fields(l)
		if f[0] == "field" && strings.ToLower(f[4]) != f[4] {
			t.Errorf("%s: field names are lower case with underscores", l)
		}
		if !strings.HasPrefix(f[1], "procession.v1.") {
			t.Errorf("%s: not in procession.v1", l)
		}
	}
	for _, file := range []protoreflect.FileDescriptor{pb.File_procession_v1_alert_proto, pb.File_procession_v1_ingest_proto, pb.File_procession_v1_query_proto} {
		for i := range file.Enums().Len() {
			e := file.Enums().Get(i)
			var prefix strings.Builder
			for k, c := range string(e.Name()) {
				if k > 0 && c >= 'A' && c <= 'Z' {
					prefix.WriteByte('_')
				}
				prefix.WriteRune(c)
			}
			want := strings.ToUpper(prefix.String()) + "_"
			for j := range e.Values().Len() {
				v := e.Values().Get(j)
				if !strings.HasPrefix(string(v.Name()), want) || (v.Number() == 0) != strings.HasSuffix(string(v.Name()), "_UNSPECIFIED") {
					t.Errorf("%s: want the prefix %s, and 0 to be UNSPECIFIED", v.FullName(), want)
				}
			}
		}
	}
}

// recorded is a stream as the first release sends it.
func recorded() []*pb.StreamRequest {
	epoch := bytes.Repeat([]byte{7}, 16)
	at := &timestamppb.Timestamp{Seconds: 1_800_000_000, Nanos: 5}
	item, err := proto.MarshalOptions{Deterministic: true}.Marshal(&pb.Item{Item: &pb.Item_Alert{Alert: &pb.Alert{
		Rule: "ClusterDetectionPolicy//p/r", Severity: pb.Severity_SEVERITY_HIGH, Message: "m", Tags: []string{"t"},
		Event: &pb.Event{Time: at, Kind: "Exec", Place: "container", Process: &pb.Process{Pid: 7, Exe: []byte("/bin/sh"), Cmdline: []byte("sh\x00")},
			Pod: &pb.Pod{Namespace: "shop", Name: "web", Labels: map[string]string{"a": "b"}}}}}})
	if err != nil {
		panic(err)
	}
	return []*pb.StreamRequest{
		{Message: &pb.StreamRequest_Hello{Hello: &pb.Hello{Protocol: 1, AgentVersion: "1", Node: "n", BootId: "b", Lanes: []*pb.Lane{{Epoch: epoch, FirstSeq: 1, Made: 2}}}}},
		{Message: &pb.StreamRequest_Heartbeat{Heartbeat: &pb.Heartbeat{Epoch: epoch, Made: 2, SpoolBytes: 3, Events: 4, EventsLost: 5, AgentTime: at}}},
		{Message: &pb.StreamRequest_Batch{Batch: &pb.Batch{Epoch: epoch, FirstSeq: 1, Records: []*pb.Record{{Seq: 1, Payload: item, Crc32C: 0x1234}},
			Losses: []*pb.Loss{{From: 2, To: 2, Reason: pb.LossReason_LOSS_REASON_SPOOL_FULL, Detail: "d"}}}}},
		{Message: &pb.StreamRequest_Reauth{Reauth: &pb.Reauth{Token: "a.b.c"}}},
	}
}

// A stream that was recorded with an earlier version is read with the same
// content today, and with nothing left over that nobody knows.
func TestRecordedStream(t *testing.T) {
	for i, want := range recorded() {
		file := fmt.Sprintf("testdata/stream-%d.bin", i+1)
		b, err := os.ReadFile(file)
		if os.IsNotExist(err) && *update {
			if b, err = (proto.MarshalOptions{Deterministic: true}).Marshal(want); err == nil {
				err = os.WriteFile(file, b, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		var got pb.StreamRequest
		if err := proto.Unmarshal(b, &got); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if !proto.Equal(want, &got) {
			t.Errorf("%s reads as %v, want %v", file, &got, want)
		}
	}
}

// Whole sessions of agents and collectors of earlier times. The first is of the
// first release: two epochs, a damaged record, alerts, coverage, heartbeats,
// acknowledgements, a drain and the stream after it. The second, of November
// 2026, has amendments, a late alert and a token that was shown anew besides, and
// an agent that was killed; TestRecord in test/spine recorded it. Package ingest
// plays the agent's part to the server. Nothing in them may be unknown today:
// what is, has lost its field.
func TestRecordedSessions(t *testing.T) {
	for file, want := range map[string]map[string]int{
		"session-1.bin": {"stream": 2, "Hello": 2, "Welcome": 2, "Batch": 18, "Ack": 18, "Heartbeat": 3, "Drain": 1, "Alert": 9, "Coverage": 13, "Loss": 1},
		"session-2.bin": {"stream": 3, "Hello": 3, "Welcome": 3, "Batch": 7, "Ack": 7, "Heartbeat": 4, "Drain": 1, "Reauth": 1, "Alert": 7, "Amendment": 3, "Coverage": 3},
	} {
		seen := readSession(t, filepath.Join("testdata", file))
		if d := cmp.Diff(want, seen); d != "" {
			t.Errorf("%s: messages and items (-want +got):\n%s", file, d)
		}
	}
}

func readSession(t *testing.T, file string) map[string]int {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]int)
	for len(b) > 0 {
		// who ('s' begins a stream, 'a' the agent, 'c' the collector), length, message
		who := b[0]
		n, w := binary.Uvarint(b[1:])
		if w <= 0 || uint64(len(b)-1-w) < n {
			t.Fatalf("the recording is torn, %d bytes before its end", len(b))
		}
		m := b[1+w : 1+w+int(n)]
		b = b[1+w+int(n):]
		switch who {
		case 's':
			seen["stream"]++
		case 'a':
			var r pb.StreamRequest
			read(t, m, &r)
			seen[strings.TrimPrefix(fmt.Sprintf("%T", r.Message), "*processionv1.StreamRequest_")]++
			for _, rec := range r.GetBatch().GetRecords() {
				var it pb.Item
				read(t, rec.GetPayload(), &it)
				seen[strings.TrimPrefix(fmt.Sprintf("%T", it.Item), "*processionv1.Item_")]++
			}
			if n := len(r.GetBatch().GetLosses()); n > 0 {
				seen["Loss"] += n
			}
		case 'c':
			var r pb.StreamResponse
			read(t, m, &r)
			seen[strings.TrimPrefix(fmt.Sprintf("%T", r.Message), "*processionv1.StreamResponse_")]++
		}
	}
	return seen
}

// read decodes a message that has nothing unknown, at any depth.
func read(t *testing.T, b []byte, m proto.Message) {
	t.Helper()
	if err := proto.Unmarshal(b, m); err != nil {
		t.Fatal(err)
	}
	if err := protorange.Range(m.ProtoReflect(), func(vs protopath.Values) error {
		if in, ok := vs.Index(-1).Value.Interface().(protoreflect.Message); ok && len(in.GetUnknown()) > 0 {
			return fmt.Errorf("%v: unknown bytes %x", vs.Path, in.GetUnknown())
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// What a newer side adds, an older one keeps or skips, and never fails on.
func TestUnknownIsKept(t *testing.T) {
	for i, m := range recorded() {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, 0xfa, 0x3f, 3, 'n', 'e', 'w') // field 1023
		var got pb.StreamRequest
		if err := proto.Unmarshal(b, &got); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		again, err := proto.Marshal(&got)
		if err != nil || !bytes.Contains(again, []byte("new")) {
			t.Errorf("message %d: the unknown field is lost: %v", i, err)
		}
		got.ProtoReflect().SetUnknown(nil)
		if d := cmp.Diff(fmt.Sprint(m), fmt.Sprint(&got)); d != "" {
			t.Errorf("message %d (-want +got):\n%s", i, d)
		}
	}
}

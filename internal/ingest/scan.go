package ingest

import (
	"sync"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// To decode each alert only to see that it can be decoded was a quarter of the
// CPU of ingest, most of it for objects nobody looked at. So the usual alert is
// checked where it lies. What is unusual in any way is left to the decoder.

// A shape is what must hold of an encoded message so that the decoder takes it.
type shape struct{ fields []shapeField } // by number

type shapeField struct {
	known  bool
	text   bool   // must be UTF-8
	packed bool   // numbers may come as a list
	sub    *shape // of a message
}

// alertShape is made of the message's description.
var alertShape = sync.OnceValue(func() *shape {
	return shapeOf((&pb.Alert{}).ProtoReflect().Descriptor(), make(map[protoreflect.FullName]*shape))
})

func shapeOf(d protoreflect.MessageDescriptor, made map[protoreflect.FullName]*shape) *shape {
	if s := made[d.FullName()]; s != nil {
		return s
	}
	s := &shape{}
	made[d.FullName()] = s // before its fields: a process has ancestors
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		for len(s.fields) <= int(f.Number()) {
			s.fields = append(s.fields, shapeField{})
		}
		sf := shapeField{known: true, text: f.Kind() == protoreflect.StringKind, packed: f.IsPacked()}
		if f.Message() != nil {
			sf.sub = shapeOf(f.Message(), made)
		}
		s.fields[f.Number()] = sf
	}
	return s
}

// maxDepth is deeper than any alert of an agent.
const maxDepth = 32

// valid reports that the decoder takes b. It may be false of what it takes.
func (s *shape) valid(b []byte, depth int) bool {
	if depth == 0 {
		return false
	}
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || num > protowire.MaxValidNumber {
			return false
		}
		b = b[n:]
		if int(num) < len(s.fields) && s.fields[num].known && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return false
			}
			f := &s.fields[num]
			if f.packed || f.text && !utf8.Valid(v) || f.sub != nil && !f.sub.valid(v, depth-1) {
				return false
			}
			b = b[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return false
		}
		b = b[n:]
	}
	return true
}

// one is the only field num of a message that is valid, and of the wire type
// typ; once is false if there are several, or one of another type.
func one(b []byte, num protowire.Number, typ protowire.Type) (value []byte, number uint64, once bool) {
	seen := false
	for len(b) > 0 {
		got, t, n := protowire.ConsumeTag(b)
		b = b[n:]
		n = protowire.ConsumeFieldValue(got, t, b)
		if got == num {
			if seen || t != typ {
				return nil, 0, false
			}
			seen = true
			if typ == protowire.VarintType {
				number, _ = protowire.ConsumeVarint(b)
			} else {
				value, _ = protowire.ConsumeBytes(b)
			}
		}
		b = b[n:]
	}
	if !seen && typ == protowire.BytesType {
		return nil, 0, true
	}
	if value == nil && typ == protowire.BytesType {
		value = []byte{}
	}
	return value, number, true
}

// A head is what the store keeps of an alert beside its bytes.
type head struct {
	severity pb.Severity
	rule     string
	time     *timestamppb.Timestamp
}

// Numbers of fields, as in alert.proto and in the description of Timestamp.
var numbers = sync.OnceValue(func() (n struct{ item, severity, rule, dryRun, event, time protowire.Number }) {
	of := func(m protoreflect.ProtoMessage, name protoreflect.Name) protowire.Number {
		return m.ProtoReflect().Descriptor().Fields().ByName(name).Number()
	}
	n.item, n.severity, n.rule = of(&pb.Item{}, "alert"), of(&pb.Alert{}, "severity"), of(&pb.Alert{}, "rule")
	n.dryRun, n.event, n.time = of(&pb.Alert{}, "dry_run"), of(&pb.Alert{}, "event"), of(&pb.Event{}, "time")
	return n
})

// scanAlert is the head of a payload that is an item with a usual alert. What
// is not ok may be one too: ask the decoder.
func scanAlert(p []byte) (h head, ok bool) {
	n := numbers()
	num, typ, size := protowire.ConsumeTag(p)
	if size < 0 || num != n.item || typ != protowire.BytesType {
		return h, false
	}
	alert, rest := protowire.ConsumeBytes(p[size:])
	if rest != len(p)-size || !alertShape().valid(alert, maxDepth) {
		return h, false
	}
	_, severity, ok1 := one(alert, n.severity, protowire.VarintType)
	rule, _, ok2 := one(alert, n.rule, protowire.BytesType)
	event, _, ok3 := one(alert, n.event, protowire.BytesType)
	_, dryRun, ok4 := one(alert, n.dryRun, protowire.VarintType)
	if !ok1 || !ok2 || !ok3 || event == nil || !ok4 || dryRun != 0 {
		return h, false
	}
	at, _, ok5 := one(event, n.time, protowire.BytesType)
	_, seconds, ok6 := one(at, 1, protowire.VarintType)
	_, nanos, ok7 := one(at, 2, protowire.VarintType)
	if !ok5 || !ok6 || !ok7 {
		return h, false
	}
	if at != nil {
		h.time = &timestamppb.Timestamp{Seconds: int64(seconds), Nanos: int32(nanos)}
	}
	h.severity, h.rule = pb.Severity(severity), string(rule)
	return h, true
}

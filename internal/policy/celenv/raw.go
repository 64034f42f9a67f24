package celenv

import (
	"bytes"

	"github.com/procession-dev/procession/internal/event"
)

// A Field names a fact an expression can read: a variable, or a field of the
// elements of a list of processes. Fields of an Env are numbered from 0.
type Field int32

// Fields is the number of fields there are.
func (e *Env) Fields() int { return len(e.vars) + int(numViews)*len(procFields) }

// element is the field of the elements of ancestors that is procFields[i].
func (e *Env) element(v view, i int) Field { return Field(len(e.vars) + int(v)*len(procFields) + i) }

// ofElement says whether f is a field of elements, and takes it apart.
func (e *Env) ofElement(f Field) (v view, p *procField, ok bool) {
	n := int(f) - len(e.vars)
	if n < 0 {
		return 0, nil, false
	}
	return view(n / len(procFields)), &procFields[n%len(procFields)], true
}

// FieldName is the name of a field as expressions write it; the elements of
// ancestors are called a.
func (e *Env) FieldName(f Field) string {
	if _, p, ok := e.ofElement(f); ok {
		return "a." + p.name
	}
	return e.vars[f].Name
}

// Several says whether a field has any number of values, not one.
func (e *Env) Several(f Field) bool {
	_, _, ok := e.ofElement(f)
	return ok || e.vars[f].shape == shapeArgs
}

// raw is what an Activation has read of the event without making CEL values
// of it. Texts are copied, because nearly all that are worth looking at must
// be cleaned or joined first.
type raw struct {
	epoch  uint32
	fields []readField // by Field
	spans  []span
	text   []byte

	chains [numViews][]*event.Process // ancestors; see chain
	chain  [numViews]bool             // chains is of this event
}

// readField are the texts of one field: spans[first:first+n].
type readField struct {
	epoch    uint32 // of the event that it was read from
	first, n int32
	known    bool
}

// A span is a part of raw.text; from is -1 for a missing text.
type span struct{ from, to int32 }

// keepText bounds what is kept from one event to the next.
const keepText = 1 << 20

func newRaw(e *Env) raw { return raw{epoch: 1, fields: make([]readField, e.Fields())} }

func (r *raw) reset() {
	if r.epoch++; r.epoch == 0 { // after 2^32 events
		clear(r.fields)
		r.epoch = 1
	}
	if cap(r.text) > keepText {
		r.text = nil
	}
	r.text, r.spans = r.text[:0], r.spans[:0]
	for v := range r.chains {
		if r.chain[v] {
			clear(r.chains[v]) // keep no process of the event before
			r.chains[v], r.chain[v] = r.chains[v][:0], false
		}
	}
}

// ancestors lists the ancestors of the event's process; nil stands for one of
// which nothing is known.
func (a *Activation) ancestors(v view) []*event.Process {
	if !a.chain[v] {
		a.chains[v], a.chain[v] = appendAncestors(a.chains[v][:0], a.ev.Process, v), true
	}
	return a.chains[v]
}

// Texts is the number of texts a field has, which is 1 but for lists. known is
// false when the field is missing.
func (a *Activation) Texts(f Field) (n int, known bool) {
	r := a.read(f)
	return int(r.n), r.known
}

// Text is the i-th text of a field, as expressions see it; known is false
// when it is missing. It is valid until the next Reset.
func (a *Activation) Text(f Field, i int) (text []byte, known bool) {
	s := a.spans[a.read(f).first+int32(i)]
	if s.from < 0 {
		return nil, false
	}
	return a.text[s.from:s.to:s.to], true
}

func (a *Activation) read(f Field) readField {
	if r := a.fields[f]; r.epoch == a.epoch {
		return r
	}
	r := readField{epoch: a.epoch, first: int32(len(a.spans)), known: true}
	if v, p, ok := a.env.ofElement(f); ok {
		for _, q := range a.ancestors(v) {
			s, known := "", p.has(q)
			if known {
				s, known = p.text(q)
			}
			a.keep(s, known, p.shape)
		}
	} else {
		v := &a.env.vars[f]
		var s string
		if s, r.known = v.text(a); r.known {
			a.keep(s, true, v.shape)
		}
	}
	r.n = int32(len(a.spans)) - r.first
	a.fields[f] = r
	return r
}

// keep appends the spans of one text of the given shape.
func (r *raw) keep(s string, known bool, sh shape) {
	from := int32(len(r.text))
	switch {
	case !known:
		r.spans = append(r.spans, span{-1, -1})
		return
	case sh == shapeArgs:
		r.keepArgs(s)
		return
	case sh == shapeJoined:
		r.text = appendClean(r.text, unended(s))
		for t := r.text[from:]; ; {
			i := bytes.IndexByte(t, 0)
			if i < 0 {
				break
			}
			t[i] = ' '
			t = t[i+1:]
		}
	default:
		r.text = appendClean(r.text, s)
	}
	r.spans = append(r.spans, span{from, int32(len(r.text))})
}

// keepArgs does what splitArgs does.
func (r *raw) keepArgs(cmdline string) {
	if cmdline == "" {
		return
	}
	first, from := len(r.spans), int32(len(r.text))
	r.text = appendClean(r.text, unended(cmdline))
	for {
		i := bytes.IndexByte(r.text[from:], 0)
		if i < 0 {
			break
		}
		r.spans = append(r.spans, span{from, from + int32(i)})
		from += int32(i) + 1
	}
	r.spans = append(r.spans, span{from, int32(len(r.text))})
	if n := len(r.spans); n-first > maxArgs {
		r.spans = append(r.spans[:first+maxArgs/2], r.spans[n-maxArgs/2:]...)
	}
}

// Number is the value of a field of type int, or of its i-th element.
func (a *Activation) Number(f Field, i int) (n int64, known bool) {
	if v, p, ok := a.env.ofElement(f); ok {
		if q := a.ancestors(v)[i]; p.has(q) {
			return p.number(q)
		}
		return 0, false
	}
	return a.env.vars[f].number(a)
}

// Flag is the value of a field of type bool, or of its i-th element.
func (a *Activation) Flag(f Field, i int) (b, known bool) {
	if v, p, ok := a.env.ofElement(f); ok {
		if q := a.ancestors(v)[i]; p.has(q) {
			return p.flag(q)
		}
		return false, false
	}
	return a.env.vars[f].flag(a)
}

// Map is the value of a field of type map(string, string).
func (a *Activation) Map(f Field) (m map[string]string, known bool) { return a.env.vars[f].table(a) }

// Count is the number of elements of args or ancestors.
func (a *Activation) Count(f Field) (n int, known bool) {
	switch v := &a.env.vars[f]; {
	case v.shape == shapeArgs:
		return a.Texts(f)
	case v.tenant:
		return len(a.ancestors(viewTenant)), true
	}
	return len(a.ancestors(viewAll)), true
}

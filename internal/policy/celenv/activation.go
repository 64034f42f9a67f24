package celenv

import (
	"slices"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"github.com/procession-dev/procession/internal/event"
)

// An Activation gives expressions the values of one event after another. A
// value is made when the first expression asks for it, and kept for the
// others until the next event. It belongs to one goroutine.
type Activation struct {
	env  *Env
	node string
	ev   *event.Event

	nodeLabels map[string]string // nil: not known

	vals  []ref.Val // by slot; nil: not asked for yet
	boxed []int32   // slots in vals that are not nil

	scope *Scope
	memo  []ref.Val // values of scope's variables; nil: not asked for yet

	// placeholders makes missing text read "?", for messages.
	placeholders bool

	raw // what is read without CEL
}

// NewActivation makes an activation. node is the value of node.name; empty
// when it is not known.
func (e *Env) NewActivation(node string) *Activation {
	return &Activation{env: e, node: node, vals: make([]ref.Val, len(e.vars)), raw: newRaw(e)}
}

// SetNodeLabels says what node.labels is; nil, when that is not known.
func (a *Activation) SetNodeLabels(labels map[string]string) { a.nodeLabels = labels }

// Reset turns to another event. The activation reads it until the next Reset,
// and keeps nothing of the one before.
func (a *Activation) Reset(ev *event.Event) {
	a.ev = ev
	for _, slot := range a.boxed {
		a.vals[slot] = nil
	}
	a.boxed = a.boxed[:0]
	a.raw.reset()
	a.forget()
}

// Env is the language of the expressions it has values for.
func (a *Activation) Env() *Env { return a.env }

// Kind is the kind of the event it stands at.
func (a *Activation) Kind() event.Kind { return a.ev.Kind }

// forget drops the values of a policy's variables.
func (a *Activation) forget() {
	a.scope = nil
	clear(a.memo)
	a.placeholders = false
}

// enter makes s the scope of what is evaluated next.
func (a *Activation) enter(s *Scope, placeholders bool) {
	if a.scope == s && a.placeholders == placeholders {
		return
	}
	a.scope, a.placeholders = s, placeholders
	n := len(s.variables)
	if cap(a.memo) < n {
		a.memo = make([]ref.Val, n)
	}
	a.memo = a.memo[:n]
	clear(a.memo)
}

// Parent implements cel.Activation.
func (a *Activation) Parent() cel.Activation { return nil }

// ResolveName implements cel.Activation.
func (a *Activation) ResolveName(name string) (any, bool) {
	if slot, ok := a.scope.slots[name]; ok {
		v := a.value(slot)
		if a.placeholders && v == missing && a.env.vars[slot].typ == cel.StringType {
			return placeholder, true
		}
		return v, true
	}
	n, ok := a.scope.names[name]
	switch {
	case !ok:
		return nil, false
	case n.list != nil:
		return n.list, true
	}
	return a.variable(n.variable), true
}

// placeholder stands for missing text in messages.
var placeholder ref.Val = types.String("?")

func (a *Activation) value(slot int) ref.Val {
	if v := a.vals[slot]; v != nil {
		return v
	}
	v := a.env.vars[slot].box(a)
	a.vals[slot] = v
	a.boxed = append(a.boxed, int32(slot))
	return v
}

func (a *Activation) variable(i int) ref.Val {
	if v := a.memo[i]; v != nil {
		return v
	}
	v, _, err := a.scope.variables[i].program().Eval(a)
	if err != nil && !types.IsError(v) {
		v = types.WrapErr(err)
	}
	if s, ok := v.(types.String); ok && len(s) > maxBytes {
		v = types.NewErr("the value of a variable is longer than %d bytes", maxBytes)
	}
	a.memo[i] = v
	return v
}

// Truth is the value of a condition.
type Truth uint8

// Truth values.
const (
	False     Truth = iota
	True            //
	Undecided       // a fact is missing
	Failed          // the expression failed
)

// String is the word for logs and tests.
func (t Truth) String() string { return [...]string{"false", "true", "undecided", "failed"}[t] }

// Truth evaluates a condition over the event a stands at. The error tells why
// a condition Failed, and is nil otherwise.
func (x *Expr) Truth(a *Activation) (Truth, error) {
	a.enter(x.scope, false)
	v, _, err := x.program().Eval(a)
	switch v := v.(type) {
	case types.Bool:
		if v {
			return True, nil
		}
		return False, nil
	case *types.Unknown:
		return Undecided, nil
	}
	if err == nil {
		err = errNotBool
	}
	return Failed, err
}

// Text evaluates a message. Missing text reads "?"; any other missing fact
// makes ok false, as does an error.
func (x *Expr) Text(a *Activation) (text string, ok bool) {
	a.enter(x.scope, true)
	v, _, err := x.program().Eval(a)
	s, isString := v.(types.String)
	if err != nil || !isString {
		return "", false
	}
	return string(s), true
}

// A Value is what an expression saw of a variable.
type Value struct {
	Name    string
	Text    string
	Missing bool
}

// Values tells what the expression's variables are for the event a stands
// at, in the order in which it names them. Text is valid UTF-8 of at most
// limit bytes and a mark where it was cut; besides that it is what the
// process chose, control characters and all.
func (x *Expr) Values(a *Activation, limit int) []Value {
	out := make([]Value, 0, len(x.uses))
	for _, slot := range x.uses {
		out = append(out, a.render(slot, limit))
	}
	return out
}

// NodeValues tells what the variables are that a node of a formula reads
// itself, as Values does. It keeps them in made, by number, for the next node.
func (e *Env) NodeValues(a *Activation, n *Node, limit int, made map[int]Value) []Value {
	var out []Value
	for _, slot := range e.nodeSlots(nil, n) {
		v, ok := made[slot]
		if !ok {
			v = a.render(slot, limit)
			made[slot] = v
		}
		out = append(out, v)
	}
	return out
}

// nodeSlots appends the slots of the variables a node reads.
func (e *Env) nodeSlots(slots []int, n *Node) []int {
	add := func(f Field) {
		if f == NoField || n.Op == OpVariable || n.Op <= OpIf {
			return
		}
		slot := int(f)
		if v, _, ok := e.ofElement(f); ok {
			slot = e.ancestorsSlot(v)
		}
		if !slices.Contains(slots, slot) {
			slots = append(slots, slot)
		}
	}
	add(n.Field)
	add(n.Other)
	for _, k := range n.Kids {
		slots = e.nodeSlots(slots, k)
	}
	if n.Op == OpOpaque {
		for _, s := range n.Opaque.uses {
			if !slices.Contains(slots, s) {
				slots = append(slots, s)
			}
		}
	}
	return slots
}

func (e *Env) ancestorsSlot(v view) int {
	if v == viewTenant {
		return e.tenantSlots["ancestors"]
	}
	return e.slots["ancestors"]
}

func (a *Activation) render(slot, limit int) Value {
	v := a.value(slot)
	name := a.env.vars[slot].Name
	if v == missing {
		return Value{Name: name, Missing: true}
	}
	return Value{Name: name, Text: cut(render(v), limit)}
}

package celenv

import (
	"fmt"
	"reflect"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"github.com/procession-dev/procession/internal/event"
)

// processTypeName is what the elements of ancestors are called in errors.
const processTypeName = "process"

var processType = cel.ObjectType(processTypeName)

// maxAncestors bounds the list: a fork bomb's lineage is as deep as it likes.
const maxAncestors = 32

// A view says how far an expression sees.
type view uint8

const (
	viewAll    view = iota
	viewTenant      // the processes of its own pod
	numViews
)

// TenantSees says whether a tenant whose process is p may look at q: it runs
// in the same container or pod. known is false when that cannot be told. What
// the kernel recorded of the cgroup tells it, which no process can forge
// without the right to move itself to another cgroup.
func TenantSees(p, q *event.Process) (sees, known bool) {
	if q == nil || p.Workload == nil || q.Workload == nil {
		return false, false
	}
	a, b := p.Workload, q.Workload
	if a.Place == event.PlaceUnknown || b.Place == event.PlaceUnknown {
		return false, false
	}
	same := a.ContainerID != "" && a.ContainerID == b.ContainerID || a.PodUID != "" && a.PodUID == b.PodUID
	return a.Place == event.PlaceContainer && b.Place == event.PlaceContainer && same, true
}

// appendAncestors appends p's ancestors to list. Where the line breaks off
// before the first process there may be more, of which nothing is known: a nil
// element, of which every field is missing, says so, and makes exists() and
// all() undecided. A tenant's line ends with the first process of the pod.
func appendAncestors(list []*event.Process, p *event.Process, v view) []*event.Process {
	self := p
	for {
		if p.Parent == nil {
			if !p.Has(event.FieldParent) || p.PPID != 0 {
				list = append(list, nil)
			}
			return list
		}
		if len(list) == maxAncestors {
			return append(list, nil)
		}
		p = p.Parent
		if v == viewTenant {
			sees, known := TenantSees(self, p)
			if !known {
				return append(list, nil)
			}
			if !sees {
				return list
			}
		}
		list = append(list, p)
	}
}

func ancestorsOf(v view) fact[*Activation] {
	return other(cel.ListType(processType), func(a *Activation) ref.Val {
		chain := a.ancestors(v)
		list := make([]ref.Val, len(chain))
		for i, p := range chain {
			list[i] = &process{p}
		}
		return types.NewRefValList(types.DefaultTypeAdapter, list)
	})
}

// A process is an element of ancestors, as CEL sees it. Without p every field
// is missing.
type process struct{ p *event.Process }

func (v *process) field(name string) ref.Val {
	if f := relatedField(name); f != nil {
		return f.box(v.p)
	}
	return types.NewErr("no such field %q", name)
}

// Get implements traits.Indexer.
func (v *process) Get(name ref.Val) ref.Val {
	s, ok := name.(types.String)
	if !ok {
		return types.MaybeNoSuchOverloadErr(name)
	}
	return v.field(string(s))
}

// IsSet implements traits.FieldTester, for has().
func (v *process) IsSet(name ref.Val) ref.Val {
	s, ok := name.(types.String)
	if !ok {
		return types.MaybeNoSuchOverloadErr(name)
	}
	return types.Bool(!types.IsUnknown(v.field(string(s))))
}

// ConvertToNative implements ref.Val; there is nothing to convert to.
func (v *process) ConvertToNative(t reflect.Type) (any, error) {
	return nil, fmt.Errorf("a process cannot become a %v", t)
}

// ConvertToType implements ref.Val.
func (v *process) ConvertToType(t ref.Type) ref.Val {
	if t == types.TypeType {
		return processType
	}
	return types.NewErr("a process cannot become a %s", t.TypeName())
}

// Equal implements ref.Val.
func (v *process) Equal(other ref.Val) ref.Val {
	o, ok := other.(*process)
	switch {
	case !ok:
		return types.False
	case v.p == nil || o.p == nil:
		return missing
	}
	return types.Bool(v.p.Key() == o.p.Key())
}

// Type implements ref.Val.
func (v *process) Type() ref.Type { return processType }

// Value implements ref.Val.
func (v *process) Value() any { return v }

// A provider adds the process type to CEL's own.
type provider struct{ *types.Registry }

func (p provider) FindStructType(name string) (*types.Type, bool) {
	if name == processTypeName {
		return types.NewTypeTypeWithParam(processType), true
	}
	return p.Registry.FindStructType(name)
}

func (p provider) FindStructFieldNames(name string) ([]string, bool) {
	if name != processTypeName {
		return p.Registry.FindStructFieldNames(name)
	}
	return processFieldNames(), true
}

func processFieldNames() []string {
	var names []string
	for i := range procFields {
		if procFields[i].related {
			names = append(names, procFields[i].name)
		}
	}
	return names
}

func (p provider) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	if name != processTypeName {
		return p.Registry.FindStructFieldType(name, field)
	}
	f := relatedField(field)
	if f == nil {
		return nil, false
	}
	return &types.FieldType{
		Type: f.typ,
		IsSet: func(v any) bool {
			e, ok := v.(*process)
			return ok && !types.IsUnknown(f.box(e.p))
		},
		GetFrom: func(v any) (any, error) {
			e, ok := v.(*process)
			if !ok {
				return nil, fmt.Errorf("%T is not a process", v)
			}
			return f.box(e.p), nil
		},
	}, true
}

// NewValue refuses to make a process out of an expression.
func (p provider) NewValue(name string, fields map[string]ref.Val) ref.Val {
	if name == processTypeName {
		return types.NewErr("an expression cannot make a process")
	}
	return p.Registry.NewValue(name, fields)
}

package celenv

import (
	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// A shape says how a fact is read, and with it of which type it is.
type shape uint8

const (
	shapeOther  shape = iota // any type, by value
	shapeText                // string, by text
	shapeJoined              // string, by text: an argv, with a space for each NUL
	shapeArgs                // list(string), by text: an argv
	shapeNumber              // int, by number
	shapeCaps                // list(string), by number: a set of capabilities
	shapeFlag                // bool, by flag
	shapeMap                 // map(string, string), by table
)

// A fact is how one thing is read off a T. ok is false when it is missing.
// Only what CEL itself evaluates sees it as a CEL value; everything else reads
// it as it is.
type fact[T any] struct {
	shape  shape
	typ    *cel.Type
	text   func(T) (s string, ok bool) // raw: see clean
	number func(T) (n int64, ok bool)
	flag   func(T) (b, ok bool)
	table  func(T) (m map[string]string, ok bool)
	value  func(T) ref.Val // missing when it is not known
}

func strIf[T any](f func(T) (string, bool)) fact[T] {
	return fact[T]{shape: shapeText, typ: cel.StringType, text: f}
}

func str[T any](f func(T) string) fact[T] {
	return strIf(func(t T) (string, bool) { return f(t), true })
}

func joined[T any](f func(T) string) fact[T] {
	return fact[T]{shape: shapeJoined, typ: cel.StringType, text: func(t T) (string, bool) { return f(t), true }}
}

func argv[T any](f func(T) string) fact[T] {
	return fact[T]{shape: shapeArgs, typ: cel.ListType(cel.StringType), text: func(t T) (string, bool) { return f(t), true }}
}

func numIf[T any](f func(T) (int64, bool)) fact[T] {
	return fact[T]{shape: shapeNumber, typ: cel.IntType, number: f}
}

func num[T any](f func(T) int64) fact[T] {
	return numIf(func(t T) (int64, bool) { return f(t), true })
}

func caps[T any](f func(T) uint64) fact[T] {
	return fact[T]{shape: shapeCaps, typ: cel.ListType(cel.StringType), number: func(t T) (int64, bool) { return int64(f(t)), true }}
}

func yesIf[T any](f func(T) (yes, known bool)) fact[T] {
	return fact[T]{shape: shapeFlag, typ: cel.BoolType, flag: f}
}

func yes[T any](f func(T) bool) fact[T] {
	return yesIf(func(t T) (bool, bool) { return f(t), true })
}

func strMap[T any](f func(T) (map[string]string, bool)) fact[T] {
	return fact[T]{shape: shapeMap, typ: cel.MapType(cel.StringType, cel.StringType), table: f}
}

func other[T any](typ *cel.Type, f func(T) ref.Val) fact[T] {
	return fact[T]{typ: typ, value: f}
}

// box is the fact as a CEL value, missing when it is not known.
func (f *fact[T]) box(t T) ref.Val {
	switch f.shape {
	case shapeText, shapeJoined, shapeArgs:
		s, ok := f.text(t)
		switch {
		case !ok:
			return missing
		case f.shape == shapeArgs:
			return newList(splitArgs(s))
		case f.shape == shapeJoined:
			return types.String(joinArgs(s))
		}
		return types.String(clean(s))
	case shapeNumber, shapeCaps:
		n, ok := f.number(t)
		switch {
		case !ok:
			return missing
		case f.shape == shapeCaps:
			return capNames(uint64(n))
		}
		return types.Int(n)
	case shapeFlag:
		b, ok := f.flag(t)
		if !ok {
			return missing
		}
		return types.Bool(b)
	}
	if f.shape == shapeMap {
		m, ok := f.table(t)
		if !ok {
			return missing
		}
		return types.NewStringStringMap(types.DefaultTypeAdapter, m)
	}
	return f.value(t)
}

// lift reads the fact off what find finds, if that is there.
func lift[T, U any](f fact[T], find func(U) (T, bool)) fact[U] {
	out := fact[U]{shape: f.shape, typ: f.typ}
	if f.text != nil {
		out.text = func(u U) (string, bool) {
			if t, ok := find(u); ok {
				return f.text(t)
			}
			return "", false
		}
	}
	if f.number != nil {
		out.number = func(u U) (int64, bool) {
			if t, ok := find(u); ok {
				return f.number(t)
			}
			return 0, false
		}
	}
	if f.flag != nil {
		out.flag = func(u U) (bool, bool) {
			if t, ok := find(u); ok {
				return f.flag(t)
			}
			return false, false
		}
	}
	if f.value != nil {
		out.value = func(u U) ref.Val {
			if t, ok := find(u); ok {
				return f.value(t)
			}
			return missing
		}
	}
	return out
}

package celenv

import (
	"strconv"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
)

// Key compiles an expression of type string, int or bool whose value groups
// events.
func (s *Scope) Key(src string) (*Expr, error) {
	return s.compile(src, cel.StringType, cel.IntType, cel.BoolType)
}

// AppendKey appends the value of an expression made by Key, over the event a
// stands at, to dst. Different values give different bytes, and none of them is
// a beginning of another; a value that is missing and one that failed have
// bytes of their own.
func (x *Expr) AppendKey(dst []byte, a *Activation) []byte {
	a.enter(x.scope, false)
	v, _, _ := x.program().Eval(a)
	switch v := v.(type) {
	case types.String:
		dst = append(dst, 's')
		dst = strconv.AppendInt(dst, int64(len(v)), 10)
		dst = append(dst, ':')
		return append(dst, v...)
	case types.Int:
		dst = append(dst, 'i')
		return append(strconv.AppendInt(dst, int64(v), 10), ';')
	case types.Bool:
		return strconv.AppendBool(append(dst, 'b'), bool(v))
	case *types.Unknown:
		return append(dst, '?')
	}
	return append(dst, '!') // which failure it was makes no other group
}

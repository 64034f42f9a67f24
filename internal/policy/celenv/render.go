package celenv

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// render writes a value for people: text as it is, lists with quotes.
func render(v ref.Val) string {
	switch v := v.(type) {
	case types.String:
		return string(v)
	case types.Int:
		return fmt.Sprint(int64(v))
	case types.Bool:
		return fmt.Sprint(bool(v))
	case types.Timestamp:
		return v.Time.UTC().Format("2006-01-02T15:04:05.999999999Z07:00")
	case *list:
		return fmt.Sprintf("%q", v.values)
	case traits.Mapper:
		return renderMap(v)
	case traits.Lister:
		return renderProcesses(v)
	}
	return fmt.Sprint(v.Value())
}

func renderMap(m traits.Mapper) string {
	var pairs []string
	for it := m.Iterator(); it.HasNext() == types.True; {
		k := it.Next()
		pairs = append(pairs, fmt.Sprintf("%q: %q", k.Value(), m.Get(k).Value()))
	}
	slices.Sort(pairs)
	return valid("{" + strings.Join(pairs, ", ") + "}")
}

// renderProcesses writes ancestors: the programs, nearest first.
func renderProcesses(l traits.Lister) string {
	var names []string
	for it := l.Iterator(); it.HasNext() == types.True; {
		p, ok := it.Next().(*process)
		switch {
		case !ok:
			return "?"
		case p.p == nil:
			names = append(names, "?")
		case p.p.Exe != "":
			names = append(names, valid(p.p.Exe))
		default:
			names = append(names, "("+valid(p.p.Name)+")")
		}
	}
	return strings.Join(names, " < ")
}

// Cut keeps at most limit bytes of s, head and tail, and a mark between them.
func Cut(s string, limit int) string { return cut(s, limit) }

func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	head, tail := limit/2, len(s)-limit/2
	for head > 0 && !utf8.RuneStart(s[head]) {
		head--
	}
	for tail < len(s) && !utf8.RuneStart(s[tail]) {
		tail++
	}
	return s[:head] + cutMark + s[tail:]
}

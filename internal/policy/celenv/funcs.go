package celenv

import (
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/decls"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// A Function is something an expression may call.
type Function struct {
	Name string // as users write it
	Use  string // an example
	Doc  string

	internal string // name in a checked expression, when it is another one
}

// functions is all of the language. What cel-go has besides is refused: it
// would let an expression make lists without bound, or run something unbounded
// for each element of a list. See growing for those that make longer texts.
var functions = []Function{
	{"&&", "a && b", "And. False if either side is, also when the other one is undecided or fails.", "_&&_"},
	{"||", "a || b", "Or. True if either side is, also when the other one is undecided or fails.", "_||_"},
	{"!", "!a", "Not.", "!_"},
	{"?:", "a ? b : c", "b if a, else c.", "_?_:_"},
	{"==", "a == b", "Equal. Case matters.", "_==_"},
	{"!=", "a != b", "Not equal.", "_!=_"},
	{"<", "a < b", "Less.", "_<_"},
	{"<=", "a <= b", "Less or equal.", "_<=_"},
	{">", "a > b", "Greater.", "_>_"},
	{">=", "a >= b", "Greater or equal.", "_>=_"},
	{"+", "'uid ' + string(process.uid)", "Sum of numbers, or texts put together.", "_+_"},
	{"-", "a - b", "Difference; also the sign of a number.", "_-_"},
	{"-", "-1", "", "-_"},
	{"*", "a * b", "Product.", "_*_"},
	{"/", "a / b", "Quotient. Division by zero fails.", "_/_"},
	{"%", "a % b", "Remainder.", "_%_"},
	{"in", "process.name in lists.shells", "Is an element of a list, or a key of a map.", "@in"},
	{"[]", "process.args[1]", "Element of a list or a map. Fails when it is not there.", "_[_]"},
	{"[?]", "pod.labels[?'app'].orValue('')", "Element of a list or a map, if it is there.", "_[?_]"},
	{"?.", "pod.labels.?app.orValue('')", "The same, for keys that are identifiers.", "_?._"},
	{"orValue", "pod.labels[?'app'].orValue('')", "The value that may be there, or another.", ""},
	{"or", "pod.labels[?'app'].or(pod.labels[?'name']).orValue('')", "The value that may be there, or another one that may be.", ""},
	{"value", "pod.labels[?'app'].value() == 'web'", "The value that may be there. Fails when it is not.", ""},
	{"hasValue", "pod.labels[?'app'].hasValue()", "The value is there.", ""},
	{"has", "has(pod.labels.app)", "A key of a map is there.", ""},
	{"exists", "process.args.exists(a, a == '-e')", "True for at least one element.", ""},
	{"exists_one", "process.args.exists_one(a, a == '-e')", "True for exactly one element.", ""},
	{"all", "process.args.all(a, a != '-n')", "True for every element.", ""},
	{"filter", "process.args.filter(a, a.startsWith('-')).size() > 20", "The elements for which it is true.", ""},
	{"size", "process.args.size() > 1", "Number of elements of a list, or of characters of a text.", ""},
	{"contains", "process.cmdline.contains('/dev/tcp/')", "The text holds another.", ""},
	{"startsWith", "process.exe.startsWith('/tmp/')", "The text starts with another.", ""},
	{"endsWith", "process.exe.endsWith('/nc')", "The text ends with another.", ""},
	{"containsAny", "process.cmdline.containsAny(['exec:', 'system:'])", "The text holds one of a list.", ""},
	{"startsWithAny", "process.exe.startsWithAny(lists.folders)", "The text starts with one of a list.", ""},
	{"endsWithAny", "process.exe.endsWithAny(['/nc', '/ncat'])", "The text ends with one of a list.", ""},
	{"matches", "process.cmdline.matches('-[a-z]*e')", "A regular expression (RE2) matches somewhere in the text. It must be written out: one that is computed is refused. Slower than contains.", ""},
	{"lowerAscii", "process.cmdline.lowerAscii().contains('socket')", "The text with A-Z made small: how to compare without regard to case.", ""},
	{"upperAscii", "process.name.upperAscii()", "The text with a-z made big.", ""},
	{"trim", "process.name.trim()", "The text without white space around it.", ""},
	{"substring", "process.exe.substring(0, 5)", "A part of the text, from one character up to another. Fails outside the text.", ""},
	{"charAt", "process.name.charAt(0)", "One character of the text. Fails outside the text.", ""},
	{"indexOf", "process.exe.indexOf('/bin/')", "Where a text is in the text; -1 if it is not.", ""},
	{"lastIndexOf", "process.exe.lastIndexOf('/')", "Where it is for the last time.", ""},
	{"split", "process.exe.split('/').size() > 3", "The parts of the text between separators; with a number, at most so many.", ""},
	{"join", "process.args.join(', ')", "The elements of a list of texts, with a separator of at most 64 bytes between them.", ""},
	{"replace", "process.exe.replace('/usr/', '/')", "The text with one text in place of another, everywhere or so many times. Both are written out.", ""},
	{"reverse", "process.name.reverse()", "The text backwards.", ""},
	{"format", "'%s runs %s as %d'.format([parent.name, process.exe, process.uid])", "The text with a value for each %s, %d, %f, %e, %b, %o, %x. For messages.", ""},
	{"string", "string(process.uid)", "A number as text.", ""},
	{"int", "int(process.args[1])", "A text as number. Fails when it is none.", ""},
	{"timestamp", "event.time > timestamp('2027-01-01T00:00:00Z')", "A point in time.", ""},
	{"duration", "duration('90s')", "A length of time.", ""},
	{"getHours", "event.time.getHours('Europe/Berlin') < 6", "Hour of the day, 0 to 23. UTC without a time zone.", ""},
	{"getDayOfWeek", "event.time.getDayOfWeek() == 0", "Day of the week, Sunday is 0.", ""},
	{"@not_strictly_false", "", "", "@not_strictly_false"}, // in what exists() and all() expand to
}

var macros = []cel.Macro{cel.HasMacro, cel.ExistsMacro, cel.ExistsOneMacro, cel.AllMacro, cel.FilterMacro}

// anyFuncs are ours; each test is that of a single text.
var anyFuncs = map[string]func(s, x string) bool{
	"containsAny": strings.Contains, "startsWithAny": strings.HasPrefix, "endsWithAny": strings.HasSuffix,
}

func anyFunctions() []cel.EnvOption {
	var opts []cel.EnvOption
	for _, f := range functions { // not the map: the order must not change
		test, ok := anyFuncs[f.Name]
		if !ok {
			continue
		}
		// anyOf looks at the types itself; the library's own look is slow.
		opts = append(opts, cel.Function(f.Name, decls.DisableTypeGuards(true), cel.MemberOverload(
			"string_"+strings.ToLower(f.Name), []*cel.Type{cel.StringType, cel.ListType(cel.StringType)}, cel.BoolType,
			cel.BinaryBinding(func(s, values ref.Val) ref.Val { return anyOf(test, s, values) }))))
	}
	return opts
}

func anyOf(test func(s, x string) bool, s, values ref.Val) ref.Val {
	str, ok := s.(types.String)
	if !ok {
		return types.MaybeNoSuchOverloadErr(s)
	}
	if l, ok := values.(*list); ok {
		for _, x := range l.values {
			if test(string(str), x) {
				return types.True
			}
		}
		return types.False
	}
	l, ok := values.(traits.Lister)
	if !ok {
		return types.MaybeNoSuchOverloadErr(values)
	}
	n, ok := l.Size().(types.Int)
	if !ok {
		return types.MaybeNoSuchOverloadErr(values)
	}
	for i := range n {
		x, ok := l.Get(i).(types.String)
		if !ok {
			return types.MaybeNoSuchOverloadErr(l.Get(i))
		}
		if test(string(str), string(x)) {
			return types.True
		}
	}
	return types.False
}

package celenv

import (
	"fmt"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/ext"
)

// Bounds of one expression. See also v1alpha1.MaxConditionBytes.
const (
	maxNodes     = 8192  // nodes of the syntax tree, after exists() and the like are written out
	maxDepth     = 100   // nesting of what the author wrote
	maxRegexSize = 2000  // instructions of a compiled regular expression
	maxBytes     = 16384 // bytes in an expression, and in the value of a variable of type string
)

// An Env is the language. Make one and keep it: it costs some milliseconds.
type Env struct {
	cel   *cel.Env
	vars  []Variable
	slots map[string]int // index in vars by name
	// tenantSlots is the same for tenants, who see less under some names.
	tenantSlots map[string]int
	funcs       map[string]bool
}

// New makes the language.
func New() (*Env, error) {
	registry, err := types.NewRegistry()
	if err != nil {
		return nil, fmt.Errorf("rule language: %w", err)
	}
	e := &Env{vars: variables(), slots: make(map[string]int), tenantSlots: make(map[string]int), funcs: make(map[string]bool)}
	opts := []cel.EnvOption{
		cel.CustomTypeAdapter(registry),
		cel.CustomTypeProvider(provider{registry}),
		ext.Strings(ext.StringsVersion(4)),
		cel.OptionalTypes(),
		cel.ClearMacros(), cel.Macros(macros...),
		cel.ParserExpressionSizeLimit(maxBytes), // it counts characters; bytes are counted before
		cel.ParserRecursionLimit(maxDepth),
		cel.ParserErrorRecoveryLimit(4),
		cel.ExpressionNodeLimit(maxNodes),
		cel.RegexProgramSizeLimit(maxRegexSize),
		cel.ASTValidators(cel.ValidateRegexLiterals(), cel.ValidateTimestampLiterals(), cel.ValidateDurationLiterals(),
			cel.ValidateComprehensionNestingLimit(1)),
		cel.DefaultUTCTimeZone(true),
	}
	for i, v := range e.vars {
		if !hidden(v.Name) {
			e.tenantSlots[v.Name] = i // those of tenants come last
		}
		if v.tenant {
			continue
		}
		e.slots[v.Name] = i
		opts = append(opts, cel.Variable(v.Name, v.typ))
	}
	for _, f := range functions {
		e.funcs[f.Name] = true
		if f.internal != "" {
			e.funcs[f.internal] = true
		}
	}
	if e.cel, err = cel.NewEnv(append(opts, anyFunctions()...)...); err != nil {
		return nil, fmt.Errorf("rule language: %w", err)
	}
	return e, nil
}

// Variables lists the variables, in the order of the reference page.
func (e *Env) Variables() []Variable {
	return slices.DeleteFunc(slices.Clone(e.vars), func(v Variable) bool { return v.tenant })
}

// Functions lists the functions and operators.
func (e *Env) Functions() []Function {
	var out []Function
	for _, f := range functions {
		if f.Doc != "" {
			out = append(out, f)
		}
	}
	return out
}

// A Scope is the language together with a policy's lists and variables.
// It is immutable once nothing is added any more.
type Scope struct {
	env       *Env
	slots     map[string]int // of the event's variables, by name
	cel       *cel.Env
	names     map[string]scoped // "lists.NAME", "variables.NAME"
	variables []*Expr
}

// scoped is what a policy's name stands for: a list, or a variable by index.
type scoped struct {
	list     ref.Val
	variable int
}

// NewScope makes a scope with the lists, given by name.
func (e *Env) NewScope(lists map[string][]string) (*Scope, error) { return e.newScope(lists, e.slots) }

// NewTenantScope makes a scope for the policies of a tenant, who sees the
// processes of the pod alone: parent, grandparent and target are missing where
// they are outside it, ancestors end with its first process, and there is no
// node.
func (e *Env) NewTenantScope(lists map[string][]string) (*Scope, error) {
	return e.newScope(lists, e.tenantSlots)
}

func (e *Env) newScope(lists map[string][]string, slots map[string]int) (*Scope, error) {
	s := &Scope{env: e, slots: slots, names: make(map[string]scoped, len(lists))}
	var opts []cel.EnvOption
	for name, values := range lists {
		clean := make([]string, len(values))
		for i, v := range values {
			clean[i] = valid(v)
		}
		s.names["lists."+name] = scoped{list: newSet(clean)}
		opts = append(opts, cel.Variable("lists."+name, cel.ListType(cel.StringType)))
	}
	var err error
	if s.cel, err = e.cel.Extend(opts...); err != nil {
		return nil, fmt.Errorf("lists: %w", err)
	}
	return s, nil
}

// AddVariable compiles a named expression of type bool, int or string; the
// ones added before are known in it.
func (s *Scope) AddVariable(name, expression string) error {
	x, err := s.compile(expression, cel.BoolType, cel.IntType, cel.StringType)
	if err != nil {
		return err
	}
	qualified := "variables." + name
	extended, err := s.cel.Extend(cel.Variable(qualified, x.typ))
	if err != nil {
		return fmt.Errorf("variable %s: %w", name, err)
	}
	s.cel = extended
	s.names[qualified] = scoped{variable: len(s.variables)}
	s.variables = append(s.variables, x)
	return nil
}

// Condition compiles an expression of type bool.
func (s *Scope) Condition(src string) (*Expr, error) { return s.compile(src, cel.BoolType) }

// Message compiles an expression of type string.
func (s *Scope) Message(src string) (*Expr, error) { return s.compile(src, cel.StringType) }

// known says whether name is a variable, and the slot of those of the event.
func (s *Scope) known(name string) (slot int, sc *scoped, ok bool) {
	if i, ok := s.slots[name]; ok {
		return i, nil, true
	}
	if n, ok := s.names[name]; ok {
		return -1, &n, true
	}
	return -1, nil, false
}

// candidates are the names a mistyped one may have meant.
func (s *Scope) candidates() []string {
	names := make([]string, 0, len(s.slots)+len(s.names))
	for n := range s.slots {
		names = append(names, n)
	}
	for n := range s.names {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// roots are the first words of variables, which no loop may use for its own.
func (e *Env) isRoot(name string) bool {
	if name == "lists" || name == "variables" {
		return true
	}
	for _, v := range e.vars {
		if root, _, _ := strings.Cut(v.Name, "."); root == name {
			return true
		}
	}
	return false
}

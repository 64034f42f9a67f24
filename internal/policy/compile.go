package policy

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A Compiler turns policies into rules. It is safe for concurrent use.
type Compiler struct{ env *celenv.Env }

// NewCompiler makes a compiler. It costs some milliseconds: keep it.
func NewCompiler() (*Compiler, error) {
	env, err := celenv.New()
	if err != nil {
		return nil, err
	}
	return &Compiler{env}, nil
}

// Env is the language of the rules.
func (c *Compiler) Env() *celenv.Env { return c.env }

// A Policy is a compiled policy. It never changes.
type Policy struct {
	Kind       string
	Namespace  string // of a DetectionPolicy; empty for policies of the cluster
	Name       string
	File       string // where it came from
	Generation int64  // metadata.generation; 0 for a file
	Digest     string // of its text, SHA-256 in hex
	Mode       v1alpha1.Mode
	Rules      []*Rule
	Warnings   Errors // what compiles and is probably not meant

	scope *scope
	limit *limit // nil: none
}

// FullName names the policy among all of a node: see Object.FullName.
func (p *Policy) FullName() string { return fullName(p.Namespace, p.Name) }

// A Rule is a compiled rule. It never changes, and neither may what it points
// to.
type Rule struct {
	ID         string // kind/namespace/policy/rule: its identity in alerts
	Namespace  string // of its DetectionPolicy; empty for policies of the cluster
	Policy     string // name of the policy
	Title      string // never empty: the name, when the policy gives none
	Mode       v1alpha1.Mode
	Generation int64  // of the policy
	Digest     string // of the policy
	Spec       *v1alpha1.Rule

	policy     *Policy
	kinds      event.Kinds
	condition  *celenv.Expr
	message    *celenv.Expr // nil: plain
	plain      string
	exceptions []exception
	threshold  *repeats // nil: none
	aggregate  *repeats // nil: none
	cost       cost
}

type exception struct {
	name    string
	until   time.Time // zero: for ever
	applies *celenv.Expr
}

// repeats say which matches are counted together, and for how long.
type repeats struct {
	by     []*celenv.Expr
	count  int // of a threshold
	window time.Duration
}

// A limit is so many alerts in a window.
type limit struct {
	alerts int
	window time.Duration
}

// Severity of a match.
func (r *Rule) Severity() v1alpha1.Severity { return r.Spec.Severity }

// Mitre lists the rule's entries of ATT&CK.
func (r *Rule) Mitre() []v1alpha1.Mitre { return r.Spec.Mitre }

// Tags lists the rule's tags.
func (r *Rule) Tags() []string { return r.Spec.Tags }

// Compile checks and compiles a policy. An error is of type Errors and holds
// every problem that was found.
func (c *Compiler) Compile(o *Object) (*Policy, error) {
	check := checker{o: o}
	check.policy()
	if len(check.errs) > 0 {
		return nil, check.errs // expressions over broken lists would only repeat it
	}
	spec := o.Policy.Body()
	p := &Policy{Kind: o.Policy.PolicyKind(), Namespace: o.Policy.GetNamespace(), Name: o.Policy.GetName(), File: o.File,
		Generation: o.Policy.GetGeneration(), Digest: o.Digest, Mode: spec.Mode, scope: newScope(o.Policy)}
	if p.Mode == "" {
		p.Mode = v1alpha1.ModeAlert
	}
	if l := spec.RateLimit; l != nil {
		p.limit = &limit{int(l.Alerts), duration(l.Window)}
	}
	b := builder{o: o, p: p}
	if err := b.scope(c.env); err != nil {
		return nil, err
	}
	for i := range spec.Rules {
		p.Rules = append(p.Rules, b.rule(fmt.Sprintf("spec.rules[%d]", i), &spec.Rules[i]))
	}
	if len(b.errs) > 0 {
		return nil, b.errs
	}
	for _, r := range p.Rules {
		r.cost = costOf(r)
	}
	p.Warnings = b.warnings
	return p, nil
}

// A builder compiles one policy.
type builder struct {
	o        *Object
	p        *Policy
	s        *celenv.Scope
	errs     Errors
	warnings Errors
}

func (b *builder) scope(env *celenv.Env) error {
	spec := b.o.Policy.Body()
	lists := make(map[string][]string, len(spec.Lists))
	for _, l := range spec.Lists {
		lists[l.Name] = l.Values
	}
	scope := env.NewScope
	if b.p.Namespace != "" {
		scope = env.NewTenantScope
	}
	s, err := scope(lists)
	if err != nil {
		return Errors{b.o.problem("spec.lists", "%s", err)}
	}
	b.s = s
	for i, v := range spec.Variables {
		if err := s.AddVariable(v.Name, v.Expression); err != nil {
			b.failed(fmt.Sprintf("spec.variables[%d].expression", i), err)
		}
	}
	return b.errs.orNil() // rules that use a broken variable would only repeat it
}

func (b *builder) rule(field string, spec *v1alpha1.Rule) *Rule {
	r := &Rule{
		ID:        b.p.Kind + "/" + b.p.Namespace + "/" + b.p.Name + "/" + spec.Name,
		Namespace: b.p.Namespace, Policy: b.p.Name, Title: spec.Title, Generation: b.p.Generation, Digest: b.p.Digest,
		Spec: spec.DeepCopy(), Mode: spec.Mode, policy: b.p,
	}
	if r.Title == "" {
		r.Title = spec.Name
	}
	if r.Mode == "" || b.p.Mode == v1alpha1.ModeDisabled {
		r.Mode = b.p.Mode
	}
	if r.plain = spec.Message; r.plain == "" {
		r.plain = r.Title
	}
	for _, k := range spec.Events {
		kind, _ := event.KindByName(string(k)) // checked before
		r.kinds |= event.KindSet(kind)
	}
	r.condition = b.expression(field+".condition", r.kinds, func() (*celenv.Expr, error) { return b.s.Condition(spec.Condition) })
	if r.condition != nil && len(r.condition.Uses()) == 0 {
		b.warn(field+".condition", "it looks at nothing: it is the same for every event")
	}
	if spec.MessageExpression != "" {
		r.message = b.expression(field+".messageExpression", r.kinds, func() (*celenv.Expr, error) { return b.s.Message(spec.MessageExpression) })
	}
	for i, x := range spec.Exceptions {
		e := exception{name: x.Name}
		if x.ExpiresAt != nil {
			e.until = x.ExpiresAt.Time
		}
		at := fmt.Sprintf("%s.exceptions[%d].condition", field, i)
		e.applies = b.expression(at, r.kinds, func() (*celenv.Expr, error) { return b.s.Condition(x.Condition) })
		r.exceptions = append(r.exceptions, e)
	}
	if t := spec.Threshold; t != nil {
		r.threshold = b.repeats(field+".threshold.by", r.kinds, t.By, t.Window)
		r.threshold.count = int(t.Count)
	}
	if a := spec.Aggregate; a != nil {
		r.aggregate = b.repeats(field+".aggregate.by", r.kinds, a.By, a.Window)
	}
	return r
}

func (b *builder) repeats(field string, kinds event.Kinds, by []string, window string) *repeats {
	out := &repeats{window: duration(window)}
	for i, src := range by {
		out.by = append(out.by, b.expression(fmt.Sprintf("%s[%d]", field, i), kinds, func() (*celenv.Expr, error) { return b.s.Key(src) }))
	}
	return out
}

// duration reads a window that was checked before.
func duration(text string) time.Duration {
	d, _ := time.ParseDuration(text)
	return d
}

func (b *builder) expression(field string, kinds event.Kinds, compile func() (*celenv.Expr, error)) *celenv.Expr {
	x, err := compile()
	if err == nil {
		err = x.FilledBy(kindList(kinds))
	}
	if err != nil {
		b.failed(field, err)
		return nil
	}
	for _, w := range x.Warnings() {
		b.warn(field, "%s", w)
	}
	return x
}

func kindList(set event.Kinds) (list []event.Kind) {
	for _, k := range event.AllKinds() {
		if set.Has(k) {
			list = append(list, k)
		}
	}
	return list
}

func (b *builder) warn(field, format string, args ...any) {
	if len(b.warnings) < maxErrors {
		b.warnings = append(b.warnings, b.o.problem(field, format, args...))
	}
}

func (b *builder) failed(field string, err error) {
	var problems celenv.Errors
	if !errors.As(err, &problems) {
		problems = celenv.Errors{{Msg: err.Error()}}
	}
	for _, p := range problems {
		if len(b.errs) == maxErrors {
			return
		}
		e := b.o.problem(field, "%s", p)
		if p.Text != "" && p.Col > 0 {
			e.Snip = " | " + p.Text
			if n := p.Col - 1; n <= utf8.RuneCountInString(p.Text) {
				e.Snip += "\n | " + strings.Repeat(" ", n) + "^"
			}
		}
		b.errs = append(b.errs, e)
	}
}

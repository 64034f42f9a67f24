package policy

import (
	"cmp"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
)

// A Budget bounds what the policies of one namespace may cost a node, all of
// them together. Policies of the cluster have none.
type Budget struct {
	Rules  int           // rules; 0: 256
	Atoms  int           // texts and regular expressions the rules look for; 0: 8192
	Opaque int           // terms only CEL itself decides; 0: 64
	Time   time.Duration // of each second, spent on their rules; 0: 20 ms
}

func (b Budget) withDefaults() Budget {
	b.Rules, b.Atoms, b.Opaque = cmp.Or(b.Rules, 256), cmp.Or(b.Atoms, 8192), cmp.Or(b.Opaque, 64)
	b.Time = cmp.Or(b.Time, 20*time.Millisecond)
	return b
}

// Namespace says what the policies of a namespace cost, and what its budget
// leaves out.
type Namespace struct {
	Name                 string
	Rules, Atoms, Opaque int           // of the policies in force
	Time                 time.Duration // spent on them since the first was in force
	Skipped              uint64        // events their rules were not asked about: the time of a second was used up
	OverTime             bool          // that happened within the last minute
	OverBudget           []OverBudget  // policies that are not in force, by name
}

// OverBudget is a policy that its namespace's budget has no room for.
type OverBudget struct {
	Policy string // its name in the namespace
	Reason string
}

// tenantState is what a namespace has used. Its times are Config.clock's.
type tenantState struct {
	name   string
	budget time.Duration
	told   func(skipped uint64)

	// Of Evaluate's goroutine.
	second time.Duration // when the running second began
	used   time.Duration // in it

	spent    atomic.Int64 // ns, of all time
	skipped  atomic.Uint64
	lastOver atomic.Int64 // when an event was skipped last; 0 never

	cost cost         // of the policies in force; guarded by Engine.mu, as is over
	over []OverBudget // what there was no room for
}

// begin asks for time. Without any left in this second ok is false.
func (t *tenantState) begin(clock func() time.Duration) (start time.Duration, ok bool) {
	now := clock()
	if now-t.second >= time.Second {
		t.second, t.used = now, 0
	}
	if t.used < t.budget {
		return now, true
	}
	n := t.skipped.Add(1)
	if last := t.lastOver.Swap(int64(max(now, 1))); last == 0 || now-time.Duration(last) >= time.Minute {
		t.told(n)
	}
	return 0, false
}

func (t *tenantState) end(clock func() time.Duration, start time.Duration) {
	d := clock() - start
	t.used += d
	t.spent.Add(int64(d))
}

func (t *tenantState) overTime(clock func() time.Duration) bool {
	last := t.lastOver.Load()
	return last != 0 && clock()-time.Duration(last) < time.Minute
}

// cost is what budgets count.
type cost struct{ rules, atoms, opaque int }

func (c cost) add(o cost) cost {
	return cost{c.rules + o.rules, c.atoms + o.atoms, c.opaque + o.opaque}
}

// over says what of c is beyond b; empty: nothing.
func (b Budget) over(c cost) string {
	for _, x := range []struct {
		what    string
		n, most int
	}{{"rules", c.rules, b.Rules}, {"texts to look for", c.atoms, b.Atoms}, {"terms only CEL decides", c.opaque, b.Opaque}} {
		if x.n > x.most {
			return fmt.Sprintf("with it the namespace has %d %s; its budget on this node is %d", x.n, x.what, x.most)
		}
	}
	return ""
}

// costOf counts what a rule's condition and exceptions ask for.
func costOf(r *Rule) cost {
	c := cost{rules: 1}
	c.expr(r.condition)
	for i := range r.exceptions {
		c.expr(r.exceptions[i].applies)
	}
	return c
}

func (c *cost) expr(x *celenv.Expr) {
	n := x.Formula()
	if n == nil {
		c.opaque++ // all of it
		return
	}
	c.node(n)
}

func (c *cost) node(n *celenv.Node) {
	c.atoms += len(n.Texts)
	switch n.Op {
	case celenv.OpOpaque:
		c.opaque++
	case celenv.OpRegexp:
		c.atoms++
	}
	if n.Gate != nil {
		c.node(n.Gate)
	}
	for _, k := range n.Kids {
		c.node(k)
	}
}

// budgetLocked leaves out what namespaces exceed their budgets by: of each, by
// name, the policies that there is no room for any more.
func (e *Engine) budgetLocked(next *loaded) {
	tenants := make(map[string]*tenantState, len(next.groups))
	for i := range next.groups {
		g := &next.groups[i]
		if g.namespace == "" {
			continue
		}
		t := e.tenant[g.namespace]
		if t == nil {
			t = &tenantState{name: g.namespace, budget: e.cfg.Budget.Time, told: func(n uint64) {
				e.cfg.Log.Warn("the policies of a namespace used up their time; for the rest of such a second they are not asked",
					"namespace", g.namespace, "per_second", e.cfg.Budget.Time, "events_skipped", n)
			}}
		}
		tenants[g.namespace], g.tenant = t, t
		t.cost, t.over = cost{}, nil
		g.off = match.NewBits(len(g.rules))
		for j, p := range g.policies {
			sum := t.cost
			for _, r := range p.Rules {
				sum = sum.add(r.cost)
			}
			reason := e.cfg.Budget.over(sum)
			if reason == "" {
				t.cost = sum
				continue
			}
			for n := range p.Rules {
				g.off.Set(g.starts[j] + n)
			}
			t.over = append(t.over, OverBudget{p.Name, reason})
			e.cfg.Log.Warn("a policy is not in force: its namespace is over its budget", "policy", p.FullName(), "reason", reason)
		}
	}
	e.tenant = tenants
}

// Namespaces lists the namespaces that have policies, by name.
func (e *Engine) Namespaces() []Namespace {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]Namespace, 0, len(e.tenant))
	for _, t := range e.tenant {
		out = append(out, Namespace{
			Name: t.name, Rules: t.cost.rules, Atoms: t.cost.atoms, Opaque: t.cost.opaque,
			Time: time.Duration(t.spent.Load()), Skipped: t.skipped.Load(), OverTime: t.overTime(e.cfg.clock),
			OverBudget: slices.Clone(t.over),
		})
	}
	slices.SortFunc(out, func(a, b Namespace) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

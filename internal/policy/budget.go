package policy

import (
	"cmp"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/policy/celenv"
)

// A Budget bounds what the policies of namespaces may cost a node: all of one
// namespace together, and in time all namespaces. Policies of the cluster have
// none.
type Budget struct {
	Rules  int           // rules; 0: 256
	Atoms  int           // texts and regular expressions the rules look for; 0: 8192
	Opaque int           // terms only CEL itself decides; 0: 64
	Time   time.Duration // of each second, spent on their rules; 0: 20 ms
	All    time.Duration // of each second, spent on those of all namespaces; each is sure of an equal share. 0: 200 ms
}

// Untimed is a budget without bounds of time, for whoever judges events at a
// desk: what comes out must not depend on what else the machine does.
func Untimed() Budget { return Budget{Time: math.MaxInt64, All: math.MaxInt64} }

func (b Budget) withDefaults() Budget {
	b.Rules, b.Atoms, b.Opaque = cmp.Or(b.Rules, 256), cmp.Or(b.Atoms, 8192), cmp.Or(b.Opaque, 64)
	b.Time, b.All = cmp.Or(b.Time, 20*time.Millisecond), cmp.Or(b.All, 200*time.Millisecond)
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

// A pool is the time of all namespaces together. It belongs to Evaluate's
// goroutine, but for shares.
type pool struct {
	most   time.Duration // of each second
	second time.Duration // when the running second began
	used   time.Duration // in it
	shares atomic.Int64  // namespaces that have policies
}

// left says whether somebody who used that much may go on: each namespace is
// sure of its share, and of more only while others leave it.
func (p *pool) left(used time.Duration) bool {
	return p.used < p.most || used < p.most/time.Duration(max(1, p.shares.Load()))
}

// tenantState is what a namespace has used. Its times are Config.clock's.
type tenantState struct {
	name   string
	budget time.Duration
	pool   *pool
	log    *slog.Logger

	// Of Evaluate's goroutine.
	second time.Duration // when the running second began
	used   time.Duration // in it
	told   time.Duration // when the log was told last; 0 never

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
	if now-t.pool.second >= time.Second {
		t.pool.second, t.pool.used = now, 0
	}
	if t.used < t.budget && t.pool.left(t.used) {
		return now, true
	}
	n := t.skipped.Add(1)
	now = max(now, 1)
	t.lastOver.Store(int64(now))
	if t.told == 0 || now-t.told >= time.Minute {
		t.told = now
		t.log.Warn("the policies of a namespace used up their time; for the rest of such a second they are not asked",
			"namespace", t.name, "per_second", t.budget, "events_skipped", n)
	}
	return 0, false
}

func (t *tenantState) end(clock func() time.Duration, start time.Duration) {
	d := clock() - start
	t.used += d
	t.pool.used += d
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

// fit is the part of a group that its namespace's budget has room for, and
// what it has none for: of the policies by name, the first that is too much and
// all that follow. What is left out costs nothing more.
func (b Budget) fit(g *group) (in *group, c cost, out []OverBudget) {
	in = &group{namespace: g.namespace, first: g.first, rules: g.rules, policies: g.policies, starts: g.starts}
	if g.namespace == "" {
		return in, c, nil
	}
	for i, p := range g.policies {
		sum := c
		for _, r := range p.Rules {
			sum = sum.add(r.cost)
		}
		reason := b.over(sum)
		if reason == "" {
			c = sum
			continue
		}
		in.rules, in.policies, in.starts = g.rules[:g.starts[i]], g.policies[:i], g.starts[:i]
		for _, p := range g.policies[i:] {
			out = append(out, OverBudget{p.Name, reason})
			reason = "it comes after " + g.policies[i].Name + ", for which there was no room"
		}
		break
	}
	return in, c, out
}

// tenantsLocked accounts for the namespaces of a set that is about to be in
// force. What they used so far stays used.
func (e *Engine) tenantsLocked(next *loaded) {
	tenants := make(map[string]*tenantState, len(next.groups))
	for i := range next.groups {
		g := &next.groups[i]
		if g.namespace == "" {
			continue
		}
		t := e.tenant[g.namespace]
		if t == nil {
			t = &tenantState{name: g.namespace, pool: &e.pool, log: e.cfg.Log, budget: e.cfg.Budget.Time}
		}
		t.cost, t.over = g.cost, g.over
		tenants[g.namespace], g.tenant = t, t
		for _, o := range g.over {
			e.cfg.Log.Warn("a policy is not in force: its namespace is over its budget", "policy", fullName(g.namespace, o.Policy), "reason", o.Reason)
		}
	}
	e.tenant = tenants
	e.pool.shares.Store(int64(len(tenants)))
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

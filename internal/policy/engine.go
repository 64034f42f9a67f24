package policy

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
)

// Config configures an Engine. The zero value works.
type Config struct {
	// Node is the value of node.name; empty when it is not known.
	Node string
	// NodeLabels are what nodeSelector looks at. Nil: not known, and rules
	// with a nodeSelector are at best undecided.
	NodeLabels map[string]string
	// Budget bounds what each namespace's policies may cost.
	Budget Budget
	// DryRun is called for each match of a rule in dry run, on the goroutine
	// of Evaluate. Nil: such matches are only counted.
	DryRun func(*Match)
	// Log is told when a rule fails: once for each rule of a set, the rest is
	// counted. Nil: nobody is.
	Log *slog.Logger

	clock func() time.Duration // for tests; nil: the machine's
}

// An Engine evaluates rules. Evaluate, Reconsider, Tick and Flush are called
// from one goroutine; Swap, Set, Stats and Namespaces from any.
type Engine struct {
	cfg    Config
	env    *celenv.Env
	loaded atomic.Pointer[loaded]

	// Of Evaluate's goroutine.
	act     *celenv.Activation
	view    view
	holds   map[string]*holder // by namespace
	clock   clock
	pool    pool
	current *loaded // what the last event was judged by
	places  map[*event.Workload]*place
	classes map[string]*class // those of current, by content

	mu     sync.Mutex                // guards what follows
	rules  map[string]*counters      // by rule
	hits   map[string]*atomic.Uint64 // by exception
	tenant map[string]*tenantState   // by namespace
	counts []*class                  // what Evaluate counts in, for Stats
}

// loaded is a set that was made ready: meters and matchers.
type loaded struct {
	set    *Set
	meters []meter      // of the set's rules
	groups []readyGroup // of the set's groups
	told   []bool       // of each rule: its failure was logged; Evaluate's goroutine only
}

// readyGroup is what of a group is in force, with what evaluates it.
type readyGroup struct {
	*group
	matcher *match.Matcher
	cost    cost
	over    []OverBudget // policies that are not in force
	tenant  *tenantState // nil for the cluster's
}

// NewEngine makes an engine without rules, for sets of policies compiled by c.
func NewEngine(c *Compiler, cfg Config) *Engine {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.clock == nil {
		start := time.Now()
		cfg.clock = func() time.Duration { return time.Since(start) }
	}
	cfg.Budget = cfg.Budget.withDefaults()
	e := &Engine{cfg: cfg, env: c.env, act: c.env.NewActivation(cfg.Node), holds: map[string]*holder{}}
	e.pool.most = cfg.Budget.All
	e.act.SetNodeLabels(cfg.NodeLabels)
	empty := &loaded{set: new(Set)}
	e.loaded.Store(empty)
	e.adopt(empty, nil)
	return e
}

// Set is the set in force.
func (e *Engine) Set() *Set { return e.loaded.Load().set }

// Swap puts a set in force, from the next event on. A rule that was there
// before goes on counting; the counts of rules that are gone are dropped. What
// a namespace's policies exceed its budget by is left out, see Namespaces. An
// error is a mistake of ours; the set in force then stays.
func (e *Engine) Swap(s *Set) error {
	old := e.loaded.Load()
	next := &loaded{set: s, told: make([]bool, len(s.rules))}
	for _, g := range s.groups {
		var r readyGroup
		r.group, r.cost, r.over = e.cfg.Budget.fit(g)
		if same := old.same(r.group); same != nil {
			r.matcher = same.matcher
		} else {
			var err error
			if r.matcher, err = match.New(e.env, matchRules(r.group)); err != nil {
				return fmt.Errorf("put rules in force: %w", err)
			}
		}
		next.groups = append(next.groups, r)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tenantsLocked(next)
	next.meters = e.metersLocked(s)
	e.loaded.Store(next)
	return nil
}

func matchRules(g *group) []match.Rule {
	rules := make([]match.Rule, len(g.rules))
	for i, r := range g.rules {
		rules[i] = match.Rule{Condition: r.condition, Kinds: r.kinds}
		for _, x := range r.exceptions {
			rules[i].Exceptions = append(rules[i].Exceptions, x.applies)
		}
	}
	return rules
}

// same finds a group whose rules are the same, and whose matcher will do.
func (l *loaded) same(g *group) *readyGroup {
	for i := range l.groups {
		if old := &l.groups[i]; old.namespace == g.namespace && slices.Equal(old.rules, g.rules) {
			return old
		}
	}
	return nil
}

// Evaluate judges ev by every rule in force and calls emit for each match: see
// Match for what belongs to whom. ev is only read, and not kept.
//
// It reports whether a rule stayed undecided, or was not asked, because it was
// not known which pod the process runs in: Reconsider is for when it is.
func (e *Engine) Evaluate(ev *event.Event, emit func(*Match)) (open bool) {
	l := e.loaded.Load()
	if l != e.current {
		e.adopt(l, emit)
	}
	e.advance(ev, emit)
	c := e.classOf(ev)
	if c == nil {
		return false
	}
	c.events.Add(1)
	if len(c.parts) > 0 {
		e.act.Reset(ev)
	}
	open = len(c.unplaced) > 0
	for i := range c.parts {
		open = e.part(l, &c.parts[i], ev, emit) || open
	}
	return open && incomplete(ev.Process.Workload)
}

// part judges ev by the rules of one group. It reports whether one of them is
// undecided.
func (e *Engine) part(l *loaded, p *part, ev *event.Event, emit func(*Match)) (undecided bool) {
	g := &l.groups[p.group]
	if g.tenant != nil {
		start, ok := g.tenant.begin(e.cfg.clock)
		if !ok {
			p.overBudget.Add(1)
			return false
		}
		defer func() { g.tenant.end(e.cfg.clock, start) }()
	}
	for _, hit := range g.matcher.Evaluate(e.act, p.rules) {
		n := g.first + hit.Rule
		r, m := l.set.rules[n], l.meters[n]
		v := verdict{truth: hit.Truth, err: hit.Err, exception: -1}
		if v.truth == celenv.True && p.some && p.unsure.Has(hit.Rule) {
			v.truth = celenv.Undecided
		}
		e.exceptions(g.matcher, hit.Rule, r, ev.Time, &v)
		undecided = undecided || v.truth == celenv.Undecided || v.unsure
		if v.err != nil && !l.told[n] {
			l.told[n] = true
			e.cfg.Log.Warn("rule failed; further failures of it are only counted", "rule", r.ID, "err", v.err)
		}
		if m.account(r, v, ev.Time) {
			e.settle(r, m, v, ev, emit)
		}
	}
	return undecided
}

// incomplete says whether more may become known of where a process runs.
func incomplete(w *event.Workload) bool {
	return placeOf(w) == event.PlaceUnknown || w.PodUID != "" && (w.Pod == nil || w.ContainerName == "" && !w.Sandbox)
}

// A verdict is what a rule says about an event.
type verdict struct {
	truth     celenv.Truth
	exception int   // the one that silenced it; -1 none
	unsure    bool  // an exception could not be decided
	late      bool  // it was undecided at first
	err       error // the last failure
}

// exceptions asks whether what matched is known and wanted.
func (e *Engine) exceptions(m *match.Matcher, rule int, r *Rule, now time.Time, v *verdict) {
	for i := range r.exceptions {
		x := &r.exceptions[i]
		if !x.until.IsZero() && !now.Before(x.until) {
			continue
		}
		got := m.Exception(rule, i)
		if got.Truth == celenv.True {
			v.exception = i
			return
		}
		if got.Truth != celenv.False {
			v.unsure = true
		}
		if got.Err != nil {
			v.err = fmt.Errorf("exception %s: %w", x.name, got.Err)
		}
	}
}

// account counts a verdict that is not False and says whether it is a match.
func (m meter) account(r *Rule, v verdict, now time.Time) bool {
	if v.err != nil {
		m.fail(v.err)
	}
	if v.exception >= 0 {
		m.suppressed.Add(1)
		m.hits[v.exception].Add(1)
		return false
	}
	switch v.truth {
	case celenv.True:
		m.matched.Add(1)
		m.lastMatch.Store(now.UnixNano())
		if v.unsure {
			m.unsure.Add(1)
		}
		return true
	case celenv.Undecided:
		m.undecided.Add(1)
	default:
		m.errors.Add(1)
	}
	if r.alerting() {
		m.undecidedAlerts.Add(1)
	}
	return r.alerting()
}

// settle takes a match on its way: threshold, aggregate, rate limit, emit.
func (e *Engine) settle(r *Rule, m meter, v verdict, ev *event.Event, emit func(*Match)) {
	h := e.holder(r.Namespace)
	var stands *Aggregated
	if r.threshold != nil {
		if stands = h.count(e.act, r, m, ev); stands == nil {
			m.belowThreshold.Add(1)
			return
		}
	}
	var w *window
	if r.aggregate != nil {
		var repeat bool
		if w, repeat = h.window(e, r, m, v, ev, emit); repeat {
			m.aggregated.Add(1)
			h.repeat(e, w, v, ev, emit)
			return
		}
	}
	if r.Mode != v1alpha1.ModeDryRun && !h.allow(r.policy) {
		m.rateLimited.Add(1)
		return
	}
	match := e.match(r, m, v, ev)
	match.Aggregated = stands
	e.hand(match, m, emit)
	if w != nil {
		w.first = match.Seq
	}
}

// hand gives a match to whoever it is for.
func (e *Engine) hand(match *Match, m meter, emit func(*Match)) {
	if match.Rule.Mode == v1alpha1.ModeDryRun {
		m.dryRun.Add(1)
		if match.DryRun = true; e.cfg.DryRun != nil {
			e.cfg.DryRun(match)
		}
		return
	}
	m.alerts.Add(1)
	emit(match)
}

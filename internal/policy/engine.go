package policy

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
)

// Config configures an Engine. The zero value works.
type Config struct {
	// Node is the value of node.name; empty when it is not known.
	Node string
	// DryRun is called for each match of a rule in dry run, on the goroutine
	// of Evaluate. Nil: such matches are only counted.
	DryRun func(*Match)
	// Log is told when a rule fails: once for each rule of a set, the rest is
	// counted. Nil: nobody is.
	Log *slog.Logger
}

// An Engine evaluates rules. Evaluate is called from one goroutine; Swap, Set
// and Stats from any.
type Engine struct {
	cfg    Config
	act    *celenv.Activation // of Evaluate's goroutine
	loaded atomic.Pointer[loaded]

	mu    sync.Mutex                // guards what follows; taken by Swap alone
	rules map[string]*counters      // by rule
	hits  map[string]*atomic.Uint64 // by exception
}

// loaded is a set and the meters of its rules, in the same order.
type loaded struct {
	set    *Set
	meters []meter
	told   []bool // of each rule: its failure was logged; Evaluate's goroutine only
}

// NewEngine makes an engine without rules, for sets of policies compiled by c.
func NewEngine(c *Compiler, cfg Config) *Engine {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Engine{cfg: cfg, act: c.env.NewActivation(cfg.Node)}
	e.loaded.Store(&loaded{set: new(Set)})
	return e
}

// Set is the set in force.
func (e *Engine) Set() *Set { return e.loaded.Load().set }

// Swap puts a set in force, from the next event on. A rule that was there
// before goes on counting; the counts of rules that are gone are dropped.
func (e *Engine) Swap(s *Set) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.loaded.Store(&loaded{set: s, meters: e.metersLocked(s), told: make([]bool, len(s.rules))})
}

// Evaluate judges ev by every rule in force and calls emit for each match. The
// match belongs to the receiver. ev is only read, and not kept.
func (e *Engine) Evaluate(ev *event.Event, emit func(*Match)) {
	l := e.loaded.Load()
	rules := l.set.rulesFor(ev)
	if len(rules) == 0 {
		return
	}
	e.act.Reset(ev)
	// One by one. An evaluator that shares work between rules would replace
	// this loop: it has the whole set and the event here.
	for _, i := range rules {
		r, m := l.set.rules[i], l.meters[i]
		v := e.judge(r, ev.Time)
		if v.err != nil && !l.told[i] {
			l.told[i] = true
			e.cfg.Log.Warn("rule failed; further failures of it are only counted", "rule", r.ID, "err", v.err)
		}
		if !m.account(r, v, ev.Time) {
			continue
		}
		match := e.match(r, m, v)
		if r.Mode == v1alpha1.ModeDryRun {
			m.dryRun.Add(1)
			if match.DryRun = true; e.cfg.DryRun != nil {
				e.cfg.DryRun(match)
			}
			continue
		}
		m.alerts.Add(1)
		emit(match)
	}
}

// A verdict is what a rule says about an event.
type verdict struct {
	truth     celenv.Truth
	exception int   // the one that silenced it; -1 none
	unsure    bool  // an exception could not be decided
	err       error // the last failure
}

// judge evaluates condition and exceptions. A panic in there is a bug, of ours
// or of the library; it becomes a failed rule, and the next one is evaluated.
func (e *Engine) judge(r *Rule, now time.Time) (v verdict) {
	defer func() {
		if p := recover(); p != nil {
			v = verdict{truth: celenv.Failed, exception: -1, err: fmt.Errorf("panic: %v", p)}
		}
	}()
	v.exception = -1
	if v.truth, v.err = r.condition.Truth(e.act); v.truth == celenv.False {
		return v
	}
	for i := range r.exceptions {
		x := &r.exceptions[i]
		if !x.until.IsZero() && !now.Before(x.until) {
			continue
		}
		t, err := x.applies.Truth(e.act)
		if t == celenv.True {
			v.exception = i
			return v
		}
		if t != celenv.False {
			v.unsure = true
		}
		if err != nil {
			v.err = fmt.Errorf("exception %s: %w", x.name, err)
		}
	}
	return v
}

// account counts a verdict and says whether it is a match.
func (m meter) account(r *Rule, v verdict, now time.Time) bool {
	m.evaluated.Add(1)
	if v.truth == celenv.False {
		return false
	}
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

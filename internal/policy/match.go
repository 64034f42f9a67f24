package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/celenv"
	"github.com/procession-dev/procession/internal/policy/match"
)

// Bounds of a Match.
const (
	MaxMessage  = 2048 // bytes of the message
	MaxEvidence = 1024 // bytes of one value in the evidence
)

// A Match says that a rule matched an event. It belongs to the receiver; the
// event does not.
type Match struct {
	Rule *Rule

	// Event is what an alert may tell of what happened: the event itself, or,
	// for a rule of a namespace, what that may see of it. It is valid until
	// the receiver returns. Of a summary it is a copy of the first repeat.
	Event *event.Event

	// Seq is set by the receiver: the number under which it keeps the alert,
	// which a summary of its repeats refers to.
	Seq uint64

	// Aggregated is set when the alert stands for several matches.
	Aggregated *Aggregated

	// Late: the rule was undecided when it happened, because it was not known
	// where the process runs.
	Late bool

	// Message is what the alert says: valid UTF-8, one line for what comes
	// out of an expression, nothing in it that moves a cursor or hides text.
	Message string

	// Evidence lists the terms of the condition that spoke for the match, in
	// its order, with the values they compared; the exceptions that were
	// considered; and what was not known.
	Evidence []Evidence

	// Undecided: the rule could not be decided and says to alert then, or it
	// matched and an exception could not be decided.
	Undecided bool

	// DryRun: the rule is in dry run.
	DryRun bool
}

// Evidence is a variable of a rule, the value it had and what it meant.
// Without a Name it is an exception that was considered: its condition is the
// Term, and Truth says why it did not silence.
type Evidence struct {
	Name    string
	Text    string // valid UTF-8, but else what the process chose
	Missing bool

	Term      string   // the part of the expression that looked at it, as CEL writes it
	Truth     string   // of that part: true, false, undecided, failed
	Exception string   // whose the part is; empty: the condition's
	Found     []string // of the texts the part looks for, the ones that were there
}

// message renders the rule's message for the event at hand. A panic in there
// is a failure like another: the match must not be lost for it.
func (e *Engine) message(r *Rule, m meter) (text string) {
	if r.message == nil {
		return cut(r.plain, MaxMessage)
	}
	defer func() {
		if p := recover(); p != nil {
			m.messageEr.Add(1)
			text = cut(r.plain, MaxMessage)
		}
	}()
	s, ok := r.message.Text(e.act)
	if !ok {
		m.messageEr.Add(1)
		return cut(r.plain, MaxMessage)
	}
	return cut(printable(s, MaxMessage), MaxMessage)
}

func (e *Engine) match(r *Rule, m meter, v verdict, ev *event.Event) *Match {
	if r.Namespace != "" {
		ev = e.view.of(ev)
	}
	return &Match{
		Rule: r, Event: ev, Undecided: v.truth != celenv.True || v.unsure, Late: v.late,
		Message:  e.message(r, m),
		Evidence: e.evidence(r, ev.Time),
	}
}

// evidence collects what spoke for the match: the terms that were true, the
// exceptions that were considered, and all that was not known. A match without
// it is better than none.
func (e *Engine) evidence(r *Rule, now time.Time) (list []Evidence) {
	defer func() {
		if p := recover(); p != nil {
			list = []Evidence{{Name: "evidence", Text: "not available: " + cut(fmt.Sprint(p), 256)}}
		}
	}()
	list = e.terms(nil, r.condition, "", func(t *match.Term) bool { return t.Decisive() })
	for i := range r.exceptions {
		x := &r.exceptions[i]
		if len(list) >= maxEvidence || !x.until.IsZero() && !now.Before(x.until) {
			continue
		}
		t := match.Decide(e.act, x.applies).Truth
		list = append(list, Evidence{Exception: x.name, Term: cut(printable(x.applies.Source(), maxTerm), maxTerm), Truth: t.String()})
		if t != celenv.False {
			list = e.terms(list, x.applies, x.name, func(*match.Term) bool { return false })
		}
	}
	return list
}

// Bounds of the evidence of a match.
const (
	maxEvidence = 64  // elements
	maxTerm     = 512 // bytes of a term, and of a text that was found
)

// terms appends the terms of an expression that counted, and those that could
// not be decided.
func (e *Engine) terms(list []Evidence, x *celenv.Expr, exception string, counts func(*match.Term) bool) []Evidence {
	terms := match.Terms(e.act, x, MaxEvidence, func(t *match.Term) bool {
		return t.Truth == celenv.Undecided || t.Truth == celenv.Failed || counts(t)
	})
	if x.Formula() == nil { // CEL alone can say, and does not say how
		terms = []match.Term{{Text: x.Source(), Truth: celenv.True, Values: x.Values(e.act, MaxEvidence)}}
	}
	for i := range terms {
		t := &terms[i]
		for _, v := range t.Values {
			if len(list) == maxEvidence {
				return list
			}
			y := Evidence{Name: v.Name, Text: v.Text, Missing: v.Missing, Term: cut(t.Text, maxTerm), Truth: t.Truth.String(), Exception: exception}
			for _, f := range t.Found {
				y.Found = append(y.Found, cut(f, maxTerm))
			}
			list = append(list, y)
		}
	}
	return list
}

// printable escapes what a terminal would obey or not show, the way Go
// quotes: control characters, and the formatting ones that reorder text.
// Beyond limit bytes it stops: the rest would be cut anyway.
func printable(s string, limit int) string {
	clean := true
	for _, r := range s {
		if !unicode.IsPrint(r) {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case b.Len() > limit:
			return b.String()
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	return b.String()
}

// cut keeps at most limit bytes of s, and says when it cut.
func cut(s string, limit int) string {
	const mark = " …"
	if len(s) <= limit {
		return s
	}
	n := limit - len(mark)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + mark
}

// Package match decides thousands of conditions about one event at once.
//
// A Matcher takes the formulas of checked expressions apart into terms and
// shares equal ones between all rules. Texts are looked for together: each
// field of an event is read once, by one automaton, and only rules for which
// something was found that they cannot be true without are looked at. Numbers,
// regular expressions and what only CEL itself can decide are evaluated when a
// rule asks, at most once for an event.
//
// Promises:
//
//   - The verdict on a rule is that of celenv.Expr.Truth, for every event,
//     also where facts are missing: False, True, Undecided or Failed. A test
//     holds the two against each other.
//   - Evaluate allocates nothing, but for terms that CEL decides (Info names
//     them) and for the first time a text is longer than all before.
//   - A rule that panics has Failed; the others are decided.
//   - What is found is the same whichever other rules there are.
//
// Nothing is lost here: every active rule that is not False is reported.
//
// A Matcher belongs to one goroutine, as an Activation does; Rule and Explain
// may be called by that goroutine alone as well.
package match

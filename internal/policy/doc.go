// Package policy judges events: it turns policies into a Set of compiled
// rules, and an Engine evaluates the Set over one event after another.
//
//	Parse ──► Compiler.Compile ──► NewSet ──► Engine.Swap
//	text      one policy           all        in force from the next event on
//
// Promises:
//
//   - A policy is taken whole or refused whole. What is refused says file,
//     line, policy, rule, field and the place in the expression. A field that
//     is not known is refused, never ignored.
//   - A rule is true, false or undecided. What could not be read never turns
//     into a match or into silence: it is counted as undecided, and raises an
//     alert where the rule says so.
//   - An exception silences only when it is surely true.
//   - A rule that fails or panics is counted, and harms no other rule.
//   - Every evaluation is accounted for: see Stats.
//   - Policies, rules and sets do not change once they are made. Swap is
//     atomic: an event is judged by the old set or by the new one, whole.
//
// Nothing is lost here. A match is handed to the caller before Evaluate
// returns; what becomes of it then is the caller's affair.
package policy

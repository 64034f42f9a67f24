// Package policy judges events: it turns policies into a Set of compiled
// rules, and an Engine evaluates the Set over one event after another.
//
//	Parse ──► Compiler.Compile ──► NewSet ──► Engine.Swap
//	text      one policy           all        in force from the next event on
//
// A rule's event goes this way: scope, condition, exceptions, threshold,
// aggregation, rate limit, and then to the receiver. A scope is resolved once
// for a workload, into the set of rules that look at it.
//
// Promises:
//
//   - A policy is taken whole or refused whole. What is refused says file,
//     line, policy, rule, field and the place in the expression. A field that
//     is not known is refused, never ignored.
//   - A rule is true, false or undecided. What could not be read, of the
//     process or of where it runs, never turns into a match or into silence: it
//     is counted as undecided, and raises an alert where the rule says so.
//   - An exception silences only when it is surely true.
//   - Aggregation holds back repeats and nothing else: another executable,
//     user, severity, lineage or container is raised at once. What is held back
//     is summed up at the end of the window, or earlier when there is no room.
//   - A policy of a namespace sees nothing outside the namespace's pods, and
//     nothing it says has an effect on other policies. Beyond its namespace's
//     budget it is left out or not asked, alone, and that is told: Namespaces.
//   - A rule that fails or panics is counted, and harms no other rule.
//   - Every event and every match is accounted for, by rule and cause: Stats.
//   - Policies, rules and sets do not change once they are made. Swap is
//     atomic: an event is judged by the old set or by the new one, whole.
//
// Lost here: counts towards a threshold when there is no room for them (Stats.
// Forgotten), and what is beyond a rate limit (RateLimited, SummaryLimited). A
// match is handed to the caller before Evaluate returns; what becomes of it
// then is the caller's affair.
package policy

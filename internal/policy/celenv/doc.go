// Package celenv is the language of the rules: CEL over flat, dotted, typed
// variables (process.exe, parent.name, pod.namespace), each of which is filled
// from an event.Event.
//
// A variable is declared once, in the tables of vars.go. What the checker
// knows, what an Activation resolves, and the reference page docs/rules.md all
// come from there; a test fails when the page is not what the tables say.
//
// There are three truth values. A fact that could not be read is missing, not
// empty: an expression that needs it is Undecided, unless the rest of it
// decides. An expression that fails (an index out of range, a key that is not
// there) is Failed, unless the rest decides.
//
// Text is made valid UTF-8 before an expression sees it, and a command line
// longer than MaxText keeps its head and its tail (process.truncated says so):
// one long argument list must not be able to stop the agent.
//
// What an expression can cost is bounded when it is compiled: its length,
// nesting and number of nodes, the functions it may call, regular expressions
// known at compile time only, no comprehension inside another.
//
// Variables and functions may be added; none is renamed, retyped or removed.
//
// An Env and an Expr are immutable and safe for concurrent use; an Activation
// belongs to one goroutine.
package celenv

// Package author holds the commands for people who write policies: lint says
// what is wrong or odd, test runs the cases that stand beside a policy,
// explain says why an event does or does not match, and replay what a changed
// policy would have made of a recording.
//
// Everything is judged by the code that runs on the nodes: internal/policy
// compiles and evaluates, policytest runs the cases, replay makes events of a
// recording. Nothing here needs root, the kernel's connector or a cluster, and
// the same input gives the same output on every machine.
//
// Exit codes mean the same for every command: 0 all is well, 1 there is
// something to see (findings, failed cases, a difference), 2 it could not be
// told (wrong command line, a file that cannot be read, a policy that does not
// compile where a compiled one is needed).
//
// Policies, events and recordings are other people's text: reads are bounded,
// what stands in events is escaped before a terminal sees it, and folders are
// walked without following links to folders, so that a walk ends.
package author

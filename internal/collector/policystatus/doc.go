// Package policystatus sums up what nodes report of their policies, and writes
// it into the status of the policy objects.
//
// Promises:
//
//   - Only nodes that report now are counted: one that fell silent neither holds
//     a policy back nor stands for it.
//   - What changes in a condition or a count of nodes is written within seconds,
//     to one policy every five at most; what only counts matches, once a minute
//     at most, and for all policies together every five seconds: each write goes
//     to every agent that watches.
//   - Of several collectors that share a store one writes.
//   - Nothing waits for it: an API server that refuses costs alerts nothing. It
//     is told in the log and in a metric, and tried again.
//   - A status has the same size on ten nodes and on ten thousand.
package policystatus

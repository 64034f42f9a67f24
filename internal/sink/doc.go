// Package sink brings what the store holds to where people and machines look:
// one Runner per destination, each in its own goroutine with its own cursor in
// the store.
//
// Promises:
//
//   - Every record reaches every sink at least once, in the order of cursors,
//     each time with the same id. The cursor moves after the sink has said that
//     it has the records, so a crash in between delivers them again.
//   - A sink that is slow or fails delays nobody else: not the acks of agents,
//     not other sinks. It is tried again, with growing pauses, for ever.
//   - Rejected and damaged records and losses are delivered like alerts. No
//     record stops a sink.
package sink

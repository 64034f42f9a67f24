// Package forward sends what the spool holds to the collector, over one gRPC
// stream, and moves the spool's cursor when the collector acknowledges. The
// protocol, for both sides, is docs/protocol.md.
//
// Promises:
//
//   - Every number of every epoch in the spool is sent, as a record or as part
//     of a loss, in order within an epoch, earlier epochs first.
//   - Nothing counts as delivered before the collector says that it is on its
//     disk. What was sent and not acknowledged is sent again after a
//     reconnection, from where the collector's store says.
//   - A slow or dead collector holds nobody up: at most a window of batches is
//     in flight, the rest stays in the spool.
//   - Records the disk refuses are sent from memory.
//
// Nothing is lost here; what the spool lost is reported as it says.
package forward

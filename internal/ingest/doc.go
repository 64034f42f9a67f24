// Package ingest is the collector's end of the agents' streams: it learns who
// speaks, checks every size and field, hands batches to the store's queue and
// acknowledges what the store has on disk.
//
// Promises:
//
//   - Who an agent is comes from its credentials alone (Config.Identify,
//     Config.Tokens). The node named in a Hello is a hint; another name is
//     logged and counted, and changes nothing. A token is looked at again while
//     its stream lives, and one that ends without a successor ends the stream.
//   - An Ack is sent after the commit that holds everything up to it. Where to
//     go on after a Hello is asked through the same queue, behind whatever an
//     older stream of the agent left in it. This package never decides what is
//     new; the store does.
//   - A record that is no item (bad checksum, undecodable, too large) is stored
//     as rejected, with its reason, and acknowledged: it neither stops the lane
//     nor disappears. So is an item of a kind that only a newer agent knows; of
//     that all bytes are kept. Only what is wrong with a message as a whole, or
//     a gap without a Loss, ends the stream.
//   - Memory is bounded: at most Window batches of a stream wait for the disk,
//     and at most two streams of a node live; a third ends the oldest.
//
// Every record that was read from a stream is counted once more: by the queue
// (stored, rejected, duplicate, gap, failed) or here as refused.
package ingest

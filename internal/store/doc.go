// Package store keeps what agents delivered: alerts, records that had to be
// rejected, losses, how far each agent has been heard (marks), and how far
// each sink has come (cursors).
//
// Promises:
//
//   - What Commit accepted is on the disk when it returns. One Commit is one
//     transaction: records, marks and cursors are there together or not at all.
//   - Exactly once. The mark of (node, epoch) says up to where everything is
//     stored or settled. Only Commit reads and moves it, in the transaction
//     that writes the records, so whatever a cut stream left behind in a queue
//     cannot be stored a second time (the fence). Nobody else may decide what
//     is new.
//   - No silent hole. A batch that would leave a gap behind the mark is refused
//     (GapError); a range that is gone for good is stored as a Loss, which
//     sinks are told like an alert. When an epoch ended below the highest
//     number its agent was heard to give out, Commit adds that Loss itself.
//   - Cursors only grow: a record's Cursor is above that of every record
//     committed before it, also after old records were removed.
//   - Bytes are checked: a payload whose CRC32C no longer fits is read as
//     Damaged, never as an alert.
//
// A full disk makes Commit fail with ErrFull and changes nothing; the same
// store works again once there is room.
//
// Queue is the way to write: it gathers what waits into one Commit, because
// the disk's sync is what a commit costs.
package store

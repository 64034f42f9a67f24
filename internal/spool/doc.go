// Package spool is a bounded log on disk of opaque records, between what makes
// them and what sends them. The format and the recovery are in
// docs/spool-format.md.
//
// Promises:
//
//   - A record is named by the epoch of the run that made it, 16 random bytes,
//     and a sequence number from 1. No name is used twice, whatever the disk
//     forgets.
//   - Read returns a record after it was synced to disk, or, when the disk
//     refuses to write or has had it for longer than Patience, marked as not
//     durable.
//   - Every number that was given out is read as a record or as part of a
//     Loss with its reason, in order and without a hole. Damage costs the
//     records it touches; those behind it are read.
//   - No read returns bytes other than those appended: each record has a CRC32C.
//   - Append waits for no disk. What finds no room is a Loss.
//   - Older records give way to newer ones above MaxBytes, whole segments at
//     a time.
//
// A kill -9 loses what was not yet synced, and the next Open names it: a Loss
// with the reason Crash. A power cut does the same, but may forget that
// numbers were given out at all.
package spool

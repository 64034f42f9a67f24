// Package present turns alerts and events into text: JSON for machines, lines
// for people. The agent's `events` command, the collector's sinks and the
// command line all show the same thing in the same words because all of them
// call this package.
//
// Names, arguments and paths are chosen by the processes that are watched, so
// every string here is hostile until it was escaped. The package promises:
//
//   - JSON output is one line of valid UTF-8 and valid JSON for any message,
//     also for one that no agent of ours would send.
//   - JSON output is complete. Text that is not UTF-8 has U+FFFD in the string
//     and, beside it, the true bytes in base64 under the same key with "Raw".
//   - A fact that is missing in the message is a missing key, not an empty one.
//   - Neither JSON nor lines contain a control, bidirectional or invisible
//     character: a terminal, a log viewer or a browser shows what is there.
//   - In lines each argument is one word and escapes can be undone, so that
//     arguments cannot pass for other columns.
//
// Lines are for eyes: with a width they are cut, and say so with an ellipsis.
// JSON is never cut; docs/events.md lists its keys.
//
// All Append functions append to dst and allocate nothing when dst has room.
package present

// Package proctable knows every process of the node: who it is, what it runs,
// and whom it descends from. It turns what the kernel said (event.Record) into
// what happened to whom (event.Event).
//
// What it promises:
//
//   - Identity is pid and start time. A pid that comes back with another start
//     is another process; the old one is retired and keeps its children. A
//     start known to the nanosecond, one cut to a clock tick by /proc, and one
//     estimated from a fork's time stamp are the same if they can be: each
//     process has a window its start lies in, which only ever narrows.
//   - Lineage survives. A process that ended is remembered as long as any
//     descendant is, with its name, program, arguments and ids, up to the
//     process everything comes from. Process.Parent is the creator, PPID the
//     real parent: they differ for CLONE_PARENT and for orphans.
//   - Facts that are missing stay missing: an exec of which something could not
//     be read does not show the old program's. Facts of a fork come from the
//     creator, with SourceLineage.
//   - Every record is reported, or counted as one of: a thread's, a repeat,
//     already told by a rescan, malformed (Stats: Applied is their sum).
//   - Memory is bounded, in processes and in bytes of text; what the bound
//     costs is counted.
//   - Without /proc and with a FixedClock the same records give the same
//     events: a recording can be replayed.
//
// # Id changes and threads
//
// Ids belong to threads. When a program with n threads calls setresuid(2), the
// C library makes each thread call it, and the kernel sends n events. The
// table reports the first and drops the others (Stats.Repeats): an event is a
// repeat if it comes from another thread of the process, within RepeatWindow
// of the change last reported for that process, and leaves exactly the same
// ids. Anything else is reported, so a thread that changes its ids alone, by
// the raw system call, is never hidden: the first to do so is an event with
// Before from the process, and Process then shows the ids of the thread that
// changed last. A thread that reaches ids the process already shows, but after
// the window, is reported with HasBefore false, as its own ids before are not
// known. Exec and fork records carry the true ids and settle the matter.
//
// # The end of the first thread
//
// The kernel tells the end of a process's first thread as an Exit of the
// process. Usually it is. If the first thread alone ended (pthread_exit in
// main) the process goes on, and no later message tells its end. The Exit is
// reported when it is heard; before the process is forgotten /proc is asked,
// and as long as it is alive it is kept as such (Stats.LeaderExits). An exec by
// one of its threads revives it at once (Stats.Revived).
//
// # Time
//
// Event.Stamp orders events; Event.Time is for people. It is the wall clock as
// of when the event is handled, minus the time since then by the monotonic
// clock: if the wall clock is stepped back, events after the step show earlier
// times than those before it, and stay in the order of their stamps. Start
// times count time asleep (CLOCK_BOOTTIME), stamps do not (CLOCK_MONOTONIC):
// the table follows the difference between the two and allows for a suspend
// it has not placed exactly.
//
// # Losses
//
// Rescan compares the table with /proc after records were lost and reports
// what it finds as Synthetic events. What happened and was over in between
// (a process that came and went) stays lost; the loss itself is counted by
// who had it. A record that arrives after a rescan already told its content is
// not reported twice (Stats.Late).
//
// A Table belongs to one goroutine; only Stats may be called from others. The
// Processes it hands out are its own: they are to be read only by that
// goroutine, and until its next call of a method other than Lookup. They are
// reused after their process is forgotten.
package proctable

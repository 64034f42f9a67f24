package proctable

import "sync/atomic"

// Stats counts what a Table did. All but the first three only grow.
type Stats struct {
	Live       uint64 // processes alive now
	Remembered uint64 // processes that ended and are still known
	TextBytes  uint64 // bytes of names, paths and arguments held

	// Applied records, and what became of them:
	// Applied = Reported + Threads + Repeats + Late + Malformed.
	Applied   uint64
	Reported  uint64
	Threads   uint64 // of a thread, not of a process: its making, end, or name
	Repeats   uint64 // the same id change, told by a further thread
	Late      uint64 // a rescan had told it already
	Malformed uint64 // impossible ids or kind

	Unknown     uint64 // the subject of a record, or its peer, was not in the table
	Stale       uint64 // records about an earlier process with the same pid
	Replaced    uint64 // pids that came back with another start before an Exit was heard
	Revived     uint64 // processes that ran exec after their Exit
	LeaderExits uint64 // processes found alive although their first thread ended

	Evicted   uint64 // remembered processes forgotten before their time, for want of room
	Spliced   uint64 // links of a lineage left out, for want of room or in endless chains
	Untracked uint64 // processes not kept, as the table was full of live ones
	Trimmed   uint64 // programs of which less text is kept than configured, for want of room

	ParentsAsked   uint64 // parents looked up in /proc
	ParentsMissing uint64 // of these, not found
	Completed      uint64 // cut records that /proc completed
	Incomplete     uint64 // cut records that /proc could not complete
	Stuck          uint64 // reads of /proc given up because the process did not let them end
	ScanErrors     uint64 // processes a scan could not read, other than those that had ended

	Scans, Rescans uint64
	Synthetic      uint64 // events found by rescans
}

// counters is Stats as the owner counts. Only the owner writes; anyone may
// read a counter at any time, so a sum read meanwhile may be off by the event
// being handled.
type counters struct {
	live, remembered, textBytes                         atomic.Int64
	applied, reported, threads, repeats, late           atomic.Uint64
	malformed, unknown, stale, replaced, revived        atomic.Uint64
	leaderExits, evicted, spliced, untracked, trimmed   atomic.Uint64
	parentsAsked, parentsMissing, completed, incomplete atomic.Uint64
	stuck, scanErrors, scans, rescans, synthetic        atomic.Uint64
}

// Stats may be called from any goroutine.
func (t *Table) Stats() Stats {
	c := &t.count
	return Stats{
		Live: uint64(c.live.Load()), Remembered: uint64(c.remembered.Load()), TextBytes: uint64(c.textBytes.Load()),
		Applied: c.applied.Load(), Reported: c.reported.Load(), Threads: c.threads.Load(),
		Repeats: c.repeats.Load(), Late: c.late.Load(), Malformed: c.malformed.Load(),
		Unknown: c.unknown.Load(), Stale: c.stale.Load(), Replaced: c.replaced.Load(),
		Revived: c.revived.Load(), LeaderExits: c.leaderExits.Load(),
		Evicted: c.evicted.Load(), Spliced: c.spliced.Load(), Untracked: c.untracked.Load(), Trimmed: c.trimmed.Load(),
		ParentsAsked: c.parentsAsked.Load(), ParentsMissing: c.parentsMissing.Load(),
		Completed: c.completed.Load(), Incomplete: c.incomplete.Load(),
		Stuck: c.stuck.Load(), ScanErrors: c.scanErrors.Load(),
		Scans: c.scans.Load(), Rescans: c.rescans.Load(), Synthetic: c.synthetic.Load(),
	}
}

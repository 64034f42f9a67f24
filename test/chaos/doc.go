// Command chaos breaks everything that can break between the kernel and the
// sinks, again and again, and then compares what agents had durably spooled
// with what the store and each sink hold. See docs/operations.md.
//
// It runs the real agent and collector processes on the real kernel, each with
// its state on a file system of its own, and a relay between them. A breach is
// any of: a record that was on an agent's disk, or acknowledged to an agent, and
// is neither in the store nor within a stored loss; a number stored twice; a
// hole; records of an epoch out of order; a stored record that a sink was not
// offered.
//
// Clocks are broken one process at a time: the programs are built with a time.Now
// that adds what this one says, and are the released ones in all else. Not broken:
// the clock of the PostgreSQL server, and the monotonic ones, which nobody can set.
package main

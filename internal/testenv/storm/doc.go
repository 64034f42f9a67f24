// Package storm makes processes and threads as fast as the machine can, and
// counts them. For tests.
//
// What makes them is a program of this package's assembly, one page in an
// anonymous file, that runs once per maker, each on a CPU of its own. Nothing
// in it takes time that the kernel does not take: a task's memory is that one
// page, which it shares with its maker or has a copy of, so that it runs without
// a page fault; nobody waits for a process that has ended, the kernel is told
// so. The tasks themselves are what they are called, and a message of the
// process connector tells each one's beginning, each one's end, and what it
// does in between.
package storm

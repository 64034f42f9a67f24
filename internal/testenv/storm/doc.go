// Package storm makes processes and threads as fast as the machine can, and
// counts them: each is one message of the process connector when it begins and
// one when it ends, and does nothing in between. For tests; a process of its
// own should make the storm.
//
// A new task runs a few instructions of this package's assembly and ends. One
// that shares its maker's memory touches no stack. Forks, whose cost is the
// copying of their maker's memory map, are made by a program of one page that
// is written into an anonymous file.
package storm

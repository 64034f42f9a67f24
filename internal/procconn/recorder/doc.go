// Package recorder writes down what the kernel's process connector tells, in
// the very task that did it, at the moment it did it.
//
// Load builds an eBPF socket filter for the running kernel, and Attach puts it
// on the caller's own connector socket. The kernel then runs the filter inside
// the task that execs, forks, exits or changes its ids, before that task goes
// on: nothing can be over before it is read, and no /proc file has to be
// opened. The filter writes one record with all facts into a ring buffer and
// returns 0, so that no message is queued and nobody is woken. Drain hands the
// records over as event.Record. There is no object file and no compiler: the
// program is assembled at run time, from the type information (BTF) of the
// running kernel. It is gone with the socket.
//
// # Promises
//
//   - A record is about the task that it names: each is written by that task.
//     Facts that could not be read are missing (event.Facts.Have), never empty
//     or zero in disguise.
//   - The message counts: every wanted message is counted as Seen, and then
//     either as Recorded (it is in the ring and Drain will deliver it) or as
//     Lost (the ring was full). Seen = Recorded + Lost, per CPU, exactly.
//     Messages that the kernel could not send at all are counted as Gap, from
//     the connector's own sequence numbers, before anything is selected.
//   - Only the kernel is heard. A message of another program is counted as
//     Forged and goes no further.
//   - Order is the order of the ring: per CPU that of the connector; across CPUs
//     nearly (a few microseconds), so sort by Stamp where it matters.
//   - Drain allocates nothing. The record and all text in it are valid during
//     the call only.
//   - A record that does not decode is counted (Malformed) and left out; then
//     delivered + malformed = recorded.
//
// # What may be missing
//
// Text is bounded: argv to 2 KiB (its true length is kept), the executable's
// path to 64 components and mounts or about 4,000 bytes, the cgroup path to 16
// levels; a mark says so. Before Attach nothing is counted. PTRACE_TRACEME makes no
// message in the kernel, and a uid or gid change shows the new ids only.
//
// # What it needs
//
// Linux 5.10 or later with BTF, amd64 or arm64; CAP_BPF and CAP_PERFMON (5.10
// with a low memory lock limit also CAP_SYS_RESOURCE). Kernel lockdown up to
// "integrity" is fine; "confidentiality" is not. Where something is missing
// Load returns ErrUnsupported with the reason.
//
// The layout of a record is declared once, in layout.go, for the program that
// writes it and the Decoder that reads it; docs/record-format.md draws it. The
// Decoder builds on every platform, so that captured records can be replayed
// anywhere.
package recorder

// Package procconn turns the kernel's process connector into event.Records.
//
// Open returns only when events are proven to arrive: the kernel acknowledged
// our request and an event that we made ourselves came back. From then on
// nothing is missed in silence. What the kernel or this package could not hand
// over is counted exactly and told to the Handler as a Loss; the caller is
// expected to scan /proc again. A heartbeat proves life ever after, because
// before Linux 6.6 any privileged process can silence every listener.
//
// There are two ways to see. The recorder (package recorder) is an eBPF filter
// that writes down every fact in the task itself, at the moment of the event.
// Where the kernel refuses it, classic filters and real-time threads read the
// facts of an exec from /proc before the process gets a chance to run on; that
// is a race which these threads nearly always win, and what they lose is a
// missing fact, never a wrong one. Which way is used, why, and what it costs
// is in Status.
//
// Order: by time stamp. The recorder hands over records in the order in which
// the kernel wrote them. The fall-back merges several sockets and holds events
// back for 10 ms; what is later than that comes late, and is counted.
//
// May be lost, and where it is counted: a full ring or socket buffer, gaps in
// the connector's own numbers (recorder only), too many events held back to be
// put in order (fall-back only): Stats.Lost. Facts that could not be read: Stats.Facts.
// What does not come from the kernel is dropped: Stats.Forged.
//
// Decode and Message build on every platform; the rest says ErrNotSupported
// where there is no Linux.
package procconn

// Package source turns a directory of policy files into a rule set, and keeps
// the set as the directory is.
//
// Promises:
//
//   - A change of the directory is in force within a second: files that were
//     written, renamed into it, removed, and Kubernetes' way of swapping a
//     link. What no notification tells (a link whose target changed) is found
//     within RescanEvery.
//   - A policy that is broken keeps its last good version in force; the other
//     policies of the same file are taken. Each Update says which policy is
//     in which state, and why.
//   - A policy leaves when its file, or it alone out of its file, is removed;
//     never because something is broken. If the directory itself cannot be
//     read any more, everything stays in force.
//   - The name of a policy is unique. Of two files with the same one, the one
//     that was there first stays; the other is refused, and the error names
//     both.
package source

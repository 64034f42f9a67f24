// Package probe has no code, only tests that ask a kernel what it offers to
// Procession, without any of Procession's code: whether a process event
// arrives, type information of kernel and modules, limits. They are the first
// thing to run on a kernel that is new to the matrix; their FACT lines go into
// its table.
package probe

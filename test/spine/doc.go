// Package spine tests the product as its user runs it: the built binaries,
// the real kernel, real files, real gRPC, on this machine.
package spine

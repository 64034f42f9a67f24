// Package processionv1 is the language that agent and collector share: alerts
// with everything that is known of the processes in them, and the protocol
// that delivers each of them once (docs/protocol.md). It is generated from
// the .proto files beside this one; only this file is written by hand.
package processionv1

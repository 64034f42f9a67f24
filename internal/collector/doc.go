// Package collector composes the collector: certificate authority, store,
// ingest and sinks. It alone knows flags and files of configuration.
//
// It starts in an order in which nothing is accepted that could not be kept
// (state, authority, port, then the rest), and stops in the order of the flow:
// agents are asked to go, what they sent is committed and acknowledged, sinks
// catch up for a bounded time, cursors are stored, the store is closed.
package collector

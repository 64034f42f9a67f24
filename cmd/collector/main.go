// Command collector receives alerts from agents, keeps them, and brings them to
// sinks. See internal/collector.
package main

import (
	"os"

	"github.com/procession-dev/procession/internal/collector"
)

// version is set by the linker (see the Makefile).
var version = "unknown"

func main() { os.Exit(collector.Main(version, os.Args[1:], os.Stdout, os.Stderr)) }

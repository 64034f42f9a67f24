// Command agent is Procession's node agent: it hears process events from the
// kernel, judges them and delivers alerts. agent --help lists its commands.
package main

import (
	"os"

	"github.com/procession-dev/procession/internal/agent"
)

// version is set by the linker (see the Makefile).
var version = "unknown"

func main() {
	os.Exit(agent.Main(os.Args[1:], os.Stdout, os.Stderr, version))
}

// Command procession is the command line for people: those who write
// policies. As kubectl-procession on the PATH it is kubectl procession.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/procession-dev/procession/internal/author"
	"github.com/procession-dev/procession/internal/query"
)

// version is set by the linker (see the Makefile).
var version = "unknown"

const help = `%[1]s is the command line of Procession for people.

Usage:
  %[1]s policy    write detection policies: lint, test, explain, replay
  %[1]s version   print the version

On the collector's machine, with --state DIR of that collector:
` + query.Help + `
"%[1]s COMMAND --help" explains a command and shows examples. None of them
needs root, a cluster or an agent.

Linked or copied to a folder of the PATH under the name kubectl-procession,
the same program is "kubectl procession".
`

func main() {
	name := "procession"
	if strings.HasPrefix(filepath.Base(os.Args[0]), "kubectl-") {
		name = "kubectl procession"
	}
	args := os.Args[1:]
	cmd := ""
	if len(args) > 0 {
		cmd = args[0]
	}
	switch cmd {
	case "policy", "policies":
		io := author.IO{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Name: name + " policy"}
		os.Exit(author.Main(args[1:], io))
	case "version", "--version":
		fmt.Println(name, version)
	case "help", "--help", "-h":
		fmt.Printf(help, name)
	case "":
		fmt.Fprintf(os.Stderr, help, name)
		os.Exit(author.ExitUsage)
	case "nodes", "alerts", "sink", "backup":
		ask(name, cmd, args[1:])
	default:
		fmt.Fprintf(os.Stderr, "%s: unknown command %.64q; %s --help lists them\n", name, cmd, name)
		os.Exit(author.ExitUsage)
	}
}

// ask asks the collector that runs on this machine.
func ask(name, cmd string, args []string) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch err := query.Command(ctx, cmd, args, os.Stdout); {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.Is(err, query.ErrUsage):
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", name, cmd, err)
		os.Exit(author.ExitUsage)
	default:
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", name, cmd, err)
		os.Exit(1)
	}
}

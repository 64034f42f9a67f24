// Package agent composes the node agent from its parts and is the only home
// of its flags. It owns the lifecycle: parts start in the order of the flow
// and stop in it, so that what was alerted is spooled and what was spooled is
// offered to the collector before the process ends.
package agent

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/procconn"
)

// Exit codes. Scripts may rely on them.
const (
	exitOK          = 0
	exitFailure     = 1 // something went wrong while running
	exitUsage       = 2 // the command line is wrong
	exitUnsupported = 3 // process events cannot be had here
)

const help = `agent hears what processes do on this machine, judges it, and delivers alerts.

Usage:
  agent run      judge events against policies and deliver alerts to a collector
  agent events   print process events as they happen
  agent record   write what the kernel says to a file
  agent replay   judge a recording again
  agent spool    look into the alerts that wait on disk (dump, verify)
  agent version  print the version

"agent COMMAND --help" explains a command. run, events and record need root (or
CAP_NET_ADMIN, CAP_BPF and CAP_PERFMON) in the host's pid and network namespace;
replay needs nothing, and works on other systems.

Exit codes: 0 done, 1 failed while running, 2 wrong command line,
3 process events cannot be had here.
`

// A usageError is a wrong command line.
type usageError struct{ error }

func usagef(format string, args ...any) error {
	return usageError{fmt.Errorf(format, args...)}
}

// Main runs one command line and returns the exit code.
func Main(args []string, stdout, stderr io.Writer, version string) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, help)
		return exitUsage
	}
	cmd, args := args[0], args[1:]
	var err error
	switch cmd {
	case "run":
		err = runCommand(args, stdout, stderr, version)
	case "events":
		err = eventsCommand(args, stdout, stderr)
	case "record":
		err = recordCommand(args, stdout, stderr)
	case "replay":
		err = replayCommand(args, stdout, stderr)
	case "spool":
		err = spoolCommand(args, stdout, stderr)
	case heartbeatCommand: // of a running agent: being run is all there is to it
		return exitOK
	case "version", "--version":
		fmt.Fprintln(stdout, "agent", version)
	case "help", "--help", "-h":
		fmt.Fprint(stdout, help)
	default:
		err = usagef("unknown command %q; agent --help lists them", cmd)
	}
	return exitCode(err, stderr, cmd)
}

func exitCode(err error, stderr io.Writer, cmd string) int {
	var usage usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitOK
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "agent %s: %v\n", cmd, err)
		return exitUsage
	case errors.Is(err, procconn.ErrNotSupported), errors.Is(err, procconn.ErrPermission):
		fmt.Fprintf(stderr, "agent %s: %v\n", cmd, err)
		return exitUnsupported
	default:
		fmt.Fprintf(stderr, "agent %s: %v\n", cmd, err)
		return exitFailure
	}
}

// newFlags makes a flag set that neither exits nor prints by itself; parse
// prints the explanation when it is asked for.
func newFlags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return fs
}

// parse parses args. A wrong command line is a usageError in one line; --help
// prints about, which begins with the usage, and the flags to out and returns
// flag.ErrHelp.
func parse(fs *flag.FlagSet, about string, args []string, out io.Writer, groups ...present.FlagGroup) error {
	if err := parseFlags(fs, about, args, out, groups); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return usagef("unexpected argument %q; agent %s --help explains the flags", fs.Arg(0), fs.Name())
	}
	return nil
}

// parseOne is parse for a command with one argument, before or behind its
// flags; arg is "" when there is none.
func parseOne(fs *flag.FlagSet, about string, args []string, out io.Writer) (arg string, err error) {
	for {
		if err := parseFlags(fs, about, args, out, nil); err != nil {
			return "", err
		}
		switch {
		case fs.NArg() == 0:
			return arg, nil
		case arg != "":
			return "", usagef("unexpected argument %q; agent %s --help explains", fs.Arg(0), fs.Name())
		}
		arg, args = fs.Arg(0), fs.Args()[1:]
	}
}

func parseFlags(fs *flag.FlagSet, about string, args []string, out io.Writer, groups []present.FlagGroup) error {
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(out, "%s\n", strings.TrimLeft(about, "\n"))
		return cmp.Or(present.WriteFlags(out, fs, groups...), err)
	case err != nil:
		return usagef("%w; agent %s --help explains the flags", err, fs.Name())
	}
	return nil
}

// checkCapture finds a wrong --recorder, --drain or --duration before anything
// is started.
func checkCapture(recorder string, drain, duration time.Duration) error {
	if !slices.Contains([]string{"auto", "off", "require"}, recorder) {
		return usagef("--recorder: %.32q is none of auto, off, require", recorder)
	}
	if drain != 0 && (drain < time.Millisecond || drain > 50*time.Millisecond) {
		return usagef("--drain: %v is outside 1ms to 50ms", drain)
	}
	if duration < 0 {
		return usagef("--duration: %v is negative; 0 is without an end", duration)
	}
	return nil
}

// untilSignal returns a context that ends at the first SIGINT or SIGTERM;
// after that the signals have their default effect, so that a second kills.
func untilSignal(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(parent, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

func newLog(w io.Writer, format, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usagef("--log-level: %q is none of debug, info, warn, error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, usagef("--log-format: %q is neither text nor json", format)
}

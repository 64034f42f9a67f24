package author

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"github.com/procession-dev/procession/internal/present"
)

// Exit codes. Scripts may rely on them.
const (
	ExitOK       = 0 // all is well
	ExitFindings = 1 // findings, failed cases, a difference
	ExitUsage    = 2 // it could not be told: wrong command line, unreadable files
)

// IO is what a command reads and writes, and how it is called.
type IO struct {
	In       io.Reader // what "-" as a file stands for
	Out, Err io.Writer
	Name     string // of the program in messages: procession policy
}

const help = `%[1]s: write detection policies, and know what they do before they are applied.

Usage:
  %[1]s lint PATH...                          what is wrong, or odd, or slow
  %[1]s test PATH...                          run the test cases of policies
  %[1]s explain POLICY... --event FILE        why an event matches or does not
  %[1]s replay RECORDING --policies DIR       what recorded events raise
      [--against OLD]                                  ... and what changed

The way of a rule, from the first idea to the cluster:

  agent events --format json > events.json      as root: do the thing, and see its event
  $EDITOR my-rules.yaml                         write a condition over what you saw
  %[1]s lint my-rules.yaml
  %[1]s explain my-rules.yaml --event events.json
  $EDITOR my-rules.test.yaml                    keep the event as a case
  %[1]s test my-rules.yaml
  kubectl apply -f my-rules.yaml

A PATH is a file, a folder (with all in it), or - for standard input. Files of
test cases end in .test.yaml, and are found beside the policy or in a folder
named tests beside it.

Exit codes: 0 all is well; 1 findings, failed cases or a difference;
2 wrong command line, or something could not be read.

"%[1]s COMMAND --help" explains a command and shows examples.
docs/writing-policies.md walks through all of it; docs/rules.md has the language.
`

// A usageError is a wrong command line, an unreadableError a file that cannot
// be used.
type (
	usageError      struct{ error }
	unreadableError struct{ error }
)

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// errFindings is the answer of a command that has shown what it found.
var errFindings = errors.New("findings")

// Main runs one command line and returns the exit code.
func Main(args []string, io IO) int {
	if len(args) == 0 {
		fmt.Fprintf(io.Err, help, io.Name)
		return ExitUsage
	}
	commands := map[string]func([]string, IO) error{"lint": lintCommand, "test": testCommand, "explain": explainCommand, "replay": replayCommand}
	name := args[0]
	switch run := commands[name]; {
	case run != nil:
		return exitCode(run(args[1:], io), name, io)
	case name == "help" || name == "--help" || name == "-h":
		fmt.Fprintf(io.Out, help, io.Name)
		return ExitOK
	}
	fmt.Fprintf(io.Err, "%s: unknown command %.64q; %s --help lists them\n", io.Name, name, io.Name)
	return ExitUsage
}

func exitCode(err error, name string, io IO) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return ExitOK
	case errors.Is(err, errFindings):
		return ExitFindings
	}
	fmt.Fprintf(io.Err, "%s %s: %v\n", io.Name, name, err)
	return ExitUsage
}

// A command is what all of them share: their flags and their output.
type command struct {
	io     IO
	name   string
	flags  *flag.FlagSet
	format string // text or json
	color  string
	style  style
}

func newCommand(name string, io_ IO) *command {
	c := &command{io: io_, name: name, flags: flag.NewFlagSet(name, flag.ContinueOnError)}
	c.flags.SetOutput(io.Discard)
	c.flags.StringVar(&c.format, "format", "text", "text, or json for machines")
	c.flags.StringVar(&c.color, "color", "auto", "colours: auto (on a terminal, unless NO_COLOR is set), always, never")
	return c
}

// parse reads flags and arguments, in any order. --help prints usage and about
// and gives flag.ErrHelp.
func (c *command) parse(args []string, usage, about string) (rest []string, err error) {
	for {
		err := c.flags.Parse(args)
		switch {
		case errors.Is(err, flag.ErrHelp):
			text := strings.ReplaceAll(strings.TrimLeft(about, "\n"), "{policy}", c.io.Name)
			fmt.Fprintf(c.io.Out, "Usage: %s %s %s\n\n%s\n", c.io.Name, c.name, usage, text)
			return nil, cmp.Or(present.WriteFlags(c.io.Out, c.flags), err)
		case err != nil:
			return nil, usagef("%w; %s %s --help explains the flags", err, c.io.Name, c.name)
		}
		stopped := len(args) > c.flags.NArg() && args[len(args)-c.flags.NArg()-1] == "--"
		if args = c.flags.Args(); len(args) == 0 {
			break
		}
		if stopped { // whatever follows is a name
			rest = append(rest, args...)
			break
		}
		rest, args = append(rest, args[0]), args[1:]
	}
	if c.format != "text" && c.format != "json" {
		return nil, usagef("--format: %.64q is neither text nor json", c.format)
	}
	s, _, err := present.StyleFor(c.io.Out, c.color)
	if err != nil {
		return nil, usagef("--color: %w", err)
	}
	c.style = style{color: s.Color, width: s.Width}
	return rest, nil
}

// json writes v as one indented object.
func (c *command) json(v any) error {
	return writeJSON(c.io.Out, v)
}

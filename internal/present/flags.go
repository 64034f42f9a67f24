package present

import (
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
)

// A FlagGroup is a heading of a command's help, with the flags under it.
type FlagGroup struct {
	Title string
	Flags []string
}

// WriteFlags explains the flags of a command for a terminal of 80 columns: with
// two hyphens, as documents write them, by group, and what is in no group at
// the end under "Flags".
func WriteFlags(w io.Writer, fs *flag.FlagSet, groups ...FlagGroup) error {
	rest := FlagGroup{Title: "Flags"}
	fs.VisitAll(func(f *flag.Flag) {
		if !slices.ContainsFunc(groups, func(g FlagGroup) bool { return slices.Contains(g.Flags, f.Name) }) {
			rest.Flags = append(rest.Flags, f.Name)
		}
	})
	var b strings.Builder
	for i, g := range append(slices.Clip(groups), rest) {
		if len(g.Flags) == 0 {
			continue
		}
		if i > 0 && b.Len() > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s:\n", g.Title)
		for _, name := range g.Flags {
			if f := fs.Lookup(name); f != nil {
				writeFlag(&b, f)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func writeFlag(b *strings.Builder, f *flag.Flag) {
	value, usage := flag.UnquoteUsage(f)
	b.WriteString("  --" + f.Name)
	if value != "" {
		b.WriteString(" " + value)
	}
	switch d := f.DefValue; d {
	case "", "0", "0s", "false":
	default:
		if !strings.Contains(usage, "(default") {
			usage += " (default " + d + ")"
		}
	}
	const indent, width = "      ", 80
	col := width
	for _, word := range strings.Fields(usage) {
		if col+1+len(word) > width {
			b.WriteString("\n" + indent + word)
			col = len(indent) + len(word)
			continue
		}
		b.WriteString(" " + word)
		col += 1 + len(word)
	}
	b.WriteByte('\n')
}

package policy

import (
	"fmt"
	"strings"
)

// An Error says what is wrong with a policy, and where. Empty parts are not
// known, or not meant.
type Error struct {
	File   string // as the caller named it
	Line   int    // in the file, from 1; 0 not known
	Policy string // metadata.name
	Rule   string // name of the rule
	Field  string // path of the field: spec.rules[2].condition
	Msg    string // what is wrong; for an expression it begins with line:column in it
	Snip   string // the line of the expression, with a mark under the place
}

// Error gives it all in one line, the way compilers do, and the snippet below.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d", e.Line)
	}
	if e.Policy != "" {
		fmt.Fprintf(&b, ": policy %s", e.Policy)
	}
	if e.Rule != "" {
		fmt.Fprintf(&b, ": rule %s", e.Rule)
	}
	if e.Field != "" {
		fmt.Fprintf(&b, ": %s", e.Field)
	}
	fmt.Fprintf(&b, ": %s", e.Msg)
	if e.Snip != "" {
		b.WriteString("\n" + e.Snip)
	}
	return strings.TrimPrefix(b.String(), ": ")
}

// Errors are all the problems that were found. Every error of Parse, Compile
// and NewSet is of this type.
type Errors []*Error

// Error gives all of them, one after another.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, x := range e {
		lines[i] = x.Error()
	}
	return strings.Join(lines, "\n")
}

// orNil avoids an error that is not nil and holds nothing.
func (e Errors) orNil() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

// maxErrors bounds what is reported about one file or policy.
const maxErrors = 32

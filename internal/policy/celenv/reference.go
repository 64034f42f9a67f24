package celenv

import (
	"fmt"
	"strings"
)

// Reference writes the page docs/rules.md, all that a rule can say.
func (e *Env) Reference() []byte {
	var b strings.Builder
	b.WriteString(introduction)
	section := ""
	for _, v := range e.Variables() {
		root, _, _ := strings.Cut(v.Name, ".")
		if root != section {
			section = root
			fmt.Fprintf(&b, "\n### %s\n\n", root)
			if r := relationDoc(root); r != "" {
				fmt.Fprintf(&b, "%s The fields mean what they mean for process; all are missing when it is not known.\n\n", r)
			}
			b.WriteString("| Variable | Type | Events | Meaning |\n|---|---|---|---|\n")
		}
		kinds := "all"
		if v.Kinds != 0 {
			kinds = kindList(v.Kinds)
		}
		doc := v.Doc
		if relationDoc(root) != "" {
			doc = "see process." + strings.TrimPrefix(v.Name, root+".")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", v.Name, cell(v.Type), kinds, cell(doc))
	}
	b.WriteString("\n### Fields of the elements of ancestors\n\n")
	fmt.Fprintf(&b, "`%s`. They mean what they mean for process.\n", strings.Join(processFieldNames(), "`, `"))
	b.WriteString("\n## Functions and operators\n\nThere are no others: what could use memory or time without bound is left out.\n\n| Name | Example | Meaning |\n|---|---|---|\n")
	for _, f := range e.Functions() {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", cell(f.Name), cell(f.Use), cell(f.Doc))
	}
	fmt.Fprintf(&b, bounds, maxBytes, maxNodes, maxDepth, maxRegexSize, maxGrowing, maxFiller)
	return []byte(b.String())
}

func relationDoc(name string) string {
	for _, r := range relations {
		if r.name == name {
			return r.doc
		}
	}
	return ""
}

// cell makes text fit for a cell of a table.
func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

const introduction = `# Writing rules

<!-- Made from internal/policy/celenv by "go test ./internal/policy/celenv -run Reference -update". Do not edit. -->

A rule is a [CEL](https://cel.dev) expression over what happened and to whom. This page is all it can say: language
version 1. Within a version variables and functions are added, never renamed, retyped or removed.

` + "```yaml" + `
apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata:
  name: remote-shells
spec:
  lists:
    - name: shells
      values: [sh, bash, dash, ash, zsh, ksh]
  variables:
    - name: isShell
      expression: process.name in lists.shells
  rules:
    - name: dev-tcp
      title: Shell with a network redirection
      events: [Exec]
      condition: variables.isShell && process.cmdline.containsAny(['/dev/tcp/', '/dev/udp/'])
      severity: High
      messageExpression: "process.name + ' talks to the network: ' + process.cmdline"
      exceptions:
        - name: wait-for-database
          condition: process.cmdline.endsWith('</dev/tcp/db/5432')
          reason: The start script waits for the database.
          expiresAt: "2027-06-30T00:00:00Z"
` + "```" + `

Every field of a policy is explained in api/v1alpha1/types.go.

## What is missing

A fact that could not be read is *missing*. That is not the same as empty: a process may be gone before its working
directory could be read, a pod may not be known yet. An expression that needs a missing fact is *undecided*, unless the
rest decides: ` + "`a || b`" + ` is true when either side is, ` + "`a && b`" + ` is false when either side is. So
` + "`process.name != 'nginx'`" + ` does not become true because the name is not known.

- An undecided condition is counted. With ` + "`onUndecided: Alert`" + ` it raises an alert as well, marked as undecided.
- An exception silences only when it is surely true. One that is undecided does not silence; the alert is then marked as
  undecided, because it might have been silenced.
- An expression that fails (` + "`process.args[7]`" + ` of three, a label that is not there) is counted as an error and
  treated like an undecided one.
- A process of which it is not known whether it runs in a container is looked at by rules for containers and by rules
  for hosts.
- In a messageExpression missing text reads "?".

## Which name is a program's?

` + "`process.exe`" + ` is the file: only who can write that file can forge it, but all of busybox is one file, and /bin/sh is
dash somewhere and bash elsewhere. ` + "`process.name`" + ` is the name it was started by, and a link is enough to forge it.
` + "`process.argv0`" + ` is whatever the caller wrote. To find a tool, ask for the file **or** the name; to except one, ask for
the file, in a folder that the process cannot write.

Text is bytes that a process chose. What is not UTF-8 is replaced by U+FFFD. Comparisons are exact: use
` + "`lowerAscii()`" + ` where case shall not matter.

## Variables

"Events" are the kinds of event that fill the variable. A rule whose ` + "`events`" + ` has another kind cannot use it.
`

const bounds = `
## Bounds

An expression has at most %d bytes and %d nodes, is nested at most %d deep, and has no exists, all or filter inside
another. A regular expression compiles to at most %d instructions and stands in quotes. replace, join and format stand in
it at most %d times, none inside another; what they put in has at most %d bytes. What a policy may hold at most
stands in api/v1alpha1/types.go.
`

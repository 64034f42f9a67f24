package author

import (
	"fmt"
	"strings"

	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/policy/policytest"
)

const testHelp = `
Runs test cases: files of events and the alerts they should raise, judged by
the code that runs on the nodes. An alert nobody expects is a failure, and so is
a rule that is undecided where the case does not say so. Every rule needs a case
that expects it and one that calls it quiet.

A PATH is a file of cases (NAME.test.yaml), a policy, whose cases stand beside it
or in a folder named tests beside it, or a folder with all of that.

  {policy} test my-rules.yaml
  {policy} test deploy/helm/procession/policies
  {policy} test --format json . | jq '.files[].cases[] | select(.ok == false)'

A file of cases:

  policies: [my-rules.yaml]
  cases:
    - name: a shell that talks to the network
      events:
        - kind: Exec
          process: {exe: /usr/bin/bash, name: bash, args: [bash, -c, "cat < /dev/tcp/10.0.0.9/80"]}
          container: c1
          pod: {namespace: shop, name: web-0}
      expect: [{rule: shell-to-network, severity: High}]
    - name: a shell that does not
      events:
        - {kind: Exec, process: {exe: /usr/bin/bash, name: bash, args: [bash]}}
      quiet: [shell-to-network]

What a case does not give about a process is known and empty; what could not be
read stands under missing: [exe, args, ...]. An event as "agent events --format
json" prints it may be used as it is; in it, what is not there is missing.
docs/writing-policies.md has everything a case may say.

Exit codes: 0 all passed and every rule is covered; 1 failures, or rules
without cases; 2 something could not be read or compiled.
`

// testOutput is what test --format json writes.
type testOutput struct {
	OK        bool           `json:"ok"`
	Passed    int            `json:"passed"`
	Failed    int            `json:"failed"`
	Files     []testFile     `json:"files"`
	Rules     []ruleCoverage `json:"rules"`
	Uncovered []string       `json:"uncovered"` // what is missing, in words
	Errors    []string       `json:"errors"`    // what could not be run
}

type testFile struct {
	File  string     `json:"file"`
	Cases []testCase `json:"cases"`
}

type testCase struct {
	Name     string   `json:"name"`
	OK       bool     `json:"ok"`
	Events   int      `json:"events"`
	Alerts   int      `json:"alerts"`
	Failures []string `json:"failures"`
}

type ruleCoverage struct {
	Rule     string `json:"rule"`
	File     string `json:"file"`
	Positive int    `json:"positive"`
	Negative int    `json:"negative"`
}

func testCommand(args []string, io IO) error {
	c := newCommand("test", io)
	quiet := c.flags.Bool("quiet", false, "show failures and the sum only")
	paths, err := c.parse(args, "PATH...", testHelp)
	if err != nil {
		return err
	}
	if len(paths) == 0 {
		return usagef("a file or a folder is missing; %s test --help explains", io.Name)
	}
	t := look(paths)
	t.beside()
	compiler, err := policy.NewCompiler()
	if err != nil {
		return err
	}
	out, reports := testOutput{Files: []testFile{}, Rules: []ruleCoverage{}, Uncovered: []string{}, Errors: []string{}}, []*policytest.Report{}
	for _, err := range t.errs {
		out.Errors = append(out.Errors, err.Error())
	}
	for _, f := range t.tests {
		r, err := policytest.Run(compiler, osFS{c}, f)
		if err != nil {
			out.Errors = append(out.Errors, err.Error())
			continue
		}
		reports = append(reports, r)
		out.add(r)
	}
	reports = append(reports, c.untested(compiler, t, paths, &out)...)
	out.finish(reports)
	if c.format == "json" {
		err = c.json(out)
	} else {
		c.printTests(&out, *quiet)
	}
	switch {
	case err != nil:
		return err
	case len(out.Errors) > 0:
		return unreadableError{fmt.Errorf("%s", count(len(out.Errors), "file")+" could not be tested")}
	case len(out.Rules) == 0 && out.Passed == 0:
		return usagef("there are no policies and no cases in %s", strings.Join(paths, ", "))
	case !out.OK:
		return errFindings
	}
	return nil
}

// untested makes empty reports of the policies that were named: their rules
// must be covered, too, if no file of cases is about them.
func (c *command) untested(compiler *policy.Compiler, t *tree, paths []string, out *testOutput) (reports []*policytest.Report) {
	before := len(t.errs)
	files, _ := c.load(compiler, t, paths)
	for _, err := range t.errs[before:] {
		out.Errors = append(out.Errors, err.Error())
	}
	for _, f := range files {
		if len(f.errs) > 0 {
			if text := f.errs.Error(); !strings.Contains(strings.Join(out.Errors, "\n"), text) {
				out.Errors = append(out.Errors, text)
			}
			continue
		}
		r := &policytest.Report{File: f.path}
		for _, p := range f.policies {
			for _, rule := range p.Rules {
				r.Rules = append(r.Rules, policytest.Coverage{Rule: rule.ID, File: f.path})
			}
		}
		reports = append(reports, r)
	}
	return reports
}

func (o *testOutput) add(r *policytest.Report) {
	f := testFile{File: r.File, Cases: []testCase{}}
	for _, x := range r.Cases {
		failures := append([]string{}, x.Failures...)
		f.Cases = append(f.Cases, testCase{x.Name, len(failures) == 0, x.Events, x.Matches, failures})
		if len(failures) == 0 {
			o.Passed++
		} else {
			o.Failed++
		}
	}
	o.Files = append(o.Files, f)
}

func (o *testOutput) finish(reports []*policytest.Report) {
	for _, x := range policytest.Covered(reports...) {
		o.Rules = append(o.Rules, ruleCoverage(x))
	}
	o.Uncovered = append(o.Uncovered, policytest.Uncovered(reports...)...)
	o.OK = o.Failed == 0 && len(o.Uncovered) == 0 && len(o.Errors) == 0
}

// ruleCoverage has the fields of policytest.Coverage, in their order.
var _ = ruleCoverage(policytest.Coverage{})

func (c *command) printTests(o *testOutput, quiet bool) {
	w, s := c.io.Out, c.style
	for _, f := range o.Files {
		shown := false
		for _, x := range f.Cases {
			if quiet && x.OK {
				continue
			}
			if !shown {
				fmt.Fprintln(w, s.in(bold, f.File))
				shown = true
			}
			mark := s.in(green, "ok  ")
			if !x.OK {
				mark = s.in(red, "FAIL")
			}
			fmt.Fprintf(w, "  %s  %s  %s\n", mark, fill(x.Name, 56), s.in(dim, count(x.Events, "event")+", "+count(x.Alerts, "alert")))
			for _, failure := range x.Failures {
				fmt.Fprintln(w, "        "+strings.ReplaceAll(failure, "\n", "\n        "))
			}
		}
	}
	covered := 0
	for _, r := range o.Rules {
		if r.Positive > 0 && r.Negative > 0 {
			covered++
		}
	}
	if len(o.Uncovered) > 0 {
		fmt.Fprintln(w, s.in(bold, "rules without cases"))
		for _, u := range o.Uncovered {
			fmt.Fprintf(w, "  %s  %s\n", s.in(red, "FAIL"), u)
		}
	}
	for _, e := range o.Errors {
		fmt.Fprintln(c.io.Err, e)
	}
	sum := fmt.Sprintf("%s passed, %d failed; %d of %s expected by one case and called quiet by another",
		count(o.Passed, "case"), o.Failed, covered, count(len(o.Rules), "rule"))
	code := green
	if !o.OK {
		code = red
	}
	fmt.Fprintln(w, s.in(code, sum))
}

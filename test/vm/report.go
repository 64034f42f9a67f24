package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strings"

	"github.com/procession-dev/procession/test/bench/host"
	"github.com/procession-dev/procession/test/vm/internal/wire"
)

// A Report is the result of the whole matrix, and the JSON file.
type Report struct {
	Kernels []KernelResult `json:"kernels"`
}

// A KernelResult is the result of one kernel.
type KernelResult struct {
	Name     string          `json:"name"`
	Release  string          `json:"release"`
	Packages []string        `json:"debianPackages"`
	Guest    *wire.Guest     `json:"guest,omitempty"` // missing: it did not come up
	Faults   []string        `json:"faults,omitempty"`
	UpSec    float64         `json:"upSeconds"`
	Seconds  float64         `json:"seconds"`
	Programs []ProgramResult `json:"programs"`
	Facts    []Fact          `json:"facts,omitempty"`

	console []byte
	kmsg    []string
}

// A ProgramResult is the result of one program on one kernel.
type ProgramResult struct {
	Name    string       `json:"name"`
	OK      bool         `json:"ok"`
	Error   string       `json:"error,omitempty"`
	Seconds float64      `json:"seconds"`
	Tests   []TestResult `json:"tests,omitempty"`

	output []byte
}

// A TestResult is the result of one test or subtest.
type TestResult struct {
	Name    string  `json:"name"`
	Result  string  `json:"result"` // pass, fail, skip
	Seconds float64 `json:"seconds"`
	Why     string  `json:"why,omitempty"` // of a skip or a failure: what it said

	output string
}

// unfinished is why a test failed that began and did not end.
const unfinished = "did not end"

// A Fact is something a test found out about the kernel: it printed
// "FACT name value".
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// summarize turns what came out of a VM into a result.
func summarize(ctx context.Context, t target, im *image, progs []program, b *boot) (KernelResult, error) {
	r := KernelResult{Name: t.name, Release: im.Release, Packages: im.Packages, Guest: b.guest, Faults: b.faults,
		UpSec: round(b.upAfter.Seconds()), Seconds: round(b.took.Seconds()), console: b.console, kmsg: b.kmsg}
	for i, p := range progs {
		pr := ProgramResult{Name: p.name}
		if buf := b.output[i]; buf != nil {
			pr.output = buf.Bytes()
		}
		end, ended := b.ends[i]
		switch {
		case !ended:
			pr.Error = "did not end"
		case end.Signal != 0:
			pr.Error = fmt.Sprintf("ended by signal %d", end.Signal)
		case end.Exit != 0:
			pr.Error = fmt.Sprintf("exit code %d", end.Exit)
			if m := death.Find(pr.output); m != nil {
				pr.Error += ": " + strings.TrimSpace(string(m))
			}
		}
		pr.Seconds = round(end.Elapsed.Seconds())
		if p.isTest {
			var err error
			if pr.Tests, err = readTests(ctx, p.name, pr.output); err != nil {
				return r, err
			}
			if len(pr.Tests) == 0 && pr.Error == "" {
				pr.Error = "ran no test"
			}
		}
		pr.OK = pr.Error == "" && !slices.ContainsFunc(pr.Tests, func(t TestResult) bool { return t.Result == "fail" })
		r.Facts = append(r.Facts, findFacts(pr.output)...)
		r.Programs = append(r.Programs, pr)
	}
	return r, nil
}

func round(sec float64) float64 { return float64(int(sec*100+0.5)) / 100 }

// readTests has Go's own test2json read the output of a test binary. A test
// that began and never ended has failed.
func readTests(ctx context.Context, pkg string, output []byte) ([]TestResult, error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json", "-t", "-p", pkg)
	cmd.Stdin = bytes.NewReader(output)
	out, err := host.Output(cmd)
	if err != nil {
		return nil, err
	}
	var tests []*TestResult
	byName := map[string]*TestResult{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var ev struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := dec.Decode(&ev); err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("test2json: %w", err)
		}
		if ev.Test == "" {
			continue
		}
		t := byName[ev.Test]
		if t == nil {
			t = &TestResult{Name: ev.Test, Result: "fail", Why: unfinished}
			byName[ev.Test] = t
			tests = append(tests, t)
		}
		switch ev.Action {
		case "output":
			t.output += ev.Output
		case "pass", "fail", "skip":
			t.Result, t.Seconds, t.Why = ev.Action, ev.Elapsed, ""
			if ev.Action != "pass" {
				t.Why = reason(t.output)
			}
		}
	}
	res := make([]TestResult, len(tests))
	for i, t := range tests {
		res[i] = *t
	}
	return res, nil
}

var logLine = regexp.MustCompile(`^\s+\w[\w.-]*\.go:\d+: (.*)`)

// reason is the last thing a test logged, without file and line.
func reason(output string) string {
	why := ""
	for line := range strings.Lines(output) {
		if m := logLine.FindStringSubmatch(line); m != nil {
			why = strings.TrimSpace(m[1])
		}
	}
	const most = 300
	if len(why) > most {
		why = why[:most] + "..."
	}
	return why
}

// factLine matches a fact at the start of a line, or logged by a test.
var factLine = regexp.MustCompile(`(?m)^(?:\s*[\w.-]+\.go:\d+: )?FACT (\S+)[ \t]+(.*?)\s*$`)

// findFacts gathers the FACT lines; of one name the last counts.
func findFacts(output []byte) []Fact {
	var facts []Fact
	for _, m := range factLine.FindAllStringSubmatch(string(output), -1) {
		f := Fact{m[1], m[2]}
		if i := slices.IndexFunc(facts, func(o Fact) bool { return o.Name == f.Name }); i >= 0 {
			facts[i] = f
			continue
		}
		facts = append(facts, f)
	}
	return facts
}

// ok says whether a kernel came up, did everything, and all of it passed.
func (r *KernelResult) ok() bool {
	return len(r.Faults) == 0 && !slices.ContainsFunc(r.Programs, func(p ProgramResult) bool { return !p.OK })
}

func (r *KernelResult) count(result string) (n int) {
	for _, p := range r.Programs {
		for _, t := range p.Tests {
			if t.Result == result && !strings.Contains(t.Name, "/") {
				n++
			}
		}
	}
	return n
}

// writeTable writes a table of tests against kernels, then why tests were
// skipped, then what went wrong.
func (rep *Report) writeTable(w io.Writer) {
	header(w, "test", rep.Kernels)
	for _, row := range rep.rows() {
		fmt.Fprintf(w, "| %s |", row.label())
		for _, k := range rep.Kernels {
			fmt.Fprintf(w, " %s |", k.cell(row))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
	for _, k := range rep.Kernels {
		up := "did not come up"
		if k.Guest != nil {
			up = fmt.Sprintf("up after %.1f s", k.UpSec)
		}
		fmt.Fprintf(w, "%s (%s): %d passed, %d failed, %d skipped; %s, %.1f s in all\n",
			k.Name, k.Release, k.count("pass"), k.count("fail"), k.count("skip"), up, k.Seconds)
	}
	rep.writeSkips(w)
	for i := range rep.Kernels {
		rep.Kernels[i].writeFailures(w)
	}
}

func header(w io.Writer, first string, ks []KernelResult) {
	fmt.Fprintf(w, "| %s |", first)
	for _, k := range ks {
		fmt.Fprintf(w, " %s |", k.Name)
	}
	fmt.Fprintf(w, "\n|---|%s\n", strings.Repeat("---|", len(ks)))
}

// A row is a test, or a program that is none.
type row struct{ program, test string }

func (r row) label() string {
	if r.test == "" {
		return r.program
	}
	return r.program + " " + r.test
}

// rows are all tests that ran anywhere, subtests only where one failed.
func (rep *Report) rows() []row {
	var rows []row
	add := func(r row) {
		if !slices.Contains(rows, r) {
			rows = append(rows, r)
		}
	}
	for _, k := range rep.Kernels {
		for _, p := range k.Programs {
			if len(p.Tests) == 0 || p.Error != "" && !p.OK && !slices.ContainsFunc(p.Tests, func(t TestResult) bool { return t.Result == "fail" }) {
				add(row{p.Name, ""})
			}
			for _, t := range p.Tests {
				if t.Result == "fail" || !strings.Contains(t.Name, "/") {
					add(row{p.Name, t.Name})
				}
			}
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int { return strings.Compare(a.program, b.program) })
	return rows
}

func (r *KernelResult) cell(at row) string {
	for _, p := range r.Programs {
		if p.Name != at.program {
			continue
		}
		if at.test == "" {
			if p.OK {
				return "pass"
			}
			return "**FAIL** " + p.Error
		}
		for _, t := range p.Tests {
			if t.Name != at.test {
				continue
			}
			if t.Result == "fail" {
				return "**FAIL**"
			}
			return t.Result
		}
	}
	return "-"
}

func (rep *Report) writeSkips(w io.Writer) {
	var order []string
	where := map[string][]string{}
	for _, k := range rep.Kernels {
		for _, p := range k.Programs {
			for _, t := range p.Tests {
				if t.Result != "skip" {
					continue
				}
				key := fmt.Sprintf("%s %s: %s", p.Name, t.Name, t.Why)
				if where[key] == nil {
					order = append(order, key)
				}
				where[key] = append(where[key], k.Name)
			}
		}
	}
	if len(order) > 0 {
		fmt.Fprintf(w, "\nSkipped:\n")
	}
	for _, key := range order {
		fmt.Fprintf(w, "- %s (%s)\n", key, strings.Join(where[key], ", "))
	}
}

// writeFailures says all there is about what failed on one kernel.
func (r *KernelResult) writeFailures(w io.Writer) {
	if r.ok() {
		return
	}
	fmt.Fprintf(w, "\n== %s failed\n", r.Name)
	for _, f := range r.Faults {
		fmt.Fprintf(w, "%s\n", f)
	}
	for i := range r.Programs {
		r.Programs[i].writeFailure(w)
	}
	if len(r.Faults) > 0 && len(r.kmsg) > 0 {
		fmt.Fprintf(w, "-- the kernel's log, last lines\n%s\n", strings.Join(r.kmsg, "\n"))
	}
	if len(r.Faults) > 0 && len(r.console) > 0 {
		fmt.Fprintf(w, "-- console\n%s\n", tail(r.console, 40))
	}
}

// writeFailure says what failed in one program: the tests that failed, with
// what they printed, or the program's end where that was what went wrong.
func (p *ProgramResult) writeFailure(w io.Writer) {
	if p.OK {
		return
	}
	fmt.Fprintf(w, "-- %s: %s\n", p.Name, p.Error)
	shown := false
	for _, t := range p.Tests {
		// Of a test and its subtests the innermost says why.
		inner := slices.ContainsFunc(p.Tests, func(o TestResult) bool {
			return o.Result == "fail" && strings.HasPrefix(o.Name, t.Name+"/")
		})
		if t.Result == "fail" && t.Why != unfinished && !inner {
			shown = true
			fmt.Fprintf(w, "%s\n", tail([]byte(t.output), 40))
		}
	}
	if died(p.output) || !shown {
		fmt.Fprintf(w, "%s\n", tail(bytes.ReplaceAll(p.output, []byte{0x16}, nil), 60))
	}
}

var death = regexp.MustCompile(`(?m)^(panic: |fatal error: ).*`)

// died says whether a Go program ended by itself, not by its tests' results.
func died(output []byte) bool { return death.Match(output) }

// tail is the last n lines.
func tail(b []byte, n int) string {
	lines := strings.Split(strings.TrimRight(string(b), "\r\n"), "\n")
	if cut := len(lines) - n; cut > 0 {
		return fmt.Sprintf("... %d lines before\n%s", cut, strings.Join(lines[cut:], "\n"))
	}
	return strings.Join(lines, "\n")
}

// writeFacts writes the facts as a Markdown table, one column per kernel.
func (rep *Report) writeFacts(w io.Writer) {
	header(w, "fact", rep.Kernels)
	line := func(name string, value func(*KernelResult) string) {
		fmt.Fprintf(w, "| %s |", name)
		for i := range rep.Kernels {
			v := value(&rep.Kernels[i])
			if v == "" {
				v = "-"
			}
			fmt.Fprintf(w, " %s |", strings.ReplaceAll(v, "|", `\|`))
		}
		fmt.Fprintln(w)
	}
	guest := func(f func(*wire.Guest) string) func(*KernelResult) string {
		return func(r *KernelResult) string {
			if r.Guest == nil {
				return ""
			}
			return f(r.Guest)
		}
	}
	line("kernel", guest(func(g *wire.Guest) string { return g.Release }))
	line("machine", guest(func(g *wire.Guest) string { return g.Machine }))
	line("cgroup", guest(func(g *wire.Guest) string { return g.Cgroup }))
	line("kernel BTF", guest(func(g *wire.Guest) string { return yesNo(g.BTF) }))
	line("lockdown", guest(func(g *wire.Guest) string { return g.Lockdown }))
	line("security modules", guest(func(g *wire.Guest) string { return strings.ReplaceAll(g.LSM, ",", ", ") }))
	var names []string
	for _, k := range rep.Kernels {
		for _, f := range k.Facts {
			if !slices.Contains(names, f.Name) {
				names = append(names, f.Name)
			}
		}
	}
	for _, n := range names {
		line(n, func(r *KernelResult) string {
			for _, f := range r.Facts {
				if f.Name == n {
					return f.Value
				}
			}
			return ""
		})
	}
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// An expectation is what was truly executed: exec i ran a known program with
// the argument "<tag>-<i>;".
type expectation struct {
	tag       string
	execs     int // in all
	load      load
	container string // "" outside
}

// program is the path handed to exec i, and all its arguments.
func (e *expectation) argv(i int) []string {
	arg := fmt.Sprintf("%s-%d;", e.tag, i)
	switch {
	case e.load.next == "":
		return []string{e.load.prog, arg}
	case i%2 == 0:
		return []string{e.load.prog, arg, e.load.next}
	}
	return []string{e.load.next, arg}
}

// exe is the resolved path of what exec i runs.
func (e *expectation) exe(i int) string {
	path := e.argv(i)[0]
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// index is the number in "<tag>-<i>;", if it is one that was executed.
func (e *expectation) index(arg string) (int, bool) {
	s, ok := strings.CutPrefix(arg, e.tag+"-")
	if !ok {
		return 0, false
	}
	s, ok = strings.CutSuffix(s, ";")
	if !ok {
		return 0, false
	}
	i, err := strconv.Atoi(s)
	return i, err == nil && i >= 0 && i < e.execs && strconv.Itoa(i) == s
}

// A score counts execs of the load: those reported with the right argv, and
// of these the ones with the right executable and container. An exec that is
// reported twice counts once.
type score struct {
	Argv      int `json:"argv"`
	Exe       int `json:"exe"`
	Container int `json:"container"`
}

// A tally is a score in the making.
type tally struct {
	e                    *expectation
	argv, exe, container map[int]bool
}

func newTally(e *expectation) *tally {
	return &tally{e, map[int]bool{}, map[int]bool{}, map[int]bool{}}
}

func (t *tally) score() score { return score{len(t.argv), len(t.exe), len(t.container)} }

// A scorer reads an observer's output.
type scorer func(r io.Reader, e *expectation) (score, error)

func scoreFile(file string, s scorer, e *expectation) (score, error) {
	f, err := os.Open(file)
	if err != nil {
		return score{}, err
	}
	defer f.Close()
	return s(f, e)
}

// eachLine calls f for each line with the tag in it.
func eachLine(r io.Reader, tag string, f func(line []byte)) error {
	br := bufio.NewReaderSize(r, 1<<20)
	for {
		line, err := br.ReadBytes('\n')
		if bytes.Contains(line, []byte(tag)) {
			f(line)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// scoreJSON reads the agent's events: every argument must be right, not only
// the one with the tag.
func scoreJSON(r io.Reader, e *expectation) (score, error) {
	t := newTally(e)
	err := eachLine(r, e.tag, func(line []byte) {
		var ev struct {
			Kind    string
			Process struct {
				Exe  string
				Args []string
			}
			Container struct{ ID string }
		}
		if json.Unmarshal(line, &ev) != nil || len(ev.Process.Args) < 2 {
			return
		}
		i, ok := e.index(ev.Process.Args[1])
		if !ok || !equal(ev.Process.Args, e.argv(i)) {
			return
		}
		t.argv[i] = true
		if ev.Process.Exe == e.exe(i) {
			t.exe[i] = true
		}
		if e.container != "" && ev.Container.ID == e.container {
			t.container[i] = true
		}
	})
	return t.score(), err
}

func equal(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

var tagged = regexp.MustCompile(`pb[0-9a-f]{12}-\d+;`)

// scoreText reads output for people: an exec counts when the argument with
// its tag is there.
func scoreText(r io.Reader, e *expectation) (score, error) {
	t := newTally(e)
	err := eachLine(r, e.tag, func(line []byte) {
		for _, m := range tagged.FindAll(line, -1) {
			if i, ok := e.index(string(m)); ok {
				t.argv[i] = true
			}
		}
	})
	return t.score(), err
}

var (
	auditLine = regexp.MustCompile(`^type=(\d+) audit\(([\d.]+:\d+)\): (.*)`)
	auditExe  = regexp.MustCompile(` exe="([^"]*)"`)
)

// scoreAudit reads audit records: the arguments are in one, the executable in
// another with the same serial number.
func scoreAudit(r io.Reader, e *expectation) (score, error) {
	t := newTally(e)
	exes, execs := map[string]string{}, map[string]int{}
	err := eachLine(r, "type=", func(line []byte) {
		m := auditLine.FindSubmatch(line)
		if m == nil {
			return
		}
		serial := string(m[2])
		switch string(m[1]) {
		case strconv.Itoa(auditSyscall):
			if x := auditExe.FindSubmatch(m[3]); x != nil {
				exes[serial] = string(x[1])
			}
		case strconv.Itoa(auditExecve):
			if x := tagged.Find(m[3]); x != nil {
				if i, ok := e.index(string(x)); ok {
					t.argv[i] = true
					execs[serial] = i
				}
			}
		}
	})
	for serial, i := range execs {
		if exes[serial] == e.exe(i) {
			t.exe[i] = true
		}
	}
	return t.score(), err
}

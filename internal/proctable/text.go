package proctable

import (
	"bytes"

	"github.com/procession-dev/procession/internal/event"
)

// A text is one string that several processes point into: a program and all
// forks of it, or all processes of a cgroup. The count of users is there to
// know the bytes held, not to free them: that is the collector's work.
type text struct {
	s    string
	refs int
}

// A program is the text of one, still in somebody else's memory.
type program struct{ name, exe, file, args, cwd []byte }

func (p *program) size() int {
	return len(p.name) + len(p.exe) + len(p.file) + len(p.args) + len(p.cwd)
}

// program is e's present text.
func (e *entry) program() program {
	return program{[]byte(e.Name), []byte(e.Exe), []byte(e.File), []byte(e.Cmdline), []byte(e.Cwd)}
}

// setProgram copies the text of a program into one string: one allocation,
// however many fields.
func (t *Table) setProgram(e *entry, p program) {
	b := append(t.buf[:0], p.name...)
	b = append(b, p.exe...)
	b = append(b, p.file...)
	b = append(b, p.args...)
	b = append(b, p.cwd...)
	s := string(b)
	if t.buf = b; cap(b) > bigBuffer {
		t.buf = nil // one process with enormous arguments should not cost that for ever
	}
	cut := func(n int) (head string) {
		head, s = s[:n], s[n:]
		return head
	}
	whole := s
	e.Name = cut(len(p.name))
	e.Exe = cut(len(p.exe))
	e.File = cut(len(p.file))
	e.Cmdline = cut(len(p.args))
	e.Cwd = cut(len(p.cwd))
	t.drop(e.prog)
	e.prog = t.newText(whole)
}

const bigBuffer = 64 << 10

func (t *Table) newText(s string) *text {
	if len(s) == 0 {
		return nil
	}
	var x *text
	if n := len(t.texts); n > 0 {
		x, t.texts = t.texts[n-1], t.texts[:n-1]
	} else {
		x = new(text)
	}
	x.s, x.refs = s, 1
	t.count.textBytes.Add(int64(len(s)))
	return x
}

func (x *text) share() *text {
	if x != nil {
		x.refs++
	}
	return x
}

// drop ends one use of x, and says whether it was the last.
func (t *Table) drop(x *text) bool {
	if x == nil {
		return false
	}
	if x.refs--; x.refs > 0 {
		return false
	}
	t.count.textBytes.Add(-int64(len(x.s)))
	x.s = ""
	if len(t.texts) < spares {
		t.texts = append(t.texts, x)
	}
	return true
}

// spares is how many unused structs of a kind are kept.
const spares = 4096

// setCgroup gives e its cgroup. All processes of a cgroup share its string;
// what was known about the workload does not hold in another cgroup.
func (t *Table) setCgroup(e *entry, path []byte, src event.Source) {
	e.Sources[event.FieldCgroup] = src
	if string(path) == e.Cgroup {
		return
	}
	t.dropCgroup(e)
	e.Workload = nil
	if len(path) == 0 {
		return
	}
	g := t.groups[string(path)]
	if g == nil {
		g = t.newText(string(path))
		t.groups[g.s] = g
	} else {
		g.refs++
	}
	e.group, e.Cgroup = g, g.s
}

func (t *Table) dropCgroup(e *entry) {
	s := e.Cgroup
	if t.drop(e.group) {
		delete(t.groups, s)
	}
	e.group, e.Cgroup = nil, ""
}

// Text kept per process when the table holds too much of it.
const (
	leanArgs = 256
	leanPath = 256
)

// trimLater notes that e may hold more text than it should once its event has
// been judged.
func (t *Table) trimLater(e *entry) {
	if len(e.Cmdline) > t.cfg.MaxArgs || t.count.textBytes.Load() > int64(t.cfg.MaxText) {
		t.long = append(t.long, e)
	}
}

// trim cuts the text of the processes whose events have been judged by now.
// No fork of them shares it yet: that would have been a later event.
func (t *Table) trim() {
	for i, e := range t.long {
		t.long[i] = nil
		p, keep := e.program(), t.cfg.MaxArgs
		excess := int64(max(0, len(p.args)-keep))
		if t.count.textBytes.Load()-excess > int64(t.cfg.MaxText) {
			keep = min(keep, leanArgs)
			if t.lean(e, &p) || len(p.args) > keep {
				t.count.trimmed.Add(1)
			}
		}
		p.args = p.args[:min(len(p.args), keep)]
		if p.size() < e.prog.size() {
			t.setProgram(e, p)
		}
	}
	t.long = t.long[:0]
}

func (x *text) size() int {
	if x == nil {
		return 0
	}
	return len(x.s)
}

// lean cuts paths, keeping their ends, which say more.
func (t *Table) lean(e *entry, p *program) (cut bool) {
	if len(p.file) > leanPath {
		p.file, cut = nil, true
		e.Sources[event.FieldFile] = event.SourceNone
	}
	if len(p.exe) > leanPath {
		p.exe, cut = tail(p.exe), true
		e.Marks |= event.MarkExeCut
	}
	if len(p.cwd) > leanPath {
		p.cwd, cut = tail(p.cwd), true
		e.Marks |= event.MarkCwdCut
	}
	return cut
}

// tail is the last whole components of a path.
func tail(path []byte) []byte {
	path = path[len(path)-leanPath:]
	if i := bytes.IndexByte(path, '/'); i >= 0 {
		path = path[i:]
	}
	return path
}

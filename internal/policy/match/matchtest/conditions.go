package matchtest

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Condition makes a condition of the given depth that nobody would write.
// Now and then one does not compile: it may nest what must not be nested.
func Condition(r *rand.Rand, depth int) string { return (&writer{r: r}).bool(depth) }

// A writer writes conditions.
type writer struct {
	r    *rand.Rand
	elem string // "": no loop; "a": the element is a text; "p": a process
}

func (w *writer) pick(s ...string) string { return s[w.r.IntN(len(s))] }

var textVars = []string{"process.exe", "process.name", "process.cmdline", "process.argv0", "process.cwd", "process.file", "process.script",
	"parent.exe", "parent.name", "parent.cmdline", "grandparent.name", "container.image", "container.id", "pod.name", "pod.namespace", "pod.uid",
	"event.kind", "node.name", "variables.line", "variables.both"}

func (w *writer) text() string {
	switch w.elem {
	case "a":
		if w.r.IntN(3) > 0 {
			return w.fold("a")
		}
	case "p":
		if w.r.IntN(3) > 0 {
			return w.fold("p." + w.pick("exe", "name", "cmdline", "argv0"))
		}
	}
	if w.r.IntN(20) == 0 {
		return w.pick("process.args[0]", "process.args[1]", "(process.name + parent.name)", "process.name.trim()", "pod.labels['app']", "pod.labels[?'app'].orValue('')", "string(process.uid)")
	}
	if w.r.IntN(20) == 0 {
		return w.pick("pod.labels[?'app']", "pod.labels.?app", "pod.labels[?'nope']", "node.labels[?'app']") + ".orValue(" + w.literal() + ")"
	}
	return w.fold(textVars[w.r.IntN(len(textVars))])
}

func (w *writer) fold(s string) string {
	switch w.r.IntN(6) {
	case 0, 1:
		return s + ".lowerAscii()"
	case 2:
		return s + ".upperAscii()"
	}
	return s
}

func (w *writer) literal() string { return Quote(strings.ToValidUTF8(Word(w.r), "\uFFFD")) }

func (w *writer) list() string {
	if w.r.IntN(3) == 0 {
		return w.pick("lists.shells", "lists.servers", "lists.folders", "lists.two")
	}
	list := make([]string, w.r.IntN(5))
	for i := range list {
		list[i] = w.literal()
	}
	return "[" + strings.Join(list, ", ") + "]"
}

func (w *writer) number() string {
	if w.elem == "p" && w.r.IntN(3) > 0 {
		return "p." + w.pick("uid", "euid", "pid", "tty")
	}
	switch w.r.IntN(12) {
	case 0:
		return w.pick("process.args.size()", "size(process.args)", "ancestors.size()")
	case 1:
		return w.text() + ".size()"
	case 2:
		return "variables.who"
	case 3:
		return w.pick("(process.uid + 1)", "(process.uid / process.euid)", "exit.code", "exit.durationMs", "int(process.argv0)")
	case 4, 5:
		return fmt.Sprint(w.r.IntN(4) - 1)
	}
	return w.pick("process.uid", "process.euid", "process.pid", "process.tty", "parent.uid", "process.loginuid", "change.from.uid", "change.to.uid", "target.uid")
}

var patterns = []string{"^/bin", "(ba|da)?sh$", "(?i)CAT", "(?i)s+k", "[a-c]{2,}", "curl.*\\\\|", "", "a|b", "(?i)tcp|udp", ".*", "x\\ny", "\\\\bid\\\\b", "/(tmp|dev)/", "\uFFFD", "(?i)base64",
	"^$", "e{2}x", "(http|ftp)://[0-9.]+"}

func (w *writer) leaf() string {
	switch w.r.IntN(16) {
	case 0:
		return w.text() + " == " + w.literal()
	case 1:
		return w.literal() + " != " + w.text()
	case 2:
		return w.text() + " in " + w.list()
	case 3, 4:
		return w.text() + "." + w.pick("startsWith", "endsWith", "contains") + "(" + w.literal() + ")"
	case 5, 6:
		return w.text() + "." + w.pick("startsWithAny", "endsWithAny", "containsAny") + "(" + w.list() + ")"
	case 7:
		return w.text() + ".matches('" + patterns[w.r.IntN(len(patterns))] + "')"
	case 8, 9:
		return w.number() + w.pick(" == ", " != ", " < ", " <= ", " > ", " >= ") + w.number()
	case 10:
		return w.number() + " in [0, 1, 1000]"
	case 11:
		if w.elem == "p" && w.r.IntN(2) == 0 {
			return "p." + w.pick("exeMemfd", "exeUpperLayer", "isInit")
		}
		return w.pick("process.exeUpperLayer", "process.exeMemfd", "process.exeForeign", "process.isInit", "process.truncated", "process.noNewPrivs", "event.synthetic", "exit.coreDumped", "target.exeSetuid")
	case 12:
		return w.pick("variables.isShell", "variables.byServer", "variables.shellByServer", "variables.strange", "true", "false")
	case 13:
		return w.text() + w.pick(" == ", " != ") + w.text()
	case 14:
		return w.pick(w.literal(), w.text()) + " in process.args"
	}
	return w.pick("'CAP_SYS_ADMIN' in process.capabilities", "'CAP_NONE' in process.capabilities", "process.args[2] == '-c'", "has(pod.labels.app)",
		"process.args == ['sh']", "ancestors[0].name == 'sh'", "event.time.getHours() < 12")
}

func (w *writer) bool(depth int) string {
	if depth <= 0 || w.r.IntN(6) == 0 {
		return w.leaf()
	}
	switch w.r.IntN(12) {
	case 0, 1, 2:
		return "(" + w.bool(depth-1) + " && " + w.bool(depth-1) + ")"
	case 3, 4, 5:
		return "(" + w.bool(depth-1) + " || " + w.bool(depth-1) + ")"
	case 6, 7:
		return "!(" + w.bool(depth-1) + ")"
	case 8:
		return "(" + w.bool(depth-1) + " ? " + w.bool(depth-1) + " : " + w.bool(depth-1) + ")"
	case 9:
		return "(" + w.bool(depth-1) + ")" + w.pick(" == true", " != true", " == false", " != false")
	}
	if w.elem != "" {
		return w.leaf()
	}
	inner := &writer{r: w.r}
	over := w.pick("process.args", "ancestors", "parent.args", w.list())
	name := "a"
	if inner.elem = "a"; over == "ancestors" {
		name, inner.elem = "p", "p"
	}
	return over + w.pick(".exists(", ".all(", ".exists(", ".exists_one(") + name + ", " + inner.bool(depth-2) + ")"
}

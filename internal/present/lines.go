package present

import (
	"bytes"
	"slices"
	"strconv"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// A Style says how lines look.
type Style struct {
	Color  bool           // use the sixteen colours of a terminal
	Width  int            // columns after which a line is cut; 0 is never
	Zone   *time.Location // of times; nil is UTC
	Layout string         // of times, as in package time; "" is 15:04:05, with milliseconds for events
}

// Colours, the only control sequences in a line.
const (
	colourOff    = "\x1b[0m"
	colourBold   = "\x1b[1m"
	colourDim    = "\x1b[2m"
	colourRed    = "\x1b[31m"
	colourGreen  = "\x1b[32m"
	colourYellow = "\x1b[33m"
	colourBlue   = "\x1b[34m"
	colourPurple = "\x1b[35m"
	colourCyan   = "\x1b[36m"
	colourAlarm  = "\x1b[1;31m"
)

func severityColour(s pb.Severity) string {
	switch s {
	case pb.Severity_SEVERITY_CRITICAL:
		return colourAlarm
	case pb.Severity_SEVERITY_HIGH:
		return colourRed
	case pb.Severity_SEVERITY_MEDIUM:
		return colourYellow
	case pb.Severity_SEVERITY_LOW:
		return colourCyan
	}
	return colourDim
}

func kindColour(kind string) string {
	switch kind {
	case "Exec":
		return colourGreen
	case "Fork":
		return colourBlue
	case "Exit":
		return colourDim
	case "UIDChange", "GIDChange":
		return colourYellow
	case "PtraceAttach", "CoreDump":
		return colourRed
	}
	return colourPurple
}

func (s Style) on(dst []byte, colour string) []byte {
	if s.Color {
		dst = append(dst, colour...)
	}
	return dst
}

func (s Style) off(dst []byte) []byte { return s.on(dst, colourOff) }

func (s Style) appendTime(dst []byte, ev *pb.Event, layout string) []byte {
	if s.Layout != "" {
		layout = s.Layout
	}
	if !ev.GetTime().IsValid() {
		return append(dst, "--:--:--"...)
	}
	zone := s.Zone
	if zone == nil {
		zone = time.UTC
	}
	return ev.GetTime().AsTime().In(zone).AppendFormat(dst, layout)
}

// AppendAlertLine appends an alert as one line, without the newline:
//
//	14:02:07 CRIT shell-with-network default/web-7f nginx→sh "sh -c id" T1059.004 uid 0 pid 123 node-12
//
// that is: when, how bad, which rule, where (pod, else container, else host),
// parent and process, the command line, techniques, who. Words in the command
// line are as AppendSafe makes them. If the line is too wide the command line
// gives way first.
func (s Style) AppendAlertLine(dst []byte, id Identity, a *pb.Alert) []byte {
	start := len(dst)
	ev := a.GetEvent()
	p := ev.GetProcess()
	dst = s.on(dst, colourDim)
	dst = s.appendTime(dst, ev, time.TimeOnly)
	dst = s.off(dst)
	dst = append(dst, ' ')

	_, severity := severityName(a.GetSeverity())
	col := len(dst)
	dst = s.on(dst, severityColour(a.GetSeverity()))
	dst = append(dst, severity...)
	dst = s.off(dst)
	dst = pad(dst, col, 4)
	dst = append(dst, ' ')

	dst = s.on(dst, colourBold)
	dst = appendWord(dst, ruleName(a.GetRule()), false)
	dst = s.off(dst)
	dst = append(dst, ' ')
	if p == nil && a.GetMessage() != "" { // about no process: of the collector
		dst = AppendPhrase(dst, []byte(a.GetMessage()))
		dst = s.appendAlertTail(dst, id, a)
		return s.cut(dst, start)
	}
	dst = appendPlace(dst, ev)
	dst = append(dst, ' ')
	if as := p.GetAncestors(); len(as) > 0 {
		dst = appendName(dst, as[0])
		dst = append(dst, "→"...)
	}
	dst = appendName(dst, p)

	var room [256]byte
	tail := s.appendAlertTail(room[:0], id, a)
	if p.GetCmdline() != nil {
		dst = append(dst, ` "`...)
		cmd := len(dst)
		dst = appendWords(dst, p, s.textLimit(), true)
		if s.Width > 0 {
			dst = fit(dst, cmd, max(8, s.Width-cells(dst[start:cmd])-cells(tail)-1))
		}
		dst = append(dst, '"')
	}
	dst = append(dst, tail...)
	return s.cut(dst, start)
}

// appendAlertTail appends what follows the command line.
func (s Style) appendAlertTail(dst []byte, id Identity, a *pb.Alert) []byte {
	ev := a.GetEvent()
	p := ev.GetProcess()
	for i, m := range a.GetMitre() {
		t := m.GetTechnique()
		// One technique may serve several tactics.
		if t != "" && !slices.ContainsFunc(a.GetMitre()[:i], func(o *pb.Mitre) bool { return o.GetTechnique() == t }) {
			dst = append(dst, ' ')
			dst = appendWord(dst, t, false)
		}
	}
	if a.GetUndecided() {
		dst = append(dst, " undecided"...)
	}
	if a.GetDryRun() {
		dst = append(dst, " dry-run"...)
	}
	if ev.GetChange() != nil || ev.GetExit() != nil || ev.GetTarget() != nil {
		dst = append(dst, ' ')
		dst = appendStatus(dst, ev)
	}
	if ids := p.GetIds(); ids != nil {
		dst = append(dst, " uid "...)
		dst = strconv.AppendUint(dst, uint64(ids.GetUid()), 10)
		if ids.GetEuid() != ids.GetUid() {
			dst = append(dst, " euid "...)
			dst = strconv.AppendUint(dst, uint64(ids.GetEuid()), 10)
		}
	}
	if p != nil {
		dst = append(dst, " pid "...)
		dst = strconv.AppendInt(dst, int64(p.GetPid()), 10)
	}
	if id.Node != "" {
		dst = append(dst, ' ')
		dst = s.on(dst, colourDim)
		dst = appendWord(dst, id.Node, false)
		dst = s.off(dst)
	}
	return dst
}

// AppendLossLine appends a loss record as one line, without the newline.
func (s Style) AppendLossLine(dst []byte, id Identity, at time.Time, l *pb.Loss) []byte {
	start := len(dst)
	layout, zone := s.Layout, s.Zone
	if layout == "" {
		layout = time.TimeOnly
	}
	if zone == nil {
		zone = time.UTC
	}
	dst = s.on(dst, colourDim)
	dst = at.In(zone).AppendFormat(dst, layout)
	dst = s.off(dst)
	dst = append(dst, ' ')
	dst = s.on(dst, colourAlarm)
	dst = append(dst, "LOST"...)
	dst = s.off(dst)
	dst = append(dst, " alerts "...)
	dst = strconv.AppendUint(dst, l.GetFrom(), 10)
	dst = append(dst, ".."...)
	dst = strconv.AppendUint(dst, l.GetTo(), 10)
	dst = append(dst, " of "...)
	dst = appendWord(dst, id.Node, false)
	dst = append(dst, ": "...)
	dst = append(dst, lossReasonName(l.GetReason())...)
	if l.GetDetail() != "" {
		dst = append(dst, ' ')
		dst = appendWord(dst, l.GetDetail(), false)
	}
	return s.cut(dst, start)
}

// Columns of an event line: where each one starts is what AppendEventHeader
// and AppendEventLine agree on. A value that is too long pushes the rest.
const (
	colTime      = 12
	colKind      = 8
	colPID       = 7
	colUID       = 6
	colContainer = 12
	colDuration  = 8
	colStatus    = 8
)

// AppendEventHeader appends the names of the columns, without the newline.
func (s Style) AppendEventHeader(dst []byte) []byte {
	start := len(dst)
	dst = s.on(dst, colourBold)
	for _, c := range [...]struct {
		name  string
		width int
	}{
		{"TIME", s.timeWidth()}, {"EVENT", colKind}, {"PID", colPID}, {"PPID", colPID}, {"UID", colUID},
		{"CONTAINER", colContainer}, {"DURATION", colDuration}, {"STATUS", colStatus},
	} {
		col := len(dst)
		dst = append(dst, c.name...)
		dst = pad(dst, col, c.width)
		dst = append(dst, ' ')
	}
	dst = append(dst, "NAME PROGRAM ARGUMENTS"...)
	dst = s.off(dst)
	return s.cut(dst, start)
}

func (s Style) timeWidth() int {
	if s.Layout == "" {
		return colTime
	}
	return len(s.Layout)
}

// AppendEventLine appends an event as one line, without the newline: time,
// kind, pid, parent, real user (and effective, if another), container, how
// long an exited process lived, what came of it (exit code or signal, ids
// before and after, the traced process), task name, program and arguments.
// A hyphen stands for what does not apply or is not known, an asterisk behind
// the kind for an event that was concluded from a scan. Words are as
// AppendSafe makes them.
func (s Style) AppendEventLine(dst []byte, ev *pb.Event) []byte {
	start := len(dst)
	p := ev.GetProcess()

	col := len(dst)
	dst = s.on(dst, colourDim)
	dst = s.appendTime(dst, ev, "15:04:05.000")
	dst = s.off(dst)
	dst = pad(dst, col, s.timeWidth())
	dst = append(dst, ' ')

	col = len(dst)
	dst = s.on(dst, kindColour(ev.GetKind()))
	dst = appendWord(dst, kindShort(ev.GetKind()), false)
	if ev.GetSynthetic() {
		dst = append(dst, '*')
	}
	dst = s.off(dst)
	dst = pad(dst, col, colKind)
	dst = append(dst, ' ')

	col = len(dst)
	dst = strconv.AppendInt(dst, int64(p.GetPid()), 10)
	dst = pad(dst, col, colPID)
	dst = append(dst, ' ')

	col = len(dst)
	if p != nil && p.Ppid != nil {
		dst = strconv.AppendInt(dst, int64(*p.Ppid), 10)
	} else {
		dst = append(dst, '-')
	}
	dst = pad(dst, col, colPID)
	dst = append(dst, ' ')

	col = len(dst)
	dst = appendUser(dst, p.GetIds())
	dst = pad(dst, col, colUID)
	dst = append(dst, ' ')

	col = len(dst)
	dst = appendContainerShort(dst, ev)
	dst = pad(dst, col, colContainer)
	dst = append(dst, ' ')

	col = len(dst)
	dst = appendDuration(dst, ev.GetExit().GetDurationNs())
	dst = pad(dst, col, colDuration)
	dst = append(dst, ' ')

	col = len(dst)
	bad := ev.GetExit().GetSignal() != 0 || ev.GetExit().GetCode() != 0
	if bad {
		dst = s.on(dst, colourRed)
	}
	dst = appendStatus(dst, ev)
	if bad {
		dst = s.off(dst)
	}
	dst = pad(dst, col, colStatus)
	dst = append(dst, ' ')

	dst = appendName(dst, p)
	dst = append(dst, ' ')
	if p != nil && p.Exe != nil {
		dst = appendColumn(dst, p.Exe)
	} else {
		dst = append(dst, '-')
	}
	if len(p.GetCmdline()) > 0 {
		dst = append(dst, ' ')
		dst = appendWords(dst, p, s.textLimit(), false)
	}
	return s.cut(dst, start)
}

// cut brings the line that began at start down to the width.
func (s Style) cut(dst []byte, start int) []byte {
	if s.Width <= 0 {
		return dst
	}
	return fit(dst, start, s.Width)
}

// textLimit is how many bytes of a command line are worth escaping: what is
// cut off afterwards need not be. A column takes at most a character and its
// combining marks.
func (s Style) textLimit() int {
	if s.Width <= 0 {
		return int(^uint(0) >> 1)
	}
	return s.Width * 4 * (1 + maxMarks)
}

// appendWords appends the arguments, each one a word, and says when the record
// has fewer bytes than the process was given.
func appendWords(dst []byte, p *pb.Process, limit int, inDouble bool) []byte {
	cmd := p.GetCmdline()
	missing := int(p.GetCmdlineLen()) - len(cmd)
	if len(cmd) > limit {
		cmd = cmd[:limit]
	}
	first := true
	for rest := cmd; len(rest) > 0; first = false {
		var arg []byte
		arg, rest = cutArg(rest)
		if !first {
			dst = append(dst, ' ')
		}
		dst = appendWord(dst, arg, inDouble)
	}
	if missing > 0 {
		dst = append(dst, " …+"...)
		dst = strconv.AppendInt(dst, int64(missing), 10)
		dst = append(dst, 'B')
	}
	return dst
}

// appendColumn appends a word where a lone hyphen would mean "unknown".
func appendColumn(dst, raw []byte) []byte {
	if len(raw) == 1 && raw[0] == '-' {
		return append(dst, `'-'`...)
	}
	return appendWord(dst, raw, false)
}

// appendName appends the task name, or the last part of the program's path.
func appendName(dst []byte, p *pb.Process) []byte {
	switch {
	case p == nil:
		return append(dst, '-')
	case p.Name != nil:
		return appendColumn(dst, p.Name)
	case p.Exe != nil:
		return appendColumn(dst, p.Exe[bytes.LastIndexByte(p.Exe, '/')+1:])
	}
	return append(dst, '-')
}

// ruleName is the last part of kind/namespace/policy/rule.
func ruleName(rule string) string {
	if _, name, ok := cutLast(rule); ok {
		return name
	}
	return rule
}

// appendPlace appends where an alert comes from: namespace/pod, a container, or
// the host.
func appendPlace(dst []byte, ev *pb.Event) []byte {
	if pod := ev.GetPod(); pod.GetName() != "" {
		dst = appendWord(dst, pod.GetNamespace(), false)
		dst = append(dst, '/')
		return appendWord(dst, pod.GetName(), false)
	}
	return appendContainerShort(dst, ev)
}

// shortID is as much of a container's id as people use.
const shortID = 12

func appendContainerShort(dst []byte, ev *pb.Event) []byte {
	if id := ev.GetContainer().GetId(); id != "" {
		if len(id) == 64 { // names, as of lxc, are not cut
			id = id[:shortID]
		}
		return appendWord(dst, id, false)
	}
	if ev.GetPlace() == "host" {
		return append(dst, "host"...)
	}
	return append(dst, '?')
}

// appendUser appends the real user id, and the effective one if it differs.
func appendUser(dst []byte, ids *pb.IDs) []byte {
	if ids == nil {
		return append(dst, '-')
	}
	dst = strconv.AppendUint(dst, uint64(ids.GetUid()), 10)
	if ids.GetEuid() != ids.GetUid() {
		dst = append(dst, '/')
		dst = strconv.AppendUint(dst, uint64(ids.GetEuid()), 10)
	}
	return dst
}

// appendStatus appends what came of the event: "1", "SIGSEGV,core",
// "1000→0", "nginx→evil", "→4711:sshd".
func appendStatus(dst []byte, ev *pb.Event) []byte {
	switch {
	case ev.GetExit() != nil:
		e := ev.GetExit()
		if e.GetSignal() == 0 {
			dst = strconv.AppendInt(dst, int64(e.GetCode()), 10)
		} else {
			dst = AppendSignal(dst, e.GetSignal())
		}
		if e.GetCoreDumped() {
			dst = append(dst, ",core"...)
		}
		return dst
	case ev.GetTarget() != nil:
		dst = append(dst, "→"...)
		dst = strconv.AppendInt(dst, int64(ev.GetTarget().GetPid()), 10)
		dst = append(dst, ':')
		return appendName(dst, ev.GetTarget())
	case ev.GetChange() != nil:
		return appendChangeStatus(dst, ev.GetKind(), ev.GetChange())
	}
	return append(dst, '-')
}

// appendChangeStatus appends before and after; the effective id is what
// permissions go by, the real one is shown when it alone changed.
func appendChangeStatus(dst []byte, kind string, c *pb.Change) []byte {
	if c.GetTo() == nil {
		if c.FromName != nil {
			dst = appendColumn(dst, c.FromName)
		} else {
			dst = append(dst, '?')
		}
		dst = append(dst, "→"...)
		return appendColumn(dst, c.GetToName())
	}
	from, to := c.GetFrom(), c.GetTo()
	label, before, after := "euid ", from.GetEuid(), to.GetEuid()
	realBefore, realAfter, realLabel := from.GetUid(), to.GetUid(), "uid "
	if kind == "GIDChange" {
		label, before, after = "egid ", from.GetEgid(), to.GetEgid()
		realBefore, realAfter, realLabel = from.GetGid(), to.GetGid(), "gid "
	}
	if from != nil && before == after || before == realBefore && after == realAfter {
		label, before, after = realLabel, realBefore, realAfter
	}
	dst = append(dst, label...)
	if from == nil {
		dst = append(dst, '?')
	} else {
		dst = strconv.AppendUint(dst, uint64(before), 10)
	}
	dst = append(dst, "→"...)
	return strconv.AppendUint(dst, uint64(after), 10)
}

// appendDuration appends a time span in the unit that suits it.
func appendDuration(dst []byte, ns uint64) []byte {
	switch {
	case ns == 0:
		return append(dst, '-')
	case ns < 1e6:
		dst = strconv.AppendUint(dst, ns/1e3, 10)
		return append(dst, "us"...)
	case ns < 1e9:
		dst = strconv.AppendUint(dst, ns/1e6, 10)
		dst = appendFraction(dst, ns%1e6/1e4, 2)
		return append(dst, "ms"...)
	case ns < 1000e9:
		dst = strconv.AppendUint(dst, ns/1e9, 10)
		dst = appendFraction(dst, ns%1e9/1e6, 3)
		return append(dst, 's')
	}
	s := ns / 1e9
	dst = strconv.AppendUint(dst, s/3600, 10)
	dst = append(dst, 'h', byte('0'+s/600%6), byte('0'+s/60%10), 'm')
	return dst
}

// kindShort is the word of the command line for a kind.
func kindShort(kind string) string {
	switch kind {
	case "Exec":
		return "exec"
	case "Fork":
		return "fork"
	case "Exit":
		return "exit"
	case "UIDChange":
		return "uid"
	case "GIDChange":
		return "gid"
	case "SessionChange":
		return "sid"
	case "PtraceAttach":
		return "ptrace"
	case "PtraceDetach":
		return "ptrace-detach"
	case "CommChange":
		return "comm"
	case "CoreDump":
		return "coredump"
	}
	return kind
}

// pad fills the column that began at col up to width.
func pad(dst []byte, col, width int) []byte {
	for n := cells(dst[col:]); n < width; n++ {
		dst = append(dst, ' ')
	}
	return dst
}

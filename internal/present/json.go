package present

import (
	"encoding/base64"
	"encoding/hex"
	"math/bits"
	"slices"
	"strconv"
	"time"
	"unicode"
	"unicode/utf8"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// timeLayout always has nine digits, so that times sort as text.
const timeLayout = "2006-01-02T15:04:05.000000000Z07:00"

// AppendEventJSON appends an event as one JSON object, without a newline.
func AppendEventJSON(dst []byte, ev *pb.Event) []byte {
	dst = append(dst, '{')
	dst = appendTime(dst, "time", ev.GetTime())
	dst = appendEventFields(dst, ev, len(ev.GetProcess().GetAncestors()) > 1)
	return append(dst, '}')
}

// AppendAlertJSON appends an alert as one JSON object, without a newline. Its
// event's keys stand beside its own.
func AppendAlertJSON(dst []byte, id Identity, a *pb.Alert) []byte {
	ev := a.GetEvent()
	dst = append(dst, '{')
	dst = appendIdentity(dst, id)
	dst = appendTime(dst, "time", ev.GetTime())
	dst = appendCommitted(dst, id)
	severity, _ := severityName(a.GetSeverity())
	dst = appendStr(dst, "severity", severity)
	dst = appendStr(dst, "rule", a.GetRule())
	dst = appendStr(dst, "title", a.GetTitle())
	dst = appendStr(dst, "message", a.GetMessage())
	dst = appendTrue(dst, "undecided", a.GetUndecided())
	dst = appendTrue(dst, "late", a.GetLate())
	dst = appendTrue(dst, "dryRun", a.GetDryRun())
	dst = appendAggregated(dst, id, a.GetAggregated())
	dst = appendStr(dst, "cluster", id.Cluster)
	dst = appendStr(dst, "node", id.Node)
	dst = appendEventFields(dst, ev, true)
	dst = appendEvidence(dst, a.GetEvidence())
	dst = appendMitre(dst, a.GetMitre())
	dst = appendStrings(dst, "tags", a.GetTags())
	if g := a.GetPolicyGeneration(); g != 0 {
		dst = appendKey(dst, "policyGeneration")
		dst = strconv.AppendInt(dst, g, 10)
	}
	dst = appendStr(dst, "policyDigest", a.GetPolicyDigest())
	return append(dst, '}')
}

// AppendLossJSON appends a loss record as one JSON object of kind "Loss",
// without a newline: the alerts l.From to l.To of the epoch in id are gone for
// good. at is when the loss was noted; id.Seq is not used.
func AppendLossJSON(dst []byte, id Identity, at time.Time, l *pb.Loss) []byte {
	dst = append(dst, '{')
	id.Seq = l.GetFrom()
	dst = appendIdentity(dst, id)
	// first/to: unlike any alert's id, and the same in every resend.
	dst = append(dst[:len(dst)-1], '-')
	dst = strconv.AppendUint(dst, l.GetTo(), 10)
	dst = append(dst, '"')
	dst = appendKey(dst, "time")
	dst = append(dst, '"')
	dst = at.UTC().AppendFormat(dst, timeLayout)
	dst = append(dst, '"')
	dst = appendStr(dst, "kind", "Loss")
	dst = appendStr(dst, "cluster", id.Cluster)
	dst = appendStr(dst, "node", id.Node)
	dst = appendKey(dst, "epoch")
	dst = append(dst, '"')
	dst = hex.AppendEncode(dst, id.Epoch[:])
	dst = append(dst, '"')
	dst = appendBig(dst, "from", l.GetFrom())
	dst = appendBig(dst, "to", l.GetTo())
	if l.GetFrom() > 0 && l.GetTo() >= l.GetFrom() {
		dst = appendBig(dst, "lost", l.GetTo()-l.GetFrom()+1)
	}
	dst = appendStr(dst, "reason", lossReasonName(l.GetReason()))
	dst = appendStr(dst, "detail", l.GetDetail())
	return append(dst, '}')
}

func appendCommitted(dst []byte, id Identity) []byte {
	if id.Committed.IsZero() {
		return dst
	}
	dst = appendKey(dst, "committedAt")
	dst = append(dst, '"')
	dst = id.Committed.UTC().AppendFormat(dst, timeLayout)
	return append(dst, '"')
}

func appendIdentity(dst []byte, id Identity) []byte {
	return appendID(appendKey(dst, "id"), id)
}

// appendID appends an identity as one string.
func appendID(dst []byte, id Identity) []byte {
	dst = append(dst, '"')
	dst = appendStringBody(dst, id.Cluster)
	dst = append(dst, '/')
	dst = appendStringBody(dst, id.Node)
	dst = append(dst, '/')
	dst = hex.AppendEncode(dst, id.Epoch[:])
	dst = append(dst, '/')
	dst = strconv.AppendUint(dst, id.Seq, 10)
	return append(dst, '"')
}

// appendEventFields appends what events and alerts have in common.
func appendEventFields(dst []byte, ev *pb.Event, ancestors bool) []byte {
	p := ev.GetProcess()
	dst = appendStr(dst, "kind", ev.GetKind())
	dst = appendTrue(dst, "synthetic", ev.GetSynthetic())
	if p != nil {
		dst = appendKey(dst, "process")
		dst = appendProcess(dst, p)
		if as := p.GetAncestors(); ancestors && len(as) > 0 {
			dst = append(dst[:len(dst)-1], `,"ancestors":[`...)
			for _, a := range as {
				dst = appendElem(dst)
				dst = appendProcessAndSources(dst, a)
			}
			dst = append(dst, ']')
			dst = appendTrue(dst, "ancestorsTruncated", p.GetAncestorsCut())
			dst = append(dst, '}')
		}
		if as := p.GetAncestors(); len(as) > 0 {
			dst = appendKey(dst, "parent")
			dst = appendProcessAndSources(dst, as[0])
		}
	}
	if t := ev.GetTarget(); t != nil {
		dst = appendKey(dst, "target")
		dst = appendProcessAndSources(dst, t)
	}
	dst = appendChange(dst, ev.GetChange())
	dst = appendExit(dst, ev.GetExit())
	dst = appendStr(dst, "place", ev.GetPlace())
	dst = appendStr(dst, "placeReason", ev.GetPlaceReason())
	dst = appendContainer(dst, ev.GetContainer())
	dst = appendPod(dst, ev.GetPod())
	dst = appendSources(dst, p.GetSources())
	if s := ev.GetStamp(); s != 0 {
		dst = appendBig(dst, "stamp", s)
	}
	return dst
}

// appendProcessAndSources is for the processes an event mentions besides its
// own, whose sources stand at the top.
func appendProcessAndSources(dst []byte, p *pb.Process) []byte {
	dst = appendProcess(dst, p)
	if len(p.GetSources()) == 0 {
		return dst
	}
	dst = appendSources(dst[:len(dst)-1], p.GetSources())
	return append(dst, '}')
}

// appendProcess appends one process. Ancestors of ancestors are not followed:
// how deep a message nests is not for its sender to decide.
func appendProcess(dst []byte, p *pb.Process) []byte {
	dst = append(dst, '{')
	dst = appendInt(dst, "pid", p.GetPid())
	dst = appendOptInt(dst, "ppid", p.Ppid)
	if s := p.GetStart(); s != 0 {
		dst = appendBig(dst, "start", s)
	}
	dst = appendTime(dst, "startTime", p.GetStartTime())
	dst = appendText(dst, "exe", p.Exe)
	dst = appendText(dst, "file", p.File)
	dst = appendText(dst, "name", p.Name)
	dst = appendArgs(dst, p)
	dst = appendText(dst, "cwd", p.Cwd)
	dst = appendIDs(dst, p.GetIds())
	dst = appendCaps(dst, "capabilities", p.CapEffective)
	dst = appendCaps(dst, "capabilitiesPermitted", p.CapPermitted)
	if p.NoNewPrivs != nil {
		dst = appendKey(dst, "noNewPrivs")
		dst = strconv.AppendBool(dst, *p.NoNewPrivs)
	}
	dst = appendOptInt(dst, "sid", p.Sid)
	dst = appendOptInt(dst, "tty", p.Tty)
	if p.LoginUid != nil {
		dst = appendUint(dst, "loginuid", uint64(*p.LoginUid))
	}
	if n := p.GetInnerPid(); n != 0 {
		dst = appendInt(dst, "innerPid", n)
	}
	if ns := p.GetNs(); ns != nil {
		dst = appendKey(dst, "ns")
		dst = append(dst, '{')
		dst = appendNonZero(dst, "pid", ns.GetPid())
		dst = appendNonZero(dst, "mnt", ns.GetMnt())
		dst = appendNonZero(dst, "user", ns.GetUser())
		dst = appendNonZero(dst, "net", ns.GetNet())
		dst = append(dst, '}')
	}
	if f := p.GetExeFile(); f != nil {
		dst = appendExeFile(dst, f)
	}
	dst = appendStrings(dst, "marks", p.GetMarks())
	dst = appendText(dst, "cgroup", p.Cgroup)
	dst = appendTrue(dst, "exited", p.GetExited())
	dst = appendStr(dst, "origin", p.GetOrigin())
	dst = appendStr(dst, "user", p.GetUser())
	return append(dst, '}')
}

// appendArgs appends argv as an array, its true length, and, when an argument
// is not UTF-8, all of its bytes as recorded.
func appendArgs(dst []byte, p *pb.Process) []byte {
	cmd := p.Cmdline
	if cmd == nil {
		return dst
	}
	dst = appendKey(dst, "args")
	dst = append(dst, '[')
	valid := true
	for rest := cmd; len(rest) > 0; {
		var arg []byte
		arg, rest = cutArg(rest)
		valid = valid && utf8.Valid(arg)
		dst = appendElem(dst)
		dst = appendString(dst, arg)
	}
	dst = append(dst, ']')
	if !valid {
		dst = appendRaw(dst, "args", cmd)
	}
	dst = appendUint(dst, "argsBytes", uint64(max(int(p.GetCmdlineLen()), len(cmd))))
	return appendTrue(dst, "argsTruncated", int(p.GetCmdlineLen()) > len(cmd))
}

// cutArg splits the first argument off a list in which each ends with NUL.
func cutArg(cmd []byte) (arg, rest []byte) {
	for i, c := range cmd {
		if c == 0 {
			return cmd[:i], cmd[i+1:]
		}
	}
	return cmd, nil
}

func appendIDs(dst []byte, ids *pb.IDs) []byte {
	if ids == nil {
		return dst
	}
	dst = appendUint(dst, "uid", uint64(ids.GetUid()))
	dst = appendUint(dst, "gid", uint64(ids.GetGid()))
	dst = appendUint(dst, "suid", uint64(ids.GetSuid()))
	dst = appendUint(dst, "sgid", uint64(ids.GetSgid()))
	dst = appendUint(dst, "euid", uint64(ids.GetEuid()))
	dst = appendUint(dst, "egid", uint64(ids.GetEgid()))
	dst = appendUint(dst, "fsuid", uint64(ids.GetFsuid()))
	return appendUint(dst, "fsgid", uint64(ids.GetFsgid()))
}

func appendCaps(dst []byte, key string, set *uint64) []byte {
	if set == nil {
		return dst
	}
	dst = appendKey(dst, key)
	dst = append(dst, '[')
	for rest := *set; rest != 0; rest &= rest - 1 {
		dst = appendElem(dst)
		dst = append(dst, '"')
		dst = AppendCapability(dst, bits.TrailingZeros64(rest))
		dst = append(dst, '"')
	}
	return append(dst, ']')
}

func appendExeFile(dst []byte, f *pb.ExeFile) []byte {
	dst = appendKey(dst, "exeFile")
	dst = append(dst, '{')
	dst = appendBig(dst, "dev", f.GetDev())
	dst = appendBig(dst, "ino", f.GetIno())
	dst = appendKey(dst, "mode")
	dst = append(dst, `"0`...)
	dst = strconv.AppendUint(dst, uint64(f.GetMode()), 8)
	dst = append(dst, '"')
	dst = appendUint(dst, "uid", uint64(f.GetUid()))
	dst = appendUint(dst, "gid", uint64(f.GetGid()))
	dst = appendUint(dst, "nlink", uint64(f.GetNlink()))
	if m := f.GetFsMagic(); m != 0 {
		dst = appendKey(dst, "fsMagic")
		dst = append(dst, `"0x`...)
		dst = strconv.AppendUint(dst, m, 16)
		dst = append(dst, '"')
	}
	return append(dst, '}')
}

func appendChange(dst []byte, c *pb.Change) []byte {
	if c == nil {
		return dst
	}
	dst = appendKey(dst, "change")
	dst = append(dst, '{')
	dst = appendChangeSide(dst, "from", c.GetFrom(), c.GetFromName())
	dst = appendChangeSide(dst, "to", c.GetTo(), c.GetToName())
	dst = appendStr(dst, "cause", c.GetCause())
	dst = appendCaps(dst, "capabilitiesBefore", c.CapsBefore)
	dst = appendText(dst, "exe", c.Exe)
	if f := c.GetExeFile(); f != nil {
		dst = appendExeFile(dst, f)
	}
	return append(dst, '}')
}

func appendChangeSide(dst []byte, key string, ids *pb.IDs, name []byte) []byte {
	if ids == nil && name == nil {
		return dst
	}
	dst = appendKey(dst, key)
	dst = append(dst, '{')
	dst = appendIDs(dst, ids)
	dst = appendText(dst, "name", name)
	return append(dst, '}')
}

func appendExit(dst []byte, e *pb.Exit) []byte {
	if e == nil {
		return dst
	}
	dst = appendKey(dst, "exit")
	dst = append(dst, '{')
	if sig := e.GetSignal(); sig != 0 {
		dst = appendKey(dst, "signal")
		dst = append(dst, '"')
		dst = AppendSignal(dst, sig)
		dst = append(dst, '"')
	}
	if e.GetSignal() == 0 || e.GetCode() != 0 { // a process ended by a signal has no exit code
		dst = appendInt(dst, "code", e.GetCode())
	}
	dst = appendTrue(dst, "coreDumped", e.GetCoreDumped())
	dst = appendSeconds(dst, "durationSeconds", e.GetDurationNs())
	dst = appendSeconds(dst, "cpuSeconds", e.GetCpuNs())
	return append(dst, '}')
}

func appendContainer(dst []byte, c *pb.Container) []byte {
	if c == nil {
		return dst
	}
	dst = appendKey(dst, "container")
	dst = append(dst, '{')
	dst = appendStr(dst, "id", c.GetId())
	dst = appendStr(dst, "name", c.GetName())
	dst = appendStr(dst, "image", c.GetImage())
	dst = appendStr(dst, "runtime", c.GetRuntime())
	dst = appendStr(dst, "imageDigest", c.GetImageDigest())
	dst = appendStr(dst, "kind", c.GetKind())
	dst = appendTrue(dst, "privileged", c.GetPrivileged())
	dst = appendTrue(dst, "sandbox", c.GetSandbox())
	return append(dst, '}')
}

func appendPod(dst []byte, p *pb.Pod) []byte {
	if p == nil {
		return dst
	}
	dst = appendKey(dst, "pod")
	dst = append(dst, '{')
	dst = appendStr(dst, "uid", p.GetUid())
	dst = appendStr(dst, "namespace", p.GetNamespace())
	dst = appendStr(dst, "name", p.GetName())
	if len(p.GetLabels()) > 0 {
		dst = appendKey(dst, "labels")
		dst = appendStringMap(dst, p.GetLabels())
	}
	dst = appendStr(dst, "serviceAccount", p.GetServiceAccount())
	dst = appendStr(dst, "ownerKind", p.GetOwnerKind())
	dst = appendStr(dst, "ownerName", p.GetOwnerName())
	if len(p.GetAnnotations()) > 0 {
		dst = appendKey(dst, "annotations")
		dst = appendStringMap(dst, p.GetAnnotations())
	}
	dst = appendTrue(dst, "hostPID", p.GetHostPid())
	dst = appendTrue(dst, "hostNetwork", p.GetHostNetwork())
	dst = appendTrue(dst, "hostIPC", p.GetHostIpc())
	return append(dst, '}')
}

func appendSources(dst []byte, m map[string]string) []byte {
	if len(m) == 0 {
		return dst
	}
	dst = appendKey(dst, "sources")
	return appendStringMap(dst, m)
}

// appendStringMap appends m in the order of its keys. Up to 32 of them are
// sorted on the stack.
func appendStringMap(dst []byte, m map[string]string) []byte {
	var room [32]string
	keys := room[:0]
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	dst = append(dst, '{')
	for _, k := range keys {
		dst = appendElem(dst)
		dst = appendString(dst, k)
		dst = append(dst, ':')
		dst = appendString(dst, m[k])
	}
	return append(dst, '}')
}

func appendEvidence(dst []byte, ev []*pb.Evidence) []byte {
	if len(ev) == 0 {
		return dst
	}
	dst = appendKey(dst, "evidence")
	dst = append(dst, '[')
	for _, e := range ev {
		dst = appendElem(dst)
		dst = append(dst, '{')
		dst = appendStr(dst, "field", e.GetField())
		if e.GetMissing() {
			dst = appendTrue(dst, "missing", true)
		}
		if !e.GetMissing() && e.GetField() != "" || e.GetValue() != "" {
			dst = appendKey(dst, "value")
			dst = appendString(dst, e.GetValue())
		}
		dst = appendStr(dst, "term", e.GetTerm())
		dst = appendStr(dst, "truth", e.GetTruth())
		dst = appendStr(dst, "exception", e.GetException())
		dst = appendStrings(dst, "found", e.GetFound())
		dst = append(dst, '}')
	}
	return append(dst, ']')
}

// appendAggregated appends what an alert for several matches stands for. The
// first of them is named by its id, which has all but the number of this one's.
func appendAggregated(dst []byte, id Identity, g *pb.Aggregated) []byte {
	if g == nil {
		return dst
	}
	dst = appendKey(dst, "aggregated")
	dst = append(dst, '{')
	dst = appendUint(dst, "count", g.GetCount())
	if id.Seq = g.GetFirstSeq(); id.Seq != 0 {
		dst = appendKey(dst, "first")
		dst = appendID(dst, id)
	}
	dst = appendStr(dst, "why", g.GetWhy())
	dst = appendTime(dst, "from", g.GetFrom())
	dst = appendTime(dst, "until", g.GetUntil())
	if len(g.GetSamples()) > 0 {
		dst = appendKey(dst, "samples")
		dst = append(dst, '[')
		for _, s := range g.GetSamples() {
			dst = appendElem(dst)
			dst = append(dst, '{')
			dst = appendTime(dst, "time", s.GetTime())
			dst = appendInt(dst, "pid", s.GetPid())
			if s.Uid != nil {
				dst = appendUint(dst, "uid", uint64(s.GetUid()))
			}
			dst = appendText(dst, "exe", s.Exe)
			dst = appendText(dst, "cmdline", s.Cmdline)
			dst = append(dst, '}')
		}
		dst = append(dst, ']')
	}
	return append(dst, '}')
}

func appendMitre(dst []byte, ms []*pb.Mitre) []byte {
	if len(ms) == 0 {
		return dst
	}
	dst = appendKey(dst, "mitre")
	dst = append(dst, '[')
	for _, m := range ms {
		dst = appendElem(dst)
		dst = append(dst, '{')
		dst = appendStr(dst, "tactic", m.GetTactic())
		dst = appendStr(dst, "technique", m.GetTechnique())
		dst = append(dst, '}')
	}
	return append(dst, ']')
}

// appendElem appends the comma before all but the first element.
func appendElem(dst []byte) []byte {
	if c := dst[len(dst)-1]; c != '{' && c != '[' {
		dst = append(dst, ',')
	}
	return dst
}

func appendKey(dst []byte, key string) []byte {
	dst = appendElem(dst)
	dst = append(dst, '"')
	dst = append(dst, key...)
	return append(dst, `":`...)
}

// appendStr appends a key unless its value is empty: proto3 strings have no
// other way to be missing.
func appendStr(dst []byte, key, v string) []byte {
	if v == "" {
		return dst
	}
	dst = appendKey(dst, key)
	return appendString(dst, v)
}

func appendStrings(dst []byte, key string, vs []string) []byte {
	if len(vs) == 0 {
		return dst
	}
	dst = appendKey(dst, key)
	dst = append(dst, '[')
	for _, v := range vs {
		dst = appendElem(dst)
		dst = appendString(dst, v)
	}
	return append(dst, ']')
}

// appendText appends text a process chose, and its bytes when it is not UTF-8.
func appendText(dst []byte, key string, v []byte) []byte {
	if v == nil {
		return dst
	}
	dst = appendKey(dst, key)
	dst = appendString(dst, v)
	if !utf8.Valid(v) {
		dst = appendRaw(dst, key, v)
	}
	return dst
}

func appendRaw(dst []byte, key string, v []byte) []byte {
	dst = append(dst, `,"`...)
	dst = append(dst, key...)
	dst = append(dst, `Raw":"`...)
	dst = base64.StdEncoding.AppendEncode(dst, v)
	return append(dst, '"')
}

func appendTrue(dst []byte, key string, v bool) []byte {
	if !v {
		return dst
	}
	dst = appendKey(dst, key)
	return append(dst, "true"...)
}

func appendInt(dst []byte, key string, v int32) []byte {
	dst = appendKey(dst, key)
	return strconv.AppendInt(dst, int64(v), 10)
}

func appendOptInt(dst []byte, key string, v *int32) []byte {
	if v == nil {
		return dst
	}
	return appendInt(dst, key, *v)
}

// appendUint is for values below 2^53, which every JSON reader keeps exact.
func appendUint(dst []byte, key string, v uint64) []byte {
	dst = appendKey(dst, key)
	return strconv.AppendUint(dst, v, 10)
}

func appendNonZero(dst []byte, key string, v uint32) []byte {
	if v == 0 {
		return dst
	}
	return appendUint(dst, key, uint64(v))
}

// appendBig appends a 64-bit value as a string of decimal digits: readers that
// keep numbers as float64 (JavaScript, jq) would round it from 2^53 on, which
// nanoseconds since boot reach after 104 days.
func appendBig(dst []byte, key string, v uint64) []byte {
	dst = appendKey(dst, key)
	dst = append(dst, '"')
	dst = strconv.AppendUint(dst, v, 10)
	return append(dst, '"')
}

// appendSeconds appends nanoseconds as a number of seconds; 0 is unknown.
func appendSeconds(dst []byte, key string, ns uint64) []byte {
	if ns == 0 {
		return dst
	}
	dst = appendKey(dst, key)
	dst = strconv.AppendUint(dst, ns/1e9, 10)
	return appendFraction(dst, ns%1e9, 9)
}

// appendFraction appends a dot and v with leading zeros in the given number of
// digits.
func appendFraction(dst []byte, v uint64, digits int) []byte {
	dst = append(dst, '.')
	var b [20]byte
	for i := digits - 1; i >= 0; i-- {
		b[i] = byte('0' + v%10)
		v /= 10
	}
	return append(dst, b[:digits]...)
}

// appendTime appends a time in UTC. One that RFC 3339 cannot express is as
// good as missing.
func appendTime(dst []byte, key string, ts *timestamppb.Timestamp) []byte {
	if ts == nil || !ts.IsValid() {
		return dst
	}
	dst = appendKey(dst, key)
	dst = append(dst, '"')
	dst = ts.AsTime().AppendFormat(dst, timeLayout)
	return append(dst, '"')
}

// appendString appends a JSON string.
func appendString[T text](dst []byte, s T) []byte {
	dst = append(dst, '"')
	dst = appendStringBody(dst, s)
	return append(dst, '"')
}

// appendStringBody escapes more than JSON asks for: what a terminal or a
// viewer would not show plainly goes as \uNNNN, which reads back as the same
// character. So JSON may be looked at, too.
func appendStringBody[T text](dst []byte, s T) []byte {
	start := 0 // of the run that needs no escape
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c < 0x7f && c != '"' && c != '\\' {
			i++
			continue
		}
		if c < utf8.RuneSelf {
			dst = append(dst, s[start:i]...)
			dst = appendASCIIEscape(dst, c)
			i++
			start = i
			continue
		}
		r, size := decodeRune(s, i)
		bad := r == utf8.RuneError && size == 1
		// A combining mark at the start would sit on the quote before it.
		if bad || !visible(r) || i == 0 && unicode.Is(unicode.M, r) {
			dst = append(dst, s[start:i]...)
			if bad {
				dst = append(dst, "\ufffd"...)
			} else {
				dst = appendUEscape(dst, r)
			}
			start = i + size
		}
		i += size
	}
	return append(dst, s[start:]...)
}

func appendASCIIEscape(dst []byte, c byte) []byte {
	switch c {
	case '"', '\\':
		return append(dst, '\\', c)
	case '\n':
		return append(dst, `\n`...)
	case '\r':
		return append(dst, `\r`...)
	case '\t':
		return append(dst, `\t`...)
	}
	return append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
}

// appendUEscape appends one \uNNNN, or two for a rune above U+FFFF.
func appendUEscape(dst []byte, r rune) []byte {
	if r > 0xffff {
		r -= 0x10000
		dst = appendUEscape(dst, 0xd800+(r>>10))
		r = 0xdc00 + (r & 0x3ff)
	}
	return append(dst, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}

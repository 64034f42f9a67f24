package celenv

import (
	"fmt"
	"math/bits"
	"path"
	"strings"
	"unicode/utf8"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"

	"github.com/procession-dev/procession/internal/event"
)

// MaxText bounds the bytes of one text an expression sees. What is longer
// keeps the first and the last MaxText/2.
const MaxText = 8 << 10

// maxArgs bounds process.args: the first and the last maxArgs/2.
const maxArgs = 512

// cutMark stands where a text was cut.
const cutMark = " … "

// valid makes s valid UTF-8. Names and arguments are bytes a process chose.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// clean makes raw what an expression sees: valid UTF-8, and head and tail of
// what is longer than MaxText.
func clean(raw string) string {
	if len(raw) <= MaxText && utf8.ValidString(raw) {
		return raw
	}
	if len(raw) > MaxText {
		raw = raw[:MaxText/2] + cutMark + raw[len(raw)-MaxText/2:]
	}
	raw = valid(raw)
	if len(raw) > MaxText+len(cutMark) { // a bad byte became three
		raw = cut(raw, MaxText)
	}
	return raw
}

// appendClean appends what clean makes of raw.
func appendClean(dst []byte, raw string) []byte { return append(dst, clean(raw)...) }

func firstArg(cmdline string) string {
	arg, _, _ := strings.Cut(cmdline, "\x00")
	return arg
}

// unended drops the NUL that ends the last argument.
func unended(cmdline string) string { return strings.TrimSuffix(cmdline, "\x00") }

// joinArgs makes one text of an argv.
func joinArgs(cmdline string) string {
	return strings.ReplaceAll(clean(unended(cmdline)), "\x00", " ")
}

// argsTooLong says whether the text or the list of an argv leaves something
// out.
func argsTooLong(cmdline string) bool {
	s := unended(cmdline)
	return len(s) > MaxText || strings.Count(s, "\x00") >= maxArgs ||
		len(s) > MaxText/3 && !utf8.ValidString(s) && len(valid(s)) > MaxText+len(cutMark)
}

// splitArgs makes a list of an argv, of at most maxArgs elements.
func splitArgs(cmdline string) []string {
	if cmdline == "" {
		return nil
	}
	args := strings.Split(clean(unended(cmdline)), "\x00")
	if len(args) > maxArgs {
		args = append(args[:maxArgs/2], args[len(args)-maxArgs/2:]...)
	}
	return args
}

// script is the file whose #! line named the program: the kernel then hands
// the interpreter argv [interpreter, (its argument,) file, ...], and the
// interpreter as the line names it, which is a path (fs/binfmt_script.c).
func script(p *event.Process) string {
	if p.File == "" || path.Base(p.File) == path.Base(p.Exe) {
		return ""
	}
	interpreter, rest, _ := strings.Cut(p.Cmdline, "\x00")
	if !strings.Contains(interpreter, "/") {
		return ""
	}
	for range 2 {
		var arg string
		if arg, rest, _ = strings.Cut(rest, "\x00"); arg == p.File {
			return p.File
		}
	}
	return ""
}

// A list is a list of text with fast membership: lists.NAME may be long.
type list struct {
	traits.Lister
	values []string
	set    map[string]struct{} // nil for short lists
}

// A list shorter than this is searched faster one by one.
const setFrom = 9

// newList is the list for an event's own values, searched one by one.
func newList(values []string) *list {
	return &list{Lister: types.NewStringList(types.DefaultTypeAdapter, values), values: values}
}

// newSet is the list for values that are asked about again and again.
func newSet(values []string) *list {
	l := newList(values)
	if len(values) >= setFrom {
		l.set = make(map[string]struct{}, len(values))
		for _, v := range values {
			l.set[v] = struct{}{}
		}
	}
	return l
}

// Contains implements `in`.
func (l *list) Contains(v ref.Val) ref.Val {
	s, ok := v.(types.String)
	if !ok {
		return l.Lister.Contains(v)
	}
	if l.set != nil {
		_, ok := l.set[string(s)]
		return types.Bool(ok)
	}
	for _, x := range l.values {
		if x == string(s) {
			return types.True
		}
	}
	return types.False
}

// splitImage takes an image's name apart: registry:port/path:tag@digest.
func splitImage(image string) (repository, tag string) {
	repository, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndexByte(repository, ':'); i > strings.LastIndexByte(repository, '/') {
		return repository[:i], repository[i+1:]
	}
	return repository, ""
}

// capabilities by bit (include/uapi/linux/capability.h).
var capabilities = [...]string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

func capNames(mask uint64) ref.Val {
	names := make([]string, 0, bits.OnesCount64(mask))
	for i := 0; mask != 0; i, mask = i+1, mask>>1 {
		switch {
		case mask&1 == 0:
		case i < len(capabilities):
			names = append(names, capabilities[i])
		default:
			names = append(names, fmt.Sprintf("CAP_%d", i))
		}
	}
	return newList(names)
}

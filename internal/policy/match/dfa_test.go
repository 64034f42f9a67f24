package match

import (
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/policy/match/matchtest"
)

var regexps = []string{``, `a`, `^a`, `a$`, `^$`, `^`, `\bid\b`, `\Bid`, `(?i)sk`, `(?m)^b$`, `(?s)a.b`, `a.b`, `\Aab\z`, `[^a]x$`, `(a*)*b`, `(x+x+)+y`, `a{2,4}b?`,
	`(curl|wget)[^;&]*\|\s*(sudo\s+)?(sh|bash)`, `\b(sh|eval)\b[^;|]*(\$\(|<\()\s*(curl|wget)\b`, `[é-ü]+`, `\p{Greek}`, `(?i)É`, `[[:word:]]+@`, `x*`, `a||b`, `\d+\.\d+`,
	`^(/bin/)?sh -c (exec )?`, `(^|[^a])b($|c)`, `\b`, `\B`, `^\b`, `\n$`, `(?m)$`, `.{3}$`, `a\x{FFFD}`, `(?i)k`, `(?i)[a-s]z`, `$^`, `\b\B`, `(a|ab)(c|bcd)(d*)`}

var subjects = []string{"", "a", "b", "ab", "aab", "id", "xid y", "SK", "s\u212a", "a\nb", "a\n\nb\n", "xxxxxxxxxxxxxxxxx", "curl x | sudo bash", "sh -c $( curl x", "éü", "Ωmega", "É", "x@y",
	"10.0.1", "/bin/sh -c exec x", "aaabbbccc", "abcd", "k", "\u212a", "\u017fz", "a\ufffd", "\n", " ", "a b", strings.Repeat("ab ", 300), strings.Repeat("curl | ", 500)}

func newPool(n int) *int { return &n }

func TestDFAIsTheLibrary(t *testing.T) {
	for _, src := range regexps {
		re := regexp.MustCompile(src)
		d := newDFA(re, newPool(poolBytes))
		if d == nil {
			t.Logf("%q is left to the library", src)
			continue
		}
		for range 2 { // the second time from states that are there
			for _, s := range subjects {
				if got, want := d.match([]byte(s)), re.MatchString(s); got != want {
					t.Errorf("%q in %.60q: got %v, want %v", src, s, got, want)
				}
			}
		}
	}
}

// Random expressions, too many states among them, in random texts.
func TestRandomDFAs(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	parts := []string{"a", "b", "[ab]", ".", "a*", "(a|b)", "(ab|ba)*", "b+?", "\\b", "^", "$", "x?", "(?:a{2,3})", "[^b]", "\\s", "é", "(?i:K)", "\\w", "a{8}", ".{7}"}
	texts := []string{"a", "b", "ab", "x", " ", "\n", "é", "k", "\u212a", "_", "-"}
	left, total := 0, 0
	for range 1500 {
		var src strings.Builder
		for range 1 + r.IntN(6) {
			src.WriteString(parts[r.IntN(len(parts))])
			if r.IntN(6) == 0 {
				src.WriteByte('|')
			}
		}
		re, err := regexp.Compile(src.String())
		if err != nil {
			continue
		}
		total++
		d := newDFA(re, newPool(poolBytes))
		if d == nil {
			left++
			continue
		}
		for range 20 {
			var text strings.Builder
			for range r.IntN(40) {
				text.WriteString(texts[r.IntN(len(texts))])
			}
			if got, want := d.match([]byte(text.String())), re.MatchString(text.String()); got != want {
				t.Fatalf("%q in %q: got %v, want %v", src.String(), text.String(), got, want)
			}
		}
	}
	if total < 1000 || left > total/10 {
		t.Errorf("%d of %d expressions are left to the library", left, total)
	}
}

// Where there is no room for states the library is asked, and the room that
// was taken comes back.
func TestDFAWithoutRoom(t *testing.T) {
	pool := newPool(2000)
	for _, src := range regexps {
		re := regexp.MustCompile(src)
		d := newDFA(re, pool)
		if d == nil {
			continue
		}
		for _, s := range subjects {
			if got, want := d.match([]byte(s)), re.MatchString(s); got != want {
				t.Errorf("%q in %.60q: got %v, want %v", src, s, got, want)
			}
		}
		if d.reset(); d.kept != 0 {
			t.Errorf("%q keeps %d bytes", src, d.kept)
		}
	}
	if *pool != 2000 {
		t.Errorf("%d bytes are left of 2000", *pool)
	}
}

// An expression whose states are too many comes to the library, and is right
// on the way there.
func TestDFAWithTooManyStates(t *testing.T) {
	re := regexp.MustCompile(`a[ab]{11}x`)
	d := newDFA(re, newPool(poolBytes))
	r := rand.New(rand.NewPCG(2, 2))
	for i := 0; d.drops < maxDrops && i < 10000; i++ {
		b := make([]byte, 4096)
		for j := range b {
			b[j] = "ab"[r.IntN(2)]
		}
		if r.IntN(2) == 0 {
			b[len(b)-1] = 'x'
		}
		if got, want := d.match(b), re.Match(b); got != want {
			t.Fatalf("got %v, want %v", got, want)
		}
		if len(d.states) > maxStates {
			t.Fatalf("%d states", len(d.states))
		}
	}
}

func FuzzDFA(f *testing.F) {
	for i, src := range regexps {
		f.Add(src, subjects[i%len(subjects)])
	}
	f.Fuzz(func(t *testing.T, src, text string) {
		re, err := regexp.Compile(src)
		if err != nil || len(src) > 200 {
			return
		}
		d := newDFA(re, newPool(poolBytes))
		if d == nil {
			return
		}
		text = strings.ToValidUTF8(text, "\ufffd")
		for range 2 {
			if got, want := d.match([]byte(text)), re.MatchString(text); got != want {
				t.Fatalf("%q in %q: got %v, want %v", src, text, got, want)
			}
		}
	})
}

func BenchmarkRegexp(b *testing.B) {
	re := regexp.MustCompile(regexps[17])
	long := []byte(strings.Repeat("wget curl iptables nft socket | x ", 241))
	line := []byte(strings.ReplaceAll(matchtest.Everyday(1, 1)[0].Process.Cmdline, "\x00", " "))
	for name, text := range map[string][]byte{"8KiB": long, "line": line} {
		b.Run("library/"+name, func(b *testing.B) {
			for b.Loop() {
				re.Match(text)
			}
		})
		b.Run("dfa/"+name, func(b *testing.B) {
			d := newDFA(re, newPool(poolBytes))
			for b.Loop() {
				d.match(text)
			}
		})
	}
}

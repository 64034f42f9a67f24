package present

import (
	"strconv"
	"unicode"
	"unicode/utf8"
)

// text is what the escaping functions take: proto bytes and proto strings.
type text interface{ ~string | ~[]byte }

// decodeRune is utf8.DecodeRune for both kinds of text. The conversion copies
// at most four bytes, onto the stack.
func decodeRune[T text](s T, i int) (rune, int) {
	return utf8.DecodeRuneInString(string(s[i:min(i+utf8.UTFMax, len(s))]))
}

// visible says whether a rune of more than one byte shows what it is: it is
// not a control (C1), a bidirectional or other format character, a separator
// or space other than ' ', not private, unassigned, or drawn as nothing.
func visible(r rune) bool {
	if !unicode.IsPrint(r) {
		return false
	}
	switch {
	case r == '\u2800': // braille blank: a symbol that looks like a space
		return false
	case unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r), // Hangul fillers, CGJ, tags
		unicode.Is(unicode.Variation_Selector, r):
		return false
	}
	return true
}

// maxMarks is how many combining marks in a row are shown. Writing systems
// need up to four; more is a way to paint over the lines above.
const maxMarks = 4

// AppendSafe appends one word as a terminal may show it. The word is put in
// single quotes when it is empty, has spaces, or could be taken for the
// line's own signs. Everything that is not plainly visible is escaped:
//
//	\n \t \r \\ \'   as usual; the quote only ever appears in quoted words
//	\xNN             an ASCII control, or a byte that is not UTF-8
//	\u{NNNN}         a control, format, bidirectional, invisible, private or
//	                 unassigned character, an odd space, a stray combining mark
//
// The escapes can be undone: no two words look the same.
func AppendSafe(dst, raw []byte) []byte { return appendWord(dst, raw, false) }

// appendWord is AppendSafe; inDouble also escapes the double quote, for words
// within a double-quoted command line.
func appendWord[T text](dst []byte, s T, inDouble bool) []byte {
	quote := needsQuote(s)
	if quote {
		dst = append(dst, '\'')
	}
	dst = appendEscaped(dst, s, true, inDouble)
	if quote {
		dst = append(dst, '\'')
	}
	return dst
}

func needsQuote[T text](s T) bool {
	if len(s) == 0 {
		return true
	}
	for i := range len(s) {
		switch s[i] {
		case ' ', '\'':
			return true
		case 0xe2: // first byte of the arrow and the ellipsis, which lines use as signs
			if r, _ := decodeRune(s, i); r == '→' || r == '…' {
				return true
			}
		}
	}
	return false
}

// AppendPhrase appends text that stands alone, as a value in somebody else's
// form: what is not plainly visible is escaped as by AppendSafe, and it has no
// quotes around it.
func AppendPhrase(dst, raw []byte) []byte { return appendEscaped(dst, raw, false, false) }

// appendEscaped escapes what is not plainly visible and, if asked, quotes.
func appendEscaped[T text](dst []byte, s T, inSingle, inDouble bool) []byte {
	marks := maxMarks // combining marks since the last character that can carry one
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			i++
			marks = maxMarks
			switch {
			case c == '\n':
				dst = append(dst, `\n`...)
			case c == '\t':
				dst = append(dst, `\t`...)
			case c == '\r':
				dst = append(dst, `\r`...)
			case c < ' ' || c == 0x7f:
				dst = appendHexByte(dst, c)
			case c == '\\' || c == '\'' && inSingle || c == '"' && inDouble:
				dst = append(dst, '\\', c)
			default:
				dst = append(dst, c)
				if c != ' ' {
					marks = 0
				}
			}
			continue
		}
		r, size := decodeRune(s, i)
		i += size
		switch {
		case r == utf8.RuneError && size == 1:
			dst = appendHexByte(dst, c)
			marks = maxMarks
		case !visible(r):
			dst = appendCodePoint(dst, r)
			marks = maxMarks
		case unicode.Is(unicode.M, r):
			if marks >= maxMarks {
				dst = appendCodePoint(dst, r)
				break
			}
			marks++
			dst = utf8.AppendRune(dst, r)
		default:
			marks = 0
			dst = utf8.AppendRune(dst, r)
		}
	}
	return dst
}

const hexDigits = "0123456789abcdef"

func appendHexByte(dst []byte, c byte) []byte {
	return append(dst, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
}

func appendCodePoint(dst []byte, r rune) []byte {
	dst = append(dst, `\u{`...)
	dst = strconv.AppendUint(dst, uint64(r), 16)
	return append(dst, '}')
}

// cells is how many columns a terminal needs for s, or a little more: when in
// doubt a character counts as wide, so that a cut line never wraps. Colour
// sequences, the only escapes in s, count nothing.
func cells(s []byte) int {
	n := 0
	for i := 0; i < len(s); {
		if s[i] == 0x1b {
			i = skipColour(s, i)
			continue
		}
		r, size := utf8.DecodeRune(s[i:])
		i += size
		n += runeCells(r)
	}
	return n
}

func skipColour(s []byte, i int) int {
	for i < len(s) && s[i] != 'm' {
		i++
	}
	return i + 1
}

// runeCells follows East Asian Width (Unicode TR 11) generously.
func runeCells(r rune) int {
	switch {
	case r < 0x1100:
		return 1
	case r <= 0x115f, // Hangul Jamo
		r >= 0x231a && r <= 0x23f3, // watches, arrows drawn as emoji
		r >= 0x25fd && r <= 0x27bf,
		r >= 0x2b00 && r <= 0x2bff,
		r >= 0x2e80 && r <= 0xa4cf, // CJK
		r >= 0xa960 && r <= 0xa97c,
		r >= 0xac00 && r <= 0xd7a3, // Hangul
		r >= 0xf900 && r <= 0xfaff,
		r >= 0xfe10 && r <= 0xfe6f,
		r >= 0xff00 && r <= 0xffe6, // full width forms
		r >= 0x16fe0:
		return 2
	}
	return 1
}

// fit cuts what follows dst[:start] down to width columns, the last of them an
// ellipsis, and leaves it as it is when it fits.
func fit(dst []byte, start, width int) []byte {
	n, cut, coloured := 0, -1, false
	for i := start; i < len(dst); {
		if dst[i] == 0x1b {
			coloured = true
			i = skipColour(dst, i)
			continue
		}
		r, size := utf8.DecodeRune(dst[i:])
		w := runeCells(r)
		if cut < 0 && n+w > width-1 {
			cut = i // the ellipsis would go here
		}
		if n += w; n > width {
			dst = append(dst[:cut], "…"...)
			if coloured {
				dst = append(dst, colourOff...)
			}
			return dst
		}
		i += size
	}
	return dst
}

package author

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/procession-dev/procession/internal/present"
)

// style is how text looks on the terminal at hand.
type style struct {
	color bool
	width int // of the terminal in cells; 0 not known
}

const (
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
	bold   = "1"
	dim    = "2"
)

// in paints text.
func (s style) in(code, text string) string {
	if !s.color || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// fill makes text n cells wide, as far as a count of runes tells.
func fill(text string, n int) string {
	return text + strings.Repeat(" ", max(0, n-utf8.RuneCountInString(text)))
}

// safe is text that somebody else chose, as a terminal may show it.
func safe(text string) string { return string(present.AppendSafe(nil, []byte(text))) }

// short keeps the beginning of text, n runes of it.
func short(text string, n int) string {
	if utf8.RuneCountInString(text) <= n {
		return text
	}
	for i := range text {
		if n--; n == 0 {
			return text[:i] + "…"
		}
	}
	return text
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

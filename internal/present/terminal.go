package present

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/term"
)

// StyleFor is how lines look on out, with local times. color is auto (colours
// on a terminal, unless NO_COLOR is set), always or never. A file or a pipe gets
// whole lines; terminal says that out is neither.
func StyleFor(out io.Writer, color string) (s Style, terminal bool, err error) {
	s.Zone = time.Local
	file, isFile := out.(*os.File)
	terminal = isFile && term.IsTerminal(int(file.Fd()))
	switch color {
	case "auto":
		s.Color = terminal && os.Getenv("NO_COLOR") == ""
	case "always":
		s.Color = true
	case "never":
	default:
		return s, terminal, fmt.Errorf("%.64q is none of auto, always, never", color)
	}
	if terminal {
		if width, _, err := term.GetSize(int(file.Fd())); err == nil {
			s.Width = width
		}
	}
	return s, terminal, nil
}

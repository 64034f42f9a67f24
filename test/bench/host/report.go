package host

import (
	"bytes"
	"encoding/json"
	"io"

	"github.com/procession-dev/procession/internal/wholefile"
)

// WriteFile makes what write writes the content of a file, or leaves the file
// as it is.
func WriteFile(path string, write func(io.Writer) error) error {
	var b bytes.Buffer
	if err := write(&b); err != nil {
		return err
	}
	return wholefile.Replace(path, b.Bytes(), 0o644)
}

// WriteJSON is WriteFile of a value, indented.
func WriteJSON(path string, v any) error {
	return WriteFile(path, func(w io.Writer) error {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	})
}

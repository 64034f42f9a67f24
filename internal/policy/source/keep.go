package source

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/procession-dev/procession/internal/wholefile"
)

// keep is the file with the policies in force: a line with the SHA-256 of the
// rest, and the rest as JSON. It is written whole or not at all.
type keep string

// kept is one object in the file.
type kept struct {
	Key  string `json:"key"`            // kind/namespace/name
	Text []byte `json:"text"`           // as the API server had it last
	Good []byte `json:"good,omitempty"` // the last version that compiled, if that is another one
}

const maxKeep = 256 << 20 // bytes; all policies of a large cluster are far below

// read gives nothing if there is no file.
func (k keep) read() ([]kept, error) {
	if k == "" {
		return nil, nil
	}
	b, err := wholefile.Read(string(k), maxKeep)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseKept(string(k), b)
}

func parseKept(name string, b []byte) ([]kept, error) {
	sum, rest, ok := bytes.Cut(b, []byte("\n"))
	if !ok || string(sum) != checksum(rest) {
		return nil, fmt.Errorf("%s is damaged: its checksum is wrong", name)
	}
	var all []kept
	if err := json.Unmarshal(rest, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return all, nil
}

func encodeKept(all []kept) ([]byte, error) {
	rest, err := json.Marshal(all)
	if err != nil {
		return nil, err
	}
	return append([]byte(checksum(rest)+"\n"), rest...), nil
}

func checksum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (k keep) write(all []kept) error {
	if k == "" {
		return nil
	}
	b, err := encodeKept(all)
	if err != nil {
		return err
	}
	return wholefile.Replace(string(k), b, 0o600)
}

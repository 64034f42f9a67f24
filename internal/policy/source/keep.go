package source

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
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
	f, err := os.Open(string(k))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKeep+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxKeep {
		return nil, fmt.Errorf("%s is larger than %d bytes", string(k), maxKeep)
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

func (k keep) write(all []kept) (err error) {
	if k == "" {
		return nil
	}
	b, err := encodeKept(all)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(string(k)), ".policies-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), string(k)); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(string(k)))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

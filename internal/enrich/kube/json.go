package kube

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Bounds of an answer. An object in etcd is at most 1.5 MiB.
const (
	maxObject = 4 << 20   // bytes of one pod's object
	maxBraces = 64 << 10  // objects in it: three bytes of text become half a kilobyte of memory
	maxAnswer = 256 << 20 // bytes of a list
	maxRead   = 16 << 10  // bytes read at a time: how far one object's count reaches into the next
)

// errTooLarge reports an answer beyond these bounds.
var errTooLarge = errors.New("the answer is too large")

// A MalformedError says that an answer is no list of pods.
type MalformedError struct{ Err error }

func (e *MalformedError) Error() string { return "the answer is no list of pods: " + e.Err.Error() }

func (e *MalformedError) Unwrap() error { return e.Err }

// A meter bounds what is read: in all, and since the last object.
type meter struct {
	r                   io.Reader
	all, object, braces int
}

func (m *meter) Read(b []byte) (int, error) {
	if m.all > maxAnswer || m.object > maxObject || m.braces > maxBraces {
		return 0, errTooLarge
	}
	n, err := m.r.Read(b[:min(len(b), maxRead)])
	m.all += n
	m.object += n
	m.braces += bytes.Count(b[:n], []byte("{"))
	return n, err
}

// A decoder reads a v1.PodList from JSON, one pod after the other: no more
// than one object is in memory.
type decoder struct {
	in  meter
	dec *json.Decoder
}

func newDecoder(r io.Reader) *decoder {
	d := &decoder{in: meter{r: r}}
	d.dec = json.NewDecoder(&d.in)
	return d
}

// list calls each for each pod, and returns the list's resource version.
func (d *decoder) list(each func(*wirePod)) (version string, err error) {
	if err := d.delim('{'); err != nil {
		return "", err
	}
	kind := ""
	for d.dec.More() {
		key, err := d.dec.Token()
		if err != nil {
			return "", d.fault(err)
		}
		switch key {
		case "kind":
			err = d.dec.Decode(&kind)
		case "metadata":
			var m wireMeta
			err = d.dec.Decode(&m)
			version = m.ResourceVersion
		case "items":
			err = d.items(each)
		default:
			var skip json.RawMessage
			err = d.dec.Decode(&skip)
		}
		if err != nil {
			return "", d.fault(err)
		}
	}
	if err := d.delim('}'); err != nil {
		return "", err
	}
	if kind != "PodList" && kind != "List" {
		return "", &MalformedError{fmt.Errorf("kind is %.40q", kind)}
	}
	return version, nil
}

// items reads the array. A kubelet without pods writes null.
func (d *decoder) items(each func(*wirePod)) error {
	t, err := d.dec.Token()
	if err != nil || t == nil {
		return err
	}
	if t != json.Delim('[') {
		return fmt.Errorf("items is no array: %.40v", t)
	}
	for d.dec.More() {
		var p wirePod
		if err := d.dec.Decode(&p); err != nil {
			return fmt.Errorf("pod %.80q: %w", p.Metadata.Name, err)
		}
		d.in.object, d.in.braces = 0, 0
		each(&p)
	}
	_, err = d.dec.Token()
	return err
}

func (d *decoder) delim(want json.Delim) error {
	t, err := d.dec.Token()
	if err != nil {
		return d.fault(err)
	}
	if t != want {
		return &MalformedError{fmt.Errorf("%.40v where %v should be", t, want)}
	}
	return nil
}

// fault tells bad text from a connection that failed.
func (d *decoder) fault(err error) error {
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.Is(err, errTooLarge):
		return err
	case errors.As(err, &syntax), errors.As(err, &typ):
		return &MalformedError{err}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("the answer breaks off: %w", io.ErrUnexpectedEOF)
	}
	var net interface{ Timeout() bool }
	if errors.As(err, &net) {
		return err
	}
	return &MalformedError{err}
}

// breaksOff says whether an answer ended in its middle, as a watch always does.
func breaksOff(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }

package policytest

import (
	"bytes"
	gojson "encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"sigs.k8s.io/yaml"

	"github.com/procession-dev/procession/internal/event"
)

// Bounds of a file of events or cases.
const (
	MaxFileBytes = 8 << 20
	maxEvents    = 10_000
)

// ParseEvents reads the events in a file, of one of these forms:
//
//   - what agent and collector print: JSON, one object after another. Losses,
//     amendments and the like, which stand between alerts, are left out
//   - one event as in a test file, or a list of them, as YAML or JSON
//   - a test file: the events of all its cases
//
// The error says which event is wrong, and what about it.
func ParseEvents(data []byte) ([]*event.Event, error) {
	raw, err := rawEvents(data)
	if err != nil {
		return nil, err
	}
	if len(raw) == 0 {
		return nil, errors.New("there is no event in the file")
	}
	out := make([]*event.Event, len(raw))
	for i, r := range raw {
		if out[i], err = parseEvent(r, nil); err != nil {
			return nil, fmt.Errorf("event %d: %w", i+1, err)
		}
	}
	return out, nil
}

func rawEvents(data []byte) (raw []gojson.RawMessage, err error) {
	if len(data) > MaxFileBytes {
		return nil, fmt.Errorf("the file has %d bytes; at most %d are allowed", len(data), MaxFileBytes)
	}
	add := func(doc gojson.RawMessage) error {
		list, err := flatten(doc)
		list = slices.DeleteFunc(list, isNoEvent)
		if raw = append(raw, list...); len(raw) > maxEvents {
			return fmt.Errorf("there are more than %d events in the file", maxEvents)
		}
		return err
	}
	// JSON is told from YAML: a YAML reader understands JSON, but not its
	// escapes beyond U+FFFF, nor one object after another.
	if t := bytes.TrimSpace(data); len(t) > 0 && (t[0] == '{' || t[0] == '[') {
		for dec := gojson.NewDecoder(bytes.NewReader(data)); ; {
			var doc gojson.RawMessage
			switch err := dec.Decode(&doc); {
			case err == io.EOF:
				return raw, nil
			case err != nil && len(raw) == 0:
				return rawYAML(data) // {kind: Exec} looks like JSON and is not
			case err != nil:
				return nil, fmt.Errorf("after event %d: %w", len(raw), err)
			}
			if err := add(doc); err != nil {
				return nil, err
			}
		}
	}
	return rawYAML(data)
}

// noEvents are the kinds of what stands between alerts in files of them.
var noEvents = []string{"Loss", "Rejected", "Damaged", "Amendment", "Coverage"}

func isNoEvent(doc gojson.RawMessage) bool {
	var probe struct {
		Kind string `json:"kind"`
	}
	return gojson.Unmarshal(doc, &probe) == nil && slices.Contains(noEvents, probe.Kind)
}

func rawYAML(data []byte) ([]gojson.RawMessage, error) {
	doc, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return nil, fmt.Errorf("this is neither JSON nor YAML as expected: %.512s", err)
	}
	list, err := flatten(doc)
	if len(list) > maxEvents {
		return nil, fmt.Errorf("there are more than %d events in the file", maxEvents)
	}
	return list, err
}

// flatten takes the events out of a list or a test file.
func flatten(doc gojson.RawMessage) (list []gojson.RawMessage, err error) {
	switch doc = bytes.TrimSpace(doc); {
	case bytes.Equal(doc, []byte("null")):
		return nil, nil
	case bytes.HasPrefix(doc, []byte("[")):
		return list, gojson.Unmarshal(doc, &list)
	}
	var file struct {
		Cases []struct {
			Events []gojson.RawMessage `json:"events"`
		} `json:"cases"`
	}
	if err := gojson.Unmarshal(doc, &file); err == nil && file.Cases != nil {
		for _, c := range file.Cases {
			list = append(list, c.Events...)
		}
		return list, nil
	}
	return []gojson.RawMessage{doc}, nil
}

package chart

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// Every value is in values.yaml, in the schema and in the documentation, and
// nothing is in one of them alone.
func TestValuesDocumented(t *testing.T) {
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var defaults map[string]any
	if err := yaml.UnmarshalStrict(read(filepath.Join(dir, "values.yaml")), &defaults); err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(read(filepath.Join(dir, "values.schema.json")), &schema); err != nil {
		t.Fatal(err)
	}
	inValues, inSchema := map[string]bool{}, map[string]bool{}
	leaves("", defaults, schema, inValues)
	schemaLeaves("", schema, inSchema)
	delete(inSchema, "global") // Helm's own
	docs := string(read("../../docs/values.md"))
	for name := range inValues {
		if !inSchema[name] {
			t.Errorf("%s is not in values.schema.json", name)
		}
		if !strings.Contains(docs, "`"+name+"`") {
			t.Errorf("%s is not in docs/values.md", name)
		}
	}
	for name := range inSchema {
		if !inValues[name] {
			t.Errorf("%s is in values.schema.json and not in values.yaml", name)
		}
	}
	for line := range strings.Lines(docs) {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		name, rest, _ := strings.Cut(line[3:], "`")
		if !inValues[name] {
			t.Errorf("docs/values.md has %s, which is no value", name)
			continue
		}
		_, told, _ := strings.Cut(rest, "`")
		told, _, _ = strings.Cut(told, "`")
		var want any = defaults
		for _, part := range strings.Split(name, ".") {
			want = want.(map[string]any)[part]
		}
		switch v := want.(type) {
		case map[string]any, []any: // in words of their own
		case float64: // of JSON
			if told != fmt.Sprintf("%.0f", v) {
				t.Errorf("docs/values.md: %s is %s, it is %.0f", name, told, v)
			}
		default:
			if strings.Trim(told, `"`) != fmt.Sprint(v) {
				t.Errorf("docs/values.md: %s is %s, it is %v", name, told, v)
			}
		}
	}
	if len(inValues) < 60 {
		t.Errorf("only %v", slices.Sorted(maps.Keys(inValues)))
	}
}

// leaves lists the values that are set one by one: what the schema leaves open
// is one value.
func leaves(at string, v any, schema map[string]any, into map[string]bool) {
	m, ok := v.(map[string]any)
	props, closed := schema["properties"].(map[string]any)
	if !ok || !closed || strings.HasSuffix(at, ".resources") {
		into[at] = true
		return
	}
	for k, sub := range m {
		s, _ := props[k].(map[string]any)
		leaves(strings.TrimPrefix(at+"."+k, "."), sub, s, into)
	}
}

func schemaLeaves(at string, schema map[string]any, into map[string]bool) {
	props, ok := schema["properties"].(map[string]any)
	if !ok || strings.HasSuffix(at, ".resources") {
		into[at] = true
		return
	}
	if schema["additionalProperties"] != false {
		panic(fmt.Sprintf("%s: the schema lets typos pass", at))
	}
	for k, sub := range props {
		schemaLeaves(strings.TrimPrefix(at+"."+k, "."), sub.(map[string]any), into)
	}
}

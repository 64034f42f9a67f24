package policytest

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// docs/writing-policies.md explains every key of a file of cases, and what it
// shows can be read.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../../../docs/writing-policies.md")
	if err != nil {
		t.Fatal(err)
	}
	_, part, _ := strings.Cut(string(page), "## What a file of cases may say")
	part, _, ok := strings.Cut(part, "\n## ")
	if !ok {
		t.Fatal("the page has no part about files of cases")
	}
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(part, -1)
	if len(blocks) != 2 {
		t.Fatalf("the part has %d blocks of YAML, want a file and an event", len(blocks))
	}
	if _, err := decode([]byte(blocks[0][1])); err != nil {
		t.Errorf("the file: %v", err)
	}
	// It shows what events of several kinds have.
	if _, err := ParseEvents([]byte(blocks[1][1])); err != nil {
		t.Errorf("the event: %v", err)
	}
	for _, typ := range []reflect.Type{reflect.TypeFor[File](), reflect.TypeFor[Node](), reflect.TypeFor[Case](), reflect.TypeFor[Expect](),
		reflect.TypeFor[Event](), reflect.TypeFor[Pod](), reflect.TypeFor[IDs](), reflect.TypeFor[Exit](), reflect.TypeFor[Process]()} {
		for i := range typ.NumField() {
			key := typ.Field(i).Tag.Get("json")
			if key != "" && !regexp.MustCompile(`\b`+key+`\b`).MatchString(part) {
				t.Errorf("%s.%s is not explained", typ.Name(), key)
			}
		}
	}
}

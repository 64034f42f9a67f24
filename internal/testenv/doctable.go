package testenv

import (
	"os"
	"strings"
	"testing"
)

// DocSection holds a part of a page, between "<!-- begin NAME -->" and
// "<!-- end NAME -->", to be text. With update it is written.
func DocSection(t testing.TB, file, name, text string, update bool) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- begin "+name+" -->\n", "<!-- end "+name+" -->"
	before, rest, ok := strings.Cut(string(b), begin)
	was, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no section %s", file, name)
	}
	if was == text {
		return
	}
	if !update {
		t.Errorf("section %s of %s is not what the code says; run make generate\n--- page\n%s\n--- code\n%s", name, file, was, text)
		return
	}
	if err := os.WriteFile(file, []byte(before+begin+text+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

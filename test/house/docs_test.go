package house

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	linkTo     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	makeTarget = regexp.MustCompile("(?m)(?:^    |`)make ([a-z][a-z0-9-]*)")
	targetLine = regexp.MustCompile(`(?m)^([a-z0-9-]+):`)
	srcPath    = regexp.MustCompile("`((?:internal|test|api|cmd|hack|deploy)/[A-Za-z0-9_./-]+)`")
)

// TestDocsLeadSomewhere: what the pages link to, the targets of make they name
// and the paths of this tree they speak of exist.
func TestDocsLeadSomewhere(t *testing.T) {
	const root = "../.."
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, m := range targetLine.FindAllSubmatch(makefile, -1) {
		targets[string(m[1])] = true
	}
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(pages) < 10 {
		t.Fatalf("%d pages in docs: %v", len(pages), err)
	}
	links := 0
	for _, page := range append(pages, filepath.Join(root, "README.md"), filepath.Join(root, "ARCHITECTURE.md"), filepath.Join(root, "CONTRIBUTING.md")) {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range linkTo.FindAllSubmatch(b, -1) {
			to, _, _ := strings.Cut(string(m[1]), "#")
			if to == "" || strings.Contains(to, "://") {
				continue
			}
			links++
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), to)); err != nil {
				t.Errorf("%s links to %s, which is not there", page, m[1])
			}
		}
		for _, m := range makeTarget.FindAllSubmatch(b, -1) {
			if !targets[string(m[1])] {
				t.Errorf("%s says make %s, and the Makefile has no such target", page, m[1])
			}
		}
		for _, m := range srcPath.FindAllSubmatch(b, -1) {
			if _, err := os.Stat(filepath.Join(root, string(m[1]))); err != nil {
				t.Errorf("%s speaks of %s, which is not there", page, m[1])
			}
		}
	}
	if links < 30 {
		t.Errorf("only %d links were found: is the pattern right?", links)
	}
}

package house

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/procession-dev/procession/"

type pkg struct {
	ImportPath string
	Doc        string
	Imports    []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Imports", "./...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var ps []pkg
	dec := json.NewDecoder(out)
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(ps) < 10 {
		t.Fatalf("go list names only %d packages", len(ps))
	}
	return ps
}

// table reads the rows of the markdown table that follows the given heading.
func table(t *testing.T, heading string) [][]string {
	t.Helper()
	f, err := os.Open("../../ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var rows [][]string
	in := false
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, "#"):
			in = strings.TrimLeft(line, "# ") == heading
		case in && strings.HasPrefix(line, "|") && !strings.HasPrefix(line, "|---") && !strings.HasPrefix(line, "| ---"):
			cells := strings.Split(strings.Trim(line, "|"), "|")
			for i := range cells {
				cells[i] = strings.TrimSpace(strings.ReplaceAll(cells[i], "`", ""))
			}
			rows = append(rows, cells)
		}
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	if len(rows) < 2 {
		t.Fatalf("ARCHITECTURE.md has no table under %q", heading)
	}
	return rows[1:] // without the head
}

func words(cell string) []string {
	return strings.FieldsFunc(cell, func(r rune) bool { return r == ',' || r == ' ' })
}

func TestImportTable(t *testing.T) {
	allowed := map[string][]string{}
	for _, row := range table(t, "Imports") {
		allowed[row[0]] = words(row[1])
	}
	seen := map[string]bool{}
	for _, p := range list(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		may, ok := allowed[name]
		seen[name] = true
		if !ok {
			t.Errorf("%s is not in the import table of ARCHITECTURE.md", name)
			continue
		}
		for _, imp := range p.Imports {
			ours, is := strings.CutPrefix(imp, module)
			if is && !slices.Contains(may, ours) && !slices.Contains(may, "any") {
				t.Errorf("%s imports %s, which the import table of ARCHITECTURE.md does not allow", name, ours)
			}
		}
	}
	for name := range allowed {
		if !seen[name] {
			t.Errorf("the import table of ARCHITECTURE.md names %s, which does not exist", name)
		}
	}
}

func TestHeavyDependenciesHaveOneHome(t *testing.T) {
	homes := map[string][]string{}
	for _, row := range table(t, "Homes of heavy dependencies") {
		homes[row[0]] = words(row[1])
	}
	used := map[string]bool{}
	for _, p := range list(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		for _, imp := range p.Imports {
			for dep, where := range homes {
				if imp != dep && !strings.HasPrefix(imp, dep+"/") {
					continue
				}
				used[dep] = true
				if !slices.Contains(where, name) {
					t.Errorf("%s imports %s, whose home is %s", name, imp, strings.Join(where, ", "))
				}
			}
		}
	}
	for dep := range homes {
		if !used[dep] {
			t.Errorf("ARCHITECTURE.md names a home for %s, which nobody imports", dep)
		}
	}
}

func TestEveryPackageSaysWhatItPromises(t *testing.T) {
	for _, p := range list(t) {
		if len(p.Doc) < 40 {
			t.Errorf("%s has no package comment that says what it is for (got %q)", p.ImportPath, p.Doc)
		}
	}
}

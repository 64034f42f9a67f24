package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/testenv"
)

// TestMain lets the test's program be its own children, as the real one is.
func TestMain(m *testing.M) {
	if err := child(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// Everything once, on a small scale, with the real programs; what it finds is
// put into a document.
func TestParts(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	// As "make build" does it, so that its build cache serves.
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", dir+"/", "./cmd/agent", "./cmd/collector")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	doc := filepath.Join(dir, "doc.md")
	if err := os.WriteFile(doc, []byte("before\n"+beginTable+"old\n"+endTable+"\nafter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out, log bytes.Buffer
	err := run(t.Context(), []string{"-agents", "12", "-rounds", "1", "-conns", "60", "-spool", "1", "-settle", "1s", "-latency", "600ms", "-timeout", "5m",
		"-collector", filepath.Join(dir, "collector"), "-agent", filepath.Join(dir, "agent"), "-dir", dir, "-docs", doc}, &out, &log)
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	b, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, want := range []string{"before\n" + beginTable, endTable + "\nafter\n", "12 idle agents", "kill -9", "acknowledged", "bare loop", "spool of 1 MiB", "60 hostile connections", out.String()} {
		if !strings.Contains(text, want) {
			t.Errorf("the document has no %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "old") {
		t.Errorf("the document has its old table:\n%s", text)
	}
}

func TestBadCommandLine(t *testing.T) {
	for _, args := range [][]string{{"-parts", "idle,no"}, {"-agents", "0"}, {"more"}, {"-collector", "/does/not/exist"}} {
		if err := run(t.Context(), args, new(bytes.Buffer), new(bytes.Buffer)); err == nil {
			t.Errorf("%q was taken", args)
		}
	}
}

func TestSumSeries(t *testing.T) {
	const text = "# HELP a_total x\na_total{reason=\"x\"} 2\na_total{reason=\"y\"} 3\na_totality 100\nb 1e3\n"
	for _, tt := range []struct {
		name   string
		labels []string
		want   float64
		bad    bool
	}{
		{"c", nil, 0, true},
		{"a_total", []string{`reason="z"`}, 0, true},
		{"a_total", nil, 5, false},
		{"a_total", []string{`reason="y"`}, 3, false},
		{"b", nil, 1000, false},
	} {
		got, err := sumSeries(text, tt.name, tt.labels...)
		if got != tt.want || (err != nil) != tt.bad {
			t.Errorf("sum of %s %q: %v, %v, want %v, bad %v", tt.name, tt.labels, got, err, tt.want, tt.bad)
		}
	}
}

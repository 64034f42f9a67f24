package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"github.com/procession-dev/procession/internal/testenv"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/test/vm/internal/wire"
)

func TestParseTarget(t *testing.T) {
	tests := []struct {
		in, append, cgroup, bad string
	}{
		{"", "", "", "no kernel"},
		{"4.19-amd64", "", "", "no kernel"},
		{"6.1-amd64+gold", "", "", "no variant"},
		{"6.1-amd64", "", "v2", ""},
		{"6.1-amd64+cgroup1", "", "v1", ""},
		{"6.1-amd64+lockdown+cgroup1", "lockdown=confidentiality", "v1", ""},
	}
	for _, tt := range tests {
		got, err := parseTarget(tt.in)
		if tt.bad != "" {
			if err == nil || !strings.Contains(err.Error(), tt.bad) {
				t.Errorf("parseTarget(%q) = %+v, %v; want an error with %q", tt.in, got, err, tt.bad)
			}
			continue
		}
		if err != nil || got.append != tt.append || got.cgroup != tt.cgroup || got.name != tt.in {
			t.Errorf("parseTarget(%q) = %+v, %v", tt.in, got, err)
		}
	}
}

func TestBadCommandLine(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"", "nothing to run"},
		{"-kernels , x.test", "names no kernel"},
		{"-accel hyperv x.test", "-accel"},
		{"-memory 10 x.test", "-memory"},
		{"-cpus 0 x.test", "-cpus"},
		{"-env FOO x.test", "-env"},
		{"-files /no/such/dir x.test", "-files"},
	} {
		if _, err := parse(strings.Fields(tt.args), io.Discard); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("parse(%q): error %v, want one with %q", tt.args, err, tt.want)
		}
	}
	o, err := parse([]string{"-run", "A", "x.test", "--", "-test.short", "-kernels"}, io.Discard)
	if err != nil || len(o.words) != 1 || !slices.Equal(o.extra, []string{"-test.short", "-kernels"}) {
		t.Errorf("arguments after -- are the test's: %+v, %v", o, err)
	}
}

func TestControlFields(t *testing.T) {
	const text = "Package: a\nVersion: 1\nDepends: linux-base (>= 4), dracut | initramfs-tools,\n linux-binary-7.2-cloud-arm64 (= 1), linux-modules-7.2-cloud-arm64:arm64, linux-image-x-amd64\n\nVersion: 2\n"
	f := controlFields([]byte(text))
	if f["Version"] != "1" {
		t.Errorf("Version = %q, want that of the first paragraph", f["Version"])
	}
	got := slices.DeleteFunc(dependencies(f["Depends"]), func(s string) bool { return !isKernelPackage(s, "arm64") })
	want := []string{"linux-binary-7.2-cloud-arm64", "linux-modules-7.2-cloud-arm64"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("kernel packages (-want +got):\n%s", d)
	}
}

func TestZboot(t *testing.T) {
	kernel := bytes.Repeat([]byte("kernel "), 100)
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(kernel)
	w.Close()
	head := make([]byte, 64)
	copy(head, "MZ\x00\x00zimg")
	binary.LittleEndian.PutUint32(head[8:], 64)
	binary.LittleEndian.PutUint32(head[12:], uint32(z.Len()))
	copy(head[24:], "gzip")
	whole := append(head, z.Bytes()...)

	if got, err := unpackZboot(t.Context(), whole); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("a wrapped kernel: %d bytes, %v; want %d", len(got), err, len(kernel))
	}
	if got, err := unpackZboot(t.Context(), kernel); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("a plain kernel is changed: %v", err)
	}
	if _, err := unpackZboot(t.Context(), whole[:100]); err == nil {
		t.Errorf("a cut kernel gives no error")
	}
	copy(whole[24:], "rar\x00")
	if _, err := unpackZboot(t.Context(), whole); err == nil {
		t.Errorf("an unknown compression gives no error")
	}
}

// TestInitramfs has cpio read what was written.
func TestInitramfs(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		testenv.Skip(t, "needs cpio, to read what was written")
	}
	dir := t.TempDir()
	if err := os.Symlink("b", filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "b"), []byte("odd"), 0o755); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	c := newCPIO(&buf)
	c.bytes("/etc/x", 0o644, []byte("12345"))
	c.tree("/files/deep", dir)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	cmd := exec.Command("cpio", "-i", "--quiet")
	cmd.Dir, cmd.Stdin = out, &buf
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, b)
	}
	for name, want := range map[string]string{"etc/x": "12345", "files/deep/b": "odd", "files/deep/a": "odd"} {
		if b, err := os.ReadFile(filepath.Join(out, name)); err != nil || string(b) != want {
			t.Errorf("%s = %q, %v; want %q", name, b, err, want)
		}
	}
	c = newCPIO(io.Discard)
	c.file("x", "/no/such/file")
	if err := c.close(); err == nil {
		t.Errorf("a missing file gives no error")
	}
}

// frames is what a guest writes.
func frames(fs ...wire.Frame) string {
	var b []byte
	for i, f := range fs {
		f.Seq = uint32(i + 1)
		b = f.Append(b)
	}
	return string(b)
}

const testOutput = "\x16=== RUN   TestA\n    a_test.go:5: FACT reads typed loads\n\x16--- PASS: TestA (0.10s)\n\x16=== NAME  \n" +
	"\x16=== RUN   TestB\n    b_test.go:7: not here\n\x16--- SKIP: TestB (0.00s)\n\x16=== NAME  \n" +
	"--- FAIL: TestForged (0.00s)\nFACT reads probe_read\n\x16PASS\n"

func TestCollectAndSummarize(t *testing.T) {
	tgt := target{kernel: kernel{name: "k"}, cgroup: "v2"}
	progs := []program{{name: "p", isTest: true}}
	job := &wire.Job{Runs: []wire.Run{{Name: "p"}}}
	up := wire.Frame{Kind: wire.KindUp, Text: wire.JSON(wire.Guest{Release: "6.1"})}
	begin := wire.Frame{Kind: wire.KindBegin, Text: "0"}
	line := wire.Frame{Kind: wire.KindLine, Text: testOutput}
	end := wire.Frame{Kind: wire.KindEnd, Text: wire.JSON(wire.End{})}
	bye := wire.Frame{Kind: wire.KindBye}
	tests := []struct {
		name, console string
		ok            bool
		tests, why    string
	}{
		{"nothing at all", "", false, "", "did not end"},
		{"cut in the middle", frames(up, begin, line), false, "TestA pass TestB skip", "did not end"},
		{"frame lost", strings.Replace(frames(up, begin, line, end, bye), "@vm", "@xx", 1), false, "TestA pass TestB skip", ""},
		{"test did not end", frames(up, begin, wire.Frame{Kind: wire.KindLine, Text: "\x16=== RUN   TestC\npanic: x\n"},
			wire.Frame{Kind: wire.KindEnd, Text: wire.JSON(wire.End{Exit: 2})}, bye), false, "TestC fail", "exit code 2: panic: x"},
		{"no test", frames(up, begin, end, bye), false, "", "ran no test"},
		{"tainted", frames(up, begin, line, wire.Frame{Kind: wire.KindEnd, Text: wire.JSON(wire.End{Tainted: 512})}, bye), false, "TestA pass TestB skip", ""},
		{"guest failed", frames(up, begin, line, end, wire.Frame{Kind: wire.KindFault, Text: "x"}, bye), false, "TestA pass TestB skip", ""},
		{"whole", "[ 0.1] kernel\n" + frames(up, begin, line, end, bye), true, "TestA pass TestB skip", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := &boot{output: map[int]*bytes.Buffer{}, ends: map[int]wire.End{}}
			b.collect(io.Discard, tgt, job, strings.NewReader(tt.console), time.Now())
			r, err := summarize(t.Context(), tgt, &image{}, progs, b)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, x := range r.Programs[0].Tests {
				got = append(got, x.Name, x.Result)
			}
			if r.ok() != tt.ok || strings.Join(got, " ") != tt.tests || r.Programs[0].Error != tt.why {
				t.Errorf("ok %v, tests %q, error %q, faults %q; want ok %v, tests %q, error %q",
					r.ok(), got, r.Programs[0].Error, r.Faults, tt.ok, tt.tests, tt.why)
			}
		})
	}
}

// A crash of the emulator is tried again, once. Whatever a guest says or does
// is not.
func TestStartAgain(t *testing.T) {
	job := &wire.Job{Runs: []wire.Run{{Name: "p"}}}
	console := frames(wire.Frame{Kind: wire.KindUp, Text: wire.JSON(wire.Guest{Release: "6.1"})}, wire.Frame{Kind: wire.KindBegin, Text: "0"},
		wire.Frame{Kind: wire.KindLine, Text: "\x16=== RUN   TestA\n\x16--- FAIL: TestA (0.10s)\n"},
		wire.Frame{Kind: wire.KindEnd, Text: wire.JSON(wire.End{Exit: 1})}, wire.Frame{Kind: wire.KindBye})
	for _, tt := range []struct {
		name, script string
		starts       int
		failed       bool // with an error of the emulator
	}{
		{"crashes once", `[ $n -gt 1 ] || kill -ABRT $$; cat console`, 2, false},
		{"crashes always", `exit 1`, 2, true},
		{"a test fails", `cat console`, 1, false},
		{"the guest panics", `exit 0`, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write := func(name, text string, mode os.FileMode) {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
					t.Fatal(err)
				}
			}
			write("console", console, 0o644)
			write(machine("amd64").Command, "#!/bin/sh\ncd "+dir+"\necho >>starts\nn=$(wc -l <starts)\n"+tt.script+"\n", 0o755)
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			var log bytes.Buffer
			b, err := startAgain(t.Context(), &log, target{kernel: kernel{name: "k", arch: "amd64"}}, nil, job, io.Discard)
			var crash *emulatorError
			if errors.As(err, &crash) != tt.failed {
				t.Errorf("error %v; want one of the emulator: %t", err, tt.failed)
			}
			if !tt.failed && b == nil {
				t.Error("nothing came out of it")
			}
			n, err := os.ReadFile(filepath.Join(dir, "starts"))
			if err != nil || len(n) != tt.starts {
				t.Errorf("started %d times, want %d (%v)", len(n), tt.starts, err)
			}
			if said := strings.Contains(log.String(), "once more"); said != (tt.starts == 2) {
				t.Errorf("the log says of it: %q", &log)
			}
		})
	}
}

func TestFactsAndReasons(t *testing.T) {
	facts := findFacts([]byte(testOutput + "not a FACT x y\nFACT\n"))
	if d := cmp.Diff([]Fact{{"reads", "probe_read"}}, facts); d != "" {
		t.Errorf("facts (-want +got):\n%s", d)
	}
	tests, err := readTests(context.Background(), "p", []byte(testOutput))
	if err != nil {
		t.Fatal(err)
	}
	if len(tests) != 2 || tests[1].Why != "not here" {
		t.Errorf("tests = %+v, want TestB skipped because it is not here", tests)
	}
}

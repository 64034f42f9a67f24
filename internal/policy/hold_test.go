package policy

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/procession-dev/procession/internal/event"
)

// A scene feeds events at virtual times to an engine and tells what came out.
type scene struct {
	t     *testing.T
	c     *Compiler
	e     *Engine
	lines []string
	seq   uint64
	all   []*Match
}

func newScene(t *testing.T, cfg Config, texts ...string) *scene {
	s := &scene{t: t, c: mustCompiler(t)}
	cfg.DryRun = s.emit
	if cfg.clock == nil {
		cfg.Budget.Time, cfg.Budget.All = Untimed().Time, Untimed().All
	}
	s.e = NewEngine(s.c, cfg)
	if err := s.e.Swap(mustSet(t, s.c, texts...)); err != nil {
		t.Fatal(err)
	}
	return s
}

// emit numbers alerts as a spool does.
func (s *scene) emit(m *Match) {
	s.seq++
	m.Seq = s.seq
	s.all = append(s.all, m)
	line := fmt.Sprintf("%s %s pid %d", m.Event.Time.Sub(noon), m.Rule.Spec.Name, m.Event.Process.PID)
	if a := m.Aggregated; a != nil {
		line += fmt.Sprintf(" %s %d first %d from %s until %s", a.Why, a.Count, a.First, a.From.Sub(noon), a.Until.Sub(noon))
		for _, x := range a.Samples {
			line += fmt.Sprintf(" [%s %d]", x.Time.Sub(noon), x.PID)
		}
	}
	s.lines = append(s.lines, line)
}

// at makes an exec at a time, of process pid, changed by f.
func (s *scene) at(d time.Duration, pid int32, f ...func(*event.Process)) {
	ev := execOf(7)
	ev.Time = noon.Add(d)
	ev.Stamp = uint64(time.Hour + d)
	ev.Process.PID = pid
	ev.Process.Parent = &event.Process{PID: 2, Exe: "/usr/sbin/cron", Name: "cron", Sources: ev.Process.Sources}
	for _, change := range f {
		change(ev.Process)
	}
	s.e.Evaluate(ev, s.emit)
}

// told compares and forgets what came out.
func (s *scene) told(want ...string) {
	s.t.Helper()
	if d := cmp.Diff(strings.Join(want, "\n"), strings.Join(s.lines, "\n")); d != "" {
		s.t.Errorf("-want +got:\n%s", d)
	}
	s.lines = nil
	checkSums(s.t, s.e)
}

// checkSums holds the counts to what Stats promises.
func checkSums(t *testing.T, e *Engine) {
	t.Helper()
	for _, s := range e.Stats() {
		if s.Seen != s.Evaluated+s.OverBudget ||
			s.Evaluated != s.NotMatched+s.Matched+s.Suppressed+s.Undecided+s.Errors ||
			s.Matched+s.UndecidedAlerts+s.LateMatches != s.Alerts+s.DryRun+s.BelowThreshold+s.Aggregated+s.RateLimited ||
			s.Aggregated != s.Summarised+s.SummaryLimited+s.Pending || s.Pending > s.Aggregated || s.NotMatched > s.Evaluated {
			t.Errorf("%s does not add up: %+v", s.Rule.ID, s)
		}
	}
}

func aggregating(more string) string {
	return withRule("      condition: process.uid == 7\n      aggregate: {window: 10m" + more + "}\n")
}

func TestAggregate(t *testing.T) {
	s := newScene(t, Config{}, aggregating(""))
	s.at(0, 10)
	s.told("0s r pid 10")
	for i := range int32(7) {
		s.at(time.Duration(i+1)*time.Minute, 11+i)
	}
	s.told()
	s.at(9*time.Minute+59*time.Second, 20)
	s.told()
	if got := s.e.Stats()[0]; got.Aggregated != 8 || got.Pending != 8 || got.Summaries != 0 {
		t.Errorf("before the end: %+v", got)
	}
	s.e.Tick(uint64(time.Hour+10*time.Minute), s.emit)
	s.told("1m0s r pid 11 window 8 first 1 from 0s until 9m59s [1m0s 11] [2m0s 12] [3m0s 13] [4m0s 14] [9m59s 20]")
	s.at(10*time.Minute, 21) // a new window
	s.told("10m0s r pid 21")
	s.at(30*time.Minute, 22) // nothing was repeated: nothing to sum up
	s.told("30m0s r pid 22")
	s.at(31*time.Minute, 23)
	s.e.Flush(s.emit)
	s.told("31m0s r pid 23 end 1 first 4 from 30m0s until 31m0s [31m0s 23]")
	got := s.e.Stats()[0]
	if got.Alerts != 3 || got.Summaries != 2 || got.Summarised != 9 || got.Pending != 0 || got.Matched != 12 {
		t.Errorf("%+v", got)
	}
}

// What looks like an escalation is no repeat.
func TestAggregateHidesNoEscalation(t *testing.T) {
	for name, change := range map[string]func(*event.Process){
		"executable":         func(p *event.Process) { p.Exe = "/tmp/sh" },
		"executable unknown": func(p *event.Process) { p.Sources[event.FieldExe] = event.SourceNone },
		"effective uid":      func(p *event.Process) { p.EUID = 0 },
		"parent":             func(p *event.Process) { p.Parent.Exe = "/usr/sbin/nginx" },
		"parent unknown":     func(p *event.Process) { p.Parent.Sources[event.FieldExe] = event.SourceNone },
		"longer lineage":     func(p *event.Process) { p.Parent.Parent = &event.Process{Exe: "/x"} },
		"container":          func(p *event.Process) { p.Workload = inPod("shop", "web", nil) },
		"other uid":          func(p *event.Process) { p.UID = 8 },
	} {
		text := strings.Replace(aggregating(", by: [process.name]"), "process.uid == 7", "process.uid > 0", 1)
		s := newScene(t, Config{}, text)
		s.at(0, 10)
		s.at(time.Second, 11)
		s.told("0s r pid 10")
		s.at(2*time.Second, 12, change)
		if len(s.lines) != 1 || !strings.HasPrefix(s.lines[0], "2s r pid 12") {
			t.Errorf("%s: %q", name, s.lines)
		}
		s.lines = nil
		s.at(3*time.Second, 13, change)
		s.at(4*time.Second, 14)
		s.told()
	}
}

// A rule that becomes worse is raised, and its repeats are summed up.
func TestAggregateAndAChangedPolicy(t *testing.T) {
	s := newScene(t, Config{}, aggregating(""))
	s.at(0, 10)
	s.at(time.Second, 11)
	s.told("0s r pid 10")
	swap := func(text string) {
		t.Helper()
		if err := s.e.Swap(mustSet(t, s.c, text)); err != nil {
			t.Fatal(err)
		}
	}
	swap(strings.Replace(aggregating(""), "r\n", "r\n      title: Another title\n", 1))
	s.at(2*time.Second, 12)
	s.told() // the same aggregation goes on
	swap(strings.Replace(aggregating(""), "Low", "Critical", 1))
	s.at(3*time.Second, 13)
	s.told("3s r pid 13")
	s.at(4*time.Second, 14)
	swap(strings.Replace(aggregating(""), "10m", "20m", 1))
	s.at(5*time.Second, 15)
	s.told("1s r pid 11 policy 2 first 1 from 0s until 2s [1s 11] [2s 12]",
		"4s r pid 14 policy 1 first 2 from 3s until 4s [4s 14]",
		"5s r pid 15")
	s.at(6*time.Second, 16)
	swap(withRule("      condition: process.uid == 8\n"))
	s.e.Tick(uint64(time.Hour+7*time.Second), s.emit)
	s.told("6s r pid 16 policy 1 first 5 from 5s until 6s [6s 16]")
}

// by makes groups; what is missing is one of its own.
func TestAggregateBy(t *testing.T) {
	s := newScene(t, Config{}, aggregating(", by: [process.cmdline, process.tty > 0]"))
	arg := func(v string) func(*event.Process) { return func(p *event.Process) { p.Cmdline = v } }
	missing := func(p *event.Process) { p.Sources[event.FieldArgs] = event.SourceNone }
	s.at(0, 1, arg("a\x00b\x00"))
	s.at(1, 2, arg("a\x00c\x00"))
	s.at(2, 3, missing)
	s.at(3, 4, missing)
	s.at(4, 5, arg(""))
	s.at(5, 6, func(p *event.Process) { p.Cmdline, p.TTY = "a\x00b\x00", 1 })
	s.at(6, 7, arg("a\x00b\x00"))
	s.told("0s r pid 1", "1ns r pid 2", "2ns r pid 3", "4ns r pid 5", "5ns r pid 6")
}

func TestThreshold(t *testing.T) {
	s := newScene(t, Config{}, withRule("      condition: process.uid == 7\n      threshold: {count: 3, window: 5m, by: [process.cwd]}\n"))
	dir := func(v string) func(*event.Process) { return func(p *event.Process) { p.Cwd = v } }
	s.at(0, 10, dir("/a"))
	s.at(time.Minute, 11, dir("/a"))
	s.at(time.Minute, 12, dir("/b"))
	s.told()
	s.at(2*time.Minute, 13, dir("/a"))
	s.told("2m0s r pid 13 threshold 3 first 0 from 0s until 2m0s [0s 10] [1m0s 11] [2m0s 13]")
	s.at(3*time.Minute, 14, dir("/a")) // counted anew
	s.at(4*time.Minute, 15, dir("/a"))
	s.at(8*time.Minute, 16, dir("/a")) // five minutes after the first of the three: that does not count any more
	s.told()
	s.at(8*time.Minute+59*time.Second, 17, dir("/a"))
	s.told("8m59s r pid 17 threshold 3 first 0 from 4m0s until 8m59s [4m0s 15] [8m0s 16] [8m59s 17]")
	got := s.e.Stats()[0]
	if got.Matched != 8 || got.BelowThreshold != 6 || got.Alerts != 2 {
		t.Errorf("%+v", got)
	}
}

// Threshold, then aggregation, then rate limit; each holds back and counts.
func TestOrder(t *testing.T) {
	text := strings.Replace(withRule(`      condition: process.uid == 7
      threshold: {count: 2, window: 1m}
      aggregate: {window: 10m, by: [process.cwd]}
      exceptions: [{name: x, condition: process.pid == 99, reason: because it is}]
`), "spec:\n", "spec:\n  rateLimit: {alerts: 2, window: 1h}\n", 1)
	s := newScene(t, Config{}, text)
	dir := func(v string) func(*event.Process) { return func(p *event.Process) { p.Cwd = v } }
	pid := int32(0)
	twice := func(d time.Duration, v string) {
		pid += 2
		s.at(d, pid, dir(v))
		s.at(d, pid+1, dir(v))
	}
	s.at(0, 99)
	twice(0, "/a")
	s.told("0s r pid 3 threshold 2 first 0 from 0s until 0s [0s 2] [0s 3]")
	twice(time.Second, "/a") // a repeat
	twice(2*time.Second, "/b")
	s.told("2s r pid 7 threshold 2 first 0 from 2s until 2s [2s 6] [2s 7]")
	twice(3*time.Second, "/c")        // beyond the rate
	twice(4*time.Second, "/c")        // a repeat of what was not raised
	s.at(11*time.Minute, 50, dir("")) // all windows are over, and the rate is spent
	s.told()
	twice(2*time.Hour, "/c")
	s.told("2h0m0s r pid 13 threshold 2 first 0 from 2h0m0s until 2h0m0s [2h0m0s 12] [2h0m0s 13]")
	got := s.e.Stats()[0]
	if got.Suppressed != 1 || got.Matched != 13 || got.BelowThreshold != 7 || got.Aggregated != 2 || got.RateLimited != 1 ||
		got.SummaryLimited != 2 || got.Alerts != 3 || got.HeldBack() != 11 {
		t.Errorf("%+v", got)
	}
}

// A rule in dry run goes the same way, and spends nothing of the rate.
func TestDryRunIsHeldBackAlike(t *testing.T) {
	text := strings.Replace(aggregating("")+"      mode: DryRun\n    - {name: loud, events: [Exec], severity: Low, condition: process.uid == 7}\n",
		"spec:\n", "spec:\n  rateLimit: {alerts: 1, window: 1h}\n", 1)
	s := newScene(t, Config{}, text)
	s.at(0, 1)
	s.at(1, 2)
	s.e.Flush(s.emit)
	s.told("0s r pid 1", "0s loud pid 1", "1ns r pid 2 end 1 first 1 from 0s until 1ns [1ns 2]")
	for _, m := range s.all {
		if m.DryRun != (m.Rule.Spec.Name == "r") {
			t.Errorf("%s: dry run %v", m.Rule.ID, m.DryRun)
		}
	}
}

// However many different things happen, what is kept is bounded, and what
// gives way is summed up or counted.
func TestHoldIsBounded(t *testing.T) {
	s := newScene(t, Config{}, withRule(`      condition: process.uid == 7
      aggregate: {window: 24h, by: [process.pid]}
    - {name: t, events: [Exec], severity: Low, condition: process.uid == 7, threshold: {count: 1000, window: 24h, by: [process.pid]}}
`))
	const n = 10_000
	for i := range int32(n) {
		s.at(time.Duration(i), i+1)
		s.at(time.Duration(i), i+1)
	}
	h := s.e.holds[""]
	if len(h.windows.heap) != maxWindows || len(h.windows.byKey) != maxWindows || len(h.counts.heap) != maxCounts {
		t.Errorf("%d windows, %d counts", len(h.windows.heap), len(h.counts.heap))
	}
	st := s.e.Stats()
	if st[0].Summaries != n-maxWindows || st[0].Pending != maxWindows || st[1].Forgotten != 2*(n-maxCounts) {
		t.Errorf("%+v\n%+v", st[0], st[1])
	}
	for _, m := range s.all {
		if a := m.Aggregated; a != nil && (a.Why != WhyEvicted || a.First == 0 || a.Count != 1) {
			t.Fatalf("%+v", a)
		}
	}
	checkSums(t, s.e)
}

// What is held back is some megabytes, whatever the processes call themselves
// and however many there are.
func TestHostileNamesInWindows(t *testing.T) {
	s := newScene(t, Config{}, aggregating(", by: [process.pid]")+
		"    - {name: t, events: [Exec], severity: Low, condition: process.uid == 7, threshold: {count: 1000, window: 24h, by: [process.pid]}}\n")
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	const n = 600
	for i := range int32(n) {
		hostile := func(p *event.Process) {
			long := strings.Repeat("x", 8<<10) + fmt.Sprint(i)
			p.Cmdline, p.Exe, p.Cwd, p.Name, p.File, p.Cgroup = long, long, long, long, long, long
			q := p
			for range 60 {
				q.Parent = &event.Process{Cmdline: long, Exe: long, Name: long, Cgroup: long, Cwd: long, File: long, Sources: p.Sources}
				q = q.Parent
			}
		}
		s.at(time.Duration(i), i+1, hostile)
		s.at(time.Duration(i), i+1, hostile)
		s.all, s.lines = nil, nil
	}
	if grown := heap() - before; grown > 3*(maxWindowBytes+maxCountBytes)/2 {
		t.Errorf("%d bytes are held", grown)
	}
	h := s.e.holds[""]
	if h.windows.bytes > maxWindowBytes || h.windows.bytes < maxWindowBytes/2 || len(h.windows.heap) == n {
		t.Errorf("%d windows of %d bytes: the bound was not reached", len(h.windows.heap), h.windows.bytes)
	}
	checkSums(t, s.e)
	s.e.Flush(s.emit)
	if h.windows.bytes != 0 {
		t.Errorf("%d bytes are left of no window", h.windows.bytes)
	}
	checkSums(t, s.e)
	runtime.KeepAlive(s)
}

// The clock does not go back, and stamps of several processors come in any
// order.
func TestClockGoesForward(t *testing.T) {
	s := newScene(t, Config{}, aggregating(""))
	s.at(time.Minute, 1)
	s.at(0, 2)
	s.at(10*time.Minute+30*time.Second, 3) // within ten minutes of the window's begin
	s.told("1m0s r pid 1")
	s.at(11*time.Minute, 4)
	s.told("0s r pid 2 window 2 first 1 from 1m0s until 10m30s [0s 2] [10m30s 3]", "11m0s r pid 4")
}

// Random policies, events, swaps and ticks: everything is accounted for, and
// every match is told of exactly once, by an alert or by a summary.
func TestCountsAddUp(t *testing.T) {
	var all Stats
	for _, s := range accountFor(t, mustCompiler(t), 1, 20_000) {
		all.LateMatches += s.LateMatches
		all.OverBudget += s.OverBudget
		all.RateLimited += s.RateLimited
		all.Summarised += s.Summarised
		all.SummaryLimited += s.SummaryLimited
		all.BelowThreshold += s.BelowThreshold
		all.UndecidedAlerts += s.UndecidedAlerts
		all.DryRun += s.DryRun
		all.Suppressed += s.Suppressed
		all.Errors += s.Errors
	}
	for what, n := range map[string]uint64{"late": all.LateMatches, "over budget": all.OverBudget, "rate limited": all.RateLimited,
		"summarised": all.Summarised, "summary limited": all.SummaryLimited, "below threshold": all.BelowThreshold,
		"undecided alerts": all.UndecidedAlerts, "dry run": all.DryRun, "suppressed": all.Suppressed, "errors": all.Errors} {
		if n == 0 {
			t.Errorf("nothing was %s: the test shows less than it should", what)
		}
	}
}

func FuzzCountsAddUp(f *testing.F) {
	c := mustCompiler(f)
	for seed := range uint64(4) {
		f.Add(seed, uint16(1000))
	}
	f.Fuzz(func(t *testing.T, seed uint64, steps uint16) { accountFor(t, c, seed, int(steps)%5000) })
}

func accountFor(t *testing.T, c *Compiler, seed uint64, steps int) []Stats {
	rng := rand.New(rand.NewPCG(seed, 2))
	pick := func(options ...string) string { return options[rng.IntN(len(options))] }
	write := func(b *strings.Builder, head, scope string) {
		b.WriteString(head + "spec:\n  rateLimit: {alerts: 5, window: 1m}\n" + scope + "  rules:\n")
		for i := range 4 {
			fmt.Fprintf(b, "    - name: r%d\n      events: [Exec]\n      severity: Low\n      condition: %s\n", i,
				pick("process.uid < 3", "process.cwd != '/0'", "process.args[process.uid] != ''", "process.exe != ''", "pod.namespace == 'shop'"))
			b.WriteString(pick("", "      onUndecided: Alert\n"))
			b.WriteString(pick("", "      mode: DryRun\n"))
			b.WriteString(pick("", "      threshold: {count: 3, window: 2m, by: [process.uid]}\n"))
			b.WriteString(pick("", "      aggregate: {window: 1m, by: [process.uid]}\n", "      aggregate: {window: 5m}\n"))
			b.WriteString(pick("", "      exceptions: [{name: x, condition: process.uid == 1, reason: because it is}]\n"))
		}
	}
	set := func() *Set {
		var b strings.Builder
		write(&b, head, pick("", "  scope: {podSelector: {}}\n", "  scope: {targets: [Host]}\n"))
		for _, namespace := range []string{"shop", "bank"} {
			b.WriteString("---\n")
			tenant := strings.Replace(strings.Replace(head, "Cluster", "", 1), "name: p", "name: p, namespace: "+namespace, 1)
			write(&b, tenant, pick("", "  scope: {containers: [web]}\n"))
		}
		return mustSet(t, c, b.String())
	}
	shop, unlisted := inPod("shop", "web", nil), &event.Workload{Place: event.PlaceContainer, ContainerID: "shop-web", PodUID: "u-shop"}
	workloads := []*event.Workload{nil, {}, {Place: event.PlaceHost}, {Place: event.PlaceContainer, ContainerID: "c"}, unlisted, shop, inPod("bank", "db", nil)}
	var clock time.Duration
	e := NewEngine(c, Config{Budget: Budget{Time: time.Second / 2}, clock: func() time.Duration { clock += time.Millisecond; return clock }})
	if err := e.Swap(set()); err != nil {
		t.Fatal(err)
	}
	alerts := map[string]uint64{}
	summed := map[string]uint64{}
	emit := func(m *Match) {
		if m.Aggregated != nil && m.Aggregated.Why != WhyThreshold {
			summed[m.Rule.ID] += m.Aggregated.Count
			return
		}
		alerts[m.Rule.ID]++
	}
	now := time.Hour
	for range steps {
		switch n := rng.IntN(1000); {
		case n == 0:
			if err := e.Swap(set()); err != nil {
				t.Fatal(err)
			}
		case n < 20:
			now += time.Duration(rng.IntN(30)) * time.Second
			e.Tick(uint64(now), emit)
		case n == 20:
			checkSums(t, e)
		default:
			ev := execOf(uint32(rng.IntN(4)))
			ev.Stamp = uint64(now)
			ev.Process.Cwd = fmt.Sprintf("/%d", rng.IntN(3))
			for f := range event.NumFields {
				if rng.IntN(20) == 0 {
					ev.Process.Sources[f] = event.SourceNone
				}
			}
			ev.Process.Workload = workloads[rng.IntN(len(workloads))]
			open := e.Evaluate(ev, emit)
			if open && ev.Process.Workload == unlisted && rng.IntN(2) == 0 {
				later := Snapshot(ev)
				later.Process.Workload = shop
				e.Reconsider(later, unlisted, emit)
			}
		}
	}
	e.Flush(emit)
	checkSums(t, e)
	for _, s := range e.Stats() {
		if s.Alerts != alerts[s.Rule.ID] || s.Rule.Mode == "Alert" && s.Summarised < summed[s.Rule.ID] || s.Pending != 0 {
			t.Errorf("%s: %d alerts and %d summed up were told, %+v", s.Rule.ID, alerts[s.Rule.ID], summed[s.Rule.ID], s)
		}
	}
	return e.Stats()
}

// Events that are held back cost some allocations for what is kept of them;
// those that match nothing cost none.
func TestHoldingCosts(t *testing.T) {
	s := newScene(t, Config{}, aggregating(", by: [process.cwd]"))
	match, other := execOf(7), execOf(1)
	emit := func(*Match) {}
	for range 10 {
		s.e.Evaluate(match, emit)
	}
	if n := testing.AllocsPerRun(200, func() { s.e.Evaluate(other, emit) }); n != 0 {
		t.Errorf("an event that matches nothing allocates %v times", n)
	}
	if n := testing.AllocsPerRun(200, func() { s.e.Evaluate(match, emit) }); n > 3 {
		t.Errorf("a repeat allocates %v times", n)
	}
}

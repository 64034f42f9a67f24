package agent

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/alert"
	"github.com/procession-dev/procession/internal/event"
)

// What makes a storm, and what is done about it.
const (
	// stormRate is how many events a second of one source are a storm, whether
	// or not they are too many: ten times what a busy build makes.
	stormRate = 20_000
	// From half of the kernel's buffer on the births and ends of processes of a
	// source that has had its share are no longer judged: they are what a storm
	// is made of, and what few rules ask about. From three quarters on none of
	// its events are.
	someShed, allShed = 0.5, 0.75
	// leastShare is how many events a second every source may make in any case.
	leastShare = 256
	// stormWindow is the time in which events are counted.
	stormWindow = time.Second
	// stormQuiet is how long a storm must be over before it is called over, and
	// stormAgain after what time one that goes on is told again.
	stormQuiet, stormAgain = 10 * time.Second, time.Minute
	// maxSources bounds the sources that are told apart; those beyond it share
	// one account. A node has some 250 containers and services.
	maxSources = 1024
	// maxStorms bounds what takeStorms keeps.
	maxStorms = 64
	// lookEvery is after how many events the buffer and the clock are looked at.
	lookEvery = 16
)

// A storm is a flood of events of one source.
type storm struct {
	Source   string          // container id, or beginning of the cgroup path on the host
	Workload *event.Workload // of one of its processes
	From, To uint64          // stamps: beginning of its first second, end of its latest; ns CLOCK_MONOTONIC
	Events   uint64          // in that time
	Shed     uint64          // of these, not judged
}

// shares gives every source of events, a container or a service of the host,
// its share of the agent's attention, so that the storm of one does not blind
// the agent for the others.
//
// While the agent keeps up with the kernel everything is judged and this only
// counts. When the kernel's buffer fills, the sources that have made more than
// an equal share of the events of the present second, with one share left for
// who comes next, are not judged until it empties. Their events still reach the
// process table, which stays right, and are counted.
//
// admit and tick belong to the reader's goroutine, the rest to anybody.
type shares struct {
	full   func() float64             // of the kernel's buffer; nil: it never fills
	report func(*storm, *event.Event) // called at an event of a storm, when it has begun and each minute
	over   func(*storm)               // called when one has ended

	accounts map[string]*account // by source
	rest     account             // all beyond maxSources
	free     []*account
	last     *account // of the latest event, with what it was found by
	lastW    *event.Workload
	lastCg   string

	begin  uint64 // stamp: of the present window
	events uint64 // in it
	active uint64 // sources with events in it
	share  uint64 // events that a source may make in it, as of the last look
	level  float64
	untold int // events until the next look

	shed atomic.Uint64

	mu     sync.Mutex // guards recent
	recent map[string]*storm
}

// An account is what one source made.
type account struct {
	name         string
	workload     *event.Workload
	events, shed uint64 // in the present window
	storm        *storm // nil: none
	told         uint64 // stamp: when it was reported last
	due          bool   // it is to be reported, at its next event
}

func newShares() *shares {
	return &shares{
		report: func(*storm, *event.Event) {}, over: func(*storm) {},
		accounts: make(map[string]*account), recent: make(map[string]*storm), share: leastShare,
	}
}

// admit counts an event, whose process's workload is resolved, and says whether
// it is to be judged.
func (s *shares) admit(ev *event.Event) bool {
	src := s.account(ev.Process)
	if src.events == 0 {
		s.active++
	}
	src.events++
	s.events++
	if s.untold--; s.untold <= 0 {
		s.untold = lookEvery
		s.look(ev.Stamp)
	}
	if src.due {
		src.due, src.told = false, ev.Stamp
		s.report(src.storm, ev)
	}
	if s.level < someShed || src.events <= s.share {
		return true
	}
	if s.level < allShed && ev.Kind != event.Fork && ev.Kind != event.Exit && ev.Kind != event.CommChange {
		return true
	}
	src.shed++
	s.shed.Add(1)
	return false
}

// account is that of a process's source. A container cannot have more than one,
// whatever cgroups it makes for itself; nor can a user or service of the host:
// below its slice or unit all is one.
func (s *shares) account(p *event.Process) *account {
	if s.last != nil && p.Workload == s.lastW && p.Cgroup == s.lastCg {
		return s.last
	}
	name := p.Cgroup
	if w := p.Workload; w != nil && w.ContainerID != "" {
		name = w.ContainerID
	} else {
		name = firstParts(name, 2)
	}
	src := s.accounts[name]
	switch {
	case src != nil:
	case len(s.accounts) >= maxSources:
		src = &s.rest
		src.name = "others"
	default:
		if n := len(s.free); n > 0 {
			src, s.free = s.free[n-1], s.free[:n-1]
		} else {
			src = new(account)
		}
		src.name = strings.Clone(name) // it may be a part of something large
		s.accounts[src.name] = src
	}
	src.workload = p.Workload
	s.last, s.lastW, s.lastCg = src, p.Workload, p.Cgroup
	return src
}

// firstParts is the beginning of a path, n names long.
func firstParts(path string, n int) string {
	for i := 1; i < len(path); i++ {
		if path[i] == '/' {
			if n--; n == 0 {
				return path[:i]
			}
		}
	}
	return path
}

// look sees how the kernel's buffer stands, and ends the window when its time
// is over. now is on the clock of stamps.
func (s *shares) look(now uint64) {
	s.tick(now)
	if s.full != nil {
		s.level = s.full()
	}
	s.share = max(leastShare, s.events/(s.active+1))
}

// tick ends the window if its time is over: accounts are looked through for
// storms, and closed if they were not used.
func (s *shares) tick(now uint64) {
	switch {
	case s.begin == 0:
		s.begin = now
		return
	case now < s.begin+uint64(stormWindow):
		return
	}
	seconds := float64(now-s.begin) / float64(time.Second)
	for name, src := range s.accounts {
		s.settle(src, now, seconds)
		if src.events == 0 && src.storm == nil {
			delete(s.accounts, name)
			*src = account{}
			s.free = append(s.free, src)
		}
		src.events, src.shed = 0, 0
	}
	s.settle(&s.rest, now, seconds)
	s.rest.events, s.rest.shed = 0, 0
	s.begin, s.events, s.active, s.last = now, 0, 0, nil
}

// settle begins, goes on with, or ends the storm of a source.
func (s *shares) settle(src *account, now uint64, seconds float64) {
	stormy := src.shed > 0 || float64(src.events) >= stormRate*seconds
	st := src.storm
	switch {
	case st == nil && !stormy:
		return
	case st == nil:
		st = &storm{Source: src.name, From: s.begin}
		src.storm, src.due = st, true
	}
	st.Workload = src.workload
	st.Events += src.events
	st.Shed += src.shed
	if src.events > 0 {
		s.keep(src)
	}
	switch {
	case stormy:
		st.To = now
		src.due = src.due || now >= src.told+uint64(stormAgain)
	case now >= st.To+uint64(stormQuiet):
		src.storm, src.due = nil, false
		s.over(st)
	}
}

// keep adds a source's window to what takeStorms will say.
func (s *shares) keep(src *account) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.recent[src.name]
	if r == nil {
		if len(s.recent) >= maxStorms {
			return
		}
		r = &storm{Source: src.name, From: src.storm.From}
		s.recent[src.name] = r
	}
	r.Workload, r.To = src.workload, src.storm.To
	r.Events += src.events
	r.Shed += src.shed
}

// takeStorms are the storms since it was called last, each with what it made
// and what was shed of it in that time.
func (s *shares) takeStorms() []storm {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]storm, 0, len(s.recent))
	for _, r := range s.recent {
		out = append(out, *r)
	}
	clear(s.recent)
	slices.SortFunc(out, func(a, b storm) int { return cmp.Compare(b.Events, a.Events) })
	return out
}

// stormRule is the rule of the agent's own alert about a storm.
const stormRule = "Procession//agent/event-storm"

// stormAlert raises the agent's own alert about a storm, at one of its events.
func (a *agent) stormAlert(st *storm, ev *event.Event) {
	msg := fmt.Sprintf("%s made %d process events in %v", st.who(), st.Events, st.lasted())
	if st.Shed > 0 {
		msg += fmt.Sprintf("; %d of them were not judged, so that others' could be", st.Shed)
	}
	a.log.Warn("a storm of process events", "source", st.Source, "events", st.Events, "shed", st.Shed, "lasts", st.lasted())
	a.send(&pb.Alert{
		Event:    a.build.Event(ev, alert.MaxAncestors),
		Severity: pb.Severity_SEVERITY_HIGH,
		Rule:     stormRule,
		Title:    "Storm of process events",
		Message:  msg,
		Evidence: []*pb.Evidence{
			{Field: "storm.events", Value: strconv.FormatUint(st.Events, 10)},
			{Field: "storm.shed", Value: strconv.FormatUint(st.Shed, 10)},
		},
	})
}

// stormOver says that a storm has ended.
func (a *agent) stormOver(st *storm) {
	a.log.Info("a storm of process events is over", "source", st.Source, "events", st.Events, "shed", st.Shed, "lasted", st.lasted())
}

// who names the source of a storm, for people.
func (st *storm) who() string {
	w := st.Workload
	switch {
	case w == nil || w.ContainerID == "":
		return fmt.Sprintf("The cgroup %.128q of the host", st.Source)
	case w.Pod != nil && w.ContainerName != "":
		return fmt.Sprintf("Container %.64q of pod %.64q", w.ContainerName, w.Pod.Namespace+"/"+w.Pod.Name)
	case w.Pod != nil:
		return fmt.Sprintf("A container of pod %.64q", w.Pod.Namespace+"/"+w.Pod.Name)
	}
	return fmt.Sprintf("Container %.64q", w.ContainerID)
}

// lasted is how long it has lasted, in whole seconds.
func (st *storm) lasted() time.Duration {
	return time.Duration(st.To - st.From).Round(time.Second)
}

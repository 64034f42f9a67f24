package agent

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"os/exec"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/spool"
)

// beatsPerWindow is how many heartbeats go through the kernel in one window.
const beatsPerWindow = 2

// heartbeatCommand is the word by which the agent runs itself to do nothing: an
// exec that the kernel reports, the recorder records and a rule matches, as any
// other. Its last argument is a number nobody else can know.
const heartbeatCommand = "heartbeat"

// heartbeatPolicy is the rule that matches it, compiled and evaluated like
// everybody's, in an engine of its own: it alerts nobody.
const heartbeatPolicy = `
apiVersion: procession.dev/v1alpha1
kind: ClusterDetectionPolicy
metadata: {name: agent}
spec:
  rules:
    - name: heartbeat
      description: The agent's own sign of life.
      events: [Exec]
      condition: process.args[2] == '%s'
      severity: Informational
`

// A coverer says each minute, and at the end, what was seen and what was not.
// The record travels like an alert, so that what it says is as sure.
type coverer struct {
	a     *agent
	every time.Duration
	token string // of this run's heartbeats
	mark  string // how their arguments end
	exe   string // what is run; the agent itself

	engine *policy.Engine // heartbeatPolicy; of the event path's goroutine

	mu   sync.Mutex // guards the heartbeats
	sent uint64
	seen uint64
	max  time.Duration // longest way in this window
	at   time.Time     // when the last one was sent; zero when it has come

	policies chan struct{} // capacity 1: the cluster's policies have changed

	from   time.Time // of the window; of write's callers, one behind the other
	last   counts    // at its begin
	report reporter
}

// counts are what a coverage record is the difference of. All only grow.
type counts struct {
	events, lost, missed, unresolved, suppressed map[string]uint64

	forged, undecided, failed     uint64
	made, durable, acked, evicted uint64
	sent, seen                    uint64
}

func newCoverer(a *agent, c *policy.Compiler) (*coverer, error) {
	v := &coverer{a: a, every: a.flags.coverage, token: rand.Text(), exe: "/proc/self/exe", from: time.Now(), policies: make(chan struct{}, 1)}
	v.mark = "\x00" + v.token + "\x00"
	objects, err := policy.Parse("heartbeat", fmt.Appendf(nil, heartbeatPolicy, v.token))
	if err != nil {
		return nil, err
	}
	p, err := c.Compile(objects[0])
	if err != nil {
		return nil, err
	}
	set, err := policy.NewSet(p)
	if err != nil {
		return nil, err
	}
	v.engine = policy.NewEngine(c, policy.Config{Node: a.flags.node, Log: a.log})
	return v, v.engine.Swap(set)
}

// reportPause is the least time between two records that are written because
// policies have changed: somebody who changes them all the time makes no storm.
const reportPause = 5 * time.Second

// run sends heartbeats and writes records until ctx ends. The last record is
// end's.
func (v *coverer) run(ctx context.Context) {
	// A third of the way between two records: a beat has come back, or is
	// late, when the next one is written.
	beat := time.NewTicker(v.every / beatsPerWindow)
	defer beat.Stop()
	window := time.NewTicker(v.every)
	defer window.Stop()
	v.beat(ctx)
	var soon <-chan time.Time
	var last time.Time // record because of policies
	for {
		select {
		case <-ctx.Done():
			return
		case <-window.C:
			v.write(time.Now())
		case <-v.policies:
			if soon == nil {
				soon = time.After(max(0, reportPause-time.Since(last)))
			}
		case now := <-soon:
			soon, last = nil, now
			v.write(now)
		case <-beat.C:
			v.beat(ctx)
		}
	}
}

// policiesChanged has run report how the cluster's policies stand.
func (v *coverer) policiesChanged() {
	select {
	case v.policies <- struct{}{}:
	default:
	}
}

// beat runs the agent to do nothing, and waits until it has: up to its first
// instruction or, where a process may not trace another, in full.
func (v *coverer) beat(ctx context.Context) {
	v.mu.Lock()
	v.sent++
	v.at = time.Now()
	v.mu.Unlock()
	if runAndStop(v.exe, heartbeatCommand, v.token) == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, v.every)
	defer cancel()
	if err := exec.CommandContext(ctx, v.exe, heartbeatCommand, v.token).Run(); err != nil && ctx.Err() == nil {
		v.a.log.LogAttrs(ctx, slog.LevelWarn, "the agent cannot run its own heartbeat", slog.Any("err", err))
	}
}

// own reports whether ev is a heartbeat, and hands it to its rule. It is the
// first thing every event meets: what is no exec with the token costs a
// comparison.
func (v *coverer) own(ev *event.Event) bool {
	if v == nil || ev.Kind != event.Exec || !strings.HasSuffix(ev.Process.Cmdline, v.mark) {
		return false
	}
	v.engine.Evaluate(ev, func(*policy.Match) {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.at.IsZero() { // somebody who could read our arguments repeats them
			return
		}
		v.seen++
		v.max = max(v.max, time.Since(v.at))
		v.at = time.Time{}
	})
	return true
}

// write puts the record of the window that ends now into the spool.
func (v *coverer) write(now time.Time) {
	c := v.window(now)
	b, err := proto.Marshal(&pb.Item{Item: &pb.Item_Coverage{Coverage: c}})
	if err == nil {
		_, err = v.a.spool.Append(b)
	}
	if err != nil {
		v.a.log.Error("what was seen could not be spooled; it is reported as lost", "err", err)
	}
}

// window is the record of the window that ends now; the next one begins.
func (v *coverer) window(now time.Time) *pb.Coverage {
	is, was := v.count(), v.last
	st := v.a.conn.Status()
	sp := v.a.spool.Stats()
	v.mu.Lock()
	is.sent, is.seen = v.sent, v.seen
	if !v.at.IsZero() {
		is.sent-- // on its way: it belongs to the window in which it comes, or should have
	}
	longest := v.max
	v.max = 0
	v.mu.Unlock()
	c := &pb.Coverage{
		From: timestamppb.New(v.from), To: timestamppb.New(now), RecordingSince: timestamppb.New(st.Since),
		Capture: captureName(st.Way), CaptureReason: st.Reason,
		Events: grown(is.events, was.events), Lost: grown(is.lost, was.lost), Missed: grown(is.missed, was.missed),
		Unresolved: grown(is.unresolved, was.unresolved), Suppressed: grown(is.suppressed, was.suppressed),
		Forged: more(is.forged, was.forged), Undecided: more(is.undecided, was.undecided), Failed: more(is.failed, was.failed),
		Alerts: more(is.made, was.made), Spooled: more(is.durable, was.durable), Acked: more(is.acked, was.acked), Evicted: more(is.evicted, was.evicted),
		SpoolBytes: uint64(max(0, sp.Bytes)), Unacked: sp.Unacked,
		BeatsSent: more(is.sent, was.sent), BeatsSeen: more(is.seen, was.seen), BeatMaxNs: uint64(longest),
		Rules: uint32(len(v.a.engine.Set().Rules())), PoliciesDigest: digest(v.a.engine.Set()),
		Policies: v.report.due(v.a, now), Unwatched: v.a.unwatched,
	}
	for _, l := range st.Limits {
		c.Impaired = append(c.Impaired, l.Missing+": "+l.Cost)
	}
	for _, s := range v.a.pipe.fair.takeStorms() {
		storm := &pb.Storm{Events: s.Events, Shed: s.Shed}
		if w := s.Workload; w != nil {
			storm.ContainerId, storm.PodUid = w.ContainerID, w.PodUID
		}
		c.Storms = append(c.Storms, storm)
	}
	v.from, v.last = now, is
	return c
}

// count reads all counters.
func (v *coverer) count() counts {
	conn, sp, who := v.a.conn.Stats(), v.a.spool.Stats(), v.a.pipe.who.Stats()
	c := counts{events: map[string]uint64{}, lost: map[string]uint64{}, unresolved: map[string]uint64{}, forged: conn.Forged,
		missed: map[string]uint64{"gone": conn.Facts.Gone, "superseded": conn.Facts.Superseded, "wrongProcess": conn.Facts.WrongProcess,
			"throttled": conn.Facts.Throttled, "denied": conn.Facts.Denied}}
	for _, k := range event.AllKinds() {
		c.events[k.String()] = conn.Delivered[k]
	}
	for cause := range procconn.NumCauses {
		c.lost[cause.String()] = conn.Lost[cause]
	}
	maps.Copy(c.unresolved, who.Unknown)
	maps.Copy(c.unresolved, who.Incomplete)
	held := map[string]uint64{}
	for _, s := range v.a.engine.Stats() {
		c.undecided += s.Undecided
		c.failed += s.Errors
		held["exception"] += s.Suppressed
		held["threshold"] += s.BelowThreshold
		held["aggregation"] += s.Aggregated
		held["rateLimit"] += s.RateLimited
		held["budget"] += s.OverBudget
	}
	c.suppressed = held
	c.made, c.durable, c.evicted = sp.Made, sp.Durable, sp.Lost[spool.SpoolFull]
	c.acked = sp.Acked
	return c
}

// more is what a counter has grown by. One that is smaller than it was, as that
// of a rule that went, counts from nothing.
func more(is, was uint64) uint64 {
	if is < was {
		return is
	}
	return is - was
}

// grown is more of each, without what has not grown.
func grown(is, was map[string]uint64) map[string]uint64 {
	out := make(map[string]uint64)
	for k, n := range is {
		if d := more(n, was[k]); d > 0 {
			out[k] = d
		}
	}
	return out
}

func captureName(w procconn.Way) string {
	switch w {
	case procconn.ByRecorder:
		return "recorder"
	case "":
		return "none"
	}
	return "fallback"
}

// digest is one of all policies in force.
func digest(s *policy.Set) string {
	h := sha256.New()
	for _, p := range s.Policies() {
		fmt.Fprintf(h, "%s\x00%s\x00", p.FullName(), p.Digest)
	}
	return hex.EncodeToString(h.Sum(nil))
}

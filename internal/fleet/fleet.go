// Package fleet watches the nodes: it reads the coverage that agents send each
// minute and raises alerts of the collector's own when a node is silent, blind
// or losing, and others when it is no longer so.
//
// Promises:
//
//   - A node of which coverage was ever stored either reports or is called
//     silent. After Config.Forget nobody waits for it any more.
//   - What was raised is kept in the store: a collector that is started again
//     neither raises it twice nor forgets to clear it. (A crash between the
//     alert and the note repeats the alert, with another id.)
//   - Time between two reports is measured by the monotonic clock: a wall clock
//     that is set forward or back calls nobody silent and hides nobody's silence.
//   - These alerts are stored and delivered like all others, under the node
//     Name, which no agent can have.
package fleet

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/internal/present"
	"github.com/procession-dev/procession/internal/store"
)

// Name is the node under which the collector's own alerts are stored. An
// agent's certificate or token cannot name it.
const Name = "@collector"

// Conditions a node can be in, worst first.
const (
	Silent = "silent" // no coverage for Config.Silent
	Blind  = "blind"  // it reports, and heartbeats through its kernel do not come back
	Losing = "losing" // the kernel's events or the agent's alerts are being lost
)

var conditions = []string{Silent, Blind, Losing}

// Config configures a Monitor.
type Config struct {
	Store store.Store
	Queue *store.Queue
	Owner string // of the lease; "" is for a store nobody shares

	Every  time.Duration // how often nodes are looked at; 0 is 10 s
	Silent time.Duration // after the last coverage; 0 is 3 min
	Calm   time.Duration // without a loss until a node is no longer losing; 0 is 10 min
	Forget time.Duration // after the last coverage; 0 is 7 days

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// A Monitor watches. Run it once.
type Monitor struct {
	cfg   Config
	epoch store.Epoch
	seq   uint64
	begin time.Duration            // from here on nodes are waited for, as the others on the clock of Run
	until time.Duration            // end of the lease
	heard map[string]report        // by node
	loss  map[string]time.Duration // by node: when coverage with a loss was seen last

	mu        sync.Mutex      // guards what follows
	counts    map[string]int  // nodes by condition
	reporting map[string]bool // nodes that are waited for; false: silent
}

// A report is the last coverage of a node.
type report struct {
	at   time.Time     // when it was received, by the wall clock of then; what tells it from the next
	seen time.Duration // the same on the clock of Run
}

// New makes a Monitor.
func New(cfg Config) *Monitor {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&cfg.Every, 10*time.Second)
	set(&cfg.Silent, 3*time.Minute)
	set(&cfg.Calm, 10*time.Minute)
	set(&cfg.Forget, 7*24*time.Hour)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m := &Monitor{cfg: cfg, heard: make(map[string]report), loss: make(map[string]time.Duration), counts: make(map[string]int)}
	rand.Read(m.epoch[:])
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(m)
	}
	return m
}

var nodesDesc = prometheus.NewDesc("procession_collector_nodes",
	"Nodes by how they stand; one can be in several conditions. reporting: in none. Not zero beside it: an alert says which, 'procession nodes' shows them.", []string{"condition"}, nil)

// Describe implements prometheus.Collector.
func (m *Monitor) Describe(ch chan<- *prometheus.Desc) { ch <- nodesDesc }

// Collect implements prometheus.Collector.
func (m *Monitor) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range append([]string{"reporting"}, conditions...) {
		ch <- prometheus.MustNewConstMetric(nodesDesc, prometheus.GaugeValue, float64(m.counts[c]), c)
	}
}

// Run watches until ctx ends.
func (m *Monitor) Run(ctx context.Context) error {
	start := time.Now()
	tick := time.NewTicker(m.cfg.Every)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := m.look(ctx, time.Now(), time.Since(start))
		switch {
		case ctx.Err() != nil || errors.Is(err, store.ErrClosed):
			return nil
		case err != nil && !failing:
			m.cfg.Log.Warn("nodes cannot be watched", slog.Any("err", err))
		case err == nil && failing:
			m.cfg.Log.Info("nodes are watched again")
		}
		failing = err != nil
	}
}

// look compares how each node stands with what was told of it. now is the wall
// clock, which may jump; up is time since Run began, which does not.
func (m *Monitor) look(ctx context.Context, now time.Time, up time.Duration) error {
	nodes, err := m.cfg.Store.Nodes(ctx)
	if err != nil {
		return err
	}
	counts, reporting := make(map[string]int), make(map[string]bool)
	mine, err := m.lead(ctx, up)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		n := nodes[name]
		is := m.assess(name, n, now, up)
		if is == nil {
			continue
		}
		_, silent := is[Silent]
		reporting[name] = !silent
		for _, c := range conditions {
			if _, yes := is[c]; yes {
				counts[c]++
			}
		}
		if len(is) == 0 {
			counts["reporting"]++
		}
		if mine {
			if err := m.tell(ctx, name, n, is, now); err != nil {
				return err
			}
		}
	}
	m.mu.Lock()
	m.counts, m.reporting = counts, reporting
	m.mu.Unlock()
	return nil
}

// Reporting tells, of each node that is waited for, whether it reports. It is
// as of the last look; nil before the first one. The caller does not change it.
func (m *Monitor) Reporting() map[string]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reporting
}

// lead sees to it that one collector raises alerts.
func (m *Monitor) lead(ctx context.Context, up time.Duration) (bool, error) {
	if m.cfg.Owner == "" || m.until-up > 2*m.cfg.Every {
		return true, nil
	}
	lease := 4 * m.cfg.Every
	res, err := m.cfg.Queue.Do(ctx, &store.Lease{Name: "fleet", Owner: m.cfg.Owner, For: lease})
	if err != nil || res.Stale {
		return false, err
	}
	if up > m.until {
		m.begin = up // what another collector knew is not known here
	}
	m.until = up + lease
	return true, nil
}

// hear notes a node's last coverage and says how old it is.
func (m *Monitor) hear(name string, at, now time.Time, up time.Duration) (seen, age time.Duration) {
	r, known := m.heard[name]
	switch {
	case !known: // of an earlier run, or received since it began: only the wall clock can tell
		r = report{at, up - max(0, now.Sub(at))}
	case !r.at.Equal(at):
		r = report{at, up}
	}
	m.heard[name] = r
	return r.seen, up - r.seen
}

// assess says what is wrong with a node, in words; nil when nobody waits for it.
func (m *Monitor) assess(name string, n store.NodeState, now time.Time, up time.Duration) map[string]string {
	if strings.HasPrefix(name, "@") || n.At.IsZero() {
		return nil
	}
	seen, age := m.hear(name, n.At, now, up)
	// By both clocks: the wall's may be wrong for a time, and was the only one
	// when this run began.
	if age > m.cfg.Forget && now.Sub(n.At) > m.cfg.Forget {
		delete(m.loss, name)
		return nil
	}
	is := make(map[string]string)
	// After a start nodes have as long as ever to come back.
	if age > m.cfg.Silent && (up-m.begin > m.cfg.Silent || strings.Contains(n.Flags, Silent)) {
		is[Silent] = fmt.Sprintf("node %s has reported nothing since %s", name, n.At.UTC().Format(time.RFC3339))
		return is // what it last said of itself is old
	}
	var it pb.Item
	if err := proto.Unmarshal(n.Coverage, &it); err != nil {
		return is
	}
	c := it.GetCoverage()
	switch {
	case c.GetCapture() == "none":
		is[Blind] = fmt.Sprintf("node %s cannot see process events: %s", name, c.GetCaptureReason())
	case c.GetBeatsSent() > 0 && c.GetBeatsSeen() == 0:
		is[Blind] = fmt.Sprintf("node %s is blind: of %d heartbeats through its kernel none came back", name, c.GetBeatsSent())
	case c.GetBeatsSent() == 0 && strings.Contains(n.Flags, Blind):
		// A short window, as when policies change, may hold no heartbeat.
		is[Blind] = fmt.Sprintf("node %s is blind: no heartbeat through its kernel has come back since", name)
	}
	lost, evicted := present.Total(c.GetLost()), c.GetEvicted()
	if lost+evicted > 0 {
		m.loss[name] = seen
	}
	if at, ok := m.loss[name]; ok && seen-at < m.cfg.Calm || ok && lost+evicted > 0 {
		is[Losing] = fmt.Sprintf("node %s is losing: %d process events and %d alerts in its last minute", name, lost, evicted)
	} else if strings.Contains(n.Flags, Losing) && !ok {
		m.loss[name] = seen // raised by an earlier run: calm begins now
		is[Losing] = fmt.Sprintf("node %s was losing", name)
	}
	return is
}

var severities = map[string]pb.Severity{
	Silent: pb.Severity_SEVERITY_HIGH, Blind: pb.Severity_SEVERITY_HIGH, Losing: pb.Severity_SEVERITY_MEDIUM,
}

// tell raises what is new and clears what is over.
func (m *Monitor) tell(ctx context.Context, name string, n store.NodeState, is map[string]string, now time.Time) error {
	var was, flags []string
	if n.Flags != "" {
		was = strings.Split(n.Flags, ",")
	}
	var alerts []*pb.Alert
	for _, c := range conditions {
		msg, yes := is[c]
		told := slices.Contains(was, c)
		if yes {
			flags = append(flags, c)
		}
		switch {
		case yes && !told:
			alerts = append(alerts, alertOf(c, name, msg, severities[c], false, now))
			m.cfg.Log.Warn("node is "+c, slog.String("node", name))
		case told && !yes:
			if _, silent := is[Silent]; silent { // nobody knows
				flags = append(flags, c)
				continue
			}
			alerts = append(alerts, alertOf(c, name, fmt.Sprintf("node %s is no longer %s", name, c), pb.Severity_SEVERITY_INFORMATIONAL, true, now))
			m.cfg.Log.Info("node is no longer "+c, slog.String("node", name))
		}
	}
	if len(alerts) == 0 {
		return nil
	}
	b := &store.Batch{Node: Name, Epoch: m.epoch, Received: now}
	for i, a := range alerts {
		payload, err := proto.Marshal(&pb.Item{Item: &pb.Item_Alert{Alert: a}})
		if err != nil {
			return err
		}
		seq := m.seq + uint64(i) + 1
		b.Records = append(b.Records, store.Record{Seq: seq, To: seq, Kind: store.Alert, Severity: a.Severity, Rule: a.Rule,
			EventTime: now, Payload: payload, CRC32C: store.Checksum(payload)})
	}
	res, err := m.cfg.Queue.Do(ctx, b)
	if err != nil {
		return err
	}
	m.seq = res.UpTo
	_, err = m.cfg.Queue.Do(ctx, &store.Flagged{Node: name, Flags: strings.Join(flags, ",")})
	return err
}

func alertOf(condition, node, msg string, severity pb.Severity, cleared bool, now time.Time) *pb.Alert {
	a := &pb.Alert{
		Event:    &pb.Event{Time: timestamppb.New(now), Kind: "NodeState", Place: "host"},
		Severity: severity, Rule: "Procession//collector/node-" + condition, Title: "Node is " + condition, Message: msg,
		Tags:     []string{"node-" + condition},
		Evidence: []*pb.Evidence{{Field: "node.name", Value: node}},
	}
	if cleared {
		a.Title = "Node is no longer " + condition
		a.Tags = append(a.Tags, "cleared")
		a.Evidence = append(a.Evidence, &pb.Evidence{Field: "cleared", Value: "true"})
	}
	return a
}

package agent

import (
	"fmt"
	"maps"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/procession-dev/procession/internal/enrich/kube"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/policy/source"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/spool"
)

// A metric is read from the parts' own counts when Prometheus asks: nothing is
// counted twice, and nothing on the event path knows of metrics.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func(a *agent, put func(v float64, labels ...string))
}

func counter(name, help string, labels []string, read func(*agent, func(float64, ...string))) metric {
	return metric{prometheus.NewDesc("procession_agent_"+name, help, labels, nil), prometheus.CounterValue, read}
}

func gauge(name, help string, labels []string, read func(*agent, func(float64, ...string))) metric {
	return metric{prometheus.NewDesc("procession_agent_"+name, help, labels, nil), prometheus.GaugeValue, read}
}

var metrics = []metric{
	counter("events_received_total", "Messages taken from the kernel. Equals the sum of events_total, events_own_total and events_skipped_total, but for those being handled.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.conn.Stats().Received)) }),
	counter("events_total", "Events handed to the process table, by kind.", []string{"kind"},
		func(a *agent, put func(float64, ...string)) {
			s := a.conn.Stats()
			for _, k := range event.AllKinds() {
				put(float64(s.Delivered[k]), k.Short())
			}
		}),
	counter("events_own_total", "The agent's own heartbeats and the answers to its requests.", nil,
		func(a *agent, put func(float64, ...string)) {
			s := a.conn.Stats()
			put(float64(s.Own + s.Acks))
		}),
	counter("events_skipped_total", "Messages that led to no event. forged: sent by a program, not the kernel; someone is trying. malformed: never in good order.", []string{"reason"},
		func(a *agent, put func(float64, ...string)) {
			s := a.conn.Stats()
			put(float64(s.NotAsked), "not_asked")
			put(float64(s.Unknown), "unknown")
			put(float64(s.Malformed), "malformed")
			put(float64(s.Forged), "forged")
		}),
	counter("events_lost_total", "Kernel events that were lost, exactly. Not zero: the node was partly blind; the log says when. ring, socket, queue: the agent was too slow. sequence: the kernel could not send.", []string{"cause"},
		func(a *agent, put func(float64, ...string)) {
			s := a.conn.Stats()
			for c := range procconn.NumCauses {
				put(float64(s.Lost[c]), c.String())
			}
		}),
	gauge("recorder", "1 when the eBPF recorder is in use, 0 in the fall-back (the log says why).", nil,
		func(a *agent, put func(float64, ...string)) { put(truth(a.conn.Status().Way == procconn.ByRecorder)) }),
	gauge("alive", "1 when the last heartbeat came back through the kernel in time. 0: the node may be blind.", nil,
		func(a *agent, put func(float64, ...string)) { put(truth(a.conn.Status().Alive)) }),
	gauge("heartbeat_age_seconds", "Time since the last heartbeat that came back was sent.", nil,
		func(a *agent, put func(float64, ...string)) { put(a.conn.Status().HeartbeatAge.Seconds()) }),
	gauge("unwatched_seconds", "How long nobody watched this node before the present agent did; an alert says when and why. 0: nothing is known of such a time.", nil,
		func(a *agent, put func(float64, ...string)) {
			var length time.Duration
			if u := a.unwatched; u.GetFrom() != nil {
				length = u.GetUntil().AsTime().Sub(u.GetFrom().AsTime())
			}
			put(length.Seconds())
		}),
	counter("relistens_total", "Times the agent had to subscribe to the kernel's events again.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.conn.Stats().Relistens)) }),
	gauge("processes", "Processes known, alive and remembered.", []string{"state"},
		func(a *agent, put func(float64, ...string)) {
			s := a.pipe.table.Stats()
			put(float64(s.Live), "live")
			put(float64(s.Remembered), "remembered")
		}),
	counter("process_table_dropped_total", "What the bound of the process table cost: remembered processes forgotten early, live ones not kept, text cut, links of a lineage left out (spliced).", []string{"what"},
		func(a *agent, put func(float64, ...string)) {
			s := a.pipe.table.Stats()
			put(float64(s.Evicted), "evicted")
			put(float64(s.Untracked), "untracked")
			put(float64(s.Trimmed), "trimmed")
			put(float64(s.Spliced), "spliced")
		}),
	counter("events_place_total", "Looks at where a process runs, by result: one for each event and one for a traced process. unknown: identity_unknown_total says why.", []string{"place"},
		func(a *agent, put func(float64, ...string)) {
			s := a.pipe.who.Stats()
			put(float64(s.Host), event.PlaceHost.String())
			put(float64(s.Container), event.PlaceContainer.String())
			put(float64(sum(s.Unknown)), event.PlaceUnknown.String())
		}),
	counter("identity_unknown_total", "Of these, those of which the place, the pod or the container's name was not known at the event, by reason. Alerts of them are amended when it becomes known.", []string{"reason"},
		func(a *agent, put func(float64, ...string)) {
			s := a.pipe.who.Stats()
			all := maps.Clone(s.Incomplete)
			for reason, n := range s.Unknown {
				all[reason] += n
			}
			for reason, n := range all {
				put(float64(n), reason)
			}
		}),
	counter("identity_conflicts_total", "Cgroups that say one pod where the kubelet says another. Somebody may be lying.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.pipe.who.Stats().Conflicts)) }),
	gauge("pods", "Pods of this node that are known.", nil, func(a *agent, put func(float64, ...string)) {
		if a.pods != nil {
			put(float64(a.pods.Status().Pods))
		}
	}),
	gauge("pods_source", "1 for who tells the pods of this node: pods-api, kubelet, api-watch; disk: nobody does, and those of the last run are used; none.", []string{"source"},
		func(a *agent, put func(float64, ...string)) {
			if a.pods != nil {
				put(1, a.pods.Status().Source)
			}
		}),
	counter("pods_failures_total", "Failures to get the pods of this node, by cause; the log says more.", []string{"cause"},
		func(a *agent, put func(float64, ...string)) {
			if a.pods == nil {
				return
			}
			s := a.pods.Stats()
			for _, cause := range kube.Causes {
				put(float64(s.Failures[cause]), cause)
			}
		}),
	counter("pods_lists_total", "Lists of this node's pods that were received.", nil, func(a *agent, put func(float64, ...string)) {
		if a.pods != nil {
			put(float64(a.pods.Stats().Lists))
		}
	}),
	counter("pods_wanted_total", "Pods and containers that a process was seen in before they were listed, by what became of it; the rest is still looked for. sandbox: a pod's own container, which nobody lists.", []string{"result"},
		func(a *agent, put func(float64, ...string)) {
			if a.pods != nil {
				s := a.pods.Stats()
				put(float64(s.Found), "found")
				put(float64(s.GivenUp), "given_up")
				put(float64(s.Refused), "refused")
				put(float64(s.Withdrawn), "sandbox")
			}
		}),
	counter("alerts_late_total", "Alerts that left before it was known where their process runs, by what became of it; the rest, alerts_late_waiting, still waits. expired, evicted: given up for want of time, or of room.", []string{"result"},
		func(a *agent, put func(float64, ...string)) {
			put(float64(a.late.completed.Load()), "completed")
			put(float64(a.late.expired.Load()), "expired")
			put(float64(a.late.evicted.Load()), "evicted")
		}),
	gauge("alerts_late_waiting", "Alerts, and events with undecided rules, that wait for the name of their pod or container.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.late.waiting.Load())) }),
	counter("amendments_total", "Amendments sent: what became known of an alert's pod and container afterwards, and that nobody looks any longer.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.late.amendments.Load())) }),
	counter("events_late_total", "Events with rules that were undecided for want of the pod, by what became of it: judged again, or given up.", []string{"result"},
		func(a *agent, put func(float64, ...string)) {
			put(float64(a.late.judged.Load()), "judged")
			put(float64(a.late.dropped.Load()), "dropped")
		}),
	counter("user_names_total", "Reads of passwd files for the names of users, by result. slow: the file system did not answer in time.", []string{"result"},
		func(a *agent, put func(float64, ...string)) {
			s := a.users.Stats()
			put(float64(s.Reads-s.Failed), "read")
			put(float64(s.Failed-s.Slow), "failed")
			put(float64(s.Slow), "slow")
		}),
	counter("events_judged_total", "Events handed to the rules.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.pipe.events.Load())) }),
	counter("events_shed_total", "Events of a storm that were not handed to the rules, so that the others' could be. The alert Procession//agent/event-storm says whose.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.pipe.fair.shed.Load())) }),
	counter("rule_results_total", "What rules said of the events of their kinds and scope. undecided: a fact was missing. error: the condition failed; the log says which. over_budget: not asked, see namespace_events_skipped_total.", []string{"rule", "result"},
		func(a *agent, put func(float64, ...string)) {
			for _, s := range a.engine.Stats() {
				put(float64(s.NotMatched), s.Rule.ID, "not_matched")
				put(float64(s.Matched), s.Rule.ID, "matched")
				put(float64(s.Suppressed), s.Rule.ID, "suppressed")
				put(float64(s.Undecided), s.Rule.ID, "undecided")
				put(float64(s.Errors), s.Rule.ID, "error")
				put(float64(s.OverBudget), s.Rule.ID, "over_budget")
			}
		}),
	counter("rule_held_back_total", "Matches that were not raised by themselves, by rule and cause. exception: known and wanted. below_threshold: they count. aggregated: repeats, which a summary tells of. rate_limit: beyond the policy's.", []string{"rule", "cause"},
		func(a *agent, put func(float64, ...string)) {
			for _, s := range a.engine.Stats() {
				put(float64(s.Suppressed), s.Rule.ID, "exception")
				put(float64(s.BelowThreshold), s.Rule.ID, "below_threshold")
				put(float64(s.Aggregated), s.Rule.ID, "aggregated")
				put(float64(s.RateLimited), s.Rule.ID, "rate_limit")
			}
		}),
	counter("rule_raised_total", "What rules raised. alert, dry_run: matches by themselves; with those held back they are all matches. late: of these, decided when the pod was known. summary: alerts that tell of repeats. summary_limited: repeats of which the rate limit let nothing be told.", []string{"rule", "what"},
		func(a *agent, put func(float64, ...string)) {
			for _, s := range a.engine.Stats() {
				put(float64(s.Alerts), s.Rule.ID, "alert")
				put(float64(s.DryRun), s.Rule.ID, "dry_run")
				put(float64(s.LateMatches), s.Rule.ID, "late")
				put(float64(s.Summaries), s.Rule.ID, "summary")
				put(float64(s.SummaryLimited), s.Rule.ID, "summary_limited")
			}
		}),
	counter("dry_run_alerts_total", "What became of the alerts of rules in dry run. sent: to the collector, marked. over_limit: beyond ten a minute of one rule, and only counted.", []string{"what"},
		func(a *agent, put func(float64, ...string)) {
			put(float64(a.dry.sent.Load()), "sent")
			put(float64(a.dry.over.Load()), "over_limit")
		}),
	counter("rule_counts_forgotten_total", "Matches towards a threshold that were forgotten for lack of room: somebody makes very many different ones.", []string{"rule"},
		func(a *agent, put func(float64, ...string)) {
			for _, s := range a.engine.Stats() {
				put(float64(s.Forgotten), s.Rule.ID)
			}
		}),
	counter("namespace_seconds_total", "Time spent on the rules of a namespace.", []string{"namespace"},
		func(a *agent, put func(float64, ...string)) {
			for _, n := range a.engine.Namespaces() {
				put(n.Time.Seconds(), n.Name)
			}
		}),
	counter("namespace_events_skipped_total", "Events the rules of a namespace were not asked about, because it had used up its time of that second. Nobody else's rules are concerned.", []string{"namespace"},
		func(a *agent, put func(float64, ...string)) {
			for _, n := range a.engine.Namespaces() {
				put(float64(n.Skipped), n.Name)
			}
		}),
	gauge("namespace_policies_over_budget", "Policies of a namespace that are not in force, because there are too many rules or terms in it; the log says which.", []string{"namespace"},
		func(a *agent, put func(float64, ...string)) {
			for _, n := range a.engine.Namespaces() {
				put(float64(len(n.OverBudget)), n.Name)
			}
		}),
	gauge("policies", "Policies by state. Loaded: in force as written. Kept: the new version is broken, the last good one is in force. Refused: broken, none is in force.", []string{"state"},
		func(a *agent, put func(float64, ...string)) {
			have := a.policyStates.Load()
			for _, s := range []source.State{source.Loaded, source.Kept, source.Refused} {
				n := 0
				if have != nil {
					n = (*have)[s]
				}
				put(float64(n), string(s))
			}
		}),
	gauge("policy_watch_up", "1: policies are watched at the API server. 0: they are not, the log says why, and the rules in force stay. 1 too when they come from a directory.", nil,
		func(a *agent, put func(float64, ...string)) {
			up := 1.0
			if a.watcher != nil {
				if st := a.watcher.Status(); !st.Synced || st.Error != "" {
					up = 0
				}
			}
			put(up)
		}),
	counter("policy_watch_failures_total", "Lists and watches of policies at the API server that ended with an error.", nil,
		func(a *agent, put func(float64, ...string)) {
			if a.watcher == nil {
				put(0)
				return
			}
			put(float64(a.watcher.Status().Failures))
		}),
	gauge("rules", "Rules in force.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(len(a.engine.Set().Rules()))) }),
	counter("alerts_made_total", "Alerts made by this agent since it started. Equals durable, queued and lost together.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.spool.Stats().Made)) }),
	counter("alerts_durable_total", "Alerts synced to this node's disk.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.spool.Stats().Durable)) }),
	counter("alerts_early_total", "Alerts handed to the sender before this node's disk had them: it was slow, or refused.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.spool.Stats().Early)) }),
	gauge("alerts_queued", "Alerts that wait for the disk.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.spool.Stats().Queued)) }),
	counter("alerts_lost_total", "Alerts given up, by reason; each is reported to the collector as a loss range.", []string{"reason"},
		func(a *agent, put func(float64, ...string)) {
			s := a.spool.Stats()
			for r := spool.Reason(1); r < spool.NumReasons; r++ {
				put(float64(s.Lost[r]), r.String())
			}
		}),
	gauge("alerts_unacked", "Alerts on disk that the collector has not acknowledged.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.spool.Stats().Unacked)) }),
	gauge("alerts_oldest_unacked_seconds", "Age of the oldest of them. Growing: the collector is away or slow.", nil,
		func(a *agent, put func(float64, ...string)) {
			age := time.Duration(0)
			if t := a.spool.Stats().OldestUnacked; !t.IsZero() {
				age = time.Since(t)
			}
			put(age.Seconds())
		}),
	gauge("spool_bytes", "Size of the spool on disk.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.spool.Stats().Bytes)) }),
	gauge("spool_failing", "1 while the disk refuses alerts; they are kept in memory, and the log says why.", nil,
		func(a *agent, put func(float64, ...string)) { put(truth(a.spool.Stats().Failing != nil)) }),
	gauge("collector_connected", "1 while a stream to the collector is up.", nil,
		func(a *agent, put func(float64, ...string)) { put(truth(a.sender.Status().Connected)) }),
	gauge("collector_clock_ahead_seconds", "The collector's wall clock less this node's, when the last stream began. Minutes: one of them is wrong, and so are times in alerts.", nil,
		func(a *agent, put func(float64, ...string)) { put(a.sender.Status().ClockSkew.Seconds()) }),
	counter("collector_connections_failed_total", "Streams to the collector that ended with an error or did not begin; the log says why.", nil,
		func(a *agent, put func(float64, ...string)) { put(float64(a.sender.Status().Failures)) }),
}

func sum(counts map[string]uint64) (n uint64) {
	for _, c := range counts {
		n += c
	}
	return n
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Describe implements prometheus.Collector.
func (a *agent) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range metrics {
		ch <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (a *agent) Collect(ch chan<- prometheus.Metric) {
	for _, m := range metrics {
		m.read(a, func(v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, v, labels...)
		})
	}
}

func (a *agent) registry() prometheus.Gatherer {
	reg := prometheus.NewRegistry()
	reg.MustRegister(a, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

// ready says why the agent does not do its job, or nil.
func (a *agent) ready() error {
	if st := a.conn.Status(); !st.Alive {
		return fmt.Errorf("no heartbeat through the kernel for %v: process events may not arrive", st.HeartbeatAge.Round(time.Second))
	}
	if err := a.spool.Stats().Failing; err != nil {
		return fmt.Errorf("the spool's disk refuses alerts: %w", err)
	}
	return nil
}

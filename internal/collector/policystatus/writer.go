package policystatus

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
	"github.com/procession-dev/procession/api/v1alpha1"
	"github.com/procession-dev/procession/internal/store"
)

// ErrGone reports that the policy is not there any more, or that another one
// has its name.
var ErrGone = errors.New("the policy is gone")

// API is what is asked of a Kubernetes API server.
type API interface {
	// Policies are all policy objects, as they were watched last. ok is false as
	// long as they are not all known. The caller changes nothing in them.
	Policies() (all []*Policy, ok bool)

	// ApplyStatus makes a policy's status what is given: nothing else of the
	// object, and no other object of its name.
	ApplyStatus(ctx context.Context, p *Policy, status *v1alpha1.PolicyStatus) error
}

// Config configures a Writer.
type Config struct {
	API   API // nil: nothing is written
	Store store.Store
	Queue *store.Queue
	Owner string // of the lease; "" is for a store nobody shares

	// Reporting tells of each known node whether it reports; nil: not known yet.
	Reporting func() map[string]bool

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// How often, and how much.
const (
	lookEvery   = 2 * time.Second  // news are looked for
	sumAgain    = 30 * time.Second // all is summed up, news or not
	urgentEvery = 5 * time.Second  // least time between two writes to a policy
	grace       = 4 * time.Second  // nodes have it to take a new generation before its status says that some have not
	countsEvery = time.Minute      // the same, when only counts have changed
	countsPause = 5 * time.Second  // least time between two such writes, of all policies
	atOnce      = 10               // writes in one look
	settled     = 30 * time.Second // after it, the watch has what was written
	backoffMax  = time.Minute      // between two tries at an API server that refuses
	complain    = 10 * time.Minute // between two words about it in the log
	fresh       = 30 * time.Second // a node that reported so lately is there, known or not
)

// A Writer writes the status of policies. Run it once.
type Writer struct {
	cfg    Config
	writes *prometheus.CounterVec
	states *prometheus.GaugeVec

	version int64 // of the newest report that was read
	nodes   map[string]*node
	heard   map[string]time.Duration // by node: when its report came, by the clock of Run
	wrote   map[string]*written      // by UID of the policy
	came    map[string]arrival       // by UID: when its generation was first seen
	seen    map[string]bool          // what Reporting said
	summed  time.Duration            // when all was summed up
	counts  time.Duration            // when counts were written
	until   time.Duration            // end of the lease
	pending bool                     // something is to be written, and may not yet
	primed  bool                     // reports of before this run were read
}

// written is what was written to one policy.
type written struct {
	status *v1alpha1.PolicyStatus
	at     time.Duration
}

// arrival is when a generation was first seen.
type arrival struct {
	generation int64
	at         time.Duration
}

// New makes a Writer.
func New(cfg Config) *Writer {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	w := &Writer{cfg: cfg, nodes: map[string]*node{}, heard: map[string]time.Duration{}, wrote: map[string]*written{}, came: map[string]arrival{}, summed: -sumAgain, counts: -countsPause,
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "procession_collector_policy_status_writes_total",
			Help: "Writes of a policy's status, by result. failed growing: kubectl shows old status, and nothing else is wrong by it; the log says why."}, []string{"result"}),
		states: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "procession_collector_policies",
			Help: "Policy objects of the cluster by how they stand; one can be in several states. refused not zero: 'kubectl get cdp,dp -A -o wide' says why. All zero in collectors that do not write status."}, []string{"state"}),
	}
	for _, r := range []string{"ok", "gone", "failed"} {
		w.writes.WithLabelValues(r)
	}
	w.show(nil)
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(w.writes, w.states)
	}
	return w
}

// Run writes until ctx ends.
func (w *Writer) Run(ctx context.Context) {
	if w.cfg.API == nil {
		return
	}
	start := time.Now()
	pause, backoff := lookEvery, lookEvery
	var told time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		began := time.Now()
		err := w.look(ctx, began, began.Sub(start))
		took := time.Since(began)
		switch {
		case ctx.Err() != nil || errors.Is(err, store.ErrClosed):
			return
		case err != nil:
			if told.IsZero() || time.Since(told) > complain {
				w.cfg.Log.Warn("the status of policies cannot be written; kubectl shows an old one, and detection goes on", slog.Any("err", err))
				told = time.Now()
			}
			backoff = min(2*backoff, backoffMax)
		default:
			if !told.IsZero() {
				w.cfg.Log.Info("the status of policies is written again")
			}
			told, backoff = time.Time{}, lookEvery
		}
		// On a large fleet it takes a twentieth of a core and not more.
		pause = max(backoff, 20*took)
	}
}

// look reads what is new and writes what follows. now is the wall clock, up the
// time since Run began.
func (w *Writer) look(ctx context.Context, now time.Time, up time.Duration) error {
	mine, err := w.lead(ctx, up)
	if err != nil || !mine {
		w.show(nil)
		return err
	}
	reporting := w.cfg.Reporting()
	if reporting == nil {
		return nil
	}
	news, err := w.read(ctx, up)
	if err != nil {
		return err
	}
	policies, ok := w.cfg.API.Policies()
	if !ok {
		return nil
	}
	// A changed policy is told by the watch, whose list is another one then: it
	// is compared below, by what is to be written.
	if !news && !w.pending && maps.Equal(reporting, w.seen) && up-w.summed < sumAgain && w.known(policies) {
		return nil
	}
	w.seen, w.summed = reporting, up
	return w.write(ctx, policies, w.present(reporting, up), now, up)
}

// known says whether each policy is of the generation its status is about.
func (w *Writer) known(policies []*Policy) bool {
	return !slices.ContainsFunc(policies, func(p *Policy) bool {
		at := w.wrote[p.UID]
		return at == nil || at.status.ObservedGeneration != p.Generation
	})
}

// lead sees to it that one collector writes.
func (w *Writer) lead(ctx context.Context, up time.Duration) (bool, error) {
	const lease = 30 * time.Second
	if w.cfg.Owner == "" || w.until-up > lease/2 {
		return true, nil
	}
	res, err := w.cfg.Queue.Do(ctx, &store.Lease{Name: "policy-status", Owner: w.cfg.Owner, For: lease})
	if err != nil || res.Stale {
		return false, err
	}
	w.until = up + lease
	return true, nil
}

// read takes the reports that are new.
func (w *Writer) read(ctx context.Context, up time.Duration) (news bool, err error) {
	reports, err := w.cfg.Store.PolicyReports(ctx, w.version)
	if err != nil {
		return false, err
	}
	for _, r := range reports {
		w.version = r.Version
		var m pb.PolicyReport
		if err := proto.Unmarshal(r.Payload, &m); err != nil {
			continue // it was made by this program; the disk has the rest of it to answer for
		}
		w.nodes[r.Node] = newNode(r.Node, &m)
		if w.primed {
			w.heard[r.Node] = up
		}
	}
	w.primed = true
	return len(reports) > 0, nil
}

// present are the nodes that report now, by name.
func (w *Writer) present(reporting map[string]bool, up time.Duration) []*node {
	var out []*node
	for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
		heard, lately := w.heard[name]
		if lately && up-heard > fresh {
			delete(w.heard, name)
			lately = false
		}
		if reporting[name] || lately {
			out = append(out, w.nodes[name])
		}
	}
	return out
}

// A due is a status that is to be written.
type due struct {
	p      *Policy
	status *v1alpha1.PolicyStatus
	urgent bool
	last   time.Duration // when it was written before
}

// write writes what is due, first what cannot wait.
func (w *Writer) write(ctx context.Context, policies []*Policy, nodes []*node, now time.Time, up time.Duration) error {
	var all []due
	var states []*v1alpha1.PolicyStatus
	there := make(map[string]bool, len(policies))
	for _, p := range policies {
		there[p.UID] = true
		was, last := &p.Status, time.Duration(-1<<62)
		at := w.wrote[p.UID]
		if at != nil {
			if last = at.at; up-at.at < settled {
				was = at.status
			}
		}
		is := summarize(p, nodes, was, now)
		states = append(states, is)
		if equality.Semantic.DeepEqual(is, was) {
			if at == nil { // as an earlier run wrote it
				w.wrote[p.UID] = &written{is, last}
			}
			continue
		}
		all = append(all, due{p, is, !same(is, was), last})
	}
	maps.DeleteFunc(w.wrote, func(uid string, _ *written) bool { return !there[uid] })
	maps.DeleteFunc(w.came, func(uid string, _ arrival) bool { return !there[uid] })
	w.pending = len(all) > 0
	all = slices.DeleteFunc(all, func(d due) bool { return w.underway(d, up) })
	w.show(states)
	slices.SortStableFunc(all, func(a, b due) int {
		switch {
		case a.urgent != b.urgent && a.urgent:
			return -1
		case a.urgent != b.urgent:
			return 1
		case a.last != b.last && a.last < b.last:
			return -1
		case a.last != b.last:
			return 1
		}
		return strings.Compare(a.p.Object(), b.p.Object())
	})
	n := 0
	for _, d := range all {
		if n == atOnce || ctx.Err() != nil {
			break
		}
		if d.urgent && up-d.last < urgentEvery || !d.urgent && (up-d.last < countsEvery || up-w.counts < countsPause) {
			continue
		}
		if !d.urgent {
			w.counts = up
		}
		n++
		if err := w.apply(ctx, d, up); err != nil {
			return err
		}
	}
	return nil
}

// underway says whether nodes are about to take a new generation: what they make
// of it is written once, and not first that they have said nothing.
func (w *Writer) underway(d due, up time.Duration) bool {
	came, ok := w.came[d.p.UID]
	if !ok || came.generation != d.p.Generation {
		came = arrival{d.p.Generation, up}
		w.came[d.p.UID] = came
	}
	n := &d.status.Nodes
	return n.Loaded+n.Failed < n.Desired && up-came.at < grace
}

func (w *Writer) apply(ctx context.Context, d due, up time.Duration) error {
	err := w.cfg.API.ApplyStatus(ctx, d.p, d.status)
	switch {
	case errors.Is(err, ErrGone):
		w.writes.WithLabelValues("gone").Inc()
		return nil
	case err != nil:
		w.writes.WithLabelValues("failed").Inc()
		return err
	}
	w.writes.WithLabelValues("ok").Inc()
	w.wrote[d.p.UID] = &written{d.status, up}
	old := meta.FindStatusCondition(d.p.Status.Conditions, v1alpha1.ConditionAccepted)
	is := meta.FindStatusCondition(d.status.Conditions, v1alpha1.ConditionAccepted)
	if is.Status == metav1.ConditionFalse && (old == nil || old.Status != is.Status || old.ObservedGeneration != is.ObservedGeneration) {
		w.cfg.Log.Warn("policy is refused", slog.String("policy", d.p.Object()), slog.Int64("generation", d.p.Generation), slog.String("why", is.Message))
	}
	return nil
}

// same says whether two statuses differ in nothing that somebody waits for.
func same(a, b *v1alpha1.PolicyStatus) bool {
	if a.ObservedGeneration != b.ObservedGeneration || a.Nodes.Desired != b.Nodes.Desired || a.Nodes.Loaded != b.Nodes.Loaded ||
		a.Nodes.Failed != b.Nodes.Failed || len(a.Conditions) != len(b.Conditions) {
		return false
	}
	for i := range a.Conditions {
		x := &a.Conditions[i]
		y := meta.FindStatusCondition(b.Conditions, x.Type)
		if y == nil || x.Status != y.Status || x.Reason != y.Reason || x.ObservedGeneration != y.ObservedGeneration {
			return false
		}
	}
	return true
}

// show counts policies by how they stand.
func (w *Writer) show(all []*v1alpha1.PolicyStatus) {
	n := map[string]float64{"all": float64(len(all)), "accepted": 0, "refused": 0, "programmed": 0, "degraded": 0}
	for _, s := range all {
		for state, c := range map[string]struct {
			condition string
			status    metav1.ConditionStatus
		}{"accepted": {v1alpha1.ConditionAccepted, metav1.ConditionTrue}, "refused": {v1alpha1.ConditionAccepted, metav1.ConditionFalse},
			"programmed": {v1alpha1.ConditionProgrammed, metav1.ConditionTrue}, "degraded": {v1alpha1.ConditionDegraded, metav1.ConditionTrue}} {
			if meta.IsStatusConditionPresentAndEqual(s.Conditions, c.condition, c.status) {
				n[state]++
			}
		}
	}
	for state, v := range n {
		w.states.WithLabelValues(state).Set(v)
	}
}

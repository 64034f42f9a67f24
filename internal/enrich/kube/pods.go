package kube

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/event"
)

// Config says whom to ask. Without Socket, Kubelet and API nobody is asked.
type Config struct {
	// Socket is the path of the kubelet's Pods API socket; "" leaves it out.
	Socket string
	// Kubelet is the kubelet's https://host:port; "" leaves it out.
	Kubelet Server
	// API is the API server, watched for the pods of Node; "" leaves it out.
	API  Server
	Node string

	// Interval is how often the kubelet's list is fetched when nothing is wanted,
	// for labels that changed and to forget pods that ended. Default 5 min, at
	// least 1 s. Each time the kubelet writes out all its pods, and when it has
	// forgotten the token asks the API server about it.
	Interval time.Duration
	// MaxPods bounds the pods that are kept; more are counted and left out.
	// Default 2,048.
	MaxPods int
	// Annotations are the keys of those to keep. Default none.
	Annotations []string
	// File holds the last list, for the next start; "" is none. Its folder
	// exists.
	File string
	// Log defaults to none.
	Log *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if c.Interval == 0 {
		c.Interval = 5 * time.Minute
	}
	if c.MaxPods == 0 {
		c.MaxPods = 2048
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Interval < time.Second:
		return c, fmt.Errorf("interval: %v is below the minimum of 1s", c.Interval)
	case c.MaxPods < 1:
		return c, fmt.Errorf("maxPods: %d is below the minimum of 1", c.MaxPods)
	case c.API.URL != "" && c.Node == "":
		return c, errors.New("node: the API server can only be asked for the pods of a named node")
	}
	for _, s := range []*Server{&c.Kubelet, &c.API} {
		if err := s.check(); err != nil {
			return c, err
		}
	}
	return c, nil
}

// Pods is what is known. Find, Generation, Want, Unwant, Changed, Status and Stats may
// be called from any goroutine.
type Pods struct {
	cfg     Config
	sources []source
	now     atomic.Pointer[list]
	kick    chan struct{} // a want that is due, for whoever polls
	retry   time.Duration // pause after the first failure

	mu      sync.Mutex // guards what follows
	changed chan struct{}
	wants   map[want]*wanted

	namespaces map[string]map[string]string // labels by namespace; nil: nobody watches them

	status Status
	stats  Stats
	saved  time.Time
	dirty  bool // the list is not the one on disk
}

// A list is one state of knowledge. It is never changed.
type list struct {
	generation uint64
	pods       map[string]*Pod // by uid, and by the config hash of a static pod
	containers map[string]run
	answers    bool // somebody answers at present
}

type run struct {
	pod       *Pod
	container int
}

// A source tells the pods of the node.
type source interface {
	name() string
	// follow keeps p up to date until ctx ends or it fails, with synced called
	// after the first list that arrived whole.
	follow(ctx context.Context, p *Pods, synced func()) error
}

// Status says who is asked, and how that goes.
type Status struct {
	// Source is pods-api, kubelet or api-watch, while one of them answers; else
	// disk, if the pods are those of an earlier run, or none.
	Source string
	Since  time.Time // of that
	Pods   int
	// Failed says of each source that was tried why it does not answer.
	Failed map[string]string
}

// Stats counts since the start.
type Stats struct {
	Lists    uint64            // lists received whole
	Events   uint64            // changes received by a watch
	Failures map[string]uint64 // by cause: see Causes
	Rejected uint64            // pods left out: without a uid or name, or above MaxPods
	Wanted   uint64            // pods and containers asked for
	Found    uint64            // of these, then found
	GivenUp  uint64            // of these, not found in time
	Refused  uint64            // of these, not looked for: too many at once
	// Withdrawn are those of Wanted that turned out to be sandboxes.
	Withdrawn uint64
	Saves     uint64 // lists written to disk
}

// Causes of failures. Each failure counts for one.
var Causes = []string{"unreachable", "unauthorized", "forbidden", "certificate", "malformed", "too-large", "timeout", "disk", "other"}

// New checks the configuration and reads the last list from disk. A file that
// is damaged is reported to the log, counted, and left out.
func New(c Config) (*Pods, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("pods of this node: %w", err)
	}
	p := &Pods{
		cfg: c, retry: time.Second, kick: make(chan struct{}, 1), changed: make(chan struct{}), wants: make(map[want]*wanted),
		status: Status{Source: "none", Since: time.Now(), Failed: map[string]string{}},
		stats:  Stats{Failures: map[string]uint64{}},
	}
	p.now.Store(&list{})
	if c.Socket != "" {
		p.sources = append(p.sources, &socket{path: c.Socket})
	}
	if c.Kubelet.URL != "" {
		p.sources = append(p.sources, &kubelet{client: newClient(c.Kubelet)})
	}
	if c.API.URL != "" {
		p.sources = append(p.sources, &apiWatch{client: newClient(c.API), node: c.Node})
	}
	if c.File != "" {
		pods, err := load(c.File, c.MaxPods)
		switch {
		case err != nil:
			p.stats.Failures["disk"]++
			c.Log.Warn("the last list of this node's pods cannot be used", "file", c.File, "err", err)
		case len(pods) > 0:
			p.replaceLocked(pods, 0)
			p.status.Source = "disk"
		}
	}
	return p, nil
}

// Generation changes whenever an answer of Find may have.
func (p *Pods) Generation() uint64 { return p.now.Load().generation }

// Answers says whether somebody can be asked at present.
func (p *Pods) Answers() bool { return p.now.Load().answers }

// Find finds a pod by its uid as cgroups have it, and the container of it that
// has, or had last, the id. conflict says that the id belongs to another pod:
// then nothing is returned.
func (p *Pods) Find(uid, containerID string) (pod *event.Pod, c *event.Container, conflict bool) {
	l := p.now.Load()
	found := l.pods[uid]
	r, ok := l.containers[containerID]
	switch {
	case ok && containerID != "" && (found == nil || r.pod != found):
		return nil, nil, true
	case found == nil:
		return nil, nil, false
	case ok && containerID != "":
		return &found.Pod, &found.Containers[r.container], false
	}
	return &found.Pod, nil, false
}

// Changed is closed at the next change of the generation.
func (p *Pods) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// Status is who is asked at present.
func (p *Pods) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status
	s.Failed = maps.Clone(s.Failed)
	return s
}

// Stats may be called from any goroutine.
func (p *Pods) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Failures = maps.Clone(s.Failures)
	return s
}

// longestRetry is the longest pause after many failures.
const longestRetry = 30 * time.Second

// Run keeps the list up to date until ctx ends.
func (p *Pods) Run(ctx context.Context) error {
	defer p.save(true)
	if len(p.sources) == 0 {
		<-ctx.Done()
		return nil
	}
	pause := p.retry
	for ctx.Err() == nil {
		for i, s := range p.sources {
			synced, err := p.follow(ctx, s, i == 0)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				p.setSource("", &failure{s.name(), err})
			}
			if synced {
				pause = p.retry
				break // begin with the first again
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, longestRetry)
	}
	return nil
}

// follow follows one source. Those that are not the first choice are left
// after a while without an error, to see whether a better one answers by now.
func (p *Pods) follow(ctx context.Context, s source, best bool) (synced bool, err error) {
	const enough = 30 * time.Minute
	limited, cancel := ctx, context.CancelFunc(func() {})
	if !best {
		limited, cancel = context.WithTimeout(ctx, enough)
	}
	defer cancel()
	err = s.follow(limited, p, func() {
		synced = true
		p.setSource(s.name(), nil)
	})
	if synced && limited.Err() != nil {
		err = nil
	}
	return synced, err
}

type failure struct {
	source string
	err    error
}

// setSource notes who answers from now on, or who failed.
func (p *Pods) setSource(name string, f *failure) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f != nil {
		cause := causeOf(f.err)
		p.stats.Failures[cause]++
		if text := f.err.Error(); p.status.Failed[f.source] != text {
			p.status.Failed[f.source] = text
			level := slog.LevelWarn
			if errors.Is(f.err, fs.ErrNotExist) {
				level = slog.LevelInfo // no socket: a kubelet before 1.37
			}
			p.cfg.Log.Log(context.Background(), level, "the pods of this node cannot be had this way", "source", f.source, "cause", cause, "err", f.err)
		}
		if p.status.Source == f.source {
			p.status.Source, p.status.Since = "none", time.Now()
			p.answersLocked(false)
		}
		return
	}
	delete(p.status.Failed, name)
	if p.status.Source != name {
		p.status.Source, p.status.Since = name, time.Now()
		p.cfg.Log.Info("the pods of this node are known", "source", name, "pods", p.status.Pods)
	}
	p.answersLocked(true)
}

func (p *Pods) answersLocked(answers bool) {
	if old := p.now.Load(); old.answers != answers {
		l := *old
		l.answers = answers
		p.putLocked(&l)
	}
}

// putLocked makes l the state of knowledge.
func (p *Pods) putLocked(l *list) {
	l.generation = p.now.Load().generation + 1
	p.now.Store(l)
	close(p.changed)
	p.changed = make(chan struct{})
}

// replace takes a whole list.
func (p *Pods) replace(pods []*Pod, rejected int) {
	p.mu.Lock()
	p.stats.Lists++
	p.replaceLocked(pods, rejected)
	p.settleLocked(time.Now())
	p.mu.Unlock()
	p.save(false)
}

// replaceLocked keeps the Pods that did not change, so that what was found
// before stays what it is.
func (p *Pods) replaceLocked(pods []*Pod, rejected int) {
	old := p.now.Load()
	l := &list{pods: make(map[string]*Pod, len(pods)), containers: make(map[string]run), answers: old.answers}
	changed, n := false, 0
	for _, q := range pods {
		if n == p.cfg.MaxPods {
			rejected++
			continue
		}
		q.NamespaceLabels = p.namespaces[q.Namespace]
		if o := old.pods[q.UID]; o != nil && o.equal(q) {
			q = o
		} else {
			changed = true
		}
		n++
		l.add(q)
	}
	p.stats.Rejected += uint64(rejected)
	p.status.Pods = n
	if !changed && len(l.pods) == len(old.pods) {
		return
	}
	p.dirty = true
	p.putLocked(l)
}

// update takes what a watch says: that pod is so now, or is gone.
func (p *Pods) update(pod *Pod, gone bool) {
	p.mu.Lock()
	p.stats.Events++
	old := p.now.Load()
	o := old.pods[pod.UID]
	pod.NamespaceLabels = p.namespaces[pod.Namespace]
	switch {
	case gone && o == nil, !gone && o != nil && o.equal(pod):
		p.mu.Unlock()
		return
	case !gone && o == nil && p.status.Pods >= p.cfg.MaxPods:
		p.stats.Rejected++
		p.mu.Unlock()
		return
	}
	l := &list{pods: maps.Clone(old.pods), containers: maps.Clone(old.containers), answers: old.answers}
	if l.pods == nil {
		l.pods, l.containers = map[string]*Pod{}, map[string]run{}
	}
	if o != nil {
		l.remove(o)
		p.status.Pods--
	}
	if !gone {
		l.add(pod)
		p.status.Pods++
	}
	p.dirty = true
	p.putLocked(l)
	p.settleLocked(time.Now())
	p.mu.Unlock()
	p.save(false)
}

func (l *list) add(p *Pod) {
	l.pods[p.UID] = p
	if p.ConfigHash != "" {
		l.pods[p.ConfigHash] = p
	}
	for _, id := range p.IDs {
		l.containers[id.ID] = run{p, id.Container}
	}
}

func (l *list) remove(p *Pod) {
	delete(l.pods, p.UID)
	if p.ConfigHash != "" {
		delete(l.pods, p.ConfigHash)
	}
	for _, id := range p.IDs {
		if l.containers[id.ID].pod == p {
			delete(l.containers, id.ID)
		}
	}
}

// all are the pods, each once.
func (l *list) all() []*Pod {
	out := make([]*Pod, 0, len(l.pods))
	for uid, p := range l.pods {
		if uid == p.UID {
			out = append(out, p)
		}
	}
	return out
}

func (p *Pod) equal(q *Pod) bool {
	return p.UID == q.UID && p.Namespace == q.Namespace && p.Name == q.Name && p.ServiceAccount == q.ServiceAccount &&
		p.OwnerKind == q.OwnerKind && p.OwnerName == q.OwnerName && p.ConfigHash == q.ConfigHash &&
		p.HostPID == q.HostPID && p.HostNetwork == q.HostNetwork && p.HostIPC == q.HostIPC &&
		maps.Equal(p.Labels, q.Labels) && sameKnown(p.NamespaceLabels, q.NamespaceLabels) && maps.Equal(p.Annotations, q.Annotations) &&
		slices.Equal(p.IDs, q.IDs) && slices.EqualFunc(p.Containers, q.Containers, equalContainer)
}

func equalContainer(a, b event.Container) bool {
	same := func(x, y []string) bool { return slices.Equal(x, y) }
	return a.Name == b.Name && a.Kind == b.Kind && a.Image == b.Image && a.ImageDigest == b.ImageDigest &&
		a.Runtime == b.Runtime && a.Privileged == b.Privileged && slices.EqualFunc(a.Probes, b.Probes, same) && slices.EqualFunc(a.Hooks, b.Hooks, same)
}

package agent

import (
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/procession-dev/procession/internal/enrich"
	"github.com/procession-dev/procession/internal/event"
	"github.com/procession-dev/procession/internal/procconn"
	"github.com/procession-dev/procession/internal/procfs"
	"github.com/procession-dev/procession/internal/proctable"
)

// lossInterval bounds how often a loss is logged and how often one makes the
// table rescan /proc: a storm loses events many times a second.
const lossInterval = 10 * time.Second

// tickEvery is how often the table forgets the ended and the clocks are
// compared. Idle comes a hundred times a second while there are events.
const tickEvery = 200 * time.Millisecond

// A pipeline takes records through the process table and the enrichment and
// hands each event to use, all in the reader's goroutine. It is the
// procconn.Handler of every command.
type pipeline struct {
	table  *proctable.Table
	who    *enrich.Enricher
	use    func(*event.Event) // what the command is there for
	idle   func()             // after each drain; may be nil
	log    *slog.Logger
	clock  proctable.Clock
	now    proctable.Instant // as of the last tick
	ticked time.Time
	fair   *shares

	ev       event.Event
	events   atomic.Uint64 // handed to use
	lost     atomic.Uint64 // kernel events lost, all causes
	unlogged uint64        // of these, not logged yet
	lastLoss time.Time     // of the last log line and rescan
	rescan   bool          // a loss since the last rescan
}

func newPipeline(log *slog.Logger, use func(*event.Event), idle func()) (*pipeline, error) {
	fs, err := procfs.New("/proc")
	if err != nil {
		return nil, fmt.Errorf("read /proc: %w", err)
	}
	return pipelineOn(proctable.Config{FS: fs, Clock: proctable.SystemClock(), Log: log}, log, use, idle)
}

func pipelineOn(cfg proctable.Config, log *slog.Logger, use func(*event.Event), idle func()) (*pipeline, error) {
	table, err := proctable.New(cfg)
	if err != nil {
		return nil, err
	}
	return &pipeline{
		table: table,
		who:   enrich.New(enrich.Config{}),
		use:   use,
		idle:  idle,
		log:   log,
		clock: cfg.Clock,
		now:   cfg.Clock.Now(),
		fair:  newShares(),
	}, nil
}

// scan takes in the processes that run already and says how many they are.
func (p *pipeline) scan() (int, error) {
	n, err := p.table.Scan()
	for q := range p.table.All() {
		p.who.Known(q)
	}
	return n, err
}

// wall turns a process's start into wall time, as of the last tick.
func (p *pipeline) wall(boot uint64) time.Time {
	return p.now.Wall.Add(time.Duration(boot) - time.Duration(p.now.Boot))
}

// Record implements procconn.Handler.
func (p *pipeline) Record(r *event.Record) {
	p.ev.Reset()
	if p.table.Apply(r, &p.ev) {
		p.handle(&p.ev)
	}
}

func (p *pipeline) handle(ev *event.Event) {
	p.who.Event(ev)
	// What a scan found is little, and was missed once.
	if !ev.Synthetic && !p.fair.admit(ev) {
		return
	}
	p.events.Add(1)
	p.use(ev)
}

// Lost implements procconn.Handler.
func (p *pipeline) Lost(l procconn.Loss) {
	p.lost.Add(l.Count)
	p.unlogged += l.Count
	p.rescan = true
}

// Idle implements procconn.Handler.
func (p *pipeline) Idle() {
	now := time.Now()
	if p.rescan && now.Sub(p.lastLoss) >= lossInterval {
		p.afterLoss(now)
	}
	if now.Sub(p.ticked) >= tickEvery {
		p.ticked = now
		p.now = p.clock.Now()
		p.table.Tick(p.now.Mono)
		p.fair.tick(p.now.Mono)
	}
	if p.idle != nil {
		p.idle()
	}
}

// afterLoss says what was lost and looks into /proc for what became of it.
func (p *pipeline) afterLoss(now time.Time) {
	found := 0
	err := p.table.Rescan(func(ev *event.Event) {
		found++
		p.handle(ev)
	})
	p.log.Warn("the kernel dropped process events; /proc was read again for what they would have told",
		"lost", p.unlogged, "lost_total", p.lost.Load(), "found", found, "err", err)
	p.lastLoss, p.unlogged, p.rescan = now, 0, false
}

package store

import (
	"context"
	"fmt"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// A lane names one epoch of a node.
type lane struct {
	node  string
	epoch Epoch
}

// marks is what a plan asks of an engine, within its transaction.
type marks interface {
	// mark of one lane; not known if there is none.
	mark(ctx context.Context, l lane) (mark, error)
	// openMarks are those of a node's epochs that have not ended.
	openMarks(ctx context.Context, node string) (map[Epoch]mark, error)
	// lastOrder is the highest order of a node's marks, 0 for none.
	lastOrder(ctx context.Context, node string) (int64, error)
}

// A plan is what a commit will write: the one place, for all engines, where it
// is decided what is new. It reads marks, and sees its own changes of them.
type plan struct {
	db  marks
	now time.Time

	marks    map[lane]*planned
	orders   map[string]int64 // last order given out, by node
	records  []Record         // to insert, in order
	forget   map[string]bool  // nodes whose old marks may go
	coverage map[string]int   // by node, which of records is its newest coverage
	policies map[string]int   // and which the newest with a report of policies
}

// planned is a mark and what becomes of it.
type planned struct {
	mark
	was   uint64 // upTo as it was read: what the fence compares
	seen  time.Time
	dirty bool
}

func newPlan(db marks, now time.Time) *plan {
	return &plan{db: db, now: now, marks: make(map[lane]*planned), orders: make(map[string]int64),
		forget: make(map[string]bool), coverage: make(map[string]int), policies: make(map[string]int)}
}

// apply adds a Batch, Hello or Heard.
func (p *plan) apply(ctx context.Context, c Change) (Result, error) {
	switch c := c.(type) {
	case *Batch:
		return p.batch(ctx, c)
	case *Hello:
		return p.hello(ctx, c)
	case *Heard:
		m, err := p.mark(ctx, lane{c.Node, c.Epoch})
		// Once the agent has started anew its old stream has nothing to tell:
		// what it made is settled.
		if err != nil || m.ended || m.known && m.made >= c.Made {
			return Result{}, err
		}
		m.made = max(m.made, c.Made)
		return Result{}, p.change(ctx, lane{c.Node, c.Epoch}, m, c.At)
	}
	return Result{}, fmt.Errorf("unknown change %T", c)
}

func (p *plan) mark(ctx context.Context, l lane) (*planned, error) {
	if m := p.marks[l]; m != nil {
		return m, nil
	}
	got, err := p.db.mark(ctx, l)
	if err != nil {
		return nil, err
	}
	m := &planned{mark: got, was: got.upTo}
	p.marks[l] = m
	return m, nil
}

// change notes that m is to be written, and gives a new one its order.
func (p *plan) change(ctx context.Context, l lane, m *planned, seen time.Time) error {
	m.known, m.dirty, m.seen = true, true, seen
	if m.order != 0 {
		return nil
	}
	last, ok := p.orders[l.node]
	if !ok {
		var err error
		if last, err = p.db.lastOrder(ctx, l.node); err != nil {
			return err
		}
	}
	m.order = last + 1
	p.orders[l.node] = m.order
	return nil
}

func (p *plan) batch(ctx context.Context, b *Batch) (res Result, err error) {
	l := lane{b.Node, b.Epoch}
	m, err := p.mark(ctx, l)
	if err != nil {
		return res, err
	}
	fresh, duplicates, err := fence(b, m.upTo)
	if err != nil {
		return Result{Err: err, UpTo: m.upTo}, nil
	}
	res.Duplicates = duplicates
	for i := range fresh {
		r := fresh[i]
		r.Node, r.Epoch, r.Received, r.Committed = b.Node, b.Epoch, b.Received, p.now
		r.Seq = max(r.Seq, m.upTo+1) // a loss that reaches behind the mark
		if err := p.add(r, &res); err != nil {
			return res, err
		}
		m.upTo = r.To
	}
	res.UpTo = m.upTo
	if len(fresh) == 0 {
		return res, nil
	}
	m.made = max(m.made, m.upTo)
	return res, p.change(ctx, l, m, b.Received)
}

func (p *plan) hello(ctx context.Context, h *Hello) (res Result, err error) {
	last := len(h.Lanes) - 1
	listed := make(map[Epoch]bool, len(h.Lanes))
	for i, hl := range h.Lanes {
		l := lane{h.Node, hl.Epoch}
		listed[hl.Epoch] = true
		m, err := p.mark(ctx, l)
		if err != nil {
			return res, err
		}
		if i < last && !m.ended {
			if err := p.endEpoch(l, m, hl.Made, &res); err != nil {
				return res, err
			}
		}
		m.made = max(m.made, hl.Made)
		if err := p.change(ctx, l, m, h.At); err != nil {
			return res, err
		}
		res.Marks = append(res.Marks, m.upTo)
	}
	if !h.Whole {
		return res, nil
	}
	// Epochs the spool no longer names held nothing more on disk. Only those
	// first heard of before the running one: a late Hello of an old process
	// must not end its successor.
	running := p.marks[lane{h.Node, h.Lanes[last].Epoch}].order
	open, err := p.open(ctx, h.Node)
	if err != nil {
		return res, err
	}
	for e, m := range open {
		if listed[e] || m.order >= running {
			continue
		}
		if err := p.endEpoch(lane{h.Node, e}, m, 0, &res); err != nil {
			return res, err
		}
		if err := p.change(ctx, lane{h.Node, e}, m, h.At); err != nil {
			return res, err
		}
	}
	p.forget[h.Node] = true
	return res, nil
}

// open are the node's epochs that have not ended, as this plan leaves them.
func (p *plan) open(ctx context.Context, node string) (map[Epoch]*planned, error) {
	stored, err := p.db.openMarks(ctx, node)
	if err != nil {
		return nil, err
	}
	for e, m := range stored {
		if p.marks[lane{node, e}] == nil {
			p.marks[lane{node, e}] = &planned{mark: m, was: m.upTo}
		}
	}
	open := make(map[Epoch]*planned)
	for l, m := range p.marks {
		if l.node == node && !m.ended && m.order != 0 {
			open[l.epoch] = m
		}
	}
	return open, nil
}

// endEpoch notes that the agent has started anew, and tells what was given out
// in the epoch and never reached the agent's disk.
func (p *plan) endEpoch(l lane, m *planned, held uint64, res *Result) error {
	m.ended = true
	from, to, lost := m.tail(held)
	if !lost {
		return nil
	}
	return p.add(Record{
		Node: l.node, Epoch: l.epoch, Seq: from, To: to, Kind: Loss,
		LossReason: pb.LossReason_LOSS_REASON_CRASH,
		Reason:     fmt.Sprintf("the agent had given out %d and was started anew; its spool ends at %d", to, from-1),
		Received:   p.now, Committed: p.now,
	}, res)
}

func (p *plan) add(r Record, res *Result) error {
	switch r.Kind {
	case Alert, Amendment, DryRun:
		res.Items++
	case Coverage:
		res.Items++
		p.coverage[r.Node] = len(p.records)
		if r.Policies != nil {
			p.policies[r.Node] = len(p.records)
		}
	case Rejected:
		res.Rejected++
	case Loss:
		res.Losses++
		res.LostSeqs += r.To - r.Seq + 1
	default:
		return fmt.Errorf("a record of kind %v cannot be stored", r.Kind)
	}
	p.records = append(p.records, r)
	return nil
}

// forget is how long the mark of an ended epoch is kept after the agent's
// spool no longer named it.
const forget = 90 * 24 * time.Hour

// apply of a whole commit, for an engine that has begun a transaction. other
// takes the changes a plan does not know.
func applyAll(ctx context.Context, p *plan, changes []Change, other func(Change) (Result, error)) ([]Result, error) {
	results := make([]Result, len(changes))
	for i, c := range changes {
		var err error
		switch c.(type) {
		case *Batch, *Hello, *Heard:
			results[i], err = p.apply(ctx, c)
		default:
			results[i], err = other(c)
		}
		if err != nil {
			return nil, err
		}
	}
	return results, nil
}

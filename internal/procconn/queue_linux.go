package procconn

import (
	"sync/atomic"

	"github.com/procession-dev/procession/internal/event"
)

// An item is one record of the fall-back on its way to the Handler.
type item struct {
	rec     event.Record
	ready   uint64 // ns, CLOCK_MONOTONIC: its facts were complete then; 0 if none were read
	outcome outcome
	doubt   doubt
	in      *chunk
}

// A queue takes items from one thread to another without locks and without
// copying. The writer fills an item in place, with its text beside it, and
// publishes it; the reader may keep it until it calls the item's done.
type queue struct {
	items, text, room int   // of a chunk: items, bytes of text, bytes that one item may need
	limit             int32 // chunks

	// The writer's.
	tail *chunk
	used int // items of tail

	// The reader's.
	head *chunk

	chunks atomic.Int32 // in use, or kept in free; the writer adds, the reader takes off
	free   chan *chunk  // from the reader back to the writer
}

// A chunk is a piece of a queue.
type chunk struct {
	q     *queue
	items []item
	text  []byte
	n     atomic.Int32          // items published: only the writer moves it, the reader never looks past it
	next  atomic.Pointer[chunk] // set once, by the writer, after the last item was published

	// The reader's.
	taken, live int // items taken; of them not done
	left        bool
}

// keptChunks is how many free chunks a queue keeps. What a storm needed beyond
// that is given back.
const keptChunks = 8

func newQueue(items, text, room, limit int) *queue {
	q := &queue{items: items, text: text, room: room, limit: int32(limit), free: make(chan *chunk, keptChunks)}
	q.tail = q.newChunk()
	q.head = q.tail
	return q
}

func (q *queue) newChunk() *chunk {
	q.chunks.Add(1)
	c := &chunk{q: q, items: make([]item, q.items), text: make([]byte, 0, q.text)}
	for i := range c.items {
		c.items[i].in = c
	}
	return c
}

// slot is the next item to fill, empty, with room for its text at the end of
// the chunk's text; nil when the queue is full. Only the writer calls it.
func (q *queue) slot() *item {
	c := q.tail
	if q.used == len(c.items) || cap(c.text)-len(c.text) < q.room {
		var fresh *chunk
		select {
		case fresh = <-q.free:
		default:
			if q.chunks.Load() >= q.limit {
				return nil
			}
			fresh = q.newChunk()
		}
		c.next.Store(fresh)
		q.tail, q.used, c = fresh, 0, fresh
	}
	it := &c.items[q.used]
	it.ready, it.outcome, it.doubt = 0, 0, 0
	return it
}

// publish hands over the item that slot gave last.
func (q *queue) publish() {
	q.used++
	q.tail.n.Store(int32(q.used))
}

// take appends what was published to dst. Only the reader calls it.
func (q *queue) take(dst []*item) []*item {
	for {
		c := q.head
		next := c.next.Load() // before n: once there is a next one n is final
		for n := int(c.n.Load()); c.taken < n; c.taken++ {
			c.live++
			dst = append(dst, &c.items[c.taken])
		}
		if next == nil {
			return dst
		}
		c.left = true
		q.head = next
		q.recycle(c)
	}
}

// waiting says whether take would find something.
func (q *queue) waiting() bool {
	return q.head.taken < int(q.head.n.Load()) || q.head.next.Load() != nil
}

// done gives the item back to its queue. Only the reader calls it.
func (it *item) done() {
	it.in.live--
	it.in.q.recycle(it.in)
}

func (q *queue) recycle(c *chunk) {
	if !c.left || c.live > 0 {
		return
	}
	c.n.Store(0)
	c.next.Store(nil)
	c.taken, c.left = 0, false
	c.text = c.text[:0]
	select {
	case q.free <- c:
	default:
		q.chunks.Add(-1)
	}
}

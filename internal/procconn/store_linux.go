package procconn

import "github.com/procession-dev/procession/internal/event"

// An item is one record of the fall-back that waits for its turn.
type item struct {
	rec     event.Record
	ready   uint64 // ns, CLOCK_MONOTONIC: its facts were complete then; 0 if none were read
	outcome outcome
	doubt   doubt
	in      *chunk
}

// A store has the items that wait, with their text beside them, and uses their
// memory again. It belongs to one thread.
type store struct {
	items, text, room int // of a chunk: items, bytes of text, bytes that one item may need
	limit             int // chunks in use

	tail   *chunk
	chunks int // in use, or kept in free
	free   []*chunk
}

// A chunk is a piece of a store.
type chunk struct {
	s          *store
	items      []item
	text       []byte
	used, live int // items given out; of them not done
}

// keptChunks is how many free chunks a store keeps. What a storm needed beyond
// that is given back.
const keptChunks = 8

func newStore(items, text, room, limit int) *store {
	s := &store{items: items, text: text, room: room, limit: limit}
	s.tail = s.newChunk()
	return s
}

func (s *store) newChunk() *chunk {
	s.chunks++
	c := &chunk{s: s, items: make([]item, s.items), text: make([]byte, 0, s.text)}
	for i := range c.items {
		c.items[i].in = c
	}
	return c
}

// ready says whether slot has an item to give.
func (s *store) ready() bool {
	c := s.tail
	if c.used < len(c.items) && cap(c.text)-len(c.text) >= s.room {
		return true
	}
	switch n := len(s.free); {
	case n > 0:
		s.tail, s.free = s.free[n-1], s.free[:n-1]
	case s.chunks < s.limit:
		s.tail = s.newChunk()
	default:
		return false
	}
	c.recycle()
	return true
}

// slot is an item to fill, whose record is still another's, with room for its text
// at the end of the chunk's text; nil when too many wait.
func (s *store) slot() *item {
	if !s.ready() {
		return nil
	}
	c := s.tail
	it := &c.items[c.used]
	c.used++
	c.live++
	it.ready, it.outcome, it.doubt = 0, 0, 0
	return it
}

// done gives the item back to its store.
func (it *item) done() {
	it.in.live--
	it.in.recycle()
}

func (c *chunk) recycle() {
	s := c.s
	if c.live > 0 || c == s.tail {
		return
	}
	c.used, c.text = 0, c.text[:0]
	if len(s.free) < keptChunks {
		s.free = append(s.free, c)
		return
	}
	s.chunks--
}

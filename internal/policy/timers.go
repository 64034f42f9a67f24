package policy

import (
	"cmp"
	"container/heap"
	"slices"
)

// never is a time that does not come.
const never = 1<<63 - 1

// timers are values that run out at a time each. At most so many are kept, and
// so many bytes: the one that would run out first makes room.
type timers[T any] struct {
	most, mostBytes int

	byKey map[uint64]*timer[T]
	heap  timerHeap[T]
	bytes int
}

type timer[T any] struct {
	key   uint64
	end   int64
	index int // in the heap
	bytes int
	value T
}

func (t *timers[T]) get(key uint64) (v T) {
	if x := t.byKey[key]; x != nil {
		return x.value
	}
	return v
}

// add keeps v under a new key and returns it, and the one that made room.
func (t *timers[T]) add(key uint64, v T) (added, out T) {
	if t.byKey == nil {
		t.byKey = map[uint64]*timer[T]{}
	}
	if len(t.heap) >= t.most {
		out = t.heap[0].value
		t.remove(t.heap[0].key)
	}
	x := &timer[T]{key: key, value: v, end: never}
	t.byKey[key] = x
	heap.Push(&t.heap, x)
	return v, out
}

// set says when the value under key runs out.
func (t *timers[T]) set(key uint64, end int64) {
	x := t.byKey[key]
	x.end = end
	heap.Fix(&t.heap, x.index)
}

func (t *timers[T]) remove(key uint64) {
	if x := t.byKey[key]; x != nil {
		heap.Remove(&t.heap, x.index)
		delete(t.byKey, key)
		t.bytes -= x.bytes
	}
}

// weigh says how large the value under key is by now.
func (t *timers[T]) weigh(key uint64, bytes int) {
	x := t.byKey[key]
	t.bytes += bytes - x.bytes
	x.bytes = bytes
}

// tooMuch takes out one that has to make room, if all together are too large.
func (t *timers[T]) tooMuch() (v T, ok bool) {
	if t.bytes <= t.mostBytes {
		return v, false
	}
	x := t.heap[0]
	t.remove(x.key)
	return x.value, true
}

// due takes out one that has run out.
func (t *timers[T]) due(now int64) (v T, ok bool) {
	if len(t.heap) == 0 || t.heap[0].end > now {
		return v, false
	}
	x := t.heap[0]
	t.remove(x.key)
	return x.value, true
}

// next is when the first one runs out.
func (t *timers[T]) next() int64 {
	if len(t.heap) == 0 {
		return never
	}
	return t.heap[0].end
}

// each visits all, in the order in which they run out; f may remove the one it
// is called with.
func (t *timers[T]) each(f func(key uint64, v T)) {
	all := slices.Clone(t.heap)
	slices.SortFunc(all, func(a, b *timer[T]) int { return cmp.Compare(a.end, b.end) })
	for _, x := range all {
		f(x.key, x.value)
	}
}

type timerHeap[T any] []*timer[T]

func (h timerHeap[T]) Len() int           { return len(h) }
func (h timerHeap[T]) Less(i, j int) bool { return h[i].end < h[j].end }
func (h timerHeap[T]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements heap.Interface.
func (h *timerHeap[T]) Push(x any) {
	t := x.(*timer[T])
	t.index = len(*h)
	*h = append(*h, t)
}

// Pop implements heap.Interface.
func (h *timerHeap[T]) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return t
}

package match

// Bits is a set of rules, by index.
type Bits []uint64

// NewBits makes an empty set for n rules.
func NewBits(n int) Bits { return make(Bits, (n+63)/64) }

// Set adds rule i.
func (b Bits) Set(i int) { b[i>>6] |= 1 << (i & 63) }

// Clear removes rule i.
func (b Bits) Clear(i int) { b[i>>6] &^= 1 << (i & 63) }

// Has says whether rule i is in the set.
func (b Bits) Has(i int) bool { return i>>6 < len(b) && b[i>>6]&(1<<(i&63)) != 0 }

package match

import "testing"

func TestBits(t *testing.T) {
	b := NewBits(130)
	for _, i := range []int{0, 63, 64, 129} {
		if b.Has(i) {
			t.Errorf("%d is in an empty set", i)
		}
		if b.Set(i); !b.Has(i) {
			t.Errorf("%d is not in the set after Set", i)
		}
	}
	if b.Clear(64); b.Has(64) || b.Count() != 3 || b.Has(1) || b.Has(5000) {
		t.Errorf("after Clear(64): %v", b)
	}
}

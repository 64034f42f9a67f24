package source

import "testing"

// FuzzKept: no file makes parseKept panic, and what it accepts is what
// encodeKept wrote.
func FuzzKept(f *testing.F) {
	good, err := encodeKept([]kept{{Key: "ClusterDetectionPolicy/a", Text: []byte("x"), Good: []byte("y")}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:70])
	f.Add([]byte(checksum([]byte("null")) + "\nnull"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseKept("f", b)
		if err != nil {
			return
		}
		again, err := encodeKept(all)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := parseKept("f", again); err != nil || len(back) != len(all) {
			t.Errorf("%q came back as %v, %v", b, back, err)
		}
	})
}

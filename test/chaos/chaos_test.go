package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/procession-dev/procession/internal/store"
	"github.com/procession-dev/procession/internal/store/storetest"
	"github.com/procession-dev/procession/internal/testenv"
)

// What the comparison must find, and what it must not.
func TestJudge(t *testing.T) {
	e := storetest.Epoch(1)
	rec := func(seqs ...uint64) (rs []store.Record) {
		for _, n := range seqs {
			rs = append(rs, store.Record{Node: "n", Epoch: e, Seq: n, To: n, Kind: store.Alert})
		}
		return rs
	}
	loss := func(from, to uint64) []store.Record {
		return []store.Record{{Node: "n", Epoch: e, Seq: from, To: to, Kind: store.Loss}}
	}
	for _, tt := range []struct {
		name                       string
		stored                     []store.Record
		owed                       []uint64
		missing, doubled, hole, ba int
		told                       int
	}{
		{name: "all there", stored: rec(1, 2, 3), owed: []uint64{1, 2, 3}},
		{name: "missing", stored: rec(1, 2), owed: []uint64{1, 2, 3}, missing: 1},
		{name: "missing and told", stored: slices.Concat(rec(1), loss(2, 3), rec(4)), owed: []uint64{1, 2, 3, 4}, told: 2},
		{name: "hole", stored: rec(1, 3), owed: []uint64{1, 3}, hole: 1},
		{name: "twice", stored: rec(1, 2, 2), doubled: 1, ba: 1},
		{name: "backwards", stored: rec(1, 2, 4, 3), hole: 1, ba: 1},
		{name: "tail told before what is below", stored: slices.Concat(rec(1), loss(5, 9), rec(2, 3, 4)), owed: []uint64{4}},
		{name: "tail told, and what is below never comes", stored: slices.Concat(rec(1), loss(5, 9)), owed: []uint64{2}, missing: 1},
	} {
		owed := ledger{}
		for _, n := range tt.owed {
			owed[name{"n", e, n}] = true
		}
		v := judge(owed, tt.stored)
		if v.missing != tt.missing || v.doubled != tt.doubled || v.holes != tt.hole || v.back != tt.ba || v.told != tt.told {
			t.Errorf("%s: %v", tt.name, v)
		}
		if v.breach() != (tt.missing+tt.doubled+tt.hole+tt.ba > 0) {
			t.Errorf("%s: breach is %v", tt.name, v.breach())
		}
	}
	v := judge(ledger{}, rec(1, 2))
	v.offered("s", "c", rec(1, 2), map[string]int{rec(1)[0].ID("c"): 2})
	if v.sinks["s"] != 1 || !v.breach() {
		t.Errorf("a record was not offered: %v", v)
	}
}

// A short run of everything, on both stores.
func TestChaos(t *testing.T) {
	testenv.Root(t)
	for _, tool := range []string{"mkfs.ext4", "mount", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			testenv.Skip(t, "no "+tool)
		}
	}
	bin := t.TempDir()
	if err := buildBroken(filepath.Join("..", ".."), bin, "./cmd/agent", "./cmd/collector"); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"sqlite", "postgres"} {
		t.Run(kind, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-store", kind, "-seconds", "8", "-rate", "30", "-bin", bin)
			cmd.Env = append(os.Environ(), asChaos+"=1")
			out, err := cmd.CombinedOutput()
			if err != nil && bytes.Contains(out, []byte("loop device")) {
				testenv.Skip(t, string(out))
			}
			t.Logf("%s", out)
			if err != nil {
				t.Error(err)
			}
		})
	}
}

const asChaos = "PROCESSION_TEST_AS_CHAOS"

func TestMain(m *testing.M) {
	if os.Getenv(asChaos) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/procession-dev/procession/internal/spool"
	"github.com/procession-dev/procession/internal/store"
)

// A name is one number of one epoch of one node.
type name struct {
	node  string
	epoch store.Epoch
	seq   uint64
}

// A ledger is what agents owe: records that were seen on their disks at the
// end, or below what was acknowledged to them at any time.
type ledger map[name]bool

// add looks into the spool of a node. While the agent runs only what is
// acknowledged counts: the rest may not be synced yet.
func (l ledger) add(node, dir string, atRest bool) error {
	seen := make(map[spool.Epoch][]uint64)
	rep, err := spool.Inspect(filepath.Join(dir, "spool"), func(it *spool.Item) error {
		if it.Record != nil {
			seen[it.Epoch] = append(seen[it.Epoch], it.Record.Seq)
		}
		return nil
	})
	if rep == nil {
		return err
	}
	for _, e := range rep.Epochs {
		for _, seq := range seen[e.Epoch] {
			if atRest || seq <= e.Acked {
				l[name{node, store.Epoch(e.Epoch), seq}] = true
			}
		}
	}
	if atRest {
		return err
	}
	return nil // a running agent removes segments while we read
}

// verdict is the comparison.
type verdict struct {
	owed, stored, lost, told      int
	missing, doubled, holes, back int
	sinks                         map[string]int // records a sink was not offered
	repeats                       map[string]int // lines the file has twice
	detail                        []string
}

func (v *verdict) breach() bool {
	n := v.missing + v.doubled + v.holes + v.back
	for _, m := range v.sinks {
		n += m
	}
	for _, m := range v.repeats {
		n += m
	}
	return n > 0
}

func (v *verdict) note(format string, args ...any) {
	if len(v.detail) < 20 {
		v.detail = append(v.detail, fmt.Sprintf(format, args...))
	}
}

// judge compares what is owed with what is stored, in the order of cursors.
func judge(owed ledger, records []store.Record) *verdict {
	v := &verdict{owed: len(owed), sinks: map[string]int{}, repeats: map[string]int{}}
	type lane struct {
		node  string
		epoch store.Epoch
	}
	next := make(map[lane]uint64)
	lost := make(map[lane][]store.Record)
	have := make(map[name]bool, len(records))
	for _, r := range records {
		l := lane{r.Node, r.Epoch}
		if r.Kind == store.Loss {
			v.lost++
			lost[l] = append(lost[l], r)
			// The tail of an epoch that ended is told by the collector, before
			// or after the agent brings what it does have below it.
			if r.Seq > next[l]+1 {
				continue
			}
		} else {
			v.stored++
			n := name{r.Node, r.Epoch, r.Seq}
			if have[n] {
				v.doubled++
				v.note("stored twice: %s/%v/%d", r.Node, r.Epoch, r.Seq)
			}
			have[n] = true
		}
		switch want := next[l] + 1; {
		case r.Seq < want && r.Kind != store.Loss:
			v.back++
			v.note("out of order: %s/%v: %d after %d", r.Node, r.Epoch, r.Seq, next[l])
		case r.Seq > want && !covered(lost[l], want, r.Seq-1):
			v.holes++
			v.note("hole: %s/%v: %d after %d", r.Node, r.Epoch, r.Seq, next[l])
		}
		next[l] = max(next[l], r.To)
	}
	for n := range owed {
		if have[n] {
			continue
		}
		if covered(lost[lane{n.node, n.epoch}], n.seq, n.seq) {
			v.told++
			continue
		}
		v.missing++
		v.note("missing, untold: %s/%v/%d", n.node, n.epoch, n.seq)
	}
	return v
}

// covered reports whether losses tell of all numbers from..to.
func covered(losses []store.Record, from, to uint64) bool {
	sort.Slice(losses, func(i, j int) bool { return losses[i].Seq < losses[j].Seq })
	for _, r := range losses {
		if r.Seq <= from && r.To >= from {
			from = r.To + 1
		}
	}
	return from > to
}

// offered counts what is stored and a sink was not offered.
func (v *verdict) offered(sink, cluster string, records []store.Record, got map[string]int) {
	v.sinks[sink] = 0
	for i := range records {
		if records[i].Kind == store.Coverage {
			continue
		}
		if id := records[i].ID(cluster); got[id] == 0 {
			v.sinks[sink]++
			v.note("sink %s was not offered %s", sink, id)
		}
	}
}

// lines counts the ids in an NDJSON file.
func lines(path string) (map[string]int, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	got := make(map[string]int)
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var o struct{ ID string }
		if err := json.Unmarshal(sc.Bytes(), &o); err != nil {
			return nil, fmt.Errorf("%s: %w in %.80q", path, err, sc.Text())
		}
		got[o.ID]++
	}
	return got, sc.Err()
}

func (v *verdict) String() string {
	var sinks []string
	for s, n := range v.sinks {
		sinks = append(sinks, fmt.Sprintf("%s %d", s, n))
	}
	sort.Strings(sinks)
	return fmt.Sprintf("owed %d, stored %d, loss ranges %d: missing untold %d, lost but told %d, stored twice %d, holes %d, out of order %d; not offered to sinks: %s",
		v.owed, v.stored, v.lost, v.missing, v.told, v.doubled, v.holes, v.back, strings.Join(sinks, ", "))
}

package receiver

import (
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"
	"sync"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// Kept is one thing in a Store, in the order of its commit.
type Kept struct {
	From, To uint64
	Text     string        // of a record
	Reason   pb.LossReason // of a loss
}

// An Epoch is as in the protocol.
type Epoch = [16]byte

// A Store is what a collector's disk holds: it outlives servers.
type Store struct {
	mu    sync.Mutex // guards all
	marks map[Epoch]uint64
	log   map[Epoch][]Kept
	made  map[Epoch]uint64 // from heartbeats
}

// NewStore makes an empty one.
func NewStore() *Store {
	return &Store{marks: map[Epoch]uint64{}, log: map[Epoch][]Kept{}, made: map[Epoch]uint64{}}
}

// Snapshot is a backup.
func (s *Store) Snapshot() *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := NewStore()
	maps.Copy(b.marks, s.marks)
	for e, l := range s.log {
		b.log[e] = slices.Clone(l)
	}
	return b
}

// Restore brings a backup back.
func (s *Store) Restore(b *Store) {
	b = b.Snapshot()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.marks, s.log = b.marks, b.log
}

// Mark is up to which number an epoch is stored.
func (s *Store) Mark(e Epoch) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.marks[e]
}

// Log is what is stored of an epoch.
func (s *Store) Log(e Epoch) []Kept {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log[e])
}

// Made is how many numbers of an epoch were given out, as far as was heard.
func (s *Store) Made(e Epoch) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made[e]
}

// Beat takes a heartbeat.
func (s *Store) Beat(hb *pb.Heartbeat) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := Epoch(hb.Epoch)
	s.made[e] = max(s.made[e], hb.Made)
}

// ErrGap says that numbers are missing before a batch or in it.
var ErrGap = errors.New("gap")

// Commit is the fence: what is below the mark is a repetition.
func (s *Store) Commit(b *pb.Batch) (upTo uint64, err error) {
	e := Epoch(b.GetEpoch())
	s.mu.Lock()
	defer s.mu.Unlock()
	next := b.GetFirstSeq()
	if next > s.marks[e]+1 {
		return 0, fmt.Errorf("%w: batch from %d, stored are %d", ErrGap, next, s.marks[e])
	}
	for ri, li := 0, 0; ri < len(b.Records) || li < len(b.Losses); {
		var k Kept
		if ri < len(b.Records) && b.Records[ri].Seq == next {
			r := b.Records[ri]
			if crc32.Checksum(r.Payload, crc32.MakeTable(crc32.Castagnoli)) != r.Crc32C {
				return 0, fmt.Errorf("record %d: wrong CRC", r.Seq)
			}
			k = Kept{From: next, To: next, Text: string(r.Payload)}
			ri++
		} else if li < len(b.Losses) && b.Losses[li].From == next {
			l := b.Losses[li]
			k = Kept{From: next, To: l.To, Reason: l.Reason}
			li++
		} else {
			return 0, fmt.Errorf("%w: number %d is missing in a batch", ErrGap, next)
		}
		next = k.To + 1
		if k.To <= s.marks[e] {
			continue
		}
		k.From = max(k.From, s.marks[e]+1)
		s.log[e] = append(s.log[e], k)
		s.marks[e] = k.To
	}
	return s.marks[e], nil
}

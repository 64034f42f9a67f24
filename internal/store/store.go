package store

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"strconv"
	"time"

	pb "github.com/procession-dev/procession/api/proto/procession/v1"
)

// ErrFull reports that the disk or a quota has no room. Nothing was changed.
var ErrFull = errors.New("no space left")

// ErrInUse reports that another process has the store open.
var ErrInUse = errors.New("in use by another collector")

// ErrDamaged reports that the database itself, not one record, is broken.
var ErrDamaged = errors.New("damaged")

// A GapError refuses a batch that does not follow the mark.
type GapError struct {
	Want uint64 // the sequence number after the mark
	Got  uint64 // where the batch began
}

func (e *GapError) Error() string {
	return fmt.Sprintf("gap: the store waits for sequence number %d, the batch begins at %d", e.Want, e.Got)
}

// An Epoch is the random number of one start of an agent.
type Epoch [16]byte

// ParseEpoch takes the 16 bytes of the wire.
func ParseEpoch(b []byte) (Epoch, error) {
	if len(b) != len(Epoch{}) {
		return Epoch{}, fmt.Errorf("%d bytes, want %d", len(b), len(Epoch{}))
	}
	return Epoch(b), nil
}

// String is 32 hexadecimal digits.
func (e Epoch) String() string { return hex.EncodeToString(e[:]) }

// MaxSeq is the highest sequence number a store takes: its columns are signed.
const MaxSeq = math.MaxInt64

// A Kind says what a Record is. The numbers are stored.
type Kind uint8

// Kinds of records.
const (
	Alert     Kind = 1 // Payload is an encoded Item with an Alert
	Rejected  Kind = 2 // Payload is what came instead of an Item; Reason says why
	Loss      Kind = 3 // Seq..To are gone for good; LossReason and Reason say why
	Damaged   Kind = 4 // was stored whole, and the disk gave back something else; never stored
	Amendment Kind = 5 // Payload is an encoded Item with an Amendment
	Coverage  Kind = 6 // Payload is an encoded Item with a Coverage
	DryRun    Kind = 7 // as Alert or Amendment, of a rule in dry run: for those who ask
)

func (k Kind) String() string {
	switch k {
	case Alert:
		return "alert"
	case Rejected:
		return "rejected"
	case Loss:
		return "loss"
	case Damaged:
		return "damaged"
	case Amendment:
		return "amendment"
	case Coverage:
		return "coverage"
	case DryRun:
		return "dry-run"
	}
	return "Kind(" + strconv.Itoa(int(k)) + ")"
}

// ParseKind is the kind whose String is s. DryRun is not one to ask for by
// itself: it comes on top of others.
func ParseKind(s string) (Kind, bool) {
	for k := Alert; k <= Coverage; k++ {
		if k.String() == s {
			return k, true
		}
	}
	return 0, false
}

// A Record is one row: an item of an agent, a rejected record or a loss.
type Record struct {
	Cursor int64 // set by the store, counts up
	Node   string
	Epoch  Epoch
	Seq    uint64
	To     uint64 // Loss: last number of the range. Otherwise Seq.
	Kind   Kind

	// Of an Alert, as its sender wrote them; copies for queries, Payload rules.
	// Of an Amendment those of its alert; no Rule: its agent is older.
	Severity  pb.Severity
	Rule      string
	EventTime time.Time // also of an Amendment, and the end of a Coverage; zero when unknown

	LossReason pb.LossReason
	Reason     string // Rejected, Loss, Damaged: for people

	Received  time.Time // by the collector
	Committed time.Time // the transaction's time, set by the store

	Payload []byte
	CRC32C  uint32 // of Payload, Castagnoli

	// Policies is the encoded PolicyReport in a Coverage, nil if it has none. It
	// is not stored with the record: the newest of each node is, beside.
	Policies []byte
}

// ID is the record's identity in every sink, the same however often it is
// delivered: cluster/node/epoch/seq, and cluster/node/epoch/from-to for a loss.
func (r *Record) ID(cluster string) string {
	b := make([]byte, 0, len(cluster)+len(r.Node)+2*len(r.Epoch)+24)
	b = append(b, cluster...)
	b = append(b, '/')
	b = append(b, r.Node...)
	b = append(b, '/')
	b = hex.AppendEncode(b, r.Epoch[:])
	b = append(b, '/')
	b = strconv.AppendUint(b, r.Seq, 10)
	if r.Kind == Loss {
		b = append(b, '-')
		b = strconv.AppendUint(b, r.To, 10)
	}
	return string(b)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC32C of a payload.
func Checksum(payload []byte) uint32 { return crc32.Checksum(payload, castagnoli) }

// A Change is one thing to commit: *Batch, *Hello, *Heard, *SinkMoved,
// *SinkReplay, *Lease, *Flagged or *Trim.
type Change interface{ change() }

// A Batch stores consecutive records of one epoch: Records[i+1].Seq is
// Records[i].To+1. Of its Records the store uses Seq, To, Kind and what
// belongs to the Kind; the rest comes from the Batch.
type Batch struct {
	Node     string
	Epoch    Epoch
	Records  []Record
	Received time.Time
}

// A Hello begins a stream of Node. Its Result has the mark of each lane, in
// order. All lanes but the last have ended, and if the Hello is Whole so have
// the node's other epochs: if one ended below the highest number heard of, the
// store adds a Loss, once.
type Hello struct {
	Node  string
	Lanes []Lane // at least one; the last is the running agent's
	Whole bool   // the agent's spool holds records of no other epoch
	At    time.Time
}

// A Lane is an epoch in an agent's spool.
type Lane struct {
	Epoch Epoch
	Made  uint64 // highest number the agent knows to have given out
}

// Heard notes that the agent has given out sequence numbers up to Made.
type Heard struct {
	Node  string
	Epoch Epoch
	Made  uint64
	At    time.Time
}

// SinkMoved says that a sink has taken everything up to Cursor, but for the
// Dead. It is refused (Result.Stale) when the sink was sent back since, or
// another owner has its lease.
type SinkMoved struct {
	Sink   string
	Cursor int64
	Replay int64  // SinkState.Replay, as it was when the sink began
	Owner  string // of the lease; "" does not ask
	Dead   []Dead
}

// Dead is a record that a sink's destination will never take.
type Dead struct {
	Cursor int64
	Reason string
}

// SinkReplay sends a sink back, or forward, to Cursor: what is above it is
// delivered (again).
type SinkReplay struct {
	Sink   string
	Cursor int64
}

// Lease gives the right to do what Name says to one Owner at a time, for a
// time. Its Result is Stale when another one has it. One that is not renewed
// goes to whoever has seen it so for that time: clocks that are set, of
// collectors or of a database, neither shorten nor lengthen it.
type Lease struct {
	Name, Owner string
	For         time.Duration // 0 gives it back
}

// Flagged keeps a word about a node of which a Coverage is known.
type Flagged struct{ Node, Flags string }

// Trim removes up to Limit of the oldest records, none above UpTo.
type Trim struct {
	UpTo  int64
	Limit int
}

func (*Batch) change()      {}
func (*Hello) change()      {}
func (*Heard) change()      {}
func (*SinkMoved) change()  {}
func (*SinkReplay) change() {}
func (*Lease) change()      {}
func (*Flagged) change()    {}
func (*Trim) change()       {}

// A Result answers one Change. Records of a batch add up:
// Items + Rejected + Duplicates = those of the batch that are not losses,
// unless Err is set, then all are zero.
type Result struct {
	Err        error  // *GapError: this batch was refused, others of the commit were not
	UpTo       uint64 // Batch: the mark now
	Items      int    // alerts, amendments and coverages stored
	Rejected   int    // stored
	Losses     int    // loss records stored: of the batch, or added by a Hello
	LostSeqs   uint64 // sequence numbers in those losses
	Duplicates int    // records stored before
	Marks      []uint64
	Stale      bool // SinkMoved, Lease: refused
	Replayed   bool // SinkReplay: a sink has to go to another place
	Trimmed    int  // Trim: records removed
}

// added reports whether readers have something new to read.
func (r *Result) added() bool { return r.Items+r.Rejected+r.Losses > 0 || r.Replayed }

// A Store is one engine. All methods may be called from several goroutines;
// callers other than Queue only read.
type Store interface {
	// Commit applies all changes, in order, in one transaction, and returns
	// after it is on disk. On an error nothing was changed. Results has one
	// entry per change.
	Commit(ctx context.Context, changes []Change) (results []Result, err error)

	// Read appends to dst up to limit records above the cursor, in order. It
	// may return fewer, but none only if there are none.
	Read(ctx context.Context, dst []Record, after int64, limit int) ([]Record, error)

	// Head is the highest cursor given out, 0 for none.
	Head(ctx context.Context) (int64, error)

	// CursorAt is that of the last record committed before t, 0 if there is none.
	CursorAt(ctx context.Context, t time.Time) (int64, error)

	// Sinks tells of all sinks that have a place, by name.
	Sinks(ctx context.Context) (map[string]SinkState, error)

	// DeadLetters are records a sink could not deliver, above a cursor.
	DeadLetters(ctx context.Context, sink string, after int64, limit int) ([]Dead, error)

	// Nodes tells of all nodes heard of, by name.
	Nodes(ctx context.Context) (map[string]NodeState, error)

	// PolicyReports are the newest of each node, those that came after a
	// version; 0: all.
	PolicyReports(ctx context.Context, after int64) ([]PolicyReport, error)

	// Size is what the records take on disk, and what free room the files have
	// beside them, in bytes; estimated.
	Size(ctx context.Context) (used, free int64, err error)

	Close() error
}

// SinkState is how a sink stands.
type SinkState struct {
	Cursor int64     // of the last record it has
	Replay int64     // how often it was sent elsewhere
	Moved  time.Time // when the cursor was stored
	Dead   int64     // records its destination refused, as long as they are kept
}

// NodeState is how a node stands.
type NodeState struct {
	Seen     time.Time // last message that was stored of it
	Coverage []byte    // payload of its last Coverage, nil if there is none
	Flags    string    // what Flagged said last
	At       time.Time // when the collector received that
}

// A PolicyReport is what a node said last about its policies.
type PolicyReport struct {
	Node    string
	Version int64  // set by the store, counts up
	Payload []byte // an encoded pb.PolicyReport
}

// A mark is what is known of one epoch.
type mark struct {
	known bool
	upTo  uint64 // everything up to here is stored or settled
	made  uint64 // highest number heard of
	order int64  // counts the epochs of a node as they were first heard of
	ended bool   // the agent has started anew since
}

// fence cuts from b what the mark says is there already. The rest, if any,
// begins right behind the mark; otherwise the batch is refused.
func fence(b *Batch, upTo uint64) (fresh []Record, duplicates int, err error) {
	for i := range b.Records {
		r := &b.Records[i]
		if r.To <= upTo {
			if r.Kind != Loss {
				duplicates++
			}
			continue
		}
		fresh = b.Records[i:]
		if r.Seq > upTo+1 {
			return nil, 0, &GapError{Want: upTo + 1, Got: r.Seq}
		}
		break
	}
	return fresh, duplicates, nil
}

// tail is the range of an ended epoch that nobody can deliver any more. held
// is what the agent says it made, 0 if it no longer knows the epoch.
func (m mark) tail(held uint64) (from, to uint64, lost bool) {
	from = max(m.upTo, held) + 1
	return from, m.made, m.made >= from
}

// check refuses what no engine could store, so that engines need not.
func check(c Change) error {
	switch c := c.(type) {
	case *Batch:
		if len(c.Records) == 0 {
			return errors.New("batch without records")
		}
		next := c.Records[0].Seq
		for i := range c.Records {
			r := &c.Records[i]
			if r.Seq == 0 || r.Seq != next || r.To < r.Seq || r.To > MaxSeq || (r.Kind != Loss && r.To != r.Seq) {
				return fmt.Errorf("record %d of a batch covers %d..%d, want a range from %d", i, r.Seq, r.To, next)
			}
			next = r.To + 1
		}
	case *Hello:
		if len(c.Lanes) == 0 {
			return errors.New("hello without lanes")
		}
		for _, l := range c.Lanes {
			if l.Made > MaxSeq {
				return fmt.Errorf("lane made %d, limit %d", l.Made, uint64(MaxSeq))
			}
		}
	case *Heard:
		if c.Made > MaxSeq {
			return fmt.Errorf("heard of %d, limit %d", c.Made, uint64(MaxSeq))
		}
	case *SinkMoved:
		if c.Sink == "" || c.Cursor < 0 {
			return fmt.Errorf("sink %q moved to %d", c.Sink, c.Cursor)
		}
	case *SinkReplay:
		if c.Sink == "" || c.Cursor < 0 {
			return fmt.Errorf("sink %q sent to %d", c.Sink, c.Cursor)
		}
	case *Lease:
		if c.Name == "" || c.Owner == "" || c.For < 0 {
			return fmt.Errorf("lease %q of %q for %v", c.Name, c.Owner, c.For)
		}
	case *Trim:
		if c.UpTo < 0 || c.Limit < 1 {
			return fmt.Errorf("trim of %d records up to %d", c.Limit, c.UpTo)
		}
	}
	return nil
}
